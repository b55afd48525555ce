"""Matrices with an adapter merged into them, computed row by row from the base's rows, in float32.

The base's numbers, dequantised, become float32; the adapter's product is added; whoever reads the rows rounds them
once, to what is stored. A row has the same bits whatever rows it is read with.

Source: lora/layer.py and lora/variants.py of peft 0.21; DoRA: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from jaxllama.weights.sources.source import SourceTensor

# A BLAS may add in another order for another number of rows: products always have this many. They are so small that
# OpenBLAS does not spread them over threads: many tensors are read at a time, and threads that wait for each other took
# ten times as long on two busy cores.
_TILE_ROWS = 64
_MAX_TILE_PRODUCTS = 2**18
_MIN_TILE_COLUMNS = 16
_MAX_KEPT_BYTES = 256 * 2**20


class Factors:
    """The tensors of one adapter, read when they are needed; the last 256 MiB are kept. Threads may share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._reading: dict[str, threading.Lock] = {}

    def get(self, tensor: SourceTensor) -> np.ndarray:
        """The tensor, whole, in float32."""
        return self.keep(tensor.name, lambda: tensor.read_rows(0, tensor.shape[0], hashed=False).astype(np.float32))

    def keep(self, name: str, read: Callable[[], Shaped[np.ndarray, " ..."]]) -> Shaped[np.ndarray, " ..."]:
        """What `read` gives, or gave not long ago for the same name."""
        with self._lock:
            reading = self._reading.setdefault(name, threading.Lock())
        # Others wait for whoever reads it, rather than read it too.
        with reading:
            with self._lock:
                if name in self._kept:
                    self._kept.move_to_end(name)
                    return self._kept[name]
            value = read()
            with self._lock:
                self._kept[name] = value
                self._num_bytes += value.nbytes
                while self._num_bytes > _MAX_KEPT_BYTES and len(self._kept) > 1:
                    self._num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return value


@dataclass(frozen=True, kw_only=True)
class AdaptedTensor(SourceTensor):
    """A tensor whose values depend on those of `base`; everything else is as in `base`."""

    base: SourceTensor

    @property
    def is_readable(self) -> bool:
        """True, as its base."""
        return self.base.is_readable

    @property
    def row_multiple(self) -> int:
        """That of the base."""
        return self.base.row_multiple

    def part(self, start: int, stop: int) -> SourceTensor:
        """Never asked for: adapters are merged into the parameters of a tensor that holds several, each by itself."""
        raise AssertionError(self.name)

    @abstractmethod
    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """Rows `[start, stop)` in float32."""

    def _base_rows(self, start: int, stop: int, hashed: bool) -> np.ndarray:
        return self.base.read_rows(start, stop, hashed=hashed).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class LoraTensor(AdaptedTensor):
    """`base + scaling * B A`, where `left` is B `[out, r]` and `right` A `[r, in]`.

    With `magnitude` `[out]` each row has that length (DoRA). `first_row` is where the base's rows begin in those of the
    module, which may hold several parameters.
    """

    factors: Factors
    left: SourceTensor
    right: SourceTensor
    scaling: float
    magnitude: SourceTensor | None = None
    first_row: int = 0

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        rows = self._base_rows(start, stop, hashed)
        start, stop = start + self.first_row, stop + self.first_row
        left, right = self.factors.get(self.left), self.factors.get(self.right)
        _add_product(rows, left, right, self.scaling, start)
        if self.magnitude is not None:
            length = np.sqrt(np.sum(np.square(rows), axis=1))
            rows *= (self.factors.get(self.magnitude)[start:stop] / length)[:, None]
        return rows


@dataclass(frozen=True, kw_only=True)
class LoraEmbedding(AdaptedTensor):
    """`base + scaling * (B A)ᵀ` of an embedding, `left` being A `[r, vocab]` and `right` B `[hidden, r]`.

    With `magnitude` `[hidden]` each column has that length: all rows are read once more for it.
    """

    factors: Factors
    left: SourceTensor
    right: SourceTensor
    scaling: float
    magnitude: SourceTensor | None = None

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        rows = self._merged_rows(start, stop, hashed)
        if self.magnitude is not None:
            rows *= self.factors.keep(f"{self.name}/columns", self._column_factors)
        return rows

    def _merged_rows(self, start: int, stop: int, hashed: bool) -> np.ndarray:
        rows = self._base_rows(start, stop, hashed)
        # Contiguous once: the rows of A are as long as the vocabulary.
        left = self.factors.keep(f"{self.name}/left", lambda: np.ascontiguousarray(self.factors.get(self.left).T))
        right = self.factors.keep(f"{self.name}/right", lambda: np.ascontiguousarray(self.factors.get(self.right).T))
        _add_product(rows, left, right, self.scaling, start)
        return rows

    def _column_factors(self) -> np.ndarray:
        assert self.magnitude is not None
        total = np.zeros(self.shape[1])
        step = _TILE_ROWS * self.row_multiple
        for start in range(0, self.shape[0], step):
            rows = self._merged_rows(start, min(start + step, self.shape[0]), False)
            total += np.sum(np.square(rows, dtype=np.float64), axis=0)
        return self.factors.get(self.magnitude) / np.sqrt(total).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class AddedTensor(AdaptedTensor):
    """A bias `base + scaling * added`, of which `first_row` is as in `LoraTensor`."""

    factors: Factors
    added: SourceTensor
    scaling: float
    first_row: int = 0

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        added = self.factors.get(self.added)[start + self.first_row : stop + self.first_row]
        return self._base_rows(start, stop, hashed) + np.float32(self.scaling) * added


def adapted[T: AdaptedTensor](kind: type[T], base: SourceTensor, **more: Any) -> T:
    """A tensor of `kind` on `base`, named so that messages tell."""
    same = {item.name: getattr(base, item.name) for item in fields(SourceTensor)}
    suffix = " with adapters"
    name = base.name if base.name.endswith(suffix) else f"{base.name}{suffix}"
    # Rows of the base are put in order by the base itself.
    return kind(**{**same, "name": name, "heads": None}, base=base, **more)


def _add_product(
    rows: Float32[np.ndarray, "rows width"],
    left: Float32[np.ndarray, "all_rows rank"],
    right: Float32[np.ndarray, "rank width"],
    scaling: float,
    start: int,
) -> None:
    """Adds `scaling * left @ right` to `rows`, which begin at row `start` of the product."""
    scale, rank = np.float32(scaling), left.shape[1]
    width = max(_MIN_TILE_COLUMNS, _MAX_TILE_PRODUCTS // (_TILE_ROWS * rank))
    columns = [slice(i, i + width) for i in range(0, right.shape[1], width)]
    for tile in range(start // _TILE_ROWS * _TILE_ROWS, start + len(rows), _TILE_ROWS):
        factor = left[tile : tile + _TILE_ROWS]
        if len(factor) < _TILE_ROWS:
            factor = np.concatenate([factor, np.zeros((_TILE_ROWS - len(factor), rank), np.float32)])
        first, last = max(start, tile), min(start + len(rows), tile + _TILE_ROWS)
        for part in columns:
            product = factor @ right[:, part]
            product *= scale
            rows[first - start : last - start, part] += product[first - tile : last - tile]
