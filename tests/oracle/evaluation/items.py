"""A hundred items in HellaSwag's form, of sentences of our own, and forty prompts to generate from: lm-eval's tasks.

An activity of `activities.txt` is five sentences in their order: what was read ends after the first, second, third or
fourth, and the next one has to be found among the next ones of three other activities. Twenty of these beginnings are
gone on with freely: nobody would guess the sentence that stands in the file, so that no metric is meant for them.
Twenty sentences are to be said once more after two examples, which a small model can do: their metric is exact_match.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ACTIVITIES = Path(__file__).parent / "activities.txt"
NUM_WRONG = 3
MAX_NEW_TOKENS = 24


def choices() -> list[dict[str, Any]]:
    """Items of `query`, `endings` and the `label` of the right one, always the same."""
    rng = random.Random(20261128)
    lines = [line.split(" | ") for line in ACTIVITIES.read_text(encoding="utf-8").splitlines()]
    items = []
    for name, *sentences in lines:
        for cut in range(1, len(sentences)):
            others = rng.sample([line for line in lines if line[0] != name], NUM_WRONG)
            endings = [sentences[cut], *(line[1 + cut] for line in others)]
            rng.shuffle(endings)
            query = f"{name}: {' '.join(sentences[:cut])}"
            items.append({"query": query, "endings": endings, "label": endings.index(sentences[cut])})
    return items


def prompts() -> list[dict[str, str]]:
    """Beginnings that a generation goes on with."""
    return [{"query": item["query"], "answer": item["endings"][item["label"]]} for item in choices()[1::5]]


def repetitions() -> list[dict[str, str]]:
    """Sentences to be said once more, each after two examples."""
    lines = [line.split(" | ") for line in ACTIVITIES.read_text(encoding="utf-8").splitlines()]
    first, second = (f"Read: {line[1]}\nAgain: {line[1]}\n\n" for line in lines[:2])
    return [{"query": f"{first}{second}Read: {line[4]}\nAgain:", "answer": line[4]} for line in lines[2:22]]


def write_tasks(folder: Path) -> list[str]:
    """Writes lm-eval's tasks with their data into `folder`; returns their names: choosing, going on, repeating."""
    data = {"activities": choices(), "activities_go_on": prompts(), "activities_again": repetitions()}
    generates = {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
    }
    # A reply begins with the space after "Again:", which is no part of the answer.
    strip = {"function": "regex", "regex_pattern": r"^\s*(.*?)\s*$"}
    tasks: dict[str, dict[str, Any]] = {
        "activities": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "activities_go_on": generates | {"metric_list": [{"metric": "bypass"}]},
        "activities_again": generates
        | {
            "filter_list": [{"name": "strip", "filter": [strip, {"function": "take_first"}]}],
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in data[name]), encoding="utf-8")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | source | task), encoding="utf-8")
    return list(tasks)
