"""One request's choices while the engine runs them: outputs in, text updates out."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from jaxllama import OutputAssembler
from jaxllama_serving.http.events import OutputQueue
from jaxllama_serving.protocol.errors import ApiError, unavailable

if TYPE_CHECKING:
    from jaxllama import Engine, EngineRequest, SamplingParams, TokenLogprob, TokenOutput
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
    """One row's state. `token_ids` are its tokens up to the end, a stop token or a stop string's last included.

    The logprobs leave an ending stop token out: it has no text. Times are `time.monotonic`'s, of the first and the last
    token.
    """

    index: int
    prompt_ids: list[int]
    params: SamplingParams
    assembler: OutputAssembler
    constraint: OutputConstraint | None = None
    row: EngineRequest | None = None
    num_reasoning_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    tool_calls: list[Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    is_reasoning: list[bool] = field(default_factory=list)
    first_token_at: float | None = None
    last_token_at: float | None = None
    _num_told: tuple[int, int] = (0, 0)

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    def advance(self, output: TokenOutput) -> Update | None:
        """Takes one output of the engine; returns None if it changes nothing that a client sees.

        Cancels the row when a stop string ends it before the engine does.
        """
        if output.token_ids:
            self.last_token_at = time.monotonic()
            self.first_token_at = self.first_token_at or self.last_token_at
        deltas = [self._push(*piece) for piece in self._pieces(output) if self.finish_reason is None]
        if self.finish_reason is None and output.finish_reason is not None:
            deltas.append(self._end(output))
        reasoning = "".join(delta.reasoning for delta in deltas)
        content = "".join(delta.content for delta in deltas)
        tool_calls = tuple(call for delta in deltas for call in delta.tool_calls)
        if not reasoning and not content and not tool_calls and self.finish_reason is None:
            return None
        self.reasoning.append(reasoning)
        self.content.append(content)
        self._add_calls(tool_calls)
        return self._update(reasoning, content, tool_calls)

    def _add_calls(self, deltas: Sequence[ToolDelta]) -> None:
        for delta in deltas:
            if delta.name is not None:
                self.tool_calls.append(Call(f"call_{secrets.token_hex(12)}", delta.name))
            self.tool_calls[delta.index].arguments.append(delta.arguments)
        if self.tool_calls and self.finish_reason == "stop" and self.stop_reason is None:
            self.finish_reason = "tool_calls"

    def _update(self, reasoning: str, content: str, tool_calls: tuple[ToolDelta, ...]) -> Update:
        (first_id, first_logprob), self._num_told = self._num_told, (len(self.token_ids), len(self.logprobs))
        told = list(zip(self.logprobs[first_logprob:], self.is_reasoning[first_logprob:], strict=True))
        return Update(
            self.index,
            reasoning,
            content,
            self.finish_reason,
            tool_calls,
            tuple(self.token_ids[first_id:]),
            tuple(entry for entry, is_reasoning in told if not is_reasoning),
            tuple(entry for entry, is_reasoning in told if is_reasoning),
        )

    def _pieces(self, output: TokenOutput) -> list[tuple[Sequence[int], int | None, TokenLogprob | None]]:
        ids, stop_id = output.token_ids, output.stop_token_id
        if not ids:
            return []
        if not self.params.stop and self.params.logprobs is None:
            return [(ids, stop_id, None)]
        # One token at a time: what was decoded past a stop string does not count, and each has its own log-probability.
        entries = output.logprobs or (None,) * len(ids)
        stops = (None,) * (len(ids) - 1) + (stop_id,)
        return [((token_id,), stop, entry) for token_id, stop, entry in zip(ids, stops, entries, strict=True)]

    def _push(self, ids: Sequence[int], stop_token_id: int | None, entry: TokenLogprob | None) -> TextDelta:
        delta = self.assembler.push(ids, stop_token_id=stop_token_id)
        self.token_ids += ids
        if entry is not None and stop_token_id is None:
            self.logprobs.append(entry)
            self.is_reasoning.append(False)
        self._account(delta)
        return delta

    def _end(self, output: TokenOutput) -> TextDelta:
        delta = self.assembler.flush()
        self._account(delta)
        if self.finish_reason is None:
            self.finish_reason = output.finish_reason
            if output.stop_token_id in self.params.stop_token_ids:
                self.stop_reason = output.stop_token_id
        return delta

    def _account(self, delta: TextDelta) -> None:
        self.num_reasoning_tokens += delta.num_reasoning_tokens
        # Tokens that may yet open the reasoning are counted, and marked, once they do.
        if num_marked := min(delta.num_reasoning_tokens, len(self.is_reasoning)):
            self.is_reasoning[-num_marked:] = [True] * num_marked
        if delta.matched_stop is not None:
            self.finish_reason, self.stop_reason = "stop", delta.matched_stop
            if self.row is not None:
                self.row.cancel()


class Generation:
    """All choices of one request. A context manager: leaving it, for whatever reason, frees every row.

    Nothing is shared with requests of another `cache_scope`. `on_overflow` runs when the consumer is more than
    `max_tokens` tokens behind; the rows are cancelled first.
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
    ) -> None:
        self.choices = choices
        self._engine = engine
        self._priority = priority
        self._cache_scope = cache_scope
        self._on_overflow = on_overflow
        self._queue: OutputQueue[tuple[int, TokenOutput] | ApiError] = OutputQueue(
            asyncio.get_running_loop(), _weigh, max_tokens, self._overflow
        )

    def __enter__(self) -> Self:
        for choice in self.choices:
            try:
                choice.row = self._engine.submit(
                    choice.prompt_ids,
                    choice.params,
                    self._receiver(choice.index),
                    priority=self._priority,
                    constraint=choice.constraint,
                    cache_scope=self._cache_scope,
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
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompts' tokens, each prompt counted once, those that were in the cache before this request.

        Choices of one prompt share what the first of them computes; that is no hit.
        """
        first = {id(choice.prompt_ids): choice for choice in reversed(self.choices)}
        return sum((choice.row.num_cached_tokens or 0) for choice in first.values() if choice.row is not None)

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of them that were reasoning."""
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    async def updates(self, timeout_s: float) -> list[Update]:
        """Waits for new text and returns it; an empty list when nothing new is visible, or `timeout_s` passed.

        Raises: the engine's exception for a row that failed, or the ApiError given to `abort`.
        """
        updates = []
        for item in await self._queue.get_all(timeout_s):
            if isinstance(item, ApiError):
                raise item
            index, output = item
            choice = self.choices[index]
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
        for choice in self.choices:
            if choice.row is not None and choice.finish_reason is None:
                choice.row.cancel()


def _weigh(item: tuple[int, TokenOutput] | ApiError) -> int:
    return 0 if isinstance(item, ApiError) else len(item[1].token_ids)
