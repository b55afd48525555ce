"""Matrices in the order in which `multiply` reads them.

Outputs lie in blocks of 16. A block is a row of lines of 64 bytes: one float32, two bfloat16 or four int8 inputs of
each of its outputs, side by side. `[o, i]` of bfloat16 is at `lines[o // 16, i // 2, o % 16, i % 2]`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxllama.model.params import QuantizedWeight

_WIDTH = 16
_WORD_BYTES = 4
_ALIGNMENT_BYTES = 64
_PIECE_BYTES = 2**20


@partial(
    jax.tree_util.register_dataclass, data_fields=["lines", "padded_scale"], meta_fields=["num_outputs", "num_inputs"]
)
@dataclass(frozen=True)
class PackedWeight:
    """A matrix `[outputs, inputs]` of float32, bfloat16 or int8, which last has a scale an output; see above.

    Where outputs or inputs do not fill a block or a line there are zeros. `values` and `scale` are those of the
    `QuantizedWeight` that it stands for, each made when it is asked for.
    """

    lines: Shaped[Array, "blocks lines 16 inputs_a_line"]
    padded_scale: Float[Array, " padded_outputs"] | None
    num_outputs: int
    num_inputs: int

    @property
    def values(self) -> Shaped[Array, "outputs inputs"]:
        """The matrix, in the order of its rows."""
        blocks, lines, width, inputs = self.lines.shape
        matrix = self.lines.swapaxes(1, 2).reshape(blocks * width, lines * inputs)
        return matrix[: self.num_outputs, : self.num_inputs]

    @property
    def scale(self) -> Float[Array, " outputs"] | None:
        """Of int8, what each row is multiplied with."""
        return None if self.padded_scale is None else self.padded_scale[: self.num_outputs]


def pack(weight: Any) -> PackedWeight:
    """A matrix `[outputs, inputs]`, or a `QuantizedWeight` of one, packed."""
    if isinstance(weight, QuantizedWeight):
        packed = _pack_fast(weight.values)
        scale = jnp.pad(weight.scale, (0, _WIDTH * len(packed) - len(weight.scale)))
        return PackedWeight(packed, scale, *weight.values.shape)
    return PackedWeight(_pack_fast(weight), None, *weight.shape)


def unpack(weight: PackedWeight) -> Any:
    """What `pack` was given."""
    return weight.values if weight.scale is None else QuantizedWeight(weight.values, weight.scale)


def packed_rows(weight: PackedWeight, ids: Int[Array, "*batch"]) -> Float[Array, "*batch inputs"]:
    """The rows `ids` of the matrix, in float32."""
    rows = weight.lines[ids // _WIDTH, :, ids % _WIDTH].reshape(*ids.shape, -1)[..., : weight.num_inputs]
    rows = rows.astype(jnp.float32)
    return rows if weight.padded_scale is None else rows * weight.padded_scale[ids][..., None]


def _pack_fast(weight: Shaped[Array, "outputs inputs"]) -> Shaped[Array, "blocks lines 16 inputs_a_line"]:
    """`_pack`; of a matrix that a CPU device has, and that fills its blocks, by NumPy's copies on all cores.

    They take half the CPU time of XLA's transposition (bench/LOG.md).
    """
    inputs = _WORD_BYTES // weight.dtype.itemsize
    is_here = isinstance(weight, jax.Array) and not isinstance(weight, jax.core.Tracer)
    if not is_here or weight.shape[0] % _WIDTH or weight.shape[1] % inputs or not weight.size:
        return _pack(weight)
    (device,) = weight.devices()
    if device.platform != "cpu":
        return _pack(weight)
    blocks, lines = weight.shape[0] // _WIDTH, weight.shape[1] // inputs
    words = np.asarray(weight).view(np.uint32).reshape(blocks, _WIDTH, lines)
    # Of such an address the device takes the memory as it is.
    buffer = np.empty(weight.nbytes + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    packed = buffer[start : start + weight.nbytes].view(np.uint32).reshape(blocks, lines, _WIDTH)
    step = max(1, _PIECE_BYTES * blocks // weight.nbytes)

    def copy(first: int) -> None:
        part = slice(first, first + step)
        np.copyto(packed[part], words[part].swapaxes(1, 2))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(copy, range(0, blocks, step)))
    return jax.device_put(packed.view(weight.dtype).reshape(blocks, lines, _WIDTH, inputs), device)


@jax.jit
def _pack(weight: Shaped[Array, "outputs inputs"]) -> Shaped[Array, "blocks lines 16 inputs_a_line"]:
    inputs = _WORD_BYTES // weight.dtype.itemsize
    padding = [(0, -size % unit) for size, unit in zip(weight.shape, (_WIDTH, inputs), strict=True)]
    weight = jnp.pad(weight, padding)
    return weight.reshape(len(weight) // _WIDTH, _WIDTH, -1, inputs).swapaxes(1, 2)
