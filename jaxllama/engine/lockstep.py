"""Many processes, one engine: process 0 decides, and the others launch the same programs with the same inputs.

`Leading` is process 0's devices: it sends every call to the others before it makes it. `follow` is what the others do.
A call travels as the method's name, the dtypes and shapes of its NumPy arguments as JSON, and their bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, UInt32

from jaxllama.decode.state import RowState, StepOutput, any_row
from jaxllama.engine.compilation import OnProgress
from jaxllama.engine.device import Device
from jaxllama.errors import ConfigError, LockstepError
from jaxllama.hosts.group import Group
from jaxllama.model.config import LlamaConfig

_LENGTH = struct.Struct("!I")
_DTYPES = {name: np.dtype(name) for name in ("bool", "int32", "uint32", "float32")}


class Leading:
    """Process 0's devices: every call goes to the other processes first."""

    def __init__(self, device: Device, group: Group) -> None:
        self._device = device
        self._group = group

    def compile(
        self, chunk_sizes: Int[np.ndarray, " sizes"], row_buckets: Int[np.ndarray, " buckets"], on_progress: OnProgress
    ) -> None:
        """As `Device.compile`, in all processes."""
        self._group.publish(encode("compile", [chunk_sizes, row_buckets]))
        self._device.compile(chunk_sizes, row_buckets, on_progress)

    def prefill(
        self,
        tokens: Int[np.ndarray, " chunk"],
        table: Int[np.ndarray, " max_pages"],
        start: np.int32,
        num_tokens: np.int32,
        shard: np.int32,
    ) -> None:
        """As `Device.prefill`, in all processes."""
        self._group.publish(encode("prefill", [tokens, table, start, num_tokens, shard]))
        self._device.prefill(tokens, table, start, num_tokens, shard)

    def clear(self, pages: Int[np.ndarray, " max_pages"], count: np.int32, shard: np.int32) -> None:
        """As `Device.clear`, in all processes."""
        self._group.publish(encode("clear", [pages, count, shard]))
        self._device.clear(pages, count, shard)

    def save(self, name: np.int32, pages: Int[np.ndarray, " pages"], shard: np.int32) -> None:
        """As `Device.save`, in all processes, each its devices' part."""
        self._group.publish(encode("save", [name, pages, shard]))
        self._device.save(name, pages, shard)

    def restore(self, name: np.int32, pages: Int[np.ndarray, " pages"], shard: np.int32) -> None:
        """As `Device.restore`, in all processes."""
        self._group.publish(encode("restore", [name, pages, shard]))
        self._device.restore(name, pages, shard)

    def forget(self, name: np.int32) -> None:
        """As `Device.forget`, in all processes."""
        self._group.publish(encode("forget", [name]))
        self._device.forget(name)

    def insert(self, row: np.int32, new: RowState) -> None:
        """As `Device.insert`, in all processes."""
        self._group.publish(encode("insert", [row, *jax.tree.leaves(new)]))
        self._device.insert(row, new)

    def set_page_table(self, table: Int[np.ndarray, "rows max_pages"]) -> None:
        """As `Device.set_page_table`, in all processes."""
        self._group.publish(encode("set_page_table", [table]))
        self._device.set_page_table(table)

    def set_masks(self, masks: UInt32[np.ndarray, "rows words"], is_masked: Bool[np.ndarray, " rows"]) -> None:
        """As `Device.set_masks`, in all processes."""
        self._group.publish(encode("set_masks", [masks, is_masked]))
        self._device.set_masks(masks, is_masked)

    def decode(self, max_steps: np.int32, keep: Bool[np.ndarray, " rows"], num_rows: int) -> StepOutput:
        """As `Device.decode`, in all processes."""
        self._group.publish(encode("decode", [max_steps, keep, np.int32(num_rows)]))
        return self._device.decode(max_steps, keep, num_rows)

    def wait(self) -> None:
        """Returns when this process's devices have done all that was asked."""
        self._device.wait()


def check_processes(mesh: Mesh, group: Group | None) -> None:
    """Raises: ConfigError unless `mesh` has devices of every process of `group` (None: of one process alone)."""
    num_processes = len({device.process_index for device in mesh.devices.flat})
    if group is None and num_processes > 1:
        raise ConfigError(
            f"the mesh spans {num_processes} processes. Give their group (jaxllama.hosts.group.join), or make the mesh "
            "of jax.local_devices()"
        )
    if group is not None and num_processes != group.num_processes:
        raise ConfigError(
            f"a mesh of {mesh.devices.size} devices spans {num_processes} of {group.num_processes} processes, expected "
            "devices of every one"
        )


def follow(config: LlamaConfig, device: Device, group: Group) -> None:
    """Makes process 0's calls on this process's devices until it closes its engine.

    Raises: LockstepError for a call that is not understood; whatever a program raises.
    """
    assert not group.is_leader, "process 0 leads"
    template = any_row(config)
    row_tree = jax.tree.structure(template)

    def insert(row: Any, *leaves: Any) -> None:
        device.insert(row, jax.tree.unflatten(row_tree, leaves))

    methods: dict[str, Callable[..., Any]] = {
        "compile": lambda chunk_sizes, row_buckets: device.compile(chunk_sizes, row_buckets, lambda *_: None),
        "prefill": device.prefill,
        "clear": device.clear,
        "save": device.save,
        "restore": device.restore,
        "forget": device.forget,
        "insert": insert,
        "set_page_table": device.set_page_table,
        "set_masks": device.set_masks,
        "decode": lambda max_steps, keep, num_rows: device.decode(max_steps, keep, int(num_rows)),
    }
    for message in group.messages():
        name, arrays = decode(message)
        if name not in methods:
            raise LockstepError(f"process 0 asks for {name!r}, which this version does not know")
        methods[name](*arrays)


def encode(name: str, arrays: list[Any]) -> bytes:
    """A call as bytes: the head's length, the head, the arrays in C order."""
    arrays = [np.ascontiguousarray(array).reshape(np.shape(array)) for array in arrays]
    head = json.dumps([name, [[array.dtype.name, array.shape] for array in arrays]]).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *(array.tobytes() for array in arrays)])


def decode(message: bytes) -> tuple[str, list[np.ndarray]]:
    """The inverse of `encode`.

    Raises: LockstepError for bytes that `encode` does not make.
    """
    try:
        (size,) = _LENGTH.unpack_from(message)
        offset = _LENGTH.size + size
        name, kinds = json.loads(message[_LENGTH.size : offset])
        arrays = []
        for dtype, shape in kinds:
            count = math.prod(shape)
            array = np.frombuffer(message, _DTYPES[dtype], count, offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise LockstepError(f"process 0 sent a call that cannot be read ({error!r})") from None
    if offset != len(message):
        raise LockstepError(f"process 0 sent a call of {len(message)} bytes, expected {offset}")
    return name, arrays
