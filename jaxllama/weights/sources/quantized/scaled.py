"""Matrices of FP8 or int8 with a grid of scales: one for all, for a row, for a group of a row, or for a block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from jaxllama.weights.sources.quantized.interface import Int8Tensor, QuantizedTensor, check_part, read_all
from jaxllama.weights.sources.source import SourceTensor

ONE_SCALE = (0, 0)
"""The block of a matrix with one scale."""

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ScaledTensor(QuantizedTensor):
    """`(weight - zero_point) * scale`, where a scale (and zero point) covers `block` rows and columns.

    `rounds_to` is the dtype of the product.
    """

    weight: SourceTensor
    scale: SourceTensor
    zero_point: SourceTensor | None
    block: tuple[int, int]
    rounds_to: np.dtype

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """In `rounds_to`, rounded once."""
        stored = self.weight.read_rows(start, stop, hashed=hashed)
        values = stored.astype(np.float32) if self.weight.dtype == "I8" else _E4M3[stored.view(np.uint8)]
        if self.zero_point is not None:
            values -= self._of_rows(read_all(self.zero_point).astype(np.float32), start, stop)
        values *= self._of_rows(read_scale(self.scale), start, stop)
        return values.astype(self.rounds_to, copy=False)

    def _of_rows(self, grid: Float32[np.ndarray, " ..."], start: int, stop: int) -> Float32[np.ndarray, "rows columns"]:
        """What multiplies with rows `[start, stop)`."""
        if self.block == ONE_SCALE:
            return grid.reshape(1, 1)
        rows, columns = self.block
        first = start // rows
        grid = grid.reshape(-1, -(-self.shape[1] // columns))[first : -(-stop // rows)]
        by_row = np.repeat(grid, rows, axis=0)[start - first * rows :][: stop - start]
        return by_row if by_row.shape[1] == 1 else np.repeat(by_row, columns, axis=1)[:, : self.shape[1]]


@dataclass(frozen=True, kw_only=True)
class Int8RowsTensor(ScaledTensor, Int8Tensor):
    """Int8 with a scale a row, or one for all, and no zero points."""

    def read_int8_rows(self, start: int, stop: int, *, hashed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """As stored; the scales become float32, which holds all of them."""
        values = self.weight.read_rows(start, stop, hashed=hashed)
        scale = read_scale(self.scale).reshape(-1)
        return values, scale[start:stop] if self.block != ONE_SCALE else np.repeat(scale, stop - start)

    def part(self, start: int, stop: int) -> SourceTensor:
        """Rows `[start, stop)`, which have at most their scale in common with the others."""
        weight = self.weight.part(start, stop)
        return replace(
            self,
            weight=weight,
            scale=self.scale if self.block == ONE_SCALE else self.scale.part(start, stop),
            offset=weight.offset,
            num_bytes=weight.num_bytes,
            shape=weight.shape,
        )


def scaled_tensor(
    weight: SourceTensor,
    scale: SourceTensor,
    block: tuple[int, int],
    *,
    weight_dtype: str,
    scale_dtypes: Iterable[str],
    rounds_to: np.dtype,
    zero_point: SourceTensor | None = None,
) -> ScaledTensor:
    """The matrix, if its parts fit each other.

    Raises: ConversionError.
    """
    check_part(weight, [weight.shape if len(weight.shape) == 2 else (0, 0)], [weight_dtype])
    out, width = weight.shape
    if block == ONE_SCALE:
        shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]
    else:
        shapes = [(-(-out // block[0]), -(-width // block[1]))]
        shapes += [(out,)] if block == (1, width) else []
    check_part(scale, shapes, scale_dtypes)
    if zero_point is not None:
        check_part(zero_point, shapes, ["I8", "F8_E4M3", "F32", "F16", "BF16", "I32"])
    is_int8 = weight_dtype == "I8" and block in (ONE_SCALE, (1, width)) and zero_point is None
    return (Int8RowsTensor if is_int8 else ScaledTensor)(
        name=weight.name,
        file=weight.file,
        offset=weight.offset,
        num_bytes=weight.num_bytes,
        shape=weight.shape,
        dtype="int8" if weight_dtype == "I8" else "FP8",
        weight=weight,
        scale=scale,
        zero_point=zero_point,
        block=block,
        rounds_to=rounds_to,
    )


def read_scale(tensor: SourceTensor) -> np.ndarray:
    """Scales as float32, powers of two (E8M0, or the same as bytes) included."""
    scale = read_all(tensor)
    if tensor.dtype in ("U8", "F8_E8M0"):
        return _E8M0[scale.view(np.uint8)]
    return scale.astype(np.float32)
