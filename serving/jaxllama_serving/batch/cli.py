"""`jaxllama batch`: a file of requests to a file of answers. Imports no HTTP library until it runs."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllama.errors import MissingExtraError
from jaxllama.weights.places import MODEL_HELP
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.process.cli import add_behaviour, add_model, behaviour, load_model

if TYPE_CHECKING:
    from jaxllama import Llama
    from jaxllama_serving.batch.files import InputFile, OutputFile
    from jaxllama_serving.batch.run import Counts

DESCRIPTION = """\
Answers every line of IN and appends the answers to OUT, in any order. Lines are those of OpenAI's batch files,
{"custom_id": …, "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body": {…}}, and a body gets
what `jaxllama serve` would answer. A line that is no request gets an answer that says so. Stopped at any moment, the
same command goes on where it was: no line is answered twice, none is lost. Exit code 0 when every line has its answer,
1 on a failure, 2 on bad input."""
MAX_QUEUE = 1_000_000
MAX_PENDING_TOKENS = 2**40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `batch`, in groups."""
    parser.description = DESCRIPTION
    parser.add_argument("input", metavar="IN", type=Path, help="requests, one JSON object a line")
    parser.add_argument("output", metavar="OUT", type=Path, help="answers; made, or gone on with")
    parser.add_argument(
        "--checkpoint",
        metavar="MODEL",
        required=True,
        help=MODEL_HELP,
    )
    add_model(parser.add_argument_group("model and engine"))
    add_behaviour(parser.add_argument_group("API behaviour"))


def run(args: argparse.Namespace) -> int:
    """Answers the batch. Returns 0.

    Raises: JaxLlamaError and OSError, which `jaxllama` turns into a line and an exit code.
    """
    try:
        from jaxllama_serving.batch.files import BatchError, InputFile, OutputFile
        from jaxllama_serving.process.server import check_model
    except ModuleNotFoundError as error:
        raise MissingExtraError("serve", error.name or "aiohttp") from None
    # The lines at work are bounded, so nothing in the server needs a bound that a batch could meet.
    config = ServerConfig(
        **behaviour(args), max_connections=max(1, 4 * args.max_rows), max_pending_tokens=MAX_PENDING_TOKENS
    )
    started = time.perf_counter()
    source = InputFile(args.input, config.max_body_bytes)
    try:
        if args.output.exists() and source.is_same(args.output.stat()):
            raise BatchError(f"{args.output} is the input itself; give another file for the answers")
        with OutputFile(args.output, source.lines) as output:
            if len(output.done) == len(source.lines):
                print(f"{args.output}: all {len(source.lines)} lines had their answers already", file=sys.stderr)
                return 0
            with _load(args) as llama:
                check_model(llama, config)
                counts = _answer(args, llama, config, source, output)
    finally:
        source.close()
    ignored = f", {counts.ignored} with fields that were ignored, which they name" if counts.ignored else ""
    before = f"{len(output.done)} lines had their answers already, " if output.done else ""
    print(
        f"{args.output}: {before}{counts.lines} answered in {time.perf_counter() - started:.0f} s, "
        f"{counts.errors} of them with an error" + ignored,
        file=sys.stderr,
    )
    return 0


def _load(args: argparse.Namespace) -> Llama:
    llama = load_model(args, max_queue=MAX_QUEUE)
    llama.engine.warm_up(lambda done, total, names: None if args.quiet else _say(f"compiling {done}/{total}: {names}"))
    return llama


def _answer(
    args: argparse.Namespace, llama: Llama, config: ServerConfig, source: InputFile, output: OutputFile
) -> Counts:
    from jaxllama.system.progress import show_progress
    from jaxllama_serving.batch.run import run_batch

    with show_progress("batch", len(source.lines), show=not args.quiet, done=len(output.done)) as advance:
        return asyncio.run(run_batch(llama, config, source, output, 2 * args.max_rows, advance))


def _say(text: str) -> None:
    print(f"jaxllama batch: {text}", file=sys.stderr, flush=True)
