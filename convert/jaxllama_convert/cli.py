"""`jaxllama convert SRC DST`."""

from __future__ import annotations

import argparse
import sys

from jaxllama.errors import JaxLlamaError, StoreError, one_line
from jaxllama.system.explain import with_page
from jaxllama.system.flags import add_max_in_flight
from jaxllama.system.progress import show_bytes
from jaxllama.weights.places import ADAPTER_HELP, PLACE_HELP

_GB = 1e9
# Lists of everything that is wrong are long; what each entry quotes is short already.
_MAX_MESSAGE_CHARS = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jaxllama convert` to a (sub)parser."""
    parser.add_argument(
        "src",
        metavar="SRC",
        help="a folder of safetensors with config.json, quantised or not, a GGUF file (any part of it), or a "
        "checkpoint, to copy it or to change its dtype: "
        f"{PLACE_HELP}",
    )
    parser.add_argument(
        "dst", metavar="DST", help="the checkpoint to make: a folder, gs://bucket/path or s3://bucket/path"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype of the stored weights (default: float32 if every matrix of SRC is float32, else bfloat16)",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8",),
        help="round the matrices, with a scale an output channel; those of SRC that are such int8 stay (default: no)",
    )
    parser.add_argument("--adapter", action="append", default=[], metavar="PEFT", help=ADAPTER_HELP)
    parser.add_argument("--force", action="store_true", help="replace DST if it is a jaxllama checkpoint")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_max_in_flight(parser)
    parser.add_argument("--verify", action="store_true", help="read everything back and compare its hashes")


def run(args: argparse.Namespace) -> int:
    """Runs the conversion and reports on standard error. Returns 0, 1 (writing failed) or 2 (bad input)."""
    # Here, so that `jaxllama --help` works without the convert extra and does not wait for jax.
    from jaxllama_convert.staging import OutputError
    from jaxllama_convert.write import convert

    try:
        with show_bytes("convert", show=False if args.quiet else None) as progress:
            report = convert(
                args.src,
                args.dst,
                dtype=args.dtype,
                quantize=args.quantize,
                force=args.force,
                verify=args.verify,
                max_in_flight_bytes=args.max_in_flight_bytes,
                adapters=args.adapter,
                progress=progress,
            )
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to resume")
        return 130
    except JaxLlamaError as error:
        _say(f"error: {one_line(with_page(error), _MAX_MESSAGE_CHARS)}")
        return 1 if isinstance(error, OutputError | StoreError) else 2
    for warning in report.warnings:
        _say(f"warning: {one_line(warning, _MAX_MESSAGE_CHARS)}")
    kind = f"{report.quantize} and {report.dtype}" if report.quantize else report.dtype
    memory = f"; peak RAM {report.peak_ram_bytes / _GB:.2f} GB" if report.peak_ram_bytes else ""
    resumed = f" ({report.num_resumed} tensors were there already)" if report.num_resumed else ""
    _say(
        f"wrote {report.path}: {report.num_params:,} parameters, {report.num_bytes:,} bytes of {kind}{resumed} "
        f"in {report.seconds:.1f} s{memory}"
    )
    return 0


def _say(text: str) -> None:
    print(f"jaxllama convert: {text}", file=sys.stderr)
