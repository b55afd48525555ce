"""What a message quotes may come from a stranger: it stays short, printable and on one line."""

from __future__ import annotations

import pytest

from jaxllama.errors import ConfigError, listed, one_line, quote


@pytest.mark.parametrize(
    "value", ["a" * 1_000_000, "\x00" * 1_000_000, ["b" * 1_000_000], {"k": "c" * 1_000_000}, 10**4000]
)
def test_a_quoted_value_is_short_and_printable(value):
    quoted = quote(value)
    assert len(quoted) < 400
    assert "…" in quoted
    assert quoted.isprintable()


@pytest.mark.parametrize("value", ["silu", "with 'quotes'", "a\nb", 3, None, ["x"], {"type": "yarn"}])
def test_a_short_value_is_quoted_whole(value):
    assert quote(value) == repr(value)


def test_both_ends_of_a_long_name_are_shown():
    quoted = quote("model.layers." + "x" * 1000 + ".weight")
    assert quoted.startswith("'model.layers.")
    assert quoted.endswith(".weight'")


def test_an_error_is_one_line_and_never_silent():
    assert one_line(ConfigError("first\n\tsecond\x1b[31m  third")) == "first second [31m third"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(one_line("x" * 5000)) == 300
    assert one_line("é — 你好") == "é — 你好"


def test_a_list_of_problems_has_an_end():
    assert listed(["a", "b"]) == "a; b"
    problems = listed([str(i) for i in range(5000)])
    assert problems.startswith("0; 1; ")
    assert problems.endswith("39; and 4,960 more")
