"""What becomes of a field: honoured, harmless, refused by name, or unknown and named."""

from __future__ import annotations

import pytest
from jaxllama_serving.protocol.base import MAX_NAMED_CHARS, MAX_NAMED_FIELDS, name_fields, unknown_fields
from jaxllama_serving.protocol.chat import ChatRequest, parse_chat_request
from jaxllama_serving.protocol.completions import CompletionRequest, parse_completion_request
from jaxllama_serving.protocol.errors import ApiError
from jaxllama_serving.protocol.refused import CHAT, COMPLETIONS, MESSAGE
from unit.serving.live import body

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "look_up"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(**fields):
    return parse_chat_request(body(**fields), strict_fields=True)


def text(**fields):
    return parse_completion_request({"model": "default", "prompt": "a", **fields}, strict_fields=True)


def refusal(read, **fields):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.type) == (400, "invalid_request_error")
    return caught.value


HARMLESS = {
    "user": [1],
    "safety_identifier": "u",
    "metadata": {"a": {"b": 1}},
    "store": True,
    "service_tier": "flex",
    "verbosity": "low",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "cache_control": {"type": "ephemeral"},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_fields_take_any_value(name):
    for value in (HARMLESS[name], True, 0, "x", [], {"a": []}):
        for read in (chat, text):
            assert unknown_fields(read(**{name: value})) == ()


def test_cache_control_is_harmless_at_any_depth_but_a_schema_may_speak_of_it():
    mark = {"cache_control": {"type": "ephemeral"}}
    part = {"type": "text", "text": "Hi", **mark}
    parameters = {"type": "object", "properties": {"cache_control": {"type": "string"}}}
    tool = {"type": "function", **mark, "function": {"name": "f", "parameters": parameters, **mark}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", **mark}, **mark}
    messages = [
        {"role": "user", "content": [part], **mark},
        {"role": "assistant", "content": None, "tool_calls": [call], **mark},
        {"role": "tool", "tool_call_id": "1", "content": [part], **mark},
    ]
    request = chat(messages=messages, tools=[tool], stream=True, stream_options=mark, **mark)
    assert request.tools[0].function.parameters == parameters


def test_null_is_not_given_whatever_the_field():
    nothing = dict.fromkeys([*CHAT, *ChatRequest.model_fields, "web_search_options", "anything"])
    assert chat(**{**nothing, **body()}) == chat()
    nothing = dict.fromkeys([*COMPLETIONS, *CompletionRequest.model_fields, "anything"])
    assert text(**{**nothing, "model": "default", "prompt": "a"}) == text()
    message = {**dict.fromkeys([*MESSAGE, "name", "reasoning", "annotations", "anything"]), "role": "user"}
    assert chat(messages=[{**message, "content": "Hi"}]) == chat()


@pytest.mark.parametrize(("read", "table"), [(chat, CHAT), (text, COMPLETIONS)], ids=["chat", "completions"])
def test_what_would_change_the_answer_is_refused_by_name_and_its_neutral_value_accepted(read, table):
    for name, refused in table.items():
        error = refusal(read, **{name: {"some": "thing"}})
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert name in error.message
        for value in refused.harmless:
            assert read(**{name: value}) == read()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"prompt": "a"}, "prompt"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"dry_multiplier": 0.8}, "dry_multiplier"),
        ({"dry_base": 1.75}, "dry_base"),
        ({"xtc_probability": 0.5}, "xtc_probability"),
        ({"mirostat": 2}, "mirostat"),
        ({"mirostat_tau": 5.0}, "mirostat_tau"),
        ({"grammar": "root ::= [a]"}, "grammar"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"stop_sequences": ["a"]}, "stop_sequences"),
        ({"reasoning": {"max_tokens": 5}}, "reasoning.max_tokens"),
        ({"response_format": {"type": "json_object", "value": {}}}, "response_format.value"),
        ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "messages[0].images"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_is_told_by_its_path_whatever_the_flags(fields, param):
    for strict_fields in (False, True):
        error = refusal(lambda f=fields, s=strict_fields: parse_chat_request(body(**f), strict_fields=s))
        assert (error.param, error.code) == (param, "unsupported_parameter")


def test_a_hint_says_what_to_send_instead():
    assert "tools" in refusal(chat, functions=[{"name": "f"}]).message
    assert "max_tokens" in refusal(chat, max_new_tokens=5).message
    assert "structured_outputs" in refusal(chat, grammar="x").message


def test_what_belongs_to_a_feature_that_is_off_has_no_effect():
    off = {"mirostat": 0, "mirostat_tau": 5.0, "dry_multiplier": 0.0, "dry_base": 1.75, "xtc_probability": 0}
    assert chat(**off, xtc_threshold=0.1, dry_sequence_breakers=["\n"]) == chat()
    assert refusal(chat, mirostat=0, dry_base=1.75).param == "dry_base"


def test_an_unknown_field_is_a_400_only_when_fields_are_strict():
    deep = {"messages": [{"role": "user", "content": "a", "nom": 1}]}
    for fields, param in (({"temprature": 1}, "temprature"), (deep, "messages[0].nom"), ({"{}": 1}, "{}")):
        error = refusal(chat, **fields)
        assert (error.param, error.code) == (param, "unknown_parameter")
        assert unknown_fields(parse_chat_request(body(**fields))) == (param,)


def test_no_unknown_field_goes_unnamed_however_deep():
    """Every object of a request that is read field by field, each with a field of its own that nothing knows."""

    def odd(**fields):
        return {**fields, "odd": 1}

    call = odd(id="c", type="function", function=odd(name="add", arguments="{}"))
    named = odd(type="function", function=odd(name="add"))
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    schema = odd(type="json_schema", json_schema=odd(schema={"type": "object", "odd": 1}))
    requests = {
        "": odd(),
        "messages[0].": {"messages": [odd(role="user", content="a")]},
        "messages[0].content[1].": {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, odd(type="text", text="b")]}]
        },
        "messages[1].tool_calls[0].|messages[1].tool_calls[0].function.": {"messages": [*body()["messages"], answer]},
        "tools[1].|tools[1].function.": {"tools": [TOOL, odd(type="function", function=odd(name="look_up"))]},
        "tool_choice.|tool_choice.function.": {"tools": [TOOL], "tool_choice": named},
        "tool_choice.|tool_choice.allowed_tools.|tool_choice.allowed_tools.tools[0].|"
        "tool_choice.allowed_tools.tools[0].function.": {
            "tools": [TOOL],
            "tool_choice": odd(type="allowed_tools", allowed_tools=odd(mode="auto", tools=[named])),
        },
        "stream_options.": {"stream": True, "stream_options": odd()},
        "response_format.|response_format.json_schema.": {"response_format": schema},
        "structured_outputs.": {"structured_outputs": odd(choice=["a"])},
        "reasoning.": {"reasoning": odd(effort="low")},
        "prediction.|prediction.content[0].": {
            "prediction": odd(type="content", content=[odd(type="text", text="a")]),
        },
    }
    for paths, fields in requests.items():
        found = unknown_fields(parse_chat_request(body(**fields)))
        assert list(found) == [f"{path}odd" for path in paths.split("|")]
    # A model that a request holds and that is not above would go untested.
    defined = ChatRequest.model_json_schema()["$defs"].items()
    models = {name for name, schema in defined if "properties" in schema and not name.endswith("Choice")}
    assert models == {
        *("AllowedTools", "ChatMessage", "FunctionCall", "FunctionName", "FunctionSpec", "JsonSchemaFormat"),
        *("NamedTool", "Prediction", "Reasoning", "ResponseFormat", "StreamOptions", "StructuredOutputs", "TextPart"),
        *("ToolCall", "ToolSpec"),
    }


def test_an_empty_reasoning_is_none_whosoever_message_it_is_in():
    message = {"role": "user", "content": "Hi", "reasoning_content": "", "tool_calls": []}
    assert chat(messages=[message]).messages[0].reasoning_text == ""
    assert refusal(chat, messages=[{**message, "reasoning_content": "hm"}]).param == "messages[0]"


def test_fields_are_named_safely_and_not_without_bound():
    named = name_fields([f"a\r\nX: {i}, ü" for i in range(50)])
    assert named.split(", ") == [f"a??X??{i}???" for i in range(MAX_NAMED_FIELDS)]
    assert len(name_fields(["x" * 10_000] * 50)) <= MAX_NAMED_FIELDS * (MAX_NAMED_CHARS + 2)
    assert name_fields(["messages[3].tool_calls[0].a-b_c"]) == "messages[3].tool_calls[0].a-b_c"


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        (
            {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "strict": True, "schema": SCHEMA}},
            SCHEMA,
        ),
        (
            {"type": "json_schema", "name": "n", "strict": True, "description": "d", "json_schema": {"schema": SCHEMA}},
            SCHEMA,
        ),
        ({"type": "json_schema", "name": "n", "strict": False, "schema": SCHEMA}, SCHEMA),
        ({"type": "json_object", "schema": SCHEMA}, SCHEMA),
        ({"type": "json_object", "name": "n", "description": "d", "strict": True}, {"type": "object"}),
        ({"type": "text", "strict": None, "schema": None, "json_schema": None}, None),
    ],
)
def test_a_schema_is_found_where_clients_put_it(response_format, schema):
    form = chat(response_format=response_format).form
    assert (form.value if form is not None else None) == schema


def test_vllms_names_mean_what_structured_outputs_mean():
    for kind, value in (("json", SCHEMA), ("regex", "a+"), ("choice", ["a", "b"]), ("grammar", "start: /a/")):
        form, ours = chat(**{f"guided_{kind}": value}).form, chat(structured_outputs={kind: value}).form
        assert (form.kind, form.value) == (ours.kind, ours.value)
        assert (form.param, ours.param) == (f"guided_{kind}", f"structured_outputs.{kind}")
    assert chat(guided_json='{"type": "object"}').form.value == {"type": "object"}
    assert refusal(chat, guided_json="[]").param == "guided_json"
    assert refusal(chat, guided_choice=[]).param == "guided_choice"
    assert refusal(chat, guided_regex="a", structured_outputs={"regex": "b"}).param == "guided_regex"


def test_allowed_tools_are_some_of_those_the_model_sees():
    def choice(mode, *names):
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    for mode in ("auto", "required"):
        request = chat(tools=[TOOL, OTHER], tool_choice=choice(mode, "add"))
        assert [tool.function.name for tool in request.offered_tools] == ["add"]
        assert (request.forces_tools, request.allows_many_calls) == (mode == "required", True)
    for bad, param in (
        (choice("auto", "nobody"), "tool_choice"),
        (choice("auto"), "tool_choice.allowed_tools.tools"),
        (choice("sometimes", "add"), "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools"}, "tool_choice"),
        ({"type": "weird"}, "tool_choice.type"),
    ):
        assert refusal(chat, tools=[TOOL], tool_choice=bad).param == param


def test_budgets_go_by_either_name_and_must_agree():
    for read in (chat, text):
        for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
            assert read(**fields).max_new_tokens == 5
        assert refusal(read, max_tokens=5, max_completion_tokens=6).param == "max_tokens"


@pytest.mark.parametrize("content", ["a draft", [{"type": "text", "text": "a draft"}]])
def test_a_prediction_is_accepted(content):
    assert chat(prediction={"type": "content", "content": content}).prediction is not None
    for bad in (5, []):
        assert refusal(chat, prediction={"type": "content", "content": bad}).param == "prediction.content"


def test_accepted_with_meaning():
    for effort in ("none", "minimal", "low", "medium", "high", "xhigh"):
        assert chat(reasoning_effort=effort).reasoning_effort == effort
        assert chat(reasoning={"effort": effort}).reasoning.effort == effort
    assert chat(stream=True, n=3, stream_options=None).n == 3
    assert chat(logit_bias={"7": -100, "8": 0.5}).logit_bias == {"7": -100, "8": 0.5}
    assert chat(parallel_tool_calls=False).parallel_tool_calls is False
    assert chat(chat_template_kwargs={"a": "b", "c": 1.5, "d": True, "e": None}).chat_template_kwargs == {
        "a": "b",
        "c": 1.5,
        "d": True,
    }
    message = {"role": "user", "content": "Hi", "name": "Bob"}
    assert chat(messages=[message]).messages[0].name == "Bob"
