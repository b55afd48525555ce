"""This process's devices: the programs in the order they are called, and the state they change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Int, Shaped

from jaxllama.decode.draft_model import DraftModel
from jaxllama.decode.drafts import Drafting, Paths
from jaxllama.decode.scoring import Scores, Targets, prefill_scores
from jaxllama.decode.state import (
    Chunk,
    DecodeState,
    Place,
    StepOutput,
    any_row,
    insert,
    make_state,
    state_shardings,
)
from jaxllama.decode.steps import decode_steps, prefill
from jaxllama.engine.calls import (
    Call,
    ClearPages,
    Compile,
    CopyPage,
    Decode,
    ForgetPages,
    Insert,
    Prefill,
    PrefillDraft,
    RestorePages,
    SavePages,
    Score,
    SetMasks,
    SetPageTable,
)
from jaxllama.engine.compilation import OnProgress, announced, compile_all
from jaxllama.hosts.watch import DeviceWatch
from jaxllama.model.cache import KVPool, clear_pages, copy_page, put_pages, read_pages
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import uneven_splits
from jaxllama.model.params import Params
from jaxllama.model.platforms.platform import Platform

PAGES_PER_COPY = 16

logger = logging.getLogger("jaxllama.engine")


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
    """`Programs` on this process's share of `mesh`, with the draft model if `shapes` have a pool for one. The state is
    made at the first call.

    `on_progress` is told how far a `Compile` has come. With `shows_compilation` people are told what is compiled when
    that takes long, at the first call of each program; of a `Compile` only where nobody else is told. `watch` learns of
    every wait; the first call of each kind, which may compile for minutes, is none.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        mesh: Mesh,
        shapes: DecodeState,
        platform: Platform,
        watch: DeviceWatch | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        for note in uneven_splits(config, mesh):
            logger.info("%s", note)
        self.on_progress: OnProgress | None = None
        self.shows_compilation = False
        self._called: set[str] = set()
        self._config = config
        self._platform = platform
        self._watch = watch
        self.params = params
        self._draft = draft
        self._shapes = shapes
        self._shardings = state_shardings(config, mesh, shapes, None if draft is None else draft.config)
        self._state: DecodeState | None = None
        self._saved: dict[int, list[HostCopy]] = {}
        self._replicate = jax.jit(lambda output: output, out_shardings=NamedSharding(mesh, PartitionSpec()))
        layers = {"num_layers": config.num_layers, "mesh": platform.attention.mesh}
        self._read_pages, self._put_pages = (partial(move, **layers) for move in (read_pages, put_pages))

    @overload
    def run(self, call: Decode) -> StepOutput: ...
    @overload
    def run(self, call: Score) -> Scores: ...
    @overload
    def run(self, call: Call) -> StepOutput | Scores | None: ...
    def run(self, call: Call) -> StepOutput | Scores | None:
        """Makes `call`. All but `Compile` and `SavePages` return before the device is done."""
        program = self._program_of(call)
        kind = program or type(call).__name__
        # What a trace (`system.profile`) shows; without one it costs less than a microsecond.
        with jax.profiler.TraceAnnotation(kind):
            if kind in self._called:
                with self._waiting(may_work=True):
                    return self._run(call)
            self._called.add(kind)
            with announced(program) if program is not None and self.shows_compilation else nullcontext():
                return self._run(call)

    def _program_of(self, call: Call) -> str | None:
        """The name of what the first such call compiles, None if it is little."""
        match call:
            case Compile():
                return "all programs" if self.on_progress is None else None
            case Prefill(_, chunk):
                return _prefill_name(*np.shape(chunk.tokens))
            case PrefillDraft(_, chunk):
                return _draft_name(*np.shape(chunk.tokens))
            case Score(_, chunk):
                return _score_name(len(chunk.tokens))
            case Decode(num_rows=num_rows, steers=steers):
                return _decode_name(int(num_rows)) + (", steered" if steers else "")
        return None

    def _run(self, call: Call) -> StepOutput | Scores | None:
        if isinstance(call, Compile):
            prefilling = dict(zip(call.chunk_sizes.tolist(), call.num_chunks.tolist(), strict=True))
            decoding = dict(zip(call.row_buckets.tolist(), call.num_drafts.tolist(), strict=True))
            # The state takes half a second to make, most of it without Python.
            with ThreadPoolExecutor(1, "jaxllama-state") as beside:
                made = beside.submit(self._get_state)
                self._compile(prefilling, decoding)
                made.result()
            return None
        state = self._get_state()
        output: StepOutput | Scores | None = None
        match call:
            case Prefill():
                state = state._replace(pool=self._bound(state, call)())
            case PrefillDraft():
                state = state._replace(draft_pool=self._bound(state, call)())
            case Score():
                pool, scores = self._bound(state, call)()
                state, output = state._replace(pool=pool), self._readable(scores)
            case Insert():
                state = self._bound(state, call)()
            case Decode():
                state, steps = self._bound(state, call)()
                output = self._readable(steps)
            case SetPageTable(table):
                state = state._replace(page_table=_put(table, self._shardings.page_table))
            case SetMasks():
                state = self._set_masks(state, call)
            case ClearPages(pages, num_pages, shard):
                state = self._clear_pages(state, pages, num_pages, shard)
            case CopyPage(source, target):
                pool = copy_page(state.pool, source, target, num_layers=self._config.num_layers)
                state = state._replace(pool=pool)
            case SavePages(name, pages, shard):
                copies = [self._read_pages(state.pool, block, shard) for block in _blocks(pages)]
                self._saved[int(name)] = [HostCopy.of(copy) for copy in copies]
            case RestorePages(name, pages, shard):
                pool = state.pool
                for block, copy in zip(_blocks(pages), self._saved.pop(int(name)), strict=True):
                    pool = self._put_pages(pool, block, copy.on_devices(), shard)
                state = state._replace(pool=pool)
            case ForgetPages(name):
                del self._saved[int(name)]
        self._state = state
        return output

    def _readable[T: (StepOutput, Scores)](self, output: T) -> T:
        """`output` where this process can read all of it."""
        if all(array.is_fully_addressable or array.is_fully_replicated for array in output):
            return output
        whole: T = self._replicate(output)
        return whole

    def wait(self) -> None:
        """Returns when the devices have done all that was asked."""
        with self._waiting():
            jax.block_until_ready(self._state)

    def _waiting(self, *, may_work: bool = False) -> AbstractContextManager[None]:
        return nullcontext() if self._watch is None else self._watch.waiting(may_work=may_work)

    def _bound(self, state: DecodeState, call: Prefill | PrefillDraft | Score | Insert | Decode) -> partial[Any]:
        """The program of `call` with its arguments, as it is run and as it is compiled beforehand: JAX knows a call by
        the names of its arguments too."""
        match call:
            case Prefill(place, chunk):
                args: tuple[Any, ...] = (self._config, self.params, state.pool, place, chunk)
                return partial(prefill, *args, platform=self._platform)
            case PrefillDraft(place, chunk):
                draft = self._draft
                assert draft is not None
                args = (draft.config, draft.params, state.draft_pool, place, chunk)
                return partial(prefill, *args, platform=draft.platform)
            case Score(place, chunk, targets):
                args = (self._config, self.params, state.pool, place, chunk, targets)
                return partial(prefill_scores, *args, platform=self._platform)
            case Insert(row, new):
                return partial(insert, state, row, new)
            case Decode(max_steps, keep, num_rows, steers, num_drafts, drafting):
                options: dict[str, Any] = {"num_rows": int(num_rows), "steers": bool(steers)}
                if num_drafts:
                    options |= {"num_drafts": int(num_drafts), "drafting": drafting, "draft": self._draft}
                args = (self._config, self.params, state, max_steps, keep)
                return partial(decode_steps, *args, **options, platform=self._platform)

    def _compile(self, prefilling: dict[int, int], decoding: dict[int, int]) -> None:
        """Several programs at a time, those that take longest first."""
        state: DecodeState = jax.tree.map(
            lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
            self._shapes,
            self._shardings,
        )
        config, platform = self._config, self._platform
        num_rows, table_width = self._shapes.page_table.shape
        zero, pages = np.int32(0), np.zeros(table_width, np.int32)
        keep = np.zeros(num_rows, np.bool_)
        sizes = sorted(prefilling, reverse=True)
        shapes = [(size,) if prefilling[size] == 1 else (prefilling[size], size) for size in sizes]

        def decode(bucket: int) -> Decode:
            num_drafts = decoding[bucket]
            drafting = Drafting(zero, np.zeros(1 + num_drafts, np.float32), Paths.none(num_rows, num_drafts))
            return Decode(zero, keep, np.int32(bucket), num_drafts=np.int32(num_drafts), drafting=drafting)

        def chunk(*shape: int) -> tuple[Place, Chunk]:
            none, numbers = np.zeros(shape, np.int32), np.zeros(shape[:-1], np.int32)
            return Place(np.zeros((*shape[:-1], table_width), np.int32), numbers), Chunk(none, numbers, numbers)

        def score(size: int) -> Score:
            return Score(*chunk(size), Targets(np.zeros(size, np.int32), zero, zero))

        calls: dict[str, Prefill | PrefillDraft | Score | Insert | Decode] = {
            _decode_name(n): decode(n) for n in sorted(decoding, reverse=True)
        }
        calls |= {_prefill_name(*shape): Prefill(*chunk(*shape)) for shape in shapes}
        calls |= {_score_name(n): score(n) for n in sizes}
        if self._draft is not None:
            calls |= {_draft_name(*shape): PrefillDraft(*chunk(*shape)) for shape in shapes}
        calls["insert"] = Insert(zero, any_row(config, state.rows.history.shape[1]))

        def lower(call: Prefill | PrefillDraft | Score | Insert | Decode) -> Any:
            bound = self._bound(state, call)
            return bound.func.lower(*bound.args, **bound.keywords)  # type: ignore[attr-defined]

        programs: dict[str, Callable[[], Any]] = {name: partial(lower, call) for name, call in calls.items()}
        if platform.starts_anywhere:
            programs["copy a page"] = lambda: copy_page.lower(state.pool, zero, zero, num_layers=config.num_layers)
        if platform.needs_clean_pages:
            layers = {"num_layers": config.num_layers, "mesh": platform.attention.mesh}
            programs["clear pages"] = lambda: clear_pages.lower(state.pool, pages, zero, zero, **layers)
        compile_all(programs, self.on_progress or (lambda done, total, names: None))

    def _clear_pages(self, state: DecodeState, *where: Any) -> DecodeState:
        mesh = self._platform.attention.mesh
        state = state._replace(pool=clear_pages(state.pool, *where, num_layers=self._config.num_layers, mesh=mesh))
        if self._draft is None:
            return state
        layers = self._draft.config.num_layers
        return state._replace(draft_pool=clear_pages(state.draft_pool, *where, num_layers=layers, mesh=mesh))

    def _set_masks(self, state: DecodeState, call: SetMasks) -> DecodeState:
        shardings = self._shardings.rows.sampling
        sampling = state.rows.sampling._replace(
            token_mask=_put(call.token_mask, shardings.token_mask), is_masked=_put(call.is_masked, shardings.is_masked)
        )
        return state._replace(rows=state.rows._replace(sampling=sampling))

    def _get_state(self) -> DecodeState:
        if self._state is None:
            self._state = make_state(self._shapes, self._shardings)
        return self._state


def _decode_name(num_rows: int) -> str:
    return f"decode of {num_rows} rows"


def _prefill_name(*shape: int) -> str:
    return f"prefill of {' × '.join(map(str, shape))} tokens"


def _draft_name(*shape: int) -> str:
    return f"{_prefill_name(*shape)} by the draft model"


def _score_name(num_tokens: int) -> str:
    return f"scores of {num_tokens} tokens"


def _put(array: Shaped[np.ndarray, " ..."], sharding: Any) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    # Here `device_put` would compare the array between all processes, a collective at every call.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
