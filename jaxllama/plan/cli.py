"""`jaxllama plan`: flags to one `Setup`, and the answer as text, JSON or a picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllama.errors import ConfigError, PlanError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.platforms import tpu
from jaxllama.model.platforms.chips import GENERATIONS
from jaxllama.plan import drafting
from jaxllama.plan.planner import Plan, as_json, candidates, describe_mesh, plan, search
from jaxllama.plan.plot import check_plotting, save_plot
from jaxllama.plan.report import as_table, as_text
from jaxllama.plan.setup import DTYPES, Setup
from jaxllama.plan.topology import Topology
from jaxllama.system.strict_json import parse_object
from jaxllama.weights.checkpoint import read_configs
from jaxllama.weights.opening import read_config
from jaxllama.weights.places import PLACE_HELP, is_remote

_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `plan`, in groups."""
    parser.add_argument(
        "model", metavar="MODEL", help=f"config.json, or a model that has one, or a GGUF file: {PLACE_HELP}"
    )
    model = parser.add_argument_group("what is planned")
    model.add_argument("--topology", metavar="NAME", help="TPU slice, such as v6e:2x4")
    model.add_argument("--data", type=int, help="groups of devices that rows are split over (default: 1)")
    model.add_argument("--weights", choices=DTYPES, default="bf16", help="default: %(default)s")
    model.add_argument("--kv", choices=DTYPES, default="bf16", help="default: %(default)s")
    model.add_argument("--rows", type=int, default=16, help="sequences decoded together (default: %(default)s)")
    model.add_argument(
        "--context", type=int, default=2048, metavar="TOKENS", help="length of every row (default: %(default)s)"
    )
    model.add_argument(
        "--prompt", type=int, metavar="TOKENS", help="for the time to first token (default: half the context)"
    )
    model.add_argument("--page-size", type=int, default=Setup.page_size, help="tokens (default: %(default)s)")
    model.add_argument(
        "--draft", metavar="MODEL", help="a draft model's config, as MODEL: say what speculation with it gains"
    )
    model.add_argument(
        "--draft-tokens", type=int, default=4, metavar="K", help="drafted of a row in a step (default: %(default)s)"
    )
    model.add_argument(
        "--acceptance", type=float, default=0.7, metavar="A", help="how many drafts are right (default: %(default)s)"
    )
    model.add_argument(
        "--chunk", type=int, help="of prefill, tokens (default: the engine's largest that the prompt fills)"
    )
    answer = parser.add_argument_group("the answer")
    answer.add_argument(
        "--search",
        action="store_true",
        help="compare the meshes of --topology, or without it of every slice, and recommend one; with --draft: the "
        "numbers of tokens to draft",
    )
    answer.add_argument("--quiet", action="store_true", help="do not say on stderr what is being compiled")
    answer.add_argument("--json", action="store_true", help="print it as JSON")
    answer.add_argument("--plot", metavar="FILE", type=Path, help="draw HBM and latency, e.g. out.png")
    answer.add_argument(
        "--dollars-per-chip-hour", metavar="X", help="a price, or one for each generation: v5e=1.2,v6e=2.7"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plans, and prints the answer. Whether it fits does not change the exit code."""
    if args.topology is None and (args.draft or not args.search):
        raise PlanError("--topology is missing; give one such as v6e:2x4, or --search to compare all")
    if args.data is not None and args.search and args.draft is None:
        raise PlanError("--data and --search exclude each other: a search tries every split")
    if args.plot is not None:
        check_plotting()
    progress = (lambda line: None) if args.quiet else _progress
    price = _prices(args.dollars_per_chip_hour)
    prompt = max(1, args.context // 2) if args.prompt is None else args.prompt
    setup = Setup(
        config=_load_config(args.model),
        topology=Topology.parse(args.topology or "v6e:2x4"),
        rows=args.rows,
        context=args.context,
        data=1 if args.data is None else args.data,
        weights=args.weights,
        kv=args.kv,
        page_size=args.page_size,
        chunk_tokens=_chunk(prompt) if args.chunk is None else args.chunk,
        prompt_tokens=prompt,
    )
    if args.draft is not None:
        return _run_drafted(args, setup, progress)
    if args.search:
        plans = search(candidates(setup, everywhere=args.topology is None), dollars=price, progress=progress)
    else:
        dollars = price(setup.topology.generation.name)
        plans = [plan(setup, dollars_per_chip_hour=dollars, progress=progress)]
    print(_answer(plans, as_search=args.search, in_json=args.json), end="")
    if args.plot is not None:
        save_plot(plans[0], args.plot)
    return 0


def _run_drafted(args: argparse.Namespace, setup: Setup, progress: Callable[[str], None]) -> int:
    """Plans with a draft model, and prints the answer."""
    for flag, value in (("--plot", args.plot), ("--dollars-per-chip-hour", args.dollars_per_chip_hour)):
        if value is not None:
            raise PlanError(f"{flag} and --draft exclude each other: plan without --draft for it")
    setups = drafting.drafted(setup, _load_config(args.draft), args.draft_tokens, args.acceptance)
    found = drafting.plan_drafted(*setups, args.acceptance, searches=args.search, progress=progress)
    print(json.dumps(drafting.as_json(found), indent=2) if args.json else drafting.as_text(found).rstrip("\n"))
    return 0


def _chunk(prompt: int) -> int:
    """What the engine cuts most of a prompt into."""
    return max((size for size in tpu.CHUNK_SIZES if size <= prompt), default=min(tpu.CHUNK_SIZES))


def _answer(plans: list[Plan], *, as_search: bool, in_json: bool) -> str:
    best = plans[0]
    if in_json:
        value: dict[str, Any] = as_json(best)
        if as_search:
            value = {"recommended": value, "fits": best.fits, "candidates": [as_json(p) for p in plans[:_SHOWN]]}
        return json.dumps(value, indent=2) + "\n"
    if not as_search:
        return as_text(best)
    left_out = f"{len(plans) - _SHOWN} more fit\n" if len(plans) > _SHOWN else ""
    return f"{as_table(plans[:_SHOWN])}{left_out}\nrecommended: {describe_mesh(best.setup)}\n\n{as_text(best)}"


def _load_config(model: str) -> LlamaConfig:
    path = Path(model).expanduser()
    if is_remote(model) or path.suffix == ".gguf":
        return read_config(model)
    if path.is_dir():
        return read_configs(path)[0] if (path / "config.json").exists() else read_config(model)
    if not path.is_file():
        raise PlanError(f"{path} does not exist; expected a config.json, a Hugging Face folder or a checkpoint")
    return LlamaConfig.from_hf(parse_object(path.read_bytes(), path, ConfigError))


def _prices(text: str | None) -> Callable[[str], float | None]:
    """The price of a chip's hour by generation. Raises: PlanError."""
    if text is None:
        return lambda _: None
    prices: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            price = float(number)
        except ValueError:
            price = -1.0
        if not 0 < price < float("inf") or (name and name not in GENERATIONS):
            raise PlanError(
                f"--dollars-per-chip-hour: {part!r} is neither a positive price nor GENERATION=PRICE with one of "
                f"{', '.join(GENERATIONS)}"
            )
        prices[name] = price
    return lambda generation: prices.get(generation, prices.get(""))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
