"""inspect-ai on a data set that it ships, with the default model."""

from __future__ import annotations

import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import FieldSpec, example_dataset
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message, use_tools
from inspect_ai.tool import tool


@pytest.fixture
def model(url):
    return get_model("openai-api/jaxllama/default", base_url=f"{url}/v1", api_key="none")


@tool
def lookup():
    """A tool for the model."""

    async def execute(word: str):
        """Looks a word up.

        Args:
            word: What to look up.
        """
        return f"{word} is a word"

    return execute


def run(model, solver, tmp_path, **config):
    """The log of an evaluation of five questions."""
    task = Task(
        dataset=example_dataset("biology_qa", FieldSpec(input="question", target="answer")),
        solver=solver,
        scorer=includes(),
        config=GenerateConfig(max_tokens=48, temperature=0, max_retries=0, timeout=100, **config),
    )
    (log,) = eval(task, model=model, limit=5, log_dir=str(tmp_path), display="none", max_connections=2)
    assert log.status == "success", log.error
    return log


def check_biology_questions(model, tmp_path):
    log = run(model, [system_message("Answer in a few words."), generate()], tmp_path, seed=7, top_p=0.9)
    assert len(log.samples) == 5
    assert all(sample.output.completion for sample in log.samples)
    assert log.results.scores[0].metrics["accuracy"].value > 0
    assert all(usage.output_tokens > 0 for usage in log.stats.model_usage.values())


def check_questions_with_a_tool_at_hand(model, tmp_path):
    log = run(model, [use_tools(lookup()), generate()], tmp_path)
    assert all(sample.output.stop_reason in ("stop", "max_tokens", "tool_calls") for sample in log.samples)
