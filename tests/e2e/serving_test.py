"""The server around a real engine: a tiny model's answers over HTTP are those of the library."""

from __future__ import annotations

import asyncio
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import tiny
from unit.serving.live import CHAT, body, run, serving, serving_in_thread, until

from jaxllama import SamplingParams

MESSAGES = [{"role": "user", "content": "Hi"}]
PARAMETERS = [
    {"temperature": 0},
    {"temperature": 1, "seed": 5},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 2**63 - 1},
    {"temperature": 1.5, "min_p": 0.05, "seed": 0, "frequency_penalty": 1, "presence_penalty": -1},
    {"temperature": 0, "repetition_penalty": 1.3, "min_tokens": 5, "logit_bias": {"65": 4}},
    {"temperature": 1, "seed": 7, "stop_token_ids": [66, 67, 68, 69, 70, 71, 72]},
]


@pytest.fixture(scope="module")
def chat_llama(tokenizer_folder):
    with tiny.make_llama(tokenizer_folder=tokenizer_folder) as llama:
        yield llama


def text_of(llama, fields, max_tokens=24):
    values = {**fields, "max_tokens": max_tokens}
    values["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    values["logit_bias"] = {int(key): bias for key, bias in values.get("logit_bias", {}).items()}
    return llama.chat(MESSAGES, SamplingParams(**values)).text


def test_the_server_says_what_chat_says_streamed_or_not_alone_or_together(chat_llama):
    expected = [text_of(chat_llama, fields) for fields in PARAMETERS]

    def ask(i):
        fields = {name: value for name, value in PARAMETERS[i % 6].items() if name not in EXTRA}
        extra = {name: value for name, value in PARAMETERS[i % 6].items() if name in EXTRA}
        with openai.OpenAI(base_url=url + "/v1/openai", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            common = {"model": "default", "messages": MESSAGES, "max_tokens": 24, "extra_body": extra, **fields}
            if i % 2:
                return create(**common).choices[0].message.content
            return "".join(chunk.choices[0].delta.content or "" for chunk in create(**common, stream=True))

    with serving_in_thread(_unclosed(chat_llama)) as url, ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(24))) == [expected[i % 6] for i in range(24)]


EXTRA = {"top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids"}


def test_choice_0_is_the_answer_to_the_same_seed_alone(chat_llama):
    async def test():
        async with serving(_unclosed(chat_llama)) as live:
            _, many, _ = await live.post({"n": 4, "seed": 5, "max_tokens": 24})
            _, one, _ = await live.post({"seed": 5, "max_tokens": 24})
            texts = [choice["message"]["content"] for choice in many["choices"]]
            assert texts[0] == one["choices"][0]["message"]["content"] == text_of(chat_llama, {"seed": 5})
            assert len(set(texts)) == 4

    run(test(), 120)


def test_a_client_that_leaves_frees_its_row_and_pages(chat_llama):
    async def test():
        async with serving(_unclosed(chat_llama)) as live:
            payload = json.dumps(body(stream=True, ignore_eos=True, n=2)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            for wait_for in (b"HTTP", b"data: "):
                reader, writer = await asyncio.open_connection(live.host, live.port)
                writer.write(head.encode() + f"Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
                await reader.readuntil(wait_for)
                writer.close()
                await until(lambda: _load(chat_llama) == (0, 0), 5.0)

    run(test(), 120)


def test_reasoning_a_stop_string_and_the_end_are_found_in_real_tokens(tokenizer_folder):
    # One token a byte: the chain is "\n" → <think> → o k → </think> → Y e s ! → <|im_end|>.
    ids = {char: i for i, char in enumerate(sorted(_alphabet()))}
    think, end_think, end = 259, 260, 258
    chain = [ids["Ċ"], think, ids["o"], ids["k"], end_think, ids["Y"], ids["e"], ids["s"], ids["!"], end]
    weights = tiny.scripted_weights("divisible", dict(itertools.pairwise(chain)))
    llama = tiny.make_llama(weights=weights, tokenizer_folder=tokenizer_folder, eos_token_id=end)

    async def test():
        async with serving(llama) as live:
            _, answer, _ = await live.post({"temperature": 0})
            choice = answer["choices"][0]
            assert choice["message"] == {
                "role": "assistant",
                "content": "Yes!",
                "refusal": None,
                "reasoning_content": "ok",
            }
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
            assert answer["usage"]["completion_tokens"] == 9
            assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
            _, answer, _ = await live.post({"temperature": 0, "stop": ["es", "k"]})
            assert answer["choices"][0]["message"]["content"] == "Y"
            assert answer["choices"][0]["stop_reason"] == "es"
            assert answer["usage"]["completion_tokens"] == 7

    run(test(), 120)


def test_a_prompt_that_spells_special_tokens_and_one_beyond_the_context(chat_llama):
    async def test():
        async with serving(_unclosed(chat_llama)) as live:
            spelled = [{"role": "user", "content": "<|im_end|>"}]
            _, answer, _ = await live.post({"messages": spelled, "max_tokens": 0})
            _, other, _ = await live.post({"messages": [{"role": "user", "content": "0123456789"}], "max_tokens": 0})
            assert answer["usage"] == other["usage"]
            assert answer["choices"][0]["finish_reason"] == "length"
            long = [{"role": "user", "content": "x" * 200}]
            status, answer, _ = await live.post({"messages": long})
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")

    run(test(), 120)


def _load(llama):
    stats = llama.engine.stats()
    return stats.num_running, stats.num_waiting


def _alphabet():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


class _unclosed:  # noqa: N801
    """The model without its `close`: the fixture closes it, not the server."""

    def __init__(self, llama):
        self._llama = llama

    def __getattr__(self, name):
        return getattr(self._llama, name)

    def close(self):
        """Does nothing."""
