"""`serve`: one process from an open port to a drained exit."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxllama_serving.config import ServerConfig, ServerConfigError
from jaxllama_serving.http.app import make_app
from jaxllama_serving.http.connection import Listener, bind
from jaxllama_serving.requests.prepare import generation_config, generation_defaults
from jaxllama_serving.service import SERVICE, Service

if TYPE_CHECKING:
    from jaxllama import Llama

logger = logging.getLogger("jaxllama.serving")

CLOSE_TIMEOUT_S = 10.0
FAILURE_GRACE_S = 2.0
_ON_FAILURE = "--exit-on-engine-failure"
_ON_HANG = "--exit-on-device-hang"


def serve(config: ServerConfig, load: Callable[[], Llama], *, started: float | None = None) -> int:
    """Listens, loads the model, answers until a signal, drains, and returns the exit code.

    The port opens before the model loads, so that `/health` and `/ready` tell what goes on; a port that is taken
    fails at once. The first SIGTERM or SIGINT drains; a second ends the process at once with code 1. `started` is
    the `time.perf_counter()` from which "Ready in" counts.

    Raises: ServerConfigError if the port cannot be bound; whatever `load` raises.
    """
    started = time.perf_counter() if started is None else started
    sock = bind(config.host, config.port)
    with sock, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(config, load, sock, started))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return new_event_loop


async def _serve(config: ServerConfig, load: Callable[[], Llama], sock: socket.socket, started: float) -> int:
    app = make_app(None, config)
    service, listener = app[SERVICE], Listener(app, config)
    stop = _catch_signals(service)
    await listener.start(sock)
    address = _url(sock)
    print(f"Loading the model. {address}/health answers already.", flush=True)
    loading = _load_in_thread(load)
    waits: list[asyncio.Future[Any]] = [loading, stop]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        # A load cannot be interrupted, and a thread inside XLA must not meet the interpreter's end.
        print("Stopped while loading.", flush=True)
        _exit_now(0)
    try:
        llama = loading.result()
        try:
            check_model(llama, config)
            service.set_llama(llama)
            _announce(config, address, time.perf_counter() - started)
            flag = await _failed_before(stop, service, config)
            if flag is not None:
                # Every request has its error by now; it only has to reach the client.
                await service.drain(FAILURE_GRACE_S)
                if flag == _ON_HANG:
                    _exit_now(1)  # The engine's thread will not come back.
                return 1
            ended = await service.drain(config.drain_timeout_s)
            if ended:
                print(f"Ended {ended} requests at the drain timeout of {config.drain_timeout_s:g} s.", flush=True)
        finally:
            await _close(llama)
    finally:
        await listener.close()
    print("Stopped.", flush=True)
    return 0


async def _failed_before(stop: asyncio.Future[None], service: Service, config: ServerConfig) -> str | None:
    """Waits for a signal; returns the flag that asks to exit if what it is about happens before it."""
    failures: dict[asyncio.Future[Any], str] = {}
    # The hang first: it makes the engine fail.
    if config.exit_on_device_hang:
        failures[asyncio.ensure_future(service.device_hang())] = _ON_HANG
    if config.exit_on_engine_failure:
        failures[asyncio.ensure_future(service.engine_failure())] = _ON_FAILURE
    await asyncio.wait([stop, *failures], return_when=asyncio.FIRST_COMPLETED)
    flag = next((flag for failure, flag in failures.items() if failure.done()), None)
    if stop.done():
        flag = None
    if flag is not None:
        reason = next(failure.result() for failure in failures if failure.done())
        print(f"{reason} Exiting ({flag}).", file=sys.stderr, flush=True)
    for failure in failures:
        failure.cancel()
    return flag


def check_model(llama: Llama, config: ServerConfig) -> None:
    """What would otherwise fail at every request fails at the start. Raises: ServerConfigError."""
    if llama.tokenizer is None or llama.chat_template is None:
        missing = "tokenizer" if llama.tokenizer is None else "chat template"
        raise ServerConfigError(
            f"this checkpoint has no {missing}, which a chat server needs. Convert it again with one."
        )
    if config.generation_config == "auto":
        generation_defaults(generation_config(llama))


def _catch_signals(service: Service) -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if stop.done():
            print("Second signal: stopping at once.", flush=True)
            _exit_now(1)
        print("Draining: running requests finish, new ones are refused. Signal again to stop at once.", flush=True)
        service.draining = True
        stop.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


def _load_in_thread(load: Callable[[], Llama]) -> asyncio.Future[Llama]:
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Llama] = loop.create_future()

    def settle(result: Llama | None, error: BaseException | None) -> None:
        if not loaded.done():
            if error is not None:
                loaded.set_exception(error)
            elif result is not None:
                loaded.set_result(result)

    def run() -> None:
        try:
            result = load()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, name="jaxllama-load", daemon=True).start()
    return loaded


async def _close(llama: Llama) -> None:
    closing = asyncio.get_running_loop().run_in_executor(None, llama.close)
    done, _ = await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)
    if not done:
        logger.error("the engine did not stop within %g s", CLOSE_TIMEOUT_S)
        _exit_now(0)
    closing.result()


def _exit_now(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(config: ServerConfig, address: str, seconds: float) -> None:
    key = ' \\\n  -H "Authorization: Bearer $JAXLLAMA_API_KEY"' if config.api_keys else ""
    name = config.model_names[0]
    print(f"Ready in {seconds:.1f} s: {address} is the chat page, {address}/v1/openai the API.")
    print(f"Models: {', '.join(config.model_names)}")
    print("Try:")
    print(
        f'curl {address}/v1/openai/chat/completions -H "Content-Type: application/json"{key} -d '
        f'\'{{"model":"{name}","messages":[{{"role":"user","content":"What is the capital of France?"}}]}}\'',
        flush=True,
    )
