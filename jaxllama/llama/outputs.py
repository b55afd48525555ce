"""What a request has come to: results, how one output grows, and any number of them run side by side."""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from jaxllama.decode.params import SamplingParams
from jaxllama.engine.engine import Engine
from jaxllama.engine.scheduling.request import EngineRequest, FinishReason, TokenLogprob, TokenOutput
from jaxllama.errors import QueueFullError, RequestError
from jaxllama.system.progress import Advance
from jaxllama.text.constraint import ConstraintMaker, OutputConstraint
from jaxllama.text.encoding.tokenizer import Tokenizer
from jaxllama.text.output import PROMPT_TAIL, GrowingOutput, OutputAssembler
from jaxllama.text.reasoning import THINK, ReasoningTags
from jaxllama.text.structured import Grammar

_QUEUE_RETRY_S = 0.05

type OnOutput = Callable[[TokenOutput], None]


@dataclass(frozen=True)
class Completion:
    """A finished output.

    `token_ids` include the stop token, `text` does not. `logprobs`, if asked for, are one a token.
    `reasoning` is what a reasoning model thinks before its answer (`chat` alone separates it). `stop_reason` is the
    string of `stop` or the id of `stop_token_ids` that ended it, None at the model's own end; `seed` repeats it.
    `num_accepted` of the tokens came without a step of their own (speculation).
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    reasoning: str = ""
    stop_reason: str | int | None = None
    seed: int = 0
    num_accepted: int = 0


@dataclass(frozen=True)
class CompletionDelta:
    """The next piece of an output: all `text` joined is `Completion.text`. The last has a `finish_reason`."""

    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


class Model(Protocol):
    """What an output needs of its `Llama`."""

    engine: Engine
    tokenizer: Tokenizer | None

    @property
    def constraints(self) -> ConstraintMaker:
        """Makes what holds outputs to grammars and thinking budgets."""


class Running(Protocol):
    """A request, before and while it runs."""

    def start(self, on_output: OnOutput) -> None:
        """Submits it. Raises: QueueFullError, or what is wrong with it."""

    def add(self, output: TokenOutput) -> object:
        """Takes in what the engine produced. Raises: the engine's error, if that is how it ended."""

    def cancel(self) -> None:
        """Ends it if it still runs."""


def run_all(engine: Engine, requests: Sequence[Running], advance: Advance) -> None:
    """Runs all of `requests`; none is left running, also where one fails.

    Keeps twice as many in the engine as it has rows: enough to fill every row that becomes free.
    """
    inbox: queue.SimpleQueue[tuple[Running, TokenOutput]] = queue.SimpleQueue()
    not_started, num_running = deque(requests), 0
    most = 2 * engine.options.max_rows

    def receiver(request: Running) -> OnOutput:
        return lambda output: inbox.put((request, output))

    try:
        while not_started or num_running:
            with contextlib.suppress(QueueFullError):
                while not_started and num_running < most:
                    not_started[0].start(receiver(not_started[0]))
                    not_started.popleft()
                    num_running += 1
            has_ended = False
            while num_running and not has_ended:
                request, output = inbox.get()
                request.add(output)
                has_ended = output.finish_reason is not None
                advance(items=has_ended, tokens=len(output.token_ids) + len(output.scores))
            num_running -= has_ended
            if not num_running and not_started:
                # Others may have filled the queue; then no output of ours tells when there is room again.
                time.sleep(_QUEUE_RETRY_S)
    finally:
        for request in requests:
            request.cancel()


def outputs_of(request: Running) -> Generator[TokenOutput]:
    """Runs one request and yields what the engine produces, up to its end. Closing the iterator cancels it."""
    inbox: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    request.start(inbox.put)
    try:
        while True:
            output = inbox.get()
            yield output
            if output.finish_reason is not None:
                return
    finally:
        request.cancel()


class Output:
    """One output: its request, what constrains it, and how it grows."""

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        params: SamplingParams,
        *,
        is_chat: bool = False,
        starts_in_reasoning: bool | None = None,
        reasoning_tags: ReasoningTags = THINK,
        prediction: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._prompt = prompt
        self._params = params
        self._prediction = prediction
        self._request: EngineRequest | None = None
        assembler = None
        if model.tokenizer is not None:
            assembler = OutputAssembler(
                model.tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                starts_in_reasoning=starts_in_reasoning,
                reasoning_tags=reasoning_tags,
                prompt_tail=() if is_chat else prompt[-PROMPT_TAIL:],
            )
        elif params.stop:
            raise RequestError("this checkpoint has no tokenizer: stop strings cannot be found", "stop")
        self._starts_in_reasoning = starts_in_reasoning
        self._grammar = self._compile()
        self._grown = GrowingOutput(assembler, has_stops=bool(params.stop), stop_token_ids=params.stop_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self._grown.finish_reason is not None

    def start(self, on_output: OnOutput) -> None:
        """Submits the request."""
        self._request = self._model.engine.submit(
            self._prompt,
            self._params,
            on_output,
            constraint=self._make_constraint(),
            prediction=self._prediction,
        )

    def _compile(self) -> Grammar | None:
        params, starts = self._params, self._starts_in_reasoning
        if params.thinking_budget is not None and starts is None:
            raise RequestError(
                "thinking_budget bounds the reasoning in `chat` with a model that reasons; here there is none to bound",
                "thinking_budget",
            )
        if params.structured is None:
            return None
        return self._model.constraints.compile(params.structured.source(), params.structured.kind, starts)

    def _make_constraint(self) -> OutputConstraint | None:
        params = self._params
        if self._grammar is None and params.thinking_budget is None:
            return None
        return self._model.constraints.make(
            self._grammar,
            starts_in_reasoning=self._starts_in_reasoning,
            thinking_budget=params.thinking_budget,
            min_tokens=params.min_tokens,
        )

    def cancel(self) -> None:
        """Ends the request if it still runs."""
        if self._request is not None:
            self._request.cancel()

    def add(self, output: TokenOutput) -> CompletionDelta:
        """Takes in what the engine produced. Tokens after a stop string are dropped.

        Raises: the engine's error, if that is how the request ended.
        """
        if output.error is not None:
            raise output.error
        grown = self._grown
        if self.is_finished:
            return CompletionDelta("", "", (), (), None)
        num_ids, num_logprobs = len(grown.token_ids), len(grown.logprobs)
        delta = grown.add(output.token_ids, output.logprobs, output.finish_reason, output.stop_token_id)
        if delta.matched_stop is not None:
            self.cancel()
        ids, logprobs = tuple(grown.token_ids[num_ids:]), tuple(grown.logprobs[num_logprobs:])
        return CompletionDelta(delta.content, delta.reasoning, ids, logprobs, self._finish_reason)

    @property
    def _finish_reason(self) -> FinishReason | None:
        # The engine's own, or "stop".
        return cast("FinishReason | None", self._grown.finish_reason)

    def completion(self) -> Completion:
        """The whole output, once finished."""
        assert self._finish_reason is not None
        assert self._request is not None
        grown = self._grown
        return Completion(
            text="".join(grown.content),
            token_ids=tuple(grown.token_ids),
            logprobs=tuple(grown.logprobs) if self._params.logprobs is not None else None,
            finish_reason=self._finish_reason,
            prompt_token_ids=tuple(self._prompt),
            reasoning="".join(grown.reasoning),
            stop_reason=grown.stop_reason,
            seed=self._request.seed,
            num_accepted=self._request.num_accepted,
        )
