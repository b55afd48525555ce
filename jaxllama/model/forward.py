"""The Llama forward pass as Flax NNX modules.

Source: Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783.

Modules are made at trace time around a plain `Params` tree, so that only dicts and lists cross the jit boundary. Layers
are unrolled: a scan over stacked weights takes 50 to 80 % more time on TPUs (bench/LOG.md).

Between matrix products everything is float32, the residual stream included; only what enters a product is rounded to
the weights' dtype, which beside int8 matrices is that of the norms. On CPUs this costs next to nothing and keeps greedy
replies in bfloat16 close to float32's. Where `Platform.keeps_float32` is false, what leaves a product is rounded too:
half the traffic on a TPU's links and in its HBM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllama.model.cache import KVPool, interleave_kv
from jaxllama.model.config import LlamaConfig
from jaxllama.model.linear import Linear
from jaxllama.model.params import Params
from jaxllama.model.platforms.platform import Platform
from jaxllama.model.rope import RotaryAngles, rotary_angles, rotate

type Attend = Callable[[Array, Array, KVPool, Array], tuple[Array, KVPool]]
"""Writes, then attends: `(q [rows, tokens, H, D], kv [rows, tokens, 2K, D], pool, page_table) -> (out as q, pool)`."""


class Transformer(nnx.Module):
    """A decoder-only Transformer around the weights of a `Params` tree, run as `platform` wants."""

    def __init__(self, config: LlamaConfig, params: Params, platform: Platform) -> None:
        self.config = config
        self.layers_per_loop = platform.layers_per_loop
        self.num_shards = platform.num_shards
        self.dtype = jnp.float32 if platform.keeps_float32 else params["norm"].dtype
        self.embed_tokens = Linear(params, "embed_tokens", jnp.float32)
        self.layers = nnx.data(params["layers"])
        self.norm = RMSNorm(params["norm"], config.rms_norm_eps)
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else Linear(params, "lm_head", jnp.float32)

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

        `once` is 1 whenever this runs, and the compiler must not know it: see `Platform.layers_per_loop`.
        """
        x = self.embed_tokens.rows(tokens).astype(self.dtype)
        angles = rotary_angles(self.config, positions)
        num_pages = pool.pages.shape[0] // (self.num_shards * self.config.num_layers)

        # Jitted, one layer is traced and lowered for all. XLA inlines the calls.
        @jax.jit
        def run(weights: Mapping[str, Any], x: Array, pool: KVPool, pages: Array) -> tuple[Array, KVPool]:
            return DecoderLayer(self.config, weights, self.dtype)(x, angles, pool, pages, attend)

        def layer(index: int, x: Array, pool: KVPool) -> tuple[Array, KVPool]:
            return run(self.layers[index], x, pool, page_table + index * num_pages)

        x, pool = _through_layers(layer, len(self.layers), x, pool, per_loop=self.layers_per_loop, once=once)
        return self.norm(x), pool

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Float32 scores of every token of the vocabulary."""
        return self.lm_head(hidden)


class DecoderLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig, weights: Mapping[str, Any], dtype: Any) -> None:
        self.input_layernorm = RMSNorm(weights["input_layernorm"], config.rms_norm_eps)
        self.self_attn = SelfAttention(config, weights, dtype)
        self.post_attention_layernorm = RMSNorm(weights["post_attention_layernorm"], config.rms_norm_eps)
        self.mlp_parts = nnx.data([MLP(part, dtype) for part in weights.get("ffn_parts", [weights])])

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        angles: RotaryAngles,
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        attend: Attend,
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        out, pool = self.self_attn(self.input_layernorm(x), angles, pool, page_table, attend)
        x = x + out
        normed = self.post_attention_layernorm(x)
        return x + sum(part(normed) for part in self.mlp_parts), pool


class SelfAttention(nnx.Module):
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
        # The barrier keeps XLA from slicing or transposing the weights in every step (v5p: 41 to 30.6 ms).
        q, k, v = jax.lax.optimization_barrier(tuple(Linear.together(x, self.q_proj, self.k_proj, self.v_proj)))
        q, k, v = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in (q, k, v))
        kv = interleave_kv(rotate(k, angles), v)
        out, pool = attend(rotate(q, angles).astype(x.dtype), kv.astype(x.dtype), pool, page_table)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), pool


class MLP(nnx.Module):
    """The SwiGLU feed-forward block (Shazeer 2020, arXiv:2002.05202), or a part of one: the parts' outputs add up."""

    def __init__(self, weights: Mapping[str, Any], dtype: Any) -> None:
        self.gate_proj = Linear(weights, "gate_proj", dtype)
        self.up_proj = Linear(weights, "up_proj", dtype)
        self.down_proj = Linear(weights, "down_proj", dtype)

    def __call__(self, x: Float[Array, "rows tokens embed"]) -> Float[Array, "rows tokens embed"]:
        gate, up = (y.astype(jnp.float32) for y in Linear.together(x, self.gate_proj, self.up_proj))
        return self.down_proj((nnx.silu(gate) * up).astype(x.dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32, to the weights' dtype (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, weight: Array, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        weight, x = self.weight[...], x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale * weight.astype(jnp.float32)).astype(weight.dtype)


def _through_layers(
    layer: Callable[[int, Array, KVPool], tuple[Array, KVPool]],
    num_layers: int,
    x: Float[Array, "rows tokens embed"],
    pool: KVPool,
    *,
    per_loop: int | None,
    once: Int[Array, ""],
) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
    """`layer(index, x, pool)` for each index in turn.

    With `per_loop`, so many at a time are the body of a loop of `once` rounds. They still run once; but the compiler
    plans each loop's memory by itself (see `Platform.layers_per_loop`).
    """

    def run(indices: range, x: Array, pool: KVPool) -> tuple[Array, KVPool]:
        for index in indices:
            x, pool = layer(index, x, pool)
        return x, pool

    if per_loop is None or per_loop >= num_layers:
        return run(range(num_layers), x, pool)
    for first in range(0, num_layers, per_loop):
        indices = range(first, min(first + per_loop, num_layers))

        def body(carry: tuple[Array, Array, KVPool], indices: range = indices) -> tuple[Array, Array, KVPool]:
            done, x, pool = carry
            return done + 1, *run(indices, x, pool)

        carry = (jnp.zeros_like(once), x, pool)
        _, x, pool = jax.lax.while_loop(lambda carry: carry[0] < once, body, carry)
    return x, pool
