"""Chat templates, and the ids of what they render."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllama.errors import ChatTemplateError
from jaxllama.text.chat import ChatTemplate, load_chat_template
from jaxllama.text.encoding.specials import RenderedChat, Spellings, StandIns
from jaxllama.text.encoding.tokenizer import Tokenizer, load_tokenizer
from jaxllama.text.tools import Tool

LAW = settings(deadline=None, max_examples=80)
USER = {"role": "user", "content": "Hello"}


@functools.cache
def loaded(folder: Path) -> tuple[Tokenizer, ChatTemplate]:
    return load_tokenizer(folder, 200_000), load_chat_template(folder)


def ids_of(folder: Path, messages: list[dict[str, Any]]) -> tuple[RenderedChat, list[int]]:
    tokenizer, template = loaded(folder)
    rendered = template.render(messages)
    return rendered, tokenizer.encode_rendered(rendered)


def template_of(source: str, *spellings: str) -> ChatTemplate:
    return ChatTemplate(source, spellings=spellings)


@pytest.mark.parametrize("name", ["r1_like", "chatml", "llama2_like", "r1"])
def test_benign_chats_encode_as_the_library_does(
    name: str, request: pytest.FixtureRequest, corpus: tuple[str, ...]
) -> None:
    folder = request.getfixturevalue(name)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for first, second in zip(corpus, reversed(corpus), strict=True):
        messages = [
            {"role": "user", "content": first},
            {"role": "assistant", "content": second},
            {"role": "user", "content": first + second},
        ]
        rendered, ids = ids_of(folder, messages)
        assert ids == raw.encode(rendered.text, add_special_tokens=False).ids


def test_sentencepiece_chats_encode_as_its_converted_twin(
    llama2: Path, llama2_sp: Path, corpus: tuple[str, ...]
) -> None:
    source = "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' + eos_token }}{% endfor %}"
    template = ChatTemplate(
        source, spellings=["<s>", "</s>", "<unk>"], named_tokens={"bos_token": "<s>", "eos_token": "</s>"}
    )
    by_json, by_sp = load_tokenizer(llama2, 32000), load_tokenizer(llama2_sp, 32000)
    for text in corpus:
        rendered = template.render([{"role": "user", "content": text}])
        assert by_sp.encode_rendered(rendered) == by_json.encode_rendered(rendered)


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@pytest.mark.parametrize("base", ["r1_like", "llama2_like"])
@pytest.mark.parametrize("flags", [(), *((f,) for f in FLAGS), ("lstrip", "rstrip"), ("normalized", "lstrip")])
def test_flags_of_added_tokens_work_as_in_the_library(
    base: str,
    flags: tuple[str, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    folder_writer: Any,
    token_entry: Any,
) -> None:
    spec = json.loads((request.getfixturevalue(base) / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["id"] < len(spec["model"]["vocab"])]
    first = len(spec["model"]["vocab"])
    for i, content in enumerate(("<tok>", "<tok>x", "tok", "Ω")):
        spec["added_tokens"].append(token_entry(first + i, content, **dict.fromkeys(flags, True)))
    spec["post_processor"] = None
    folder = folder_writer(tmp_path, spec, {}, "{% for p in parts %}{{ p }}{% endfor %}{{ messages[0].content }}")
    tokenizer, raw = load_tokenizer(folder, 10_000), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    parts = ["<tok>", "<tok>x", "tok", "Ω", " ", "\n", "a", "b ", "\u3000", "é"]

    @LAW
    @given(text=st.lists(st.sampled_from(parts), max_size=8).map("".join))
    def law(text: str) -> None:
        # The template's own text: nothing of it is a message's.
        spellings = Spellings(tokenizer.special_tokens)
        rendered = RenderedChat(text, text, spellings.all, StandIns(spellings, []), None)
        assert tokenizer.encode_rendered(rendered) == raw.encode(text, add_special_tokens=False).ids

    law()


def test_metaspace_prepends_to_the_first_stretch_only(
    llama2_like: Path, tmp_path: Path, folder_writer: Any, corpus: tuple[str, ...]
) -> None:
    spec = json.loads((llama2_like / "tokenizer.json").read_text(encoding="utf-8"))
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    folder = folder_writer(tmp_path, spec, {}, "{{ messages[0].content }}</s>{{ messages[0].content }}</s>x")
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in corpus:
        rendered, ids = ids_of(folder, [{"role": "user", "content": text}])
        assert ids == raw.encode(rendered.text, add_special_tokens=False).ids


def test_messages_never_become_special_tokens(any_folder: Path) -> None:
    if not (any_folder / "chat_template.jinja").exists():
        pytest.skip("has no chat template")
    tokenizer, template = loaded(any_folder)
    specials = set(tokenizer.special_tokens.values()) - {tokenizer.special_tokens.get("<unk>")}
    spellings = list(tokenizer.special_tokens)[:30]
    parts = [*spellings, *(s[: len(s) // 2] for s in spellings), *(s[len(s) // 2 :] for s in spellings), "\ufdd0", " "]
    content = st.lists(st.one_of(st.sampled_from(parts), st.text(max_size=3)), max_size=6).map("".join)

    def expected_specials(messages: list[dict[str, str]]) -> list[int]:
        benign = template.render([{**message, "content": "x"} for message in messages])
        return [i for i in tokenizer.encode_rendered(benign) if i in specials]

    @LAW
    @given(contents=st.lists(content, min_size=1, max_size=4))
    def law(contents: list[str]) -> None:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
        rendered = template.render(messages)
        ids = tokenizer.encode_rendered(rendered)
        assert [i for i in ids if i in specials] == expected_specials(messages)
        # R1's template cuts the reasoning of earlier turns; everything else arrives as it was written.
        for text in contents[::2]:
            assert text.strip() in rendered.text

    law()


def test_halves_of_a_spelling_do_not_join() -> None:
    template = template_of("{% for m in messages %}{{ m.content }}{% endfor %}>", "<think>", "<t>")
    for halves in (("<thi", "nk>"), ("<think", ""), ("<", "t"), ("<t ", ""), ("a <", "think> b")):
        messages = [{"role": "user", "content": half} for half in halves]
        rendered = template.render(messages)
        assert not Spellings(["<think>", "<t>"]).inner_starts(rendered.protected_text)
        assert rendered.text == "".join(halves) + ">"


def test_r1_renders_as_documented(r1: Path) -> None:
    tokenizer, template = loaded(r1)
    rendered = template.render([{"role": "user", "content": "你好"}])
    assert rendered.text == "<｜begin▁of▁sentence｜><｜User｜>你好<｜Assistant｜><think>\n"
    assert tokenizer.encode_rendered(rendered) == [128000, 128011, 57668, 53901, 128012, 128013, 198]
    assert rendered.starts_in_reasoning is True


def test_the_first_r1_template_leaves_the_tag_to_the_model(r1: Path) -> None:
    source = (r1 / "chat_template_2025-01-20.jinja").read_text(encoding="utf-8")
    template = template_of(source, "<think>", "</think>")
    assert template.render([USER]).starts_in_reasoning is False


@pytest.mark.parametrize("name", ["r1_like", "r1"])
def test_earlier_reasoning_is_cut(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    tokenizer, _ = loaded(folder)
    messages = [USER, {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nan<think>swer"}, USER]
    rendered, ids = ids_of(folder, messages)
    assert "secret" not in rendered.text
    assert "an<think>swer<｜end▁of▁sentence｜>" in rendered.text
    assert ids.count(tokenizer.special_tokens["<think>"]) == 1


def test_models_without_tags_do_not_reason(chatml: Path) -> None:
    _, template = loaded(chatml)
    assert template.render([{"role": "user", "content": "end in <think>"}]).starts_in_reasoning is None


def test_a_system_message_moves_to_the_front(chatml: Path) -> None:
    _, template = loaded(chatml)
    moved = template.render([USER, {"role": "developer", "content": "Be brief."}]).text
    assert moved == template.render([{"role": "system", "content": "Be brief."}, USER]).text


def test_several_system_messages_become_one() -> None:
    template = template_of("{% for m in messages %}[{{ m.role }}|{{ m.name }}|{{ m.content }}]{% endfor %}")
    system = {"role": "system", "content": [{"type": "text", "text": "a"}], "name": "S"}
    developer = {"role": "developer", "content": "b"}
    for messages, name in (
        ([system, USER, developer], ""),
        ([system, USER, {**developer, "name": "S"}], "S"),
        ([system, USER, {**developer, "name": "D"}], ""),
    ):
        assert template.render(messages).text == f"[system|{name}|a\n\nb][user||Hello]"
    assert template.render([USER, system]).text == "[system|S|a][user||Hello]"


def test_text_parts_are_joined(chatml: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert ids_of(chatml, [{"role": "user", "content": parts}])[1] == ids_of(chatml, [USER])[1]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "empty"),
        ([{"role": "robot", "content": ""}], "messages\\[0\\].role"),
        ([USER, {"role": "user"}], "messages\\[1\\].content"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part"),
        ([{"role": "user", "content": None, "tool_calls": [{}]}], "messages\\[0\\].content"),
        (["hello"], "object"),
    ],
)
def test_malformed_messages_are_refused(chatml: Path, messages: Any, match: str) -> None:
    with pytest.raises(ChatTemplateError, match=match):
        loaded(chatml)[1].render(messages)


def test_a_templates_own_refusal_is_told(llama2_like: Path) -> None:
    with pytest.raises(ChatTemplateError, match="only user and assistant roles"):
        loaded(llama2_like)[1].render([{"role": "system", "content": "x"}, USER])


def test_a_chat_rendered_for_another_tokenizer_is_refused(chatml: Path, r1_like: Path) -> None:
    with pytest.raises(ValueError, match="special tokens"):
        loaded(r1_like)[0].encode_rendered(loaded(chatml)[1].render([USER]))


def test_templates_come_from_either_file(tmp_path: Path, chatml: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((chatml / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    with pytest.raises(ChatTemplateError, match="no chat_template"):
        load_chat_template(tmp_path)
    config.write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]})
    )
    assert load_chat_template(tmp_path).source == "d"
    config.write_text(json.dumps({"chat_template": "c"}))
    assert load_chat_template(tmp_path).source == "c"
    (tmp_path / "chat_template.jinja").write_text("j")
    assert load_chat_template(tmp_path).source == "j"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ChatTemplateError, match="compile"):
        load_chat_template(tmp_path)


def test_a_list_of_templates_has_one_for_tools_and_rag_is_never_used(tmp_path: Path, chatml: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((chatml / "tokenizer.json").read_bytes())
    named = {"default": "plain", "rag": "rag", "tool_use": "{{ tools[0].function.name }} {{ level }}"}
    for config in ([{"name": name, "template": text} for name, text in named.items()], named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
        template = load_chat_template(tmp_path)
        assert template.render([USER]).text == "plain"
        tool = Tool("add", "Adds.")
        assert template.render([USER], tools=[tool], variables={"level": 3}).text == "add 3"
        assert "level" in template.variant(with_tools=True).variables
        assert template.variant(with_tools=False) is template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "rag", "template": "r"}]}))
    with pytest.raises(ChatTemplateError, match="no chat_template"):
        load_chat_template(tmp_path)


SPEAKING = "{% for m in messages %}[{{ m.role }}|{{ m.NAME }}|{{ m.content }}]{% endfor %}"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking", "content"])
def test_a_template_gets_earlier_reasoning_under_the_name_it_asks_for(name: str, given: str) -> None:
    said = {"role": "assistant", "content": "b", given: "a"}
    if given == "content":
        said = {"role": "assistant", "content": " <think>\na\n</think>\n\nb"}
    messages = [USER, said, USER]
    assert (
        template_of(SPEAKING.replace("NAME", name)).render(messages).text == "[user||Hello][assistant|a|b][user||Hello]"
    )
    assert template_of("{% for m in messages %}{{ m }}{% endfor %}").render(messages).text.count("'a'") == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<think>a</think>b", "b"),
        ("<think></think>b", "b"),
        ("\n<think>\na\n</think>\n\nb</think>c", "b</think>c"),
        ("b<think>a</think>", "b<think>a</think>"),
        ("<think>a", "<think>a"),
        ("a</think>b", "a</think>b"),
        ("<think>a</think>", ""),
    ],
)
def test_only_reasoning_at_the_start_is_split_off_and_only_of_assistants(content: str, text: str) -> None:
    template = template_of("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    assert template.render(messages).text == f"user:{content};assistant:{text};"


def test_reasoning_in_the_content_of_a_message_to_continue_is_its_reasoning(chatml: Path, r1_like: Path) -> None:
    said = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt is"}
    rendered = loaded(r1_like)[1].render([USER, said], continue_last=True)
    assert rendered.text.endswith("<think>\nHm.\n</think>\n\nIt is")
    ids = loaded(r1_like)[0].encode_rendered(rendered)
    assert ids.count(loaded(r1_like)[0].special_tokens["</think>"]) == 1
    # A model that does not reason goes on with what it was given.
    assert loaded(chatml)[1].render([USER, said], continue_last=True).text.endswith(said["content"])


def test_what_is_malformed_is_told_by_its_path() -> None:
    system = {"role": "system", "content": "x"}
    for messages, param in (
        ([USER, {"role": "user", "content": 3}], "messages[1].content"),
        ([system, USER, {"role": "system"}], "messages[2].content"),
        ([{"role": "robot"}], "messages[0].role"),
        ([], "messages"),
    ):
        with pytest.raises(ChatTemplateError) as caught:
            template_of("x").render(messages)
        assert caught.value.param == param


def test_private_characters_in_messages_survive() -> None:
    text = "".join(map(chr, range(0xFDD0, 0xFDF0))) + "<think>" + "\U000f0000"
    rendered = template_of("{{ messages[0].content }}", "<think>").render([{"role": "user", "content": text}])
    assert rendered.text == text
    assert "<think>" not in rendered.protected_text
    assert rendered.restore(rendered.protected_text) == text


TOOL_CALL = {"id": "<think>", "function": {"name": "<think>", "arguments": {"<think>": ["</think>"]}}}


def test_every_text_of_a_message_is_protected() -> None:
    template = template_of("{{ messages | tojson }}", "<think>", "</think>")
    rendered = template.render([{"role": "assistant", "content": None, "tool_calls": [TOOL_CALL], "name": "<think>"}])
    assert "<think>" in rendered.text
    assert not {"<think>", "</think>"} & {s for s in ("<think>", "</think>") if s in rendered.protected_text}


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ("'<think>' in c", "True"),
        ("c.split('</think>')|length", "2"),
        ("c.rsplit('</think>', 1)[1]", "b"),
        ("c.startswith('<think>')", "True"),
        ("c.endswith(('</think>b', 'x'))", "True"),
        ("c.find('</think>')", "8"),
        ("c.replace('<think>', '')", "a</think>b"),
        ("c|replace('</think>', '|')", "<think>a|b"),
        ("c.partition('</think>')[2]", "b"),
        ("c.removeprefix('<think>')", "a</think>b"),
        ("c == '<think>a</think>b'", "True"),
        ("c != '<think>a</think>b'", "False"),
        ("c.strip().count('think>')", "2"),
        ("c|trim|length", "17"),
        ("c[7:8]", "a"),
        ("'{}'.format(c)", "<think>a</think>b"),
        ("c.format()", "<think>a</think>b"),
        ("c ~ 1", "<think>a</think>b1"),
        ("c|upper", "<THINK>A</THINK>B"),
    ],
)
def test_templates_see_protected_text_as_it_is(expression: str, want: str) -> None:
    template = template_of("{% set c = messages[0].content %}{{ " + expression + " }}", "<think>", "</think>")
    rendered = template.render([{"role": "user", "content": "<think>a</think>b"}])
    assert rendered.text.strip() == (want if expression != "c|trim|length" else str(len("<think>a</think>b")))
