"""Speculation beside plain decoding, paired: the same requests by two engines of one process, in turns.

    python bench/speculation.py models/SmolLM2-135M-Instruct --rows 1 8
    python bench/speculation.py big --draft small --draft-tokens 4

Each pair compares every token. The table has plain tokens a second, the ratio (median of the pairs), and the tokens
that a step of a row gave. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jaxllama
from jaxllama import EngineOptions, Llama, SamplingParams, Structured, make_mesh
from jaxllama.engine.options import StepReport
from jaxllama.weights.checkpoint import Checkpoint

CODE = '''def read_lines(path, encoding="utf-8"):
    """Returns the lines of a file without their ends."""
    lines = []
    with open(path, encoding=encoding) as file:
        for line in file:
            lines.append(line.rstrip("\\n"))
    return lines


def count_words(path, encoding="utf-8"):
    """Returns how often each word of a file is there."""
    counts = {}
    for line in read_lines(path, encoding=encoding):
        for word in line.split():
            counts[word] = counts.get(word, 0) + 1
    return counts
'''
TEXT = """The lighthouse of Kermorvan was built in 1849 on the western coast of Brittany. Its tower of square stone is
twenty metres high. The light is seen from a distance of twenty-two nautical miles. In 1994 the last keeper left, and
the light has been automatic since then. The tower is a historic monument since the thirty-first of December 2015."""
QUESTION = (
    "When was the lighthouse built, how high is it, and since when is it a monument? Quote the text word for word."
)
ORDERS = """Ada Lovelace from Bath ordered a lamp for 40 euros; it has arrived. Alan Turing from London ordered two
chairs for 90 euros, which are on their way. Grace Hopper from New York ordered a clock for 25 euros; it has arrived."""
PROPERTIES = {
    "customer_first_and_last_name": {"type": "string", "maxLength": 40},
    "customer_city_of_residence": {"type": "string", "maxLength": 40},
    "number_of_ordered_pieces": {"type": "integer"},
    "total_order_amount_in_euros": {"type": "integer"},
    "has_been_delivered_to_customer": {"type": "boolean"},
}
# Long enough for any number of tokens.
SCHEMA = {
    "type": "array",
    "minItems": 20,
    "items": {"type": "object", "properties": PROPERTIES, "required": [*PROPERTIES], "additionalProperties": False},
}
JSON = "JSON, long keys"
TASKS = {
    "code, one change": f"Repeat this code exactly, but rename count_words to word_counts:\n\n```python\n{CODE}```",
    "quotes": f"{TEXT}\n\n{QUESTION}",
    JSON: f"{ORDERS}\n\nWrite the orders as JSON.",
    "free text": "Write a short story about a fox who learns to swim.",
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tasks", nargs="+", default=[*TASKS], choices=[*TASKS])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--draft", type=Path, help="a draft model: --speculation draft is measured, not auto")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    mesh = make_mesh(Checkpoint.open(args.checkpoint).config, tp=1)
    llamas = {}
    drafted = {"speculation": "draft", "draft": args.draft, "draft_tokens": args.draft_tokens}
    on: dict[str, Any] = {"speculation": "auto"} if args.draft is None else drafted
    for mode, how in (("off", {}), ("on", on)):
        options = EngineOptions(max_rows=max(args.rows), max_context=2048, **how)
        llamas[mode] = jaxllama.load(args.checkpoint, mesh, options=options)
        begun = time.perf_counter()
        llamas[mode].engine.warm_up()
        print(f"{mode}: ready in {time.perf_counter() - begun:.1f} s")
    speculation = llamas["on"].engine._speculation
    for num_rows, times in speculation.times.items():
        by_model = f"; a draft by the model {times.model_cost(num_rows):.2f}" if times.by_model else ""
        costs = times.costs(num_rows, speculation.drafts(num_rows))
        print(f"costs of {num_rows} rows by depth: {costs.round(2).tolist()}{by_model}")
    print("| task | rows | plain, tokens/s | speculation | tokens a step |\n| --- | --- | --- | --- | --- |")
    for task in args.tasks:
        for num_rows in args.rows:
            run_pairs(llamas, task, num_rows, args)


def run_pairs(llamas: dict[str, Llama], task: str, num_rows: int, args: argparse.Namespace) -> None:
    """One line of the table."""
    rates: dict[str, list[float]] = {mode: [] for mode in llamas}
    steps: list[StepReport] = []
    for repeat in range(args.repeats + 1):
        tokens = {}
        for mode in sorted(llamas, reverse=bool(repeat % 2)):
            llama = llamas[mode]
            assert llama.chat_template is not None
            assert llama.tokenizer is not None
            ids = llama.tokenizer.encode_rendered(
                llama.chat_template.render([{"role": "user", "content": TASKS[task]}])
            )
            how: dict[str, Any] = {"temperature": args.temperature, "max_tokens": args.tokens}
            how |= {"structured": Structured(json=SCHEMA)} if task == JSON else {"ignore_eos": True}
            params = [SamplingParams(seed=1000 * repeat + row, **how) for row in range(num_rows)]
            llama.engine.on_steps = steps.append if mode == "on" else None
            begun = time.perf_counter()
            completions = llama.generate([ids] * num_rows, params, progress=False)
            rate = num_rows * args.tokens / (time.perf_counter() - begun)
            tokens[mode] = [completion.token_ids for completion in completions]
            if repeat:  # The first fills the prefix cache.
                rates[mode].append(rate)
        assert tokens["off"] == tokens["on"], "speculation has changed a token"
    ratios = [after / before for before, after in zip(rates["off"], rates["on"], strict=True)]
    a_step = sum(s.num_tokens for s in steps) / max(1, sum(s.num_tokens - s.num_accepted for s in steps))
    spread = ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
    plain = statistics.median(rates["off"])
    print(
        f"| {task} | {num_rows} | {plain:.0f} | {statistics.median(ratios):.2f} ({spread}) | {a_step:.2f} |", flush=True
    )


if __name__ == "__main__":
    main()
