"""bitsandbytes: int8 with a scale a row, and 4-bit codes (nf4, fp4) whose scales may be quantised in turn.

Source: bitsandbytes' functional.py (QuantState, int8_vectorwise_dequant) and backends/default/ops.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllama.errors import ConversionError
from jaxllama.system.strict_json import parse_object
from jaxllama.weights.sources.quantized.interface import (
    BFLOAT16,
    Int8Tensor,
    QuantizedTensor,
    Settings,
    check_part,
    modules,
    read_all,
    take,
)
from jaxllama.weights.sources.source import SourceTensor

# Float32: int8_vectorwise_dequant multiplies by it rather than divide.
_PER_127 = np.float32(7.874015718698502e-3)
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_MAX_STATE_BYTES = 64 * 1024
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}


@dataclass(frozen=True, kw_only=True)
class BnbInt8Tensor(Int8Tensor):
    """`weight * largest / 127`, the largest of each row."""

    weight: SourceTensor
    largest: SourceTensor

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """Float32, in the two products of the library."""
        values = self.weight.read_rows(start, stop, hashed=hashed).astype(np.float32)
        values *= self.largest.read_rows(start, stop, hashed=False)[:, None]
        values *= _PER_127
        return values

    def read_int8_rows(self, start: int, stop: int, *, hashed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """As stored; a scale is the row's largest / 127."""
        values = self.weight.read_rows(start, stop, hashed=hashed)
        return values, self.largest.read_rows(start, stop, hashed=False) * _PER_127


@dataclass(frozen=True, kw_only=True)
class Bnb4Tensor(QuantizedTensor):
    """Codes of 4 bits, two a byte, the higher half first; `block_size` values in a row share a scale.

    A block may run on into the next row. With `nested`, the scales are bytes that stand for `nested_map[byte] *
    nested[block] + offset`.
    """

    codes: SourceTensor
    code_map: SourceTensor
    scales: SourceTensor
    nested: SourceTensor | None
    nested_map: SourceTensor | None
    offset_of_scales: float
    block_size: int
    nested_block_size: int
    rounds_to: np.dtype

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """In the dtype that the weight had before, rounded once."""
        width = self.shape[1]
        begin, end = start * width, stop * width
        codes = self._codes(begin, end, hashed)
        first, last = begin // self.block_size, -(-end // self.block_size)
        by_value = np.repeat(self._scales(first, last), self.block_size)
        skipped = begin - first * self.block_size
        values = self._code_map()[codes] * by_value[skipped : skipped + end - begin]
        return values.astype(self.rounds_to, copy=False).reshape(stop - start, width)

    def _code_map(self) -> np.ndarray:
        """Float32 `[16]`. The kernels make code 8 of fp4 a negative zero, the stored map a positive one."""
        values = read_all(self.code_map)
        return values if self.dtype == "nf4" else np.copysign(values, np.where(np.arange(16) < 8, 1, -1))

    def _codes(self, begin: int, end: int, hashed: bool) -> np.ndarray:
        """Uint8 `[end - begin]`: the values of the matrix, counted row by row."""
        # The bytes may be stored as if they were numbers of 2 or 4 bytes.
        size = 2 * self.codes.num_bytes // self.codes.shape[0]
        first, last = begin // size, -(-end // size)
        data = np.ascontiguousarray(self.codes.read_rows(first, last, hashed=hashed)).view(np.uint8).reshape(-1)
        codes = np.stack([data >> 4, data & 15], axis=-1).reshape(-1)
        return codes[begin - first * size : end - first * size]

    def _scales(self, first: int, last: int) -> np.ndarray:
        """Float32 of the blocks `[first, last)`."""
        scales = self.scales.read_rows(first, last, hashed=False)
        if self.nested is None or self.nested_map is None:
            return scales.astype(np.float32)
        largest = read_all(self.nested)[np.arange(first, last) // self.nested_block_size]
        return read_all(self.nested_map)[scales] * largest + np.float32(self.offset_of_scales)


def read_bitsandbytes(settings: Settings, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
    """quant_method `bitsandbytes`."""
    for bits in ("load_in_8bit", "load_in_4bit"):
        settings.skip(bits, f"_{bits}")
    settings.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
    # How products are computed, and what the file itself says.
    settings.skip(
        "llm_int8_threshold",
        "llm_int8_skip_modules",
        "llm_int8_enable_fp32_cpu_offload",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_quant_storage",
    )
    settings.refuse("llm_int8_has_fp16_weight")
    settings.finish()
    left = dict(tensors)
    for module, largest in modules(tensors, "SCB"):
        matrix: QuantizedTensor = _int8(left, module, largest)
        left[matrix.name] = matrix
    for part in _STATES:
        for module, state in modules(tensors, part):
            matrix = _4bit(left, module, state)
            left[matrix.name] = matrix
    return left


def _int8(left: dict[str, SourceTensor], module: str, largest: SourceTensor) -> BnbInt8Tensor:
    del left[largest.name]
    weight = take(left, module, "weight")
    check_part(weight, [weight.shape if len(weight.shape) == 2 else (0, 0)], ["I8"])
    check_part(largest, [weight.shape[:1]], ["F32"])
    order = left.pop(f"{module}.weight_format", None)
    if order is not None and read_all(check_part(order, [(), (1,)], ["U8"])).any():
        raise ConversionError(f"{order.file.path}: {order.name} is not 0: only rows in their order are supported")
    return BnbInt8Tensor(
        name=weight.name,
        file=weight.file,
        offset=weight.offset,
        num_bytes=weight.num_bytes,
        shape=weight.shape,
        dtype="int8",
        weight=weight,
        largest=largest,
    )


def _4bit(left: dict[str, SourceTensor], module: str, state: SourceTensor) -> Bnb4Tensor:
    del left[state.name]
    values = _State(state)
    shape, block_size = values.shape(), values.power_of_two("blocksize")
    num_blocks = -(-shape[0] * shape[1] // block_size)
    codes, scales = take(left, module, "weight"), take(left, module, "weight.absmax")
    code_map = check_part(take(left, module, "weight.quant_map"), [(16,)], ["F32"])
    if codes.num_bytes * 2 != shape[0] * shape[1] or not codes.shape:
        raise values.error("shape", list(shape), f"{codes.name} has {codes.num_bytes} bytes")
    nested = nested_map = None
    nested_size = 1
    if values.get("nested_blocksize") is not None:
        nested_size = values.power_of_two("nested_blocksize")
        nested = check_part(take(left, module, "weight.nested_absmax"), [(-(-num_blocks // nested_size),)], ["F32"])
        nested_map = check_part(take(left, module, "weight.nested_quant_map"), [(256,)], ["F32"])
    check_part(scales, [(num_blocks,)], ["F32"] if nested is None else ["U8"])
    dtype = values.get("dtype")
    if dtype not in _DTYPES:
        raise values.error("dtype", dtype, f"expected one of {', '.join(_DTYPES)}")
    return Bnb4Tensor(
        name=codes.name,
        file=codes.file,
        offset=codes.offset,
        num_bytes=codes.num_bytes,
        shape=shape,
        dtype=state.name.rpartition("__")[2],
        codes=codes,
        code_map=code_map,
        scales=scales,
        nested=nested,
        nested_map=nested_map,
        offset_of_scales=values.number("nested_offset", 0.0),
        block_size=block_size,
        nested_block_size=nested_size,
        rounds_to=_DTYPES[dtype],
    )


class _State:
    """The JSON in a tensor of bytes that says how a matrix was quantised."""

    def __init__(self, tensor: SourceTensor) -> None:
        self._tensor = tensor
        check_part(tensor, [tensor.shape if len(tensor.shape) == 1 else (0,)], ["U8"])
        self._where = f"{tensor.file.path}: {tensor.name}"
        if tensor.num_bytes > _MAX_STATE_BYTES:
            raise ConversionError(f"{self._where}: {tensor.num_bytes} bytes are too many")
        self._value = value = parse_object(read_all(tensor).tobytes(), self._where, ConversionError)
        known = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
        if unknown := sorted(set(value) - known):
            raise ConversionError(f"{self._where}: not understood: {', '.join(unknown)}")
        if value.get("quant_type") != tensor.name.rpartition("__")[2]:
            raise self.error("quant_type", value.get("quant_type"), "its name says otherwise")

    def get(self, key: str) -> object:
        return self._value.get(key)

    def shape(self) -> tuple[int, int]:
        shape = self.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise self.error("shape", shape, "expected two positive integers")
        return (shape[0], shape[1])

    def power_of_two(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int or not 32 <= value <= 4096 or value & (value - 1):
            raise self.error(key, value, "expected a power of two from 32 to 4096")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._value.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, "expected a number")
        return float(value)

    def error(self, key: str, value: object, why: str) -> ConversionError:
        return ConversionError(f"{self._where}: {key} {str(value)[:100]!r}: {why}")
