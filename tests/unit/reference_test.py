"""The float64 reference agrees with transformers, and its filters with transformers' processors."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
from oracle.tiny_models import TINY_MODELS, checksum, random_weights

from jaxllama.decode.params import SamplingParams
from jaxllama.model.config import LlamaConfig, RopeScaling
from jaxllama.model.params import param_specs

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = list(TINY_MODELS)
TOLERANCE = {"near": 5e-6, "far": 1e-3, "gaps": 1e-3}  # of the logits' spread; reasons in golden/README.md


@pytest.fixture(scope="module")
def tiny() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "tiny_models.npz"))


@pytest.fixture(scope="module")
def filters() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "filters.npz"))


def weights_of(name: str) -> dict[str, np.ndarray]:
    return random_weights(TINY_MODELS[name], NAMES.index(name))


# ---- The forward pass ----


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_for_weights_never_changes(tiny, name):
    weights = weights_of(name)
    assert checksum(weights) == tiny[f"{name}/sha256"]
    specs = param_specs(LlamaConfig.from_hf(TINY_MODELS[name]))
    assert {spec.hf_name: spec.shape for spec in specs} == {key: value.shape for key, value in weights.items()}


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_transformers(tiny, name, kind):
    config = LlamaConfig.from_hf(TINY_MODELS[name])
    want = tiny[f"{name}/{kind}_logits"]
    got = reference.llama_logits(weights_of(name), config, tiny[f"{name}/{kind}_ids"], tiny[f"{name}/{kind}_positions"])
    assert np.abs(got - want).max() < TOLERANCE[kind] * want.std()


@pytest.mark.parametrize("name", ["linear_rope", "llama31_like", "llama32_like_tied"])
def test_the_goldens_notice_a_missing_rope_scaling(tiny, name):
    config = LlamaConfig.from_hf(TINY_MODELS[name])
    unscaled = dataclasses.replace(config, rope=RopeScaling(theta=config.rope.theta))
    want = tiny[f"{name}/gaps_logits"]
    got = reference.llama_logits(weights_of(name), unscaled, tiny[f"{name}/gaps_ids"], tiny[f"{name}/gaps_positions"])
    assert np.abs(got - want).max() > 100 * TOLERANCE["gaps"] * want.std()


def test_only_distances_matter_to_rotary_attention(tiny):
    config, ids = LlamaConfig.from_hf(TINY_MODELS["llama31_like"]), tiny["llama31_like/near_ids"]
    here, there = (reference.llama_logits(weights_of("llama31_like"), config, ids, start) for start in (0, 20_000))
    np.testing.assert_allclose(here, there, atol=1e-9)


# ---- Filters against transformers ----


def kept(row: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(row)).tolist()


TWINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "temperature_0.7": lambda row: reference.filtered_logits(row, temperature=0.7),
    "temperature_1.6": lambda row: reference.filtered_logits(row, temperature=1.6),
    "top_k_1": lambda row: reference.keep_top_k(row, 1),
    "top_k_20": lambda row: reference.keep_top_k(row, 20),
    "top_k_300": lambda row: reference.keep_top_k(row, 300),
    "top_p_0.05": lambda row: reference.keep_top_p(row, 0.05),
    "top_p_0.9": lambda row: reference.keep_top_p(row, 0.9),
    "min_p_0.02": lambda row: reference.keep_min_p(row, 0.02),
    "min_p_1.0": lambda row: reference.keep_min_p(row, 1.0),
}
NUM_TIED_ROWS = 2  # transformers' top-p cuts between equal logits in the order of its sort


@pytest.mark.parametrize("case", TWINS)
def test_filters_agree_with_transformers(filters, case):
    first = NUM_TIED_ROWS if case.startswith("top_p") else 0
    for row, want in list(zip(filters["logits"], filters[case], strict=True))[first:]:
        got = TWINS[case](row.astype(np.float64))
        assert kept(got) == kept(want)
        np.testing.assert_allclose(got[kept(got)], want[kept(got)], rtol=1e-5)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_agrees_with_transformers(filters, penalty):
    for row, ids, want in zip(filters["logits"], filters["ids"], filters[f"repetition_penalty_{penalty}"], strict=True):
        prompt, output = np.split(ids, [filters["num_prompt"]])
        got = reference.apply_penalties(row, prompt.tolist(), output.tolist(), repetition_penalty=penalty)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_min_tokens_agrees_with_transformers(filters):
    for row, want in zip(filters["logits"], filters["min_tokens"], strict=True):
        got = reference.mask_stops_before(row, 12, 13, [int(filters["eos"])])
        assert kept(got) == kept(want)
        assert int(filters["eos"]) not in kept(got)


def test_the_whole_pipeline_agrees_with_transformers(filters):
    params = SamplingParams(
        temperature=0.8, top_k=30, top_p=0.85, min_p=0.05, repetition_penalty=1.2, min_tokens=13, max_tokens=20
    )
    rows = list(zip(filters["logits"], filters["ids"], filters["all"], strict=True))[NUM_TIED_ROWS:]
    for row, ids, want in rows:
        prompt, output = np.split(ids, [filters["num_prompt"]])
        got = reference.distribution(row, params, prompt.tolist(), output.tolist(), [int(filters["eos"])])
        assert np.flatnonzero(got).tolist() == kept(want)
        np.testing.assert_allclose(got, reference.softmax(want.astype(np.float64)), rtol=1e-5)


# ---- What the twins promise beyond transformers ----


def test_ties_at_a_threshold_are_all_kept():
    logits = np.log([0.3, 0.2, 0.2, 0.2, 0.1])
    assert kept(reference.keep_top_k(logits, 2)) == [0, 1, 2, 3]
    assert kept(reference.keep_top_p(logits, 0.45)) == [0, 1, 2, 3]
    assert kept(reference.keep_top_p(logits, 0.25)) == [0]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 0, -1])
@pytest.mark.parametrize("min_p", [0.0, 1.0])
def test_the_likeliest_token_always_survives(top_p, top_k, min_p):
    logits = np.random.default_rng(0).standard_normal(50)
    assert int(logits.argmax()) in kept(
        reference.filtered_logits(logits, temperature=0.5, top_k=top_k, top_p=top_p, min_p=min_p)
    )


def test_top_p_counts_the_probability_left_by_top_k():
    logits = np.log([0.4, 0.3, 0.2, 0.1])  # of the first two alone: 0.57, 0.43
    assert kept(reference.filtered_logits(logits, temperature=1, top_k=2, top_p=0.5)) == [0]
    assert kept(reference.filtered_logits(logits, temperature=1, top_p=0.5)) == [0, 1]


def test_temperature_comes_before_top_p():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(reference.filtered_logits(logits, temperature=0.2, top_p=0.7)) == [0]
    assert kept(reference.filtered_logits(logits, temperature=1, top_p=0.65)) == [0, 1]


def test_presence_and_frequency_are_openais_and_over_the_output_alone():
    got = reference.apply_penalties(np.zeros(5), [0, 0, 1], [1, 2, 2, 2], presence_penalty=0.5, frequency_penalty=0.25)
    np.testing.assert_allclose(got, [0, -0.75, -1.25, 0, 0])


def test_a_bias_is_penalised_as_part_of_the_logit():
    params = SamplingParams(logit_bias={1: 3.0}, repetition_penalty=2.0, temperature=1.0)
    got = reference.distribution(np.array([1.0, 1.0, 0.0]), params, prompt_ids=[1])
    np.testing.assert_allclose(got, reference.softmax(np.array([1.0, 2.0, 0.0])))


def test_temperature_zero_is_the_argmax_of_the_penalised_logits():
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    assert reference.distribution(np.array([1.0, 2.0, 1.5]), params, output_ids=[1]).tolist() == [0, 0, 1]
    assert reference.distribution(np.array([1.0, 2.0, 2.0]), SamplingParams(temperature=0)).tolist() == [0, 1, 0]


def test_ignore_eos_frees_the_model_s_stop_ids_but_not_the_request_s():
    row, params = np.zeros(4), SamplingParams(min_tokens=2, stop_token_ids=(1,))
    assert reference.distribution(row, params, eos_token_ids=[3]).tolist() == [0.5, 0, 0.5, 0]
    free = dataclasses.replace(params, ignore_eos=True)
    np.testing.assert_allclose(reference.distribution(row, free, eos_token_ids=[3]), [1 / 3, 0, 1 / 3, 1 / 3])
    assert reference.distribution(row, params, output_ids=[0, 0], eos_token_ids=[3]).tolist() == [0.25] * 4


def test_log_probabilities_are_of_the_raw_logits():
    logits = np.array([1000.0, 999.0, -1000.0])
    np.testing.assert_allclose(reference.log_probabilities(logits), [-0.313262, -1.313262, -2000.313262], atol=1e-6)


# ---- The goldens of the default model are complete ----


def test_default_logit_goldens_hold_64_positions():
    golden = np.load(GOLDEN / "default_logits.npz")
    names = sorted({key.split("/")[0] for key in golden if "/" in key})
    assert sum(len(golden[f"{name}/positions"]) for name in names) == 64
    assert max(len(golden[f"{name}/ids"]) for name in names) > 512
    for name in names:
        assert golden[f"{name}/top_logits"].shape == (len(golden[f"{name}/positions"]), 64)
        assert golden[f"{name}/positions"].max() == len(golden[f"{name}/ids"]) - 1


def test_greedy_goldens_have_no_margin_within_the_logit_tolerance():
    golden = json.loads((GOLDEN / "default_greedy.json").read_text())
    runs = {name: run for name, run in golden.items() if name != "origin"}
    assert len(runs) == 8
    assert all(len(run["ids"]) == 64 and run["min_margin"] > 2e-3 for run in runs.values())
