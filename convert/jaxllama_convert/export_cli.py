"""`jaxllama export CKPT DST`."""

from __future__ import annotations

import argparse
import sys

from jaxllama.system.progress import show_bytes
from jaxllama.weights.places import ADAPTER_HELP, MODEL_HELP

# jax and orbax are imported in `run`, so that `jaxllama --help` does not wait for them.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jaxllama export` to a (sub)parser."""
    parser.add_argument("checkpoint", metavar="CKPT", help=MODEL_HELP)
    parser.add_argument(
        "dst", metavar="DST", help="the folder to make, here or in a bucket: gs://bucket/path, s3://bucket/path"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of all weights (default: as they are stored; int8 as compressed-tensors' W8A16)",
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="of a file, as 5GB or 2GiB (default: %(default)s)"
    )
    parser.add_argument("--adapter", action="append", default=[], metavar="PEFT", help=ADAPTER_HELP)
    parser.add_argument(
        "--force", action="store_true", help="replace DST if jaxllama export wrote it; in a bucket, any model"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the export and reports on standard error. Returns 0; what goes wrong is raised."""
    from jaxllama.weights.exporting.export import export

    with show_bytes("export") as progress:
        report = export(
            args.checkpoint,
            args.dst,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            force=args.force,
            adapters=args.adapter,
            progress=progress,
        )
    kind = f"{report.quantize} (W8A16) and {report.dtype}" if report.quantize else report.dtype
    print(
        f"jaxllama export: wrote {report.where}: {report.num_params:,} parameters, {report.num_bytes:,} bytes "
        f"of {kind} in {report.num_files} file(s), {report.seconds:.1f} s",
        file=sys.stderr,
    )
    return 0
