"""The reasoning splitter."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllama.text.reasoning import GRANITE, MAGISTRAL, THINK, ReasoningSplitter, ReasoningTags, split_reasoning

LAW = settings(deadline=None, max_examples=300)
PIECES = ["<think>", "</think>", "<th", "ink>", "</", "\n", "\n\n", " ", "a", "bc", "<", "\r\n"]
pieces = st.sampled_from(PIECES)
wrapped = st.sampled_from([*PIECES, "</think>", "<response>", "</response>", "<resp", "onse>"])


def split(cuts: list[str], starts_inside: bool, tags: ReasoningTags = THINK) -> dict[str, str]:
    splitter = ReasoningSplitter(starts_inside, tags)
    parts = list(itertools.chain(*map(splitter.push, cuts), splitter.flush()))
    assert all(text for _, text in parts)
    return {kind: "".join(t for k, t in parts if k == kind) for kind in ("reasoning", "content")}


@pytest.mark.parametrize(
    ("text", "starts_inside", "reasoning", "content"),
    [
        ("I think\n</think>\n\nHello\n", True, "I think", "Hello\n"),
        ("<think>\nI think\n</think>\n\nHello", False, "I think", "Hello"),
        ("<think>\nI think\n</think>\n\nHello", True, "I think", "Hello"),
        ("\n <think>a</think>b", False, "a", "b"),
        ("no end\n", True, "no end\n", ""),
        ("<think>no end", False, "no end", ""),
        ("\n\n</think>\n\nHello", True, "", "Hello"),
        ("<think>\n\n</think>\n\nHello", False, "", "Hello"),
        ("plain\n text", False, "", "plain\n text"),
        ("use <think> and </think> so", False, "", "use <think> and </think> so"),
        ("a</think>the tags <think>x</think> are", True, "a", "the tags <think>x</think> are"),
        ("a </thin", True, "a </thin", ""),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
        (" \n", False, "", " \n"),
    ],
)
def test_examples(text: str, starts_inside: bool, reasoning: str, content: str) -> None:
    assert split([text], starts_inside) == {"reasoning": reasoning, "content": content}


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>so</think>\n<response>Hello\n</response>\n", "so", "Hello"),
        ("<think>so</think><response>\na </response> b</response> ", "so", "a </response> b"),
        ("<think>so</think>\n\nno <response>a</response>", "so", "no <response>a</response>"),
        ("<think>so</think><response>Hello", "so", "Hello"),
        ("<think>so</think><resp", "so", "<resp"),
        ("<think>so</think><response>a\n</resp", "so", "a\n</resp"),
        ("<think>so</think><response></response>", "so", ""),
        ("<response>a</response>", "", "<response>a</response>"),
    ],
)
def test_granite_s_answer_has_tags_too(text: str, reasoning: str, content: str) -> None:
    assert split([text], False, GRANITE) == {"reasoning": reasoning, "content": content}
    assert split_reasoning(text, GRANITE) == (reasoning, content) or "</response>" not in text.strip()[-11:]
    inside = text.removeprefix("<think>")
    if inside != text:
        assert split([inside], True, GRANITE) == {"reasoning": reasoning, "content": content}
    # Whoever has no such tags is asked for an answer in them, perhaps.
    assert "<resp" not in text or "<resp" in split([text], False)["content"]


def test_magistral_has_tags_of_its_own() -> None:
    text = "[THINK]so <think>[/THINK]Hello [THINK]"
    assert split([text], False, MAGISTRAL) == {"reasoning": "so <think>", "content": "Hello [THINK]"}
    assert split_reasoning(text, MAGISTRAL) == ("so <think>", "Hello [THINK]")
    assert split([text], False) == {"reasoning": "", "content": text}


@LAW
@given(
    text=st.lists(wrapped, max_size=10).map("".join),
    starts_inside=st.booleans(),
    tags=st.sampled_from([THINK, GRANITE]),
    data=st.data(),
)
def test_every_cut_gives_the_same(text: str, starts_inside: bool, tags: ReasoningTags, data: st.DataObject) -> None:
    whole = split([text], starts_inside, tags)
    assert split(list(text), starts_inside, tags) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert split([text[:cut], text[cut:]], starts_inside, tags) == whole


@LAW
@given(text=st.text("ab\n<", max_size=10))
def test_nothing_but_newlines_and_tags_is_lost(text: str) -> None:
    parts = split([f"<think>{text}</think>{text}"], False)
    assert parts["reasoning"].strip("\n") == (text.strip("\n") if text.strip() else "")
    assert parts["content"] == text.lstrip("\n")


def test_token_tags_leave_the_text_alone() -> None:
    splitter = ReasoningSplitter(False, tags_in_text=False)
    parts = splitter.push("<think>") + splitter.open_tag() + splitter.push("\na</think>\n") + splitter.close_tag()
    parts += splitter.push("\nb") + splitter.flush()
    assert parts == [("content", "<think>"), ("reasoning", "a</think>"), ("content", "b")]
