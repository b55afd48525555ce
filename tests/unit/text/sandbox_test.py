"""What templates may do, and what they may not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from jaxllama.errors import ChatTemplateError
from jaxllama.text.chat import ChatTemplate


def render(source: str, content: str = "x", **options: Any) -> str:
    template = ChatTemplate(source, spellings=["<a>"], **options)
    return template.render([{"role": "user", "content": content}]).text


@pytest.mark.parametrize(
    ("source", "want"),
    [
        (
            "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}"
            "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% generation %}a{{ messages[0].content }}{% endgeneration %}b", "axb"),
        ("{{ {'a': '<é>', 'b': 12345678} | tojson }}", '{"a": "<é>", "b": 12345678}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ nothing }}{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{{ 'a' * 3 + 'b' }}{{ 2 ** 10 }}{{ '%05d|%s' % (3, 1700000000) }}", "aaab102400003|1700000000"),
        ("{{ '{:>4}'.format(5) }}{{ 'a'.center(5) }}{{ [1, 2] | join('-') }}", "   5  a  1-2"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) }}{{ m('b') }}", "[1][b]"),
        ("{% set ns = namespace(n=0) %}{% for i in range(10) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "45"),
        (
            "{{ 1700000000 | string }}{{ 1700000000 | abs }}{{ messages | map(attribute='role') | join }}",
            "17000000001700000000user",
        ),
        ("{{ 'id 1234567 %s' | format('x') }}", "id 1234567 x"),
        ("{{ '{0.__class__.__init__}|{0}'.format('a') }}", "|a"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for m in messages recursive %}{{ m.role }}{{ loop.index }}{% endfor %}", "user1"),
    ],
)
def test_what_templates_use(source: str, want: str) -> None:
    assert render(source) == want


LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    "{% for i in range(10**9) %}{% endfor %}",
    LONG_LOOP,
    "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**10) }}",
    "{{ '%.10000000000f' | format(1) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6).join(['b'] * 10**6) }}",
    "{{ ['b'] * 10**6 | join('a' * 10**6) }}",
    "{{ (['b'] * 10**6) | join('a' * 10**6) }}",
    "{{ ([[['b' * 10**6] * 1000] * 1000] * 1000) | tojson }}",
    "{{ [['b' * 10**6] * 1000] * 1000 }}",
    "{{ (['b' * 10**6] * 10**6) | map('upper') | join }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "{% set tick = environment = 1 %}" + LONG_LOOP,
    "{{ range(10**5) | map('string') | map('center', 10**5) | join }}",
    "{{ 5 | round(-(10**10)) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages[0].content.protect }}{{ messages[0].content._stand_ins.spellings.all }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ 'a' | indent(10**10) }}",
    "{{ 'a' | wordwrap(10**10) | center(10**9) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ {'a': 1} | tojson(indent=10**9) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_refused_in_time(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(ChatTemplateError):
        render(source, content="<a>", timeout_s=0.5)
    assert time.monotonic() - start < 20


def test_an_error_names_the_reason() -> None:
    with pytest.raises(ChatTemplateError, match=r"longer than 0\.2 s"):
        render(LONG_LOOP, timeout_s=0.2)


def test_a_long_chat_fits_the_bounds() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim + '\n' }}{% endfor %}", spellings=["<a>"]
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 1000} for i in range(600)]
    assert len(template.render(messages).text) > 3_000_000
