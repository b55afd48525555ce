"""The mesh splits what it says it splits, and refuses what it cannot."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxllama import EngineOptions, SamplingParams
from jaxllama.decode.state import make_state, state_shapes, state_shardings
from jaxllama.errors import ConfigError
from jaxllama.model.mesh import MESH_AXES, RULES, make_mesh, mesh_shape, param_shardings, partition_spec, uneven_splits
from jaxllama.model.params import get_param, param_specs

pytestmark = pytest.mark.optimized

EIGHT = tiny.config_of("divisible")  # 8 heads, 4 KV heads, ffn 72, vocabulary 280


@pytest.mark.parametrize(
    ("tp", "kv", "rep"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 4, 2), (3, 1, 3), (6, 2, 3), (None, 4, 2)]
)
def test_tensor_parallelism_is_kv_times_rep(tp, kv, rep):
    mesh = make_mesh(EIGHT, tp=tp)
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 1, "kv": kv, "rep": rep}


@pytest.mark.parametrize(("data", "tp"), [(2, 2), (2, 4), (4, 2), (8, 1), (2, None), (1, 5)])
def test_a_mesh_uses_each_device_once(data, tp):
    mesh = make_mesh(EIGHT, tp=tp, data=data)
    assert mesh.shape["data"] == data
    assert mesh.size == data * (8 // data if tp is None else tp)
    assert len(set(mesh.devices.flat)) == mesh.size


def test_a_mesh_takes_the_devices_it_is_given():
    devices = jax.devices()[4:7]
    assert list(make_mesh(EIGHT, devices=devices).devices.flat) == devices


IMPOSSIBLE = [(1, 9), (9, 1), (2, 5), (16, None), (0, None), (0, 1), (1, 0), (-1, 2), (1, -1)]


@pytest.mark.parametrize(("data", "tp"), IMPOSSIBLE)
def test_an_impossible_mesh_is_refused(data, tp):
    with pytest.raises(ConfigError, match=r"data=.*tp="):
        make_mesh(EIGHT, tp=tp, data=data)


def test_too_many_data_replicas_are_counted_with_one_device_each():
    with pytest.raises(ConfigError, match="data=16 × tp=1 needs 16 devices, there are 8"):
        make_mesh(EIGHT, data=16)


@pytest.mark.parametrize(("data", "tp"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4)])
def test_weights_really_shard(data, tp):
    mesh = make_mesh(EIGHT, tp=tp, data=data)
    params = tiny.make_params(EIGHT, tiny.weights_of("divisible"), mesh)
    kv = math.gcd(4, tp)
    parts = {"vocab": tp, "ffn": tp, "heads": tp, "kv_heads": kv, "embed": 1}
    for spec in param_specs(EIGHT):
        array = get_param(params, spec)
        want = tuple(n // parts[axis] for n, axis in zip(spec.shape, spec.axes, strict=True))
        assert {shard.data.shape for shard in array.addressable_shards} == {want}, spec.name
        assert len(array.addressable_shards) == data * tp


@pytest.mark.parametrize("tp", [4, 8])
def test_a_shard_holds_whole_heads(tp):
    mesh = make_mesh(EIGHT, tp=tp)
    q_proj = tiny.make_params(EIGHT, tiny.weights_of("divisible"), mesh)["layers"][1]["q_proj"]
    assert {shard.index[0].start or 0 for shard in q_proj.addressable_shards} == {
        i * EIGHT.num_heads // tp * EIGHT.head_dim for i in range(tp)
    }


def test_the_query_heads_of_a_device_use_its_kv_heads():
    mesh = make_mesh(EIGHT, tp=8)
    layer = tiny.make_params(EIGHT, tiny.weights_of("divisible"), mesh)["layers"][0]
    q = {shard.device: shard.index[0].start or 0 for shard in layer["q_proj"].addressable_shards}
    k = {shard.device: shard.index[0].start or 0 for shard in layer["k_proj"].addressable_shards}
    for device in mesh.devices.flat:
        query_head, kv_head = q[device] // EIGHT.head_dim, k[device] // EIGHT.head_dim
        assert query_head // (EIGHT.num_heads // EIGHT.num_kv_heads) == kv_head


def test_what_the_mesh_does_not_divide_is_replicated():
    config = tiny.config_of("wide_heads_tied")  # 6 heads, 2 KV heads, ffn 72, vocabulary 131
    mesh = make_mesh(config, tp=8)
    assert dict(mesh.shape) == {"data": 1, "kv": 2, "rep": 4}
    shardings = param_shardings(config, mesh)
    layer = shardings["layers"][0]
    assert shardings["embed_tokens"].is_fully_replicated
    assert layer["q_proj"].spec == PartitionSpec(("kv",), None), "as far as the KV heads are"
    assert layer["k_proj"].spec == PartitionSpec(("kv",), None)
    assert layer["down_proj"].spec == PartitionSpec(None, ("kv", "rep"))


# Query and KV heads of R1-Distill-Qwen 1.5B, 7B, 14B and 32B, and of a 70B: how many ways so many devices split them.
@pytest.mark.parametrize(
    ("heads", "parts"),
    [
        ((12, 2), {1: 1, 2: 2, 4: 4, 8: 2, 16: 2}),
        ((28, 4), {1: 1, 2: 2, 4: 4, 8: 4, 16: 4}),
        ((40, 8), {1: 1, 2: 2, 4: 4, 8: 8, 16: 8}),
        ((64, 8), {1: 1, 2: 2, 4: 4, 8: 8, 16: 16}),
    ],
)
def test_heads_that_devices_do_not_divide_are_on_several_and_it_is_said(heads, parts):
    config = dataclasses.replace(EIGHT, num_heads=heads[0], num_kv_heads=heads[1], intermediate_size=64)
    config = dataclasses.replace(config, vocab_size=160)
    for tp, want in parts.items():
        mesh = AbstractMesh(mesh_shape(config, tp=tp, data=1), MESH_AXES)
        (entry,) = partition_spec(("heads",), config, mesh)
        axes = (entry,) if isinstance(entry, str) else entry or ()
        assert math.prod(mesh.shape[axis] for axis in axes) == want
        told = [note for note in uneven_splits(config, mesh) if "query heads" in note]
        same = f"{heads[0]} query heads are split over {want} of {tp} devices: {tp // want} hold the same"
        assert told == ([] if want == tp else [same])


@pytest.mark.parametrize(
    "axes", [("vocab", "heads"), ("heads", "ffn"), ("kv_heads", "vocab"), ("kv_heads", "kv_heads"), ("rows", "rows")]
)
def test_two_dimensions_on_one_mesh_axis_are_an_error(axes):
    mesh = make_mesh(EIGHT, data=2, tp=4)
    with pytest.raises(ConfigError, match="two dimensions"):
        partition_spec(axes, EIGHT, mesh, num_rows=8)


def test_an_unknown_axis_is_named():
    with pytest.raises(ConfigError, match=r"'head'.*kv_heads"):
        partition_spec(("head", "embed"), EIGHT, make_mesh(EIGHT, tp=1))


def test_rows_are_split_over_data():
    mesh = make_mesh(EIGHT, data=2, tp=2)
    assert partition_spec(("rows", "vocab"), EIGHT, mesh, num_rows=6) == PartitionSpec(("data",), ("kv",))
    assert partition_spec(("rows", None), EIGHT, mesh, num_rows=5) == PartitionSpec(None, None)


def test_every_rule_names_mesh_axes():
    assert {axis for axes in RULES.values() for axis in axes} == set(MESH_AXES)


def test_a_mesh_of_one_device_splits_nothing():
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
    for spec in param_specs(EIGHT):
        assert partition_spec(spec.axes, EIGHT, mesh) == PartitionSpec(*[None] * len(spec.axes))


# ---- The same results on every mesh ----

MESHES = [("divisible", 1, tp) for tp in (1, 2, 4, 8)] + [("divisible", 2, 2)]
# Heads that 4 and 8 devices do not divide, a tied head, a vocabulary that nothing divides.
MESHES += [("wide_heads_tied", 2, 4), ("wide_heads_tied", 1, 8)]
TWO_ROWS = EngineOptions(max_rows=2, max_context=64, page_size=8, chunk_sizes=(32,))


@pytest.mark.parametrize(("name", "data", "tp"), MESHES)
def test_logits_and_greedy_tokens_are_the_same_on_every_mesh(name, data, tp):
    prompts = [tiny.prompt_of(name, length, seed=length) for length in (40, 3, 33)]
    with tiny.make_llama(name, data=data, tp=tp, options=TWO_ROWS) as llama:
        logits = llama.logits(prompts[0])
        completions = llama.generate(prompts, SamplingParams(temperature=0, max_tokens=10, logprobs=1, ignore_eos=True))
    want = tiny.reference_logits(name, prompts[0])
    tolerance = 5e-6 * max(1.0, want.std())  # logits of the tied model spread by 7
    assert np.abs(logits - want).max() < tolerance
    for prompt, completion in zip(prompts, completions, strict=True):
        tiny.assert_greedy(name, prompt, completion.token_ids, margin=tolerance)
        assert len(completion.token_ids) == 10
        assert completion.logprobs is not None
        exact = tiny.reference_logits(name, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        for row, token in zip(exact, completion.logprobs, strict=True):
            assert abs(token.logprob - reference.log_probabilities(row)[token.token_id]) < tolerance


def test_sampled_tokens_are_the_same_on_every_mesh():
    prompts = [tiny.prompt_of("divisible", length, seed=length) for length in (40, 3, 33)]
    params = SamplingParams(
        seed=3,
        max_tokens=10,
        ignore_eos=True,
        top_k=50,
        top_p=0.95,
        min_p=0.001,
        repetition_penalty=1.2,
        logit_bias={5: 1.0},
    )
    outputs = []
    for data, tp in ((1, 1), (1, 8), (2, 2)):
        with tiny.make_llama("divisible", data=data, tp=tp, options=TWO_ROWS) as llama:
            outputs.append([completion.token_ids for completion in llama.generate(prompts, params)])
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_cache_and_the_rows_really_shard():
    with tiny.make_llama("divisible", data=2, tp=2, options=TWO_ROWS) as llama:
        llama.generate([1, 2, 3], SamplingParams(max_tokens=1))
        on_four = [x for x in jax.live_arrays() if len(x.sharding.device_set) == 4]
        # A pool: pages of 8 tokens, 4 keys and 4 values, head_dim 6. A device holds the keys and values of two heads.
        pool = next(x for x in on_four if x.ndim == 4 and x.shape[1:] == (8, 8, 6))
        assert {shard.data.shape[2] for shard in pool.addressable_shards} == {4}
        # The pages are split between two rows, so that nothing is kept twice.
        assert {2 * shard.data.shape[0] for shard in pool.addressable_shards} == {pool.shape[0]}
        assert len({shard.index for shard in pool.addressable_shards}) == 4


# ---- int8 ----

INT8 = dataclasses.replace(TWO_ROWS, kv_dtype="int8")


@pytest.fixture(scope="module")
def int8_on_one_device() -> tuple[np.ndarray, list[tuple[int, ...]]]:
    return int8_outputs(1, 1)


def int8_outputs(data: int, tp: int) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Logits and greedy tokens of int8 weights and an int8 cache."""
    prompts = [tiny.prompt_of("divisible", length, seed=length) for length in (40, 3, 33)]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with tiny.make_llama("divisible", data=data, tp=tp, quantize="int8", options=INT8) as llama:
        logits = llama.logits(prompts[0])
        return logits, [completion.token_ids for completion in llama.generate(prompts, params)]


@pytest.mark.parametrize(("data", "tp"), [(1, 2), (1, 4), (1, 8), (2, 2)])
def test_int8_gives_the_same_tokens_on_every_mesh(int8_on_one_device, data, tp):
    want, want_tokens = int8_on_one_device
    logits, tokens = int8_outputs(data, tp)
    assert tokens == want_tokens
    # Sums in another order round a key or value to another integer now and then.
    assert np.abs(logits - want).mean() < 1e-4 * want.std()


def test_int8_weights_and_scales_really_shard():
    mesh = make_mesh(EIGHT, tp=4)
    params = tiny.make_params(EIGHT, tiny.weights_of("divisible"), mesh, quantize="int8")
    layer = params["layers"][0]
    q, o = layer["q_proj"], layer["o_proj"]
    assert {shard.data.shape for shard in q.values.addressable_shards} == {(12, 52)}
    assert {shard.data.shape for shard in q.scale.addressable_shards} == {(12,)}
    # Row-parallel: each device has a part of every output channel, and so every scale.
    assert {shard.data.shape for shard in o.values.addressable_shards} == {(52, 12)}
    assert {shard.data.shape for shard in o.scale.addressable_shards} == {(52,)}


def test_the_scales_of_the_cache_shard_with_it():
    shapes = state_shapes(EIGHT, num_rows=4, num_pages=5, page_size=4, max_context=16, dtype=jnp.int8)
    pool = make_state(shapes, state_shardings(EIGHT, make_mesh(EIGHT, tp=4), shapes)).pool
    assert pool.scales is not None
    assert {shard.data.shape[1] for shard in pool.pages.addressable_shards} == {2}
    assert {shard.data.shape[1] for shard in pool.scales.addressable_shards} == {2}
