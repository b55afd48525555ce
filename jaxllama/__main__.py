"""The `jaxllama` command."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jaxllama
from jaxllama.decode.controls import Boolean, Control, Integer, Strings
from jaxllama.decode.params import CONTROLS
from jaxllama.errors import EngineError, JaxLlamaError, MissingExtraError, RequestError, StoreError, one_line
from jaxllama.model.platforms.startup import prepare_jax
from jaxllama.system.explain import page_of, with_page
from jaxllama.system.flags import add_max_in_flight, add_speculation, speculation_of
from jaxllama.weights.places import ADAPTER_HELP, MODEL_HELP


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 (failure) or 2 (bad input)."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(next((argument for argument in argv if not argument.startswith("-")), "")).parse_args(argv)
    prepare_jax()
    try:
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except (EngineError, StoreError) as error:
        return _fail(args.command, error, 1)
    except JaxLlamaError as error:
        return _fail(args.command, error, 2)
    except OSError as error:
        return _fail(args.command, error, 1)
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as every other error; the commands' parsers are of it too."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 2."""
        self.exit(2, f"{self.prog}: {one_line(message)}. See {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what it does not know itself, where the command's name and help are at hand."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def _parser(only: str | None = None) -> argparse.ArgumentParser:
    """With the name of a command the others have no arguments: to import what all need takes a second."""
    parser = _Parser(prog="jaxllama", description="Llama-family inference on JAX.")
    parser.add_argument("--version", action="version", version=f"jaxllama {jaxllama.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = functools.partial(_add_module, commands, only)
    add("convert", "turn a Hugging Face or GGUF checkpoint into a jaxllama checkpoint")
    add("export", "write a checkpoint as Hugging Face safetensors, for transformers and others")
    add("inspect", "say what a model is and can do, without its weights")
    add("verify", "check a checkpoint's files by their hashes, and against its source")
    add("serve", "serve a checkpoint over OpenAI's chat API, with a chat page")
    add("batch", "answer a file of requests, one JSON object a line")
    add("chat", "chat in the terminal, with a checkpoint or with a server")
    add("bench", "measure any server with OpenAI's API under load")
    generate = commands.add_parser("generate", help="complete a prompt", description="Completes a prompt.")
    _add_generate(generate)
    _add_eval(commands)
    add(
        "plan",
        "say whether a model fits a TPU slice, and how fast it is; needs no TPU",
        "Compiles the real programs for a TPU slice, on any machine, and says what fits and how fast.",
    )
    add(
        "doctor",
        "say what would go wrong on this machine",
        "Looks at versions, devices, the compiler, caches, disk, memory and the port, and says what would go wrong. "
        "Exit code 1 if anything would.",
    )
    add(
        "check",
        "say whether kernels, bits and speed hold on these devices",
        "Runs kernels beside the reference, compares bits, and measures memory, products, collectives, a step and a "
        "chunk, in three minutes. Prints a table to paste into an issue. Exit code 1 if anything does not hold. What "
        "is missing or wrong before a model runs, `jaxllama doctor` says.",
    )
    explain = commands.add_parser(
        "explain", help="say what an error means and what to do", description="Explains an error by its name."
    )
    explain.add_argument("name", metavar="NAME", help="as in the message's end, e.g. CheckpointError")
    explain.set_defaults(run=_explain)
    return parser


_MODULES = {
    "convert": "jaxllama_convert.cli",
    "export": "jaxllama_convert.export_cli",
    "inspect": "jaxllama_convert.checks.inspect_cli",
    "verify": "jaxllama_convert.checks.verify_cli",
    "serve": "jaxllama_serving.process.cli",
    "batch": "jaxllama_serving.batch.cli",
    "chat": "jaxllama_serving.client.chat_cli",
    "bench": "jaxllama_serving.client.bench_cli",
    "plan": "jaxllama.plan.cli",
    "doctor": "jaxllama.system.doctor",
    "check": "jaxllama.llama.check.cli",
}
"""Where commands have their flags, and what runs them; the first eight are packages of their own."""


def _add_module(
    commands: argparse._SubParsersAction[_Parser], only: str | None, name: str, text: str, description: str = ""
) -> None:
    """A command of `_MODULES`."""
    parser = commands.add_parser(name, help=text, description=description or f"{text[0].upper()}{text[1:]}.")
    if only not in (None, name):
        return
    try:
        cli = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if not _MODULES[name].startswith("jaxllama_"):
            raise
        missing = error.name or _MODULES[name]

        def refuse(_: argparse.Namespace) -> int:
            raise MissingExtraError("convert" if "convert" in _MODULES[name] else "serve", missing)

        parser.add_argument("arguments", nargs="*")
        parser.set_defaults(run=refuse)
        return
    cli.add_arguments(parser)
    parser.set_defaults(run=cli.run)


def _add_eval(commands: argparse._SubParsersAction[_Parser]) -> None:
    # All that follows is lm-eval's: with such a prefix nothing is an option of ours.
    parser = commands.add_parser(
        "eval",
        help="run lm-eval's tasks in process, with lm-eval's own arguments",
        description="Runs lm-eval's tasks in process; all arguments are lm-eval's own.",
        prefix_chars="\0",
        add_help=False,
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from jaxllama.llama.evaluation import evaluate

    return evaluate(args.arguments)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue, or '-' to read it from standard input")
    parser.add_argument("--json", action="store_true", help="print the completion as JSON")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="compute dtype (default: the checkpoint's)")
    parser.add_argument("--quantize", choices=("int8",), help="round the weights on loading (default: as stored)")
    add_max_in_flight(parser)
    parser.add_argument("--adapter", action="append", default=[], metavar="PEFT", help=ADAPTER_HELP)
    parser.add_argument("--kv-dtype", choices=("int8",), help="of the KV cache (default: the compute dtype)")
    add_speculation(parser)
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept, or 'off' (default: ~/.cache/jaxllama/xla, or JAX's own setting)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    sampling = parser.add_argument_group("sampling")
    for name, control in CONTROLS.items():
        if control.flag:
            _add_control(sampling, f"--{name.replace('_', '-')}", control)
    parser.set_defaults(run=_generate)


def _add_control(group: argparse._ArgumentGroup, flag: str, control: Control) -> None:
    if isinstance(control.domain, Boolean):
        group.add_argument(flag, action="store_true", help=control.flag)
    elif isinstance(control.domain, Strings):
        group.add_argument(flag, action="append", default=[], metavar="TEXT", help=control.flag)
    else:
        text = f"{control.flag} (default: {control.unset if control.default is None else control.default})"
        kind = int if isinstance(control.domain, Integer) else float
        group.add_argument(flag, type=kind, default=control.default, help=text)


def _generate(args: argparse.Namespace) -> int:
    params = jaxllama.SamplingParams(**{name: getattr(args, name) for name in CONTROLS if hasattr(args, name)})
    if args.logprobs is not None and not args.json:
        raise RequestError("--logprobs needs --json, which prints them", "logprobs")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise RequestError("the prompt is empty", "prompt")
    options = jaxllama.EngineOptions(
        max_rows=1,
        kv_dtype=args.kv_dtype,
        compilation_cache=args.compilation_cache,
        speculation=speculation_of(args),
        draft=args.draft,
        draft_tokens=args.draft_tokens,
    )
    how = {"dtype": args.dtype, "quantize": args.quantize, "adapters": args.adapter}
    how["max_in_flight_bytes"] = args.max_in_flight_bytes
    how["progress"] = False if args.quiet else None
    with jaxllama.load(args.checkpoint, **how, options=options) as llama:
        if args.json:
            print(json.dumps(dataclasses.asdict(llama.generate(prompt, params)), ensure_ascii=False, indent=2))
            return 0
        for delta in llama.stream(prompt, params):
            print(delta.text, end="", flush=True)
        print()
    return 0


def _explain(args: argparse.Namespace) -> int:
    print(page_of(args.name))
    return 0


def _fail(command: str, error: Exception, code: int) -> int:
    print(f"jaxllama {command}: {with_page(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
