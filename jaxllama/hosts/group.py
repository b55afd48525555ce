"""The processes of one many-host engine: how they find each other, and how each learns that another is gone.

Process 0 listens; the others connect and say who they are. Once all are there, JAX's own runtime starts, and the
connections carry process 0's messages and, both ways, a heartbeat. A collective whose peer is gone never returns, so
a watchdog thread in every process ends it by `os._exit` after printing which process is at fault.

The ports belong on a private network: like JAX's own, they ask for no password.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxllama.errors import ConfigError, LockstepError, one_line
from jaxllama.hosts.link import (
    ANSWER,
    BEAT,
    FAILED,
    HELLO,
    MESSAGE,
    QUESTION,
    START,
    STOP,
    Link,
    free_port,
    listen,
    set_up,
)
from jaxllama.model.platforms.startup import prepare_jax

_MAX_HANDSHAKE_BYTES = 1 << 16
_HANDSHAKE_TIMEOUT_S = 3.0
_TICK_S = 0.5
# Others wait longer than process 0 before they judge it: its verdict, which names the process at fault, comes first.
_PATIENCE_S = 3.0
# A dead process breaks the programs of the others: how long they wait to be told before they blame themselves.
_EXPLANATION_S = 2.0
# Clients get their errors, and /health its 503, before the server ends.
_GRACE_S = 3.0
_JAX_TIMEOUT_S = 60


class Group:
    """The processes that run one engine, as one of them sees them. `join` makes it."""

    def __init__(
        self,
        process_id: int,
        links: list[Link],
        num_processes: int,
        heartbeat_timeout_s: float,
        relay: subprocess.Popen[bytes] | None,
    ) -> None:
        self.process_id = process_id
        self.num_processes = num_processes
        self._links = links
        self._relay = relay
        self._timeout_s = heartbeat_timeout_s if process_id == 0 else heartbeat_timeout_s + _PATIENCE_S
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._questions: defaultdict[str, queue.SimpleQueue[bytes]] = defaultdict(queue.SimpleQueue)
        self._answers: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._lock = threading.Lock()
        self._failed = threading.Event()
        self._closed = threading.Event()
        self._on_failure: Callable[[LockstepError], None] | None = None
        for link in links:
            link.heard = time.monotonic()
            threading.Thread(target=self._read, args=(link,), name="jaxllama-link", daemon=True).start()
        threading.Thread(target=self._watch, name="jaxllama-watchdog", daemon=True).start()

    @property
    def is_leader(self) -> bool:
        """Whether this is process 0, which decides."""
        return self.process_id == 0

    def on_failure(self, callback: Callable[[LockstepError], None]) -> None:
        """`callback` runs, on a thread of the group's, when a process is lost; this one ends seconds later."""
        self._on_failure = callback

    def publish(self, message: bytes) -> None:
        """Process 0 sends `message` to all others, in order.

        Raises: LockstepError when one of them is gone.
        """
        self._send_all(MESSAGE, message)

    def messages(self) -> Iterator[bytes]:
        """What process 0 publishes, until it closes its group."""
        while (message := self._inbox.get()) is not None:
            yield message

    def ask(self, topic: str, question: bytes = b"") -> list[bytes]:
        """Process 0 asks all others. Returns what each answers to questions of `topic` (`answer_with`), by process id.

        Raises: as `publish`.
        """
        with self._asking:
            self._send_all(QUESTION, topic.encode() + b"\n" + question)
            return [answer for _, answer in sorted(self._answers.get() for _ in self._links)]

    def answer_with(self, topic: str, answer: Callable[[bytes], bytes]) -> None:
        """Answers process 0's questions of `topic`, those asked already too, on a thread of its own.

        `answer` must not raise.
        """

        def run() -> None:
            while True:
                reply = answer(self._questions[topic].get())
                with contextlib.suppress(OSError):  # The reader of this link says so.
                    self._links[0].send(ANSWER, reply)

        threading.Thread(target=run, name="jaxllama-answers", daemon=True).start()

    def close(self) -> None:
        """Ends the group. Process 0 does it first, which tells the others. May be called twice."""
        if self._closed.is_set() or self._failed.is_set():
            return
        self._closed.set()
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(STOP)
        jax.distributed.shutdown()
        atexit.unregister(_end_now)
        if self._relay is not None:
            assert self._relay.stdin is not None
            self._relay.stdin.close()
            self._relay.wait()

    def leave(self, error: BaseException) -> None:
        """Tells the others that this process ends because of `error`. They end too, and name it.

        If another process is at fault, it is named instead, and this call does not return.
        """
        if self._failed.wait(_EXPLANATION_S):
            time.sleep(2 * _GRACE_S)
        self._closed.set()
        for link in self._links:
            link.try_send(FAILED, _shorten(error).encode())

    def fail(self, error: BaseException) -> None:
        """As `leave`, and ends this process with code 1."""
        self.leave(error)
        self._fail(f"process {self.process_id} failed: {_shorten(error)}")

    def _send_all(self, kind: int, payload: bytes) -> None:
        try:
            for link in self._links:
                link.send(kind, payload)
        except OSError as error:
            raise LockstepError(f"{link.name} cannot be reached: {error}") from error

    # The group's threads

    def _read(self, link: Link) -> None:
        try:
            while True:
                kind, payload = link.receive()
                if kind == MESSAGE and not self.is_leader:
                    self._inbox.put(payload)
                elif kind == QUESTION and not self.is_leader:
                    topic, _, question = payload.partition(b"\n")
                    self._questions[topic.decode()].put(question)
                elif kind == ANSWER and self.is_leader:
                    self._answers.put((link.process_id, payload))
                elif kind == STOP:
                    # Process 0 closes first: the others leave when it says so, and not before.
                    if self.is_leader and not self._closed.is_set():
                        self._fail(f"{link.name} has left before process 0 closed the engine")
                    link.is_done = True
                    self._inbox.put(None)
                elif kind == FAILED:
                    reason = payload.decode(errors="replace")
                    named = reason.startswith("process ") and not self.is_leader
                    self._fail(reason if named else f"{link.name} failed: {reason}")
        except (OSError, EOFError):
            if not link.is_done:
                self._fail(f"{link.name} is gone: its connection closed")
        except ValueError as error:
            self._fail(f"{link.name} sent what no jaxllama sends: {error}")

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_TICK_S):
            now = time.monotonic()
            if now - last > _TICK_S + self._timeout_s / 2:
                # This process itself was stopped for a while: the others' silence is its own.
                for link in self._links:
                    link.heard = now
            last = now
            for link in self._links:
                link.try_send(BEAT)
            for link in self._links:
                if not link.is_done and now - link.heard > self._timeout_s:
                    self._fail(f"{link.name} has stopped answering: nothing from it for {self._timeout_s:g} s")

    def _fail(self, reason: str) -> None:
        """Says whose fault it is, once, and ends the process: at once, or in process 0 after `_GRACE_S`."""
        with self._lock:
            if self._failed.is_set() or (
                self._closed.is_set() and not reason.startswith(f"process {self.process_id} ")
            ):
                return
            self._failed.set()
        grace_s = _GRACE_S if self.is_leader and self._on_failure is not None else 0.2
        threading.Thread(target=_exit_after, args=(grace_s,), daemon=True).start()
        print(
            f"jaxllama: {reason}. This is process {self.process_id} of {self.num_processes}, which ends too.",
            file=sys.stderr,
            flush=True,
        )
        for link in self._links:
            link.try_send(FAILED, reason.encode())
        if self._on_failure is not None:
            self._on_failure(LockstepError(reason))


def join(
    coordinator: str,
    *,
    num_processes: int,
    process_id: int,
    settings: Mapping[str, Any] | None = None,
    join_timeout_s: float = 15.0,
    heartbeat_timeout_s: float = 8.0,
) -> Group:
    """Meets the others at `coordinator` ("HOST:PORT", where process 0 listens) and starts JAX over all processes.

    Call it before anything touches a device. `settings` must be the same in all processes. A process that is silent
    for `heartbeat_timeout_s` counts as gone.

    Raises: ConfigError for arguments out of range; LockstepError naming the processes that have not joined within
    `join_timeout_s`, or what differs.
    """
    host, port = parse_address(coordinator)
    if num_processes < 2 or not 0 <= process_id < num_processes:
        raise ConfigError(
            f"num_processes must be at least 2 and process_id below it, got num_processes={num_processes} and "
            f"process_id={process_id}"
        )
    hello = {
        "process_id": process_id,
        "num_processes": num_processes,
        "name": f"process {process_id} (host {socket.gethostname()}, pid {os.getpid()})",
        "settings": dict(settings or {}) | {"jax": jax.__version__},
    }
    deadline = time.monotonic() + join_timeout_s
    relay = None
    if process_id == 0:
        links, jax_address = _gather(host, port, hello, deadline, join_timeout_s)
    else:
        links, jax_port = _report(host, port, hello, deadline, join_timeout_s)
        relay, relay_port = _start_relay(host, jax_port)
        jax_address = f"127.0.0.1:{relay_port}"
    group = Group(process_id, links, num_processes, heartbeat_timeout_s, relay)
    atexit.register(_end_now)
    try:
        prepare_jax()
        # JAX would take SIGTERM for itself.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            jax_address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate",
            coordinator_bind_address=jax_address,
            initialization_timeout=_JAX_TIMEOUT_S,
            shutdown_timeout_seconds=5,
        )
        jax.devices()
    except Exception as error:
        group.leave(error)
        raise LockstepError(f"JAX's runtime does not start: {error}") from error
    return group


def parse_address(address: str) -> tuple[str, int]:
    """ "HOST:PORT" as its parts; an IPv6 address stands in brackets. Raises: ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"the coordinator must be HOST:PORT, with a port from 1 to 65535, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _gather(
    host: str, port: int, hello: Mapping[str, Any], deadline: float, timeout_s: float
) -> tuple[list[Link], str]:
    """Process 0: waits for all others. Returns their links and the address for JAX's runtime."""
    num_processes = hello["num_processes"]
    links: dict[int, Link] = {}
    refused = ""
    with listen(host, port) as listener:
        told = time.monotonic()
        while len(links) < num_processes - 1:
            now = time.monotonic()
            missing = [i for i in range(1, num_processes) if i not in links]
            if now > deadline:
                reason = f"{_processes(missing)} not joined within {timeout_s:g} s{refused}"
                for link in links.values():
                    link.try_send(FAILED, reason.encode())
                raise LockstepError(reason)
            if now - told > 5.0:
                print(f"Waiting: {_processes(missing)} not joined yet{refused}", flush=True)
                told = now
            listener.settimeout(min(0.5, max(0.01, deadline - now)))
            with contextlib.suppress(TimeoutError):
                sock, _ = listener.accept()
                joined, problem = _welcome(sock, hello, links)
                if joined is not None:
                    links[joined.process_id] = joined
                elif problem:
                    refused = f" ({problem})"
                    print(f"Refused: {problem}", flush=True)
        bound = listener.getsockname()[0]
    jax_port = free_port(bound)
    for link in links.values():
        link.send(START, json.dumps({"jax_port": jax_port}).encode())
    address = f"[{bound}]" if ":" in bound else bound
    return [links[i] for i in sorted(links)], f"{address}:{jax_port}"


def _welcome(sock: socket.socket, own: Mapping[str, Any], links: Mapping[int, Link]) -> tuple[Link | None, str]:
    """Reads who connects. Returns its link, or None and what is wrong with it; a stranger is not worth a word."""
    sock.settimeout(_HANDSHAKE_TIMEOUT_S)
    link = Link(sock, 0, "a process")
    try:
        kind, payload = link.receive(_MAX_HANDSHAKE_BYTES)
        hello = json.loads(payload)
        process_id, name, settings = int(hello["process_id"]), str(hello["name"])[:200], dict(hello["settings"])
        num_processes = int(hello["num_processes"])
        if kind != HELLO:
            raise ValueError
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        sock.close()
        return None, ""
    differing = [
        f"{key} is {settings.get(key)!r} there and {own['settings'].get(key)!r} in process 0"
        for key in sorted(settings.keys() | own["settings"].keys())
        if settings.get(key) != own["settings"].get(key)
    ]
    if num_processes != own["num_processes"]:
        differing.insert(0, f"num_processes is {num_processes} there and {own['num_processes']} in process 0")
    if process_id in links and links[process_id].is_open():
        differing.insert(0, f"{links[process_id].name} has that process id already")
    elif not 0 < process_id < own["num_processes"]:
        differing.insert(0, f"its process id is not from 1 to {own['num_processes'] - 1}")
    if differing:
        problem = f"{name}: {'; '.join(differing)}"
        link.try_send(FAILED, f"process 0 refuses {problem}".encode())
        sock.close()
        return None, problem
    set_up(sock)
    link.process_id, link.name = process_id, name
    return link, ""


def _report(
    host: str, port: int, hello: Mapping[str, Any], deadline: float, timeout_s: float
) -> tuple[list[Link], int]:
    """Every other process: tells process 0 that it is here. Returns the link to it and the port of JAX's runtime."""
    address = f"{host}:{port}"
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=_HANDSHAKE_TIMEOUT_S)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise LockstepError(
                    f"process 0 cannot be reached at {address} within {timeout_s:g} s: {error}"
                ) from None
            time.sleep(0.2)
    link = Link(sock, 0, f"process 0 (at {address})")
    try:
        link.send(HELLO, json.dumps(hello).encode())
        # Process 0 has a deadline of its own, and says what it waits for when that passes.
        sock.settimeout(timeout_s + _PATIENCE_S)
        kind, payload = link.receive(_MAX_HANDSHAKE_BYTES)
        if kind == FAILED:
            raise LockstepError(payload.decode(errors="replace"))
        jax_port = int(json.loads(payload)["jax_port"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise LockstepError(f"{link.name} went away before all processes had joined: {error!r}") from None
    set_up(sock)
    return [link], jax_port


def _start_relay(host: str, port: int) -> tuple[subprocess.Popen[bytes], int]:
    """Starts relay.py, which lives as long as its standard input is open. Returns it and its port."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("relay.py")), host, str(port)]
    # A session of its own: Ctrl-C in a terminal must not end it before this process.
    relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert relay.stdout is not None
    line = relay.stdout.readline()
    if not line.strip():
        raise LockstepError(f"the relay to process 0 does not start (exit code {relay.wait()})")
    return relay, int(line)


def _end_now() -> None:
    """Ends a process whose group was not closed: JAX's own end waits a minute and more for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _exit_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(1)


def _processes(ids: list[int]) -> str:
    names = ", ".join(map(str, ids))
    return f"process {names} has" if len(ids) == 1 else f"processes {names} have"


def _shorten(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 400)}"
