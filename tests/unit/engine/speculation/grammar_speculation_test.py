"""Rows under a grammar take several tokens a step, and none of them is another than one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import tiny
from collector import Collector, assert_idle, held, watch_saved_pages

from jaxllama import EngineOptions, Llama, SamplingParams, Structured
from jaxllama.engine.options import StepReport
from jaxllama.engine.scheduling.speculation import StepTimes
from jaxllama.model import native
from jaxllama.text.structured import GrammarSource
from jaxllama.text.tools import HERMES, Tool, auto_grammar, calls_grammar

pytestmark = pytest.mark.optimized

OPTIONS = dataclasses.replace(tiny.SMALL, max_context=160, num_pages=4 * 40 + 1)
SCHEMA = {
    "type": "object",
    "properties": {
        "number_of_stairs": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour_of_the_door": {"enum": ["red", "green"]},
        "is_it_open_today": {"type": "boolean"},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["number_of_stairs", "colour_of_the_door", "is_it_open_today", "notes"],
    "additionalProperties": False,
}
TOOLS = [Tool("find_stairs", parameters={**SCHEMA, "required": ["is_it_open_today"]}, strict=True), Tool("say_hello")]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_p": 0.9, "min_tokens": 30},
    {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 1.0, "stop_token_ids": tuple(b"o")},
    {"temperature": 0.8, "top_k": 40, "logprobs": 20},
    {"temperature": 1.0, "ignore_eos": True, "max_tokens": 60},
]
type Job = tuple[list[int], SamplingParams, dict[str, Any] | None]
"""A prompt, its parameters, and what `constraint_of` makes of it; None: a plain row."""


def grammars(llama: Llama) -> dict[str, GrammarSource]:
    compiler = llama.constraints.compiler
    return {
        "schema": Structured(json=SCHEMA).source(),
        "object": Structured(json={"type": "object"}).source(),
        "regex": Structured(regex="(left|right|straight on){2,5}-[0-9]{2,4}").source(),
        "choice": Structured(choice=["northwest", "northeast", "southwest"]).source(),
        "calls": calls_grammar(TOOLS, HERMES, compiler, parallel=True),
        "auto": auto_grammar(TOOLS, HERMES, compiler, parallel=False),
    }


def jobs() -> list[Job]:
    """All grammars and kinds of sampling, some that begin inside a text or its reasoning, and plain rows between."""
    found: list[Job] = []
    names = ["schema", "object", "regex", "choice", "calls", "auto"]
    for i in range(21):
        prompt = tiny.prompt_of("divisible", [3, 9, 30][i % 3], i)
        values = {"seed": i, "max_tokens": 100, "logprobs": 2} | KINDS[i % len(KINDS)]
        rule: dict[str, Any] = {"grammar": names[i % len(names)], "min_tokens": values.get("min_tokens", 0)}
        if i % 5 == 4:
            rule |= {"starts_in_reasoning": i % 2 == 0, "thinking_budget": 7}
        found.append((prompt, SamplingParams(**values), rule))
        if i % 4 == 0:
            phrase = prompt[:3] * 4
            bias = dict.fromkeys(phrase, 6.0)
            params = SamplingParams(seed=i, max_tokens=40, ignore_eos=True, logprobs=1, logit_bias=bias)
            found.append((phrase, params, None))
    return found


def constraint_of(llama: Llama, rule: dict[str, Any]) -> Any:
    source, inside = grammars(llama)[rule["grammar"]], rule.get("starts_in_reasoning")
    grammar = llama.constraints.compile(source, "grammar", inside)
    return llama.constraints.make(grammar, **{key: value for key, value in rule.items() if key != "grammar"})


def outcomes(llama: Llama, given: list[Job], scope: str, *, at_once: bool) -> list[Any]:
    def submit(job: Job) -> Collector:
        prompt, params, rule = job
        constraint = None if rule is None else constraint_of(llama, rule)
        return Collector(llama.engine, prompt, params, cache_scope=scope, constraint=constraint)

    if at_once:
        with held(llama.engine):
            got = [submit(job) for job in given]
    else:
        got = [submit(job).wait() for job in given]
    return [(done.wait().tokens, done.logprobs, done.finish_reason) for done in got]


def make_model(folder: Path, options: EngineOptions, dtype: str = "bfloat16", quantize: str | None = None) -> Llama:
    llama = tiny.make_llama(dtype=jnp.dtype(dtype), quantize=quantize, options=options, tokenizer_folder=folder)
    # Drafts always pay.
    free = StepTimes({1: 1.0, 4: 1.0}, {1: 0.1, 32: 0.05})
    llama.engine._speculation.times = dict.fromkeys(llama.engine._row_buckets, free)
    return llama


@pytest.fixture(scope="module")
def auto(tokenizer_folder: Path) -> Iterator[Llama]:
    with make_model(tokenizer_folder, dataclasses.replace(OPTIONS, speculation="auto")) as model:
        yield model


def check_same_bits(model: Llama, want: list[Any], reports: list[StepReport]) -> None:
    given = jobs()
    assert model.engine.platform.programs_agree
    model.engine.on_steps = reports.append
    assert outcomes(model, given, "alone", at_once=False) == want
    assert outcomes(model, given, "", at_once=True) == want
    assert outcomes(model, given, "", at_once=True) == want
    assert_idle(model.engine)


def test_grammars_have_the_same_bits_with_speculation(auto: Llama, tokenizer_folder: Path):
    """Tokens, log-probabilities and ends: alone, together, beside plain rows, and from the cache."""
    with make_model(tokenizer_folder, OPTIONS) as plain:
        want = outcomes(plain, jobs(), "", at_once=True)
    assert {reason for *_, reason in want} == {"stop", "length"}
    reports: list[StepReport] = []
    check_same_bits(auto, want, reports)
    num_tokens = sum(report.num_tokens for report in reports)
    assert sum(report.num_accepted for report in reports) > num_tokens / 4
    assert sum(report.num_drafted for report in reports) > sum(report.num_accepted for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "quantize"), [("float32", None, None), ("bfloat16", "int8", None), ("float32", None, "int8")]
)
def test_grammars_have_the_same_bits_in_every_dtype(dtype, kv_dtype, quantize, tokenizer_folder, monkeypatch):
    """Set aside for want of pages, too."""
    options = dataclasses.replace(OPTIONS, kv_dtype=kv_dtype)
    with make_model(tokenizer_folder, options, dtype, quantize) as plain:
        want = outcomes(plain, jobs(), "", at_once=True)
    with make_model(tokenizer_folder, dataclasses.replace(options, speculation="lookup"), dtype, quantize) as model:
        check_same_bits(model, want, [])
    saved = watch_saved_pages(monkeypatch)
    few = dataclasses.replace(options, speculation="auto", num_pages=42, dispatch_s=1e-6)
    with make_model(tokenizer_folder, few, dtype, quantize) as model:
        assert outcomes(model, jobs(), "", at_once=True) == want
        assert_idle(model.engine)
    assert saved


@pytest.mark.slow
def test_where_programs_differ_in_bits_a_grammar_is_as_alone(tokenizer_folder: Path, monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    with make_model(tokenizer_folder, dataclasses.replace(OPTIONS, speculation="auto"), "float32") as model:
        assert not model.engine.platform.programs_agree
        reports: list[StepReport] = []
        model.engine.on_steps = reports.append
        want = outcomes(model, jobs(), "alone", at_once=False)
        assert outcomes(model, jobs(), "", at_once=True) == want
    assert sum(report.num_accepted for report in reports) > 100


def test_what_a_grammar_leaves_no_choice_in_takes_few_steps(auto: Llama):
    """A regular expression of one text: forty tokens that no model is asked for."""
    text = "nothing but this very text can be said.."
    reports: list[StepReport] = []
    auto.engine.on_steps = reports.append
    regex = Structured(regex=text.replace(".", r"\."))
    done = auto.generate([1, 2, 3], SamplingParams(structured=regex, temperature=2.0, seed=1, max_tokens=60))
    assert done.text == text
    assert done.finish_reason == "stop"
    assert done.num_accepted >= 34
    assert sum(report.num_accepted for report in reports) == done.num_accepted
    assert sum(report.num_steps for report in reports) <= 7


def test_a_stop_string_ends_inside_a_forced_run(auto: Llama):
    structured = Structured(regex="northwest or (south)+")
    done = auto.generate([1, 2, 3], SamplingParams(structured=structured, stop=("west",), seed=1, max_tokens=60))
    assert (done.text, done.finish_reason, done.stop_reason) == ("north", "stop", "west")
    assert_idle(auto.engine)


@pytest.mark.parametrize("max_tokens", [1, 2, 8, 9, 10])
def test_a_budget_ends_inside_a_forced_run(auto: Llama, max_tokens: int):
    params = SamplingParams(structured=Structured(choice=["northwestern"]), seed=1, max_tokens=max_tokens)
    done = auto.generate([1, 2, 3], params)
    assert (done.text, done.finish_reason) == ("northwestern"[:max_tokens], "length")


def test_a_plain_row_beside_a_grammar_keeps_its_bits(auto: Llama):
    """And what was drafted for a row counts for nobody who has it later."""
    plain = SamplingParams(seed=2, max_tokens=30, ignore_eos=True, logprobs=1)
    bound = SamplingParams(seed=1, max_tokens=20, structured=Structured(regex="[ab]{5}cdefghij[ab]{5}"))
    (want,) = auto.generate([[5, 6, 7]], [plain], progress=False)
    for _ in range(2):
        got = auto.generate([[5, 6, 7], [1, 2, 3]], [plain, bound], progress=False)[0]
        assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
