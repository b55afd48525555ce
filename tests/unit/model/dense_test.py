"""The plain forward pass: transformers' logits, hidden states, attention and gradients; patches; other weights."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllama import Llama, SamplingParams
from jaxllama.errors import CheckpointError, ContextLengthError, RequestError
from jaxllama.model.dense import POINTS, Patch

pytestmark = pytest.mark.optimized

NAME = "divisible"
IDS = tiny.prompt_of(NAME, 20)
GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "inside.npz")


@pytest.mark.parametrize("name", ["wide_heads_tied", "llama31_like"])
def test_what_is_within_is_transformers(name):
    """Hidden states, attention and the gradient with respect to the embeddings, made by oracle/make_inside.py."""
    ids = GOLDEN[f"{name}/ids"].tolist()
    with tiny.make_llama(name) as llama:
        trace = llama.trace(ids, ("resid_pre", "attention", "resid_post"))
        saliency = jax.grad(lambda x: llama.forward(x)[0, -1, GOLDEN[f"{name}/token"]])(llama.embed([ids]))
    hidden = GOLDEN[f"{name}/hidden_states"]
    np.testing.assert_allclose(trace["resid_pre"], hidden, atol=1e-4)
    np.testing.assert_allclose(trace["resid_post"][:-1], hidden[1:], atol=1e-4)
    np.testing.assert_allclose(trace["attention"], GOLDEN[f"{name}/attentions"], atol=1e-4)
    np.testing.assert_allclose(trace.logits, GOLDEN[f"{name}/logits"], atol=1e-4)
    np.testing.assert_allclose(saliency[0], GOLDEN[f"{name}/gradient"], atol=1e-4)


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"data": 2, "tp": 2}], ids=str)
def test_it_has_the_logits_of_the_paged_pass_wherever_padding_is(options):
    tokens, mask = np.zeros((2, 24), np.int32), np.zeros((2, 24), np.bool_)
    tokens[0, 4:], mask[0, 4:] = IDS, True
    tokens[1, :20], mask[1, :20] = IDS, True
    with tiny.make_llama(**options) as llama:
        expected = llama.logits(IDS)
        found = llama.forward(tokens, mask)
        lens = llama.unembed(llama.trace(IDS, ("resid_post",), [-1 + llama.config.num_layers])["resid_post"])
    for logits in (found[0, 4:], found[1, :20], lens[0]):
        np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_gradients_are_those_of_finite_differences(llama: Llama):
    """With respect to the input and to weights; `remat` changes how they are computed and not what they are."""
    params, x = llama.plain_params(), llama.embed([IDS])

    def loss(x: Any, params: Any, remat: bool = False) -> Any:
        return jax.nn.logsumexp(llama.forward(x, params=params, remat=remat)[0, -1])

    of_x, of_params = jax.grad(loss, argnums=(0, 1))(x, params)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), (x, params))
    step = 1e-3
    ahead, behind = (
        loss(*jax.tree.map(lambda leaf, d, sign=sign: leaf + sign * step * d, (x, params), direction))
        for sign in (1, -1)
    )
    along = sum(
        jnp.vdot(d, g) for d, g in zip(jax.tree.leaves(direction), jax.tree.leaves((of_x, of_params)), strict=True)
    )
    assert float((ahead - behind) / (2 * step)) == pytest.approx(float(along), rel=2e-2)
    again = jax.jit(jax.grad(lambda x: loss(x, params, True)))(x)
    np.testing.assert_allclose(again, of_x, atol=1e-6)


def test_gradients_reach_the_input_through_int8_weights():
    with tiny.make_llama(quantize="int8") as llama:
        x, plain = llama.embed([IDS]), llama.plain_params()
        gradients = [jax.grad(lambda x, p=p: llama.forward(x, params=p)[0, -1, 5])(x) for p in (None, plain)]
        np.testing.assert_allclose(*gradients, atol=1e-5)
        assert float(jnp.abs(gradients[0]).max()) > 0


def test_a_patch_changes_what_comes_after_it_and_nothing_before(llama: Llama):
    value = np.arange(llama.config.hidden_size, dtype=np.float32) / 10
    plain = llama.trace(IDS, tuple(POINTS))
    patch = Patch("resid_post", 0, value, positions=(7,), mode="add")
    patched = llama.trace(IDS, tuple(POINTS), patches=[patch])
    np.testing.assert_array_equal(patched["resid_post"][0, 7], plain["resid_post"][0, 7] + value)
    np.testing.assert_array_equal(patched["resid_mid"][0], plain["resid_mid"][0])
    np.testing.assert_array_equal(patched.logits[:7], plain.logits[:7])
    assert float(jnp.abs(patched.logits[7:] - plain.logits[7:]).max(axis=1).min()) > 1e-4
    # What is put where it already is changes no bit, of every kind of value, of one head of it too.
    same = [Patch(what, 1, plain[what][1]) for what in POINTS]
    same += [Patch(what, 1, plain[what][1, :, 2], head=2) for what in ("q", "k", "v")]
    same.append(Patch("attention", 1, plain["attention"][1, 3], head=3))
    np.testing.assert_array_equal(llama.trace(IDS, tuple(POINTS), patches=same).logits, plain.logits)


def test_new_values_of_a_patch_compile_nothing(llama: Llama):
    def run(value: float) -> Any:
        patch = Patch("attn_out", 1, np.full(llama.config.hidden_size, value, np.float32), mode="add")
        return llama.forward([IDS], patches=[patch])

    run(0.0)
    before = llama.engine.stats().num_compilations
    assert not np.array_equal(run(1.0), run(2.0))
    assert llama.engine.stats().num_compilations == before


def test_what_cannot_be_is_refused_by_name(llama: Llama):
    for call, param, message in (
        (lambda: llama.trace(IDS, "hook_resid"), "what", "resid_pre"),
        (lambda: llama.trace(IDS, layers=[0, 9]), "layers", "no layer 9; there are 0 to 1"),
        (lambda: llama.trace([]), "ids", "at least one"),
        (lambda: llama.trace([280]), "ids", "0 to 279"),
        (lambda: llama.trace(IDS)["q"], "what", "was not traced"),
        (lambda: llama.forward([IDS], patches=[Patch("q", 5, 0.0)]), "patches", "no layer 5"),
        (lambda: Patch("query", 0, 0.0), "patches", "resid_pre"),
        (lambda: Patch("mlp_out", 0, 0.0, head=1), "patches", "has no heads"),
        (lambda: Patch("q", 0, 0.0, mode="sub"), "patches", "'set' or 'add'"),
    ):
        with pytest.raises(RequestError, match=message) as error:
            call()
        assert error.value.param == param
    with pytest.raises(ContextLengthError):
        llama.forward(np.zeros((1, llama.config.max_position_embeddings + 1), np.int32))


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"tp": 2}], ids=str)
def test_other_weights_take_the_place_of_the_model_s(options):
    params, prompt = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), tiny.prompt_of(NAME, 33)
    with tiny.make_llama(**options) as llama:
        plain = llama.plain_params()
        before = llama.generate(prompt, params)
        compiled = llama.engine.stats().num_compilations
        other = {**plain, "layers": plain["layers"][::-1]}
        llama.update_params(other)
        changed = llama.generate(prompt, params)
        tiny_logits = llama.logits(prompt)
        np.testing.assert_allclose(llama.forward([prompt])[0], tiny_logits, atol=2e-5)
        assert changed.token_ids != before.token_ids
        assert llama.params_version == 1
        # Nothing that the old weights wrote is found again.
        assert llama.engine.stats().num_prompt_tokens_cached == 0
        llama.update_params(plain)
        assert llama.generate(prompt, params).token_ids == before.token_ids
        reached, release = threading.Event(), threading.Event()
        request = llama.engine.submit(prompt, params, lambda _: (reached.set(), release.wait(60)))
        assert reached.wait(60)
        with pytest.raises(RequestError, match="while requests run"):
            llama.update_params(plain)
        release.set()
        request.cancel()
        with pytest.raises(CheckpointError, match=r"norm is missing; lm_head has shape \(1,\), expected \(280, 52\)"):
            llama.update_params({**{k: v for k, v in plain.items() if k != "norm"}, "lm_head": np.zeros(1)})
    assert compiled > 0
