"""The mesh splits what it says it splits, and refuses what it cannot."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec

from jaxllama.errors import ConfigError
from jaxllama.mesh import MESH_AXES, RULES, make_mesh, param_shardings, partition_spec
from jaxllama.params import get_param, param_specs

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


@pytest.mark.parametrize(("data", "tp"), [(1, 9), (9, 1), (2, 5), (16, None), (0, None), (0, 1), (1, 0), (-1, 2), (1, -1)])
def test_an_impossible_mesh_is_refused(data, tp):
    with pytest.raises(ConfigError, match=r"data=.*tp="):
        make_mesh(EIGHT, tp=tp, data=data)


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
        assert query_head // EIGHT.q_per_kv == kv_head


def test_what_the_mesh_does_not_divide_is_replicated():
    config = tiny.config_of("wide_heads_tied")  # 6 heads, 2 KV heads, ffn 72, vocabulary 131
    mesh = make_mesh(config, tp=8)
    assert dict(mesh.shape) == {"data": 1, "kv": 2, "rep": 4}
    shardings = param_shardings(config, mesh)
    layer = shardings["layers"][0]
    assert shardings["embed_tokens"].is_fully_replicated
    assert layer["q_proj"].is_fully_replicated
    assert layer["k_proj"].spec == PartitionSpec(("kv",), None)
    assert layer["down_proj"].spec == PartitionSpec(None, ("kv", "rep"))


@pytest.mark.parametrize(
    "axes", [("vocab", "heads"), ("heads", "ffn"), ("kv_heads", "vocab"), ("kv_heads", "kv_heads"), ("rows", "rows")]
)
def test_two_dimensions_on_one_mesh_axis_are_an_error(axes):
    mesh = make_mesh(EIGHT, data=2, tp=4)
    with pytest.raises(ConfigError, match="two dimensions"):
        partition_spec(axes, EIGHT, mesh, num_rows=8)


def test_an_unknown_axis_is_named():
    with pytest.raises(ConfigError, match="'head'.*kv_heads"):
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
