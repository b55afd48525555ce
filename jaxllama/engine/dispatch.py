"""Decode programs that are on their way: how many steps the next one runs, and what came of those before it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from jaxllama.decode.drafts import Drafting, Paths
from jaxllama.decode.state import MAX_STEPS, NOT_FINITE, RowState, StepOutput
from jaxllama.engine.calls import Decode, Insert, Programs, SetPageTable
from jaxllama.engine.constraints import Constraints, advance
from jaxllama.engine.options import StepReport
from jaxllama.engine.placement import Placement
from jaxllama.engine.scheduling.request import EngineRequest, TokenLogprob, TokenOutput
from jaxllama.engine.scheduling.scheduler import Scheduler
from jaxllama.engine.scheduling.speculation import Speculation, StepTimes
from jaxllama.errors import NonFiniteLogitsError, RequestError


@dataclass(frozen=True)
class Dispatch:
    """A launched `decode_steps`. `rows` is who held which row when it was launched, at `launched`, and no row gets more
    than `max_tokens`.

    Reading the output waits for the device.
    """

    output: StepOutput
    rows: dict[int, EngineRequest]
    max_tokens: int
    launched: float

    def take(self, request: EngineRequest, row: int) -> TokenOutput:
        """Adds what the row has come to to its request. Returns what there is to tell; a finish_reason if it ends."""
        new: list[int] = []
        request.num_accepted += int(self._num_accepted[row])
        request.num_predicted += int(self._num_predicted[row])
        request.draft_length = int(self._draft_length[row])
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
        """A row's new ones, up to the first -1."""
        return np.asarray(self.output.tokens)

    @cached_property
    def num_steps(self) -> int:
        """How many steps ran."""
        return int(self.output.num_steps)

    def report(self, step_s: float) -> StepReport:
        """What it did; the rows' lengths are those before its tokens are added to them."""
        lengths = [len(r.prompt) + len(r.generated) for r in self.rows.values()]
        num_tokens = int((self.tokens >= 0).sum())
        kv_tokens = sum(lengths) + num_tokens / 2
        drafts = (int(np.asarray(self.output.num_drafted).sum()), int(self._num_accepted.sum()))
        return StepReport(self.num_steps, len(lengths), self.num_steps * step_s, kv_tokens, num_tokens, *drafts)

    def _token_logprob(self, token: int, count: int, step: int, row: int) -> TokenLogprob:
        """What `logprobs=count` asks for at one step of one row."""
        chosen, ids, values = self._logprobs
        top = zip(ids[step, row, :count].tolist(), values[step, row, :count].tolist(), strict=True)
        return TokenLogprob(token, float(chosen[step, row]), tuple(top))

    @cached_property
    def _num_accepted(self) -> Int[np.ndarray, " rows"]:
        return np.asarray(self.output.num_accepted)

    @cached_property
    def _num_predicted(self) -> Int[np.ndarray, " rows"]:
        return np.asarray(self.output.num_predicted)

    @cached_property
    def _draft_length(self) -> Int[np.ndarray, " rows"]:
        return np.asarray(self.output.draft_length)

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
        speculation: Speculation,
    ) -> None:
        """`table_shape` is that of all rows' page tables; `row_buckets` are the numbers of rows there are programs for,
        ascending."""
        self._speculation = speculation
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
        if not scheduler.running:
            return False
        max_steps = self._choose_steps(dispatch_s)
        # Setting some aside may leave rows that a smaller program has: this one does too.
        num_rows = self._bucket(scheduler.running)
        num_drafts = self._speculation.drafts(num_rows)
        max_tokens = min(MAX_STEPS, max_steps * (1 + num_drafts))
        max_tokens = self._constraints.max_steps(scheduler.running, max_tokens, self._tokens_in_flight, num_drafts)
        max_steps = min(max_steps, max_tokens)
        if not max_steps or not self._make_room(max_tokens):
            return False
        draft_cost = self._speculation.draft_cost(num_rows, len(scheduler.running))
        paths, failed = self._constraints.send_masks(scheduler.running, num_drafts, draft_cost)
        for request, error in failed:
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
        # A program of its own, so that it costs nothing where nobody asks for it.
        steers = any(request.params.steering is not None for request in running)
        call = self._decode(max_steps, max_tokens, keep, num_rows, paths)
        call = call._replace(steers=np.bool_(steers))
        output = self._programs.run(call)
        for array in (output.tokens, output.num_steps, output.num_accepted, output.num_predicted, output.draft_length):
            array.copy_to_host_async()
        self.in_flight.append(Dispatch(output, rows, max_tokens, time.monotonic()))
        return True

    def run_empty(self, num_rows: int) -> None:
        """Runs the program for `num_rows` rows, of which none is active."""
        nobody = np.zeros(len(self._page_table), np.bool_)
        self._programs.run(self._decode(1, 1, nobody, num_rows, self._no_paths(num_rows)))

    def measure(self, row: RowState, max_tokens: int) -> None:
        """Measures what steps take that verify drafts, and plain ones, of up to `max_tokens` tokens, and what a draft
        model's drafts take: on copies of `row` in page 0, which is nobody's. Before any request."""
        for num_rows in self._row_buckets:
            most = self._speculation.drafts(num_rows)
            if not most:
                continue
            few = min(num_rows, max(1, max_tokens // (1 + most)))
            deep = min(most, self._speculation.max_by_model)
            points = {(1, 0), (few, 0), (num_rows, 0), (1, 1), (1, most), (few, most)}
            modelled = {(1, deep), (few, deep), (min(num_rows, max(1, max_tokens // 2)), 1)} if deep else set()
            times = self._time_steps(row, num_rows, points | modelled, by_model=False)
            plain = {active: seconds for (active, depth), seconds in times.items() if not depth}
            verifying = {active * (1 + depth): seconds for (active, depth), seconds in times.items() if depth}
            slower = self._time_steps(row, num_rows, modelled, by_model=True)
            by_model = {
                active: max(0.0, seconds - times[active, depth]) / depth
                for (active, depth), seconds in sorted(slower.items(), key=lambda item: item[0][1])
            }
            self._speculation.times[num_rows] = StepTimes(plain, verifying, by_model)

    def _time_steps(
        self, row: RowState, num_rows: int, points: set[tuple[int, int]], *, by_model: bool
    ) -> dict[tuple[int, int], float]:
        """Seconds a step of the program for `num_rows` rows, of which so many are active and have few tokens, when it
        verifies so many drafts of each, which the draft model makes or nobody."""
        times: dict[tuple[int, int], float] = {}
        for active, depth in [*sorted(points), *sorted(points)]:
            for index in range(active):
                self._programs.run(Insert(np.int32(index), row))
            self._programs.wait()
            keep = np.arange(len(self._page_table)) < active
            costs = np.full(1 + self._speculation.drafts(num_rows), np.inf, np.float32)
            costs[depth] = 1
            call = self._decode(3, MAX_STEPS, keep, num_rows, self._no_paths(num_rows))
            forced = call.drafting._replace(costs=costs, model_cost=np.float32(0 if by_model else 1))
            started = time.perf_counter()
            num_steps = int(self._programs.run(call._replace(drafting=forced)).num_steps)
            seconds = (time.perf_counter() - started) / num_steps
            times[active, depth] = min(seconds, times.get((active, depth), math.inf))
        return times

    def _bucket(self, running: Sequence[EngineRequest]) -> int:
        """The rows of the smallest program that has all of theirs."""
        last = max(request.row or 0 for request in running)
        return next(size for size in self._row_buckets if size > last)

    def _no_paths(self, num_rows: int) -> Paths:
        return Paths.none(len(self._page_table), self._speculation.drafts(num_rows))

    def _decode(
        self, max_steps: int, max_tokens: int, keep: Bool[np.ndarray, " rows"], num_rows: int, paths: Paths
    ) -> Decode:
        speculation, num_active = self._speculation, int(keep.sum())
        drafting = Drafting(
            np.int32(max_tokens),
            speculation.costs(num_rows, num_active),
            paths,
            np.bool_(speculation.looks_up),
            np.int32(speculation.max_by_model),
            np.float32(speculation.model_cost(num_rows, num_active)),
        )
        sizes = (np.int32(max_steps), keep, np.int32(num_rows))
        return Decode(*sizes, num_drafts=np.int32(speculation.drafts(num_rows)), drafting=drafting)

    def learn(self, step_s: float) -> None:
        """Takes note of how long a step took."""
        self._step_s = 0.5 * self._step_s + 0.5 * max(step_s, 1e-4)

    def _choose_steps(self, dispatch_s: float) -> int:
        """Steps of the next dispatch: what takes `dispatch_s`, but one while a row is empty and others wait."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        if self._scheduler.prefilling:
            return 1
        left = [r.budget - len(r.generated) - self._tokens_in_flight(r) for r in running] if waiting else []
        return max(1, min([MAX_STEPS, round(dispatch_s / self._step_s), *left]))

    def _tokens_in_flight(self, request: EngineRequest) -> int:
        return sum(
            d.max_tokens for d in self.in_flight if request.row is not None and d.rows.get(request.row) is request
        )

    def _is_spent(self, request: EngineRequest) -> bool:
        """Whether what is in flight uses up the request's budget, so that another dispatch would find it inactive."""
        return len(request.generated) + self._tokens_in_flight(request) >= request.budget

    def _make_room(self, max_tokens: int) -> bool:
        """Takes the pages that `max_tokens` more tokens need, once those are given back that nothing needs any more.

        False if what is in flight must be read first.
        """
        for request in self._scheduler.running:
            self._placement.release_unreachable(request)
        for request in sorted(self._scheduler.running, key=lambda r: r.order):
            while request.is_running:
                steps = min(self._tokens_in_flight(request) + max_tokens, request.budget - len(request.generated))
                if self._scheduler.grow(request, len(request.prompt) + len(request.generated) + steps):
                    break
                if self.in_flight:
                    return False
                self._placement.set_aside(self._scheduler.youngest(request.shard))
        return True
