"""The reasoning splitter."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllama.text.reasoning import ReasoningSplitter

LAW = settings(deadline=None, max_examples=300)
pieces = st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "\n", "\n\n", " ", "a", "bc", "<", "\r\n"])


def split(cuts: list[str], starts_inside: bool) -> dict[str, str]:
    splitter = ReasoningSplitter(starts_inside)
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


@LAW
@given(text=st.lists(pieces, max_size=10).map("".join), starts_inside=st.booleans(), data=st.data())
def test_every_cut_gives_the_same(text: str, starts_inside: bool, data: st.DataObject) -> None:
    whole = split([text], starts_inside)
    assert split(list(text), starts_inside) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert split([text[:cut], text[cut:]], starts_inside) == whole


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
