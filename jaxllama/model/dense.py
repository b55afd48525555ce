"""The forward pass without a cache, for looking in, changing what is there, and gradients.

It is made of the same layers as decoding. Of packed and int8 weights it makes plain ones as it goes, through which
gradients flow to what goes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxllama.errors import RequestError, quote
from jaxllama.model import native
from jaxllama.model.cache import KVPool
from jaxllama.model.config import LlamaConfig
from jaxllama.model.forward import DecoderLayer, NewKV, Pages, Queries, Tap, Transformer
from jaxllama.model.linear import precision_of
from jaxllama.model.native import PackedWeight
from jaxllama.model.params import Params, QuantizedWeight
from jaxllama.model.platforms.platform import Platform
from jaxllama.model.rope import rotary_angles

_MASKED = -1e30
_HEADS_AT = {"q": 2, "k": 2, "v": 2, "attention": 1}

POINTS: Mapping[str, str] = {
    "resid_pre": "[B, T, E], the residual stream as the layer takes it in",
    "q": "[B, T, H, D], queries before the rotation",
    "k": "[B, T, K, D], keys before the rotation",
    "v": "[B, T, K, D], values",
    "attention": "[B, H, T, T], each query's weights over the keys",
    "attn_out": "[B, T, E], what attention adds to the stream",
    "resid_mid": "[B, T, E], the stream between attention and feed-forward block",
    "mlp_out": "[B, T, E], what the feed-forward block adds",
    "resid_post": "[B, T, E], the stream as the layer leaves it",
}
"""What can be seen and changed in a layer, by TransformerLens's names (`attention` is its `pattern`)."""


@partial(
    jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["what", "layer", "positions", "head", "mode"]
)
@dataclass(frozen=True)
class Patch:
    """A change of the value `what` (one of `POINTS`) in `layer`: `value` is put in its place, or with "add" added.

    At `positions` (queries, for attention), of `head`; None: at all, of all. `value` is anything that broadcasts to
    what it changes, `[B, positions, …]` without the axis of heads where `head` is given. New values of one shape do not
    compile anything.

    Raises: RequestError for a name, a mode or a head that cannot be.
    """

    what: str
    layer: int
    value: Any
    positions: tuple[int, ...] | None = None
    head: int | None = None
    mode: Literal["set", "add"] = "set"

    def __post_init__(self) -> None:
        if self.what not in POINTS:
            raise RequestError(f"a patch of {quote(self.what)}; there are {', '.join(POINTS)}", "patches")
        if self.mode not in ("set", "add"):
            raise RequestError(f"a patch's mode must be 'set' or 'add', got {quote(self.mode)}", "patches")
        if self.head is not None and self.what not in _HEADS_AT:
            raise RequestError(f"{self.what} has no heads; those that have are {', '.join(_HEADS_AT)}", "patches")
        if self.positions is not None:
            object.__setattr__(self, "positions", tuple(int(position) for position in self.positions))

    def apply(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """`x` with the change."""
        index: list[Any] = [slice(None)] * x.ndim
        if self.positions is not None:
            index[2 if self.what == "attention" else 1] = jnp.asarray(self.positions)
        if self.head is not None:
            # A slice of one, so that the axes stay in their order.
            index[_HEADS_AT[self.what]] = slice(self.head, self.head + 1)
        at = x.at[tuple(index)]
        value = jnp.asarray(self.value, x.dtype)
        if self.head is not None and value.ndim:
            axis = _HEADS_AT[self.what] - x.ndim
            value = jnp.expand_dims(value, axis) if value.ndim >= -axis - 1 else value
        return at.set(value) if self.mode == "set" else at.add(value)


def plain(params: Params) -> Params:
    """`params` with every matrix as floats `[out, in]`, of the norms' dtype where it was int8. For use under `jit`."""
    dtype = params["norm"].dtype

    def of(weight: Any) -> Any:
        weight = native.unpack(weight) if isinstance(weight, PackedWeight) else weight
        if isinstance(weight, QuantizedWeight):
            return (weight.values.astype(jnp.float32) * weight.scale[:, None]).astype(dtype)
        return weight

    whole: Params = jax.tree.map(of, params, is_leaf=lambda leaf: isinstance(leaf, PackedWeight | QuantizedWeight))
    return whole


@partial(jax.jit, static_argnames=("config", "platform", "record", "layers", "remat"))
def forward(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, "batch tokens"] | Float[Array, "batch tokens embed"],
    mask: Bool[Array, "batch tokens"],
    patches: Sequence[Patch] = (),
    *,
    platform: Platform,
    record: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    remat: bool = False,
) -> tuple[Float[Array, "batch tokens vocab"], dict[str, Array]]:
    """Float32 logits after each token, and what is to be recorded by name, `[layers, B, …]`.

    `tokens` may be embeddings instead, as `Transformer.embed` gives them. Nobody sees tokens where `mask` is false; the
    others stand at positions 0, 1, … in their order. `remat` computes each layer again for the gradient instead of
    keeping what is in it (Chen et al. 2016, arXiv:1604.06174). Rows lie over the mesh axis `data` if it divides them.
    """
    tokens, mask = (_over_data(x, platform.attention.mesh) for x in (tokens, mask))
    params = plain(params)
    model = Transformer(config, params, platform)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    angles = rotary_angles(config, positions)
    x = model.embed(tokens) if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens.astype(model.dtype)
    recorded: dict[str, list[Array]] = {name: [] for name in record}
    # Nothing is kept: a cache without pages.
    no_pool = KVPool(jnp.zeros((0, 1, 2 * config.num_kv_heads, config.head_dim)), None)
    no_pages = jnp.zeros((tokens.shape[0], 0), jnp.int32)

    def layer(
        index: int, weights: Mapping[str, Any], x: Float[Array, "batch tokens embed"], own: Sequence[Patch]
    ) -> tuple[Float[Array, "batch tokens embed"], dict[str, Array]]:
        seen: dict[str, Array] = {}

        def tap(name: str, value: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
            for patch in own:
                if patch.what == name:
                    value = patch.apply(value)
            if name in record and index in layers:
                seen[name] = value
            return value

        def attend(q: Queries, kv: NewKV, pool: KVPool, pages: Pages) -> tuple[Queries, KVPool]:
            return attention(q, kv, mask, positions, config.window(index), tap), pool

        own_angles = angles if config.has_rope(index) else None
        x, _ = DecoderLayer(config, weights, model.dtype)(x, own_angles, no_pool, no_pages, attend, tap)
        return x, seen

    for index, weights in enumerate(params["layers"]):
        run = partial(layer, index)
        own = [patch for patch in patches if patch.layer == index]
        x, seen = (jax.checkpoint(run) if remat else run)(weights, x, own)
        for name, value in seen.items():
            recorded[name].append(value)
    logits = model.logits(model.norm(x))
    return logits, {name: jnp.stack(values) for name, values in recorded.items() if values}


def attention(
    q: Float[Array, "batch tokens heads head_dim"],
    kv: Float[Array, "batch tokens kv2 head_dim"],
    mask: Bool[Array, "batch tokens"],
    positions: Int[Array, "batch tokens"],
    window: int | None,
    tap: Tap,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Every query over all keys before it that `mask` shows, the last `window` of them; scores and sums in float32."""
    batch, tokens, heads, head_dim = q.shape
    k, v = kv[:, :, 0::2], kv[:, :, 1::2]
    grouped = q.reshape(batch, tokens, k.shape[2], -1, head_dim)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision_of(q.dtype))
    scores = product("btkgd,bskd->bkgts", grouped, k) / math.sqrt(head_dim)
    visible = jnp.tril(jnp.ones((tokens, tokens), jnp.bool_)) & mask[:, None, :]
    if window is not None:
        visible &= positions[:, None, :] > positions[:, :, None] - window
    # A query of padding may see nothing; its weights are even then, and nobody sees it.
    probs = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _MASKED), axis=-1)
    probs = tap("attention", probs.reshape(batch, heads, tokens, tokens)).reshape(probs.shape)
    out = product("bkgts,bskd->btkgd", probs.astype(v.dtype), v)
    return out.reshape(q.shape).astype(q.dtype)


@partial(jax.jit, static_argnames=("config", "platform"))
def embed(
    config: LlamaConfig, params: Params, tokens: Int[Array, "*batch"], *, platform: Platform
) -> Float[Array, "*batch embed"]:
    """What enters the first layer for `tokens`."""
    return Transformer(config, params, platform).embed(tokens)


@partial(jax.jit, static_argnames=("config", "platform"))
def unembed(
    config: LlamaConfig, params: Params, hidden: Float[Array, "*batch embed"], *, platform: Platform
) -> Float[Array, "*batch vocab"]:
    """Float32 logits of a residual stream anywhere, as if it were the last layer's."""
    model = Transformer(config, plain(params), platform)
    return model.logits(model.norm(hidden))


def _over_data(x: Shaped[Array, "batch ..."], mesh: Mesh | None) -> Shaped[Array, "batch ..."]:
    if mesh is None or mesh.shape["data"] == 1 or x.shape[0] % mesh.shape["data"]:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data")))
