"""What a request may be held to."""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
from jaxtyping import UInt32


class Constraint(Protocol):
    """What the next token of one request may be; `text.constraint.OutputConstraint` is one."""

    @property
    def num_free(self) -> int:
        """How many tokens may be sampled before the next must be asked for; at 0, `mask` says which it may be."""

    @property
    def halt_id(self) -> int | None:
        """An id that is not free: after it the device must wait, however many tokens are free otherwise."""

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """The tokens that may come next, bit i % 32 of word i // 32 for token i. At least one. Raises: RequestError."""

    def advance(self, token_id: int) -> None:
        """Takes the token that has come. Raises: RequestError."""

    def fork(self) -> Self | None:
        """A copy to look ahead with, which changes nothing of this one; None where that cannot be."""
