"""From tokens to content and reasoning."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllama.text.encoding.tokenizer import Tokenizer, load_tokenizer
from jaxllama.text.output import OutputAssembler, TextDelta

LAW = settings(deadline=None, max_examples=150)


@functools.cache
def tokenizer_of(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, 200_000)


def total(deltas: list[TextDelta]) -> TextDelta:
    matched = [delta.matched_stop for delta in deltas if delta.matched_stop is not None]
    assert len(matched) <= 1
    return TextDelta(
        "".join(delta.content for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        matched[0] if matched else None,
        sum(delta.num_reasoning_tokens for delta in deltas),
    )


def assemble(tokenizer: Tokenizer, cuts: list[list[int]], **options: Any) -> TextDelta:
    assembler = OutputAssembler(tokenizer, **options)
    return total([*map(assembler.push, cuts), assembler.flush()])


def reply(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """The ids of a reply: parts that spell a special token become it."""
    ids: list[int] = []
    for part in parts:
        special = tokenizer.special_tokens.get(part)
        ids += tokenizer.encode(part, add_bos=False) if special is None else [special]
    return ids


def test_every_cut_gives_the_same(small_folder: Path) -> None:
    tokenizer = tokenizer_of(small_folder)
    words = [
        "<think>",
        "</think>",
        "\n",
        "\n\n",
        "hello",
        " ab",
        "abc",
        "你",
        "👩‍👩‍👧",
        "<",
        "/think>",
        *list(tokenizer.special_tokens)[:4],
    ]

    @LAW
    @given(
        ids=st.lists(st.sampled_from(words), max_size=10).map(lambda parts: reply(tokenizer, *parts)),
        stop=st.lists(st.sampled_from(["ab", "lo\n", "你", "b", "o a", "</think>"]), max_size=3),
        starts_in_reasoning=st.sampled_from([None, True, False]),
        include_stop=st.booleans(),
        stop_in_reasoning=st.booleans(),
        data=st.data(),
    )
    def law(ids: list[int], data: st.DataObject, **options: Any) -> None:
        whole = assemble(tokenizer, [ids], **options)
        assert assemble(tokenizer, [[token_id] for token_id in ids], **options) == whole
        cut = data.draw(st.integers(0, len(ids)))
        assert assemble(tokenizer, [ids[:cut], ids[cut:]], **options) == whole

    law()


def test_without_options_the_content_is_the_decoded_text(small_folder: Path) -> None:
    tokenizer = tokenizer_of(small_folder)

    @LAW
    @given(ids=st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    def law(ids: list[int]) -> None:
        assert assemble(tokenizer, [ids]) == TextDelta(tokenizer.decode(ids))

    law()


@pytest.mark.parametrize("name", ["r1_like", "chatml", "sp_like"])
def test_reasoning_and_content_are_kept_apart(name: str, request: pytest.FixtureRequest) -> None:
    # The tags are tokens of r1_like and sp_like, ordinary text for chatml.
    tokenizer = tokenizer_of(request.getfixturevalue(name))
    ids = reply(tokenizer, "I think\n", "</think>", "\n\nHi")
    want = TextDelta("Hi", "I think", None, len(reply(tokenizer, "I think\n", "</think>")))
    got = assemble(tokenizer, [ids], starts_in_reasoning=True)
    assert dataclasses.replace(got, content=got.content.strip()) == want
    opened = assemble(tokenizer, [reply(tokenizer, "<think>", "\n") + ids], starts_in_reasoning=False)
    assert (opened.content.strip(), opened.reasoning.strip()) == ("Hi", "I think")
    assert opened.num_reasoning_tokens == len(reply(tokenizer, "<think>", "\n", "I think\n", "</think>"))


def test_a_reply_that_never_closes_is_all_reasoning(r1_like: Path) -> None:
    tokenizer = tokenizer_of(r1_like)
    ids = reply(tokenizer, "so, hmm")
    assert assemble(tokenizer, [ids], starts_in_reasoning=True) == TextDelta("", "so, hmm", None, len(ids))


def test_text_that_spells_a_tag_is_no_tag_where_tags_are_tokens(r1_like: Path) -> None:
    tokenizer = tokenizer_of(r1_like)
    ids = tokenizer.encode("the </think> tag", add_bos=False)
    assert assemble(tokenizer, [ids], starts_in_reasoning=True).reasoning == "the </think> tag"


def test_special_tokens_never_leak(r1_like: Path) -> None:
    tokenizer = tokenizer_of(r1_like)
    ids = [token_id for token_id in tokenizer.special_tokens.values() for _ in range(2)]
    for starts in (True, False):
        got = assemble(tokenizer, [ids], starts_in_reasoning=starts)
        assert (got.content, got.reasoning) == ("", "")


def test_stop_strings_do_not_fire_in_the_reasoning(r1_like: Path) -> None:
    tokenizer = tokenizer_of(r1_like)
    ids = reply(tokenizer, "a STOP b", "</think>", "c STOP d")
    got = assemble(tokenizer, [ids], starts_in_reasoning=True, stop=["STOP"])
    assert (got.reasoning, got.content, got.matched_stop) == ("a STOP b", "c ", "STOP")
    got = assemble(tokenizer, [ids], starts_in_reasoning=True, stop=["STOP"], stop_in_reasoning=True)
    assert (got.reasoning, got.content, got.matched_stop) == ("a ", "", "STOP")


def test_after_a_match_deltas_are_empty(r1_like: Path) -> None:
    tokenizer = tokenizer_of(r1_like)
    assembler = OutputAssembler(tokenizer, stop=["b"], include_stop=True)
    assert assembler.push(reply(tokenizer, "abc")) == TextDelta("ab", "", "b")
    assert assembler.push(reply(tokenizer, "abc")) == TextDelta()
    assert assembler.flush() == TextDelta()


def test_the_text_of_a_stop_token_is_not_shown(r1_like: Path) -> None:
    tokenizer = tokenizer_of(r1_like)
    ids = reply(tokenizer, "a", "z")
    for include, want in ((False, "a"), (True, "az")):
        assembler = OutputAssembler(tokenizer, include_stop=include)
        delta = assembler.push(ids, stop_token_id=ids[-1])
        assert delta.content + assembler.flush().content == want


def test_a_completion_continues_its_prompt(llama2_like: Path) -> None:
    tokenizer = tokenizer_of(llama2_like)
    prompt, ids = tokenizer.encode("Hello"), tokenizer.encode("world", add_bos=False)
    assert assemble(tokenizer, [ids]).content == "world"
    assert assemble(tokenizer, [ids], prompt_tail=prompt).content == " world"


def test_half_a_character_at_the_end_is_shown_as_such(r1_like: Path) -> None:
    tokenizer = tokenizer_of(r1_like)
    ids = tokenizer.encode("鬱", add_bos=False)
    assert assemble(tokenizer, [ids[:-1]]).content == "\ufffd"
