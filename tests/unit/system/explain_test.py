"""Every error has a page that says what to do, and a message leads to it."""

from __future__ import annotations

import pytest

from jaxllama.__main__ import main
from jaxllama.errors import CheckpointError, JaxLlamaError, RequestError
from jaxllama.system.explain import known_errors, page_of, with_page


def subclasses(error: type[JaxLlamaError]) -> set[str]:
    below = {found for found in error.__subclasses__() if found.__module__.startswith("jaxllama")}
    return {found.__name__ for found in below}.union(*map(subclasses, below))


def test_every_error_is_known_and_says_what_to_do():
    known = known_errors()
    assert subclasses(JaxLlamaError) <= set(known)
    without = [name for name in known if name != "JaxLlamaError" and "**What to do:**" not in page_of(name)]
    assert not without


def test_a_name_may_be_short_and_in_any_case():
    assert page_of("checkpoint") == page_of("CheckpointError") == page_of("CHECKPOINTERROR")
    assert "It is also a EngineError" in page_of("QueueFullError")
    with pytest.raises(RequestError, match="CheckpointError"):
        page_of("checkpoints")


def test_a_message_leads_to_its_page_where_that_fits():
    assert with_page(CheckpointError("x is damaged")) == "x is damaged (jaxllama explain CheckpointError)"
    assert with_page(CheckpointError("x" * 290)) == "x" * 290
    assert with_page(OSError("disk")) == "disk"

    class OwnError(JaxLlamaError):
        """Of a program that uses jaxllama."""

    assert with_page(OwnError("mine")) == "mine"


def test_the_command_s_error_is_one_that_the_command_explains(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "a", "--compilation-cache", "off"]) == 2
    message = capsys.readouterr().err
    name = message.rsplit("jaxllama explain ", 1)[1].strip(")\n")
    assert main(["explain", name]) == 0
    assert "What to do" in capsys.readouterr().out
    assert main(["explain", "Nothing"]) == 2
    assert "no error of jaxllama" in capsys.readouterr().err
