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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllama.model import native
from jaxllama.model.cache import KVPool, interleave_kv
from jaxllama.model.config import LlamaConfig
from jaxllama.model.linear import Linear, SplitTokens
from jaxllama.model.params import Params
from jaxllama.model.platforms.platform import Platform
from jaxllama.model.rope import RotaryAngles, rotary_angles, rotate

type Queries = Float[Array, "rows tokens heads head_dim"]
type NewKV = Float[Array, "rows tokens kv2 head_dim"]
type Pages = Int[Array, "rows max_pages"]
type Attend = Callable[[Queries, NewKV, KVPool, Pages, int | None], tuple[Queries, KVPool]]
"""Writes, then attends: `(q [rows, tokens, H, D], kv [rows, tokens, 2K, D], pool, page_table, window) -> (out, pool)`.

`out` is as `q`. A query sees the last `window` tokens, itself included; None: all before it."""


type Tap = Callable[[str, Array], Array]
"""Sees a value within a layer by its name, as in `dense.POINTS`, and returns what goes on in its place."""


def untapped(name: str, value: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """The tap of a forward pass that nobody looks into."""
    return value


class Transformer(nnx.Module):
    """A decoder-only Transformer around the weights of a `Params` tree, run as `platform` wants."""

    def __init__(self, config: LlamaConfig, params: Params, platform: Platform) -> None:
        self.config = config
        self.layers_per_loop = platform.layers_per_loop
        self.num_shards = platform.num_shards
        self.has_layer_kernel = platform.has_layer_kernel
        self.platform = platform
        self.dtype = jnp.float32 if platform.keeps_float32 else params["norm"].dtype
        self.embed_tokens = Linear(params, "embed_tokens", jnp.float32)
        self.layers = nnx.data(params["layers"])
        self.norm = RMSNorm(params["norm"], config.rms_norm_eps, params["norm"].dtype)
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else Linear(params, "lm_head", jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "rows tokens"],
        positions: Int[Array, "rows tokens"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        attend: Attend,
        once: Int[Array, ""],
        written: Int[Array, " rows"],
        steer: Callable[[int, Array], Array] | None = None,
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        """Runs the layers, which reach the cache by `attend` alone unless each is a kernel; returns normalised hidden
        states and the pool.

        `once` is 1 whenever this runs, and the compiler must not know it: see `Platform.layers_per_loop`. Of each row
        the first `written` tokens count: what is returned of the others means nothing. `steer` is given what each layer
        puts out, and returns what goes on.
        """
        split = None if steer is not None else self.platform.split_tokens(self.config, *tokens.shape)
        x = self.embed(tokens) if split is None else split.split(self.embed(tokens))
        angles = rotary_angles(self.config, positions)
        num_pages = pool.pages.shape[0] // (self.num_shards * self.config.num_layers)

        # Jitted, layers of a kind are traced and lowered once. XLA inlines the calls.
        @partial(jax.jit, static_argnames=("has_rope", "window"))
        def run(
            weights: Mapping[str, Any],
            x: Float[Array, "rows tokens embed"],
            pool: KVPool,
            first_page: Int[Any, ""],
            has_rope: bool,
            window: int | None,
        ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
            if self.has_layer_kernel:
                where = (page_table, first_page, positions, written)
                return self._run_kernel(weights, x, pool, *where, angles, has_rope, window)
            pages = page_table + first_page

            def within(q: Queries, kv: NewKV, pool: KVPool, pages: Pages) -> tuple[Queries, KVPool]:
                return attend(q, kv, pool, pages, window)

            decoder = DecoderLayer(self.config, weights, self.dtype, split)
            return decoder(x, angles if has_rope else None, pool, pages, within)

        def layer(
            index: int, x: Float[Array, "rows tokens embed"], pool: KVPool
        ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
            kind = {"has_rope": self.config.has_rope(index), "window": self.config.window(index)}
            x, pool = run(self.layers[index], x, pool, np.int32(index * num_pages), **kind)
            return x if steer is None else steer(index, x), pool

        x, pool = _through_layers(layer, len(self.layers), x, pool, per_loop=self.layers_per_loop, once=once)
        x = self.norm(x)
        return x if split is None else split.whole(x), pool

    def _run_kernel(
        self,
        weights: Mapping[str, Any],
        x: Float[Array, "rows tokens embed"],
        pool: KVPool,
        page_table: Int[Array, "rows max_pages"],
        first_page: Int[Any, ""],
        positions: Int[Array, "rows tokens"],
        written: Int[Array, " rows"],
        angles: RotaryAngles,
        has_rope: bool,
        window: int | None,
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        config = self.config
        cos, sin = (x[:, :, 0] if has_rope else x[:, :, 0, :0] for x in angles)
        return native.run_layer(
            *(x, weights, pool, page_table, first_page, positions, written, (cos, sin)),
            heads=config.num_heads,
            ffn=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            window=window,
        )

    def logits(
        self, hidden: Float[Array, "*batch embed"], count: Int[Array, ""] | None = None
    ) -> Float[Array, "*batch vocab"]:
        """Float32 scores of every token of the vocabulary. What those of rows from `count` on are is not said."""
        return _times(self.lm_head(hidden, count), 1 / self.config.logits_divisor)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """What enters the first layer."""
        x = _times(self.embed_tokens.rows(tokens), self.config.embedding_multiplier).astype(self.dtype)
        if self.dtype != jnp.float32:
            return x
        # An int8 row's scale would be multiplied where the first layer's output is added, in one operation with another
        # rounding, in some programs and not in others.
        kept: Array = jax.lax.optimization_barrier(x)
        return kept


class DecoderLayer(nnx.Module):
    """One Transformer layer: each of its two blocks normalises what it takes in, or else what it puts out."""

    def __init__(
        self, config: LlamaConfig, weights: Mapping[str, Any], dtype: Any, split: SplitTokens | None = None
    ) -> None:
        first, second = "input_layernorm", "post_attention_layernorm"
        if config.norms_outputs:
            first, second = "post_attention_layernorm", "post_feedforward_layernorm"
        self.config = config
        self.entry_dtype = weights[first].dtype
        norm_dtype = dtype if config.norms_outputs else self.entry_dtype
        self.attention_norm = RMSNorm(weights[first], config.rms_norm_eps, norm_dtype)
        self.split = split
        self.self_attn = SelfAttention(config, weights, dtype, split)
        self.mlp_norm = RMSNorm(weights[second], config.rms_norm_eps, norm_dtype)
        self.mlp_parts = nnx.data([MLP(part, dtype) for part in weights.get("ffn_parts", [weights])])

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        angles: RotaryAngles | None,
        pool: KVPool,
        page_table: Pages,
        attend: Callable[[Queries, NewKV, KVPool, Pages], tuple[Queries, KVPool]],
        tap: Tap = untapped,
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        x = tap("resid_pre", x)
        out, pool = self.self_attn(self._taken(x, self.attention_norm), angles, pool, page_table, attend, tap)
        x = tap("resid_mid", x + tap("attn_out", self._addend(out, self.attention_norm)))
        taken = self._taken(x, self.mlp_norm)
        if self.split is None:
            out = sum(part(taken) for part in self.mlp_parts)
        else:
            taken = self.split.whole(taken)
            within = [part.within(taken) for part in self.mlp_parts]
            out = self.split.summed(within, [part.down_proj for part in self.mlp_parts])
        return tap("resid_post", x + tap("mlp_out", self._addend(out, self.mlp_norm))), pool

    def _taken(self, x: Float[Array, "rows tokens embed"], norm: RMSNorm) -> Float[Array, "rows tokens embed"]:
        return x.astype(self.entry_dtype) if self.config.norms_outputs else norm(x)

    def _addend(self, out: Float[Array, "rows tokens embed"], norm: RMSNorm) -> Float[Array, "rows tokens embed"]:
        return _times(norm(out) if self.config.norms_outputs else out, self.config.residual_multiplier)


class SelfAttention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) over the paged cache."""

    def __init__(
        self, config: LlamaConfig, weights: Mapping[str, Any], dtype: Any, split: SplitTokens | None = None
    ) -> None:
        self.config = config
        self.split = split
        self.q_proj = Linear(weights, "q_proj", dtype)
        self.k_proj = Linear(weights, "k_proj", dtype)
        self.v_proj = Linear(weights, "v_proj", dtype)
        self.o_proj = Linear(weights, "o_proj", dtype)
        if config.qk_norm is not None:
            self.q_norm = RMSNorm(weights["q_norm"], config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(weights["k_norm"], config.rms_norm_eps, dtype)

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        angles: RotaryAngles | None,
        pool: KVPool,
        page_table: Pages,
        attend: Callable[[Queries, NewKV, KVPool, Pages], tuple[Queries, KVPool]],
        tap: Tap = untapped,
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        config = self.config
        x = x if self.split is None else self.split.whole(x)
        # The barrier keeps XLA from slicing or transposing the weights in every step (v5p: 41 to 30.6 ms).
        q, k, v = jax.lax.optimization_barrier(tuple(Linear.together(x, self.q_proj, self.k_proj, self.v_proj)))
        if config.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(*x.shape[:2], -1, config.head_dim) for y in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if config.attention_multiplier is not None:
            q = _times(q, config.attention_scale * config.head_dim**0.5)  # `attend` divides by that root
        out, pool = attend(q.astype(x.dtype), interleave_kv(k, v).astype(x.dtype), pool, page_table)
        out = out.reshape(*x.shape[:2], -1)
        return self.o_proj(out) if self.split is None else self.split.summed([out], [self.o_proj]), pool


class MLP(nnx.Module):
    """The SwiGLU feed-forward block (Shazeer 2020, arXiv:2002.05202), or a part of one: the parts' outputs add up."""

    def __init__(self, weights: Mapping[str, Any], dtype: Any) -> None:
        self.gate_proj = Linear(weights, "gate_proj", dtype)
        self.up_proj = Linear(weights, "up_proj", dtype)
        self.down_proj = Linear(weights, "down_proj", dtype)

    def __call__(self, x: Float[Array, "rows tokens embed"]) -> Float[Array, "rows tokens embed"]:
        return self.down_proj(self.within(x))

    def within(self, x: Float[Array, "rows tokens embed"]) -> Float[Array, "rows tokens ffn"]:
        """What `down_proj` takes."""
        gate, up = (y.astype(jnp.float32) for y in Linear.together(x, self.gate_proj, self.up_proj))
        return (nnx.silu(gate) * up).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32, to `dtype` (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, weight: Float[Array, " embed"], eps: float, dtype: Any) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        weight, x = self.weight[...], x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale * weight.astype(jnp.float32)).astype(self.dtype)


def _times(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """`x * factor`, without an operation for a factor of 1."""
    return x if factor == 1 else x * factor


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

    def run(
        indices: range, x: Float[Array, "rows tokens embed"], pool: KVPool
    ) -> tuple[Float[Array, "rows tokens embed"], KVPool]:
        for index in indices:
            x, pool = layer(index, x, pool)
        return x, pool

    if per_loop is None or per_loop >= num_layers:
        return run(range(num_layers), x, pool)
    for first in range(0, num_layers, per_loop):
        indices = range(first, min(first + per_loop, num_layers))

        def body(
            carry: tuple[Int[Array, ""], Float[Array, "rows tokens embed"], KVPool], indices: range = indices
        ) -> tuple[Int[Array, ""], Float[Array, "rows tokens embed"], KVPool]:
            done, x, pool = carry
            return done + 1, *run(indices, x, pool)

        carry = (jnp.zeros_like(once), x, pool)
        _, x, pool = jax.lax.while_loop(lambda carry: carry[0] < once, body, carry)
    return x, pool
