"""Which chunks go to the devices in one call. No JAX."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class SharedCall[T](NamedTuple):
    """Chunks of one size, of each group in their order."""

    size: int
    groups: list[list[T]]


@dataclass(frozen=True)
class ChunkPlaces:
    """A call has chunks of one size, `in_group[size]` of each of `num_groups` groups of devices at most.

    Groups have pages of their own (`data` of a mesh), so that nothing of one's depends on another's.
    """

    in_group: Mapping[int, int]
    num_groups: int = 1

    def num_chunks(self, size: int) -> int:
        """Of a call."""
        return self.num_groups * self.in_group[size]


class SharedCalls[T]:
    """Chunks that wait for others to share a call with. Those of a group are launched in the order they came in."""

    def __init__(self, places: ChunkPlaces) -> None:
        self._places = places
        self._waiting: list[deque[tuple[int, T]]] = [deque() for _ in range(places.num_groups)]

    def put(self, group: int, size: int, chunk: T) -> None:
        """One more chunk of a group."""
        self._waiting[group].append((size, chunk))

    def take(self, *, waits: bool) -> Iterator[SharedCall[T]]:
        """The calls to make now: all there are, or, if what is left `waits` for more, those with no place left.

        Small chunks first: who has one is done soon, and a larger one behind it finds more of its size.
        """
        while any(self._waiting):
            size = min(waiting[0][0] for waiting in self._waiting if waiting)
            groups = [self._first(waiting, size) for waiting in self._waiting]
            if waits and any(len(group) < self._places.in_group[size] for group in groups):
                return
            for waiting, group in zip(self._waiting, groups, strict=True):
                for _ in group:
                    waiting.popleft()
            yield SharedCall(size, groups)

    def _first(self, waiting: deque[tuple[int, T]], size: int) -> list[T]:
        """As many as a call has places for, if they come next."""
        chunks: list[T] = []
        for own, chunk in waiting:
            if own != size or len(chunks) == self._places.in_group[size]:
                break
            chunks.append(chunk)
        return chunks
