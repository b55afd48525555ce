"""Prompts that end inside a message, or with the reasoning closed: built outside the template."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from jaxllama.errors import ChatTemplateError
from jaxllama.text.chat import ChatTemplate, load_chat_template
from jaxllama.text.encoding.tokenizer import Tokenizer, load_tokenizer

USER = {"role": "user", "content": "Hello"}


@functools.cache
def loaded(folder: Path) -> tuple[Tokenizer, ChatTemplate]:
    return load_tokenizer(folder, 200_000), load_chat_template(folder)


def said(content: str, reasoning: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning}


@pytest.fixture(params=["r1_like", "r1"])
def reasoner(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.mark.parametrize(
    ("content", "reasoning", "ending", "starts"),
    [
        ("It is", None, "<｜Assistant｜><think>\n\n</think>\n\nIt is", None),
        ("It is ", "Hm.", "<｜Assistant｜><think>\nHm.\n</think>\n\nIt is ", None),
        ("", "Hm, ", "<｜Assistant｜><think>\nHm, ", True),
        ("", None, "<｜Assistant｜><think>\n", True),
        ("a</think>b", None, "<think>\n\n</think>\n\na</think>b", None),
    ],
)
def test_a_message_is_continued_to_the_letter(reasoner, content, reasoning, ending, starts):
    tokenizer, template = loaded(reasoner)
    rendered = template.render([USER, said(content, reasoning)], continue_last=True)
    assert rendered.text.endswith(ending)
    assert rendered.starts_in_reasoning is starts
    assert rendered.continued == (content or reasoning or "")
    # The tags of the prompt are tokens, those of the message are text.
    ids = tokenizer.encode_rendered(rendered)
    end = tokenizer.special_tokens["</think>"]
    assert ids.count(end) == (starts is None)


def test_a_model_without_reasoning_is_continued_too(chatml):
    tokenizer, template = loaded(chatml)
    rendered = template.render([USER, said("The cap")], continue_last=True)
    assert rendered.text.endswith("<|im_start|>assistant\nThe cap")
    assert rendered.starts_in_reasoning is None
    assert tokenizer.decode(tokenizer.encode_rendered(rendered)).endswith("assistant\nThe cap")
    with pytest.raises(ChatTemplateError, match="does not reason"):
        template.render([USER, said("", "Hm")], continue_last=True)


@pytest.mark.parametrize("messages", [[said("a")], [said("a"), USER], []])
def test_only_a_last_message_of_the_assistants_is_continued(chatml, messages):
    with pytest.raises(ChatTemplateError):
        loaded(chatml)[1].render(messages, continue_last=True)


def test_reasoning_is_closed_before_it_begins(reasoner, chatml):
    rendered = loaded(reasoner)[1].render([USER], close_reasoning=True)
    assert rendered.text.endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    assert rendered.starts_in_reasoning is False
    plain = loaded(chatml)[1]
    assert plain.render([USER], close_reasoning=True).text == plain.render([USER]).text


def test_a_template_gets_the_variables_it_asks_for():
    source = "{{ messages[0]['content'] }}{% if enable_thinking %}<think>\n{% endif %}{{ tools | length }}"
    template = ChatTemplate(source, spellings=["</think>", "<t>"])
    assert {"enable_thinking", "tools"} <= template.variables
    rendered = template.render([USER], variables={"enable_thinking": True, "tools": [{"name": "<t>"}]})
    assert rendered.text == "Hello<think>\n1"
