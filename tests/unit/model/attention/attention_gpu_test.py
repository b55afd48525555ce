"""The GPU kernel does what the reference does, in Pallas's interpreter, and lowers for GPUs that are not there.

Where tests run on a GPU (`bench/device_check.sh`), it is the kernel itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh

from jaxllama.errors import ConfigError
from jaxllama.model.attention import ReferenceAttention
from jaxllama.model.attention.gpu import GpuAttention
from jaxllama.model.cache import KVPool
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import make_mesh
from jaxllama.model.platforms import gpu
from jaxllama.model.platforms.platform import Case as PlatformCase

pytestmark = pytest.mark.optimized

PAGE_SIZE = 16
# Both round probabilities to bfloat16, at other points.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    lengths: tuple[int, ...]


CASES = [
    Case(8, 2, 64, "bfloat16", (1, 15, 16, 17, 64, 65, 700, 1500)),
    Case(6, 2, 128, "int8", (1, 2, 16, 130, 1023)),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (Case(3, 3, 64, "int8", (64, 5)), Case(32, 1, 128, "bfloat16", (200, 1)))
    ),
]


class Inputs:
    """Rows whose pages lie scattered; what is past a row's end, and page 0, is NaN."""

    def __init__(self, case: Case, *, spare: int = 0) -> None:
        self.rng = rng = np.random.default_rng(len(case.lengths))
        counts = [-(-(length + spare) // PAGE_SIZE) for length in case.lengths]
        order = iter(rng.permutation(np.arange(1, 1 + sum(counts))))
        self.table = np.zeros((len(counts), max(counts) + 3), np.int32)
        pool = np.full((1 + sum(counts), PAGE_SIZE, 2 * case.kv_heads, case.head_dim), np.nan)
        for row, (length, count) in enumerate(zip(case.lengths, counts, strict=True)):
            self.table[row, :count] = [next(order) for _ in range(count)]
            for position in range(length):
                own = pool[self.table[row, position // PAGE_SIZE], position % PAGE_SIZE]
                own[:] = rng.standard_normal(own.shape)
        self.pool = KVPool(jnp.asarray(pool, jnp.bfloat16), None)
        if case.kv_dtype == "int8":
            values, scales = quantize_rows(jnp.asarray(pool.swapaxes(1, 2)))
            self.pool = KVPool(values, scales)

    def array(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(shape), jnp.bfloat16)


def assert_near(got: jax.Array, want: jax.Array) -> None:
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


KERNEL, REFERENCE = GpuAttention(interpret=jax.default_backend() == "cpu"), ReferenceAttention()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_reference_s(case):
    inputs, rows = Inputs(case), len(case.lengths)
    q, kv = inputs.array(rows, case.heads, case.head_dim), inputs.array(rows, 2 * case.kv_heads, case.head_dim)
    active = np.arange(rows) != 1
    args = (q, kv, inputs.pool, inputs.table, jnp.array(case.lengths) - 1, jnp.asarray(active))
    (got, got_pool), (want, want_pool) = (jax.jit(x.decode)(*args) for x in (KERNEL, REFERENCE))
    assert_near(got[active], want[active])
    for one, other in zip(jax.tree.leaves(got_pool), jax.tree.leaves(want_pool), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize(
    ("case", "start", "num_tokens"),
    [
        (CASES[0], 64, 77),
        (CASES[1], 64, 77),
        pytest.param(CASES[0], 0, 128, marks=pytest.mark.slow),
        pytest.param(CASES[1], 960, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_chunk_is_the_reference_s(case, start, num_tokens):
    case = Case(case.heads, case.kv_heads, case.head_dim, case.kv_dtype, (start + num_tokens,))
    inputs, size = Inputs(case), 128
    table = np.pad(inputs.table[0], (0, size // PAGE_SIZE))
    q, kv = inputs.array(size, case.heads, case.head_dim), inputs.array(size, 2 * case.kv_heads, case.head_dim)
    args = (q, kv, inputs.pool, jnp.asarray(table), jnp.int32(start), jnp.int32(num_tokens))
    got, want = (jax.jit(x.prefill)(*args)[0] for x in (KERNEL, REFERENCE))
    assert_near(got[:num_tokens], want[:num_tokens])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_drafts_are_verified_as_by_the_reference(case):
    inputs, rows, size = Inputs(case, spare=4), len(case.lengths), 4
    q = inputs.array(rows, size, case.heads, case.head_dim)
    kv = inputs.array(rows, size, 2 * case.kv_heads, case.head_dim)
    num_tokens = np.arange(rows) % (size + 1)
    args = (q, kv, inputs.pool, inputs.table, jnp.array(case.lengths), jnp.asarray(num_tokens))
    got, want = (jax.jit(x.verify)(*args)[0] for x in (KERNEL, REFERENCE))
    for row, num in enumerate(num_tokens):
        assert_near(got[row, :num], want[row, :num])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_rows_do_not_see_each_other(case):
    inputs, rows = Inputs(case), len(case.lengths)
    q, kv = inputs.array(rows, case.heads, case.head_dim), inputs.array(rows, 2 * case.kv_heads, case.head_dim)
    decode, positions = jax.jit(KERNEL.decode), jnp.array(case.lengths) - 1
    together, _ = decode(q, kv, inputs.pool, inputs.table, positions, jnp.ones(rows, bool))
    for row in (2, rows - 1):
        alone, _ = decode(q, kv, inputs.pool, inputs.table, positions, jnp.arange(rows) == row)
        np.testing.assert_array_equal(np.asarray(alone[row]), np.asarray(together[row]))


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_lowers_to_triton_without_a_gpu(device, kv_dtype, head_dim):
    case = Case(8, 2, head_dim, kv_dtype, (40, 700))
    inputs, kernel = Inputs(case), GpuAttention()
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device, num_cores=108, platform="gpu"))
    tokens = (inputs.array(2, 8, head_dim), inputs.array(2, 4, head_dim))
    step = (*tokens, inputs.pool, inputs.table, jnp.array(case.lengths) - 1, jnp.ones(2, bool))
    tokens = (inputs.array(128, 8, head_dim), inputs.array(128, 4, head_dim))
    chunk = (*tokens, inputs.pool, inputs.table[1], jnp.int32(0), jnp.int32(128))
    for run, args in ((kernel.decode, step), (kernel.prefill, chunk)):
        with jax.sharding.use_abstract_mesh(mesh):
            text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("xla.gpu.triton") == 1


def test_the_reference_stays_the_choice_until_the_kernel_is_checked():
    config = tiny.config_of("divisible", head_dim=64)
    case = PlatformCase(config, make_mesh(config, tp=1), "bfloat16", "bfloat16")
    assert gpu.describe(case).kernel == ReferenceAttention()
    with_kernel = gpu.with_kernel(case)
    assert with_kernel is not None
    assert with_kernel.kernel == GpuAttention()
    for other in (
        tiny.config_of("divisible", head_dim=80),
        dataclasses.replace(config, windows=(16,) * config.num_layers),
    ):
        assert gpu.with_kernel(PlatformCase(other, case.mesh, "bfloat16", "bfloat16")) is None
    assert gpu.with_kernel(PlatformCase(config, case.mesh, "float32", "float32")) is None
    with pytest.raises(ConfigError, match="must divide 64"):
        GpuAttention().validate(page_size=48, num_rows=1, table_width=1)
