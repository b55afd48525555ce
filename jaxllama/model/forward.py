"""The Llama forward pass as Flax NNX modules.

Source: Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783.

Modules are made at trace time around a plain `Params` tree, so that only dicts and lists cross the jit boundary. Layers
are unrolled: TPU.md's measurements give 50 to 80 % more time to a scan over stacked weights.

Between matrix products everything is float32, the residual stream included; only what enters a product is rounded to
the weights' dtype. On CPUs it costs next to nothing and keeps greedy replies in bfloat16 close to float32's. The TPU
form (`Platform.keeps_float32` false) rounds what leaves a product too: half the traffic on the links and in HBM
(bench/LOG.md). Beside int8 matrices it is the norms that have that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllama.model import native
from jaxllama.model.cache import KVPool, interleave_kv
from jaxllama.model.config import LlamaConfig
from jaxllama.model.linear import product, rows
from jaxllama.model.params import PackedWeight, Params
from jaxllama.model.platforms import Platform
from jaxllama.model.rope import RotaryAngles, rotary_angles, rotate

type Attend = Callable[[Array, Array, KVPool, Array], tuple[Array, KVPool]]
"""Writes, then attends: `(q [rows, tokens, H, D], kv [rows, tokens, 2K, D], pool, page_table) -> (out as q, pool)`."""


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32, to the weights' dtype (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, weight: Array, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        weight, x = self.weight[...], x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale * weight.astype(jnp.float32)).astype(weight.dtype)


class Linear(nnx.Module):
    """`x @ weight.T + bias` in `dtype`, with the weight in Hugging Face's `[out, in]` layout."""

    def __init__(self, weights: Mapping[str, Any], name: str, dtype: Any) -> None:
        self.dtype = dtype
        self.weight = nnx.Param(weights[name])
        self.bias = nnx.Param(weights[f"{name}_bias"]) if f"{name}_bias" in weights else None

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        return self.with_bias(product("...i,oi->...o", x, self.weight.get_value(), self.dtype))

    def with_bias(self, y: Float[Array, "*batch outputs"]) -> Float[Array, "*batch outputs"]:
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _together(x: Float[Array, "*batch inputs"], *linears: Linear) -> list[Float[Array, "*batch outputs"]]:
    """Each of `linears` of `x`. Packed matrices are one call: a CPU's threads wait for each other once."""
    weights = [linear.weight.get_value() for linear in linears]
    if not all(isinstance(weight, PackedWeight) for weight in weights):
        return [linear(x) for linear in linears]
    products = native.multiply(x, *(weight.blocks for weight in weights))
    return [linear.with_bias(y.astype(linear.dtype)) for linear, y in zip(linears, products, strict=True)]


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) over the paged cache."""

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Any], dtype: Any) -> None:
        self.config = config
        self.q_proj = Linear(weights, "q_proj", dtype)
        self.k_proj = Linear(weights, "k_proj", dtype)
        self.v_proj = Linear(weights, "v_proj", dtype)
        self.o_proj = Linear(weights, "o_proj", dtype)

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        angles: RotaryAngles,
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        attend: Attend,
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        # The barrier keeps XLA from slicing or transposing the weights in every step (v5p: 41 to 30.6 ms, see TPU.md).
        q, k, v = jax.lax.optimization_barrier(tuple(_together(x, self.q_proj, self.k_proj, self.v_proj)))
        q, k, v = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in (q, k, v))
        kv = interleave_kv(rotate(k, angles), v)
        out, pool = attend(rotate(q, angles).astype(x.dtype), kv.astype(x.dtype), pool, page_table)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), pool


class MLP(nnx.Module):
    """The SwiGLU feed-forward block (Shazeer 2020, arXiv:2002.05202), or a part of one: they add up."""

    def __init__(self, weights: Mapping[str, Any], dtype: Any) -> None:
        self.gate_proj = Linear(weights, "gate_proj", dtype)
        self.up_proj = Linear(weights, "up_proj", dtype)
        self.down_proj = Linear(weights, "down_proj", dtype)

    def __call__(self, x: Float[Array, "rows tokens embed"]) -> Float[Array, "rows tokens embed"]:
        gate, up = (y.astype(jnp.float32) for y in _together(x, self.gate_proj, self.up_proj))
        return self.down_proj((nnx.silu(gate) * up).astype(x.dtype))


class DecoderLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Any], dtype: Any) -> None:
        self.input_layernorm = RMSNorm(weights["input_layernorm"], config.rms_norm_eps)
        self.self_attn = Attention(config, weights, dtype)
        self.post_attention_layernorm = RMSNorm(weights["post_attention_layernorm"], config.rms_norm_eps)
        self.mlp_parts = nnx.data([MLP(part, dtype) for part in weights.get("ffn_parts", [weights])])

    def __call__(self, x: Array, *attention_inputs: Any) -> tuple[Array, KVPool]:
        out, pool = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + out
        normed = self.post_attention_layernorm(x)
        return x + sum(part(normed) for part in self.mlp_parts), pool


class Llama(nnx.Module):
    """A Llama decoder around the weights of a `Params` tree, as `platform` wants it run.

    The norms' dtype is that of what enters a matrix product.
    """

    def __init__(self, config: LlamaConfig, params: Params, platform: Platform) -> None:
        self.config = config
        self.layers_per_loop = platform.layers_per_loop
        self.num_shards = platform.num_shards
        self.dtype = jnp.float32 if platform.keeps_float32 else params["norm"].dtype
        self.embed_tokens = nnx.Param(params["embed_tokens"])
        self.layers = nnx.data(params["layers"])
        self.norm = RMSNorm(params["norm"], config.rms_norm_eps)
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else nnx.Param(params["lm_head"])

    def __call__(
        self,
        tokens: Int[Array, "rows tokens"],
        positions: Int[Array, "rows tokens"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        attend: Attend,
        once: Int[Array, ""],
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        """Runs the layers, which reach the cache by `attend` alone; returns normalised hidden states and the pool.

        `once` is 1 in every run, which the compiler must not know: see `Platform.layers_per_loop`.
        """
        x = rows(self.embed_tokens.get_value(), tokens).astype(self.dtype)
        angles = rotary_angles(self.config, positions)
        num_pages = pool.pages.shape[0] // (self.num_shards * self.config.num_layers)

        # Jitted, one layer is traced and lowered for all. XLA inlines the calls.
        @jax.jit
        def run(weights: Mapping[str, Any], x: Array, pool: KVPool, pages: Array) -> tuple[Array, KVPool]:
            return DecoderLayer(self.config, weights, self.dtype)(x, angles, pool, pages, attend)

        def run_group(layers: range, x: Array, pool: KVPool) -> tuple[Array, KVPool]:
            for index in layers:
                x, pool = run(self.layers[index], x, pool, page_table + index * num_pages)
            return x, pool

        count = len(self.layers)
        size = self.layers_per_loop or count
        groups = [partial(run_group, range(first, min(first + size, count))) for first in range(0, count, size)]
        for group in groups:
            x, pool = group(x, pool) if len(groups) == 1 else _run_once(group, once, x, pool)
        return self.norm(x), pool

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Float32 scores of every token of the vocabulary."""
        return product("...e,ve->...v", hidden, self.lm_head.get_value(), jnp.float32)


def _run_once(run: Callable[..., tuple[Array, KVPool]], once: Array, x: Array, pool: KVPool) -> tuple[Array, KVPool]:
    """`run(x, pool)` in a loop of `once` = 1 rounds."""

    def body(carry: tuple[Array, Array, KVPool]) -> tuple[Array, Array, KVPool]:
        done, x, pool = carry
        return done + 1, *run(x, pool)

    return jax.lax.while_loop(lambda carry: carry[0] < once, body, (jnp.zeros_like(once), x, pool))[1:]
