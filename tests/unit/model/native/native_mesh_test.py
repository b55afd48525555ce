"""Packed matrices on meshes of CPU devices: each device packs and multiplies with what it has."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllama.errors import ConfigError
from jaxllama.model import native
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import MESH_AXES
from jaxllama.model.native import PackedWeight, pack, packed_rows, unpack
from jaxllama.model.params import QuantizedWeight

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(not native.is_available(), reason="needs AVX2 or NEON, and a C++ compiler"),
]

WEIGHTS = ("bfloat16", "float32", "int8")
BOTH = ("kv", "rep")
# Parts of outputs that do not fill a block, and of inputs that do not fill a line.
SPLITS = [((72, 40), (BOTH, None)), ((72, 40), (("kv",), None)), ((37, 36), (None, BOTH)), ((37, 40), (None, None))]


def mesh_of(data: int, kv: int, rep: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[: data * kv * rep]).reshape(data, kv, rep), MESH_AXES)


def sharded_weight(
    mesh: Mesh, shape: tuple[int, int], spec: tuple[Any, Any], dtype: str, *, whole_scale: bool = False
) -> Any:
    """A random matrix on the mesh; of int8 every device has all scales, or its own outputs'."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    place = NamedSharding(mesh, PartitionSpec(*spec))
    if dtype != "int8":
        return jax.device_put(w.astype(dtype), place)
    values, scale = quantize_rows(w)
    scale_spec = PartitionSpec() if whole_scale else PartitionSpec(spec[0])
    return QuantizedWeight(jax.device_put(values, place), jax.device_put(scale, NamedSharding(mesh, scale_spec)))


def dense(weight: Any) -> np.ndarray:
    """What a matrix stands for, in float64."""
    if isinstance(weight, QuantizedWeight):
        return np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)[:, None]
    return np.asarray(weight, np.float64)


@pytest.mark.parametrize("whole_scale", [False, True])
@pytest.mark.parametrize(("shape", "spec"), SPLITS)
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_packing_is_undone_where_the_parts_lie(dtype, shape, spec, whole_scale):
    weight = sharded_weight(mesh_of(2, 2, 2), shape, spec, dtype, whole_scale=whole_scale)
    packed = pack(weight)
    parts = [2 if axes == ("kv",) else 4 if axes else 1 for axes in spec]
    assert packed.part_shape == tuple(n // p for n, p in zip(shape, parts, strict=True))
    assert {shard.data.shape[0] for shard in packed.lines.addressable_shards} == {-(-packed.part_shape[0] // 16)}
    for back in (unpack(packed), jax.jit(unpack)(packed)):
        for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(weight), strict=True):
            np.testing.assert_array_equal(got, want)
    values = back.values if dtype == "int8" else back
    was = weight.values if dtype == "int8" else weight
    assert values.sharding.is_equivalent_to(was.sharding, 2)


def test_devices_with_the_same_part_share_its_memory():
    packed = pack(sharded_weight(mesh_of(2, 2, 1), (64, 32), (("kv",), None), "float32"))
    addresses = {shard.data.unsafe_buffer_pointer() for shard in packed.lines.addressable_shards}
    assert len(addresses) == 2


@pytest.mark.parametrize("shape", [(8,), (3, 5), (2, 3), (4, 1)])
@pytest.mark.parametrize(("matrix", "spec"), SPLITS)
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_products_and_rows_are_those_of_one_device(dtype, matrix, spec, shape):
    weight = sharded_weight(mesh_of(2, 2, 2), matrix, spec, dtype)
    packed, w = pack(weight), dense(weight)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((*shape, matrix[1])), jnp.bfloat16)
    (got,) = jax.jit(native.multiply)(x, packed)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(x, np.float64) @ w.T, atol=2e-6 * matrix[1] ** 0.5 * 4)
    if spec[1] is None:  # one sum, in the order of one device
        alone = pack(jax.tree.map(lambda part: jnp.asarray(np.asarray(part)), weight))
        np.testing.assert_array_equal(got, native.multiply(x, alone)[0])
    ids = jnp.asarray(np.random.default_rng(2).integers(0, matrix[0], shape))
    np.testing.assert_allclose(jax.jit(packed_rows)(packed, ids), w[np.asarray(ids)], rtol=1e-6)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("spec", [(BOTH, None), (None, BOTH)])
def test_a_row_s_bits_do_not_depend_on_the_others(dtype, spec):
    packed = pack(sharded_weight(mesh_of(2, 2, 2), (96, 576), spec, dtype))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((40, 576)), jnp.float32)
    multiply = jax.jit(native.multiply)
    together = np.asarray(multiply(x, packed)[0])
    for first, last in ((0, 1), (1, 3), (5, 11), (8, 40)):
        np.testing.assert_array_equal(multiply(x[first:last], packed)[0], together[first:last])
    np.testing.assert_array_equal(multiply(x.reshape(4, 10, 576), packed)[0], together.reshape(4, 10, 96))


def test_several_weights_at_once():
    mesh = mesh_of(1, 2, 2)
    several = [pack(sharded_weight(mesh, (80, 48), (axes, None), "bfloat16")) for axes in (BOTH, ("kv",), None)]
    x = jnp.asarray(np.random.default_rng(3).standard_normal((5, 48)), jnp.bfloat16)
    for y, weight in zip(jax.jit(native.multiply)(x, *several), several, strict=True):
        np.testing.assert_array_equal(y, native.multiply(x, weight)[0])


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8])
@pytest.mark.parametrize("data", [1, 2])
def test_rows_from_the_count_on_are_zeros(data, count):
    packed = pack(sharded_weight(mesh_of(data, 2, 1), (48, 32), (("kv",), None), "float32"))
    x = jnp.ones((8, 32))
    (got,) = jax.jit(lambda x, packed, count: native.multiply(x, packed, count=count))(x, packed, jnp.int32(count))
    whole = np.asarray(native.multiply(x, packed)[0])
    np.testing.assert_array_equal(got, np.where(np.arange(8)[:, None] < count, whole, 0))


def test_rows_of_another_length_are_refused():
    packed = pack(sharded_weight(mesh_of(1, 2, 1), (48, 32), (None, ("kv",)), "float32"))
    with pytest.raises(ConfigError, match="rows of 16 cannot be multiplied with weights of 32 inputs"):
        native.multiply(jnp.ones((2, 16)), packed)


def test_parts_are_added_in_the_order_of_the_devices():
    """1e8 and -1e8 leave of 1 what their order says."""
    mesh = mesh_of(1, 4, 1)
    weight = jax.device_put(
        jnp.asarray([[1e8, 1, -1e8, 1], [1, 1e8, -1e8, 1]], jnp.float32),
        NamedSharding(mesh, PartitionSpec(None, ("kv",))),
    )
    packed = pack(weight)
    assert isinstance(packed, PackedWeight)
    for rows in (1, 8, 512):
        np.testing.assert_array_equal(
            native.multiply(jnp.ones((rows, 4)), packed)[0], np.full((rows, 2), (1, 2)) - [0, 1]
        )
