"""`jaxllama verify CKPT [--against SRC]`."""

from __future__ import annotations

import argparse
import sys

from jaxllama.system.progress import show_bytes
from jaxllama.weights.places import PLACE_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jaxllama verify` to a (sub)parser."""
    parser.description = (
        "Reads every file of a checkpoint and compares its hash with the manifest's. Exit code 0 when all are as they "
        "were written, 1 when one is not (they are named), 2 when there is no checkpoint, or no source."
    )
    parser.add_argument("checkpoint", metavar="CKPT", help=f"a checkpoint: {PLACE_HELP}")
    parser.add_argument(
        "--against",
        metavar="SRC",
        help="compare every tensor with what it was converted from, bit by bit, after the same conversion",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="PEFT",
        help="with --against: an adapter that was merged, each in its order (default: none)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Verifies and says what is wrong, a line each, on standard output. What cannot be read is raised."""
    # Here, so that `jaxllama --help` does not wait for jax.
    from jaxllama_convert.checks.verify import verify

    with show_bytes("verify", show=False if args.quiet else None) as progress:
        found = verify(args.checkpoint, args.against, adapters=args.adapter, progress=progress)
    for problem in found.problems:
        print(problem)
    compared = f", {found.num_tensors} tensors compared with {args.against}" if found.num_tensors is not None else ""
    what = f"{found.num_files} files, {found.num_bytes:,} bytes{compared}"
    verdict = f"{len(found.problems)} problem(s)" if found.problems else "all as written"
    print(f"jaxllama verify: {args.checkpoint}: {what}: {verdict}", file=sys.stderr)
    return 1 if found.problems else 0
