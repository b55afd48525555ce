"""`jaxllama serve`: flags to one frozen config. Imports no HTTP library until it runs."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllama.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    JaxLlamaError,
    MissingExtraError,
    PlaceError,
    RequestError,
    StoreError,
    TokenizerError,
)
from jaxllama.system.explain import with_page
from jaxllama.system.flags import add_max_in_flight, add_speculation, speculation_of
from jaxllama.system.memory import collecting_later
from jaxllama.weights.places import ADAPTER_HELP, MODEL_HELP, short_name
from jaxllama_serving.config import REASONING_FIELDS, TOOL_PARSERS, ServerConfig, ServerConfigError
from jaxllama_serving.process import hosts
from jaxllama_serving.process.logs import LOG_FORMATS, set_up_logging

if TYPE_CHECKING:
    from jaxllama import Llama
    from jaxllama.hosts.group import Group
    from jaxllama_serving.process.hosts import Hosts

KEYS_VARIABLE = "JAXLLAMA_API_KEYS"
BAD_INPUT = (
    ServerConfigError,
    CheckpointError,
    ConfigError,
    ConversionError,
    MissingExtraError,
    PlaceError,
    RequestError,
    TokenizerError,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `serve`, in groups."""
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL_HELP)
    _add_network(parser.add_argument_group("network"))
    engine = parser.add_argument_group("model and engine")
    add_model(engine)
    engine.add_argument("--max-queue", type=int, default=256, help="requests that may wait (default: %(default)s)")
    add_behaviour(parser.add_argument_group("API behaviour"))
    _add_access(parser.add_argument_group("access"))
    _add_operation(parser.add_argument_group("operation"))
    _add_limits(parser.add_argument_group("limits and timeouts (seconds)"))
    hosts.add_arguments(
        parser.add_argument_group(
            "many hosts", "One command for every host, but for --process-id. A TPU slice needs none of these flags."
        )
    )


def _add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)"
    )
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")


def add_model(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that say which model answers, and in what size."""
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help="names clients may ask for (default: the folder's name)"
    )
    group.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of weights and cache (default: the checkpoint's)"
    )
    group.add_argument("--quantize", choices=("int8",), help="round the weights on loading (default: as stored)")
    group.add_argument("--adapter", action="append", default=[], metavar="PEFT", help=ADAPTER_HELP)
    add_max_in_flight(group)
    group.add_argument("--kv-dtype", choices=("int8",), help="of the cache (default: as the weights)")
    add_speculation(group)
    group.add_argument("--max-rows", type=int, default=16, help="sequences decoded together (default: %(default)s)")
    group.add_argument("--max-context", type=int, help="longest prompt and completion together (default: the model's)")
    group.add_argument(
        "--num-pages",
        type=int,
        help="pages of each shard's cache, of 16 tokens, on a TPU 128 (default: 2,048 tokens for each of --max-rows)",
    )
    group.add_argument(
        "--data",
        type=int,
        default=1,
        metavar="N",
        help="groups of devices, each with the whole model and 1/N of the rows (default: %(default)s, all share all)",
    )
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept, or 'off' (default: ~/.cache/jaxllama/xla, or JAX's own setting)",
    )
    group.add_argument("--quiet", action="store_true", help="do not show how far loading and compiling are")


def add_behaviour(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that change what a request may ask for and gets."""
    group.add_argument(
        "--generation-config",
        choices=("none", "auto"),
        default="none",
        help="auto: sampling defaults from the checkpoint's generation_config.json (default: %(default)s)",
    )
    group.add_argument("--strict-length", action="store_true", help="refuse prompt + max_tokens beyond the context")
    group.add_argument(
        "--strict-fields",
        action="store_true",
        help="refuse unknown fields (default: ignore them, named in the header x-jaxllama-ignored)",
    )
    group.add_argument("--stop-in-reasoning", action="store_true", help="let stop strings end the reasoning too")
    group.add_argument(
        "--reasoning-field",
        choices=REASONING_FIELDS,
        default="reasoning_content",
        help="where answers have the reasoning (default: %(default)s)",
    )
    group.add_argument(
        "--tool-parser", choices=TOOL_PARSERS, help="format of tool calls (default: by the chat template)"
    )
    group.add_argument(
        "--max-n", type=int, default=16, help="most choices a request may ask for (default: %(default)s)"
    )
    group.add_argument("--price-input", type=float, metavar="USD", help="per million prompt tokens, for estimated_cost")
    group.add_argument("--price-output", type=float, metavar="USD", help="per million completion tokens")


def behaviour(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the flags of `add_behaviour`, and the model's names, say, as fields of `ServerConfig`."""
    fields = (
        "generation_config",
        "strict_length",
        "strict_fields",
        "stop_in_reasoning",
        "reasoning_field",
        "tool_parser",
        "max_n",
        "price_input",
        "price_output",
    )
    names = tuple(args.served_model_name or (short_name(args.checkpoint),))
    return {"model_names": names, **{name: getattr(args, name) for name in fields}}


def _add_access(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api-key-file",
        type=Path,
        help=f"one key a line; {KEYS_VARIABLE} (comma separated) adds more (default: no key)",
    )
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="may be repeated (default: none)"
    )


def _add_operation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--peak-bandwidth",
        type=float,
        metavar="GB/S",
        help="of one device's memory, for /metrics' roofline (default: known for TPUs, else left out)",
    )
    group.add_argument(
        "--exit-on-engine-failure",
        action="store_true",
        help="exit with code 1 when the engine has failed, for a supervisor to restart (default: stay, /health is 503)",
    )
    group.add_argument(
        "--exit-on-device-hang",
        action="store_true",
        help="exit with code 1 when a device does not answer (default: stay, /health is 503 and names it)",
    )
    group.add_argument(
        "--profile-dir",
        type=Path,
        metavar="DIR",
        help="POST /admin/profile records traces into it; needs API keys (default: off)",
    )
    group.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default: %(default)s)"
    )
    group.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        help="json: an object a line, with what it is about as fields (default: %(default)s)",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    defaults = ServerConfig(("default",))
    for flag, kind, text in (
        ("--request-timeout", float, "for a whole request"),
        ("--drain-timeout", float, "for running requests after SIGTERM"),
        ("--header-timeout", float, "for a request's head"),
        ("--body-timeout", float, "for a request's body"),
        ("--write-timeout", float, "for a stream's reader to take anything"),
        ("--idle-timeout", float, "for a connection between requests"),
        ("--max-body-bytes", int, "largest body"),
        ("--max-connections", int, "open connections"),
        ("--max-stream-tokens", int, "tokens a stream's reader may be behind"),
        ("--max-pending-tokens", int, "prompt tokens of all requests at once"),
    ):
        default = getattr(defaults, _field(flag))
        shown = "none" if default is None else f"{default:g}" if kind is float else str(default)
        group.add_argument(flag, type=kind, default=default, help=f"{text} (default: {shown})")


def _field(flag: str) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    return f"{name}_s" if name.endswith("_timeout") else name


def make_config(args: argparse.Namespace, environment: str | None) -> ServerConfig:
    """Returns the config that the parsed flags, and the key variable's value, ask for.

    Raises: ServerConfigError.
    """
    from jaxllama_serving.http.auth import read_keys

    return ServerConfig(
        **behaviour(args),
        host=args.host,
        port=args.port,
        api_keys=read_keys(args.api_key_file, environment),
        cors_origins=tuple(args.cors_origin),
        peak_bandwidth=args.peak_bandwidth,
        exit_on_engine_failure=args.exit_on_engine_failure,
        exit_on_device_hang=args.exit_on_device_hang,
        profile_dir=args.profile_dir,
        max_body_bytes=args.max_body_bytes,
        max_connections=args.max_connections,
        max_stream_tokens=args.max_stream_tokens,
        max_pending_tokens=args.max_pending_tokens,
        header_timeout_s=args.header_timeout,
        body_timeout_s=args.body_timeout,
        write_timeout_s=args.write_timeout,
        idle_timeout_s=args.idle_timeout,
        request_timeout_s=args.request_timeout,
        drain_timeout_s=args.drain_timeout,
    )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal. Returns 0 after a drain, 1 on a failure and 2 on bad input; the last two say why."""
    started = time.perf_counter()
    set_up_logging(args.log_level, args.log_format)
    try:
        config = make_config(args, os.environ.get(KEYS_VARIABLE))
        found = hosts.find_hosts(args, os.environ)
        if found is not None and found.process_id > 0:
            return _follow(args, found)
        try:
            from jaxllama_serving.process.server import serve
        except ModuleNotFoundError as error:
            raise MissingExtraError("serve", error.name or "aiohttp") from None
        return serve(config, lambda: _load(args, found), started=started)
    except StoreError as error:
        return _fail(with_page(error), 1)
    except BAD_INPUT as error:
        return _fail(with_page(error), 2)
    except (JaxLlamaError, OSError) as error:
        return _fail(f"{type(error).__name__}: {with_page(error)}", 1)


def load_model(args: argparse.Namespace, *, max_queue: int, group: Group | None = None) -> Llama:
    """The model that the flags of `add_model` ask for."""
    import jaxllama

    options = jaxllama.EngineOptions(
        max_rows=args.max_rows,
        max_context=args.max_context,
        num_pages=args.num_pages,
        max_queue=max_queue,
        kv_dtype=args.kv_dtype,
        compilation_cache=args.compilation_cache,
        speculation=speculation_of(args),
        draft=args.draft,
        draft_tokens=args.draft_tokens,
    )
    how = {"data": args.data, "dtype": args.dtype, "quantize": args.quantize, "adapters": args.adapter}
    how["max_in_flight_bytes"] = args.max_in_flight_bytes
    how["progress"] = False if args.quiet else None
    return jaxllama.load(args.checkpoint, **how, options=options, group=group)


def _load(args: argparse.Namespace, found: Hosts | None) -> Llama:
    from jaxllama.hosts import group as distributed

    group = None
    if found is not None:
        group = distributed.join(
            found.coordinator,
            num_processes=found.num_processes,
            process_id=found.process_id,
            settings=_settings(args),
            join_timeout_s=args.join_timeout,
            heartbeat_timeout_s=args.heartbeat_timeout,
        )
    try:
        with collecting_later():
            llama = load_model(args, max_queue=args.max_queue, group=group)
            if group is None or group.is_leader:
                llama.engine.warm_up(_say_nothing if args.quiet else _say_what_compiles)
    except Exception as error:
        if group is not None:
            group.leave(error)
        raise
    return llama


def _say_what_compiles(done: int, total: int, names: str) -> None:
    print(f"Compiling {done}/{total}: {names}", flush=True)


def _say_nothing(done: int, total: int, names: str) -> None:
    pass


def _settings(args: argparse.Namespace) -> dict[str, object]:
    """What must be the same in all processes, by the names a user knows."""
    import jaxllama
    from jaxllama.weights.opening import open_model

    def hash_of(place: str, adapters: Sequence[str] = ()) -> str:
        return hashlib.sha256(open_model(place, adapters).manifest.to_json().encode()).hexdigest()[:12]

    return {
        "jaxllama": jaxllama.__version__,
        "the checkpoint": hash_of(args.checkpoint, args.adapter),
        "--draft": args.draft and hash_of(args.draft),
        "--draft-tokens": args.draft_tokens,
        "--dtype": args.dtype,
        "--quantize": args.quantize,
        "--kv-dtype": args.kv_dtype,
        "--max-rows": args.max_rows,
        "--max-context": args.max_context,
        "--num-pages": args.num_pages,
        "--data": args.data,
        "--speculation": speculation_of(args),
    }


def _follow(args: argparse.Namespace, found: Hosts) -> int:
    """What every process but 0 does: no HTTP; it ends when process 0 does. A second signal ends it at once."""
    signals = []

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(1)
        print("Process 0 decides when to stop: signal it. A second signal stops this process at once.", flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    print(f"Process {found.process_id} of {found.num_processes} joins {found.coordinator}.", flush=True)
    llama = _load(args, found)
    print(f"Process {found.process_id} follows process 0.", flush=True)
    llama.engine.follow()
    llama.close()
    print("Stopped.", flush=True)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"jaxllama serve: {message}", file=sys.stderr)
    return code
