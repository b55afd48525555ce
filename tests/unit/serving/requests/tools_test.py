"""Tools over HTTP with a scripted model: every cut of a stream gives the message that comes in one piece."""

from __future__ import annotations

import json

import openai
import pytest
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import run, serving, serving_in_thread

from jaxllama.text.tools import HERMES, LLAMA3, R1, TOOL_FORMATS

TEMPLATES = {
    **{"hermes": "<|im_start|>", "llama3": "<|start_header_id|>", "r1": "<｜Assistant｜>"},
    **{"mistral": "[TOOL_CALLS]", "mistral-args": "[TOOL_CALLS] [ARGS]", "granite": "<|start_of_role|>"},
    "phi": "<|/tool|>",
}
FORMATS = TOOL_FORMATS
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"q": {}}}}}
    for name in ("look_up", "add")
]
CALLS = [("look_up", '{"q": "é {1}"}'), ("add", '{"q": [1, 2]}')]


def llama_of(name, text, *, reasoning=None, batch=1):
    pieces = list(text) if reasoning is None else [*reasoning, "\n", END_THINK, "\n\n", *text]
    llama = FakeLlama(pieces, starts_in_reasoning=None if reasoning is None else True, batch=batch)
    llama.chat_template.source = TEMPLATES[name]
    return llama


def assemble(events):
    """The message that a stream's deltas make, as OpenAI's own clients put it together."""
    message, finish = {"content": "", "reasoning_content": "", "tool_calls": []}, None
    for event in events[:-1]:
        (choice,) = event["choices"]
        delta = choice["delta"]
        assert not ("reasoning_content" in delta and delta.get("content")), "both kinds in one chunk"
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({"id": call["id"], "type": call["type"], "function": call["function"]})
            else:
                assert "id" not in call
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        finish = choice["finish_reason"] or finish
    assert events[-1] == "[DONE]"
    return message, finish


def whole(choice):
    message = choice["message"]
    calls = message.get("tool_calls", [])
    return (
        {
            "content": message["content"] or "",
            "reasoning_content": message.get("reasoning_content", ""),
            "tool_calls": calls,
        },
        choice["finish_reason"],
    )


def without_ids(told):
    message, finish = told
    return {**message, "tool_calls": [call["function"] for call in message["tool_calls"]]}, finish


def both_ways(llama, **fields):
    async def test():
        async with serving(llama) as live:
            status, answer, _ = await live.post(fields)
            assert status == 200, answer
            return whole(answer["choices"][0]), assemble(await live.events(**fields))

    return run(test())


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize("reasoning", [None, "Hm, <tool_call>?"])
@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_found_however_the_stream_is_cut(name, reasoning, batch):
    text = FORMATS[name].write_calls(CALLS)
    in_one, streamed = both_ways(llama_of(name, text, reasoning=reasoning, batch=batch), tools=TOOLS)
    assert without_ids(in_one) == without_ids(streamed)
    message, finish = in_one
    assert finish == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("", reasoning or "")
    found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
    assert found == [(tool, json.loads(arguments)) for tool, arguments in CALLS]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


@pytest.mark.parametrize("text", ['<tool_call>{"name": "nobody"}</tool_call>', "<tool_call>", "Just text", "<tool_"])
def test_what_is_no_call_is_content(text):
    for told in both_ways(llama_of("hermes", text), tools=TOOLS):
        assert told == ({"content": text, "reasoning_content": "", "tool_calls": []}, "stop")


def test_without_tools_or_with_none_nothing_is_read_as_a_call():
    text = HERMES.write_calls(CALLS)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        for told in both_ways(llama_of("hermes", text), **fields):
            assert told[0]["content"] == text


def test_a_stop_string_acts_on_the_text_and_not_on_calls():
    text = "Well, é.\n" + HERMES.write_calls(CALLS[:1])
    for message, finish in both_ways(llama_of("hermes", text), tools=TOOLS, stop=["{1}", "look_up"]):
        assert (message["content"], len(message["tool_calls"]), finish) == ("Well, é.", 1, "tool_calls")
    for message, finish in both_ways(llama_of("hermes", text), tools=TOOLS, stop=["é"]):
        assert (message["content"], message["tool_calls"], finish) == ("Well, ", [], "stop")


def test_the_model_sees_tools_calls_and_results():
    llama = llama_of("r1", "Fine")
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"q": 1}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    both_ways(llama, tools=TOOLS, messages=messages)
    seen = llama.chat_template.seen[-1]
    assert [message["role"] for message in seen] == ["system", "user", "assistant", "user"]
    assert "look_up" in seen[0]["content"]
    assert seen[2]["content"] == R1.write_calls([("add", '{"q": 1}')])
    assert seen[3]["content"] == R1.write_results(["2"])


def test_a_template_that_knows_tools_gets_them_with_parsed_arguments():
    llama = llama_of("hermes", "Fine")
    llama.chat_template.variables = frozenset({"tools"})
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"q": 1}'}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "c1", "content": "2"})
    both_ways(llama, tools=TOOLS, messages=messages)
    seen = llama.chat_template.seen[-1]
    assert seen[1]["tool_calls"][0]["function"]["arguments"] == {"q": 1}
    assert [tool["function"]["name"] for tool in llama.chat_template.options["tools"]] == [
        "look_up",
        "add",
    ]


def test_a_format_can_be_forced():
    async def test():
        llama = llama_of("hermes", LLAMA3.write_calls(CALLS))
        async with serving(llama, tool_parser="llama3") as live:
            _, answer, _ = await live.post({"tools": TOOLS})
            assert len(answer["choices"][0]["message"]["tool_calls"]) == 2

    run(test())


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "both"])
def test_reasoning_is_shown_where_the_server_is_told_or_not_at_all(field):
    async def test():
        async with serving(llama_of("hermes", "Yes", reasoning="Hm"), reasoning_field=field) as live:
            _, answer, _ = await live.post()
            message = answer["choices"][0]["message"]
            names = {"reasoning_content", "reasoning"} if field == "both" else {field}
            assert {name: message.get(name) for name in names} == dict.fromkeys(names, "Hm")
            assert set(message) == {"role", "content", "refusal", *names}
            _, answer, _ = await live.post({"include_reasoning": False})
            assert set(answer["choices"][0]["message"]) == {"role", "content", "refusal"}
            assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
            for event in (await live.events(include_reasoning=False))[:-1]:
                assert not {"reasoning_content", "reasoning"} & set(event["choices"][0]["delta"])

    run(test())


def test_a_model_that_does_not_reason_says_so():
    async def test():
        async with serving(FakeLlama()) as live:
            for fields, param in (
                ({"thinking_budget": 5}, "thinking_budget"),
                ({"reasoning": {"enabled": True}}, "reasoning.enabled"),
            ):
                status, answer, _ = await live.post(fields)
                assert (status, answer["error"]["param"]) == (400, param)
            for fields in (
                {"reasoning_effort": "none"},
                {"reasoning_effort": "high"},
                {"chat_template_kwargs": {"enable_thinking": False}},
            ):
                assert (await live.post(fields))[0] == 200

    run(test())


def test_the_official_client_streams_and_reads_calls():
    llama = llama_of("hermes", "Wait.\n" + HERMES.write_calls(CALLS), batch=4)
    messages = [{"role": "user", "content": "Hi"}]
    with serving_in_thread(llama) as url, openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        message = client.chat.completions.create(model="default", messages=messages, tools=TOOLS).choices[0].message
        assert message.content == "Wait."
        assert [call.function.name for call in message.tool_calls] == ["look_up", "add"]
        with client.chat.completions.stream(model="default", messages=messages, tools=TOOLS) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert [call.function.arguments for call in final.message.tool_calls] == [
            call.function.arguments for call in message.tool_calls
        ]
        again = [*messages, message.model_dump(exclude_none=True)]
        again += [{"role": "tool", "tool_call_id": call.id, "content": "1"} for call in message.tool_calls]
        assert client.chat.completions.create(model="default", messages=again, tools=TOOLS).choices
