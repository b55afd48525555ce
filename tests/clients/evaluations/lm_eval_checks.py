"""lm-eval's API models against the default model, with tasks and data of our own: no hub is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

CHOICES = [
    ("The capital of France is", ["Paris", "Tokyo", "seven"], 0),
    ("Two plus two is", ["blue", "four", "Rome"], 1),
    ("The sun rises in the", ["carrot", "glass", "east"], 2),
    ("Water freezes into", ["ice", "Monday", "songs"], 0),
]


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """A task of each kind of request: log-likelihoods of choices, rolling log-likelihoods, generation."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a, "text": f"{q} {c[a]}."} for q, c, a in CHOICES]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    choose = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    perplexity = {
        "task": "perplexity",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    }
    generate = {
        "task": "generate",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choose, perplexity, generate):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks: TaskManager, kind: str, route: str, names: list[str], url: str, **options: Any) -> dict[str, Any]:
    """The results by task of one of lm-eval's models."""
    found = simple_evaluate(
        model=kind,
        model_args={"model": "default", "base_url": url + route, "max_retries": 1, "timeout": 100, **options},
        tasks=names,
        task_manager=tasks,
        apply_chat_template="chat" in kind,
        bootstrap_iters=0,
    )
    return {name: dict(found["results"][name]) for name in names} | {"samples": found["samples"]}


@pytest.mark.parametrize("tokenized", [True, False], ids=["token ids", "text"])
def check_completions_give_likelihoods(tasks, url, checkpoint, tokenized):
    # A rolling likelihood begins with the BOS token, which as text is what its name spells: seven tokens, not one.
    names = ["choose", "generate", *(["perplexity"] if tokenized else [])]
    results = evaluate(
        tasks,
        "local-completions",
        "/v1/completions",
        names,
        url,
        tokenizer_backend="huggingface",
        tokenizer=checkpoint,
        tokenized_requests=tokenized,
        num_concurrent=2,
        batch_size=2,
    )
    assert results["choose"]["acc,none"] >= 0.75
    if tokenized:
        assert 3 < results["perplexity"]["byte_perplexity,none"] < 6
    assert all(sample["resps"][0][0] for sample in results["samples"]["generate"])


def check_token_ids_and_text_agree(tasks, url, checkpoint):
    both = [
        evaluate(
            tasks,
            "local-completions",
            "/v1/completions",
            ["choose"],
            url,
            tokenizer_backend="huggingface",
            tokenizer=checkpoint,
            tokenized_requests=tokenized,
        )["samples"]["choose"]
        for tokenized in (True, False)
    ]
    for ids, text in zip(*both, strict=True):
        a, b = (sample["filtered_resps"] for sample in (ids, text))
        assert [x[0] for x in a] == pytest.approx([x[0] for x in b], abs=1e-3)
        assert [x[1] for x in a] == [x[1] for x in b]


def check_chat_completions_generate(tasks, url):
    results = evaluate(tasks, "local-chat-completions", "/v1/chat/completions", ["generate"], url, num_concurrent=2)
    assert all(sample["resps"][0][0] for sample in results["samples"]["generate"])
    assert "exact_match,none" in results["generate"]
