"""Many processes, one engine: process 0 decides, and the others make the same calls with the same inputs.

A call is a named tuple of NumPy arrays, or of such tuples. It travels as its type's name, the dtypes and shapes of its
arrays as JSON, and their bytes.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, get_type_hints

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped

from jaxllama.errors import ConfigError, LockstepError
from jaxllama.hosts.group import Group

_LENGTH = struct.Struct("!I")
_DTYPES = {name: np.dtype(name) for name in ("bool", "int32", "uint32", "float32")}


class Runner(Protocol):
    """What makes calls on this process's devices."""

    def run(self, call: Any) -> Any:
        """Makes a call."""

    def wait(self) -> None:
        """Returns when the devices have done all that was asked."""


class Leading:
    """Process 0's devices: every call goes to the other processes first."""

    def __init__(self, own: Runner, group: Group) -> None:
        self._own = own
        self._group = group

    def run(self, call: Any) -> Any:
        """Makes `call` in all processes. Returns what this one's devices do."""
        self._group.publish(to_bytes(call))
        return self._own.run(call)

    def wait(self) -> None:
        """Returns when this process's devices have done all that was asked."""
        self._own.wait()


def follow(run: Callable[[Any], Any], kinds: Iterable[type], group: Group) -> None:
    """Makes process 0's calls, which are of these kinds, until it closes its engine.

    Raises: LockstepError for a call that is not understood; whatever `run` raises.
    """
    assert not group.is_leader, "process 0 leads"
    by_name = {kind.__name__: kind for kind in kinds}
    for message in group.messages():
        run(from_bytes(message, by_name))


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


def to_bytes(call: tuple[Any, ...]) -> bytes:
    """A call as bytes: the head's length, the head, the arrays in C order."""
    arrays = [np.ascontiguousarray(leaf).reshape(np.shape(leaf)) for leaf in _leaves(call)]
    head = json.dumps([type(call).__name__, [[array.dtype.name, array.shape] for array in arrays]]).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *(array.tobytes() for array in arrays)])


def from_bytes(message: bytes, kinds: dict[str, type]) -> Any:
    """The inverse of `to_bytes`; `kinds` are the types of calls by their names.

    Raises: LockstepError for bytes that `to_bytes` does not make of one of them.
    """
    try:
        (size,) = _LENGTH.unpack_from(message)
        offset = _LENGTH.size + size
        name, described = json.loads(message[_LENGTH.size : offset])
        arrays = []
        for dtype, shape in described:
            count = math.prod(shape)
            array = np.frombuffer(message, _DTYPES[dtype], count, offset).reshape(shape)
            arrays.append(array)
            offset += array.nbytes
        kind = kinds.get(name)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise LockstepError(f"process 0 sent a call that cannot be read ({error!r})") from None
    if offset != len(message):
        raise LockstepError(f"process 0 sent a call of {len(message)} bytes, expected {offset}")
    if kind is None:
        raise LockstepError(f"process 0 asks for {name!r:.80}, which this version does not know")
    left = iter(arrays)
    try:
        call = _build(kind, left)
    except StopIteration:
        raise LockstepError(f"process 0 sent {name} with {len(arrays)} arrays, which are too few") from None
    if next(left, None) is not None:
        raise LockstepError(f"process 0 sent {name} with {len(arrays)} arrays, which are too many")
    return call


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _build(kind: Any, leaves: Iterator[Shaped[np.ndarray, " ..."]]) -> Any:
    parts = _parts(kind)
    return next(leaves) if parts is None else kind(*[_build(part, leaves) for part in parts])


@functools.cache
def _parts(kind: Any) -> tuple[Any, ...] | None:
    """The types of a named tuple's fields; None for what is an array."""
    if not (isinstance(kind, type) and issubclass(kind, tuple)):
        return None
    hints, names = get_type_hints(kind), getattr(kind, "_fields", ())
    return tuple(hints.get(name) for name in names)
