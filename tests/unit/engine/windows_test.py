"""Where every layer has a window, a running request gives its pages back before it: nothing else changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
from collector import Collector, assert_idle, held, run, watch_saved_pages

from jaxllama import EngineOptions, Llama, SamplingParams
from jaxllama.model import native

pytestmark = pytest.mark.optimized

PAGE, CONTEXT, WINDOW, BLOCK = 4, 400, 5, 128
OPTIONS = EngineOptions(
    max_rows=4, max_context=CONTEXT, page_size=PAGE, num_pages=CONTEXT // PAGE + 1, chunk_sizes=(32,), dispatch_s=1e-6
)
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}


def make_model(**options: Any) -> Llama:
    return tiny.make_llama("divisible", options=dataclasses.replace(OPTIONS, **options), **MISTRAL)


def sampled(seed: int, num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=1, seed=seed, max_tokens=num_tokens, ignore_eos=True, logprobs=2)


def answers(llama: Llama, scope: str) -> list[Any]:
    """Four rows of one prompt, as choices of one request, and four more of others that begin like it or are short."""
    stem = tiny.prompt_of("divisible", 140)
    prompts = [stem] * 4 + [stem[:135] + [7] * 30, stem[:5], [3] * 190, [9]]
    with held(llama.engine):
        got = [
            Collector(llama.engine, prompt, sampled(seed, min(170, CONTEXT - len(prompt))), cache_scope=scope)
            for seed, prompt in enumerate(prompts)
        ]
    return [(done.wait().tokens, done.logprobs, done.finish_reason) for done in got]


@pytest.mark.parametrize("has_kernels", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_pages_before_all_windows_are_given_back_and_no_bit_changes(has_kernels, monkeypatch):
    """With drafts, choices, requests set aside, and prompts found in the cache; beside an engine that keeps all."""
    if not has_kernels:
        monkeypatch.setattr(native, "is_available", lambda: False)
    saved = watch_saved_pages(monkeypatch)
    with make_model(speculation="lookup") as llama:
        got = answers(llama, "given back")
        assert answers(llama, "given back") == got
        assert llama.engine.stats().num_prompt_tokens_cached > 0
        assert_idle(llama.engine)
        num_saved, longest = len(saved), max(saved)
        assert num_saved > 0, "nobody was set aside"
        llama.engine._scheduler._window = None
        assert answers(llama, "kept") == got
        assert len(saved) - num_saved > num_saved / 2, "pages that are kept are fewer"
        assert max(saved[num_saved:]) > longest, "a copy is of the window alone"
        assert_idle(llama.engine)


def test_a_long_reply_holds_a_bounded_number_of_pages():
    used: list[int] = []
    with make_model() as llama:
        llama.engine.on_steps = lambda _: used.append(llama.engine.stats().num_pages_used)
        run(llama.engine, [1, 2, 3], sampled(1, CONTEXT - 3))
        assert_idle(llama.engine)
    # The window, a block that is seen in part, and what two dispatches of up to 32 tokens may write.
    assert BLOCK // PAGE < max(used) <= (WINDOW + BLOCK + 2 * 32) // PAGE + 2


def test_a_model_with_a_layer_that_sees_all_keeps_its_pages():
    used: list[int] = []
    layers = {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "num_hidden_layers": 2}
    changes = MISTRAL | layers | {"layer_types": ["sliding_attention", "full_attention"]}
    with tiny.make_llama("divisible", options=OPTIONS, **changes) as llama:
        llama.engine.on_steps = lambda _: used.append(llama.engine.stats().num_pages_used)
        run(llama.engine, [1, 2, 3], sampled(1, CONTEXT - 3))
    assert max(used) == CONTEXT // PAGE
