"""Decode programs that are on their way: how many steps the next one runs, and what came of those before it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

from jaxllama.decode.state import MAX_STEPS, NOT_FINITE, StepOutput
from jaxllama.engine.calls import Decode, Programs, SetPageTable
from jaxllama.engine.constraints import Constraints, advance
from jaxllama.engine.options import StepReport
from jaxllama.engine.placement import Placement
from jaxllama.engine.scheduling.request import EngineRequest, TokenLogprob, TokenOutput
from jaxllama.engine.scheduling.scheduler import Scheduler
from jaxllama.errors import NonFiniteLogitsError, RequestError


@dataclass(frozen=True)
class Dispatch:
    """A launched `decode_steps`. `rows` is who held which row when it was launched, at `launched`.

    Reading the output waits for the device.
    """

    output: StepOutput
    rows: dict[int, EngineRequest]
    max_steps: int
    launched: float

    def take(self, request: EngineRequest, row: int) -> TokenOutput:
        """Adds what the row has come to to its request. Returns what there is to tell; a finish_reason if it ends."""
        new: list[int] = []
        logprobs: list[TokenLogprob] = []

        def output(**end: object) -> TokenOutput:
            return TokenOutput(tuple(new), tuple(logprobs), **end)  # type: ignore[arg-type]

        for step, token in enumerate(self.tokens[:, row].tolist()):
            if token == NOT_FINITE:
                error = NonFiniteLogitsError("the model produced NaN or infinity for this request")
                return output(finish_reason="error", error=error)
            if token < 0:
                break
            new.append(token)
            request.generated.append(token)
            if request.params.logprobs is not None:
                logprobs.append(self._token_logprob(token, request.params.logprobs, step, row))
            if (reason := advance(request, token)) is not None:
                return output(finish_reason="error", error=reason)
            if token in request.stop_ids:
                return output(finish_reason="stop", stop_token_id=token)
            if len(request.generated) >= request.budget:
                return output(finish_reason="length")
        return output()

    @cached_property
    def tokens(self) -> Int[np.ndarray, "steps rows"]:
        """Those of the steps that ran."""
        return np.asarray(self.output.tokens)[: int(self.output.num_steps)]

    def report(self, step_s: float) -> StepReport:
        """What it did; the rows' lengths are those before its tokens are added to them."""
        num_steps, lengths = len(self.tokens), [len(r.prompt) + len(r.generated) for r in self.rows.values()]
        kv_tokens = sum(lengths) + len(lengths) * num_steps / 2
        return StepReport(num_steps, len(lengths), num_steps * step_s, kv_tokens)

    def _token_logprob(self, token: int, count: int, step: int, row: int) -> TokenLogprob:
        """What `logprobs=count` asks for at one step of one row."""
        chosen, ids, values = self._logprobs
        top = zip(ids[step, row, :count].tolist(), values[step, row, :count].tolist(), strict=True)
        return TokenLogprob(token, float(chosen[step, row]), tuple(top))

    @cached_property
    def _logprobs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.asarray(self.output.logprobs), np.asarray(self.output.top_ids), np.asarray(self.output.top_logprobs)


class Dispatches:
    """Launches dispatches and knows those that are not read yet, oldest first. The engine's thread alone uses it."""

    def __init__(
        self,
        programs: Programs,
        scheduler: Scheduler,
        placement: Placement,
        constraints: Constraints,
        *,
        table_shape: tuple[int, int],
        row_buckets: Sequence[int],
    ) -> None:
        """`table_shape` is that of all rows' page tables; `row_buckets` are the numbers of rows there are programs for,
        ascending."""
        self.in_flight: deque[Dispatch] = deque()
        self._programs = programs
        self._scheduler = scheduler
        self._placement = placement
        self._constraints = constraints
        self._page_table = np.zeros(table_shape, np.int32)
        self._row_buckets = row_buckets
        self._step_s = 0.02

    def launch(self, dispatch_s: float, fail: Callable[[EngineRequest, RequestError], None]) -> bool:
        """Launches one that takes about `dispatch_s` seconds. False if there is none to launch before what is in flight
        is read. Requests whose constraint says that they cannot go on go to `fail`."""
        scheduler = self._scheduler
        max_steps = self._choose_steps(dispatch_s)
        max_steps = self._constraints.max_steps(scheduler.running, max_steps, self._steps_in_flight)
        if not max_steps or not self._make_room(max_steps):
            return False
        for request, error in self._constraints.send_masks(scheduler.running):
            fail(request, error)
        running = scheduler.running
        if not running or all(self._is_spent(request) for request in running):
            return False
        table = np.zeros_like(self._page_table)
        keep = np.zeros(len(table), np.bool_)
        rows: dict[int, EngineRequest] = {}
        for request in running:
            assert request.row is not None
            table[request.row, : len(request.pages)] = request.pages
            keep[request.row] = True
            rows[request.row] = request
        if not np.array_equal(table, self._page_table):
            self._page_table = table
            self._programs.run(SetPageTable(table))
        bucket = next(size for size in self._row_buckets if size > max(rows))
        # A program of its own, so that it costs nothing where nobody asks for it.
        steers = any(request.params.steering is not None for request in running)
        output = self._programs.run(Decode(np.int32(max_steps), keep, np.int32(bucket), np.bool_(steers)))
        output.tokens.copy_to_host_async()
        self.in_flight.append(Dispatch(output, rows, max_steps, time.monotonic()))
        return True

    def learn(self, step_s: float) -> None:
        """Takes note of how long a step took."""
        self._step_s = 0.5 * self._step_s + 0.5 * max(step_s, 1e-4)

    def _choose_steps(self, dispatch_s: float) -> int:
        """Steps of the next dispatch: what takes `dispatch_s`, but one while a row is empty and others wait."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        if self._scheduler.prefilling:
            return 1
        left = [r.budget - len(r.generated) - self._steps_in_flight(r) for r in running] if waiting else []
        return max(1, min([MAX_STEPS, round(dispatch_s / self._step_s), *left]))

    def _steps_in_flight(self, request: EngineRequest) -> int:
        return sum(
            d.max_steps for d in self.in_flight if request.row is not None and d.rows.get(request.row) is request
        )

    def _is_spent(self, request: EngineRequest) -> bool:
        """Whether what is in flight uses up the request's budget, so that another dispatch would find it inactive."""
        return len(request.generated) + self._steps_in_flight(request) >= request.budget

    def _make_room(self, max_steps: int) -> bool:
        """Takes the pages that `max_steps` more steps need. False if what is in flight must be read first."""
        for request in sorted(self._scheduler.running, key=lambda r: r.order):
            while request.is_running:
                steps = min(self._steps_in_flight(request) + max_steps, request.budget - len(request.generated))
                if self._scheduler.grow(request, len(request.prompt) + len(request.generated) + steps):
                    break
                if self.in_flight:
                    return False
                self._placement.set_aside(self._scheduler.youngest(request.shard))
        return True
