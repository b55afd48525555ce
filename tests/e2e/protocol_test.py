"""The server around a real tiny model: what it tells of tokens is what the model computed."""

from __future__ import annotations

import math

import numpy as np
import openai
import pytest
import tiny
from unit.serving.client_test import client_of
from unit.serving.live import serving_in_thread

NAME = "divisible"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with tiny.make_llama(NAME, tokenizer_folder=folder) as llama:
        llama.engine.warm_up()
        with serving_in_thread(llama) as url, client_of(url) as found:
            yield found


def exact_logprobs(ids):
    logits = tiny.reference_logits(NAME, ids)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def chat(client, **fields):
    extra = fields.pop("extra_body", {})
    return client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=fields.pop("max_tokens", 8),
        extra_body={"return_token_ids": True, "ignore_eos": True, "return_seed": True, **extra},
        **fields,
    )


def test_logprobs_are_those_of_the_reference_before_any_filter(client):
    answer = chat(client, temperature=0.5, top_p=0.9, seed=3, logprobs=True, top_logprobs=4)
    prompt, ids = answer.prompt_token_ids, answer.choices[0].token_ids
    exact = exact_logprobs([*prompt, *ids])[len(prompt) - 1 : -1]
    content = answer.choices[0].logprobs.content
    assert len(content) == len(ids) == 8
    for entry, token_id, row in zip(content, ids, exact, strict=True):
        assert entry.logprob == pytest.approx(row[token_id], abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-4)
        assert token_id >= 256 or len(entry.bytes) == 1


def test_a_told_seed_repeats_its_choice_alone(client):
    three = chat(client, n=3, seed=5, temperature=1)
    for choice in three.choices:
        alone = chat(client, seed=choice.seed, temperature=1)
        assert alone.choices[0].token_ids == choice.token_ids
    assert len({tuple(choice.token_ids) for choice in three.choices}) == 3


def test_scoring_an_echoed_prompt_agrees_with_the_reference_and_with_generation(client):
    text = "The quick brown fox"
    fields = {"model": "default", "prompt": text, "temperature": 0, "extra_body": {"return_token_ids": True}}
    answer = client.completions.create(**fields, echo=True, logprobs=2, max_tokens=4)
    choice = answer.choices[0]
    ids = [*choice.prompt_token_ids, *choice.token_ids]
    exact = exact_logprobs(ids)
    told = choice.logprobs.token_logprobs
    assert told[0] is None
    assert told[1:] == pytest.approx([exact[i, ids[i + 1]] for i in range(len(told) - 1)], abs=1e-4)
    assert choice.text.startswith(text)
    assert choice.logprobs.text_offset[: len(text)] == list(range(len(text)))
    # What was generated, given as a prompt, scores the same.
    again = client.completions.create(model="default", prompt=ids, echo=True, logprobs=0, max_tokens=0)
    assert again.choices[0].logprobs.token_logprobs[1:] == pytest.approx(told[1:], abs=1e-4)


def test_prompt_logprobs_are_those_of_the_reference(client):
    answer = chat(client, extra_body={"prompt_logprobs": 3})
    ids = answer.prompt_token_ids
    exact = exact_logprobs(ids)
    assert answer.prompt_logprobs[0] is None
    for i, entry in enumerate(answer.prompt_logprobs[1:]):
        own = entry[str(ids[i + 1])]
        assert own["logprob"] == pytest.approx(exact[i, ids[i + 1]], abs=1e-4)
        assert own["rank"] == 1 + int((exact[i] > exact[i, ids[i + 1]] + 1e-6).sum())
        assert len(entry) in (3, 4)


def test_the_best_of_many_is_the_likeliest_of_them(client):
    fields = {"model": "default", "prompt": "abc", "seed": 1, "temperature": 1.5, "max_tokens": 5, "logprobs": 0}
    drawn = client.completions.create(**fields, n=6).choices
    best = client.completions.create(**fields, n=2, best_of=6).choices

    def mean(choice):
        return math.fsum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    assert [choice.text for choice in best] == [c.text for c in sorted(drawn, key=mean, reverse=True)[:2]]


@pytest.mark.parametrize("batch", [1, 3])
def test_streams_of_several_prompts_add_up(client, batch):
    fields = {"model": "default", "prompt": ["a", "bc", "d"][:batch], "n": 2, "seed": 9, "max_tokens": 12, "echo": True}
    whole = client.completions.create(**fields)
    texts = [""] * (2 * batch)
    for chunk in client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_ids_go_to_text_and_back(client):
    text = "naïve <|im_end|> 🙂"
    ids = client.post("/tokenize", cast_to=dict, body={"prompt": text})["tokens"]
    assert client.post("/detokenize", cast_to=dict, body={"tokens": ids}) == {"prompt": text, "count": len(ids)}
    # Users' text never becomes a special token.
    assert max(ids) < 256
    rendered = client.post("/tokenize", cast_to=dict, body={"messages": [{"role": "user", "content": "Hi"}]})
    assert rendered["tokens"] == chat(client).prompt_token_ids
    shown = client.post("/detokenize", cast_to=dict, body={"tokens": rendered["tokens"]})["prompt"]
    assert shown.startswith("<|im_start|>user\nHi<|im_end|>")


def test_a_long_echo_is_refused_by_both_numbers(client):
    with pytest.raises(openai.BadRequestError, match="96") as caught:
        client.completions.create(model="default", prompt="x" * 97, echo=True, logprobs=1)
    assert caught.value.code == "context_length_exceeded"
