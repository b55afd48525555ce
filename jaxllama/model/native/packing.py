"""Matrices in the order in which `multiply` reads them.

Outputs lie in blocks of 16. A block is a row of lines of 64 bytes: one float32, two bfloat16 or four int8 inputs of
each of its outputs, side by side. `[o, i]` of bfloat16 is at `lines[o // 16, i // 2, o % 16, i % 2]`.

On a mesh each device packs the part that it holds, so that nothing moves and each has whole blocks and lines.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from jaxllama.model.mesh import RULES, splitting
from jaxllama.model.params import QuantizedWeight

type _Axes = tuple[str, ...] | None

_WIDTH = 16
_WORD_BYTES = 4
_ALIGNMENT_BYTES = 64
_PIECE_BYTES = 2**20


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["lines", "padded_scale"],
    meta_fields=["num_outputs", "num_inputs", "sharding"],
)
@dataclass(frozen=True)
class PackedWeight:
    """A matrix `[outputs, inputs]` of float32, bfloat16 or int8, which last has a scale an output; see above.

    Where outputs or inputs do not fill a block or a line there are zeros. `values` and `scale` are those of the
    `QuantizedWeight` that it stands for, each made when it is asked for. `sharding` is the matrix's on a mesh of
    several devices: its parts' blocks, lines and scales are split over the same axes as its outputs and inputs.
    """

    lines: Shaped[Array, "blocks lines 16 inputs_a_line"]
    padded_scale: Float[Array, " padded_outputs"] | None
    num_outputs: int
    num_inputs: int
    sharding: NamedSharding | None = None

    @property
    def values(self) -> Shaped[Array, "outputs inputs"]:
        """The matrix, in the order of its rows."""
        if self.mesh is None:
            return self._own_values()
        matrix: Array = _on_mesh(PackedWeight._own_values, self, self.specs.lines)
        return matrix

    @property
    def scale(self) -> Float[Array, " outputs"] | None:
        """Of int8, what each row is multiplied with."""
        if self.mesh is None or self.padded_scale is None:
            return self._own_scale()
        scale: Array = _on_mesh(PackedWeight._own_scale, self, self.specs.padded_scale)
        return scale

    def _own_values(self) -> Shaped[Array, "own_outputs own_inputs"]:
        outputs, inputs = self.part_shape
        blocks, num_lines, width, inputs_a_line = self.lines.shape
        matrix = self.lines.swapaxes(1, 2).reshape(blocks * width, num_lines * inputs_a_line)
        return matrix[:outputs, :inputs]

    def _own_scale(self) -> Float[Array, " own_outputs"] | None:
        return None if self.padded_scale is None else self.padded_scale[: self.part_shape[0]]

    @property
    def mesh(self) -> Mesh | None:
        """Of the devices that have its parts; None: it is on one device."""
        mesh: Any = None if self.sharding is None else self.sharding.mesh
        return mesh

    @property
    def part_shape(self) -> tuple[int, int]:
        """Outputs and inputs that one device has."""
        shape = (self.num_outputs, self.num_inputs)
        if self.sharding is None:
            return shape
        outputs, inputs = self.sharding.shard_shape(shape)
        return outputs, inputs

    @property
    def split_axes(self) -> tuple[_Axes, _Axes]:
        """The mesh axes that split outputs and inputs."""
        entries = (None, None) if self.sharding is None else self.sharding.spec
        outputs, inputs = ((axes,) if isinstance(axes, str) else axes for axes in entries)
        return outputs, inputs

    @property
    def specs(self) -> Any:
        """Itself with the `PartitionSpec` of each of its arrays."""
        outputs, inputs = self.split_axes
        lines: Any = PartitionSpec(outputs, inputs)
        scale: Any = None if self.padded_scale is None else PartitionSpec(outputs)
        return dataclasses.replace(self, lines=lines, padded_scale=scale)


@partial(jax.jit, static_argnums=(0, 2))
def _on_mesh(of: Callable[[PackedWeight], Any], weight: PackedWeight, spec: PartitionSpec) -> Any:
    """Jitted, so that matrices of one shape share a program."""
    assert weight.mesh is not None
    return on_parts(of, weight.mesh, (weight.specs,), spec)(weight)


def on_parts(run: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run` on each device of `mesh` with its own part of the arguments."""
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def row_axes(shape: tuple[int, ...], mesh: Mesh) -> _Axes:
    """The mesh axes over which the first dimension of a batch is split: where they divide it."""
    axes = splitting(RULES["rows"], mesh)
    num_parts = math.prod(mesh.shape[axis] for axis in axes)
    return axes if axes and shape and shape[0] % num_parts == 0 else None


def pack(weight: Any) -> PackedWeight:
    """A matrix `[outputs, inputs]`, or a `QuantizedWeight` of one, packed: on a mesh, where its parts are."""
    values, scale = weight if isinstance(weight, QuantizedWeight) else (weight, None)
    sharding = _sharding_of(values)
    if sharding is not None:
        return _pack_parts(values, scale, sharding)
    packed = _pack_fast(values)
    return PackedWeight(packed, None if scale is None else _pad_scale(scale, packed), *values.shape)


def unpack(weight: PackedWeight) -> Any:
    """What `pack` was given."""
    return weight.values if weight.scale is None else QuantizedWeight(weight.values, weight.scale)


def packed_rows(weight: PackedWeight, ids: Int[Array, "*batch"]) -> Float[Array, "*batch inputs"]:
    """The rows `ids` of the matrix, in float32."""
    mesh, (outputs, inputs) = weight.mesh, weight.split_axes
    if mesh is None:
        return _rows(weight, ids)
    batch = [row_axes(ids.shape, mesh), *[None] * (ids.ndim - 1)][: ids.ndim]

    def find(weight: PackedWeight, ids: Int[Array, "*own"]) -> Float[Array, "*own inputs"]:
        if outputs is None:
            return _rows(weight, ids)
        num_rows, _ = weight.part_shape
        ids = ids - jax.lax.axis_index(outputs) * num_rows
        is_own = (ids >= 0) & (ids < num_rows)
        found = jnp.where(is_own[..., None], _rows(weight, jnp.where(is_own, ids, 0)), 0)
        whole: Array = jax.lax.psum(found, outputs)
        return whole

    specs = (weight.specs, PartitionSpec(*batch))
    rows: Array = on_parts(find, mesh, specs, PartitionSpec(*batch, inputs))(weight, ids)
    return rows


def _rows(weight: PackedWeight, ids: Int[Array, "*batch"]) -> Float[Array, "*batch inputs"]:
    """Of one device's part, and numbered there."""
    rows = weight.lines[ids // _WIDTH, :, ids % _WIDTH].reshape(*ids.shape, -1)[..., : weight.part_shape[1]]
    rows = rows.astype(jnp.float32)
    return rows if weight.padded_scale is None else rows * weight.padded_scale[ids][..., None]


def _sharding_of(matrix: Any) -> NamedSharding | None:
    """On a mesh of several devices, with the axes of both dimensions written out."""
    sharding = None if isinstance(matrix, jax.core.Tracer) else matrix.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    outputs, inputs = (*sharding.spec, None, None)[:2]
    return NamedSharding(sharding.mesh, PartitionSpec(outputs, inputs))


def _pack_parts(matrix: Any, scale: Any, sharding: NamedSharding) -> PackedWeight:
    """Without the other processes. Devices with the same part share the host's memory."""
    parts: dict[tuple[tuple[int | None, int | None], ...], Any] = {}
    lines, scales = [], []
    scale_of = {} if scale is None else {shard.device: shard.data for shard in scale.addressable_shards}
    for shard in matrix.addressable_shards:
        at = tuple((place.start, place.stop) for place in shard.index)
        if at not in parts:
            parts[at] = np.asarray(_pack_fast(shard.data))
        lines.append(jax.device_put(parts[at], shard.device))
        if scale is not None:
            own = scale_of[shard.device]
            own = own if len(own) == len(shard.data) else own[shard.index[0]]
            scales.append(_pad_scale(own, parts[at]))
    outputs, inputs = matrix.shape
    shape = PackedWeight(matrix, scale, outputs, inputs, sharding)
    specs, num_parts = shape.specs, [n // own for n, own in zip(matrix.shape, shape.part_shape, strict=True)]

    def assemble(arrays: list[Shaped[Array, " ..."]], spec: PartitionSpec) -> Shaped[Array, " ..."]:
        size, *rest = arrays[0].shape
        whole = (size * num_parts[0], *([rest[0] * num_parts[1], *rest[1:]] if rest else []))
        return jax.make_array_from_single_device_arrays(whole, NamedSharding(sharding.mesh, spec), arrays)

    padded_scale = None if scale is None else assemble(scales, specs.padded_scale)
    return dataclasses.replace(shape, lines=assemble(lines, specs.lines), padded_scale=padded_scale)


def _pad_scale(scale: Float[Array, " outputs"], packed: Any) -> Float[Array, " padded_outputs"]:
    return jnp.pad(scale, (0, _WIDTH * len(packed) - len(scale)))


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
