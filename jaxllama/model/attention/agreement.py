"""Whether an implementation of attention computes what it should on the devices at hand: random ragged rows, beside
attention in float64 that knows neither pages nor blocks.

All that a kernel may get wrong is tried: rows that end within a page, at its end and after it, rows past a block of
keys, rows that are not active, several queries a row, a chunk after another, chunks that share a call, and what lies
past a row's end.
What is right within rounding is derived, not chosen: `rounding` has the bounds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jaxllama.model.attention.reference import BLOCK_TOKENS
from jaxllama.model.attention.rounding import exact_attention, limits
from jaxllama.model.attention.sharded import ShardedAttention
from jaxllama.model.cache import HeadLayout, KVPool, kv_pool_shapes, pool_spec
from jaxllama.model.config import LlamaConfig
from jaxllama.model.int8 import quantize_rows

_QUERIES = 4
_SHARPNESS = 3.0  # Peaked scores: a wrong scale shows.
_POISON = float("nan")


@dataclass(frozen=True)
class Agreement:
    """One way of calling it: the largest difference from float64, and whether a row alone gets the same bits.

    `share` is of what rounding can do: 1 is its limit (`rounding`). `row_alone` is None where rows do not come
    together.
    """

    call: str
    error: float
    share: float
    row_alone: bool | None = None

    @property
    def holds(self) -> bool:
        """NaN never does."""
        return self.share <= 1 and self.row_alone is not False

    @property
    def in_words(self) -> str:
        """How far off, beside what is allowed."""
        if not math.isfinite(self.share):
            return f"off by {self.error:.1g}"
        share = f"{self.share:.0%} of" if self.share < 2 else f"{self.share:,.0f} times"
        return f"off by {self.error:.1g}, {share} what rounding can do"


class _Apart:
    """Differences from float64, as they are found."""

    def __init__(self) -> None:
        self._error = self._largest = self._squares = 0.0
        self._num_values = self._num_heads = 0

    def add(
        self,
        difference: Float[np.ndarray, "tokens heads head_dim"],
        spread: Float[np.ndarray, "tokens heads head_dim"],
    ) -> None:
        """Values of spread 0, of a row of zeros perhaps, must be exact."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(difference == 0, 0.0, np.abs(difference) / spread)
        # NaN if anything is.
        self._error = float(np.maximum(self._error, np.abs(difference).max()))
        self._largest = float(np.maximum(self._largest, ratios.max()))
        self._squares += float((ratios**2).sum())
        self._num_values += ratios.size
        self._num_heads += ratios.size // ratios.shape[-1]

    def agreement(self, call: str, row_alone: bool | None = None) -> Agreement:
        """Of all of them."""
        largest, mean = limits(self._num_values, self._num_heads)
        share = np.maximum(self._largest / largest, np.sqrt(self._squares / self._num_values) / mean)
        return Agreement(call, self._error, float(share), row_alone)


def agreements(
    attention: ShardedAttention,
    config: LlamaConfig,
    *,
    page_size: int,
    dtype: Any,
    kv_dtype: Any,
    needs_clean_pages: bool,
    layout: HeadLayout | None = None,
    chunks_in_group: int = 1,
    seed: int = 0,
) -> list[Agreement]:
    """`attention` in the last layer of `config`, for products of `dtype` and a cache of `kv_dtype`: of prefill, decode,
    verify.

    A call of prefill has `chunks_in_group` chunks of each group of `data`, as `Platform.chunks_in_group` says. Two
    layers are enough, and a small pool. Unless it `needs_clean_pages`, slots that no token has hold NaN. Takes seconds,
    most of them compilation.

    Raises: whatever the kernel's compilation raises.
    """
    dtypes = (jnp.dtype(dtype), jnp.dtype(kv_dtype))
    story = _Story(attention, config, page_size, *dtypes, needs_clean_pages, layout, chunks_in_group, seed)
    return [story.prefill(), story.decode(), story.verify()]


class _Chunk(NamedTuple):
    """Tokens of a row from `start` on, of which the first `num_tokens` are real."""

    row: int
    start: int
    num_tokens: int
    q: Float[Array, "tokens heads head_dim"]
    kv: Float[Array, "tokens kv2 head_dim"]


class _Story:
    """Rows that are prefilled, then decoded, then verified, in one pool, whose keys and values are kept here too."""

    def __init__(
        self,
        attention: ShardedAttention,
        config: LlamaConfig,
        page_size: int,
        dtype: Any,
        kv_dtype: Any,
        needs_clean_pages: bool,
        layout: HeadLayout | None,
        chunks_in_group: int,
        seed: int,
    ) -> None:
        self._attention, self._config, self._dtype, self._kv_dtype = attention, config, dtype, kv_dtype
        self._rng = np.random.default_rng(seed)
        longest = -(-max(3 * page_size, 5 * BLOCK_TOKENS // 2) // page_size) * page_size
        ends = [0, page_size - 1, page_size, page_size + 1, longest // 2 + 3, longest]
        num_shards = attention.num_shards
        self._num_groups = 1 if attention.mesh is None else int(attention.mesh.shape["data"])
        self._in_group = chunks_in_group
        # Not 1: a shard's rows are more than one program's fewest.
        rows_per_shard = -(-(len(ends) + 1) // num_shards)
        self._num_rows = rows_per_shard * num_shards
        self._lengths = np.resize(ends, self._num_rows)
        self._active = np.arange(self._num_rows) != min(2, self._num_rows - 1)
        self._shard = np.arange(self._num_rows) // rows_per_shard
        self._chunk = -(-(longest // 2) // page_size) * page_size
        width = (longest + self._chunk) // page_size + 1
        self._pages_per_shard = 1 + rows_per_shard * width
        self._table = self._make_table(width, rows_per_shard)
        shapes = kv_pool_shapes(config, self._pages_per_shard, page_size, kv_dtype, num_shards, layout)
        fill = 0.0 if needs_clean_pages else _POISON
        self._pool: KVPool = jax.tree.map(lambda part: _full(part, fill), shapes)
        if attention.mesh is not None:
            specs = pool_spec(self._pool, attention.mesh)
            mesh = attention.mesh
            self._pool = jax.tree.map(
                lambda part, spec: jax.device_put(part, NamedSharding(mesh, spec)), self._pool, specs
            )
        self._keys: list[list[np.ndarray]] = [[] for _ in range(self._num_rows)]
        self._values: list[list[np.ndarray]] = [[] for _ in range(self._num_rows)]
        # Made here, so that no program of another implementation is found in JAX's cache.
        self._prefill = jax.jit(lambda *args: attention.prefill(*args), donate_argnums=2)
        self._decode = jax.jit(lambda *args: attention.decode(*args))
        self._verify = jax.jit(lambda *args: attention.verify(*args))

    def prefill(self) -> Agreement:
        """Every row's tokens, in one chunk or two, as many in a call as it has places."""
        apart, same, num_places = _Apart(), True, self._num_groups * self._in_group
        for call in self._calls():
            out = self._run(call)
            last = max(call)
            if num_places > 1:
                # Once more without the others, in its group's first place: it writes and sees what it did before.
                place = last // self._in_group * self._in_group
                count = call[last].num_tokens
                alone = self._run({place: call[last]})[place, :count]
                same &= np.array_equal(np.asarray(alone), np.asarray(out[last, :count]))
            for place, (row, start, count, q, kv) in call.items():
                self._keep(row, kv[:count])
                self._compare(apart, out[place, :count], q[:count], row, start)
        if num_places == 1:
            return apart.agreement("prefill")
        return apart.agreement(f"prefill of {num_places} chunks", same)

    def _calls(self) -> Iterator[dict[int, _Chunk]]:
        """All chunks by their place in a call, those of a row in their order."""
        waiting: list[deque[tuple[int, int]]] = [deque() for _ in range(self._num_groups)]
        for row, length in enumerate(self._lengths):
            group = int(self._shard[row]) * self._num_groups // self._attention.num_shards
            waiting[group].extend((row, start) for start in range(0, int(length), self._chunk))
        while any(waiting):
            call = {}
            for group, own in enumerate(waiting):
                for place in range(min(self._in_group, len(own))):
                    row, start = own.popleft()
                    count = min(self._chunk, int(self._lengths[row]) - start)
                    chunk = _Chunk(row, start, count, self._queries(self._chunk), self._new(self._chunk))
                    call[group * self._in_group + place] = chunk
            yield call

    def _run(self, call: Mapping[int, _Chunk]) -> Float[Array, "places tokens heads head_dim"]:
        """The chunks in their places, the other places without tokens."""
        some = next(iter(call.values()))
        num_places = self._num_groups * self._in_group
        at = np.zeros((3, num_places), np.int32)
        table = np.zeros((num_places, self._table.shape[1]), np.int32)
        for place, chunk in call.items():
            at[:, place] = chunk.start, chunk.num_tokens, self._shard[chunk.row]
            table[place] = self._table[chunk.row]
        empty = some._replace(q=jnp.zeros_like(some.q), kv=jnp.zeros_like(some.kv))
        chunks = [call.get(place, empty) for place in range(num_places)]
        q, kv = (jnp.stack(parts) for parts in zip(*((chunk.q, chunk.kv) for chunk in chunks), strict=True))
        out, self._pool = self._prefill(q, kv, self._pool, jnp.asarray(table), *map(jnp.asarray, at))
        return out

    def decode(self) -> Agreement:
        """A token of every active row."""
        q, kv = self._queries(self._num_rows), self._new(self._num_rows)
        args = (jnp.asarray(self._table), jnp.asarray(self._lengths, jnp.int32))
        out, pool = self._decode(q, kv, self._pool, *args, jnp.asarray(self._active))

        def alone(mask: Bool[np.ndarray, " rows"]) -> Float[Array, "rows heads head_dim"]:
            result: Array = self._decode(q, kv, self._pool, *args, jnp.asarray(mask))[0]
            return result

        same = self._rows_alone(out, alone)
        self._pool = pool
        apart = _Apart()
        for row in np.flatnonzero(self._active).tolist():
            self._keep(row, kv[row : row + 1])
            self._compare(apart, out[row : row + 1], q[row : row + 1], row, int(self._lengths[row]))
        return apart.agreement("decode", same)

    def verify(self) -> Agreement:
        """From one to four tokens of every active row."""
        lengths = self._lengths + self._active
        counts = np.where(self._active, 1 + np.arange(self._num_rows) % _QUERIES, 0)
        q = self._queries(self._num_rows * _QUERIES).reshape(self._num_rows, _QUERIES, -1, self._config.head_dim)
        kv = self._new(self._num_rows * _QUERIES).reshape(self._num_rows, _QUERIES, -1, self._config.head_dim)
        args = (jnp.asarray(self._table), jnp.asarray(lengths, jnp.int32))
        out, pool = self._verify(q, kv, self._pool, *args, jnp.asarray(counts, jnp.int32))

        def alone(mask: Bool[np.ndarray, " rows"]) -> Float[Array, "rows tokens heads head_dim"]:
            result: Array = self._verify(q, kv, self._pool, *args, jnp.asarray(np.where(mask, counts, 0), jnp.int32))[0]
            return result

        out = jnp.where((np.arange(_QUERIES) < counts[:, None])[..., None, None], out, 0)
        same = self._rows_alone(
            out, lambda mask: jnp.where((np.arange(_QUERIES) < counts[:, None])[..., None, None], alone(mask), 0)
        )
        self._pool = pool
        apart = _Apart()
        for row in np.flatnonzero(self._active).tolist():
            self._keep(row, kv[row, : counts[row]])
            found, asked = out[row, : counts[row]], q[row, : counts[row]]
            self._compare(apart, found, asked, row, int(lengths[row]))
        return apart.agreement(f"verify of {_QUERIES}", same)

    def _rows_alone(
        self, together: Float[Array, "rows ..."], alone: Callable[[Bool[np.ndarray, " rows"]], Float[Array, "rows ..."]]
    ) -> bool:
        """Whether each of three rows has the bits of `together` when only it is active."""
        rows = np.flatnonzero(self._active)[[0, -2, -1]]
        bits = np.asarray(together)
        return all(np.array_equal(np.asarray(alone(np.arange(self._num_rows) == row))[row], bits[row]) for row in rows)

    def _make_table(self, width: int, rows_per_shard: int) -> Int[np.ndarray, "rows pages"]:
        """Each row's pages, scattered, of the last layer; a shard numbers its own."""
        tables = []
        for _ in range(self._num_rows // rows_per_shard):
            pages = 1 + self._rng.permutation(rows_per_shard * width)
            tables.append(pages.reshape(rows_per_shard, width))
        first = (self._config.num_layers - 1) * self._pages_per_shard
        return (np.concatenate(tables) + first).astype(np.int32)

    def _queries(self, count: int) -> Float[Array, "count heads head_dim"]:
        shape = (count, self._config.num_heads, self._config.head_dim)
        return jnp.asarray(_SHARPNESS * self._rng.standard_normal(shape), self._dtype)

    def _new(self, count: int) -> Float[Array, "count kv2 head_dim"]:
        shape = (count, 2 * self._config.num_kv_heads, self._config.head_dim)
        return jnp.asarray(self._rng.standard_normal(shape), self._dtype)

    def _keep(self, row: int, kv: Float[Array, "tokens kv2 head_dim"]) -> None:
        """Keeps what the cache has of new keys and values now: rounded as its dtype says."""
        if self._kv_dtype == jnp.int8:
            values, scales = quantize_rows(kv)
            stored = np.asarray(values, np.float64) * np.asarray(scales, np.float64)[..., None]
        else:
            stored = np.asarray(kv.astype(self._kv_dtype), np.float64)
        self._keys[row].append(stored[:, 0::2])
        self._values[row].append(stored[:, 1::2])

    def _compare(self, apart: _Apart, out: Any, q: Any, row: int, start: int) -> None:
        """`out`, of queries from position `start` on."""
        keys, values = np.concatenate(self._keys[row]), np.concatenate(self._values[row])
        num_roundings = 2 if self._kv_dtype == jnp.int8 else 1
        how: dict[str, Any] = {"dtype": self._dtype.name, "num_roundings": num_roundings}
        exact = exact_attention(np.asarray(q, np.float64), keys, values, start, **how)
        apart.add(np.asarray(out, np.float64) - exact.out, exact.spread)


def _full(part: Any, value: float) -> Array:
    is_int = jnp.issubdtype(part.dtype, jnp.integer)
    return jnp.full(part.shape, 127 if is_int and value != 0 else 0 if is_int else value, part.dtype)
