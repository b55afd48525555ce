"""What the official `openai` client does with every field: `python client_script.py URL`, with any version of it.

Imports nothing else, so that it also runs beside an old client in a process of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import openai

MESSAGES = [{"role": "user", "content": "Hi"}]


def main(url: str) -> None:
    """Expects a server whose model says "Paris", " is", " nice" and "."."""
    with openai.OpenAI(base_url=url + "/v1/openai", api_key="none", max_retries=0, timeout=20) as client:
        check_chat(client)
        check_stream(client)
        check_completions(client)
        check_errors(client)
        assert [model.id for model in client.models.list()] == ["default", "org/model"]
        assert client.models.retrieve("org/model").id == "org/model"


def check_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default",
        messages=MESSAGES,
        n=2,
        seed=7,
        temperature=0.5,
        top_p=0.9,
        stop=["never"],
        logit_bias={"5": 1},
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=10,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 1,
            "stop_token_ids": [9],
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "return_seed": True,
            "cache_salt": "tenant",
            "priority": 1,
        },
    )
    assert answer.object == "chat.completion"
    assert [choice.message.content for choice in answer.choices] == ["Paris is nice."] * 2
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        entries = choice.logprobs.content
        assert bytes(b for entry in entries for b in entry.bytes).decode() == "Paris is nice."
        assert all(len(entry.top_logprobs) == 2 for entry in entries)
        assert len(choice.token_ids) == 5
    assert answer.choices[0].seed == answer.seed == 7
    assert len(answer.prompt_token_ids) == len(answer.prompt_logprobs) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def check_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            extra_body={"return_token_ids": True},
        )
    )
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == "Paris is nice."
    assert told[0].delta.role == "assistant"
    entries = [entry for choice in told if choice.logprobs for entry in choice.logprobs.content]
    assert "".join(entry.token for entry in entries) == "Paris is nice."
    assert (told[-1].finish_reason, chunks[-1].usage.completion_tokens) == ("stop", 5)


def check_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt=["a", "bc"], n=1, best_of=2, echo=True, logprobs=1, max_tokens=8, seed=3
    )
    assert answer.object == "text_completion"
    assert [choice.text for choice in answer.choices] == ["aParis is nice.", "bcParis is nice."]
    lists = answer.choices[1].logprobs
    # The prompt's, the answer's and the stop token's, which has an entry beside an echo: lm-eval counts on one.
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == 8
    assert lists.token_logprobs[-1] is not None
    texts = ["", ""]
    for chunk in client.completions.create(model="default", prompt=[[5], [5, 5]], stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["Paris is nice."] * 2


def check_errors(client: openai.OpenAI) -> None:
    for wrong, kind, param in (
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"extra_body": {"priority": 99}}, openai.BadRequestError, "priority"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
    ):
        error = refusal(client, {"model": "default", "messages": MESSAGES, **wrong})
        assert (type(error), error and error.param) == (kind, param), wrong


def refusal(client: openai.OpenAI, fields: dict[str, Any]) -> openai.APIStatusError | None:
    try:
        client.chat.completions.create(**fields)
    except openai.APIStatusError as error:
        return error
    return None


if __name__ == "__main__":
    main(sys.argv[1])
    print(f"openai {openai.__version__}: all well")
