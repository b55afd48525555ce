"""Stop strings against a regular expression over the whole text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllama.text.stops import StopMatcher

LAW = settings(deadline=None, max_examples=300)
few_letters = st.text(alphabet="ab", min_size=1, max_size=5)


def expected(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    match = re.search("|".join(map(re.escape, stop)), text) if stop else None
    if match is None:
        return text, None
    return text[: match.end() if include else match.start()], match.group()


@LAW
@given(
    stop=st.lists(few_letters, max_size=4),
    cuts=st.lists(st.text("abc", max_size=4), max_size=10),
    include=st.booleans(),
)
def test_the_match_is_the_regex_match_however_the_text_is_cut(stop: list[str], cuts: list[str], include: bool) -> None:
    matcher = StopMatcher(stop, include)
    emitted = "".join(matcher.push(cut)[0] for cut in cuts) + matcher.flush()
    assert (emitted, matcher.matched) == expected("".join(cuts), stop, include)


@LAW
@given(stop=st.lists(few_letters, min_size=1, max_size=4), text=st.text("abc", max_size=12))
def test_nothing_is_held_back_that_cannot_become_a_stop(stop: list[str], text: str) -> None:
    matcher = StopMatcher(stop, False)
    emitted = ""
    for i, char in enumerate(text, 1):
        emitted += matcher.push(char)[0]
        held = text[len(emitted) : i]
        if matcher.matched is None and held:
            assert any(other.startswith(held) or held.startswith(other) for other in stop)


def test_a_stop_string_across_pushes_is_found() -> None:
    matcher = StopMatcher(["END"], False)
    assert [matcher.push(text) for text in ("E", "EN", "D", "x")] == [("", None), ("E", None), ("", "END"), ("", "END")]


def test_an_undecided_match_is_decided_at_the_end() -> None:
    matcher = StopMatcher(["abc", "b"], False)
    assert matcher.push("xab") == ("x", None)
    assert (matcher.flush(), matcher.matched) == ("a", "b")


def test_a_long_stop_string_costs_little() -> None:
    matcher = StopMatcher(["a" * 1023 + c for c in "bcdefghijklmnopq"], False)
    assert matcher.push("a" * 20_000)[1] is None
    assert matcher.push("b") == ("", "a" * 1023 + "b")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""], False)
