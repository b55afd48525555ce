"""Answers: what a request asks for is what it gets, in one piece and as a stream."""

from __future__ import annotations

import asyncio
import json

import pytest
from jaxllama_serving.requests.prepare import choice_seed
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import CHAT, body, parse_events, run, serving, until

from jaxllama.errors import EngineStoppedError, NonFiniteLogitsError

WORDS = ["The", " capital", " of", " France", " is", " Paris", "."]
# "€" and "🙂" cut inside their bytes.
SPLIT = [b"\xe2", b"\x82\xac", b" ", b"\xf0\x9f", b"\x99", b"\x82", b"!"]


def answer_of(llama, *, status=200, config=None, **fields):
    async def test():
        async with serving(llama, **(config or {})) as live:
            found, answer, headers = await live.post(fields)
            assert found == status, answer
            return answer, headers

    return run(test())[0]


def stream_of(llama, config=None, **fields):
    async def test():
        async with serving(llama, **(config or {})) as live:
            return await live.events(**fields)

    return run(test())


def joined(events, index=0):
    """The message and finish reason that a stream's chunks add up to."""
    message, finish, stop = {}, None, None
    for chunk in events:
        for choice in chunk["choices"] if chunk != "[DONE]" else []:
            if choice["index"] != index:
                continue
            for name, text in choice["delta"].items():
                message[name] = text if name == "role" else message.get(name, "") + text
            finish = choice["finish_reason"] or finish
            stop = choice.get("stop_reason", stop)
    return message, finish, stop


def test_an_answer_has_every_field_of_the_contract():
    answer = answer_of(FakeLlama(WORDS), seed=7)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "default"
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["seed"] == 7
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "The capital of France is Paris.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 8,
        "total_tokens": 17,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_prediction_reaches_every_choice_and_the_usage_tells_what_it_saved():
    llama = FakeLlama()
    parts = [{"type": "text", "text": "The capital "}, {"type": "text", "text": "is Rome."}]
    answer = answer_of(llama, prediction={"type": "content", "content": parts}, n=2)
    predicted = llama.tokenizer.encode("The capital is Rome.", add_bos=False)
    assert llama.engine.predictions == [predicted, predicted]
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_draft_tokens"] == details["accepted_prediction_tokens"]
    assert details["accepted_prediction_tokens"] == 2 * (len(predicted) // 2)
    assert details["rejected_prediction_tokens"] == 2 * len(predicted) - details["accepted_prediction_tokens"]


def test_the_cost_is_the_sample_of_the_contract():
    # 149 and 338 tokens at 0.59 and 0.79 dollars a million cost 0.00035493.
    prompt = "x" * (149 - len("user: \n"))
    llama = FakeLlama(["a"] * 337)
    config = {"price_input": 0.59, "price_output": 0.79}
    answer = answer_of(llama, config=config, messages=[{"role": "user", "content": prompt}])
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (149, 338)
    assert answer["usage"]["estimated_cost"] == 0.00035493


CASES = {
    "plain": (WORDS, {}, None),
    "split characters": (SPLIT, {}, None),
    "an unfinished character": ([b"ok", b"\xe2\x82"], {}, None),
    "stop across tokens": (WORDS, {"stop": ["France is"]}, None),
    "stop included": (WORDS, {"stop": "of Fr", "include_stop_str_in_output": True}, None),
    "a stop that never comes": (WORDS, {"stop": [". Not"]}, None),
    "cut": (WORDS, {"max_tokens": 3}, None),
    "nothing": (WORDS, {"max_tokens": 0}, None),
    "empty": ([], {}, None),
    "reasoning": (["Let", " me", "\n", END_THINK, "\n\n", "Paris", "."], {}, True),
    "reasoning to the end": (["Let", " me", " think"], {"max_tokens": 2}, True),
    "a stop in reasoning only": (["is it Paris?", END_THINK, "Yes"], {"stop": ["Paris"]}, True),
    "reasoning not opened": (["<think>", "no"], {}, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_stream_adds_up_to_the_answer_in_one_piece(name, batch):
    pieces, fields, starts = CASES[name]
    whole = answer_of(FakeLlama(pieces, starts_in_reasoning=starts, batch=batch), **fields)
    events = stream_of(
        FakeLlama(pieces, starts_in_reasoning=starts, batch=batch), **fields, stream_options={"include_usage": True}
    )
    choice = whole["choices"][0]
    message, finish, stop = joined(events)
    expected = {k: v for k, v in choice["message"].items() if k != "refusal" and (v or k == "content")}
    assert message == expected
    assert (finish, stop) == (choice["finish_reason"], choice["stop_reason"])
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"]


def test_the_stream_has_the_order_of_the_contract():
    events = stream_of(FakeLlama(["a", END_THINK, "b"], starts_in_reasoning=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in events[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"reasoning_content": "a"}, {"content": "b"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in events[:-1]] == [None, None, None, "stop"]
    assert (
        len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in events[:-1]})
        == 1
    )
    assert all("usage" not in chunk for chunk in events[:-1])


def test_characters_are_never_split():
    for chunk in stream_of(FakeLlama(SPLIT))[:-1]:
        assert "\ufffd" not in chunk["choices"][0]["delta"].get("content", "")


def test_tokens_past_a_stop_string_are_neither_sent_nor_counted():
    for batch in (1, 2, 100):
        llama = FakeLlama(WORDS, batch=batch)
        answer = answer_of(llama, stop=["Fra", " is Paris"])
        choice = answer["choices"][0]
        assert choice["message"]["content"] == "The capital of "
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "Fra")
        assert answer["usage"]["completion_tokens"] == 4


def test_a_stop_string_frees_the_row():
    llama = FakeLlama(["a", "b"], repeats=True, delay_s=0.001)
    assert answer_of(llama, stop="abab")["choices"][0]["message"]["content"] == ""
    assert llama.engine.rows[0].cancelled.is_set()


def test_a_stop_token_is_told_by_its_id():
    llama = FakeLlama(WORDS)
    stop_id = llama.tokenizer.ids_of([" is"])[0]
    choice = answer_of(llama, stop_token_ids=[stop_id])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
        "The capital of France",
        "stop",
        stop_id,
    )


def test_stop_strings_fire_in_reasoning_only_if_the_server_says_so():
    pieces = ["is it Paris?", END_THINK, "Yes, Paris"]
    for flag, reasoning, content in ((False, "is it Paris?", "Yes, "), (True, "is it ", "")):
        answer = answer_of(
            FakeLlama(pieces, starts_in_reasoning=True), config={"stop_in_reasoning": flag}, stop="Paris"
        )
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (reasoning, content)


def test_reasoning_tokens_are_counted():
    answer = answer_of(FakeLlama(["a", "b", END_THINK, "c"], starts_in_reasoning=True))
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 5


def test_each_choice_has_its_own_row_and_seed():
    def make():
        llama = FakeLlama(delay_s=0.002)
        llama.set_scripts(["one"], ["two", "!"], ["three"])
        return llama

    llama = make()
    answer = answer_of(llama, n=3, seed=11)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one", "two!", "three"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 2 + 3 + 2
    assert answer["usage"]["prompt_tokens"] == 9
    assert [row.seed for row in llama.engine.rows] == [choice_seed(11, i) for i in range(3)]
    events = stream_of(make(), n=3, seed=11)
    assert [joined(events, i)[0]["content"] for i in range(3)] == ["one", "two!", "three"]


def test_seeds_of_choices_differ_and_the_first_is_the_requests():
    seeds = {choice_seed(seed, i) for seed in (0, 1, 2, 2**63 - 1) for i in range(16)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(5, 0) == 5


def test_a_seed_that_was_drawn_is_told_and_reproduces():
    llama = FakeLlama()
    seed = answer_of(llama)["seed"]
    assert 0 <= seed < 2**53
    assert llama.engine.rows[0].params.seed == seed
    assert answer_of(FakeLlama())["seed"] != seed


def test_every_control_reaches_the_engine():
    llama = FakeLlama()
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "top_k": 40,
        "min_tokens": 1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "stop_token_ids": [3],
        "ignore_eos": True,
        "seed": 9,
    }
    answer_of(llama, **fields, max_completion_tokens=4, logit_bias={"12": -1.5})
    params = llama.engine.rows[0].params
    assert {name: getattr(params, name) for name in fields} == {**fields, "stop_token_ids": (3,)}
    assert (params.max_tokens, params.logit_bias) == (4, {12: -1.5})


def test_defaults_come_from_the_checkpoint_only_when_asked():
    generation = {"temperature": 0.6, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.2, "do_sample": True}
    for mode, expected in (("none", (1.0, 1.0, 0, 1.0)), ("auto", (0.6, 0.95, 50, 1.2))):
        llama = FakeLlama(generation_config=generation)
        answer_of(llama, config={"generation_config": mode})
        params = llama.engine.rows[0].params
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == expected
    llama = FakeLlama(generation_config=generation)
    answer_of(llama, config={"generation_config": "auto"}, temperature=0, top_k=0)
    params = llama.engine.rows[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0, 0, 0.95)


def test_the_template_gets_what_templates_want():
    llama = FakeLlama()
    llama.chat_template.variables = frozenset({"tools"})
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning": "for templates that ask for it"},
        {"role": "developer", "content": "rules"},
        {"role": "tool", "content": "42", "tool_call_id": "t1"},
        {"role": "user", "content": ""},
    ]
    answer_of(llama, messages=messages)
    assert llama.chat_template.seen[-1] == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "42", "tool_call_id": "t1"},
        {"role": "user", "content": ""},
    ]


def test_a_completion_is_cut_at_the_context_unless_lengths_are_strict():
    assert answer_of(FakeLlama(WORDS), max_tokens=1_000_000)["choices"][0]["finish_reason"] == "stop"
    error = answer_of(FakeLlama(WORDS), status=400, config={"strict_length": True}, max_tokens=4090)["error"]
    assert error["code"] == "context_length_exceeded"
    assert "4099" in error["message"]
    assert "4096" in error["message"]
    answer_of(FakeLlama(WORDS), config={"strict_length": True}, max_tokens=4087)


def test_a_prompt_beyond_the_context_tells_both_numbers():
    error = answer_of(FakeLlama(), status=400, messages=[{"role": "user", "content": "x" * 5000}])["error"]
    assert "5007" in error["message"]
    assert "4096" in error["message"]


def test_usage_comes_in_every_chunk_when_asked():
    events = stream_of(FakeLlama(WORDS), stream_options={"continuous_usage_stats": True, "include_usage": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in events[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 8
    events = stream_of(FakeLlama(WORDS), stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in events[:-2])


FAILURES = [
    (RuntimeError("internal detail"), 500, "server_error"),
    (NonFiniteLogitsError("row 3"), 500, "server_error"),
    (EngineStoppedError("closing"), 503, "service_unavailable"),
    (None, 500, "server_error"),
]


@pytest.mark.parametrize(("failure", "status", "kind"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_status(failure, status, kind, stream):
    llama = FakeLlama(fail_after=0, failure=failure)
    error = answer_of(llama, status=status, stream=stream)["error"]
    assert error["type"] == kind
    assert "detail" not in error["message"]
    assert status != 500 or "req_" in error["message"]


def test_a_failure_in_a_stream_is_its_last_event():
    llama = FakeLlama(WORDS, fail_after=2, failure=RuntimeError("internal detail"), delay_s=0.01)
    events = stream_of(llama)
    assert events[-1]["error"]["type"] == "server_error"
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in events
    assert joined(events[:-1])[0]["content"] == "The capital"


def test_one_failed_choice_fails_the_request_and_frees_the_rest():
    llama = FakeLlama(WORDS, fail_after=1, failure=RuntimeError())
    assert answer_of(llama, status=500, n=2)["error"]["type"] == "server_error"
    run(until(lambda: llama.engine.num_running == 0, 1.0))


def test_a_full_queue_is_429_and_frees_the_rows_already_taken():
    llama = FakeLlama(repeats=True, delay_s=0.01, max_queue=2)

    async def test():
        async with serving(llama) as live:
            status, answer, headers = await live.post({"n": 3, "stream": True})
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            assert int(headers["Retry-After"]) > 0
            await until(lambda: llama.engine.num_running == 0, 1.0)

    run(test())


def test_too_many_pending_tokens_are_429_but_one_request_alone_always_fits():
    llama = FakeLlama(["a"], first_delay_s=0.3)
    large = {"messages": [{"role": "user", "content": "x" * 30}]}

    async def test():
        async with serving(llama, max_pending_tokens=30) as live:
            first = asyncio.create_task(live.post(large))
            await until(lambda: llama.engine.rows)
            status, answer, headers = await live.post()
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            assert int(headers["Retry-After"]) > 0
            assert (await first)[0] == 200
            assert (await live.post({"n": 3}))[0] == 200
            assert live.service.requests.num_pending_tokens == 0

    run(test())


def test_a_deadline_is_504_or_an_event():
    async def test():
        config = {"request_timeout_s": 0.2}
        async with serving(FakeLlama(first_delay_s=5), **config) as live:
            status, answer, _ = await live.post()
            assert (status, answer["error"]["type"]) == (504, "timeout")
            await until(lambda: live.service.requests.num == 0, 1.0)
        llama = FakeLlama(repeats=True, delay_s=0.01)
        async with serving(llama, **config) as live:
            events = await live.events()
            assert events[-1]["error"]["type"] == "timeout"
            await until(lambda: llama.engine.num_running == 0, 1.0)

    run(test())


def test_a_silent_stream_is_kept_alive():
    llama = FakeLlama(["a"], first_delay_s=0.35)

    async def test():
        async with serving(llama, sse_keepalive_s=0.1) as live:
            async with live.session.post(live.url + CHAT, json=body(stream=True)) as response:
                text = await response.text()
            assert text.startswith(": keep-alive\n\n")
            assert 2 <= text.count(": keep-alive\n\n") <= 3
            assert joined(parse_events(text))[0]["content"] == "a"
            assert response.headers["Content-Type"].startswith("text/event-stream")
            assert "no-cache" in response.headers["Cache-Control"]

    run(test())


def test_after_a_keep_alive_a_failure_is_an_event():
    llama = FakeLlama(first_delay_s=0.2, fail_after=0, failure=RuntimeError())

    async def test():
        async with serving(llama, sse_keepalive_s=0.05) as live:
            assert [set(event) for event in await live.events()] == [{"error"}]

    run(test())


def test_rendering_does_not_hold_up_the_event_loop():
    llama = FakeLlama()
    llama.chat_template.delay_s = 0.5

    async def test():
        async with serving(llama) as live:
            slow = asyncio.create_task(live.post())
            await asyncio.sleep(0.1)
            loop = asyncio.get_running_loop()
            started = loop.time()
            assert (await live.get("/health"))[0] == 200
            assert loop.time() - started < 0.3
            assert (await slow)[0] == 200

    run(test())


def test_every_body_is_plain_json():
    async def test():
        llama = FakeLlama(["\u2028", '"', "\\", "\n", "\x00", "é"])
        async with serving(llama) as live:
            async with live.session.post(live.url + CHAT, json=body()) as response:
                answer = json.loads(await response.read())
            assert answer["choices"][0]["message"]["content"] == '\u2028"\\\n\x00é'
            events = await live.events()
            assert joined(events)[0]["content"] == '\u2028"\\\n\x00é'

    run(test())
