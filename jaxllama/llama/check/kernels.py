"""Kernels beside what they should compute: every implementation of attention that runs here, and a CPU's products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxllama.decode.state import Chunk, Place, make_pool
from jaxllama.decode.steps import prefill_logits
from jaxllama.engine.sizes import size_engine
from jaxllama.llama.check.model import synthetic
from jaxllama.llama.check.result import Result, judged
from jaxllama.llama.check.speed import a_round
from jaxllama.model import native
from jaxllama.model.attention import ReferenceAttention, ShardedAttention
from jaxllama.model.attention.agreement import agreements
from jaxllama.model.cache import KVPool, kv_pool_shapes
from jaxllama.model.config import LlamaConfig
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import make_mesh, num_page_shards
from jaxllama.model.params import Params, QuantizedWeight
from jaxllama.model.platforms import gpu
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.model.platforms.platform import Case, Platform
from jaxllama.weights.forms import fit

CASES = (("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float32", "float32"))
"""Dtypes of products and of the cache. A TPU has no kernel of its own for float32."""
_ROWS, _CONTEXT = 32, 4096
_ROUNDINGS_A_LAYER, _ROUNDINGS_BESIDE = 15, 4
"""Of what passes through: norm, three projections, rotation, probabilities, their sum, projection, residual; norm,
gate, up, their product, projection, residual; and embedding, norm, logits, and the logits' own."""
_MAX_GROWTH = 2.0
"""Of a relative error on its way through a layer's softmax and gate."""


def check_attention(config: LlamaConfig, mesh: Mesh) -> Iterator[Result]:
    """Each kernel, with the model's heads on all devices."""
    config, seen = config.cut_to(min(2, config.num_layers)), set()
    for dtype, kv_dtype in CASES:
        for platform in _platforms(Case(config, mesh, dtype, kv_dtype)):
            name = type(platform.kernel).__name__
            if type(platform.kernel) is ReferenceAttention and (name, kv_dtype) in seen:
                continue
            seen.add((name, kv_dtype))
            what = f"{name}, {config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}, {kv_dtype} cache"
            if config.windows:
                yield Result("attention", what, "note", "not looked at: its queries see a window of tokens")
            else:
                yield from _compared(platform, Case(config, mesh, dtype, kv_dtype), what)


def _platforms(case: Case) -> Iterator[Platform]:
    """What runs here, and on a GPU the kernel that is not chosen before somebody has seen it hold."""
    yield describe_platform(case.config, case.mesh, dtype=case.dtype, kv_dtype=case.kv_dtype)
    if case.mesh.devices.flat[0].platform == "gpu" and (other := gpu.with_kernel(case)) is not None:
        yield other


def _compared(platform: Platform, case: Case, what: str) -> Iterator[Result]:
    alone = {None: "", True: ", a row alone has the same bits", False: ", a row alone has OTHER BITS"}
    for found in agreements(
        platform.attention,
        case.config,
        page_size=platform.page_size,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype,
        needs_clean_pages=platform.needs_clean_pages,
        layout=platform.head_layout,
        chunks_in_group=platform.most_chunks_in_group,
    ):
        yield Result(
            "attention",
            f"{what}: {found.call}",
            judged(found.holds),
            f"{found.in_words}{alone[found.row_alone]}",
            "at most 100% of it, from float64",
            {"error": found.error, "share": found.share, "row_alone": found.row_alone},
        )


def check_choice(config: LlamaConfig, mesh: Mesh) -> Iterator[Result]:
    """On a GPU, how long a step's attention takes by the kernel and by plain JAX, one layer on one device."""
    if mesh.devices.flat[0].platform != "gpu":
        return
    alone = make_mesh(config, tp=1, devices=[mesh.local_mesh.devices.flat[0]])
    config = config.cut_to(1)
    for kv_dtype in ("bfloat16", "int8"):
        seconds = {}
        for platform in _platforms(Case(config, alone, "bfloat16", kv_dtype)):
            seconds[type(platform.kernel).__name__] = step_attention_s(config, platform, kv_dtype)
        if len(seconds) > 1:
            found = ", ".join(f"{name} {s * 1e6:,.0f} µs" for name, s in seconds.items())
            what = f"a layer's step of {_ROWS} rows at {_CONTEXT} tokens, {kv_dtype} cache"
            yield Result("attention", what, "note", found, "the faster one that holds should be the choice", seconds)


type _Step = tuple[Float[Array, "rows heads head_dim"], KVPool]


def step_attention_s(config: LlamaConfig, platform: Platform, kv_dtype: str) -> float:
    """Of a layer's attention for `_ROWS` rows of `_CONTEXT` tokens."""
    width = _CONTEXT // platform.page_size + 1
    shapes = kv_pool_shapes(config, 1 + _ROWS * width, platform.page_size, jnp.dtype(kv_dtype), 1, platform.head_layout)
    pool = jax.tree.map(lambda part: jnp.ones(part.shape, part.dtype), shapes)
    table = jnp.arange(1, 1 + _ROWS * width, dtype=jnp.int32).reshape(_ROWS, width)
    positions, active = jnp.full(_ROWS, _CONTEXT, jnp.int32), jnp.ones(_ROWS, bool)
    kv = jnp.ones((_ROWS, 2 * config.num_kv_heads, config.head_dim), jnp.bfloat16)

    def run(x: _Step, rounds: Int[Array, ""]) -> _Step:
        def once(_: Any, x: _Step) -> _Step:
            return platform.attention.decode(x[0], kv, x[1], table, positions, active)

        return jax.lax.fori_loop(0, rounds, once, x)

    q = jnp.ones((_ROWS, config.num_heads, config.head_dim), jnp.bfloat16)
    return a_round(jax.jit(run, donate_argnums=0), (q, pool))


def check_products(config: LlamaConfig, mesh: Mesh) -> Iterator[Result]:
    """A CPU's own products, of one row and of more, ragged sizes too."""
    if mesh.devices.flat[0].platform != "cpu" or not native.is_available():
        return
    rng = np.random.default_rng(0)
    for name in ("bfloat16", "float32", "int8"):
        worst = 0.0
        for rows, outputs, inputs in ((1, 48, 64), (3, 37, 130), (33, 96, config.hidden_size)):
            weight: Any = jnp.asarray(rng.standard_normal((outputs, inputs)), "float32" if name == "int8" else name)
            exact = np.asarray(weight, np.float64)
            if name == "int8":
                weight = QuantizedWeight(*quantize_rows(weight))
                exact = np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)[:, None]
            x = jnp.asarray(rng.standard_normal((rows, inputs)), "float32" if name == "float32" else "bfloat16")
            packed = native.pack(weight)
            # A program of its own each time: one of before would be found again.
            (got,) = jax.jit(lambda x, packed: native.multiply(x, packed))(x, packed)
            want = np.asarray(x, np.float64) @ exact.T
            error = np.abs(np.asarray(got, np.float64) - want).max() / np.sqrt(inputs)
            worst = float(np.maximum(worst, error))
        # Exact products summed in float32, in any order.
        tolerance = 1e-5
        found, expected = f"off by {worst:.1g}", f"at most {tolerance:g} of a value's size"
        yield Result("products", f"CPU kernel, {name}", judged(worst <= tolerance), found, expected, {"error": worst})


def check_model(config: LlamaConfig, mesh: Mesh) -> Iterator[Result]:
    """Two layers as they run here, kernels and sharding together, beside float32 through XLA on one device."""
    config = config.cut_to(min(2, config.num_layers))
    dtypes = ("bfloat16", "float32") if mesh.devices.flat[0].platform == "cpu" else ("bfloat16",)
    for dtype in dtypes:
        platform = describe_platform(config, mesh, dtype=dtype)
        params = synthetic(config, mesh, dtype)
        alone = make_mesh(config, tp=1, devices=[mesh.local_mesh.devices.flat[0]])
        plain = describe_platform(config, alone, dtype="float32")
        plain = Platform(plain.name, ShardedAttention(ReferenceAttention()), compiler_options=plain.compiler_options)
        exact = _exact(params, alone.devices.flat[0])
        got = _logits(config, mesh, fit(params, platform), platform, dtype)
        want = _logits(config, alone, exact, plain, "float32")
        error = float(np.sqrt(np.mean((got - want) ** 2)) / want.std())
        tolerance = logit_tolerance(config, dtype)
        what = f"logits of two layers in {dtype}, {'a kernel a layer' if platform.has_layer_kernel else 'in pieces'}"
        found, expected = (
            f"off by {error:.2g} of their size",
            f"at most {tolerance:.2g} (root mean square) from float32",
        )
        yield Result("model", what, judged(error <= tolerance), found, expected, {"error": error})


def logit_tolerance(config: LlamaConfig, dtype: str) -> float:
    """Of logits, relative and root mean square, of a model that rounds to `dtype` wherever one may.

    A value is rounded by `u` of it at most, evenly spread: u / √3 root mean square, and by chance, so that the squares
    of all of them add up. In float32 a product's sum of n values counts, each of which rounds what is summed so far.
    """
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-24 * max(config.intermediate_size, config.hidden_size) ** 0.5
    roundings = _ROUNDINGS_A_LAYER * config.num_layers + _ROUNDINGS_BESIDE
    tolerance: float = _MAX_GROWTH * (roundings / 3) ** 0.5 * unit
    return tolerance


def logits_of(config: LlamaConfig, mesh: Mesh) -> np.ndarray:
    """Of a random model in bfloat16 as it runs on `mesh`: what two hosts must have the same bits of."""
    platform = describe_platform(config, mesh, dtype="bfloat16")
    return _logits(config, mesh, fit(synthetic(config, mesh, "bfloat16"), platform), platform, "bfloat16")


def _exact(params: Params, device: jax.Device) -> Params:
    """In float32, on one device."""
    exact: Params = jax.tree.map(lambda x: jax.device_put(np.asarray(x, np.float32), device), params)
    return exact


def _logits(config: LlamaConfig, mesh: Mesh, params: Any, platform: Platform, dtype: str) -> np.ndarray:
    """Of two chunks of one row, the second of which is not full."""
    size = min(platform.chunk_sizes)
    sizes = size_engine(
        max_rows=1,
        max_context=2 * size,
        page_size=platform.page_size,
        chunk_sizes=(size,),
        num_shards=num_page_shards(mesh),
    )
    pool = make_pool(
        config,
        mesh,
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        dtype=jnp.dtype(dtype),
        layout=platform.head_layout,
    )
    table = np.zeros(sizes.table_width, np.int32)
    table[: 2 * size // sizes.page_size] = 1 + np.arange(2 * size // sizes.page_size)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 2 * size).astype(np.int32)
    logits, ends = [], (size, size - 3)
    for index, count in enumerate(ends):
        place = Place(table, np.int32(0))
        chunk = Chunk(tokens[index * size : (index + 1) * size], np.int32(index * size), np.int32(count))
        out, pool = prefill_logits(config, params, pool, place, chunk, platform=platform)
        logits.append(np.asarray(out, np.float64)[:count])
    return np.concatenate(logits)
