"""Groups of devices that serve their own rows (`data`): what is asked for one row holds in either, as on one device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny

from jaxllama import Completion, Llama, SamplingParams, Structured
from jaxllama.decode.steering import Steering

pytestmark = pytest.mark.optimized

NAME = "divisible"
OPTIONS = replace(tiny.SMALL, max_rows=8)
BASE = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, logprobs=3)


def vector(seed: int) -> np.ndarray:
    width = tiny.MODELS[NAME]["hidden_size"]
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


CONTROLS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "logit bias": {"logit_bias": {5: 3.0, 17: -100.0, 100: 2.5}},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "steering": {"steering": Steering(0, vector(1), 1.5)},
    "another vector": {"steering": Steering(1, vector(2), 2.0), "temperature": 0.8, "seed": 4},
    "a mask": {"ignore_eos": False, "structured": Structured(regex="[a-f]{5}é[0-9]{3}"), "temperature": 1, "seed": 5},
    "another mask, steered": {
        "ignore_eos": False,
        "structured": Structured(regex="(ab|cd){3}x"),
        "steering": Steering(0, vector(3)),
    },
    "filters": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 7},
    "no end before": {"logit_bias": {7: 100.0}, "stop_token_ids": (7,), "min_tokens": 5, "temperature": 1, "seed": 8},
}
PARAMS = [replace(BASE, **values) for values in CONTROLS.values()]
PROMPTS = [tiny.prompt_of(NAME, 3 + 5 * i, i) for i in range(len(PARAMS))]


def replies(llama: Llama) -> list[list[Completion]]:
    """To all at once, in two orders, so that rows of either group are asked for each."""
    forwards = llama.generate(PROMPTS, PARAMS)
    return [forwards, llama.generate(PROMPTS[::-1], PARAMS[::-1])[::-1]]


@pytest.mark.parametrize(
    ("tp", "speculation"),
    [(1, "off"), pytest.param(2, "off", marks=pytest.mark.slow), pytest.param(1, "auto", marks=pytest.mark.slow)],
)
def test_what_one_row_is_asked_for_holds_in_either_group(tokenizer_folder, tp, speculation):
    options = replace(OPTIONS, speculation=speculation)
    with tiny.make_llama(options=OPTIONS, tokenizer_folder=tokenizer_folder) as llama:
        want = llama.generate(PROMPTS, PARAMS)
    assert len({tuple(reply.token_ids) for reply in want}) == len(CONTROLS)
    with tiny.make_llama(data=2, tp=tp, options=options, tokenizer_folder=tokenizer_folder) as llama:
        assert llama.engine.platform.num_groups == 2
        for found in replies(llama):
            for name, reply, expected in zip(CONTROLS, found, want, strict=True):
                assert reply.token_ids == expected.token_ids, name
                assert reply.finish_reason == expected.finish_reason, name
                got, exact = ([token.logprob for token in each.logprobs] for each in (reply, expected))
                np.testing.assert_allclose(got, exact, atol=1e-4, err_msg=name)
