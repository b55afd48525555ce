"""Fields over HTTP: what is ignored is named and counted, what is ours comes back, what a template wants it gets."""

from __future__ import annotations

import json

import pytest
from unit.serving.fakes import END_THINK, FakeLlama
from unit.serving.live import CHAT, body, run, serving
from unit.serving.requests.chat_test import answer_of, joined, stream_of
from unit.serving.requests.tools_test import TOOLS

from jaxllama.text.tools import HERMES

IGNORED = "X-Jaxllama-Ignored"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/openai/completions"])
def test_unknown_fields_are_named_in_the_header_and_never_their_values(path, stream):
    async def test():
        async with serving(FakeLlama()) as live:
            fields = {"model": "default", "stream": stream, "foo": "secret", "b\x01d, e": {"x": 1}, "none": None}
            fields |= {"prompt": "a"} if "chat" not in path else {"messages": [{**body()["messages"][0], "Zü": 1}]}
            async with live.session.post(live.url + path, json=fields) as response:
                assert response.status == 200
                expected = "foo, ?b?x01d??e?" + (", messages[0].Z?" if "chat" in path else "")
                assert response.headers[IGNORED] == expected
                assert "secret" not in str(response.headers)
            async with live.session.post(live.url + path, json={**fields, "temperature": "x"}) as response:
                assert response.status == 400
            for _ in range(2):
                async with live.session.post(live.url + CHAT, json=body()) as response:
                    assert IGNORED not in response.headers

    run(test())


def test_ignored_fields_are_counted_by_route_alone():
    async def test():
        async with serving(FakeLlama()) as live:
            for i in range(3):
                await live.post({f"foo{i}": 1, "bar": 2})
            async with live.session.get(live.url + "/metrics") as response:
                text = await response.text()
            lines = [line for line in text.splitlines() if line.startswith("jaxllama_ignored_fields_total")]
            assert lines == [f'jaxllama_ignored_fields_total{{route="{CHAT}"}} 6.0']
            assert "foo" not in text

    run(test())


def test_strict_fields_refuse_what_is_unknown_and_what_the_template_does_not_ask_for():
    for fields, param in (({"foo": 1}, "foo"), ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x")):
        error = answer_of(FakeLlama(), status=400, config={"strict_fields": True}, **fields)["error"]
        assert (error["param"], error["code"]) == (param, "unknown_parameter")


def test_a_tier_is_answered_as_default_only_to_who_asks():
    for tier in ("auto", "flex", 5):
        assert answer_of(FakeLlama(), service_tier=tier)["service_tier"] == "default"
        assert all(chunk["service_tier"] == "default" for chunk in stream_of(FakeLlama(), service_tier=tier)[:-1])
    assert "service_tier" not in answer_of(FakeLlama())


def test_a_template_gets_the_variables_it_asks_for_and_no_others():
    llama = FakeLlama()
    llama.chat_template.variables = frozenset({"date_string", "level", "deep", "tools"})

    async def test():
        async with serving(llama) as live:
            kwargs = {"date_string": "26 Jul", "level": 3, "deep": True, "other": "x", "enable_thinking": True}
            status, _, headers = await live.post({"chat_template_kwargs": kwargs})
            assert status == 200
            assert llama.chat_template.options["variables"] == {"date_string": "26 Jul", "level": 3, "deep": True}
            assert headers[IGNORED] == "chat_template_kwargs.other, chat_template_kwargs.enable_thinking"
            for name in ("messages", "tools", "bos_token"):
                status, answer, _ = await live.post({"chat_template_kwargs": {name: "x"}})
                assert (status, answer["error"]["param"]) == (400, f"chat_template_kwargs.{name}")

    run(test())


def test_an_effort_goes_to_a_template_that_asks_for_it():
    for fields in ({"reasoning_effort": "xhigh"}, {"reasoning": {"effort": "minimal"}}):
        llama = FakeLlama(["a", END_THINK, "b"], starts_in_reasoning=True)
        llama.chat_template.variables = frozenset({"reasoning_effort"})
        answer_of(llama, **fields)
        given = fields.get("reasoning_effort") or fields["reasoning"]["effort"]
        assert llama.chat_template.options["variables"] == {"reasoning_effort": given}


def test_names_reach_the_template():
    llama = FakeLlama()
    messages = [{"role": "system", "content": "s", "name": "S"}, {"role": "user", "content": "u", "name": "U"}]
    answer_of(llama, messages=messages)
    assert [message["name"] for message in llama.chat_template.seen[-1]] == ["S", "U"]


def test_many_choices_stream_beside_stream_options_null():
    events = stream_of(FakeLlama(["a"]), n=3, stream_options=None)
    assert [joined(events, i)[0]["content"] for i in range(3)] == ["a", "a", "a"]


CALLS = HERMES.write_calls([("add", '{"q": 1}'), ("look_up", "{}")])
ANSWERS = {
    "text": (["Hello"], None, {}),
    "nothing": ([], None, {}),
    "reasoning": (["Hm", END_THINK, "\n\nYes"], True, {}),
    "reasoning cut": (["Hm", ", so"], True, {"max_tokens": 1}),
    "calls": (list(CALLS), None, {"tools": TOOLS}),
    "text and calls": (list("Well.\n" + CALLS), None, {"tools": TOOLS}),
    "reasoning and calls": (["Hm", END_THINK, *("\n\n" + CALLS)], True, {"tools": TOOLS}),
}
OTHERS = {"annotations": [], "audio": None, "function_call": None, "name": None, "refusal": None}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "both"])
def test_whatever_an_answer_holds_is_accepted_back_as_history(name, field):
    pieces, starts, fields = ANSWERS[name]
    extras = [{}, {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2, "service_tier": "auto"}]
    config = {"reasoning_field": field, "strict_fields": True}

    def make():
        return FakeLlama(pieces, starts_in_reasoning=starts, batch=4)

    messages = []
    for more in extras:
        answer = answer_of(make(), config=config, **fields, **more)
        messages += [choice["message"] for choice in answer["choices"]]
        chunks = stream_of(make(), config, **fields, **more)
        messages.append(streamed(chunks))
    for message in messages:
        for said in (message, {**OTHERS, **message}, {key: value for key, value in message.items() if value}):
            if set(said) == {"role"}:
                continue  # nothing was said
            history = [*body()["messages"], said]
            results = [{"role": "tool", "tool_call_id": c["id"], "content": "1"} for c in said.get("tool_calls") or ()]
            llama = make()
            answer_of(llama, config=config, **fields, messages=[*history, *results, *body()["messages"]])
            (seen,) = [message for message in llama.chat_template.seen[0] if message["role"] == "assistant"]
            assert (message.get("content") or "") in (seen["content"] or "")


def streamed(events):
    """The message that a stream's deltas make, the calls with their `index` as clients keep it."""
    message = {"role": "assistant", "content": ""}
    for event in events[:-1]:
        for choice in event["choices"]:
            if choice["index"] != 0:
                continue
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    calls = message.setdefault("tool_calls", [])
                    for call in value:
                        if call["index"] == len(calls):
                            calls.append(json.loads(json.dumps(call)))
                        else:
                            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
                elif name != "role":
                    message[name] = message.get(name, "") + value
    return message
