"""Chats with tools and with reasoning in templates that look like the families' own."""

from __future__ import annotations

import re

import pytest
from unit.text.output_test import tokenizer_of

from jaxllama.errors import ChatTemplateError
from jaxllama.text.chat import ChatTemplate
from jaxllama.text.output import OutputAssembler
from jaxllama.text.reasoning import GRANITE, MAGISTRAL, THINK
from jaxllama.text.tool_parsing import LooseParser, ToolDelta
from jaxllama.text.tools import MISTRAL, Tool

LONG_ID = "call_0123456789abcdef01234567"
TOOLS = [Tool("add", "Adds.")]
CHAT = [
    {"role": "user", "content": "1?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": LONG_ID, "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "content": "2", "tool_call_id": LONG_ID},
]
MISTRAL_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.tool_calls is defined and m.tool_calls is not none %}"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids must have length 9') }}{% endif %}"
    "WRITTEN{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids must have length 9') }}{% endif %}"
    "{{ '[TOOL_RESULTS]' + m.tool_call_id + '|' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
V3 = MISTRAL_LIKE.replace(
    "WRITTEN", """{{ '[TOOL_CALLS][' + (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}]' }}"""
)
V11 = MISTRAL_LIKE.replace(
    "WRITTEN", "{{ '[TOOL_CALLS]' + c.function.name + '[CALL_ID]' + c.id + '[ARGS]' + c.function.arguments | tojson }}"
)
# Tools are shown, calls are not: those are part of an assistant's text.
GRANITE_LIKE = (
    "{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson + '<|end_of_text|>' }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
PHI_LIKE = (
    "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}"
    "{{ '<|system|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|><|end|>' }}{% else %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QWEN3_LIKE = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<tool_call></tool_call><|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|im_start|>' + m.role + '\\n' + content }}"
    "{% for c in m.tool_calls or [] %}"
    """{{ '<tool_call>{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}"""
    "{{ '}</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
SMOLLM3_LIKE = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{{ '<|im_start|>system\\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}{% endif %}"
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def template_of(source):
    return ChatTemplate(source, spellings=["[TOOL_CALLS]", "[INST]", "<think>", "</think>"], named_tokens=NAMED)


@pytest.mark.parametrize(("source", "form"), [(V3, r'"id": "(\w+)"'), (V11, r"\[CALL_ID\](\w+)\[ARGS\]{\"a\": 1}")])
def test_mistrals_ids_of_calls_have_nine_characters_and_results_the_same(source, form):
    text = template_of(source).render(CHAT, tools=TOOLS).text
    assert re.search(form, text)[1] == re.search(r"\[TOOL_RESULTS\](\w{9})\|2\[", text)[1]
    short = [CHAT[0], {**CHAT[1], "tool_calls": [{**CHAT[1]["tool_calls"][0], "id": "VvvODy9mT"}]}]
    assert re.search(form, template_of(source).render(short, tools=TOOLS).text)[1] == "VvvODy9mT"


def test_calls_are_text_where_a_template_shows_tools_but_no_calls():
    text = template_of(GRANITE_LIKE).render(CHAT, tools=TOOLS).text
    assert text.startswith("<|start_of_role|>available_tools<|end_of_role|>[{")
    assert '<|end_of_role|><|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|end_of_text|>' in text
    assert "<|start_of_role|>tool<|end_of_role|>2<|end_of_text|>" in text


def test_phi_finds_its_tools_in_the_system_message():
    text = template_of(PHI_LIKE).render(CHAT, tools=TOOLS).text
    assert re.match(r'<\|system\|>[^<]+<\|tool\|>\[{"name": "add".*}\]<\|/tool\|><\|end\|><\|user\|>1\?', text)
    assert '<|assistant|><|tool_call|>[{"name": "add", "arguments": {"a": 1}}]<|/tool_call|><|end|><|tool|>2' in text
    told = template_of(PHI_LIKE).render([{"role": "system", "content": "Be brief."}, *CHAT], tools=TOOLS).text
    assert told.startswith("<|system|>Be brief.<|tool|>[")
    assert "<|tool|>[" not in template_of(PHI_LIKE).render(CHAT[:1]).text


def test_a_template_that_takes_the_content_for_text_gets_text():
    """Qwen3's and others' look into the content of a message that only calls tools, which is None."""
    text = template_of(QWEN3_LIKE).render(CHAT, tools=TOOLS).text
    assert '<|im_start|>assistant\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text


def test_a_template_that_refuses_refuses_with_and_without_content():
    with pytest.raises(ChatTemplateError, match="never"):
        template_of(QWEN3_LIKE + "{{ raise_exception('never') }}").render(CHAT, tools=TOOLS)


@pytest.mark.parametrize("source", [QWEN3_LIKE, SMOLLM3_LIKE], ids=["qwen3", "smollm3"])
def test_enable_thinking_switches_the_reasoning(source):
    template = template_of(source)
    assert template.has_reasoning
    on, off = (template.render(CHAT[:1], variables={"enable_thinking": flag}) for flag in (True, False))
    assert on.text.endswith("<|im_start|>assistant\n")
    assert off.text.rstrip("\n").endswith("<think>\n\n</think>")
    # The model opens its reasoning itself: neither prompt ends inside.
    assert on.starts_in_reasoning is off.starts_in_reasoning is False


@pytest.mark.parametrize(
    ("source", "spellings", "tags"),
    [
        (QWEN3_LIKE, [], THINK),
        (GRANITE_LIKE, [], None),
        (GRANITE_LIKE + "{# <think></think> and <response></response> #}", [], GRANITE),
        (MISTRAL_LIKE, [], None),
        (MISTRAL_LIKE + "{# [THINK][/THINK] #}", [], MAGISTRAL),
        (MISTRAL_LIKE, ["[THINK]", "[/THINK]"], MAGISTRAL),
        (MISTRAL_LIKE, ["<think>", "</think>"], THINK),
    ],
)
def test_the_tags_are_the_template_s_or_else_the_tokenizer_s(source, spellings, tags):
    template = ChatTemplate(source, spellings=spellings, named_tokens=NAMED)
    assert template.has_reasoning == (tags is not None)
    assert template.reasoning_tags == (tags or THINK)


def test_a_begun_answer_follows_the_tags_of_its_family():
    template = ChatTemplate(MISTRAL_LIKE, spellings=["[THINK]", "[/THINK]"], named_tokens=NAMED)
    begun = {"role": "assistant", "reasoning_content": "Hm.", "content": "It is"}
    assert template.render([CHAT[0], begun], continue_last=True).text.endswith("[/INST][THINK]Hm.[/THINK]It is")
    said = [CHAT[0], {"role": "assistant", "content": "[THINK]Hm.[/THINK]2."}, CHAT[0]]
    assert template.render(said).text == "<s>[INST]1?[/INST]2.</s>[INST]1?[/INST]"


def test_calls_written_with_hidden_tokens_are_found(mistral_like):
    """`[TOOL_CALLS]` is flagged special, so no text shows it, but to the parser of calls."""
    tokenizer = tokenizer_of(mistral_like)
    ids = [tokenizer.special_tokens["[TOOL_CALLS]"], *tokenizer.encode('[{"name": "add", "arguments": {}}]')]
    assert "[TOOL_CALLS]" not in tokenizer.decode(ids)
    assembler = OutputAssembler(tokenizer, tools=LooseParser(MISTRAL, ["add"]))
    deltas = [*(assembler.push([token]) for token in ids), assembler.flush()]
    assert [call for delta in deltas for call in delta.tool_calls] == [ToolDelta(0, "add"), ToolDelta(0, None, "{}")]
    assert "".join(delta.content for delta in deltas) == ""
