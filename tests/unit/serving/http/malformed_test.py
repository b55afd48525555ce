"""Sixty and more malformed requests, over HTTP: each with its status and error body, and the server unharmed."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

import pytest
from unit.serving.fakes import FakeLlama
from unit.serving.live import CHAT, body, serving_in_thread

COMPLETIONS = "/v1/completions"
INVALID = "invalid_request_error"
JSON = {"Content-Type": "application/json"}


def chat(**fields):
    return CHAT, body(**fields)


def text(**fields):
    return COMPLETIONS, {"model": "default", "prompt": "a", **fields}


def message(**fields):
    return chat(messages=[{"role": "user", "content": "a", **fields}])


# (request: path and JSON or bytes, status, type, param, code)
MALFORMED = {
    "no body": ((CHAT, b""), 400, INVALID, None, "invalid_json"),
    "not JSON": ((CHAT, b"model=default"), 400, INVALID, None, "invalid_json"),
    "cut JSON": ((CHAT, b'{"model": "defa'), 400, INVALID, None, "invalid_json"),
    "a list": ((CHAT, b"[]"), 400, INVALID, None, "invalid_json"),
    "null": ((CHAT, b"null"), 400, INVALID, None, "invalid_json"),
    "a string": ((COMPLETIONS, b'"hello"'), 400, INVALID, None, "invalid_json"),
    "not UTF-8": ((CHAT, b'{"model": "\xff"}'), 400, INVALID, None, "invalid_json"),
    "UTF-16": ((CHAT, '{"model": "x"}'.encode("utf-16")), 400, INVALID, None, "invalid_json"),
    "NaN": ((COMPLETIONS, b'{"temperature": NaN}'), 400, INVALID, None, "invalid_json"),
    "infinity": ((CHAT, b'{"temperature": 1e999}'), 400, INVALID, None, "invalid_json"),
    "a long integer": ((CHAT, b'{"seed": ' + b"9" * 5000 + b"}"), 400, INVALID, None, "invalid_json"),
    "a key twice": ((CHAT, b'{"n": 1, "n": 1}'), 400, INVALID, None, "invalid_json"),
    "half a surrogate pair": ((CHAT, b'{"user": "\\ud800"}'), 400, INVALID, "user", "invalid_json"),
    "too deep": ((CHAT, b'{"a":' * 100 + b"1" + b"}" * 100), 400, INVALID, None, "invalid_json"),
    "nothing given": ((CHAT, {}), 400, INVALID, "model", "missing_required_parameter"),
    "no messages": ((CHAT, {"model": "default"}), 400, INVALID, "messages", "missing_required_parameter"),
    "messages null": (chat(messages=None), 400, INVALID, "messages", "missing_required_parameter"),
    "messages empty": (chat(messages=[]), 400, INVALID, "messages", None),
    "messages a string": (chat(messages="hi"), 400, INVALID, "messages", None),
    "a message of text": (chat(messages=["hi"]), 400, INVALID, "messages[0]", None),
    "no role": (chat(messages=[{"content": "a"}]), 400, INVALID, "messages[0].role", "missing_required_parameter"),
    "a strange role": (message(role="wizard"), 400, INVALID, "messages[0].role", None),
    "content a number": (message(content=3), 400, INVALID, "messages[0].content", None),
    "an image": (
        message(content=[{"type": "image_url", "image_url": {"url": "http://x"}}]),
        400,
        INVALID,
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    "a part without text": (
        message(content=[{"type": "text"}]),
        400,
        INVALID,
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    "a tool message without id": (chat(messages=[{"role": "tool", "content": "a"}]), 400, INVALID, "messages[0]", None),
    "no parts": (message(content=[]), 400, INVALID, "messages[0].content", None),
    "an echo": (chat(echo=True), 400, INVALID, "echo", "unsupported_parameter"),
    "a choice of nothing": (
        chat(structured_outputs={"choice": []}),
        400,
        INVALID,
        "structured_outputs.choice",
        None,
    ),
    "an empty stop": (chat(stop=""), 400, INVALID, "stop", None),
    "a template": (chat(chat_template="{{ x }}"), 400, INVALID, "chat_template", "unsupported_parameter"),
    "a model that is not here": (chat(model="gpt-4o"), 404, INVALID, "model", "model_not_found"),
    "a model without a name": (chat(model=""), 400, INVALID, "model", None),
    "temperature a string": (chat(temperature="1"), 400, INVALID, "temperature", None),
    "temperature true": (chat(temperature=True), 400, INVALID, "temperature", None),
    "temperature too high": (chat(temperature=2.01), 400, INVALID, "temperature", None),
    "temperature negative": (text(temperature=-0.1), 400, INVALID, "temperature", None),
    "top_p zero": (chat(top_p=0), 400, INVALID, "top_p", None),
    "top_k a fraction": (chat(top_k=1.5), 400, INVALID, "top_k", None),
    "max_tokens negative": (chat(max_tokens=-1), 400, INVALID, "max_tokens", None),
    "max_tokens overflowing": (text(max_tokens=2**63), 400, INVALID, "max_tokens", None),
    "two different budgets": (chat(max_tokens=1, max_completion_tokens=2), 400, INVALID, "max_tokens", None),
    "n zero": (chat(n=0), 400, INVALID, "n", None),
    "n huge": (text(n=10**30), 400, INVALID, "n", None),
    "seed beyond 63 bits": (chat(seed=2**64), 400, INVALID, "seed", None),
    "an empty stop string": (chat(stop=["a", ""]), 400, INVALID, "stop[1]", None),
    "17 stop strings": (chat(stop=["a"] * 17), 400, INVALID, "stop", None),
    "a stop string too long": (chat(stop="é" * 513), 400, INVALID, "stop", None),
    "a stop id beyond the vocabulary": (chat(stop_token_ids=[1000]), 400, INVALID, "stop_token_ids", None),
    "a bias beyond the vocabulary": (chat(logit_bias={"1000": 1}), 400, INVALID, "logit_bias", None),
    "a bias of a word": (chat(logit_bias={"the": 1}), 400, INVALID, "logit_bias", None),
    "a bias too strong": (text(logit_bias={"1": 101}), 400, INVALID, "logit_bias.1", None),
    "stream a number": (chat(stream=1), 400, INVALID, "stream", None),
    "stream_options without stream": (chat(stream_options={}), 400, INVALID, "stream_options", None),
    "logprobs a number": (chat(logprobs=5), 400, INVALID, "logprobs", None),
    "top_logprobs alone": (chat(top_logprobs=5), 400, INVALID, "top_logprobs", None),
    "top_logprobs huge": (chat(logprobs=True, top_logprobs=10**9), 400, INVALID, "top_logprobs", None),
    "prompt_logprobs streamed": (text(prompt_logprobs=1, stream=True), 400, INVALID, "prompt_logprobs", None),
    "priority too low": (chat(priority=11), 400, INVALID, "priority", None),
    "an empty salt": (chat(cache_salt=""), 400, INVALID, "cache_salt", None),
    "a salt too long": (text(cache_salt="x" * 257), 400, INVALID, "cache_salt", None),
    "a prompt beyond the context": (
        message(content="x" * 5000),
        400,
        INVALID,
        "messages",
        "context_length_exceeded",
    ),
    "no prompt": (text(prompt=None), 400, INVALID, "prompt", "missing_required_parameter"),
    "a prompt of both kinds": (text(prompt=["a", 1]), 400, INVALID, "prompt", None),
    "an id beyond the vocabulary": (text(prompt=[999, 1000]), 400, INVALID, "prompt", None),
    "a suffix": (text(suffix="b"), 400, INVALID, "suffix", "unsupported_parameter"),
    "best_of below n": (text(n=3, best_of=2), 400, INVALID, "best_of", None),
    "best_of streamed": (text(best_of=2, stream=True), 400, INVALID, "best_of", None),
    "messages for a completion": (text(messages=[]), 400, INVALID, "messages", "unsupported_parameter"),
    "nothing to tokenize": (("/tokenize", {}), 400, INVALID, "prompt", None),
    "ids that are text": (("/detokenize", {"tokens": ["1"]}), 400, INVALID, "tokens[0]", None),
    "a route that is not there": (("/v1/embeddings", {"input": "a"}), 404, "not_found", None, "not_found"),
    "a body that is too large": ((CHAT, b" " * (4 * 2**20 + 1)), 413, INVALID, None, "body_too_large"),
}
HEADERS = {
    "no content type": ({}, 415, "unsupported_media_type"),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
    "compressed": ({**JSON, "Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
    "latin-1": ({"Content-Type": "application/json; charset=latin-1"}, 415, "unsupported_media_type"),
    "an expectation": ({**JSON, "Expect": "the-unexpected"}, 417, "expectation_failed"),
}


@pytest.fixture(scope="module")
def url():
    with serving_in_thread(FakeLlama(["Hello"])) as found:
        yield found


def send(url, method, path, payload, headers=JSON):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request(method, path, payload, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def test_the_table_has_sixty_rows():
    assert len(MALFORMED) >= 60


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_gets_its_row(url, name):
    (path, payload), status, kind, param, code = MALFORMED[name]
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    found, answer, headers = send(url, "POST", path, data)
    error = answer["error"]
    assert set(answer) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (found, error["type"], error["param"], error["code"]) == (status, kind, param, code), error
    assert 10 < len(error["message"]) < 700
    assert error["message"].isprintable()
    assert headers["X-Request-Id"]


@pytest.mark.parametrize("name", HEADERS)
def test_a_malformed_head_gets_its_row(url, name):
    headers, status, code = HEADERS[name]
    found, answer, _ = send(url, "POST", CHAT, json.dumps(body()).encode(), headers)
    assert (found, answer["error"]["code"]) == (status, code)


def test_every_request_without_a_body_gets_the_same_answer(url):
    answers = [send(url, "POST", CHAT, b"")[:2] for _ in range(3)]
    assert answers == [answers[0]] * 3
    assert answers[0][0] == 400


def test_the_server_is_unharmed(url):
    status, answer, _ = send(url, "POST", CHAT, json.dumps(body()).encode())
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "Hello")
