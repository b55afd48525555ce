"""Structured output on the host: whatever a mask allows fits the grammar, with every kind of tokenizer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from schemas import random_schema

from jaxllama.errors import GrammarError
from jaxllama.text.constraint import FOREVER, OutputConstraint, ReasoningTokens
from jaxllama.text.encoding.tokenizer import Tokenizer, load_tokenizer
from jaxllama.text.structured import GrammarCompiler, GrammarSource, Structured
from jaxllama.text.tool_parsing import LiveParser, ToolDelta
from jaxllama.text.tools import HERMES, LLAMA3, TOOL_FORMATS, Tool, auto_grammar, calls_grammar

EXTRA_IDS = 5  # ids that the model has and the tokenizer does not


@functools.cache
def compiler_of(folder: Path) -> tuple[Tokenizer, GrammarCompiler, int]:
    tokenizer = load_tokenizer(folder, 200_000)
    named = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    eos = tokenizer.special_tokens[named["content"] if isinstance(named, dict) else named]
    return tokenizer, GrammarCompiler(tokenizer, tokenizer.vocab_size + EXTRA_IDS, [eos]), eos


def allowed(mask, vocab_size):
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-vocab_size // 32),)
    ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert ids.max() < vocab_size
    return ids


def play(folder, source, seed=0, max_tokens=2000):
    """Draws every token uniformly from what is allowed: the wildest model there is. None if it does not end."""
    tokenizer, compiler, eos = compiler_of(folder)
    state = compiler.compile(source, "x").start()
    rng = np.random.default_rng(seed)
    ids = []
    for _ in range(max_tokens):
        found = allowed(state.mask(), tokenizer.vocab_size + EXTRA_IDS)
        # A model ends sooner or later; a uniform draw from ten thousand tokens would not.
        token = eos if eos in found and rng.random() < 0.3 else int(rng.choice(_enders(folder, found, rng)))
        if token == eos:
            return tokenizer.decode(ids)
        state.advance(token)
        ids.append(token)
    return None


def _enders(folder, found, rng):
    """Half of the time only tokens with a quote, brace or bracket, where there are any: texts of random length end."""
    if len(found) < 100 or rng.random() < 0.5:
        return found
    short = np.intersect1d(found, _closers(folder))
    return short if len(short) else found


@functools.cache
def _closers(folder):
    tokenizer = compiler_of(folder)[0]
    closers = (b'"', b'"}', b"]", b"}", b'",', b"1")
    return np.array([i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in closers], np.int64)


def test_random_schemas_always_validate(any_folder):
    is_large = compiler_of(any_folder)[0].vocab_size > 5000
    done = 0
    for seed in range(10 if is_large else 40):
        schema = random_schema(np.random.default_rng(seed))
        text = play(any_folder, Structured(json=schema).source(), seed, 100 if is_large else 2000)
        if text is not None:
            jsonschema.validate(json.loads(text), schema)
            done += 1
    assert done >= (3 if is_large else 10)


@pytest.mark.parametrize(
    "choice", [["yes", "no"], ["a", "ab", "abc"], ['"quoted"\n', "\\", "你好 🦙", "</think>", "\u0000"]]
)
def test_a_choice_is_one_of_the_texts(small_folder, choice):
    texts = {play(small_folder, Structured(choice=choice).source(), seed) for seed in range(12)}
    assert len(texts) > 1
    assert texts <= set(choice)


@pytest.mark.parametrize("regex", [r"[a-c]{3}-[0-9]+/x", r"(yes|no)\n", "a/b\\/c", r"[a-zé]{1,3} [你好]", "x\ny"])
def test_a_regex_matches_the_whole(small_folder, regex):
    for seed in range(5):
        text = play(small_folder, Structured(regex=regex).source(), seed)
        assert text is not None
        assert re.fullmatch(regex, text)


@pytest.mark.parametrize("grammar", ['root ::= "a" [0-9]{2} x\nx ::= "q" | "z"', 'start: "a" /[0-9]{2}/ ("q" | "z")'])
def test_a_grammar_in_either_notation(small_folder, grammar):
    assert re.fullmatch("a[0-9]{2}[qz]", play(small_folder, Structured(grammar=grammar).source()))


def test_special_tokens_are_not_the_text_they_spell(r1_like):
    tokenizer, compiler, _ = compiler_of(r1_like)
    state = compiler.compile(Structured(regex="</think>").source(), "x").start()
    ids = allowed(state.mask(), tokenizer.vocab_size + EXTRA_IDS)
    assert tokenizer.special_tokens["</think>"] not in ids
    assert compiler.literal("a</think>b") == f'"a" <[{tokenizer.special_tokens["</think>"]}]> "b"'


def test_a_complete_grammar_allows_stop_ids_alone(small_folder):
    tokenizer, compiler, eos = compiler_of(small_folder)
    state = compiler.compile(Structured(choice=["ab"]).source(), "x").start()
    for token in tokenizer.encode("xab", add_bos=False)[-2:] if len(tokenizer.encode("ab", add_bos=False)) > 2 else ():
        state.advance(token)
    for _ in range(3):
        ids = allowed(state.mask(), tokenizer.vocab_size + EXTRA_IDS)
        if ids.tolist() == [eos]:
            return
        state.advance(int(ids[0]))
    raise AssertionError("the grammar never ended")


def deep(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS = [
    {"json": deep(100)},
    {"json": {"enum": [f"value {i}" for i in range(20_000)]}},
    {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    {
        "json": {
            "allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {"type": "string"}}} for j in range(6)]} for i in range(8)]
        }
    },
    {"json": {"type": "array", "uniqueItems": True}},
    {"json": {"$ref": "http://127.0.0.1:1/schema.json"}},
    {"json": {"type": "string", "pattern": "^a$", "minLength": 5}},
    {"json": {"type": "string", "pattern": "("}},
    {"json": {"type": "strange"}},
    {"regex": "("},
    {"regex": "(?=a)b"},
    {"regex": "(?:" * 500 + "a" + ")*" * 500},
    {"regex": "a" * 9000},
    {"regex": "\ud800"},
    {"grammar": "start: nowhere"},
    {"grammar": "root ::= ((("},
    {"choice": []},
    {"choice": [""]},
    {"choice": ["a"] * 1001},
    {"choice": "abc"},
    {},
    {"json": {}, "regex": "a"},
]


@pytest.mark.parametrize("given", BOMBS, ids=lambda given: f"{next(iter(given), 'none')}: {str(given)[:40]}")
def test_a_bomb_is_refused_soon_and_by_name(chatml, given):
    _, compiler, _ = compiler_of(chatml)
    started = time.process_time()
    with pytest.raises(GrammarError) as refused:
        compiler.compile(Structured(**given).source(), "here")
    assert len(str(refused.value)) < 500
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "regex", ["(a{1,1000}){1,1000}", "((a{0,100}){0,100}){0,100}", "(x+x+)+y", "(.*a){30}", "(a|a?)+"]
)
def test_a_regex_that_explodes_elsewhere_is_cheap_here(chatml, regex):
    started = time.process_time()
    with contextlib.suppress(GrammarError):
        play(chatml, Structured(regex=regex).source(), max_tokens=50)
    assert time.process_time() - started < 5


TOOLS = [
    Tool("look_up", "Looks up.", {"type": "object", "properties": {"q": {"enum": ["a", "b"]}}, "required": ["q"]}),
    Tool("add", parameters={"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}),
]


@pytest.mark.parametrize("tool_format", TOOL_FORMATS.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("parallel", [False, True])
def test_forced_calls_always_validate(small_folder, tool_format, parallel):
    _, compiler, _ = compiler_of(small_folder)
    schemas = {tool.name: tool.schema for tool in TOOLS}
    numbers = set()
    for seed in range(6):
        text = play(small_folder, calls_grammar(TOOLS, tool_format, compiler, parallel=parallel), seed)
        if text is None:
            continue
        parser = LiveParser(tool_format, list(schemas), must_call=True)
        parts = [*itertools.chain(*map(parser.push, text)), *parser.flush()]
        assert all(isinstance(part, ToolDelta) for part in parts), text
        names = [part.name for part in parts if part.name is not None]
        numbers.add(len(names))
        for index, name in enumerate(names):
            arguments = "".join(part.arguments for part in parts if part.index == index)
            jsonschema.validate(json.loads(arguments), schemas[name])
    assert numbers
    assert parallel or numbers == {1}


@pytest.mark.parametrize("tool_format", TOOL_FORMATS.values(), ids=lambda f: f.name)
def test_auto_allows_text_until_a_call_opens(small_folder, tool_format):
    tokenizer, compiler, eos = compiler_of(small_folder)
    vocab = tokenizer.vocab_size + EXTRA_IDS
    state = compiler.compile(auto_grammar(TOOLS, tool_format, compiler, parallel=True), "tools").start()
    begin = tool_format.write_calls([("look_up", "")])[: -len(tool_format.tail + tool_format.after)]
    text = ("Hello <b>\n" if tool_format is not LLAMA3 else "") + begin
    ids = tokenizer.encode(text, add_bos=False)
    if b"".join(map(tokenizer.token_bytes, ids)).strip() != text.encode():
        pytest.skip("this tokenizer reads ▁ as a space")
    if tokenizer.token_bytes(ids[0])[:1] == b" ":
        pytest.skip("this tokenizer begins with a space")
    for token in ids:
        assert token in allowed(state.mask(), vocab)
        state.advance(token)
    found = allowed(state.mask(), vocab)
    assert eos not in found
    assert {tokenizer.token_bytes(int(i))[:1] for i in found} <= {b"{"}


def test_auto_beside_a_response_format(chatml):
    _, compiler, _ = compiler_of(chatml)
    content = Structured(json={"type": "boolean"}).source()
    source = auto_grammar(TOOLS, HERMES, compiler, parallel=False, content=content)
    texts = [play(chatml, source, seed) for seed in range(12)]
    assert {text for text in texts if text and text[0] != "<"} <= {"true", "false"}
    assert any(text and text.startswith("<tool_call>") for text in texts)


# The constraint of a whole output


def constraint(folder, *, text="X", **options):
    tokenizer, compiler, eos = compiler_of(folder)
    if options.pop("grammar", True):
        source = Structured(choice=[text]).source()
        tags = ReasoningTokens.of(tokenizer)
        if options.get("starts_in_reasoning") and tags.close_id is None:
            source = source.after("</think>")
        options["grammar"] = compiler.compile(source, "choice")
    else:
        options["grammar"] = None
    return OutputConstraint(
        vocab_size=tokenizer.vocab_size + EXTRA_IDS,
        tokens=ReasoningTokens.of(tokenizer),
        decoder=tokenizer.decoder(),
        stop_ids=[eos],
        **options,
    )


def run_on(folder, rule, wanted):
    """Plays like an engine: `wanted` tokens where they are allowed, else the lowest allowed id. Ends at the stop id."""
    tokenizer, _, eos = compiler_of(folder)
    ids, wanted = [], list(wanted)
    while len(ids) < 60:
        token = wanted.pop(0) if wanted else eos
        if rule.num_free == 0:
            found = allowed(rule.mask(), tokenizer.vocab_size + EXTRA_IDS).tolist()
            token = token if token in found else found[0]
        rule.advance(token)
        ids.append(token)
        if token == eos:
            break
    return ids


def test_the_grammar_begins_after_the_reasoning(r1_like):
    tokenizer, _, eos = compiler_of(r1_like)
    end, newlines = tokenizer.special_tokens["</think>"], tokenizer.encode("\n\n", add_bos=False)
    thought = tokenizer.encode("Hm, {", add_bos=False)
    rule = constraint(r1_like, starts_in_reasoning=True)
    assert (rule.halt_id, rule.num_free) == (end, FOREVER)
    ids = run_on(r1_like, rule, [*thought, end, *newlines, *newlines])
    assert ids == [*thought, end, *newlines, *tokenizer.encode("X", add_bos=False), eos]
    assert rule.halt_id is None


def test_a_thinking_budget_forces_the_end_tag_once(r1_like):
    tokenizer, _, eos = compiler_of(r1_like)
    end = tokenizer.special_tokens["</think>"]
    thought = tokenizer.encode("Hm " * 20, add_bos=False)
    for budget in (0, 1, 5):
        rule = constraint(r1_like, grammar=False, starts_in_reasoning=True, thinking_budget=budget)
        assert rule.num_free == budget
        ids = run_on(r1_like, rule, thought)
        assert ids[: budget + 1] == [*thought[:budget], end]
        assert ids[budget + 1 :] == [*thought[budget + 1 :], eos][: len(ids) - budget - 1]
        assert rule.num_free == FOREVER
    rule = constraint(r1_like, grammar=False, starts_in_reasoning=True, thinking_budget=5)
    assert run_on(r1_like, rule, [thought[0], end, *thought[:9]]) == [thought[0], end, *thought[:9], eos]


def test_a_model_that_opens_its_reasoning_itself(r1_like):
    tokenizer, _, eos = compiler_of(r1_like)
    start, end = tokenizer.special_tokens["<think>"], tokenizer.special_tokens["</think>"]
    thought, x = tokenizer.encode("Hm Hm Hm", add_bos=False), tokenizer.encode("X", add_bos=False)
    rule = constraint(r1_like, starts_in_reasoning=False, thinking_budget=2)
    assert run_on(r1_like, rule, [start, *thought]) == [start, *thought[:2], end, *x, eos]
    rule = constraint(r1_like, starts_in_reasoning=False)
    assert run_on(r1_like, rule, thought) == [*x, eos]
    rule = constraint(r1_like, starts_in_reasoning=False, thinking_budget=0, grammar=False)
    assert run_on(r1_like, rule, [start, *thought])[:2] == [start, end]
    rule = constraint(r1_like, starts_in_reasoning=False, thinking_budget=0, grammar=False)
    assert run_on(r1_like, rule, thought) == [*thought, eos]


@pytest.mark.parametrize("with_grammar", [False, True])
def test_tags_of_several_tokens(chatml, with_grammar):
    tokenizer, _, _ = compiler_of(chatml)
    assert ReasoningTokens.of(tokenizer).close_id is None
    thought = tokenizer.encode("Hm " * 9 + "{" * 9, add_bos=False)
    rule = constraint(chatml, starts_in_reasoning=True, thinking_budget=5, grammar=with_grammar)
    ids = run_on(chatml, rule, thought)
    text = tokenizer.decode(ids)
    assert text.startswith(tokenizer.decode(thought[:5]) + "</think>")
    if with_grammar:
        assert text.partition("</think>")[2].strip() == "X"
    natural = tokenizer.encode("a</think>\nX", add_bos=False)
    rule = constraint(chatml, starts_in_reasoning=True, thinking_budget=len(natural) + 3, grammar=with_grammar)
    assert tokenizer.decode(run_on(chatml, rule, natural)) == "a</think>\nX"


def test_min_tokens_hold_the_stop_id_back_while_the_grammar_can_go_on(chatml):
    _, compiler, eos = compiler_of(chatml)
    tokenizer = compiler_of(chatml)[0]
    grammar = compiler.compile(Structured(regex="a{1,9}").source(), "regex")
    rule = OutputConstraint(vocab_size=tokenizer.vocab_size + 5, grammar=grammar, min_tokens=3, stop_ids=[eos])
    a = tokenizer.encode("a", add_bos=False)[-1]
    for count in range(4):
        assert (eos in allowed(rule.mask(), tokenizer.vocab_size + 5)) == (count == 3)
        rule.advance(a)
    rule = constraint(chatml, min_tokens=10)
    assert tokenizer.decode(run_on(chatml, rule, [])) == "X"


def test_a_source_after_a_tag_keeps_its_rules():
    source = GrammarSource("a", "a: @b", {"b": {"lark_grammar": 'start: "x"'}}).after("</t>")
    assert json.loads(source.to_llguidance())["grammars"][0]["lark_grammar"].startswith("start: before /\\n{0,2}/ (a)")
