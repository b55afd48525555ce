"""Log-probabilities of answers and prompts: each token's own, exact bytes, and always valid JSON."""

from __future__ import annotations

import asyncio
import json

import pytest
from jaxllama_serving.requests.logprobs import LEAST, MAX_PROMPT_ENTRIES, finite, token_text
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import run, serving, until
from unit.serving.requests.chat_test import CASES, SPLIT, WORDS, answer_of, stream_of

from jaxllama.errors import RequestError


def logprobs_of(events, index=0, kind="content"):
    """What a stream's chunks add up to."""
    found = []
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            if choice["index"] == index and choice["logprobs"] is not None:
                found += choice["logprobs"][kind]
    return found


def test_a_token_has_its_own_logprob_bytes_and_the_likeliest_beside_it():
    llama = FakeLlama(["Hi", " you"])
    first, second = llama.tokenizer.ids_of(["Hi", " you"])
    logprobs = answer_of(llama, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [(e["token"], e["logprob"], e["bytes"]) for e in logprobs["content"]] == [
        ("Hi", -float(first), list(b"Hi")),
        (" you", -float(second), list(b" you")),
    ]
    assert [e["logprob"] for e in logprobs["content"][0]["top_logprobs"]] == [-1, -2]


def test_logprobs_alone_have_no_alternatives_and_none_are_given_unasked():
    for fields in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 0}):
        content = answer_of(FakeLlama(WORDS), **fields)["choices"][0]["logprobs"]["content"]
        assert [entry["top_logprobs"] for entry in content] == [[]] * len(WORDS)
    llama = FakeLlama()
    assert answer_of(llama, logprobs=False)["choices"][0]["logprobs"] is None
    assert llama.engine.rows[0].params.logprobs is None
    assert answer_of(llama, status=400, top_logprobs=3)["error"]["param"] == "top_logprobs"
    assert answer_of(llama, status=400, logprobs=True, top_logprobs=21)["error"]["param"] == "top_logprobs"


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_of_split_characters_join_to_the_text(stream):
    llama = FakeLlama(SPLIT)
    if stream:
        content = logprobs_of(stream_of(llama, logprobs=True))
    else:
        content = answer_of(llama, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == b"".join(
        piece if isinstance(piece, bytes) else piece.encode() for piece in SPLIT
    )
    assert content[0] == {"token": "\\xe2", "logprob": -10.0, "bytes": [0xE2], "top_logprobs": []}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_stream_has_the_logprobs_and_tokens_of_the_answer_in_one_piece(name, batch):
    pieces, fields, starts = CASES[name]

    def make():
        return FakeLlama(pieces, starts_in_reasoning=starts, batch=batch)

    fields = {**fields, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    whole = answer_of(make(), **fields)
    choice = whole["choices"][0]
    events = stream_of(make(), **fields)
    assert logprobs_of(events) == choice["logprobs"]["content"]
    if starts is not None:
        assert logprobs_of(events, kind="reasoning_content") == choice["logprobs"]["reasoning_content"]
    told = [token_id for chunk in events[:-1] for token_id in chunk["choices"][0].get("token_ids", [])]
    assert told == choice["token_ids"]
    assert len(told) == whole["usage"]["completion_tokens"]
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"] == [5] * 9
    assert not any("prompt_token_ids" in chunk for chunk in events[1:-1])


def test_reasoning_and_content_have_their_own():
    llama = FakeLlama(["Let", " me", END_THINK, "Paris"], starts_in_reasoning=True, batch=100)
    logprobs = answer_of(llama, logprobs=True)["choices"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs["content"]] == ["Paris"]
    assert [entry["token"] for entry in logprobs["reasoning_content"]][:2] == ["Let", " me"]
    usage = answer_of(FakeLlama(["Let", " me", END_THINK, "Paris"], starts_in_reasoning=True))["usage"]
    assert len(logprobs["reasoning_content"]) == usage["completion_tokens_details"]["reasoning_tokens"]


def test_an_impossible_token_is_valid_json():
    llama = FakeLlama(["a", "b", "c"])
    llama.engine.logprobs = {10: float("-inf"), 11: float("nan"), 12: -1e30}
    content = answer_of(llama, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [LEAST] * 3
    assert (finite(-0.5), finite(float("inf"))) == (-0.5, LEAST)
    assert token_text(b" \xf0\x9f", "bytes:") == "bytes: \\xf0\\x9f"


def test_a_seed_repeats_its_choice_alone():
    llama = FakeLlama()
    answer = answer_of(llama, n=3, seed=11, return_seed=True)
    seeds = [choice["seed"] for choice in answer["choices"]]
    assert seeds == [row.seed for row in llama.engine.rows]
    assert seeds[0] == answer["seed"] == 11
    assert len(set(seeds)) == 3
    assert all(seed < 2**53 for seed in seeds)
    events = stream_of(FakeLlama(), n=3, seed=11, return_seed=True)
    told = [choice for chunk in events[:-1] for choice in chunk["choices"] if "seed" in choice]
    assert sorted((choice["index"], choice["seed"]) for choice in told) == list(enumerate(seeds))
    assert "seed" not in answer_of(FakeLlama())["choices"][0]


def test_prompt_logprobs_are_by_id_with_ranks_and_the_first_is_null():
    answer = answer_of(FakeLlama(), prompt_logprobs=2, messages=[{"role": "user", "content": ""}])
    found = answer["prompt_logprobs"]
    assert (found[0], len(found)) == (None, answer["usage"]["prompt_tokens"])
    assert found[1] == {
        "5": {"logprob": -1.0, "rank": 1, "decoded_token": "x"},
        "20": {"logprob": -0.1, "rank": 1, "decoded_token": ""},
        "19": {"logprob": -0.2, "rank": 2, "decoded_token": ""},
    }
    assert list(answer_of(FakeLlama(), prompt_logprobs=0)["prompt_logprobs"][2]) == ["5"]
    assert "prompt_logprobs" not in answer_of(FakeLlama())
    error = answer_of(FakeLlama(), status=400, prompt_logprobs=1, stream=True)["error"]
    assert error["param"] == "prompt_logprobs"


def test_prompt_logprobs_are_bounded():
    length = MAX_PROMPT_ENTRIES // 21 + 1
    llama = FakeLlama(max_context=10**6)
    message = [{"role": "user", "content": "x" * length}]
    error = answer_of(llama, status=400, prompt_logprobs=20, messages=message)["error"]
    assert (error["param"], str(MAX_PROMPT_ENTRIES) in error["message"]) == ("prompt_logprobs", True)
    assert llama.num_scored == 0


def test_a_model_that_cannot_score_says_so_by_the_field():
    class OverHosts(FakeLlama):
        def prompt_logprobs(self, ids, num_top=0, **options):
            raise RequestError("logits are of one process; this model is spread over several")

    error = answer_of(OverHosts(), status=400, prompt_logprobs=0)["error"]
    assert (error["param"], "several" in error["message"]) == ("prompt_logprobs", True)


def test_scoring_ends_when_nobody_waits_and_does_not_hold_up_the_server():
    async def test():
        llama = FakeLlama()
        llama.score_delay_s = 0.01
        async with serving(llama) as live:
            messages = [{"role": "user", "content": "x" * 3000}]
            asking = asyncio.create_task(live.post({"prompt_logprobs": 0, "messages": messages}))
            await until(lambda: llama.num_scored > 2)
            assert (await live.post())[0] == 200
            asking.cancel()
            await until(lambda: live.service.requests.num == 0)
            await asyncio.sleep(0.1)
            scored = llama.num_scored
            await asyncio.sleep(0.1)
            assert llama.num_scored == scored < 3000
        async with serving(llama, request_timeout_s=0.2) as live:
            status, answer, _ = await live.post({"prompt_logprobs": 0, "messages": messages})
            assert (status, answer["error"]["type"]) == (504, "timeout")

    run(test())


def test_priority_reaches_the_engine():
    for priority in (-10, 0, 10):
        llama = FakeLlama()
        answer_of(llama, priority=priority)
        assert llama.engine.priorities == [priority]


def test_a_body_with_everything_is_one_json_document():
    llama = FakeLlama(SPLIT)
    answer = answer_of(
        llama, logprobs=True, top_logprobs=20, prompt_logprobs=20, return_token_ids=True, return_seed=True, n=2
    )
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
