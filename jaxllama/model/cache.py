"""The paged KV cache: one flat pool of pages for all layers, on each shard of a mesh its own.

Layer l's pages are `l * num_pages … (l + 1) * num_pages - 1`; a row's page table holds page numbers of layer 0. Keys
and values are interleaved by head (K0 V0 K1 V1 …), as TPU attention kernels read them. Page 0 is never given to a row:
a table's unused entries are 0.

Pages of floats hold tokens of heads, pages of int8 heads of tokens: a TPU pads the last but one dimension of int8 to a
multiple of 32, which one head a device is not.

A TPU also pads the last dimension to 128 lanes. Its pages hold heads that are narrower side by side (`HeadLayout`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped

from jaxllama.model.config import LlamaConfig
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.mesh import RULES, in_place, num_page_shards, splitting


class KVPool(NamedTuple):
    """Keys and values of every layer: floats, or int8 with one scale a token and head.

    `scales` is float32, and None for floats: another tree, so another program, but a pool never changes its kind.
    """

    pages: Float[Array, "pages page_size kv2 head_dim"] | Int8[Array, "pages kv2 page_size head_dim"]
    scales: Float[Array, "pages kv2 page_size"] | None

    @property
    def heads_first(self) -> bool:
        """Whether pages hold heads of tokens."""
        return self.scales is not None

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return int(self.pages.shape[2 if self.heads_first else 1])


@dataclass(frozen=True)
class HeadLayout:
    """KV heads side by side: `per_row` of a device's in one row of `width`, and zeros where there is none.

    All devices together have `num_rows` rows of keys and as many of values, which alternate. Keys of several heads are
    one key to a kernel, whose queries are padded with zeros to the same width; of what it returns each query takes its
    own head's part. Scales of int8 stay those of heads, a row's one after another.
    """

    num_rows: int
    per_row: int
    width: int

    @classmethod
    def in_lanes(cls, config: LlamaConfig, num_shards: int, num_lanes: int = 128) -> HeadLayout:
        """As many in a row as there is room for, of those that each of `num_shards` has."""
        own = config.num_kv_heads // num_shards
        per_row = max(1, min(num_lanes // config.head_dim, own))
        width = -(-per_row * config.head_dim // num_lanes) * num_lanes
        return cls(num_shards * -(-own // per_row), per_row, width)

    def pack(self, kv: Shaped[Array, "*batch kv2 head_dim"]) -> Shaped[Array, "*batch rows2 width"]:
        """Interleaved keys and values of one device, as pages hold them."""
        return self._padded(self._side_by_side(kv), self.width)

    def pack_scales(self, scales: Float[Array, "*batch kv2"]) -> Float[Array, "*batch rows2_heads"]:
        """The scales of such keys and values."""
        packed = self._side_by_side(scales[..., None])
        return packed.reshape(*scales.shape[:-1], -1)

    def pack_queries(
        self, q: Float[Array, "*batch heads head_dim"], kv_heads: int
    ) -> Float[Array, "*batch row_heads width"]:
        """Queries of one device's `kv_heads`, those of a row one after another."""
        *batch, heads, head_dim = q.shape
        group = heads // kv_heads
        rows = -(-kv_heads // self.per_row)
        missing = (rows * self.per_row - kv_heads) * group
        q = jnp.pad(q, [(0, 0)] * len(batch) + [(0, missing), (0, 0)])
        q = q.reshape(*batch, rows, self.per_row, group, 1, head_dim)
        is_own = jnp.eye(self.per_row, dtype=bool)[:, None, :, None]
        packed = jnp.where(is_own, q, 0).reshape(*batch, rows * self.per_row * group, -1)
        return self._padded(packed, self.width)

    def unpack(
        self, out: Float[Array, "*batch row_heads width"], heads: int, kv_heads: int, head_dim: int
    ) -> Float[Array, "*batch heads head_dim"]:
        """Of what attention gives for packed queries, each head's own part."""
        *batch, row_heads, _ = out.shape
        group = heads // kv_heads
        out = out[..., : self.per_row * head_dim].reshape(
            *batch, row_heads // (self.per_row * group), self.per_row, group, self.per_row, head_dim
        )
        own = jnp.stack([out[..., head, :, head, :] for head in range(self.per_row)], axis=-3)
        return own.reshape(*batch, row_heads, head_dim)[..., :heads, :]

    def _side_by_side(self, kv: Shaped[Array, "*batch kv2 part"]) -> Shaped[Array, "*batch rows2 parts"]:
        if self.per_row == 1:
            return kv
        *batch, kv2, part = kv.shape
        rows = -(-kv2 // (2 * self.per_row))
        missing = 2 * rows * self.per_row - kv2
        kv = jnp.pad(kv, [(0, 0)] * len(batch) + [(0, missing), (0, 0)])
        return kv.reshape(*batch, rows, self.per_row, 2, part).swapaxes(-3, -2).reshape(*batch, 2 * rows, -1)

    @staticmethod
    def _padded(x: Shaped[Array, "*batch part"], width: int) -> Shaped[Array, "*batch width"]:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


# A tree of the same form that holds something else than arrays: shapes, axes.
_pool_of: Any = KVPool


def kv_pool_shapes(
    config: LlamaConfig,
    num_pages: int,
    page_size: int,
    dtype: Any,
    num_shards: int = 1,
    layout: HeadLayout | None = None,
) -> KVPool:
    """The shapes and dtypes of a pool with `num_pages` pages of `dtype` on each of `num_shards`.

    `layout` None: each head by itself.
    """
    layout = HeadLayout(config.num_kv_heads, 1, config.head_dim) if layout is None else layout
    num_pages, rows2 = num_shards * config.num_layers * num_pages, 2 * layout.num_rows
    shape, scales = (num_pages, page_size, rows2, layout.width), None
    if dtype == jnp.int8:
        shape = (num_pages, rows2, page_size, layout.width)
        scales = jax.ShapeDtypeStruct((num_pages, rows2 * layout.per_row, page_size), jnp.float32)
    pool: KVPool = _pool_of(jax.ShapeDtypeStruct(shape, dtype), scales)
    return pool


def kv_pool_axes(dtype: Any) -> KVPool:
    """The logical axes of a pool of `dtype` (see `mesh.py`)."""
    axes = ("pages", "kv_heads", "page", "head_dim")
    pool: KVPool = _pool_of(axes, axes[:3])
    if dtype != jnp.int8:
        pool = _pool_of(("pages", "page", "kv_heads", "head_dim"), None)
    return pool


def kv_bytes_per_token(config: LlamaConfig, dtype: Any, layout: HeadLayout | None = None) -> int:
    """Bytes that one token takes in all layers, scales included."""
    pool = kv_pool_shapes(config, 1, 1, dtype, layout=layout)
    return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(pool))


def interleave_kv(
    k: Float[Array, "*batch kv head_dim"], v: Float[Array, "*batch kv head_dim"]
) -> Float[Array, "*batch kv2 head_dim"]:
    """K0 V0 K1 V1 …"""
    return jnp.stack((k, v), axis=-2).reshape(*k.shape[:-2], 2 * k.shape[-2], k.shape[-1])


def write_tokens(
    pool: KVPool,
    kv: Float[Array, "rows kv2 head_dim"],
    page_table: Int[Array, "rows max_pages"],
    positions: Int[Array, " rows"],
    valid: Bool[Array, " rows"],
) -> KVPool:
    """Writes one token a row at its position. Rows that are not `valid` write nothing.

    `page_table` holds pages of the layer that is written (already offset).
    """
    num_pages, page_size = pool.pages.shape[0], pool.page_size
    pages = jnp.take_along_axis(page_table, positions[:, None] // page_size, axis=1)[:, 0]
    pages, slots = jnp.where(valid, pages, num_pages), positions % page_size
    if len(pages) == 1:
        # XLA makes a scatter of one index an update that copies the pool, 90 s for 8 tokens. The second goes nowhere.
        pages = jnp.append(pages, num_pages)
        slots, kv = (jnp.concatenate((x, x)) for x in (slots, kv))

    def write(old: Shaped[Array, " pages *page"], new: Shaped[Array, " rows *token"]) -> Shaped[Array, " pages *page"]:
        if pool.heads_first:
            return old.at[pages, :, slots].set(new, mode="drop")
        flat = old.reshape(num_pages * page_size, *old.shape[2:])
        return flat.at[pages * page_size + slots].set(new, mode="drop").reshape(old.shape)

    return jax.tree.map(write, pool, stored(kv, pool))


def write_pages(
    pool: KVPool,
    kv: Float[Array, "tokens kv2 head_dim"],
    page_table: Int[Array, " max_pages"],
    start: Int[Array, ""],
    num_tokens: Int[Array, ""],
    layout: HeadLayout | None = None,
) -> KVPool:
    """Writes a chunk of one row from position `start`, whole pages at a time, in the pool's `layout`.

    `start` and the chunk's length are multiples of the page size. Of the chunk, `num_tokens` are real: pages past them
    are not written, and what the last page holds past them is never read before it is overwritten.
    """
    num_pages, page_size = pool.pages.shape[0], pool.page_size
    chunk_pages = kv.shape[0] // page_size
    pages = jax.lax.dynamic_slice_in_dim(page_table, start // page_size, chunk_pages)
    pages = jnp.where(jnp.arange(chunk_pages) * page_size < num_tokens, pages, num_pages)

    def write(
        old: Shaped[Array, " pages *page"], new: Shaped[Array, " tokens *token"]
    ) -> Shaped[Array, " pages *page"]:
        new = new.reshape(chunk_pages, page_size, *new.shape[1:])
        return old.at[pages].set(new.swapaxes(1, 2) if pool.heads_first else new, mode="drop")

    return jax.tree.map(write, pool, stored(kv, pool, layout))


@in_place("pool", static_argnames=("num_layers", "mesh"))
def clear_pages(
    pool: KVPool,
    pages: Int[Array, " some"],
    count: Int[Array, ""],
    shard: Int[Array, ""],
    *,
    num_layers: int,
    mesh: Mesh | None = None,
) -> KVPool:
    """Zeros in the first `count` of `pages` (numbers of layer 0) of `shard`, in every layer.

    `mesh` None is one device.
    """

    def clear(pool: KVPool, pages: Int[Array, " some"], count: Int[Array, ""], shard: Int[Array, ""]) -> KVPool:
        count = jnp.where(_owns(shard, mesh), count, 0)

        def clear_in(array: Shaped[Array, " pages *page"]) -> Shaped[Array, " pages *page"]:
            layers = array.reshape(num_layers, -1, *array.shape[1:])
            zeros = jnp.zeros((num_layers, 1, *array.shape[1:]), array.dtype)

            def clear_one(
                index: Int[Array, ""], layers: Shaped[Array, "layers a_layer *page"]
            ) -> Shaped[Array, "layers a_layer *page"]:
                return jax.lax.dynamic_update_slice_in_dim(layers, zeros, pages[index], axis=1)

            return jax.lax.fori_loop(0, count, clear_one, layers).reshape(array.shape)

        return jax.tree.map(clear_in, pool)

    spec, everywhere = pool_spec(pool, mesh), PartitionSpec()
    return on_devices(clear, mesh, (spec, *[everywhere] * 3), spec)(pool, pages, count, shard)


@in_place("pool", static_argnames=("num_layers",))
def copy_page(pool: KVPool, source: Int[Array, ""], target: Int[Array, ""], *, num_layers: int) -> KVPool:
    """Writes page `source` (numbers of layer 0) to page `target`, in every layer, on one device."""

    def copy(array: Shaped[Array, " pages *page"]) -> Shaped[Array, " pages *page"]:
        layers = array.reshape(num_layers, -1, *array.shape[1:])
        page = jax.lax.dynamic_slice_in_dim(layers, source, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(layers, page, target, axis=1).reshape(array.shape)

    copied: KVPool = jax.tree.map(copy, pool)
    return copied


@partial(jax.jit, static_argnames=("num_layers", "mesh"))
def read_pages(
    pool: KVPool, pages: Int[Array, " some"], shard: Int[Array, ""], *, num_layers: int, mesh: Mesh | None = None
) -> KVPool:
    """A copy of `pages` (numbers of layer 0) of `shard`, in every layer, `[layers * some, …]`. Every shard gets it.

    Where `pages` is 0 the copy means nothing: no row has page 0. `mesh` None is one device.
    """

    def read(pool: KVPool, pages: Int[Array, " some"], shard: Int[Array, ""]) -> KVPool:
        index = _in_every_layer(pool, pages, num_layers)
        copy = jax.tree.map(lambda part: part[index], pool)
        return copy if _num_shards(mesh) == 1 else jax.tree.map(lambda part: _of_owner(part, shard), copy)

    spec, everywhere = pool_spec(pool, mesh), PartitionSpec()
    copy_spec = pool_spec(pool, mesh, pages=())
    return on_devices(read, mesh, (spec, everywhere, everywhere), copy_spec)(pool, pages, shard)


@in_place("pool", static_argnames=("num_layers", "mesh"))
def put_pages(
    pool: KVPool,
    pages: Int[Array, " some"],
    copy: KVPool,
    shard: Int[Array, ""],
    *,
    num_layers: int,
    mesh: Mesh | None = None,
) -> KVPool:
    """Writes what `read_pages` gave to `pages` of `shard`, which need not be those it was read from.

    What was read where `pages` is 0 now is left out. `mesh` None is one device.
    """

    def put(pool: KVPool, pages: Int[Array, " some"], copy: KVPool, shard: Int[Array, ""]) -> KVPool:
        pages = jnp.where(_owns(shard, mesh), pages, 0)
        index = _in_every_layer(pool, pages, num_layers)
        index = jnp.where(jnp.tile(pages, num_layers) == 0, pool.pages.shape[0], index)
        return jax.tree.map(lambda part, new: part.at[index].set(new, mode="drop"), pool, copy)

    spec, everywhere = pool_spec(pool, mesh), PartitionSpec()
    specs = (spec, everywhere, pool_spec(pool, mesh, pages=()), everywhere)
    return on_devices(put, mesh, specs, spec)(pool, pages, copy, shard)


def pool_spec(pool: KVPool, mesh: Mesh | None, pages: tuple[str, ...] = RULES["pages"]) -> Any:
    """A `KVPool` of specs; `pages` are the mesh axes that split the pages."""
    return jax.tree.map(
        lambda axes: spec_of(mesh, pages, *(RULES[name] for name in axes[1:])),
        kv_pool_axes(pool.pages.dtype),
        is_leaf=lambda x: type(x) is tuple,
    )


def spec_of(mesh: Mesh | None, *names: tuple[str, ...]) -> PartitionSpec:
    """Each dimension's mesh axes, of those that split anything."""
    if mesh is None:
        return PartitionSpec()
    return PartitionSpec(*(splitting(axes, mesh) or None for axes in names))


def on_devices(run: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run` on each device of `mesh` with its own part of the arguments; `mesh` None: `run` itself."""
    if mesh is None:
        return run
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def is_own(shard: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether this device holds pages of `shard`; inside `on_devices`."""
    own: Array = jax.lax.axis_index(RULES["pages"]) == shard
    return own


def _num_shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else num_page_shards(mesh)


def _owns(shard: Int[Array, ""], mesh: Mesh | None) -> Bool[Array, ""] | bool:
    return _num_shards(mesh) == 1 or is_own(shard)


def _of_owner(part: Shaped[Array, " pages *page"], shard: Int[Array, ""]) -> Shaped[Array, " pages *page"]:
    """What `shard` has, bit for bit: a sum of floats would make -0 a 0."""
    bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{8 * part.dtype.itemsize}"))
    bits = jax.lax.psum(jnp.where(is_own(shard), bits, 0), RULES["pages"])
    return jax.lax.bitcast_convert_type(bits, part.dtype)


def _in_every_layer(pool: KVPool, pages: Int[Array, " some"], num_layers: int) -> Int[Array, " all_pages"]:
    first = jnp.arange(num_layers) * (pool.pages.shape[0] // num_layers)
    return (first[:, None] + pages).ravel()


def stored(kv: Float[Array, "tokens kv2 head_dim"], pool: KVPool, layout: HeadLayout | None = None) -> KVPool:
    """Tokens as `pool` keeps them, without `layout` [tokens, 2K, D] and [tokens, 2K]. NaN or infinity makes a scale
    NaN, which attention carries on."""
    if pool.scales is None:
        values, scales = kv.astype(pool.pages.dtype), None
    else:
        values, scales = quantize_rows(kv)
    if layout is None:
        return KVPool(values, scales)
    return KVPool(layout.pack(values), None if scales is None else layout.pack_scales(scales))
