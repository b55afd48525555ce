"""Attention on a mesh does on every shard what one device does with that shard's rows and pages."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from jaxllama.model import native
from jaxllama.model.attention import Attention, ReferenceAttention, ShardedAttention
from jaxllama.model.attention.cpu import CpuAttention
from jaxllama.model.attention.tpu import TpuAttention
from jaxllama.model.attention.tpu_int8 import Int8TpuAttention
from jaxllama.model.cache import KVPool, clear_pages, kv_pool_axes, put_pages, read_pages
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import make_mesh, num_page_shards, partition_spec
from jaxllama.model.platforms.describe import describe_platform

pytestmark = pytest.mark.optimized

LAYERS = 2
REFERENCE = ReferenceAttention()


@dataclass(frozen=True)
class Case:
    """`lengths` are of the rows of one shard; all shards have the same, in another order."""

    heads: int
    kv_heads: int
    data: int
    tp: int
    num_shards: int
    kv_dtype: str = "float32"
    head_dim: int = 8
    page_size: int = 4
    lengths: tuple[int, ...] = (1, 9, 4)


class Inputs:
    """A pool of random pages whose shards have nothing in common, page tables and tokens."""

    def __init__(self, case: Case) -> None:
        self.rng = rng = np.random.default_rng(case.heads + case.tp)
        self.case = case
        self.config = tiny.config_of(
            "divisible",
            num_hidden_layers=LAYERS,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            head_dim=case.head_dim,
        )
        self.mesh = make_mesh(self.config, data=case.data, tp=case.tp)
        assert num_page_shards(self.mesh) == case.num_shards
        self.dtype = jnp.float32 if case.kv_dtype == "float32" else jnp.bfloat16
        counts = [-(-length // case.page_size) for length in case.lengths]
        self.pages_per_layer = 1 + sum(counts)
        width = max(counts) + 1
        self.lengths, tables, pools = [], [], []
        for _ in range(case.num_shards):
            order = iter(rng.permutation(np.arange(1, self.pages_per_layer)))
            for index in rng.permutation(len(counts)):
                own = [next(order) for _ in range(counts[index])]
                tables.append(np.pad(np.array(own, np.int32), (0, width - len(own))))
                self.lengths.append(case.lengths[index])
            shape = (LAYERS * self.pages_per_layer, case.page_size, 2 * case.kv_heads, case.head_dim)
            pools.append(rng.standard_normal(shape))
        # The second layer's part.
        self.table = jnp.asarray(np.array(tables) + self.pages_per_layer)
        self.pools = [self._stored(pool) for pool in pools]
        specs = kv_pool_axes(self.pools[0].pages.dtype)
        self.pool = jax.tree.map(
            lambda axes, *parts: jax.device_put(
                jnp.concatenate(parts), NamedSharding(self.mesh, partition_spec(axes, self.config, self.mesh))
            ),
            specs,
            *self.pools,
            is_leaf=lambda x: type(x) is tuple,
        )

    def _stored(self, pool: np.ndarray) -> KVPool:
        if self.case.kv_dtype == "int8":
            values, scales = quantize_rows(jnp.asarray(pool.swapaxes(1, 2)))
            return KVPool(values, scales)
        return KVPool(jnp.asarray(pool, self.dtype), None)

    def array(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(shape), self.dtype)


def assert_pools(got: KVPool, want: list[KVPool], *, but: int | None = None) -> None:
    """Equal in every bit; `but`: a page of every shard that may hold anything."""
    for part, *parts in zip(jax.tree.leaves(got), *map(jax.tree.leaves, want), strict=True):
        for got_shard, want_shard in zip(np.split(np.asarray(part), len(want)), parts, strict=True):
            given = np.arange(len(got_shard)) != (len(got_shard) if but is None else but)
            np.testing.assert_array_equal(got_shard[given], np.asarray(want_shard)[given])


def assert_same(got: jax.Array, want: jax.Array, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=tolerance)


CASES = [
    Case(8, 4, 1, 4, 1),
    Case(8, 4, 1, 8, 2),
    Case(8, 2, 2, 4, 4),
    Case(6, 2, 1, 8, 4, "bfloat16"),  # four devices cannot share three query heads
    Case(8, 4, 1, 6, 3),  # and here each device has two KV heads
    Case(8, 2, 2, 4, 4, "int8"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (Case(8, 4, 2, 4, 2), Case(8, 1, 1, 8, 8, "int8"), Case(8, 4, 8, 1, 8, "int8"))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mesh_decodes_as_one_device(case):
    assert_decode(case, REFERENCE, REFERENCE, 1e-6 if case.kv_dtype == "float32" else 0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_mesh_prefills_as_one_device(case):
    assert_prefill(case, REFERENCE, REFERENCE, 1e-6 if case.kv_dtype == "float32" else 0.02)


def assert_decode(case: Case, kernel: Attention, reference: Attention, tolerance: float) -> None:
    inputs = Inputs(case)
    rows = len(inputs.lengths)
    q, kv = inputs.array(rows, case.heads, case.head_dim), inputs.array(rows, 2 * case.kv_heads, case.head_dim)
    positions = jnp.asarray(inputs.lengths, jnp.int32) - 1
    active = jnp.arange(rows) != 1
    decode = jax.jit(ShardedAttention(kernel, inputs.mesh).decode)
    got, got_pool = decode(q, kv, inputs.pool, inputs.table, positions, active)
    want = []
    for shard, pool in enumerate(inputs.pools):
        own = slice(shard * rows // case.num_shards, (shard + 1) * rows // case.num_shards)
        parts = (q[own], kv[own], pool, inputs.table[own], positions[own], active[own])
        want.append(jax.jit(reference.decode)(*parts))
    is_active = np.asarray(active)
    assert_same(got[is_active], jnp.concatenate([out for out, _ in want])[is_active], tolerance)
    assert_pools(got_pool, [pool for _, pool in want], but=inputs.pages_per_layer)


def assert_prefill(case: Case, kernel: Attention, reference: Attention, tolerance: float) -> None:
    """A chunk of a page and a half for the longest row of the last shard; no other shard changes."""
    inputs = Inputs(case)
    size = 2 * case.page_size
    start = max(case.lengths) // case.page_size // 2 * case.page_size
    num_tokens = min(max(case.lengths) - start, size - case.page_size // 2)
    shard, row = case.num_shards - 1, len(inputs.lengths) - len(case.lengths)
    row += int(np.argmax(inputs.lengths[row:]))
    q, kv = inputs.array(size, case.heads, case.head_dim), inputs.array(size, 2 * case.kv_heads, case.head_dim)
    at = (inputs.table[row], jnp.int32(start), jnp.int32(num_tokens))
    prefill = jax.jit(ShardedAttention(kernel, inputs.mesh).prefill)
    got, got_pool = prefill(q[None], kv[None], inputs.pool, *(x[None] for x in (*at, jnp.int32(shard))))
    want, want_pool = jax.jit(reference.prefill)(q, kv, inputs.pools[shard], *at)
    assert_same(got[0, :num_tokens], want[:num_tokens], tolerance)
    written = inputs.table[row][(start + num_tokens - 1) // case.page_size]  # past its tokens it may hold anything
    assert_pools(got_pool, [*inputs.pools[:shard], want_pool], but=int(written))


def assert_prefill_together(case: Case, kernel: Attention, reference: Attention, tolerance: float) -> None:
    """In one program of each shard's longest row a page, of one row a second page that sees the first, and one chunk
    without tokens. It comes to what one after another would on one device, and none to other bits alone elsewhere."""
    inputs = Inputs(case)
    size, shards_of_group = case.page_size, case.num_shards // case.data
    in_group, rows_per_shard = shards_of_group + 2, len(case.lengths)
    chunks: list[tuple[int, int, int, int]] = []  # shard, row, start, tokens
    for group in range(case.data):
        shards = [*range(group * shards_of_group, (group + 1) * shards_of_group)]
        firsts = [shard * rows_per_shard for shard in shards]
        longest = [first + int(np.argmax(inputs.lengths[first : first + rows_per_shard])) for first in firsts]
        chunks += [(shard, row, 0, size) for shard, row in zip(shards, longest, strict=True)]
        chunks += [(shards[0], longest[0], size, size), (shards[0], longest[0], 0, 0)]
    q = inputs.array(len(chunks), size, case.heads, case.head_dim)
    kv = inputs.array(len(chunks), size, 2 * case.kv_heads, case.head_dim)
    shard, row, start, num_tokens = (jnp.asarray(x, jnp.int32) for x in zip(*chunks, strict=True))
    at = (jnp.where((num_tokens > 0)[:, None], inputs.table[row], inputs.pages_per_layer), start, num_tokens, shard)
    prefill = jax.jit(ShardedAttention(kernel, inputs.mesh).prefill)
    got, got_pool = prefill(q, kv, inputs.pool, *at)
    pools, one = list(inputs.pools), jax.jit(reference.prefill)
    for i, (where, _, _, count) in enumerate(chunks):
        want, pools[where] = one(q[i], kv[i], pools[where], *(x[i] for x in at[:3]))
        assert_same(got[i, :count], want[:count], tolerance)
    assert_pools(got_pool, pools, but=inputs.pages_per_layer)
    for i in (0, len(chunks) - in_group):
        place = i + in_group - 1
        alone = [jnp.zeros_like(x).at[place].set(x[i]) for x in (q, kv, *at)]
        out, _ = prefill(*alone[:2], inputs.pool, *alone[2:])
        np.testing.assert_array_equal(np.asarray(out[place]), np.asarray(got[i]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_of_several_rows_come_to_what_one_after_another_would(case):
    assert_prefill_together(case, REFERENCE, REFERENCE, 1e-6 if case.kv_dtype == "float32" else 0.02)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_the_kernels_run_on_a_mesh_too(kv_dtype):
    """Two KV heads, rows and pages over two pairs of devices: four shards of two devices."""
    pytest.importorskip("flywheel_tpu")
    case = Case(8, 2, 2, 4, 4, kv_dtype, head_dim=128, page_size=128, lengths=(300,))
    kernel = (Int8TpuAttention if kv_dtype == "int8" else TpuAttention)(LAYERS, interpret=True)
    assert_decode(case, kernel, REFERENCE, 0.04)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_the_kernels_prefill_on_a_mesh_too(kv_dtype):
    pytest.importorskip("flywheel_tpu")
    case = Case(8, 2, 2, 4, 4, kv_dtype, head_dim=128, page_size=128, lengths=(300,))
    kernel = (Int8TpuAttention if kv_dtype == "int8" else TpuAttention)(LAYERS, interpret=True)
    assert_prefill(case, kernel, REFERENCE, 0.04)
    assert_prefill_together(case, kernel, REFERENCE, 0.04)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_are_cleared_and_copied_in_their_own_shard(case):
    inputs = Inputs(case)
    last, where = case.num_shards - 1, {"num_layers": LAYERS, "mesh": inputs.mesh}

    def pool() -> KVPool:
        """A copy: what writes to a pool takes it away."""
        return jax.tree.map(jnp.copy, inputs.pool)

    pages = jnp.asarray([3, 1], jnp.int32)
    copy = read_pages(inputs.pool, pages, jnp.int32(last), **where)
    index = np.concatenate([np.array([3, 1]) + layer * inputs.pages_per_layer for layer in range(LAYERS)])
    for part, whole in zip(jax.tree.leaves(copy), jax.tree.leaves(inputs.pools[last]), strict=True):
        np.testing.assert_array_equal(np.asarray(part), np.asarray(whole)[index])
    # Into another shard's pages 2 and 0: the second is left out.
    moved = put_pages(pool(), jnp.asarray([2, 0]), copy, jnp.int32(0), **where)
    target = np.array([2 + layer * inputs.pages_per_layer for layer in range(LAYERS)])
    want = jax.tree.map(lambda part, new: part.at[target].set(new[::2]), inputs.pools[0], copy)
    assert_pools(moved, [want, *inputs.pools[1:]])
    cleared = clear_pages(pool(), jnp.asarray([1, 2, 0]), jnp.int32(2), jnp.int32(last), **where)
    gone = np.array([page + layer * inputs.pages_per_layer for layer in range(LAYERS) for page in (1, 2)])
    want = jax.tree.map(lambda part: part.at[gone].set(0), inputs.pools[last])
    assert_pools(cleared, [*inputs.pools[:last], want])


@pytest.mark.skipif(not native.is_available(), reason="needs AVX2 or NEON, and a C++ compiler")
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[5]], ids=str)
def test_a_cpu_s_kernels_have_the_bits_of_one_device_on_a_mesh(case):
    platform = describe_platform(
        tiny.config_of("divisible", num_attention_heads=case.heads, num_key_value_heads=case.kv_heads),
        Inputs(case).mesh,
        dtype=jnp.bfloat16,
    )
    kernel = platform.kernel
    assert kernel == CpuAttention(num_callers=Inputs(case).mesh.size)
    assert_decode(case, kernel, CpuAttention(), 0)
    assert_prefill(case, kernel, CpuAttention(), 0)
    assert_prefill_together(case, kernel, CpuAttention(), 0)
