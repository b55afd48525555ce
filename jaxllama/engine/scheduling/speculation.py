"""How many drafts a row's steps verify, and what such a step costs. No JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float32, Int

SpeculationMode = Literal["off", "lookup", "draft", "auto"]
MODES: tuple[str, ...] = get_args(SpeculationMode)
DRAFTED_MODES = ("draft", "auto")
"""Those with which a draft model may be given."""
MAX_DRAFT_TOKENS = 16
MAX_PREDICTION_TOKENS = 4096
"""So many tokens of a prediction are looked at, at most."""
_UNMEASURED = 0.1
_LEAST_MODEL_COST = 1e-3


@dataclass(frozen=True)
class StepTimes:
    """Seconds of steps of one program, by the number of tokens in them: plain ones, and such that verify drafts.

    `by_model` are those in which a draft model makes one more draft of each of so many rows. Between the numbers that
    were measured it is a straight line.
    """

    plain: Mapping[int, float]
    verifying: Mapping[int, float]
    by_model: Mapping[int, float] = field(default_factory=dict)

    def costs(self, num_rows: int, num_drafts: int) -> Float32[np.ndarray, " depths"]:
        """What a step of `num_rows` rows costs that verifies 0 … `num_drafts` drafts of each, in plain steps."""
        depths = 1 + np.arange(1, num_drafts + 1)
        times = _between(self.verifying, num_rows * depths)
        return np.concatenate(([1], times / _between(self.plain, num_rows))).astype(np.float32)

    def model_cost(self, num_rows: int) -> float:
        """What a draft of each of `num_rows` rows costs by the draft model, in plain steps."""
        return max(_LEAST_MODEL_COST, float(_between(self.by_model, num_rows) / _between(self.plain, num_rows)))


@dataclass
class Speculation:
    """`num_drafts` by the number of rows of a decode program; 0 where none are verified.

    `history_size` is that of `decode.state.RowState`. A draft model makes at most `max_by_model` drafts of a row, 0
    where there is none, and has `model_share` of the model's weights. `times` are those of each program, as measured
    (`Engine.warm_up`).
    """

    history_size: int = 0
    num_drafts: Mapping[int, int] = field(default_factory=dict)
    looks_up: bool = True
    max_by_model: int = 0
    model_share: float = 1.0
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

    def draft_cost(self, num_rows: int, num_active: int) -> float:
        """What a draft of each row costs in plain steps, in the step in which it is cheapest: if it is less likely to
        be right, it does not pay."""
        costs = self.costs(num_rows, num_active) - 1
        return max(0.0, float(min(costs[1:] / np.arange(1, len(costs)), default=0.0)))

    def model_cost(self, num_rows: int, num_active: int) -> float:
        """The same of a draft by the draft model; its share of the weights, where nothing was measured."""
        times = self.times.get(num_rows)
        return times.model_cost(num_active) if times is not None and times.by_model else self.model_share


def _between(times: Mapping[int, float], at: int | Int[np.ndarray, " numbers"]) -> Float[np.ndarray, " *numbers"]:
    """`times` at `at`, in order and beyond its ends as there."""
    ordered = sorted(times)
    return np.asarray(np.interp(at, ordered, [times[number] for number in ordered]))
