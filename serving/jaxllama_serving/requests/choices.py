"""One request's choices while the engine runs them: outputs in, text updates out."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from jaxllama.text.output import GrowingOutput
from jaxllama_serving.http.events import OutputQueue
from jaxllama_serving.protocol.errors import ApiError, unavailable

if TYPE_CHECKING:
    from jaxllama import Engine, EngineRequest, OutputAssembler, SamplingParams, TokenLogprob, TokenOutput
    from jaxllama.text.constraint import OutputConstraint
    from jaxllama.text.output import TextDelta
    from jaxllama.text.tool_parsing import ToolDelta


@dataclass(frozen=True)
class Update:
    """New text of one choice, and the tokens since the last update; `finish_reason` is set on its last.

    `logprobs` are those of content, `reasoning_logprobs` those of reasoning.
    """

    index: int
    reasoning: str
    content: str
    finish_reason: str | None = None
    tool_calls: tuple[ToolDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass
class Call:
    """A tool call as it grows."""

    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass
class Choice:
    """One row's state. Its log-probabilities leave an ending stop token out, which has no text, unless `tells_stop`.

    Times are `time.monotonic`'s, of the first and the last token.
    """

    index: int
    prompt_ids: list[int]
    params: SamplingParams
    output: GrowingOutput
    constraint: OutputConstraint | None = None
    tells_stop: bool = False
    row: EngineRequest | None = None
    finish_reason: str | None = None
    tool_calls: list[Call] = field(default_factory=list)
    first_token_at: float | None = None
    last_token_at: float | None = None
    _num_told: tuple[int, int] = (0, 0)

    @classmethod
    def begin(
        cls,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        assembler: OutputAssembler,
        constraint: OutputConstraint | None = None,
    ) -> Self:
        """A choice without tokens."""
        output = GrowingOutput(assembler, has_stops=bool(params.stop), stop_token_ids=params.stop_token_ids)
        return cls(index, prompt_ids, params, output, constraint)

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self.output.token_ids)

    def logprobs(self, first: int = 0) -> tuple[list[TokenLogprob], list[TokenLogprob]]:
        """Those of the content's tokens and those of the reasoning's, from the token `first` on."""
        output = self.output
        untold = output.ended_by_token and bool(output.logprobs) and not self.tells_stop
        end = len(output.logprobs) - untold
        told = list(zip(output.logprobs[first:end], output.is_reasoning[first:end], strict=True))
        content = [entry for entry, is_reasoning in told if not is_reasoning]
        return content, [entry for entry, is_reasoning in told if is_reasoning]

    def advance(self, output: TokenOutput) -> Update | None:
        """Takes one output of the engine; returns None if it changes nothing that a client sees.

        Cancels the row when a stop string ends it before the engine does.
        """
        if output.token_ids:
            self.last_token_at = time.monotonic()
            self.first_token_at = self.first_token_at or self.last_token_at
        delta = self.output.add(output.token_ids, output.logprobs, output.finish_reason, output.stop_token_id)
        if delta.matched_stop is not None and self.row is not None:
            self.row.cancel()
        self._add_calls(delta.tool_calls)
        self.finish_reason = self.output.finish_reason
        if self.tool_calls and self.finish_reason == "stop" and self.output.stop_reason is None:
            self.finish_reason = "tool_calls"
        if not delta.reasoning and not delta.content and not delta.tool_calls and self.finish_reason is None:
            return None
        return self._update(delta)

    def _add_calls(self, deltas: Sequence[ToolDelta]) -> None:
        for delta in deltas:
            if delta.name is not None:
                self.tool_calls.append(Call(f"call_{secrets.token_hex(12)}", delta.name))
            self.tool_calls[delta.index].arguments.append(delta.arguments)

    def _update(self, delta: TextDelta) -> Update:
        first_id, first_logprob = self._num_told
        self._num_told = (len(self.output.token_ids), len(self.output.logprobs))
        content, reasoning = self.logprobs(first_logprob)
        return Update(
            self.index,
            delta.reasoning,
            delta.content,
            self.finish_reason,
            delta.tool_calls,
            tuple(self.output.token_ids[first_id:]),
            tuple(content),
            tuple(reasoning),
        )


class Choices:
    """All choices of one request. A context manager: leaving it, for whatever reason, frees every row.

    Nothing is shared with requests of another `cache_scope`. `on_overflow` runs when the consumer is more than
    `max_tokens` tokens behind; the rows are cancelled first. `prediction` is what all of them may resemble.
    """

    def __init__(
        self,
        engine: Engine,
        choices: Sequence[Choice],
        *,
        priority: int,
        cache_scope: bytes,
        max_tokens: int | None,
        on_overflow: Callable[[], None],
        prediction: Sequence[int] = (),
    ) -> None:
        self._prediction = prediction
        self.all = choices
        self._engine = engine
        self._priority = priority
        self._cache_scope = cache_scope
        self._on_overflow = on_overflow
        self._queue: OutputQueue[tuple[int, TokenOutput] | ApiError] = OutputQueue(
            asyncio.get_running_loop(), _weigh, max_tokens, self._overflow
        )

    def __enter__(self) -> Self:
        for choice in self.all:
            try:
                choice.row = self._engine.submit(
                    choice.prompt_ids,
                    choice.params,
                    self._receiver(choice.index),
                    priority=self._priority,
                    constraint=choice.constraint,
                    cache_scope=self._cache_scope,
                    prediction=self._prediction,
                )
            except BaseException:
                self._cancel()
                raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._cancel()

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return all(choice.finish_reason is not None for choice in self.all)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self.all)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompts' tokens, each prompt counted once, those that were in the cache before this request.

        Choices of one prompt share what the first of them computes; that is no hit.
        """
        first = {id(choice.prompt_ids): choice for choice in reversed(self.all)}
        return sum((choice.row.num_cached_tokens or 0) for choice in first.values() if choice.row is not None)

    @property
    def num_accepted_tokens(self) -> int:
        """Those that came without a step of their own."""
        return sum(choice.row.num_accepted for choice in self.all if choice.row is not None)

    @property
    def num_predicted_tokens(self) -> tuple[int, int]:
        """Of the prediction's tokens, once for each choice: how many saved a step, and the others."""
        rows = [choice.row for choice in self.all if choice.row is not None and choice.row.prediction]
        accepted = sum(row.num_predicted for row in rows)
        return accepted, max(0, sum(len(row.prediction) for row in rows) - accepted)

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of them that were reasoning."""
        return sum(choice.output.num_reasoning_tokens for choice in self.all)

    async def updates(self, timeout_s: float) -> list[Update]:
        """Waits for new text and returns it; an empty list when nothing new is visible, or `timeout_s` passed.

        Raises: the engine's exception for a row that failed, or the ApiError given to `abort`.
        """
        updates = []
        for item in await self._queue.get_all(timeout_s):
            if isinstance(item, ApiError):
                raise item
            index, output = item
            choice = self.all[index]
            if choice.finish_reason is not None:
                continue
            if output.finish_reason == "error":
                raise output.error or RuntimeError("a row failed without a reason")
            if output.finish_reason == "cancelled":
                raise unavailable("The server stopped this request.")
            update = choice.advance(output)
            if update is not None:
                updates.append(update)
        return updates

    def abort(self, error: ApiError) -> None:
        """Ends the request with `error`; on the event loop's thread."""
        self._queue.put(error)

    def _receiver(self, index: int) -> Callable[[Any], None]:
        return lambda output: self._queue.put_threadsafe((index, output))

    def _overflow(self) -> None:
        self._cancel()
        self._on_overflow()

    def _cancel(self) -> None:
        for choice in self.all:
            if choice.row is not None and choice.finish_reason is None:
                choice.row.cancel()


def _weigh(item: tuple[int, TokenOutput] | ApiError) -> int:
    return 0 if isinstance(item, ApiError) else len(item[1].token_ids)
