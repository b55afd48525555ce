"""How many drafts a row's steps verify, and what such a step costs. No JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32

SpeculationMode = Literal["off", "lookup", "auto"]
MODES: tuple[str, ...] = get_args(SpeculationMode)
MAX_PREDICTION_TOKENS = 4096
"""So many tokens of a prediction are looked at, at most."""
_UNMEASURED = 0.1


@dataclass(frozen=True)
class StepTimes:
    """Seconds of steps of one program, by the number of tokens in them: plain ones, and such that verify drafts.

    Between the numbers that were measured it is a straight line.
    """

    plain: Mapping[int, float]
    verifying: Mapping[int, float]

    def costs(self, num_rows: int, num_drafts: int) -> Float32[np.ndarray, " depths"]:
        """What a step of `num_rows` rows costs that verifies 0 … `num_drafts` drafts of each, in plain steps."""
        depths = 1 + np.arange(1, num_drafts + 1)
        times = np.interp(num_rows * depths, [*self.verifying], [*self.verifying.values()])
        plain = np.interp(num_rows, [*self.plain], [*self.plain.values()])
        return np.concatenate(([1], times / plain)).astype(np.float32)


@dataclass
class Speculation:
    """`num_drafts` by the number of rows of a decode program; 0 where none are verified.

    `history_size` is that of `decode.state.RowState`. `times` are those of each program, as measured
    (`Engine.warm_up`).
    """

    history_size: int = 0
    num_drafts: Mapping[int, int] = field(default_factory=dict)
    times: dict[int, StepTimes] = field(default_factory=dict)

    def drafts(self, num_rows: int) -> int:
        """Drafts of a program for `num_rows`."""
        return self.num_drafts.get(num_rows, 0)

    def costs(self, num_rows: int, num_active: int) -> Float32[np.ndarray, " depths"]:
        """The costs of steps of a program for `num_rows`, of which `num_active` are (`StepTimes.costs`)."""
        num_drafts = self.drafts(num_rows)
        if num_rows in self.times:
            return self.times[num_rows].costs(num_active, num_drafts)
        return (1 + _UNMEASURED * np.arange(num_drafts + 1)).astype(np.float32)
