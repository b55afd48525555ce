"""The OpenAPI document: valid, complete, and true of what the server takes and gives."""

from __future__ import annotations

import functools
import json

import jsonschema
import pytest
from jaxllama_serving.http.openapi import ERRORS, make_openapi
from jaxllama_serving.http.routes import ROUTES
from jaxllama_serving.protocol import responses
from jaxllama_serving.protocol.chat import ChatRequest
from jaxllama_serving.protocol.completions import CompletionRequest
from jaxllama_serving.protocol.shared_fields import GenerationRequest
from openapi_spec_validator import OpenAPIV31SpecValidator
from unit.serving.fakes import FakeLlama
from unit.serving.live import body, run, serving
from unit.serving.protocol.protocol_test import REFUSED
from unit.serving.requests.chat_test import CASES, answer_of, stream_of
from unit.serving.requests.completions_test import completion_of, events_of


@functools.cache
def document():
    return json.loads(json.dumps(make_openapi(ROUTES, ("default", "org/model"), needs_key=True)))


@functools.cache
def validator(name):
    schema = {"$ref": f"#/components/schemas/{name}", "components": document()["components"]}
    return jsonschema.Draft202012Validator(schema)


def test_the_document_is_valid_openapi_3_1():
    OpenAPIV31SpecValidator(document()).validate()
    assert document()["openapi"].startswith("3.1")


def test_it_is_served_under_every_prefix_and_needs_the_key():
    async def test():
        async with serving(FakeLlama(), api_keys=("sk-one",)) as live:
            key = {"Authorization": "Bearer sk-one"}
            for prefix in ("", "/v1", "/v1/openai"):
                assert (await live.get(prefix + "/openapi.json"))[0] == 401
                status, found, _ = await live.get(prefix + "/openapi.json", headers=key)
                assert (status, found) == (200, document())
        async with serving(FakeLlama()) as live:
            assert {} in (await live.get("/openapi.json"))[1]["security"]

    run(test())


def test_every_route_is_described_and_nothing_else():
    async def test():
        async with serving(FakeLlama()) as live:
            return {
                (route.method.lower(), route.resource.canonical)
                for route in live.app.router.routes()
                if route.method != "HEAD" and "." not in route.resource.canonical.replace("openapi.json", "")
            }

    described = {(method, path) for path, item in document()["paths"].items() for method in item}
    assert described == run(test()) - {("get", "/")}
    ids = [operation["operationId"] for item in document()["paths"].values() for operation in item.values()]
    assert len(set(ids)) == len(ids)
    assert all(operation["summary"] for item in document()["paths"].values() for operation in item.values())


def test_every_status_of_an_error_is_described():
    assert set(document()["components"]["responses"]) == {f"Error{status}" for status in ERRORS}
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert {int(s) for s in document()["paths"][path]["post"]["responses"]} == {200, *ERRORS} - {409}, "of profiles"
    assert document()["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document()["paths"]["/v1/health"]["get"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_is_described_by_each_of_its_events(path):
    content = document()["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    jsonschema.validate({"data": "[DONE]"}, {**content["schema"], "components": document()["components"]})


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_the_schema_and_the_model_agree_on_every_field(model):
    schema = document()["components"]["schemas"][model.__name__]
    assert set(schema["properties"]) == set(model.model_fields)
    assert set(schema["required"]) == {name for name, field in model.model_fields.items() if field.is_required()}
    assert schema["additionalProperties"] is True
    for example in schema["examples"]:
        model.model_validate(example)
        validator(model.__name__).validate(example)
    everything = schema["examples"][0] | {name: None for name in GenerationRequest.model_fields if name != "model"}
    validator(model.__name__).validate(everything)
    assert model.model_validate(everything)


def test_strict_fields_close_every_object_of_a_request():
    strict = make_openapi(ROUTES, ("default",), needs_key=False, strict_fields=True)["components"]["schemas"]
    for name in ("ChatRequest", "ChatMessage", "StreamOptions", "ToolSpec", "CompletionRequest", "TokenizeRequest"):
        assert document()["components"]["schemas"][name]["additionalProperties"] is True
        assert strict[name]["additionalProperties"] is False


def test_what_the_model_refuses_by_itself_the_schema_refuses_too():
    """All but what a schema cannot say: bytes of a string, and fields that do not fit together."""
    beyond = {"longer than 1024 bytes", "differ", "stream: true", "tool_call_id", "tool messages only", "assistant"}
    known = set(document()["components"]["schemas"]["ChatRequest"]["properties"])
    for fields, _, code, part in REFUSED:
        request = body(**fields)
        if part in beyond or code in ("unsupported_parameter", "unknown_parameter") or not set(request) <= known:
            continue
        if fields == {"max_tokens": 1.0}:
            continue  # an integer, to JSON Schema
        assert not validator("ChatRequest").is_valid(request), fields
    assert not validator("ChatRequest").is_valid(body(model="gpt-4"))
    assert validator("ChatRequest").is_valid(body(stop="x", temperature=0.5, top_k=-1, messages=body()["messages"]))


FULL = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "return_seed": True, "n": 2}


@pytest.mark.parametrize("name", CASES)
def test_chat_answers_are_as_described(name):
    pieces, fields, starts = CASES[name]
    config = {"price_input": 1.0}
    for more in ({}, FULL):
        answer = answer_of(FakeLlama(pieces, starts_in_reasoning=starts), config=config, **fields, **more)
        responses.ChatCompletion.model_validate(answer)
        validator("ChatCompletion").validate(answer)
        events = stream_of(
            FakeLlama(pieces, starts_in_reasoning=starts),
            config,
            stream_options={"include_usage": True},
            **fields,
            **more,
        )
        for chunk in events[:-1]:
            responses.ChatCompletionChunk.model_validate(chunk)
    responses.ChatCompletion.model_validate(answer_of(FakeLlama(), prompt_logprobs=2))


def test_completions_are_as_described():
    fields = {"echo": True, "logprobs": 2, "return_token_ids": True, "return_seed": True, "prompt": ["a", "b"]}
    for more in ({}, fields, {**fields, "prompt_logprobs": 1, "best_of": 3}):
        answer = completion_of(FakeLlama(), **more)
        responses.Completion.model_validate(answer)
        validator("Completion").validate(answer)
    for chunk in events_of(FakeLlama(), stream_options={"include_usage": True}, **fields)[:-1]:
        responses.Completion.model_validate(chunk)


def test_small_answers_and_errors_are_as_described():
    async def test():
        async with serving(FakeLlama(), price_input=1.0, request_timeout_s=5.0) as live:
            for path, model in (
                ("/v1/models", responses.ModelList),
                ("/v1/models/default", responses.Model),
                ("/health", responses.Status),
                ("/ready", responses.Status),
                ("/version", responses.Version),
                ("/nowhere", responses.Error),
            ):
                model.model_validate((await live.get(path))[1])
            tokens = (await live.post(path="/tokenize", json={"prompt": "a", "return_token_strs": True}))[1]
            responses.Tokens.model_validate(tokens)
            responses.Text.model_validate((await live.post(path="/detokenize", json={"tokens": [1]}))[1])
            responses.Error.model_validate((await live.post({"n": 99}))[1])

    run(test())
