"""What usage says of the prefix cache, and who may find whose prompts."""

from __future__ import annotations

import hashlib

import pytest
import tiny
from unit.serving.fakes import FakeLlama
from unit.serving.live import body, run, serving
from unit.serving.requests.chat_test import answer_of, stream_of

KEYS = ("sk-one", "sk-two")


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_usage_tells_what_the_first_choice_found_and_counts_a_prompt_once():
    assert cached(answer_of(FakeLlama(num_cached_tokens=5), n=3)) == 5
    events = stream_of(FakeLlama(num_cached_tokens=5), n=2, stream_options={"include_usage": True})
    assert cached(events[-2]) == 5


def test_the_scope_is_the_key_and_the_salt():
    async def test():
        llama = FakeLlama()
        async with serving(llama, api_keys=KEYS) as live:
            for key, salt in (("sk-one", None), ("sk-one", "a"), ("sk-two", "a"), ("sk-two", None)):
                headers = {"Authorization": f"Bearer {key}"}
                asked = body() if salt is None else body(cache_salt=salt)
                assert (await live.post(json=asked, headers=headers))[0] == 200
        one, two = (hashlib.sha256(key.encode()).digest() for key in KEYS)
        assert llama.engine.scopes == [one, one + b"a", two + b"a", two]

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_request_finds_the_first_of_its_salt(stream, tokenizer_folder):
    """The real engine: what is found is counted, and answers are the same."""
    asked = {"seed": 1, "max_tokens": 8, "messages": [{"role": "user", "content": "x" * 40}]}

    async def ask(live, **fields):
        if not stream:
            _, answer, _ = await live.post(asked | fields)
            return cached(answer), answer["choices"][0]["message"]["content"]
        events = await live.events(stream_options={"include_usage": True}, **asked, **fields)
        deltas = [choice["delta"].get("content", "") for event in events[:-2] for choice in event["choices"]]
        return cached(events[-2]), "".join(deltas)

    async def test():
        async with serving(tiny.make_llama(tokenizer_folder=tokenizer_folder)) as live:
            first, again, salted = await ask(live), await ask(live), await ask(live, cache_salt="tenant")
            assert [first[0], salted[0]] == [0, 0]
            assert again[0] >= 32
            assert first[1] == again[1] == salted[1]

    run(test(), 240)
