"""Flags that several commands have, said once."""

from __future__ import annotations

import argparse
import math

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


def _gib(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 2**20:
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, got {text!r}")
    return int(value * _GIB)
