"""`jaxllama check`: on the devices at hand, within three minutes. What would go wrong before a model runs at all is
`jaxllama doctor`'s; what a slice that is not there would do is `jaxllama plan`'s."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator

import jax

from jaxllama.engine.compilation import use_compilation_cache
from jaxllama.errors import ConfigError
from jaxllama.hosts.group import Group, join
from jaxllama.llama.check.bits import check_bits
from jaxllama.llama.check.hosts import follow, lead
from jaxllama.llama.check.kernels import check_attention, check_choice, check_model, check_products
from jaxllama.llama.check.model import chosen, fitting
from jaxllama.llama.check.result import Result, as_markdown, collected, environment
from jaxllama.llama.check.speed import check_links, check_speed, free_bytes
from jaxllama.llama.check.steps import Planner, check_steps
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import make_mesh
from jaxllama.model.platforms.startup import prepare_jax
from jaxllama.system.versions import version_of
from jaxllama.weights.opening import open_model
from jaxllama.weights.places import MODEL_HELP, short_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `check`."""
    parser.add_argument(
        "checkpoint",
        metavar="MODEL",
        nargs="?",
        help=f"of which only config.json is read: {MODEL_HELP} (default: a random 8B or 1B, on a CPU a small one)",
    )
    hosts = parser.add_argument_group("many hosts, one process a host")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 meets the others; the same for all")
    hosts.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    hosts.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1; process 0 alone prints the table")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table. Returns 1 if something does not hold, else 0."""
    started = time.monotonic()
    prepare_jax()
    group = _join(args)
    try:
        results = _results(args, group)
    except BaseException as error:
        if group is not None:
            group.leave(error)
        raise
    code = int(any(result.status == "fails" for result in results))
    if group is not None and not group.is_leader:
        return code
    about = environment(jax.devices())
    seconds = time.monotonic() - started
    if args.json:
        found = {**about, "seconds": seconds, "results": [dataclasses.asdict(result) for result in results]}
        print(json.dumps(found, indent=2))
    else:
        print(as_markdown(about, results, seconds), end="")
    return code


def _results(args: argparse.Namespace, group: Group | None) -> list[Result]:
    """Of this process, and in process 0 of all together."""
    use_compilation_cache(None)
    given = None if args.checkpoint is None else open_model(args.checkpoint, ()).config

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    devices = jax.devices()
    say(f"{len(devices)} × {devices[0].device_kind}")
    name, config = _chosen(given, "" if args.checkpoint is None else short_name(args.checkpoint))
    results = check(name, config, say)
    if group is None:
        return results
    if group.is_leader:
        return lead(group, results, config, say)
    follow(group, results, config)
    return results


def _join(args: argparse.Namespace) -> Group | None:
    """The other processes, if the flags name any. Raises: ConfigError."""
    given = (args.coordinator, args.num_processes, args.process_id)
    if given == (None, None, None):
        return None
    if None in given:
        raise ConfigError("many hosts need --coordinator, --num-processes and --process-id, all three")
    settings = {"jaxllama": version_of("jaxllama"), "MODEL": args.checkpoint}
    return join(
        args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        settings=settings,
        join_timeout_s=60,
    )


def _chosen(given: LlamaConfig | None, name: str) -> tuple[str, LlamaConfig]:
    """The model to measure, or as much of it as this process's devices have room for; None: one of ours."""
    device, num_devices = jax.local_devices()[0], jax.local_device_count()
    room = free_bytes(device)
    if given is None:
        return chosen(device.platform, room, num_devices)
    return fitting(name, given, 0.6 * (room or 8 * 2**30) * num_devices)


def check(name: str, config: LlamaConfig, say: Callable[[str], None]) -> list[Result]:
    """All parts, on a mesh of this process's devices: the kernels first, because nothing after them means anything
    without."""
    mesh = make_mesh(config, devices=jax.local_devices())
    planner = Planner(config, mesh)
    reached: dict[str, float] = {}
    parts: tuple[tuple[str, Callable[[], Iterator[Result]]], ...] = (
        ("attention", lambda: check_attention(config, mesh)),
        ("products", lambda: check_products(config, mesh)),
        ("layers", lambda: check_model(config, mesh)),
        ("speed", lambda: check_speed(mesh, reached)),
        ("collectives", lambda: check_links(mesh)),
        ("choice of kernel", lambda: check_choice(config, mesh)),
        ("model", lambda: check_steps(name, config, mesh, reached, planner)),
        # Last, because it compiles most, and promises least of devices that are no CPU.
        ("same bits", lambda: check_bits(config, mesh)),
    )
    try:
        return collected(parts, say)
    finally:
        planner.close()
