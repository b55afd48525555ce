"""How many drafts a row's steps verify, and what such a step costs. No JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

SpeculationMode = Literal["off", "lookup", "auto"]
MODES: tuple[str, ...] = get_args(SpeculationMode)
MAX_PREDICTION_TOKENS = 4096
"""So many tokens of a prediction are looked at, at most."""
_UNMEASURED_COST = 1.5


@dataclass
class Speculation:
    """`num_drafts` by the number of rows of a decode program; 0 where none are verified.

    `history_size` is that of `decode.state.RowState`. `costs` are what a step that verifies takes in plain steps, by
    the number of rows, as measured (`Engine.warm_up`).
    """

    history_size: int = 0
    num_drafts: Mapping[int, int] = field(default_factory=dict)
    costs: dict[int, float] = field(default_factory=dict)

    def drafts(self, num_rows: int) -> int:
        """Drafts of a program for `num_rows`."""
        return self.num_drafts.get(num_rows, 0)

    def cost(self, num_rows: int) -> float:
        """The cost there."""
        return self.costs.get(num_rows, _UNMEASURED_COST)
