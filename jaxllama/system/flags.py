"""Flags that several commands have, said once."""

from __future__ import annotations

import argparse
import math
from typing import Any

_GIB = 2**30


def add_max_in_flight(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--max-in-flight GIB`, which becomes `max_in_flight_bytes`, 2 GiB unless given."""
    parser.add_argument(
        "--max-in-flight",
        dest="max_in_flight_bytes",
        type=_gib,
        default=2 * _GIB,
        metavar="GIB",
        help="host memory for weights on their way from or to a store or a device, at most, beside those that CPU "
        "devices keep (default: 2)",
    )


def add_speculation(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--speculation`, `--draft` and `--draft-tokens`; `speculation` is what the first says (`speculation_of`)."""
    parser.add_argument(
        "--speculation",
        choices=("off", "lookup", "draft", "auto"),
        help="several tokens a step, with the same bits, where a text repeats what came before (lookup), where a draft "
        "model says the same (draft), or both and what requests predict (auto) (default: off, with --draft: draft)",
    )
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="a smaller model of the same vocabulary, at a place like MODEL's, of the same --dtype and --quantize",
    )
    parser.add_argument(
        "--draft-tokens",
        type=int,
        default=4,
        metavar="K",
        help="what it drafts of a sequence in a step, at most (default: %(default)s)",
    )


def speculation_of(args: argparse.Namespace) -> Any:
    """The mode that the flags of `add_speculation` ask for."""
    return args.speculation or ("off" if args.draft is None else "draft")


def _gib(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 2**20:
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, got {text!r}")
    return int(value * _GIB)
