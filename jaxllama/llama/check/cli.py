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
from jaxllama.llama.check.bits import check_bits
from jaxllama.llama.check.kernels import check_attention, check_model, check_products
from jaxllama.llama.check.model import chosen, fitting
from jaxllama.llama.check.result import Result, as_markdown, collected, environment
from jaxllama.llama.check.speed import check_links, check_speed, free_bytes
from jaxllama.llama.check.steps import check_steps
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import make_mesh
from jaxllama.model.platforms.startup import prepare_jax
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table. Returns 1 if something does not hold, else 0."""
    started = time.monotonic()
    prepare_jax()
    use_compilation_cache(None)
    given = None if args.checkpoint is None else open_model(args.checkpoint, ()).config
    name = "" if args.checkpoint is None else short_name(args.checkpoint)

    def say(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    devices = jax.devices()
    say(f"{len(devices)} × {devices[0].device_kind}")
    results = check(given, name, say)
    about = environment(devices)
    seconds = time.monotonic() - started
    if args.json:
        found = {**about, "seconds": seconds, "results": [dataclasses.asdict(result) for result in results]}
        print(json.dumps(found, indent=2))
    else:
        print(as_markdown(about, results, seconds), end="")
    return int(any(result.status == "fails" for result in results))


def check(given: LlamaConfig | None, name: str, say: Callable[[str], None]) -> list[Result]:
    """All parts, on a mesh of all devices: the kernels first, because nothing after them means anything without.

    `given` is the model to measure; None: one that these devices have room for.
    """
    device = jax.devices()[0]
    room = free_bytes(device)
    if given is None:
        name, config = chosen(device.platform, room, jax.device_count())
    else:
        name, config = fitting(name, given, 0.6 * (room or 8 * 2**30) * jax.device_count())
    mesh = make_mesh(config)
    reached: dict[str, float] = {}
    parts: tuple[tuple[str, Callable[[], Iterator[Result]]], ...] = (
        ("attention", lambda: check_attention(config, mesh)),
        ("products", lambda: check_products(config, mesh)),
        ("layers", lambda: check_model(config, mesh)),
        ("same bits", lambda: check_bits(config, mesh)),
        ("speed", lambda: check_speed(mesh, reached)),
        ("collectives", lambda: check_links(mesh)),
        ("model", lambda: check_steps(name, config, mesh, reached)),
    )
    return collected(parts, say)
