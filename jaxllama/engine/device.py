"""The device programs in the order the engine calls them, and the state they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Bool, Int, UInt32

from jaxllama.decode.state import DecodeState, RowState, StepOutput, any_row, insert, make_state, state_shardings
from jaxllama.decode.steps import clear, copy_in, copy_out, decode_steps, prefill
from jaxllama.engine.compilation import OnProgress, compile_all
from jaxllama.model.cache import KVPool
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import Params
from jaxllama.model.platforms.platform import Platform

PAGES_PER_COPY = 16


class Programs(Protocol):
    """What the engine asks of the devices. Arguments are NumPy's; calls return before the devices are done."""

    def compile(
        self, chunk_sizes: Int[np.ndarray, " sizes"], row_buckets: Int[np.ndarray, " buckets"], on_progress: OnProgress
    ) -> None:
        """Compiles what the other calls run, for these chunks and numbers of rows. Returns when it is done."""

    def prefill(
        self,
        tokens: Int[np.ndarray, " chunk"],
        table: Int[np.ndarray, " max_pages"],
        start: np.int32,
        num_tokens: np.int32,
        shard: np.int32,
    ) -> None:
        """As `decode.prefill`."""

    def clear(self, pages: Int[np.ndarray, " max_pages"], count: np.int32, shard: np.int32) -> None:
        """As `decode.clear`."""

    def save(self, name: np.int32, pages: Int[np.ndarray, " pages"], shard: np.int32) -> None:
        """Copies `pages` to the hosts, under a number."""

    def restore(self, name: np.int32, pages: Int[np.ndarray, " pages"], shard: np.int32) -> None:
        """Copies what was saved to these pages instead, but nothing where they are 0. It can be done once."""

    def forget(self, name: np.int32) -> None:
        """Drops what was saved."""

    def insert(self, row: np.int32, new: RowState) -> None:
        """As `decode.insert`."""

    def set_page_table(self, table: Int[np.ndarray, "rows max_pages"]) -> None:
        """Replaces every row's page table."""

    def set_masks(self, masks: UInt32[np.ndarray, "rows words"], is_masked: Bool[np.ndarray, " rows"]) -> None:
        """Replaces every row's `token_mask` and `is_masked`."""

    def decode(self, max_steps: np.int32, keep: Bool[np.ndarray, " rows"], num_rows: int) -> StepOutput:
        """As `decode.decode_steps`; this process can read the whole output."""

    def wait(self) -> None:
        """Returns when the devices have done all that was asked."""


@dataclass(frozen=True)
class HostCopy:
    """The parts of a pool's pages that this process's devices hold, in its memory."""

    tree: Any
    leaves: list[tuple[tuple[int, ...], Sharding, list[tuple[jax.Device, np.ndarray]]]]

    @classmethod
    def of(cls, copy: KVPool) -> HostCopy:
        """Waits for the device."""
        leaves, tree = jax.tree.flatten(copy)
        for leaf in leaves:
            leaf.copy_to_host_async()
        return cls(
            tree,
            [(x.shape, x.sharding, [(s.device, np.asarray(s.data)) for s in x.addressable_shards]) for x in leaves],
        )

    def on_devices(self) -> KVPool:
        """The same arrays again."""
        leaves = [
            jax.make_array_from_single_device_arrays(shape, sharding, [jax.device_put(x, d) for d, x in shards])
            for shape, sharding, shards in self.leaves
        ]
        pool: KVPool = jax.tree.unflatten(self.tree, leaves)
        return pool


def _blocks(pages: Int[np.ndarray, " pages"]) -> list[Int[np.ndarray, " block"]]:
    """`pages` in parts of one length, so that one program copies them all. Zeros fill the last."""
    padded = np.pad(pages, (0, -len(pages) % PAGES_PER_COPY))
    return list(padded.reshape(-1, PAGES_PER_COPY))


class Device:
    """`Programs` on this process's share of `mesh`. The state is made at the first call."""

    def __init__(
        self, config: LlamaConfig, params: Params, mesh: Mesh, shapes: DecodeState, platform: Platform
    ) -> None:
        self._config = config
        self._platform = platform
        self._params = params
        self._shapes = shapes
        self._shardings = state_shardings(config, mesh, shapes)
        self._state: DecodeState | None = None
        self._saved: dict[int, list[HostCopy]] = {}
        self._replicate = jax.jit(lambda output: output, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def compile(
        self, chunk_sizes: Int[np.ndarray, " sizes"], row_buckets: Int[np.ndarray, " buckets"], on_progress: OnProgress
    ) -> None:
        """Compiles several programs at a time, those that take longest first."""
        config, params, state = self._config, self._params, self._get_state()
        num_rows, table_width = self._shapes.page_table.shape
        zero, pages = np.int32(0), np.zeros(table_width, np.int32)
        row = any_row(config)
        keep = np.zeros(num_rows, np.bool_)

        def lower_decode(bucket: int) -> Any:
            return decode_steps.lower(config, params, state, zero, keep, num_rows=bucket, platform=self._platform)

        def lower_prefill(size: int) -> Any:
            tokens = np.zeros(size, np.int32)
            at = (zero,) * 3
            return prefill.lower(config, params, state.pool, tokens, pages, *at, platform=self._platform)

        programs: dict[str, Callable[[], Any]] = {
            f"decode of {n} rows": partial(lower_decode, n) for n in sorted(row_buckets.tolist(), reverse=True)
        }
        programs |= {
            f"prefill of {n} tokens": partial(lower_prefill, n) for n in sorted(chunk_sizes.tolist(), reverse=True)
        }
        programs["insert"] = lambda: insert.lower(state, zero, row)
        if self._platform.needs_clean_pages:
            programs["clear"] = lambda: clear.lower(config, state.pool, pages, zero, zero, platform=self._platform)
        compile_all(programs, on_progress)

    def prefill(
        self,
        tokens: Int[np.ndarray, " chunk"],
        table: Int[np.ndarray, " max_pages"],
        start: np.int32,
        num_tokens: np.int32,
        shard: np.int32,
    ) -> None:
        """Writes a chunk into the cache."""
        state, at = self._get_state(), (start, num_tokens, shard)
        pool = prefill(self._config, self._params, state.pool, tokens, table, *at, platform=self._platform)
        self._state = state._replace(pool=pool)

    def clear(self, pages: Int[np.ndarray, " max_pages"], count: np.int32, shard: np.int32) -> None:
        """Zeros in the first `count` of `pages`."""
        state = self._get_state()
        pool = clear(self._config, state.pool, pages, count, shard, platform=self._platform)
        self._state = state._replace(pool=pool)

    def save(self, name: np.int32, pages: Int[np.ndarray, " pages"], shard: np.int32) -> None:
        """Copies `pages` to this process's memory. Waits for the device."""
        pool = self._get_state().pool
        copies = [copy_out(self._config, pool, block, shard, platform=self._platform) for block in _blocks(pages)]
        self._saved[int(name)] = [HostCopy.of(copy) for copy in copies]

    def restore(self, name: np.int32, pages: Int[np.ndarray, " pages"], shard: np.int32) -> None:
        """Copies what was saved to `pages`, and drops it."""
        state = self._get_state()
        pool = state.pool
        for block, copy in zip(_blocks(pages), self._saved.pop(int(name)), strict=True):
            pool = copy_in(self._config, pool, block, copy.on_devices(), shard, platform=self._platform)
        self._state = state._replace(pool=pool)

    def forget(self, name: np.int32) -> None:
        """Drops what was saved."""
        del self._saved[int(name)]

    def insert(self, row: np.int32, new: RowState) -> None:
        """Puts a row in place."""
        self._state = insert(self._get_state(), row, new)

    def set_page_table(self, table: Int[np.ndarray, "rows max_pages"]) -> None:
        """Replaces every row's page table."""
        self._state = self._get_state()._replace(page_table=_put(table, self._shardings.page_table))

    def set_masks(self, masks: UInt32[np.ndarray, "rows words"], is_masked: Bool[np.ndarray, " rows"]) -> None:
        """Replaces every row's mask."""
        state, shardings = self._get_state(), self._shardings.rows.sampling
        sampling = state.rows.sampling._replace(
            token_mask=_put(masks, shardings.token_mask), is_masked=_put(is_masked, shardings.is_masked)
        )
        self._state = state._replace(rows=state.rows._replace(sampling=sampling))

    def decode(self, max_steps: np.int32, keep: Bool[np.ndarray, " rows"], num_rows: int) -> StepOutput:
        """Runs up to `max_steps` steps."""
        state = self._get_state()
        self._state, output = decode_steps(
            self._config, self._params, state, max_steps, keep, num_rows=num_rows, platform=self._platform
        )
        if all(array.is_fully_addressable or array.is_fully_replicated for array in output):
            return output
        replicated: StepOutput = self._replicate(output)
        return replicated

    def wait(self) -> None:
        """Returns when the devices have done all that was asked."""
        jax.block_until_ready(self._state)

    def _get_state(self) -> DecodeState:
        if self._state is None:
            self._state = make_state(self._shapes, self._shardings)
        return self._state


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # Here `device_put` would compare the array between all processes, a collective at every call.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
