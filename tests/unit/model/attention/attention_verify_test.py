"""A few tokens of a row verified at once are as many decoded one after another, in every implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from jaxllama.model import native
from jaxllama.model.attention import ReferenceAttention, ShardedAttention
from jaxllama.model.attention.cpu import CpuAttention
from jaxllama.model.attention.tpu import TpuAttention
from jaxllama.model.attention.tpu_int8 import Int8TpuAttention
from jaxllama.model.cache import KVPool, kv_pool_axes
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import make_mesh, num_page_shards, partition_spec

pytestmark = pytest.mark.optimized

TOKENS = 4
LENGTHS = (1, 126, 300, 37)
"""Before the tokens: at a page's beginning, over the border of a page of 128, in another block, anywhere."""
NUM_TOKENS = (4, 4, 0, 2)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128


class Inputs:
    """Rows in the second of two layers; page 0 of each is nobody's. What is past the rows' ends is `past`."""

    def __init__(self, kv_dtype: str, *, page_size: int = 128, past: float = 1e4) -> None:
        rng = np.random.default_rng(0)
        width = 448 // page_size
        self.pages_per_layer = 1 + len(LENGTHS) * width
        pool = rng.standard_normal((2 * self.pages_per_layer, page_size, 2 * KV_HEADS, HEAD_DIM))
        order = rng.permutation(np.arange(1, self.pages_per_layer))
        self.table = order.reshape(len(LENGTHS), width) + self.pages_per_layer
        for row, length in enumerate(LENGTHS):
            own = pool[self.table[row]].reshape(-1, *pool.shape[2:])
            own[length:] = past
            pool[self.table[row]] = own.reshape(width, *pool.shape[1:])
        dtype = jnp.float32 if kv_dtype == "float32" else jnp.bfloat16
        self.pool = KVPool(jnp.asarray(pool, dtype), None)
        if kv_dtype == "int8":
            values, scales = quantize_rows(pool.swapaxes(1, 2))
            self.pool = KVPool(jnp.asarray(values), jnp.asarray(scales))
        self.q = jnp.asarray(rng.standard_normal((len(LENGTHS), TOKENS, HEADS, HEAD_DIM)), dtype)
        self.kv = jnp.asarray(rng.standard_normal((len(LENGTHS), TOKENS, 2 * KV_HEADS, HEAD_DIM)), dtype)
        self.table = jnp.asarray(self.table, jnp.int32)

    def verify(self, attention: Any) -> tuple[np.ndarray, KVPool]:
        run = jax.jit(attention.verify)
        num = jnp.array(NUM_TOKENS, jnp.int32)
        out, pool = run(self.q, self.kv, self.pool, self.table, jnp.array(LENGTHS, jnp.int32), num)
        return np.asarray(out.astype(jnp.float32)), pool

    def decode(self, attention: Any) -> tuple[np.ndarray, KVPool]:
        run, pool, outs = jax.jit(attention.decode), self.pool, []
        for token in range(TOKENS):
            positions, active = jnp.array(LENGTHS, jnp.int32) + token, token < jnp.array(NUM_TOKENS)
            out, pool = run(self.q[:, token], self.kv[:, token], pool, self.table, positions, active)
            outs.append(np.asarray(out.astype(jnp.float32)))
        return np.stack(outs, 1), pool

    def assert_same(self, got: tuple[np.ndarray, KVPool], want: tuple[np.ndarray, KVPool], tolerance: float) -> None:
        """The outputs of real tokens, and what the rows' pages hold up to their ends."""
        for row, (length, num) in enumerate(zip(LENGTHS, NUM_TOKENS, strict=True)):
            np.testing.assert_allclose(got[0][row, :num], want[0][row, :num], atol=tolerance, rtol=0)
            for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
                own = [np.asarray(part[self.table[row]].astype(jnp.float32)) for part in (one, other)]
                if got[1].heads_first:
                    own = [part.swapaxes(1, 2) for part in own]
                first, second = (part.reshape(-1, *part.shape[2:])[: length + num] for part in own)
                np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_the_reference_verifies_as_it_decodes(kv_dtype):
    x = Inputs(kv_dtype, page_size=16)
    x.assert_same(x.verify(ReferenceAttention()), x.decode(ReferenceAttention()), 2e-6 if kv_dtype == "float32" else 0)


@pytest.mark.skipif(not native.is_available(), reason="no kernels for this CPU")
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_the_cpu_s_kernels_verify_as_they_decode_in_every_bit(kv_dtype):
    x = Inputs(kv_dtype, page_size=16)
    x.assert_same(x.verify(CpuAttention()), x.decode(CpuAttention()), 0)


@pytest.mark.parametrize("kernel", [ReferenceAttention(), CpuAttention()], ids=["reference", "kernels"])
def test_what_stands_after_a_row_never_reaches_it(kernel):
    if isinstance(kernel, CpuAttention) and not native.is_available():
        pytest.skip("no kernels for this CPU")
    clean, poisoned = Inputs("bfloat16", page_size=16), Inputs("bfloat16", page_size=16, past=np.nan)
    poisoned.assert_same(poisoned.verify(kernel), clean.verify(kernel), 0)


@pytest.mark.parametrize("window", [3, 130])
def test_the_reference_verifies_in_a_window(window):
    x = Inputs("float32", page_size=16)

    class Windowed:
        def __init__(self) -> None:
            self.decode = lambda *args: ReferenceAttention().decode(*args, window=window)
            self.verify = lambda *args: ReferenceAttention().verify(*args, window=window)

    x.assert_same(x.verify(Windowed()), x.decode(Windowed()), 2e-6)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_tpu_s_kernels_verify_as_the_reference(kv_dtype):
    pytest.importorskip("flywheel_tpu")
    x = Inputs(kv_dtype, past=0.5)
    kind = {"bfloat16": TpuAttention, "int8": Int8TpuAttention}[kv_dtype]
    # Both round probabilities to bfloat16, at other points.
    x.assert_same(x.verify(kind(num_layers=2, interpret=True)), x.verify(ReferenceAttention()), 0.04)


@pytest.mark.parametrize(("data", "tp", "kv_heads"), [(2, 2, 2), (1, 4, 2), (2, 4, 1)])
def test_a_mesh_verifies_as_one_device(data, tp, kv_heads):
    config = tiny.config_of("divisible", num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8)
    mesh = make_mesh(config, data=data, tp=tp)
    shards, rows, pages = num_page_shards(mesh), 2, 9
    rng = np.random.default_rng(1)
    q, kv = (
        jnp.asarray(rng.standard_normal((shards * rows, TOKENS, heads, 8)), jnp.float32) for heads in (4, 2 * kv_heads)
    )
    pools = [jnp.asarray(rng.standard_normal((pages, 4, 2 * kv_heads, 8)), jnp.float32) for _ in range(shards)]
    table = jnp.asarray(np.stack([rng.permutation(np.arange(1, pages)).reshape(rows, -1) for _ in range(shards)]))
    positions = jnp.asarray(rng.integers(0, 12, (shards, rows)), jnp.int32)
    num = jnp.asarray(rng.integers(0, TOKENS + 1, (shards, rows)), jnp.int32)
    axes = kv_pool_axes(jnp.float32)
    where = NamedSharding(mesh, partition_spec(axes.pages, config, mesh))
    whole = KVPool(jax.device_put(jnp.concatenate(pools), where), None)
    verify = jax.jit(ShardedAttention(ReferenceAttention(), mesh).verify)
    flat = (table.reshape(shards * rows, -1), positions.ravel(), num.ravel())
    got, pool = verify(q, kv, whole, *flat)
    one = jax.jit(ReferenceAttention().verify)
    for shard in range(shards):
        own = slice(shard * rows, (shard + 1) * rows)
        want, own_pool = one(q[own], kv[own], KVPool(pools[shard], None), table[shard], positions[shard], num[shard])
        for row in range(rows):
            real = int(num[shard, row])
            np.testing.assert_allclose(got[own][row, :real], want[row, :real], atol=2e-6)
        np.testing.assert_array_equal(pool.pages[shard * pages : (shard + 1) * pages], own_pool.pages)
