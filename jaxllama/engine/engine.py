"""Continuous batching: one thread owns the device, and every request passes through it."""

from __future__ import annotations

import atexit
import itertools
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllama.decode.params import SamplingParams
from jaxllama.decode.state import MAX_STEPS, NOT_FINITE, any_row, state_shapes
from jaxllama.engine.calls import (
    CALLS,
    ClearPages,
    Compile,
    Decode,
    Insert,
    Programs,
    RestorePages,
    SavePages,
    SetPageTable,
)
from jaxllama.engine.chunks import ChunkPlan, Span
from jaxllama.engine.compilation import OnProgress, num_compilations
from jaxllama.engine.constraints import Constraint, Constraints, advance, attach, needs_new_row
from jaxllama.engine.device import Device
from jaxllama.engine.dispatch import Dispatch
from jaxllama.engine.options import EngineOptions, EngineStats, StepReport
from jaxllama.engine.placement import Placement
from jaxllama.engine.request import EngineRequest, FinishReason, TokenLogprob, TokenOutput
from jaxllama.engine.scheduler import Scheduler
from jaxllama.errors import (
    ConfigError,
    ContextLengthError,
    EngineStoppedError,
    LockstepError,
    NonFiniteLogitsError,
    QueueFullError,
    RequestError,
)
from jaxllama.hosts.group import Group
from jaxllama.hosts.lockstep import Leading, check_processes, follow
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import Params
from jaxllama.model.platforms.describe import describe_platform

logger = logging.getLogger("jaxllama.engine")


class Engine:
    """Runs requests together on one model. Start-up is lazy; `warm_up` compiles everything beforehand.

    `submit`, `EngineRequest.cancel`, `stats`, `health`, `drain` and `close` may be called from any thread.
    """

    def __init__(
        self, config: LlamaConfig, params: Params, mesh: Mesh, options: EngineOptions, group: Group | None = None
    ) -> None:
        check_processes(mesh, group)
        self._compilations_before = num_compilations()
        self.config = config
        self.options = options
        self.group = group
        self.max_context = min(options.max_context or config.max_position_embeddings, config.max_position_embeddings)
        self.kv_dtype = jnp.dtype(options.kv_dtype or params["norm"].dtype)
        self.platform = platform = describe_platform(config, mesh, dtype=params["norm"].dtype, kv_dtype=self.kv_dtype)
        num_shards = platform.num_shards
        # XLA multiplies one row by another path, with other bits, than two: a row must not notice its batch.
        rows_per_shard = max(2, options.max_rows) if num_shards == 1 else -(-options.max_rows // num_shards)
        self._num_rows = rows_per_shard * num_shards
        self._row_buckets = platform.row_buckets(self._num_rows)
        self.page_size = page_size = options.page_size or platform.page_size
        self.chunk_sizes = platform.chunk_sizes if options.chunk_sizes is None else options.chunk_sizes
        if not self.chunk_sizes or any(size < 1 or size % page_size for size in self.chunk_sizes):
            raise ConfigError(f"chunk_sizes must be multiples of page_size ({page_size}), got {self.chunk_sizes}")
        context_pages = -(-self.max_context // page_size)
        default_pages = 1 + max(context_pages, rows_per_shard * min(context_pages, 2048 // page_size))
        num_pages = options.num_pages or default_pages
        if num_pages <= context_pages:
            raise ConfigError(
                f"num_pages ({num_pages}) cannot hold one context of {self.max_context} tokens, which needs "
                f"{context_pages + 1} pages of {page_size}. Lower max_context or raise num_pages"
            )
        self._table_width = context_pages + max(self.chunk_sizes) // page_size
        platform.kernel.validate(page_size=page_size, num_rows=rows_per_shard, table_width=self._table_width)
        self._shapes = state_shapes(
            config,
            num_rows=self._num_rows,
            num_pages=num_pages,
            page_size=page_size,
            max_context=self._table_width * page_size,
            dtype=self.kv_dtype,
            num_shards=num_shards,
        )
        self._device = Device(config, params, mesh, self._shapes, platform)
        self._programs: Programs = self._device if group is None else Leading(self._device, group)
        self._page_table = np.zeros((self._num_rows, self._table_width), np.int32)
        self._plan = ChunkPlan(tuple(sorted(self.chunk_sizes)), page_size, platform.programs_agree)
        self._scheduler = Scheduler(
            num_rows=self._num_rows if options.max_rows > 1 or num_shards > 1 else 1,
            num_pages=num_pages,
            plan=self._plan,
            num_shards=num_shards,
        )
        self._placement = Placement(
            config,
            self._programs,
            self._scheduler,
            table_width=self._table_width,
            needs_clean_pages=platform.needs_clean_pages,
        )
        self._constraints = Constraints(self._programs, self._num_rows, config.vocab_size)
        self._in_flight: deque[Dispatch] = deque()
        self._step_s = 0.02
        self._inbox: deque[EngineRequest] = deque()
        self._arrivals = itertools.count()
        self._changed = threading.Condition()
        self._telling = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_accepting = True
        self._is_closing = False
        self._failure: Exception | None = None
        self._is_warm = False
        self._last_progress = time.monotonic()
        self.on_steps: Callable[[StepReport], None] | None = None
        """Called on the engine's thread after every dispatch; must return at once."""
        if group is not None:
            group.on_failure(self._abandon)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pool, over all devices."""
        return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(self._shapes.pool))

    # What callers use

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: Callable[[TokenOutput], None],
        *,
        priority: int = 0,
        constraint: Constraint | None = None,
        cache_scope: str | bytes = b"",
    ) -> EngineRequest:
        """Queues a request. `on_output` runs on the engine's thread and must return at once.

        `max_tokens` None or past the context ends the output at the context. What earlier requests of the same
        `cache_scope` began with is not prefilled again (`EngineRequest.num_cached_tokens`); no other's is used.
        `constraint`, of this request alone, says what its tokens may be; `Llama` makes it of `params.structured` and
        `params.thinking_budget`.

        Raises: RequestError or ContextLengthError for a prompt or parameters that cannot run, QueueFullError,
        EngineStoppedError.
        """
        if self.group is not None and not self.group.is_leader:
            raise EngineStoppedError("this process follows process 0, which alone takes requests")
        request = self._make_request(prompt_ids, params, on_output, priority, cache_scope)
        attach(request, constraint)
        with self._changed:
            if self._failure is not None:
                raise EngineStoppedError(f"the engine has failed: {self._failure}")
            if not self._is_accepting:
                raise EngineStoppedError("the engine is stopping and takes no new requests")
            if len(self._inbox) + len(self._scheduler.waiting) >= self.options.max_queue:
                raise QueueFullError(f"{self.options.max_queue} requests wait already. Try again later")
            request.arrival = next(self._arrivals)
            self._inbox.append(request)
            self._start()
            self._changed.notify_all()
        return request

    def warm_up(self, on_progress: OnProgress = lambda done, total, names: None) -> None:
        """Compiles every program that requests may need, several at a time, and runs one of each kind.

        Call it before the first `submit`.
        """
        programs, self._device.on_progress = self._programs, on_progress
        programs.run(Compile(np.array(self.chunk_sizes, np.int32), np.array(self._row_buckets, np.int32)))
        nothing = self._make_request([0], SamplingParams(), lambda _: None, 0, b"")
        self._placement.prefill(nothing, Span(0, 0, min(self.chunk_sizes)))
        zero, none = np.int32(0), np.zeros(1, np.int32)
        programs.run(Insert(zero, any_row(self.config)))
        programs.run(SavePages(zero, none, zero))
        programs.run(RestorePages(zero, none, zero))
        if self.platform.needs_clean_pages:
            programs.run(ClearPages(np.zeros(self._table_width, np.int32), zero, zero))
        for num_rows in self._row_buckets:
            programs.run(Decode(np.int32(1), np.zeros(self._num_rows, np.bool_), np.int32(num_rows)))
        programs.wait()
        self._is_warm = True

    def stats(self) -> EngineStats:
        """The load now."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=sum(request is not None for request in scheduler.rows),
            num_waiting=len(scheduler.waiting) + len(self._inbox),
            num_pages_used=sum(pool.num_used for pool in scheduler.pools),
            num_pages=sum(pool.num_pages - 1 for pool in scheduler.pools),
            num_cached_pages=sum(pool.num_cached for pool in scheduler.pools),
            num_prompt_tokens=scheduler.num_queried_tokens,
            num_prompt_tokens_cached=scheduler.num_hit_tokens,
            has_failed=self._failure is not None,
            num_compilations=num_compilations() - self._compilations_before,
            ready=self._is_warm and self.health() is None and self._is_accepting,
        )

    def health(self) -> str | None:
        """None if all is well, else what is wrong."""
        if self._failure is not None:
            is_named = isinstance(self._failure, LockstepError)
            return f"the engine has failed: {self._failure if is_named else type(self._failure).__name__}"
        idle_s = time.monotonic() - self._last_progress
        if self._scheduler.has_work and idle_s > self.options.stall_timeout_s:
            return f"no step has finished for {idle_s:.0f} s"
        return None

    def drain(self, timeout_s: float) -> bool:
        """Takes no new requests and waits for those accepted. False if `timeout_s` passes first."""
        with self._changed:
            self._is_accepting = False
            return self._changed.wait_for(lambda: not self._inbox and not self._scheduler.has_work, timeout_s)

    def close(self) -> None:
        """Cancels what runs and ends the thread. May be called twice."""
        with self._changed:
            self._is_accepting = False
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.close)
        if self.group is not None:
            self.group.close()

    def follow(self) -> None:
        """What every process but 0 does: runs process 0's programs until it closes its engine.

        A process that is lost, this one included, is named on stderr, and this one ends with code 1.
        """
        assert self.group is not None
        try:
            follow(self._device.run, CALLS, self.group)
        except Exception as error:
            self.group.fail(error)

    # The engine's thread

    def _make_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: Callable[[TokenOutput], None],
        priority: int,
        cache_scope: str | bytes,
    ) -> EngineRequest:
        prompt = [int(token_id) for token_id in prompt_ids]
        if not prompt:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
            raise RequestError(f"the prompt has token ids outside 0 to {self.config.vocab_size - 1}", "prompt")
        if len(prompt) >= self.max_context:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens; this model's context is {self.max_context}, which must hold at "
                "least one more",
                "prompt",
            )
        params.validate_vocab(self.config.vocab_size)
        room = self.max_context - len(prompt)
        scope = cache_scope.encode("utf-8", "surrogatepass") if isinstance(cache_scope, str) else cache_scope
        return EngineRequest(
            prompt=prompt,
            params=params,
            on_output=on_output,
            budget=room if params.max_tokens is None else min(room, params.max_tokens),
            stop_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else frozenset(self.config.eos_token_ids)),
            priority=priority,
            arrival=0,
            wake=self._wake,
            scope=scope,
            page_keys=self._plan.page_keys(scope, prompt[:-1]),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
        )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="jaxllama-engine", daemon=True)
            atexit.register(self.close)
            self._thread.start()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
        except Exception as error:
            with self._changed:
                self._failure = self._failure or error
            if self.group is not None:
                self.group.fail(error)
        finally:
            self._end_all()

    def _abandon(self, error: LockstepError) -> None:
        """Ends every request, on another thread than the engine's, which may hang in a program that never returns."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        self._end_all()

    def _wait_for_work(self) -> bool:
        with self._changed:
            if not self._scheduler.has_work and not self._in_flight:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._inbox or self._is_closing)
                self._last_progress = time.monotonic()
            while self._inbox:
                self._scheduler.enqueue(self._inbox.popleft())
            return not self._is_closing and self._failure is None

    def _turn(self) -> None:
        """Drops what was cancelled, prefills a little, launches a dispatch, and reads the one before it."""
        for request in [*self._scheduler.waiting, *(r for r in self._scheduler.rows if r is not None)]:
            if request.is_cancelled:
                self._finish(request, "cancelled")
            elif request.budget == 0:
                self._finish(request, "length")
        self._placement.fill_rows()
        launched = self._launch()
        if not self._in_flight:
            # Prefill alone: wait for it, or chunks would pile up on the device while cancellations wait behind them.
            self._programs.wait()
            self._last_progress = time.monotonic()
        while len(self._in_flight) > (1 if launched else 0):
            self._read(self._in_flight.popleft())

    def _launch(self) -> bool:
        max_steps = self._constraints.max_steps(self._scheduler.running, self._choose_steps(), self._steps_in_flight)
        if not max_steps or not self._make_room(max_steps):
            return False
        for request, error in self._constraints.send_masks(self._scheduler.running):
            self._finish(request, "error", error=error)
        running = self._scheduler.running
        if not running or all(self._is_spent(request) for request in running):
            return False
        table = np.zeros_like(self._page_table)
        keep = np.zeros(self._num_rows, np.bool_)
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
        output = self._programs.run(Decode(np.int32(max_steps), keep, np.int32(bucket)))
        output.tokens.copy_to_host_async()
        self._in_flight.append(Dispatch(output, rows, max_steps, time.monotonic()))
        return True

    def _choose_steps(self) -> int:
        """Steps of the next dispatch: what takes about `dispatch_s`, but one while a row is empty and others wait."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        if self._scheduler.prefilling:
            return 1
        left = [r.budget - len(r.generated) - self._steps_in_flight(r) for r in running] if waiting else []
        return max(1, min([MAX_STEPS, round(self.options.dispatch_s / self._step_s), *left]))

    def _steps_in_flight(self, request: EngineRequest) -> int:
        return sum(
            d.max_steps for d in self._in_flight if request.row is not None and d.rows.get(request.row) is request
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
                if self._in_flight:
                    return False
                self._placement.set_aside(self._scheduler.youngest(request.shard))
        return True

    def _read(self, dispatch: Dispatch) -> None:
        num_steps = int(dispatch.output.num_steps)
        tokens = np.asarray(dispatch.output.tokens)
        now = time.monotonic()
        if num_steps:
            took_s = (now - max(dispatch.launched, self._last_progress)) / num_steps
            self._step_s = 0.5 * self._step_s + 0.5 * max(took_s, 1e-4)
            if self.on_steps is not None:
                self.on_steps(dispatch.report(num_steps, took_s))
        self._last_progress = now
        for row, request in dispatch.rows.items():
            if not request.is_finished:
                self._deliver(request, row, tokens[:num_steps, row], dispatch)

    def _deliver(self, request: EngineRequest, row: int, tokens: np.ndarray, dispatch: Dispatch) -> None:
        new: list[int] = []
        entries: list[TokenLogprob] = []
        for step, token in enumerate(tokens.tolist()):
            if token == NOT_FINITE:
                error = NonFiniteLogitsError("the model produced NaN or infinity for this request")
                self._finish(request, "error", tuple(new), tuple(entries), error=error)
                return
            if token < 0:
                break
            new.append(token)
            request.generated.append(token)
            if request.params.logprobs is not None:
                entries.append(dispatch.token_logprob(token, request.params.logprobs, step, row))
            if (reason := advance(request, token)) is not None:
                self._finish(request, "error", tuple(new), tuple(entries), error=reason)
                return
            if token in request.stop_ids:
                self._finish(request, "stop", tuple(new), tuple(entries), stop_token_id=token)
                return
            if len(request.generated) >= request.budget:
                self._finish(request, "length", tuple(new), tuple(entries))
                return
        if new:
            self._tell(request, TokenOutput(tuple(new), tuple(entries)))
            if needs_new_row(request):
                self._placement.activate(request)

    def _finish(
        self,
        request: EngineRequest,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        *,
        stop_token_id: int | None = None,
        error: Exception | None = None,
    ) -> None:
        self._tell(request, TokenOutput(token_ids, logprobs, reason, stop_token_id, error))
        if not self._is_closing and self._failure is None:
            self._placement.forget(request)
        with self._changed:
            unclean = self._scheduler.remove(request, has_failed=reason == "error")
            self._changed.notify_all()
        if not self._is_closing and self._failure is None:
            self._placement.clear(request, unclean)

    def _tell(self, request: EngineRequest, output: TokenOutput) -> None:
        """Calls the request's `on_output`. If that raises, this request ends, and no other is hurt.

        Nothing follows a request's last output, whichever thread gives it.
        """
        with self._telling:
            if request.is_finished:
                return
            request.is_finished = output.finish_reason is not None
            try:
                request.on_output(output)
            except Exception:
                logger.exception("on_output of request %s failed; the request is cancelled", request.id)
                request.is_cancelled = True

    def _end_all(self) -> None:
        """Every request that is left gets its one last output."""
        with self._changed:
            left = [*self._inbox, *self._scheduler.waiting, *(r for r in self._scheduler.rows if r is not None)]
            self._inbox.clear()
            self._in_flight.clear()
        last = TokenOutput(finish_reason="cancelled")
        if self._failure is not None:
            error = EngineStoppedError(f"the engine has failed: {self._failure}")
            error.__cause__ = self._failure
            last = TokenOutput(finish_reason="error", error=error)
        for request in left:
            self._tell(request, last)
        with self._changed:
            for request in left:
                self._scheduler.remove(request)
            self._changed.notify_all()
