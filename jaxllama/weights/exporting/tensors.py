"""Which tensors an export has, and the bytes of each, block by block.

A tensor has the name that its architecture gives it; where that stores several parameters as one (Phi-3's q, k and v),
they are joined again. Int8 matrices become compressed-tensors' W8A16: codes of eight bits, four a word, and a scale a
row. The embedding does not: transformers 5.23 and others cannot look tokens up in a packed one. It is written as the
float32 numbers that the int8 ones stand for, and rounding those gives the same int8 ones again.

Source: compressed-tensors 0.20's compressors/pack_quantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int8, Int32, Shaped

from jaxllama.errors import ConversionError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import ParamSpec, param_specs, stored_specs
from jaxllama.weights.exporting.rows import Rows
from jaxllama.weights.sources.stored import num_non_finite

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
"""The dtypes that an export may have."""
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BLOCK_BYTES = 8 * 2**20
_LARGEST = 127
_CODES_A_WORD = 4

type Kind = Literal["cast", "dense", "codes", "scale", "shape"]


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of an export, `dtype` by its name in safetensors.

    `kind` says what is made of the parameters in `specs`, one after the other: their values in `dtype`, from what they
    are (`cast`) or from int8 values and scales (`dense`); or the parts of a packed matrix: `codes`, `scale`, `shape`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    specs: tuple[ParamSpec, ...]

    @property
    def itemsize(self) -> int:
        """Bytes a value."""
        return {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Of all values."""
        return math.prod(self.shape) * self.itemsize


def quantization_config(config: LlamaConfig) -> dict[str, Any]:
    """What config.json says of an int8 export."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"] if config.tie_word_embeddings else [],
    }


def export_tensors(config: LlamaConfig, dtype: str, *, packs: bool) -> list[ExportTensor]:
    """Every tensor in the order of the forward pass; `packs`: matrices stay int8."""
    specs: dict[str, list[ParamSpec]] = {}
    for spec in param_specs(config):
        specs.setdefault(spec.hf_name, []).append(spec)
    found: list[ExportTensor] = []
    for name, held in specs.items():
        shape = (sum(spec.shape[0] for spec in held), *held[0].shape[1:])
        if not packs or len(shape) == 1:
            found.append(ExportTensor(name, _NAMES[dtype], shape, "cast", tuple(held)))
        elif held[0].path == ("embed_tokens",):
            found.append(ExportTensor(name, "F32", shape, "dense", tuple(held)))
        else:
            words = -(-shape[1] // _CODES_A_WORD)
            found += [
                ExportTensor(f"{name}_shape", "I64", (2,), "shape", tuple(held)),
                ExportTensor(f"{name}_packed", "I32", (shape[0], words), "codes", tuple(held)),
                ExportTensor(f"{name}_scale", "F32", (shape[0], 1), "scale", tuple(held)),
            ]
    return found


@dataclass(frozen=True)
class Block:
    """Some rows of one parameter of a tensor."""

    tensor: ExportTensor
    spec: ParamSpec
    start: int
    stop: int


def blocks(tensor: ExportTensor, rows: Rows) -> Iterator[Block]:
    """What the tensor consists of, in order, a few megabytes each."""
    if tensor.kind == "shape":
        yield Block(tensor, tensor.specs[0], 0, 1)
        return
    row_bytes = max(1, math.prod(tensor.shape[1:])) * tensor.itemsize
    for spec in tensor.specs:
        multiple = max(rows.row_multiple(part) for part in stored_specs(spec, rows.quantize))
        step = max(1, _BLOCK_BYTES // (row_bytes * multiple)) * multiple
        for start in range(0, spec.shape[0], step):
            yield Block(tensor, spec, start, min(start + step, spec.shape[0]))


def read_block(block: Block, rows: Rows) -> np.ndarray:
    """The block's bytes, uint8 `[num_bytes]`.

    Raises: ConversionError for values that the dtype cannot hold; as `Rows.read`.
    """
    tensor, spec, start, stop = block.tensor, block.spec, block.start, block.stop
    parts = stored_specs(spec, rows.quantize)
    if tensor.kind == "shape":
        # Rows of all parameters, but of one the columns.
        values = np.array([sum(one.shape[0] for one in tensor.specs), spec.shape[1]], "<i8")
    elif tensor.kind == "codes":
        values = _pack(rows.read(parts[0], start, stop))
    elif tensor.kind == "scale":
        values = rows.read(parts[1], start, stop)
    elif len(parts) == 1:
        values = _cast(rows.read(parts[0], start, stop), tensor)
    else:
        whole = _dense(rows.read(parts[0], start, stop), rows.read(parts[1], start, stop))
        values = _cast(whole, tensor)
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _cast(values: Shaped[np.ndarray, " ..."], tensor: ExportTensor) -> Shaped[np.ndarray, " ..."]:
    dtype = next(DTYPES[name] for name, short in _NAMES.items() if short == tensor.dtype)
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(np.float32, copy=False).astype(dtype)
    # Every dtype can tell what is beyond float16; bfloat16 has no such function that is fast.
    bad = np.count_nonzero(~np.isfinite(cast)) if dtype == np.float16 else num_non_finite(cast)
    if bad:
        raise ConversionError(
            f"{tensor.name} has {bad} or more values that are NaN, infinite or beyond {dtype.name}; "
            "choose another --dtype"
        )
    return cast


def _pack(values: Int8[np.ndarray, "rows width"]) -> Int32[np.ndarray, "rows words"]:
    """Int8 `[rows, width]` as words `[rows, words]` of codes around 128, the first in the lowest bits."""
    codes = values.view(np.uint8) ^ np.uint8(128)
    # Beyond the last column there is nothing, not even a code for zero.
    return np.pad(codes, ((0, 0), (0, -values.shape[1] % _CODES_A_WORD))).view("<i4")


def _dense(
    values: Int8[np.ndarray, "rows width"], scale: Float32[np.ndarray, " rows"]
) -> Float32[np.ndarray, "rows width"]:
    """Float32 `values * scale`, where the largest of a row are moved by a bit of their last place if need be.

    So that `quantize_rows` gives `values` and `scale` again: it has a scale from the largest magnitude, of which the
    product is not always the same to the last bit.
    """
    dense = values.astype(np.float32) * scale[:, None]
    near = (scale * np.float32(_LARGEST)).view(np.int32)
    largest = near.view(np.float32)
    for step in (1, -1, 2, -2):
        other = (near + step).view(np.float32)
        found = largest * np.float32(1 / _LARGEST) == scale
        fits = other * np.float32(1 / _LARGEST) == scale
        largest = np.where(~found & fits, other, largest)
    extreme = np.abs(values.astype(np.int16)) == _LARGEST
    exact = np.where(values > 0, largest[:, None], -largest[:, None])
    return np.where(extreme, exact, dense)
