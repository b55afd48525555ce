"""What a quantised matrix is to the rest of the sources, and what the formats share.

A format's module gets quantization_config and the stored tensors by name, and returns the parameters by name: a
`QuantizedTensor` where several tensors make one matrix, everything else as it was. Nothing outside knows a format.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Int32, UInt8

from jaxllama.errors import ConfigError, ConversionError
from jaxllama.weights.sources.source import SourceTensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
"""Of scales, by the names of safetensors: what a format's own library computes in."""


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor(SourceTensor):
    """A matrix `[out, in]` that is stored as several tensors.

    `file`, `offset` and `num_bytes` are those of the largest, `dtype` says in words what is stored. A subclass reads
    the parts and undoes the quantisation.
    """

    @property
    def is_readable(self) -> bool:
        """True: whoever made it knows how."""
        return True

    def part(self, start: int, stop: int) -> SourceTensor:
        """Rows `[start, stop)`, dequantised beside the others: several matrices that were quantised as one."""
        kind = Int8RowsOf if isinstance(self, Int8Tensor) else RowsOf
        return kind(
            name=self.name,
            file=self.file,
            offset=self.offset,
            num_bytes=self.num_bytes * (stop - start) // self.shape[0],
            shape=(stop - start, *self.shape[1:]),
            dtype=self.dtype,
            whole=self,
            first=start,
        )

    @abstractmethod
    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """Rows `[start, stop)`, `[rows, in]`, of the values and in the dtype that the format's own library gives."""


@dataclass(frozen=True, kw_only=True)
class Int8Tensor(QuantizedTensor):
    """A matrix that is stored as symmetric int8 with one scale a row, as a `QuantizedWeight` is."""

    @abstractmethod
    def read_int8_rows(self, start: int, stop: int, *, hashed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Rows `[start, stop)` as they are stored: int8 `[rows, in]` and float32 scales `[rows]`."""


@dataclass(frozen=True, kw_only=True)
class RowsOf(QuantizedTensor):
    """Rows of the matrix `whole`, from `first` on."""

    whole: Any
    first: int

    def read_rows(self, start: int, stop: int, *, hashed: bool = True) -> np.ndarray:
        """As the whole matrix gives them."""
        rows: np.ndarray = self.whole.read_rows(self.first + start, self.first + stop, hashed=hashed)
        return rows


@dataclass(frozen=True, kw_only=True)
class Int8RowsOf(RowsOf, Int8Tensor):
    """Rows of an int8 matrix."""

    def read_int8_rows(self, start: int, stop: int, *, hashed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """As the whole matrix gives them."""
        values, scales = self.whole.read_int8_rows(self.first + start, self.first + stop, hashed=hashed)
        return values, scales


class Format(Protocol):
    """A family of formats: see the module's docstring."""

    def __call__(self, settings: Settings, tensors: Mapping[str, SourceTensor]) -> Mapping[str, SourceTensor]:
        """Raises: ConfigError for settings that are not supported, ConversionError for tensors that do not fit."""
        ...


class Settings:
    """quantization_config, read key by key. What nobody has read in the end is not understood, and refused."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self._read: set[str] = {"quant_method"}

    def get(self, key: str, default: Any = None) -> Any:
        """The value; `default` where it is absent or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def one_of(self, key: str, allowed: Iterable[Any], default: Any = None) -> Any:
        """The value, lower case if it is text, which must be one of `allowed`."""
        value = self.get(key, default)
        value = value.lower() if isinstance(value, str) else value
        # True equals 1, and is not meant.
        if not any(type(value) is type(item) and value == item for item in allowed):
            raise self.refusal(key, value, f"expected one of {', '.join(map(repr, allowed))}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer, or -1 for "all"."""
        value = self.get(key, default)
        if type(value) is not int or (value < 1 and value != -1):
            raise self.refusal(key, value, "expected a positive integer, or -1")
        return value

    def names(self, *keys: str) -> list[str]:
        """A list of names, under the first of the keys that is there."""
        for key in keys:
            if (value := self.get(key)) is not None:
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    raise self.refusal(key, value, "expected a list of names")
                return value
        return []

    def section(self, key: str) -> Settings | None:
        """An object inside, None where it is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refusal(key, value, "expected an object")
        return Settings(value, f"{self._where}.{key}")

    def sections(self, key: str) -> list[Settings]:
        """The objects in an object."""
        inside = self.section(key)
        found = [] if inside is None else [inside.section(name) for name in inside._values]
        return [section for section in found if section is not None]

    def skip(self, *keys: str) -> None:
        """Marks what does not change the stored values as read."""
        self._read.update(keys)

    def refuse(self, *keys: str) -> None:
        """Raises: ConfigError if one of the keys has a value."""
        for key in keys:
            if _means_something(value := self.get(key)):
                raise self.refusal(key, value, "it changes what the model computes")

    def finish(self) -> None:
        """Raises: ConfigError listing what has not been read."""
        unknown = [key for key, value in self._values.items() if key not in self._read and _means_something(value)]
        if unknown:
            raise ConfigError(f"{self._where}: not understood: {', '.join(sorted(map(repr, unknown)))}")

    def refusal(self, key: str, value: Any, why: str) -> ConfigError:
        """The error that names a key, its value and what is wrong with it."""
        return ConfigError(f"{self._where}.{key} {str(value)[:100]!r} is not supported: {why}")


def _means_something(value: Any) -> bool:
    return value is not None and value is not False and value != {} and value != []


def modules(tensors: Mapping[str, SourceTensor], part: str) -> Iterator[tuple[str, SourceTensor]]:
    """The modules that have a tensor `MODULE.part`, and it."""
    for name, tensor in tensors.items():
        if name.endswith(f".{part}"):
            yield name.removesuffix(f".{part}"), tensor


def check_part(tensor: SourceTensor, shapes: Iterable[tuple[int, ...]], dtypes: Iterable[str]) -> SourceTensor:
    """The tensor, if it has one of the shapes and dtypes.

    Raises: ConversionError.
    """
    shapes, dtypes = list(shapes), list(dtypes)
    if tensor.shape not in shapes or tensor.dtype not in dtypes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ConversionError(
            f"{tensor.file.path}: {tensor.name} is {tensor.dtype}{list(tensor.shape)}, expected "
            f"{' or '.join(dtypes)} of shape {wanted}. Is quantization_config of this model?"
        )
    return tensor


def check_groups(group_of: SourceTensor, width: int, num_groups: int) -> None:
    """Holds that `group_of` names the group of each of `width` inputs.

    Raises: ConversionError when the tensor has another shape or dtype, or names a group that is not there.
    """
    groups = read_all(check_part(group_of, [(width,)], ["I32", "I64"]))
    strange = groups[(groups < 0) | (groups >= num_groups)]
    if strange.size:
        raise ConversionError(
            f"{group_of.file.path}: {group_of.name} names group {int(strange[0])}, expected 0 to {num_groups - 1}"
        )


def take(tensors: dict[str, SourceTensor], module: str, part: str) -> SourceTensor:
    """Removes `MODULE.part` and returns it.

    Raises: ConversionError when it is not there.
    """
    name = f"{module}.{part}"
    if name not in tensors:
        raise ConversionError(f"{name} is missing, although other parts of {module} are there")
    return tensors.pop(name)


def read_all(tensor: SourceTensor) -> np.ndarray:
    """A small tensor, whole, in its shape."""
    if not tensor.shape:
        return SourceTensor(tensor.name, tensor.file, tensor.offset, tensor.num_bytes, (1,), tensor.dtype).read_rows(
            0, 1, hashed=False
        )
    return tensor.read_rows(0, tensor.shape[0], hashed=False)


def unpack_words(
    words: Int32[np.ndarray, "rows words"], num_bits: int, num_values: int
) -> UInt8[np.ndarray, "rows {num_values}"]:
    """Values of `num_bits` each, the first in the lowest bits, from int32 `[rows, words]`: uint8 `[rows, num_values]`.

    A value may lie across two words.
    """
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if num_bits == 8:
        return data[:, :num_values]
    if num_bits in (1, 2, 4):
        shifts = np.arange(0, 8, num_bits, dtype=np.uint8)
        values = (data[:, :, None] >> shifts) & np.uint8(2**num_bits - 1)
        return values.reshape(len(data), -1)[:, :num_values]
    bits = np.unpackbits(data, axis=1, bitorder="little", count=num_values * num_bits)
    powers = (1 << np.arange(num_bits)).astype(np.uint8)
    return (bits.reshape(len(data), num_values, num_bits) * powers).sum(-1, dtype=np.uint8)


class RecentReads:
    """Keeps what was read of the last two tensors.

    Formats that lie the other way round, `[in, out]`, cannot be read by rows of `[out, in]`: their packed words are
    read once, and the rows dequantised from them slice by slice.
    """

    _MOST = 2

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get[T](self, name: str, read: Callable[[], T]) -> T:
        """What `read` gives, or gave not long ago for the same name."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                kept: T = self._kept[name]
                return kept
        value = read()
        with self._lock:
            self._kept[name] = value
            while len(self._kept) > self._MOST:
                self._kept.popitem(last=False)
        return value
