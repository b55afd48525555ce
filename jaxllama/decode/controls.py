"""What can be said of a sampling control: the values it takes, where it is off, where it acts. No JAX.

`decode.params.SamplingParams` gives each of its fields a `Control`, and nothing else spells one out: its validation,
the arrays on the device, the fields of a request to the server and the flags of `jaxllama generate` are made from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxllama.errors import RequestError, quote

MAX_TOKEN_ID = 2**31 - 1
_KEY = "control"


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; with `above`, not `low` itself."""

    low: float
    high: float
    above: bool = False

    @property
    def wanted(self) -> str:
        """What error messages and the API's schema ask for."""
        return f"a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"

    def check(self, name: str, value: Any) -> float:
        """Returns the value. Raises: RequestError."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not (self.low < value if self.above else self.low <= value) or not value <= self.high:
            raise RequestError(f"{name} must be {self.wanted}, got {quote(value)}", name)
        number: float = value
        return number


@dataclass(frozen=True)
class Integer:
    """An integer from `low` to `high`; `said` describes that better, where it can be."""

    low: int
    high: int
    said: str = ""

    @property
    def wanted(self) -> str:
        """As `Number.wanted`."""
        return self.said or f"an integer from {self.low} to {self.high}"

    def check(self, name: str, value: Any) -> int:
        """Returns the value. Raises: RequestError."""
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise RequestError(f"{name} must be {self.wanted}, got {quote(value)}", name)
        return value


@dataclass(frozen=True)
class Boolean:
    """True or false."""

    wanted = "a boolean"

    def check(self, name: str, value: Any) -> bool:
        """Returns the value. Raises: RequestError."""
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be {self.wanted}, got {quote(value)}", name)
        return value


@dataclass(frozen=True)
class Strings:
    """At most `max_items` strings, each of 1 to `max_bytes` bytes in UTF-8."""

    max_items: int
    max_bytes: int

    @property
    def wanted(self) -> str:
        """As `Number.wanted`."""
        return f"a string or at most {self.max_items} strings, each of 1 to {self.max_bytes} bytes"

    def check(self, name: str, value: Any) -> tuple[str, ...]:
        """Returns them as a tuple; one string is one of them. Raises: RequestError."""
        strings = (value,) if isinstance(value, str) else tuple(value)
        if len(strings) > self.max_items:
            raise RequestError(f"{name}: at most {self.max_items} strings, got {len(strings)}", name)
        for text in strings:
            if not isinstance(text, str) or not 1 <= len(text.encode("utf-8", "surrogatepass")) <= self.max_bytes:
                raise RequestError(
                    f"{name}: each must be a string of 1 to {self.max_bytes} bytes, got {quote(text)}", name
                )
        return strings


@dataclass(frozen=True)
class TokenIds:
    """At most `max_items` token ids."""

    max_items: int

    @property
    def wanted(self) -> str:
        """As `Number.wanted`."""
        return f"a list of at most {self.max_items} token ids"

    def check(self, name: str, value: Any) -> tuple[int, ...]:
        """Returns them as a tuple. Raises: RequestError."""
        ids = tuple(value)
        if len(ids) > self.max_items:
            raise RequestError(f"{name}: at most {self.max_items}, got {len(ids)}", name)
        return tuple(Integer(0, MAX_TOKEN_ID).check(name, token_id) for token_id in ids)


@dataclass(frozen=True)
class TokenNumbers:
    """A number from `low` to `high` for each of at most `max_items` token ids."""

    max_items: int
    low: float
    high: float

    @property
    def wanted(self) -> str:
        """As `Number.wanted`."""
        each = Number(self.low, self.high).wanted
        return f"an object of at most {self.max_items} token ids, each with {each}"

    def check(self, name: str, value: Any) -> dict[int, float]:
        """Returns a copy. Raises: RequestError."""
        if len(value) > self.max_items:
            raise RequestError(f"{name}: at most {self.max_items} entries, got {len(value)}", name)
        ids, numbers = Integer(0, MAX_TOKEN_ID), Number(self.low, self.high)
        return {ids.check(name, i): numbers.check(f"{name}[{i}]", number) for i, number in value.items()}


@dataclass(frozen=True)
class Control:
    """One control. With `default` None, None is allowed, and `unset` says what it stands for.

    `dtype` is that of the array which brings a number of every row to the device (`sampling.ControlArrays`); None: the
    control acts on the host, or has arrays of its own. At a value of `off` it does nothing, and the device is given the
    first of them. `in_checkpoint`: a checkpoint's generation_config.json may give its default. `flag` is the help of
    its flag of `jaxllama generate`; empty: it has none.
    """

    domain: Number | Integer | Boolean | Strings | TokenIds | TokenNumbers
    default: Any
    flag: str = ""
    unset: str = ""
    dtype: Literal["float32", "int32"] | None = None
    off: tuple[float, ...] = ()
    in_checkpoint: bool = False

    def check(self, name: str, value: Any) -> Any:
        """Returns the value as `SamplingParams` keeps it. Raises: RequestError naming the range and the value."""
        return None if value is None and self.default is None else self.domain.check(name, value)

    def on_device(self, value: float) -> float:
        """What the device is given for `value`."""
        return self.off[0] if value in self.off else value


def control(domain: Any, default: Any, **rest: Any) -> Any:
    """A field of a dataclass that is a `Control` with these values."""
    metadata = {_KEY: Control(domain, default, **rest)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def controls_of(params: Any) -> Mapping[str, Control]:
    """The controls of a dataclass by name, in the order of its fields."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(params) if _KEY in field.metadata}
