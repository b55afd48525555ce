"""The command line of `jaxllama bench`."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from pathlib import Path

import aiohttp

from jaxllama.errors import JaxLlamaError
from jaxllama.system.progress import show_progress
from jaxllama_serving.client.api import Endpoint
from jaxllama_serving.client.load import Load, Outcome, run_load
from jaxllama_serving.client.report import METRICS, Report, check_plotting
from jaxllama_serving.client.workload import Lengths, random_tasks, tasks_of_file


class BenchError(JaxLlamaError):
    """A flag of `jaxllama bench` is out of range.

    **What to do:** change it; `jaxllama bench --help` has the ranges.
    """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `jaxllama bench`."""
    parser.add_argument("url", metavar="URL", help="of any server with OpenAI's API, e.g. http://localhost:8000")
    parser.add_argument("--model", help="the model's name (default: the first that the server names)")
    parser.add_argument("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY")
    load = parser.add_argument_group("load")
    load.add_argument("--num-requests", type=int, default=100, metavar="N", help="default: 100")
    load.add_argument("--clients", type=int, metavar="N", help="requests at a time (default: 16; any with --rate)")
    load.add_argument("--rate", type=float, metavar="R", help="begin R requests a second, at random moments")
    load.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of one request (default: 600)")
    load.add_argument("--seed", type=int, default=0, help="of prompts and moments (default: 0)")
    prompts = parser.add_argument_group("prompts and answers")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="a text or a JSON object on each line")
    prompts.add_argument("--input-tokens", type=int, default=256, metavar="N", help="of random words (default: 256)")
    prompts.add_argument("--output-tokens", type=int, default=128, metavar="N", help="at most (default: 128)")
    prompts.add_argument("--spread", type=float, default=0.0, metavar="X", help="lengths are N × (1 ± X) (default: 0)")
    prompts.add_argument("--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    prompts.add_argument("--ignore-eos", action="store_true", help="ask for answers of exactly their length")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help=f"count requests within these bounds; metrics: {', '.join(METRICS)}",
    )
    results.add_argument("--json", type=Path, metavar="FILE", help="write every figure, named as vLLM names them")
    results.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (extra: plot)")
    results.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Runs `jaxllama bench`. Returns 0, or 1 if no request succeeded.

    Raises: JaxLlamaError for flags, prompts or a server that cannot be used.
    """
    for name, least in (("num_requests", 1), ("clients", 1), ("input_tokens", 1), ("output_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise BenchError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in ("rate", "timeout"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise BenchError(f"--{name} must be a number above 0, got {value:g}")
    if not 0 <= args.spread <= 1:
        raise BenchError(f"--spread must be from 0 to 1, got {args.spread:g}")
    if args.shared_prefix < 0:
        raise BenchError(f"--shared-prefix must be at least 0, got {args.shared_prefix}")
    if args.prompts is not None and args.shared_prefix:
        raise BenchError("--shared-prefix is for random prompts; with --prompts the file says what they begin with")
    bounds = dict(_bound(text) for text in args.goodput)
    if args.plot is not None:
        check_plotting()
    report = asyncio.run(_bench(args, Endpoint.parse(args.url, args.api_key), bounds))
    print(report.as_text())
    if args.json is not None:
        report.save_json(args.json)
    if args.plot is not None:
        report.save_plot(args.plot)
    return 0 if report.completed else 1


async def _bench(args: argparse.Namespace, endpoint: Endpoint, bounds: dict[str, float]) -> Report:
    clients = args.clients if args.clients is not None or args.rate is not None else 16
    load = Load(args.num_requests, clients, args.rate, args.timeout, args.ignore_eos, args.seed)
    outputs = Lengths(args.output_tokens, args.spread)
    if args.prompts is None:
        tasks = random_tasks(Lengths(args.input_tokens, args.spread), outputs, args.shared_prefix, args.seed)
    else:
        tasks = tasks_of_file(args.prompts, outputs, args.seed)
        next(tasks)  # reads the file, before anything is sent
        tasks = tasks_of_file(args.prompts, outputs, args.seed)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        model = args.model or await endpoint.model(session)
    outcomes: list[Outcome] = []
    with show_progress("bench", load.num_requests, show=False if args.quiet else None) as advance:

        def on_outcome(outcome: Outcome) -> None:
            outcomes.append(outcome)
            advance(items=1, tokens=outcome.num_output_tokens)

        started = time.perf_counter()
        try:
            await run_load(endpoint, model, tasks, load, on_outcome)
        except asyncio.CancelledError:
            # Ctrl-C: what has ended counts.
            print(f"interrupted after {len(outcomes)} of {load.num_requests} requests", file=sys.stderr)
            if not outcomes:
                raise
        seconds = time.perf_counter() - started
    return Report(outcomes, seconds, load, model, endpoint.url, bounds)


def _bound(text: str) -> tuple[str, float]:
    metric, _, value = text.partition(":")
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if metric not in METRICS or not bound > 0:
        raise BenchError(f"--goodput {text!r}: expected METRIC:MS with one of {', '.join(METRICS)}, e.g. ttft:500")
    return metric, bound
