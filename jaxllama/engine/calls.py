"""What the engine asks of the devices, as data: a call is a tuple of NumPy arrays, which `Programs.run` makes.

`hosts.lockstep` sends any of them to the other processes, so that a call is written here and in `device` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, overload

import numpy as np
from jaxtyping import Bool, Int, UInt32

from jaxllama.decode.drafts import Drafting, Paths
from jaxllama.decode.scoring import Scores, Targets
from jaxllama.decode.state import Chunk, Place, RowState, StepOutput


class Compile(NamedTuple):
    """Compile what the other calls run: for these sizes of chunks, of which prefill takes so many at a time, and for
    these numbers of rows, each with its drafts."""

    chunk_sizes: Int[np.ndarray, " sizes"]
    num_chunks: Int[np.ndarray, " sizes"]
    row_buckets: Int[np.ndarray, " buckets"]
    num_drafts: Int[np.ndarray, " buckets"]

    @classmethod
    def of(cls, num_chunks: Mapping[int, int], num_drafts: Mapping[int, int]) -> Compile:
        """By the sizes of chunks and the numbers of rows."""
        parts = (num_chunks, num_chunks.values(), num_drafts, num_drafts.values())
        return cls(*(np.array([*part], np.int32) for part in parts))


class Prefill(NamedTuple):
    """As `decode.steps.prefill`."""

    place: Place
    chunk: Chunk


class PrefillDraft(NamedTuple):
    """The same in the draft model's cache."""

    place: Place
    chunk: Chunk


class Score(NamedTuple):
    """As `decode.scoring.prefill_scores`."""

    place: Place
    chunk: Chunk
    targets: Targets


class Insert(NamedTuple):
    """As `decode.state.insert`."""

    row: np.int32
    new: RowState


class Decode(NamedTuple):
    """As `decode.steps.decode_steps`."""

    max_steps: np.int32
    keep: Bool[np.ndarray, " rows"]
    num_rows: np.int32
    steers: np.bool_ = np.bool_(False)
    num_drafts: np.int32 = np.int32(0)
    drafting: Drafting = Drafting(np.int32(0), np.zeros(1, np.float32), Paths.none(0, 0))


class SetPageTable(NamedTuple):
    """Replace every row's page table."""

    table: Int[np.ndarray, "rows max_pages"]


class SetMasks(NamedTuple):
    """Replace every row's `token_mask` and `is_masked`."""

    token_mask: UInt32[np.ndarray, "rows masks words"]
    is_masked: Bool[np.ndarray, " rows"]


class ClearPages(NamedTuple):
    """As `model.cache.clear_pages`."""

    pages: Int[np.ndarray, " max_pages"]
    num_pages: np.int32
    shard: np.int32


class CopyPage(NamedTuple):
    """As `model.cache.copy_page`."""

    source: np.int32
    target: np.int32


class SavePages(NamedTuple):
    """Copy `pages` to the hosts, under a number, but for the draft model's part of them."""

    name: np.int32
    pages: Int[np.ndarray, " pages"]
    shard: np.int32


class RestorePages(NamedTuple):
    """Copy what was saved to these pages, but nothing where they are 0, and drop it."""

    name: np.int32
    pages: Int[np.ndarray, " pages"]
    shard: np.int32


class ForgetPages(NamedTuple):
    """Drop what was saved."""

    name: np.int32


type Call = (
    Compile
    | Prefill
    | PrefillDraft
    | Score
    | Insert
    | Decode
    | SetPageTable
    | SetMasks
    | ClearPages
    | CopyPage
    | SavePages
    | RestorePages
    | ForgetPages
)
CALLS = (
    Compile,
    Prefill,
    PrefillDraft,
    Score,
    Insert,
    Decode,
    SetPageTable,
    SetMasks,
    ClearPages,
    CopyPage,
    SavePages,
    RestorePages,
    ForgetPages,
)


class Programs(Protocol):
    """What makes the calls: the devices of this process, or of all processes."""

    @overload
    def run(self, call: Decode) -> StepOutput: ...
    @overload
    def run(self, call: Score) -> Scores: ...
    @overload
    def run(self, call: Call) -> StepOutput | Scores | None: ...
    def run(self, call: Call) -> StepOutput | Scores | None:
        """Makes `call`, and returns before the devices are done. This process can read the whole output."""

    def wait(self) -> None:
        """Returns when the devices of this process have done all that was asked."""
