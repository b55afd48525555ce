"""Requests whose next token depends on the last: how far they may run unseen, and the masks of those that may not.

A constraint says how many tokens it can do without being asked (`num_free`). While any running request has none left,
a dispatch is launched only once that request's last token has been read: no row's bits depend on the number of steps in
a dispatch. Masks go to the device before it, in one call for all rows. Without speculation it is one step for all rows;
with it there are masks along the path that a request is thought to take (`scheduling.foresight`), and the dispatch goes
on until a row has left its path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxllama.decode.drafts import Paths
from jaxllama.engine.calls import Programs, SetMasks
from jaxllama.engine.scheduling.constraint import Constraint
from jaxllama.engine.scheduling.foresight import LEAST_CHANCE, Foresight
from jaxllama.engine.scheduling.request import EngineRequest
from jaxllama.errors import RequestError


class Constraints:
    """The constraints of all rows."""

    def __init__(self, programs: Programs, masks_shape: tuple[int, ...], max_verified_tokens: int = 1) -> None:
        """`masks_shape` is rows, masks of a row, words. A step verifies at most `max_verified_tokens`."""
        self._programs = programs
        self._max_verified_tokens = max_verified_tokens
        self._masks = np.full(masks_shape, 0xFFFFFFFF, np.uint32)
        self._is_masked = np.zeros(len(self._masks), np.bool_)

    def max_steps(
        self,
        running: Sequence[EngineRequest],
        max_steps: int,
        steps_in_flight: Callable[[EngineRequest], int],
        num_drafts: int = 0,
    ) -> int:
        """How many of `max_steps` the next dispatch may run; 0 if what is in flight must be read first.

        With `num_drafts` of a row and step, the device knows where rows must wait for a mask.
        """
        for request in running:
            if request.constraint is not None:
                num_in_flight = steps_in_flight(request)
                left = request.constraint.num_free - num_in_flight
                if left <= 0 and num_in_flight:
                    return 0
                if left > 0 or not num_drafts:
                    max_steps = min(max_steps, max(left, 1))
        return max_steps

    def send_masks(
        self, running: Sequence[EngineRequest], num_drafts: int = 0, draft_cost: float = 0.0
    ) -> tuple[Paths, list[tuple[EngineRequest, RequestError]]]:
        """Gives the devices the masks for the next dispatch. Returns the paths of up to `num_drafts` tokens that these
        are for, and the requests that cannot go on, with the reason. A draft of each row costs `draft_cost` steps."""
        failed = []
        paths = Paths.none(len(self._masks), num_drafts)
        was_masked = self._is_masked.any()
        self._is_masked[:] = False
        masked = [(r, r.constraint) for r in running if r.constraint is not None and r.constraint.num_free <= 0]
        # No more than one step may verify, and what is likely to save what that takes: a mask takes the host a
        # hundredth of a step or so besides, for which all rows wait.
        least_chance = max(LEAST_CHANCE, min(0.9, draft_cost + len(masked) / 100))
        most = min(num_drafts, max(1, (self._max_verified_tokens - len(running)) // max(1, len(masked))))
        for request, constraint in masked:
            assert request.row is not None
            try:
                self._foresee(request, constraint, request.row, paths, most, least_chance)
                self._is_masked[request.row] = True
            except RequestError as error:
                failed.append((request, error))
        if was_masked or self._is_masked.any():
            # A copy: the devices may read it after this returns.
            self._programs.run(SetMasks(self._masks.copy(), self._is_masked.copy()))
        return paths, failed

    def _foresee(
        self,
        request: EngineRequest,
        constraint: Constraint,
        row: int,
        paths: Paths,
        most: int,
        least_chance: float,
    ) -> None:
        if request.foresight is None:
            request.foresight = Foresight(request.prediction, request.prompt, request.stop_ids)
        foresight = request.foresight
        foresight.extend(constraint, request.generated, most, least_chance)
        drafts = foresight.drafts[:most]
        paths.num[row] = len(drafts)
        for place, draft in enumerate(drafts):
            paths.tokens[row, place] = draft.token_id
            paths.chances[row, place] = draft.chance
            paths.is_predicted[row, place] = draft.is_predicted
        self._masks[row, : len(drafts) + 1] = foresight.masks[: len(drafts) + 1]


def attach(request: EngineRequest, constraint: Constraint | None) -> None:
    """Gives a request its constraint.

    Raises: RequestError for parameters that need one if there is none.
    """
    for name in ("structured", "thinking_budget"):
        if constraint is None and getattr(request.params, name) is not None:
            raise RequestError(f"{name} needs a constraint, which Llama and the server make; the engine cannot", name)
    request.constraint = constraint


def advance(request: EngineRequest, token_id: int) -> RequestError | None:
    """Tells a request's constraint of its next token. Returns why the request cannot go on, if it cannot."""
    if request.foresight is not None:
        request.foresight.see(token_id)
    try:
        if request.constraint is not None:
            request.constraint.advance(token_id)
    except RequestError as error:
        return error
    return None


def needs_new_row(request: EngineRequest) -> bool:
    """Whether the ids that stop the request's row on the device are no longer those it was made with."""
    return request.constraint is not None and request.constraint.halt_id != request.halt_id
