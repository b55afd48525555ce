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
from jax.sharding import Mesh

from jaxllama.decode.draft_model import DraftModel
from jaxllama.decode.params import SamplingParams
from jaxllama.decode.state import MAX_STEPS, any_row
from jaxllama.engine.calls import CALLS, Compile, Programs
from jaxllama.engine.compilation import OnProgress, num_compilations, use_compilation_cache
from jaxllama.engine.constraints import Constraints, attach, needs_new_row
from jaxllama.engine.device import Device
from jaxllama.engine.dispatch import Dispatch, Dispatches
from jaxllama.engine.options import EngineOptions, EngineStats, StepReport
from jaxllama.engine.placement import Placement
from jaxllama.engine.scheduling import request as requests
from jaxllama.engine.scheduling.chunks import ChunkPlan, Span
from jaxllama.engine.scheduling.constraint import Constraint
from jaxllama.engine.scheduling.request import EngineRequest, FinishReason, Scoring, TokenOutput
from jaxllama.engine.scheduling.scheduler import Scheduler
from jaxllama.engine.sizes import chunk_places, most_drafts, plan_speculation, size_engine
from jaxllama.errors import EngineStoppedError, LockstepError, QueueFullError, RequestError
from jaxllama.hosts.group import Group
from jaxllama.hosts.lockstep import Leading, check_processes, follow
from jaxllama.hosts.watch import DeviceWatch
from jaxllama.model.config import LlamaConfig
from jaxllama.model.int8 import quantization
from jaxllama.model.params import Params
from jaxllama.model.platforms.self_check import describe_checked
from jaxllama.system.memory import give_back

logger = logging.getLogger("jaxllama.engine")


class Engine:
    """Runs requests together on one model. Start-up is lazy; `warm_up` compiles everything beforehand.

    `submit`, `EngineRequest.cancel`, `stats`, `health`, `drain` and `close` may be called from any thread.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        mesh: Mesh,
        options: EngineOptions,
        group: Group | None = None,
        draft: tuple[LlamaConfig, Params] | None = None,
    ) -> None:
        check_processes(mesh, group)
        use_compilation_cache(options.compilation_cache)
        self._compilations_before = num_compilations()
        self.config = config
        self.options = options
        self.group = group
        self.max_context = min(options.max_context or config.max_position_embeddings, config.max_position_embeddings)
        self.kv_dtype = jnp.dtype(options.kv_dtype or params["norm"].dtype)
        kept = (params["norm"].dtype, self.kv_dtype, quantization(params))
        self.platform = platform = describe_checked(config, mesh, *kept, options.page_size)
        self.sizes = sizes = size_engine(
            max_rows=options.max_rows,
            max_context=self.max_context,
            page_size=options.page_size or platform.page_size,
            chunk_sizes=platform.chunk_sizes if options.chunk_sizes is None else options.chunk_sizes,
            num_shards=platform.num_shards,
            num_pages=options.num_pages,
            min_rows=platform.min_rows,
            speculation=options.speculation,
            max_drafts=most_drafts(options, platform, has_draft=draft is not None),
        )
        platform.kernel.validate(
            page_size=sizes.page_size, num_rows=sizes.rows_per_shard, table_width=sizes.table_width
        )
        self._row_buckets = platform.row_buckets(sizes.num_rows)
        self._places = chunk_places(platform, sizes, params)
        self.draft = None if draft is None else DraftModel.of(*draft, mesh, self.kv_dtype)
        self._speculation = plan_speculation(config, sizes, options, platform, self._row_buckets, self.draft)
        self._shapes = sizes.state_shapes(config, self.kv_dtype, platform.head_layout, self.draft)
        self._watch = DeviceWatch(mesh, options.device_timeout_s, group)
        self._device = Device(config, params, mesh, self._shapes, platform, self._watch, self.draft)
        self._device.shows_compilation = options.show_compilation
        self._programs: Programs = self._device if group is None else Leading(self._device, group)
        skips_padding = platform.has_layer_kernel and (self.draft is None or self.draft.platform.has_layer_kernel)
        lengths = tuple(sorted(sizes.chunk_sizes))
        self._plan = ChunkPlan(lengths, sizes.page_size, platform.programs_agree, skips_padding)
        self._scheduler = Scheduler(
            # Who asks for one row gets one, though the programs have two.
            num_rows=sizes.num_rows if options.max_rows > 1 or sizes.num_shards > 1 else 1,
            num_pages=sizes.num_pages,
            plan=self._plan,
            max_steps=MAX_STEPS,
            num_shards=sizes.num_shards,
            window=config.longest_window if draft is None else None,  # a draft model may see further back
            reach=config.reach,
        )
        self._placement = Placement(
            config,
            self._programs,
            self._scheduler,
            table_width=sizes.table_width,
            needs_clean_pages=platform.needs_clean_pages,
            history_size=sizes.history_size,
            has_draft=draft is not None,
            places=self._places,
        )
        self._dispatches = Dispatches(
            self._programs,
            self._scheduler,
            self._placement,
            Constraints(self._programs, self._shapes.rows.sampling.token_mask.shape, platform.max_verified_tokens),
            table_shape=(sizes.num_rows, sizes.table_width),
            row_buckets=self._row_buckets,
            speculation=self._speculation,
        )
        self._inbox: deque[EngineRequest] = deque()
        self._arrivals = itertools.count()
        self._changed = threading.Condition()
        self._telling = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_accepting, self._is_closing, self._is_warm = True, False, False
        self._failure: Exception | None = None
        self._last_progress = time.monotonic()
        self.on_steps: Callable[[StepReport], None] | None = None
        """Called on the engine's thread after every dispatch; must return at once."""
        if group is not None:
            group.on_failure(self._abandon)

    @property
    def page_size(self) -> int:
        """Tokens of a page of the cache."""
        return self.sizes.page_size

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Into how many tokens prompts are cut, ascending or not (`EngineOptions.chunk_sizes`)."""
        return self.sizes.chunk_sizes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pool, over all devices, the draft model's included."""
        pools = (self._shapes.pool, self._shapes.draft_pool)
        return sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(pools))

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
        prediction: Sequence[int] = (),
    ) -> EngineRequest:
        """Queues a request. `on_output` runs on the engine's thread and must return at once.

        `max_tokens` None or past the context ends the output at the context. What earlier requests of the same
        `cache_scope` began with is not prefilled again (`EngineRequest.num_cached_tokens`); no other's is used.
        `constraint`, of this request alone, says what its tokens may be; `Llama` makes it of `params.structured` and
        `params.thinking_budget`. `prediction` is what the output may resemble: with speculation "auto" drafts are found
        in it too, and nothing else changes.

        Raises: RequestError or ContextLengthError for a prompt or parameters that cannot run, QueueFullError,
        EngineStoppedError.
        """
        request = self._make_request(prompt_ids, params, on_output, priority, cache_scope)
        attach(request, constraint)
        if self.options.speculation == "auto" and prediction:
            requests.check_ids(prediction, self.config.vocab_size, "prediction")
            request.prediction = [int(token_id) for token_id in prediction]
        return self._enqueue(request)

    def submit_scoring(
        self,
        ids: Sequence[int],
        on_output: Callable[[TokenOutput], None],
        *,
        first: int = 1,
        num_top: int = 0,
        priority: int = 0,
        cache_scope: str | bytes = b"",
    ) -> EngineRequest:
        """Queues a request that generates nothing: `TokenOutput.scores` are of the tokens `ids[first:]`, in order.

        Each has the `num_top` (0 to 20) likeliest tokens at its place. What comes before `first - 1` and is in the
        cache, other scorings' included, is not computed again. All else is as for `submit`.

        Raises: as `submit`; RequestError for `first` or `num_top`.
        """
        scoring = Scoring.of(len(ids), first, num_top)
        return self._enqueue(self._make_request(ids, SamplingParams(), on_output, priority, cache_scope, scoring))

    def _enqueue(self, request: EngineRequest) -> EngineRequest:
        if self.group is not None and not self.group.is_leader:
            raise EngineStoppedError("this process follows process 0, which alone takes requests")
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

    def warm_up(self, on_progress: OnProgress | None = None) -> None:
        """Compiles every program that requests may need, several at a time, and runs one of each kind.

        Call it before the first `submit`.
        """
        programs, self._device.on_progress = self._programs, on_progress
        num_drafts = {num_rows: self._speculation.drafts(num_rows) for num_rows in self._row_buckets}
        chunk_sizes = self._plan.program_sizes
        programs.run(Compile.of({size: self._places.num_chunks(size) for size in chunk_sizes}, num_drafts))
        nothing = self._make_request([0], SamplingParams(), lambda _: None, 0, b"")
        scored = self._make_request([0, 0], SamplingParams(), lambda _: None, 0, b"", Scoring(first=1, num_top=0))
        for request in (nothing, scored):
            self._placement.prefill(request, Span(0, 0, min(chunk_sizes)))
        if self.draft is not None:
            self._placement.prefill_draft(nothing, Span(0, 0, min(chunk_sizes)))
        self._placement.run_each()
        for num_rows in self._row_buckets:
            self._dispatches.run_empty(num_rows)
        programs.wait()
        if self._speculation.history_size and (self.platform.programs_agree or self.draft is not None):
            row = any_row(self.config, self._speculation.history_size, min(MAX_STEPS, self.max_context - 1))
            self._dispatches.measure(row, self.platform.max_verified_tokens)
            programs.wait()
        give_back()
        self._is_warm = True

    def update_params(self, params: Params) -> None:
        """Runs with other weights of the same shapes from now on, and finds nothing again that the old ones wrote.

        Raises: RequestError while requests run or wait, and over many processes.
        """
        if self.group is not None:
            raise RequestError("weights of a model that is spread over several processes cannot be changed", "params")
        with self._changed:
            if self._inbox or self._scheduler.has_work or self._dispatches.in_flight:
                raise RequestError("weights cannot be changed while requests run or wait", "params")
            self._device.params = params
            for pool in self._scheduler.pools:
                pool.forget()

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
            device_hangs=self._watch.hang is not None,
            kernel_fault=self.platform.kernel_fault,
            ready=self._is_warm and self.health() is None and self._is_accepting,
        )

    def health(self) -> str | None:
        """None if all is well, else what is wrong."""
        if self._failure is not None:
            is_named = isinstance(self._failure, (LockstepError, EngineStoppedError))
            return f"the engine has failed: {self._failure if is_named else type(self._failure).__name__}"
        if (hang := self._watch.hang) is not None:
            return hang
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
        self._watch.close()
        if self.group is not None:
            self.group.close()

    def give_up(self, reason: str) -> None:
        """Fails every request now and takes no more, as a device hangs (`health`). Of a group all processes end."""
        self._abandon(error := EngineStoppedError(reason))
        if self.group is not None:
            self.group.leave(error)

    def follow(self) -> None:
        """What every process but 0 does: runs process 0's programs until it closes its engine.

        A process that is lost, this one included, is named on stderr, and this one ends with code 1.
        """
        assert self.group is not None
        self._watch.answer_process_0()
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
        scoring: Scoring | None = None,
    ) -> EngineRequest:
        prompt = requests.checked_prompt(
            prompt_ids, self.config.vocab_size, self.max_context, generates=scoring is None
        )
        params.validate_vocab(self.config.vocab_size)
        if params.steering is not None:
            params.steering.check_model(self.config.num_layers, self.config.hidden_size)
        # One that scores generates nothing, and is not done before it begins.
        room = 1 if scoring is not None else self.max_context - len(prompt)
        scope = cache_scope.encode("utf-8", "surrogatepass") if isinstance(cache_scope, str) else cache_scope
        if scoring is not None and not self.platform.programs_agree:
            # Its programs write other bits than those that prefill for decoding.
            scope = self._plan.root(scope) + b"scores"
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
            scoring=scoring,
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

    def _abandon(self, error: LockstepError | EngineStoppedError) -> None:
        """Ends every request, on another thread than the engine's, which may hang in a program that never returns."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()
        self._end_all()

    def _wait_for_work(self) -> bool:
        with self._changed:
            if not self._scheduler.has_work and not self._dispatches.in_flight:
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
        launched = self._dispatches.launch(
            self.options.dispatch_s, lambda request, error: self._finish(request, "error", error=error)
        )
        in_flight = self._dispatches.in_flight
        if not in_flight:
            # Prefill alone: wait for it, or chunks would pile up on the device while cancellations wait behind them.
            self._programs.wait()
            self._last_progress = time.monotonic()
        while len(in_flight) > (1 if launched else 0):
            self._read(in_flight.popleft())
        while self._placement.scored:
            scored = self._placement.scored.popleft()
            if not scored.request.is_finished:
                with self._watch.waiting():
                    output = scored.take()
                self._deliver(scored.request, output)
                self._last_progress = time.monotonic()

    def _read(self, dispatch: Dispatch) -> None:
        with self._watch.waiting():
            num_steps = dispatch.num_steps
        now = time.monotonic()
        if num_steps:
            step_s = (now - max(dispatch.launched, self._last_progress)) / num_steps
            self._dispatches.learn(step_s)
            if self.on_steps is not None:
                self.on_steps(dispatch.report(step_s))
        self._last_progress = now
        for row, request in dispatch.rows.items():
            if not request.is_finished:
                self._deliver(request, dispatch.take(request, row))

    def _deliver(self, request: EngineRequest, output: TokenOutput) -> None:
        if output.finish_reason is not None:
            self._end(request, output)
        elif output.token_ids or output.scores:
            self._tell(request, output)
            if needs_new_row(request):
                self._placement.activate(request)

    def _finish(self, request: EngineRequest, reason: FinishReason, *, error: Exception | None = None) -> None:
        self._end(request, TokenOutput(finish_reason=reason, error=error))

    def _end(self, request: EngineRequest, last: TokenOutput) -> None:
        self._tell(request, last)
        if not self._is_closing and self._failure is None:
            self._placement.forget(request)
        with self._changed:
            unclean = self._scheduler.remove(request, has_failed=last.finish_reason == "error")
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
            self._dispatches.in_flight.clear()
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
