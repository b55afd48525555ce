"""Grammars, tools, budgets and continuation over HTTP on a real engine, whose model has random or scripted weights."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from typing import Literal

import jsonschema
import numpy as np
import openai
import pydantic
import pytest
import tiny
from schemas import random_schema
from unit.serving.live import run, serving, serving_in_thread

from jaxllama import EngineOptions, SamplingParams, Structured
from jaxllama.errors import RequestError

THINK, END_THINK, END = 259, 260, tiny.EOS_ID
OPTIONS = EngineOptions(max_rows=4, max_context=1536, page_size=32, num_pages=193, chunk_sizes=(32, 256))
TEMPLATE = tiny.CHAT_TEMPLATE.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
CHAIN = ["\n", *"abcdefgh", END_THINK, *"XYZ!", END]
WILD = {"temperature": 2, "max_tokens": 400}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "set_flags", "description": "Sets.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "additionalProperties": False}}},
]

UNSUPPORTED = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


def tool(schema, **fields):
    return {"type": "function", "function": {"name": "made", "parameters": schema, **fields}}


def ids_of(text):
    chars = {char: i for i, char in enumerate(sorted(_alphabet()))}
    return [chars["Ċ" if char == "\n" else char] for char in text]


def _alphabet():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def make(folder, *, scripted=False, template=TEMPLATE):
    tiny.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    weights = None
    if scripted:
        chain = [item if isinstance(item, int) else ids_of(item)[0] for item in CHAIN]
        weights = tiny.scripted_weights("divisible", dict(itertools.pairwise(chain)))
    changes = {"max_position_embeddings": 2048, "eos_token_id": END}
    return tiny.make_llama(weights=weights, tokenizer_folder=folder, options=OPTIONS, **changes)


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """A model that says anything at all, and begins inside its reasoning, as R1."""
    with make(tmp_path_factory.mktemp("wild")) as llama:
        yield Unclosed(llama)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A model that thinks "abcdefgh" and answers "XYZ!"."""
    with make(tmp_path_factory.mktemp("scripted"), scripted=True) as llama:
        yield Unclosed(llama)


class Unclosed:
    """The model without its `close`: the fixture closes it, not the server."""

    def __init__(self, llama):
        self._llama = llama

    def __getattr__(self, name):
        return getattr(self._llama, name)

    def close(self):
        """Does nothing."""


def ask(llama, *requests, **config):
    """Answers of several requests that run together."""

    async def test():
        async with serving(llama, **config) as live:
            answers = await asyncio.gather(*(live.post(fields) for fields in requests))
            assert all(status == 200 for status, _, _ in answers), answers
            return [answer for _, answer, _ in answers]

    return run(test(), 300)


def assemble(events):
    message = {"content": "", "reasoning_content": "", "calls": {}}
    for event in events[:-1]:
        delta = event["choices"][0]["delta"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name, "")
        for call in delta.get("tool_calls", ()):
            name, arguments = message["calls"].get(call["index"], ("", ""))
            function = call["function"]
            message["calls"][call["index"]] = (name + function.get("name", ""), arguments + function["arguments"])
    return message


def flat(answer):
    message = answer["choices"][0]["message"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
    return {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content", ""),
        "calls": dict(enumerate(calls)),
    }


# Reasoning


def test_the_script_in_one_piece(scripted):
    (answer,) = ask(scripted, {"temperature": 0})
    assert flat(answer) == {"content": "XYZ!", "reasoning_content": "abcdefgh", "calls": {}}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 9}


@pytest.mark.parametrize("budget", [0, 1, 3, 7, 8, 20])
def test_a_thinking_budget_forces_the_end_of_the_reasoning(scripted, budget):
    (answer,) = ask(scripted, {"temperature": 0, "thinking_budget": budget})
    assert flat(answer) == {"content": "XYZ!", "reasoning_content": "abcdefgh"[:budget], "calls": {}}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": min(budget, 8) + 1}
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_reply_cut_inside_the_reasoning(scripted):
    (answer,) = ask(scripted, {"temperature": 0, "max_tokens": 4})
    assert flat(answer) == {"content": "", "reasoning_content": "abcd", "calls": {}}
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stop_strings_act_on_the_content_only(scripted):
    (answer,) = ask(scripted, {"temperature": 0, "stop": ["c", "Z"]})
    assert flat(answer) == {"content": "XY", "reasoning_content": "abcdefgh", "calls": {}}


def test_effort_none_closes_the_reasoning_in_the_prompt(scripted):
    ways = [
        {"reasoning_effort": "none"},
        {"reasoning": {"enabled": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ]
    answers = ask(scripted, *({**way, "max_tokens": 1, "return_token_ids": True} for way in ways))
    for way, answer in zip(ways, answers, strict=True):
        assert answer["prompt_token_ids"][-6:] == [THINK, *ids_of("\n\n"), END_THINK, *ids_of("\n\n")], way


def test_the_official_client_asks_for_little_effort(scripted):
    with serving_in_thread(scripted) as url, openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        messages = [{"role": "user", "content": "Hi"}]
        reply = client.chat.completions.create(
            model="default", messages=messages, temperature=0, reasoning_effort="low"
        )
        assert reply.choices[0].message.content == "XYZ!"


# Structured output


def test_random_schemas_validate_at_temperature_2(wild):
    schemas = [random_schema(np.random.default_rng(seed)) for seed in range(24)]
    requests = [
        {
            **WILD,
            "seed": seed,
            "thinking_budget": seed % 4,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        }
        for seed, schema in enumerate(schemas)
    ]
    num_whole = 0
    for schema, answer in zip(schemas, ask(wild, *requests), strict=True):
        (choice,) = answer["choices"]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
            num_whole += 1
        else:
            assert choice["finish_reason"] == "length"
    assert num_whole >= 20


def test_the_grammar_begins_after_the_reasoning(scripted):
    choice = {"structured_outputs": {"choice": ["Yes", "No"]}}
    for answer in ask(
        scripted, {"temperature": 0, **choice}, {"temperature": 0, "n": 2, "thinking_budget": 3, **choice}
    ):
        for one in answer["choices"]:
            assert one["message"]["content"] in ("Yes", "No")
            assert one["message"]["reasoning_content"] in ("abcdefgh", "abc")
            assert one["finish_reason"] == "stop"


def test_every_kind_of_structure_streamed_or_not(wild):
    kinds = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"regex": "[a-c]{3,9}é+!"}},
        {"structured_outputs": {"choice": ["one", "two", "three"]}},
        {"structured_outputs": {"grammar": 'root ::= "a"+ "b"'}},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "wait"}}},
        {"tools": TOOLS, "response_format": {"type": "json_object"}, "max_tokens": 60},
    ]

    async def test():
        async with serving(wild) as live:
            for seed, kind in enumerate(kinds):
                fields = {**WILD, "seed": seed, "thinking_budget": 3, **kind}
                status, answer, _ = await live.post(fields)
                assert status == 200, answer
                assert assemble(await live.events(**fields)) == flat(answer), kind

    run(test(), 300)


def test_a_row_does_not_notice_a_constrained_neighbour(wild):
    free = {"temperature": 1, "seed": 7, "max_tokens": 60, "return_token_ids": True}
    (alone,) = ask(wild, free)
    shaped = {**WILD, "thinking_budget": 2, "structured_outputs": {"json": SCHEMA}}
    together = ask(wild, shaped, free, {**shaped, "seed": 3})
    assert together[1]["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]


def test_logprobs_are_those_before_the_grammar(wild):
    (answer,) = ask(
        wild,
        {
            "temperature": 0,
            "thinking_budget": 0,
            "structured_outputs": {"choice": ["q"]},
            "logprobs": True,
            "top_logprobs": 3,
        },
    )
    entry = answer["choices"][0]["logprobs"]["content"][-1]
    assert entry["token"] == "q"
    assert entry["logprob"] < -1
    assert sum(np.exp(top["logprob"]) for top in entry["top_logprobs"]) < 0.9


def test_what_cannot_be_is_a_400_that_names_it(wild):
    cases = [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [TOOLS[0], tool(UNSUPPORTED)], "tool_choice": "required"}, "tools[1].function.parameters"),
        ({"tools": [TOOLS[0], tool(UNSUPPORTED, strict=True)]}, "tools[1].function.parameters"),
        (
            {"tools": [tool(UNSUPPORTED, strict=True)], "response_format": {"type": "json_object"}},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [tool(SCHEMA)], "response_format": {"type": "json_object", "schema": UNSUPPORTED}},
            "response_format.schema",
        ),
        ({"structured_outputs": {"choice": ["a"]}, "ignore_eos": True}, "ignore_eos"),
    ]

    async def test():
        async with serving(wild) as live:
            for fields, param in cases:
                status, answer, _ = await live.post(fields)
                assert (status, answer["error"]["param"]) == (400, param), answer

    run(test(), 60)


# Tools


def test_required_and_named_calls_always_validate(wild):
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    named = {"type": "function", "function": {"name": "set_flags"}}
    requests = [
        {
            **WILD,
            "seed": seed,
            "thinking_budget": 2,
            "tools": TOOLS,
            "tool_choice": choice,
            "parallel_tool_calls": parallel,
        }
        for seed, (choice, parallel) in enumerate(itertools.product(["required", named], [True, False], repeat=1))
    ]
    for request, answer in zip(requests * 2, ask(wild, *requests * 2), strict=True):
        (choice,) = answer["choices"]
        assert choice["message"]["content"] is None
        calls = choice["message"]["tool_calls"]
        assert len(calls) == 1 or (request["parallel_tool_calls"] and request["tool_choice"] == "required")
        if choice["finish_reason"] == "length":
            calls = calls[:-1]
        else:
            assert choice["finish_reason"] == "tool_calls"
        for call in calls:
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
            assert request["tool_choice"] == "required" or call["function"]["name"] == "set_flags"


class Answer(pydantic.BaseModel):
    kind: Literal["a", "b"]
    number: int | None


def test_the_official_client_parses_what_it_asks_for(wild):
    messages = [{"role": "user", "content": "Hi"}]
    with serving_in_thread(wild) as url, openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        extra = {"thinking_budget": 1}
        parse = client.chat.completions.parse
        reply = parse(
            model="default", messages=messages, response_format=Answer, temperature=2, seed=1, extra_body=extra
        )
        assert isinstance(reply.choices[0].message.parsed, Answer)
        tool = openai.pydantic_function_tool(Answer)
        reply = parse(
            model="default",
            messages=messages,
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=2,
            seed=1,
            extra_body=extra,
        )
        (call,) = reply.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, Answer)
        assert reply.choices[0].finish_reason == "tool_calls"


# Continuation


def test_the_answer_continues_the_last_message_exactly(scripted):
    user = {"role": "user", "content": "Hi"}
    begun = {"role": "assistant", "content": "X"}
    requests = [
        {"messages": [user, begun], "continue_final_message": True},
        {"messages": [user, {**begun, "prefix": True}]},
        {"messages": [user, {**begun, "content": "</think>X", "reasoning_content": "hm", "prefix": True}]},
        {"messages": [user, {**begun, "content": "", "reasoning_content": "\nabc", "prefix": True}]},
    ]
    answers = ask(scripted, *({**fields, "temperature": 0, "return_token_ids": True} for fields in requests))
    assert [flat(answer)["content"] for answer in answers] == ["YZ!", "YZ!", "YZ!", "XYZ!"]
    assert flat(answers[3])["reasoning_content"] == "defgh"
    closed = [*ids_of("\n"), END_THINK, *ids_of("\n\n")]
    assert answers[0]["prompt_token_ids"][-7:] == [THINK, *ids_of("\n"), *closed, *ids_of("X")]
    # What a user spells stays text: the tag in the content is eight bytes.
    assert answers[2]["prompt_token_ids"][-15:] == [*ids_of("hm"), *closed, *ids_of("</think>X")]
    assert answers[3]["prompt_token_ids"][-6:] == [THINK, *ids_of("\n\nabc")]


def test_a_continued_message_and_what_comes_fit_the_grammar_together(wild):
    begun = '{"ok": tr'
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": begun, "prefix": True}]
    (answer,) = ask(wild, {**WILD, "messages": messages, "structured_outputs": {"json": SCHEMA}})
    jsonschema.validate(json.loads(begun + answer["choices"][0]["message"]["content"]), SCHEMA)

    async def test():
        async with serving(wild) as live:
            bad = [messages[0], {"role": "assistant", "content": "nonsense", "prefix": True}]
            status, answer, _ = await live.post({"messages": bad, "structured_outputs": {"json": SCHEMA}})
            assert (status, answer["error"]["param"]) == (400, "messages")

    run(test())


# In notebooks


def test_generate_and_chat_take_the_same(wild):
    free = SamplingParams(temperature=2, max_tokens=300, structured=Structured(json=SCHEMA), seed=4)
    bounded = dataclasses.replace(free, thinking_budget=2)
    chatted = wild.chat([{"role": "user", "content": "Hi"}], bounded)
    for completion in (wild.generate("Say", free), *wild.generate(["Say", "So"], free), chatted):
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), SCHEMA)
    assert len(chatted.reasoning) <= 2
    with pytest.raises(RequestError, match="thinking_budget"):
        wild.generate("Say", bounded)
