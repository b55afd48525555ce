"""Properties that hypothesis looks for exceptions of: what is parsed, and streams against answers in one piece."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxllama_serving.protocol.base import parse
from jaxllama_serving.protocol.chat import ChatRequest, parse_chat_request
from jaxllama_serving.protocol.completions import CompletionRequest, parse_completion_request
from jaxllama_serving.protocol.errors import ApiError
from jaxllama_serving.protocol.strict_json import decode
from jaxllama_serving.protocol.tokens import DetokenizeRequest, TokenizeRequest
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import body
from unit.serving.requests import completions_test as completions
from unit.serving.requests.chat_test import answer_of, joined, stream_of
from unit.serving.requests.logprobs_test import logprobs_of

NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", "robot"]) | VALUES,
            "content": VALUES,
            "tool_call_id": VALUES,
            "reasoning_content": VALUES,
        },
    )
)


def bodies(model, valid):
    """Objects near to a valid request: some fields of the model with any JSON, some with small numbers."""
    names = sorted(model.model_fields)
    small = st.integers(-2, 25) | st.booleans() | st.floats(-3, 3)
    fields = st.dictionaries(st.sampled_from(names) | st.text(max_size=6), VALUES | small, max_size=5)
    return fields.map(lambda found: {**valid, **found}) | fields


@pytest.mark.parametrize(
    ("model", "read", "valid"),
    [
        (ChatRequest, lambda data: parse_chat_request(data), body()),
        (CompletionRequest, lambda data: parse_completion_request(data), {"model": "default", "prompt": "a"}),
        (TokenizeRequest, lambda data: parse(TokenizeRequest, data), {"prompt": "a"}),
        (DetokenizeRequest, lambda data: parse(DetokenizeRequest, data), {"tokens": [1]}),
    ],
    ids=["chat", "completions", "tokenize", "detokenize"],
)
def test_any_object_is_a_request_or_a_400_that_names_a_field(model, read, valid):
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(model, valid))
    def check(data):
        request, error = outcome(read, data)
        if error is None:
            # Read again from what it holds, it is the same request.
            assert model.model_validate(request.model_dump(exclude_unset=True)) == request
            return
        assert (error.status, error.type) == (400, "invalid_request_error")
        assert error.param
        assert error.message.isprintable()
        assert len(error.message) < 1000

    check()


def outcome(read, data):
    """What `read` returns, or the error it raises."""
    try:
        return read(data), None
    except ApiError as error:
        return None, error


@settings(max_examples=150, deadline=None)
@given(MESSAGES)
def test_any_messages_are_read_or_refused_by_a_path(messages):
    _, error = outcome(parse_chat_request, {"model": "m", "messages": messages})
    assert error is None or (error.status == 400 and error.param.startswith("messages"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_a_400(data):
    value, error = outcome(decode, data)
    if error is None:
        assert value == json.loads(data)
    else:
        assert (error.status, error.code) == (400, "invalid_json")


PIECES = st.lists(
    st.sampled_from(["a", " b", "\n", "<think>", "</think>", "Paris", b"\xe2", b"\x82\xac", b"\xf0\x9f", b"\x99\x82"])
    | st.text(min_size=1, max_size=3),
    max_size=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "stop": st.lists(st.sampled_from(["a", "b\n", "is", "€", "ris", "aa"]), min_size=1, max_size=2),
        "max_tokens": st.integers(0, 9),
        "include_stop_str_in_output": st.booleans(),
        "return_token_ids": st.booleans(),
        "n": st.integers(1, 2),
    },
)


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, fields=FIELDS, batch=st.sampled_from([1, 2, 50]), reasons=st.sampled_from([None, True, False]))
def test_deltas_add_up_to_the_message(pieces, fields, batch, reasons):
    pieces = [END_THINK if piece == "</think>" and reasons is not None else piece for piece in pieces]

    def make():
        return FakeLlama(pieces, starts_in_reasoning=reasons, batch=batch)

    fields = {**fields, "logprobs": True, "top_logprobs": 1, "seed": 1}
    whole, events = answer_of(make(), **fields), stream_of(make(), **fields)
    for choice in whole["choices"]:
        message, finish, stop = joined(events, choice["index"])
        expected = {k: v for k, v in choice["message"].items() if k != "refusal" and (v or k == "content")}
        assert (message, finish, stop) == (expected, choice["finish_reason"], choice["stop_reason"])
        for kind in ("content",) if reasons is None else ("content", "reasoning_content"):
            assert logprobs_of(events, choice["index"], kind) == choice["logprobs"][kind]


@settings(max_examples=40, deadline=None)
@given(pieces=PIECES, fields=FIELDS, batch=st.sampled_from([1, 2, 50]), echo=st.booleans())
def test_pieces_add_up_to_the_completion(pieces, fields, batch, echo):
    fields = {"prompt": ["xx", "x"], "max_tokens": 9, "seed": 1, "echo": echo, "logprobs": 1, **fields}
    whole = completions.completion_of(FakeLlama(pieces, batch=batch), **fields)
    events = completions.events_of(FakeLlama(pieces, batch=batch), **fields)
    for choice in whole["choices"]:
        found = completions.joined(events, choice["index"])
        assert found["text"] == choice["text"]
        assert (found["finish_reason"], found["stop_reason"]) == (choice["finish_reason"], choice["stop_reason"])
        for name, values in choice["logprobs"].items():
            assert found.get("logprobs", {}).get(name, []) == values
