"""A source's tensors as a checkpoint stores them: in its dtype, finite, rounded to int8 where asked.

The converter writes these bits, and a loader that reads a source without converting it puts the same on the devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from jaxllama.errors import ConversionError
from jaxllama.model.int8 import quantize_rows
from jaxllama.model.params import ParamSpec, QuantizedWeight, stored_specs
from jaxllama.weights.sources.quantized.interface import Int8Tensor
from jaxllama.weights.sources.source import SourceTensor

type Pairs = Sequence[tuple[ParamSpec, SourceTensor]]

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# Elements worked on at a time: what lies between two passes over them stays in the processor's cache.
_BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Storage:
    """How weights are stored: `dtype` "bfloat16" or "float32", of matrices "int8" if `quantize` is."""

    dtype: str
    quantize: str | None

    @property
    def numpy_dtype(self) -> np.dtype:
        """Of what is not int8."""
        return _DTYPES[self.dtype]

    def is_quantized(self, spec: ParamSpec) -> bool:
        """Whether the tensor is stored as int8 and scales."""
        return len(stored_specs(spec, self.quantize)) > 1

    def num_bytes(self, pairs: Pairs) -> int:
        """What the tensors take as they are stored."""
        parts = [part for spec, _ in pairs for part in stored_specs(spec, self.quantize)]
        return sum(part.size * np.dtype(part.dtype or self.numpy_dtype).itemsize for part in parts)


def default_dtype(pairs: Pairs) -> str:
    """float32 if every matrix is float32, else bfloat16."""
    return "float32" if all(t.dtype == "F32" for _, t in pairs if len(t.shape) > 1) else "bfloat16"


def read_stored(
    tensor: SourceTensor,
    start: int,
    stop: int,
    dtype: np.dtype,
    *,
    hashed: bool = False,
    out: Shaped[np.ndarray, " ..."] | None = None,
) -> Shaped[np.ndarray, " ..."]:
    """Rows `[start, stop)` of the tensor in the dtype that they are stored in, multiples of `row_multiple`.

    In `out`, contiguous and of that dtype, if it is given and they lie in the file as they are stored.

    Raises: ConversionError when one is NaN, infinite, or a value that the dtype cannot hold; as `read_rows`.
    """
    if out is not None and tensor.lies_as(dtype):
        tensor.read_bytes(start, stop, out.reshape(-1).view(np.uint8), hashed=hashed)
        _check_finite(tensor, out)
        return out
    rows = tensor.read_rows(start, stop, hashed=hashed)
    if rows.dtype != dtype:
        with np.errstate(over="ignore", invalid="ignore"):
            # float16 goes through float32, which holds it exactly, so that it is rounded once.
            rows = rows.astype(np.float32, copy=False).astype(dtype)
    _check_finite(tensor, rows)
    return rows


def read_rounded(
    tensor: SourceTensor, start: int, stop: int, dtype: np.dtype, *, hashed: bool = False
) -> QuantizedWeight:
    """Rows of a matrix as int8 and scales, rounded once they have `dtype`; those that are stored so, as they are.

    Raises: as `read_stored`.
    """
    if isinstance(tensor, Int8Tensor):
        weight = QuantizedWeight(*tensor.read_int8_rows(start, stop, hashed=hashed))
        _check_finite(tensor, weight.scale)
        return weight
    return round_rows(read_stored(tensor, start, stop, dtype, hashed=hashed))


def round_rows(rows: Float[np.ndarray, "rows ..."]) -> QuantizedWeight:
    """Int8 values `[rows, width]` and float32 scales `[rows]`."""
    weight = QuantizedWeight(np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32))
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(rows.shape[1:])))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        weight.values[part], weight.scale[part] = quantize_rows(rows[part])
    return weight


def _check_finite(tensor: SourceTensor, array: Shaped[np.ndarray, " ..."]) -> None:
    if bad := num_non_finite(array):
        raise ConversionError(
            f"{tensor.file.path}: {tensor.name} has {bad} or more values that are NaN, "
            f"infinite or beyond {array.dtype.name}"
        )


def num_non_finite(array: Shaped[np.ndarray, " ..."]) -> int:
    """How many values are NaN or infinite, of bfloat16 or float32."""
    # By the exponent bits: ml_dtypes' isfinite is ten times slower.
    is_wide = array.dtype == np.float32
    bits: Any = array.reshape(-1).view(np.uint32 if is_wide else np.uint16)
    exponent, total = bits.dtype.type(0x7F80_0000 if is_wide else 0x7F80), 0
    for start in range(0, len(bits), _BLOCK_ELEMENTS):
        total += int(np.count_nonzero((bits[start : start + _BLOCK_ELEMENTS] & exponent) == exponent))
    return total
