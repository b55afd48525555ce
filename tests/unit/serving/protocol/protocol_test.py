"""What a request may hold, and how what it may not hold is refused."""

from __future__ import annotations

import json
import time

import pytest
from jaxllama_serving.protocol.base import unknown_fields
from jaxllama_serving.protocol.chat import ChatRequest, parse_chat_request
from jaxllama_serving.protocol.errors import ApiError
from jaxllama_serving.protocol.refused import CHAT, MESSAGE
from jaxllama_serving.protocol.strict_json import MAX_DEPTH, decode
from unit.serving.live import body

from jaxllama.decode.params import SamplingParams


def parse(**fields):
    return parse_chat_request(body(**fields), strict_fields=True)


def test_the_smallest_request_has_every_default():
    request = parse()
    assert (request.stream, request.n, request.seed, request.max_new_tokens, list(request.stop)) == (
        False,
        1,
        None,
        None,
        [],
    )


def test_null_means_the_default_in_every_optional_field():
    optional = set(ChatRequest.model_fields) - {"model", "messages"}
    assert parse(**dict.fromkeys(optional)) == parse()
    assert parse(**dict.fromkeys(CHAT), **dict.fromkeys(["temprature", "anything at all"])) == parse()


def test_what_official_clients_send_by_default_is_accepted():
    message = {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning_content": "Hm.",
    }
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, message]
    harmless = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "response_format": {"type": "text"}}
    request = parse(messages=messages, user="u", metadata={"a": "b"}, store=False, service_tier="auto", **harmless)
    assert [m.for_template()["content"] for m in request.messages] == ["Hi", "Yes."]


def test_a_template_in_a_request_is_refused_by_name():
    with pytest.raises(ApiError) as caught:
        parse(chat_template="{{ messages }}")
    assert (caught.value.param, caught.value.code) == ("chat_template", "unsupported_parameter")
    for name in MESSAGE:
        with pytest.raises(ApiError) as caught:
            parse(messages=[{"role": "assistant", "content": "Hi", name: {"x": 1}}])
        assert caught.value.param == f"messages[0].{name}"


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"reasoning": {"enabled": False, "effort": "high"}}, "reasoning"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_budget": True}, "thinking_budget"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"anything": []}}, "chat_template_kwargs.anything"),
    ],
)
def test_what_does_not_fit_together_is_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "messages[1]"),
        ({"role": "user", "content": "a", "prefix": True}, "messages[1]"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "x"}]}, "messages[1].tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "tool", "content": "a"}, "messages[1]"),
    ],
)
def test_messages_are_checked_by_role(message, param):
    with pytest.raises(ApiError) as caught:
        parse(messages=[{"role": "user", "content": "Hi"}, message])
    assert caught.value.param == param


def test_only_the_last_message_is_continued():
    said = {"role": "assistant", "content": "a", "prefix": True}
    assert parse(messages=[{"role": "user", "content": "Hi"}, said]).continues
    with pytest.raises(ApiError) as caught:
        parse(messages=[said, {"role": "user", "content": "Hi"}])
    assert caught.value.param == "messages[0].prefix"
    with pytest.raises(ApiError) as caught:
        parse(messages=[{"role": "user", "content": "Hi"}, said], add_generation_prompt=True)
    assert caught.value.param == "add_generation_prompt"


def test_a_harmless_value_is_compared_with_its_json_type():
    for fields in ({"logprobs": 0}, {"top_logprobs": False}, {"include_reasoning": 1}, {"continue_final_message": 0}):
        with pytest.raises(ApiError):
            parse(**fields)


BOUNDS = {
    "temperature": (0, 2),
    "top_p": (0.001, 1),
    "min_p": (0, 1),
    "top_k": (-1, 999),
    "max_tokens": (0, 1_000_000),
    "min_tokens": (0, 1_000_000),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 5),
    "seed": (0, 2**63 - 1),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_inclusive_and_agree_with_the_sampler(name):
    low, high = BOUNDS[name]
    step = 1 if isinstance(low, int) and isinstance(high, int) and high > 5 else 0.001
    for value in BOUNDS[name]:
        assert getattr(parse(**{name: value}), name) == value
        SamplingParams(**{name: value})
    for value in (low - step, high + step):
        with pytest.raises(ApiError):
            parse(**{name: value})
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})


# (fields, param, code, a part of the message)
REFUSED = [
    ({"temperature": 2.5}, "temperature", None, "from 0 to 2, got 2.5"),
    ({"temperature": "1"}, "temperature", None, "got '1'"),
    ({"temperature": True}, "temperature", None, "got True"),
    ({"top_p": 0}, "top_p", None, "above 0 to 1"),
    ({"top_k": 1000}, "top_k", None, "0 to 999"),
    ({"top_k": 1.5}, "top_k", None, "got 1.5"),
    ({"max_tokens": 1.0}, "max_tokens", None, "integer"),
    ({"max_tokens": -1}, "max_tokens", None, "got -1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", None, "differ"),
    ({"n": 0}, "n", None, "from 1 to 16"),
    ({"n": 17}, "n", None, "got 17"),
    ({"n": 10**30}, "n", None, "from 1 to 16"),
    ({"seed": 2**63}, "seed", None, "9223372036854775807"),
    ({"seed": -1}, "seed", None, "got -1"),
    ({"stop": ""}, "stop", None, "1 to 1024 bytes"),
    ({"stop": ["a", ""]}, "stop[1]", None, "1 to 1024 bytes"),
    ({"stop": ["a"] * 17}, "stop", None, "at most 16"),
    ({"stop": "é" * 600}, "stop", None, "longer than 1024 bytes"),
    ({"stop": [1]}, "stop[0]", None, "got 1"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", None, "token ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids[0]", None, "got True"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids", None, "at most 64"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", None, "-100 to 100"),
    ({"logit_bias": {"x": 1}}, "logit_bias", None, "'x' is not a token id"),
    ({"logit_bias": {"01": 1}}, "logit_bias", None, "not a token id"),
    ({"logit_bias": {"99999999999": 1}}, "logit_bias", None, "not a token id"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", None, "at most 1024"),
    ({"logit_bias": [1]}, "logit_bias", None, "object"),
    ({"stream": "true"}, "stream", None, "boolean"),
    ({"stream": 1}, "stream", None, "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None, "stream: true"),
    (
        {"stream": True, "stream_options": {"usage": True}},
        "stream_options.usage",
        "unknown_parameter",
        "not a parameter",
    ),
    ({"messages": []}, "messages", None, "at least one"),
    ({"messages": {}}, "messages", None, "list"),
    ({"messages": ["hi"]}, "messages[0]", None, "object"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "required"),
    (
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content",
        "missing_required_parameter",
        "required",
    ),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", None, "string or a list"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", None, "'robot'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter", "required"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "unsupported_parameter",
        "image_url",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", None, "required"),
    ({"messages": [{"role": "user", "content": "x", "nom": 1}]}, "messages[0].nom", "unknown_parameter", "nom"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name", None, "string"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", None, "at least one text part"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", None, "tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0]", None, "tool messages only"),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, "messages[0]", None, "assistant"),
    (
        {"messages": [{"role": "assistant", "content": "x", "function_call": {}}]},
        "messages[0].function_call",
        "unsupported_parameter",
        "not supported",
    ),
    ({"temprature": 1}, "temprature", "unknown_parameter", "temprature"),
    ({"model": ""}, "model", None, "model name"),
    ({"model": None}, "model", "missing_required_parameter", "required"),
    ({"ignore_eos": "no"}, "ignore_eos", None, "boolean"),
    ({"{braces}": 1}, "{braces}", "unknown_parameter", "{braces}"),
]


@pytest.mark.parametrize(("fields", "param", "code", "part"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_refused_by_its_path(fields, param, code, part):
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    error = caught.value
    if part == "required" and code is None:
        code = error.code
    assert (error.status, error.type, error.param, error.code) == (400, "invalid_request_error", param, code)
    assert part in error.message
    assert len(error.message) < 600


def test_several_bad_fields_are_told_at_once():
    with pytest.raises(ApiError) as caught:
        parse(temperature=9, top_p=9)
    assert "temperature must be" in caught.value.message
    assert "top_p must be" in caught.value.message


def test_unknown_fields_are_named_by_their_paths():
    message = {"role": "user", "content": [{"type": "text", "text": "Hi", "b": 1}], "c.d": 0}
    request = parse_chat_request(body(foo=1, bar=None, messages=[message], stop=["x"], temperature=0.5))
    assert request.temperature == 0.5
    assert unknown_fields(request) == ("foo", "messages[0].c.d", "messages[0].content[0].b")


BAD_JSON = {
    "nothing": b"",
    "words": b"hello",
    "list": b"[]",
    "number": b"3",
    "unfinished": b'{"model": ',
    "trailing comma": b'{"a": 1,}',
    "two values": b"{} {}",
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": Infinity}',
    "-Infinity": b'{"temperature": -Infinity}',
    "1e999": b'{"temperature": 1e999}',
    "-1e999": b'{"temperature": -1e999}',
    "duplicate key": b'{"model": "a", "model": "b"}',
    "duplicate key inside": b'{"a": [{"b": 1, "b": 2}]}',
    "long integer": b'{"seed": ' + b"9" * 5000 + b"}",
    "long negative integer": b'{"seed": -' + b"9" * 5000 + b"}",
    "lone surrogate": b'{"model": "\\ud800"}',
    "lone low surrogate": b'{"a": ["\\uDFFF"]}',
    "surrogate key": b'{"\\ud800": 1}',
    "encoded surrogate": b'{"model": "\xed\xa0\x80"}',
    "latin-1": b'{"model": "\xe9"}',
    "UTF-16": '{"model": "x"}'.encode("utf-16"),
    "UTF-8 with a mark": b"\xef\xbb\xbf{}",
    "NUL": b'{"a": "\x00"}',
    "deep lists": b'{"a": ' + b"[" * 250_000 + b"]" * 250_000 + b"}",
    "deep objects": b'{"a": ' * 250_000 + b"1" + b"}" * 250_000,
    "deep and open": b"[" * 250_000,
    "wide and unbalanced": b")" * 1000 + b"][" * 100_000,
    "one level too deep": b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused_at_once(name):
    started = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        decode(BAD_JSON[name])
    assert time.perf_counter() - started < 2
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert caught.value.__cause__ is None


def test_good_json_is_what_the_json_module_reads():
    for value in (
        {"a": [1, -2.5, 1e10, True, None, 'x\\"[{'], "b": {"c": "😀 é \u2028"}},
        {"brackets in strings": "[" * 5000 + '\\"' + "{" * 5000},
        {"deep": json.loads("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))},
        {},
    ):
        for ascii_only in (True, False):
            assert decode(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_a_surrogate_is_told_by_its_path():
    with pytest.raises(ApiError) as caught:
        decode(b'{"messages": [{"content": "ok"}, {"content": "\\ud83d"}]}')
    assert caught.value.param == "messages[1].content"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"1": "x"}}, "logit_bias.1: logit_bias must be an object of at most 1024 token ids"),
        ({"stop": ["a", 5]}, "stop[1]: stop must be a string or at most 16 strings"),
        (
            {"stop_token_ids": [-1]},
            "stop_token_ids[0]: stop_token_ids must be a list of at most 64 token ids",
        ),
        ({"guided_choice": [1]}, "guided_choice[0]: guided_choice must be a list of at least one string"),
        ({"messages": ["hi"]}, "messages[0] must be an object, got 'hi'"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0] must be an object, got 'hi'"),
        ({"tool_choice": {"type": "x"}}, 'tool_choice.type must be "none", "auto"'),
        ({"top_p": "1"}, "top_p must be a number above 0 to 1, got '1'"),
    ],
)
def test_of_an_item_it_is_said_what_its_field_must_be(fields, message):
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body(**fields))
    assert caught.value.message.startswith(message)
