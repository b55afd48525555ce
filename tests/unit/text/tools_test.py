"""Tool formats, and the parsers of calls: no cut of the text changes what they find."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllama.errors import RequestError
from jaxllama.text.tool_parsing import LiveParser, LooseParser, ToolDelta
from jaxllama.text.tools import (
    GRANITE,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    PHI,
    R1,
    TOOL_FORMATS,
    Tool,
    choose_format,
    write_out,
)

LAW = settings(deadline=None, max_examples=300)
NAMES = ["look_up", "add"]
CALLS = [("look_up", '{"q": "a } \\" { b", "n": [1, {"x": null}]}'), ("add", '{"a": 1, "b": -2.5}')]
PIECES = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<tool_",
        '{"name": "add", "arguments": {"a": 1}}',
        '{"name": "add"}',
        "{",
        "}",
        '"',
    ),
    *('{"name": "nobody", "arguments": {}}', '{"name": "add", "parameters": {"a": 1}}', ";", " ", "\n", "text", "\\"),
    *(
        R1.before,
        R1.after,
        "<｜tool▁call▁begin｜>",
        "function<｜tool▁sep｜>add\n",
        "```json\n",
        "```",
        "<｜tool▁call▁end｜>",
    ),
    *("[TOOL_CALLS]", "[", "]", ", ", "add", "[ARGS]", "[CALL_ID]", '{"a": 1}'),
    *("<|tool_call|>", "<|/tool_call|>", "functools"),
]


def parse(parser, cuts):
    """Content and calls, whole."""
    parts = list(itertools.chain(*map(parser.push, cuts), parser.flush()))
    content = "".join(part for part in parts if isinstance(part, str))
    calls = {}
    for part in parts:
        if isinstance(part, ToolDelta):
            assert (part.name is not None) == (part.index not in calls), (
                "a call's first delta, and no other, has its name"
            )
            name, arguments = calls.get(part.index, (part.name, ""))
            calls[part.index] = (name, arguments + part.arguments)
    assert list(calls) == list(range(len(calls)))
    return content, list(calls.values())


def chars(text):
    return list(text)


@pytest.mark.parametrize("tool_format", TOOL_FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("count", [1, 2])
def test_a_parser_reads_what_the_format_writes(tool_format, count):
    text = tool_format.write_calls(CALLS[:count])
    parsers = [
        LooseParser(tool_format, NAMES),
        LiveParser(tool_format, NAMES, must_call=True),
        LiveParser(tool_format, NAMES, must_call=False),
    ]
    for parser in parsers:
        content, calls = parse(parser, chars(text))
        assert content == ""
        assert [(name, json.loads(arguments)) for name, arguments in calls] == [
            (name, json.loads(arguments)) for name, arguments in CALLS[:count]
        ]


@pytest.mark.parametrize("tool_format", [f for f in TOOL_FORMATS.values() if f.opening], ids=lambda f: f.name)
def test_text_beside_calls_is_content(tool_format):
    text = "Let me see.\n" + tool_format.write_calls(CALLS) + "\nDone"
    content, calls = parse(LooseParser(tool_format, NAMES), chars(text))
    assert (content, len(calls)) == ("Let me see.Done", 2)
    content, calls = parse(LiveParser(tool_format, NAMES, must_call=False), chars(text.removesuffix("\nDone")))
    assert (content, len(calls)) == ("Let me see.", 2)


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": }}</tool_call>'),
        (HERMES, '<tool_call>{"name": "nobody", "arguments": {}}</tool_call> there'),
        (HERMES, '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
        (HERMES, "<tool_call>not json</tool_call>"),
        (HERMES, '<tool_call>{"name": "add", "argum'),
        (HERMES, "a <tool_call"),
        (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
        (LLAMA3, '{"name": "nobody", "parameters": {}}'),
        (LLAMA3, 'Say {"name": "add", "parameters": {}}'),
        (LLAMA3, '{"name": "add", "parameters": {"a": 1}'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {}}, {"name": "nobody", "arguments": {}}]'),
        (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}'),
        (MISTRAL, "[TOOL_CALLS] []"),
        (MISTRAL_ARGS, "[TOOL_CALLS]nobody[ARGS]{}"),
        (MISTRAL_ARGS, '[TOOL_CALLS]add{"a": 1}'),
        (MISTRAL_ARGS, "[TOOL_CALLS]add[CALL_ID]123456789"),
        (GRANITE, '<|tool_call|>["add"]'),
        (GRANITE, '<|tool_call|>{"name": "add", "arguments": {}}'),
        (PHI, 'functools of "add"'),
        (R1, R1.write_calls([("nobody", "{}")])),
        (R1, R1.write_calls([("add", "{oops}")])),
        (R1, R1.before + "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"),
    ],
)
def test_a_malformed_call_is_content_and_nothing_is_lost(tool_format, text):
    assert parse(LooseParser(tool_format, NAMES), chars(text)) == (text, [])
    assert parse(LooseParser(tool_format, NAMES), [text]) == (text, [])


def test_a_good_call_after_a_malformed_one_counts():
    bad, good = '<tool_call>{"name": "x"}</tool_call>\n', HERMES.write_calls(CALLS[1:])
    assert parse(LooseParser(HERMES, NAMES), chars(bad + good)) == (bad.rstrip(), [CALLS[1]])


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        # As mistral-common 1.x writes v3 (with SentencePiece's space and ids), v11 and v13.
        (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "VvvODy9mT"}, {"name": "add"}]'),
        (MISTRAL_ARGS, '[TOOL_CALLS]add[CALL_ID]VvvODy9mT[ARGS]{"a": 1}[TOOL_CALLS]add[CALL_ID]VvvODy9mU[ARGS]{}'),
        (MISTRAL_ARGS, '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS] {}'),
        (MISTRAL_ARGS, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add"}]'),
        # Granite 3.0, and 3.1, which spells the token as text.
        (GRANITE, '<|tool_call|>[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {}}]'),
        (GRANITE, '<tool_call>[\n{"name": "add", "arguments": {"a": 1}},\n{"name": "add", "arguments": {}}]'),
        # Phi-4-mini as documented, and as prompted by others.
        (PHI, '<|tool_call|>[{"name":"add","parameters":{"a":1}},{"name":"add","arguments":{}}]<|/tool_call|>'),
        (PHI, 'functools[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {}}]'),
        (PHI, '<|tool_call|>{"name": "add", "arguments": {"a": 1}}<|/tool_call|><|tool_call|>{"name": "add"}'),
    ],
)
def test_what_models_of_the_families_write_is_read(tool_format, text):
    assert parse(LooseParser(tool_format, NAMES), chars(text)) == ("", [("add", '{"a": 1}'), ("add", "{}")])
    assert parse(LooseParser(tool_format, NAMES), [text]) == ("", [("add", '{"a": 1}'), ("add", "{}")])


def test_r1_may_leave_out_what_closes_a_call():
    text = R1.before + R1.head_of("add") + '{"a": 1}'
    for ending in ("", "\n```", "\n```<｜tool▁call▁end｜>", "\n```<｜tool▁call▁end｜>" + R1.after):
        assert parse(LooseParser(R1, NAMES), chars(text + ending)) == ("", [("add", '{"a": 1}')])


@LAW
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12), data=st.data())
def test_no_cut_changes_anything(pieces, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    cut = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    for tool_format in TOOL_FORMATS.values():
        want = parse(LooseParser(tool_format, NAMES), [text])
        assert parse(LooseParser(tool_format, NAMES), cut) == want
        assert parse(LooseParser(tool_format, NAMES), chars(text)) == want
        if not want[1]:
            assert want[0] == text


@LAW
@given(
    arguments=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=8)), min_size=1, max_size=3),
    lead=st.sampled_from(["", "Well: ", "a < b\n"]),
    data=st.data(),
)
def test_live_arguments_arrive_as_they_are_written(arguments, lead, data):
    for tool_format in TOOL_FORMATS.values():
        before = lead if tool_format.opening else ""
        text = before + tool_format.write_calls([("add", json.dumps(a, ensure_ascii=False)) for a in arguments])
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
        cut = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        content, calls = parse(LiveParser(tool_format, NAMES, must_call=not before), cut)
        assert content == before.rstrip()
        assert [(name, json.loads(raw)) for name, raw in calls] == [("add", a) for a in arguments]


def test_live_arguments_come_before_the_call_is_whole():
    parser = LiveParser(HERMES, NAMES, must_call=True)
    parts = parser.push(HERMES.head_of("add") + '{"a": ')
    assert parts == [ToolDelta(0, "add"), ToolDelta(0, None, '{"a": ')]
    assert parser.flush() == []


def test_formats_are_chosen_by_the_template():
    assert choose_format("{{ '<｜Assistant｜>' }}") is R1
    assert choose_format("<|start_header_id|>") is LLAMA3
    assert choose_format("<|im_start|>") is HERMES
    assert choose_format("<|start_header_id|> <tool_call>") is HERMES
    assert choose_format("{{ '[TOOL_CALLS][' }}") is MISTRAL
    assert choose_format("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is MISTRAL_ARGS
    assert choose_format("<|start_of_role|>available_tools<|end_of_role|>") is GRANITE
    assert choose_format("<|start_of_role|>system<|end_of_role|> <tool_call>") is HERMES, "Granite 4"
    assert choose_format("'<|tool|>' + message['tools'] + '<|/tool|>'") is PHI
    assert choose_format("[INST]") is HERMES


def test_tools_calls_and_results_become_ordinary_messages():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "tool", "content": "3", "tool_call_id": "2"},
        {"role": "user", "content": "And?"},
    ]
    written = write_out(messages, [Tool("add", "Adds.")], R1)
    assert [message["role"] for message in written] == ["system", "user", "assistant", "user"]
    assert written[0]["content"].startswith("Be brief.\n\n")
    assert '"name": "add"' in written[0]["content"]
    assert written[2]["content"] == R1.write_calls([("add", '{"a": 1}')])
    assert written[3]["content"] == R1.write_results(["2", "3"]) + "\nAnd?"


@pytest.mark.parametrize("arguments", [{"name": "a b"}, {"name": "a", "parameters": {"type": "array"}}])
def test_a_bad_tool_is_refused(arguments):
    with pytest.raises(RequestError):
        Tool(**arguments)
