"""One request's choices while the engine runs them: outputs in, text updates out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from jaxllama import OutputAssembler
from jaxllama_serving.errors import ApiError, unavailable
from jaxllama_serving.prepare import PreparedChat
from jaxllama_serving.stream import OutputQueue

if TYPE_CHECKING:
    from jaxllama import Engine, EngineRequest, Tokenizer, TokenOutput
    from jaxllama.text.output import TextDelta


@dataclass(frozen=True)
class Update:
    """New text of one choice; `finish_reason` is set on its last update."""

    index: int
    reasoning: str
    content: str
    finish_reason: str | None = None


@dataclass
class Choice:
    """One row's state. `num_tokens` counts its tokens up to the end, a stop token or a stop string's last included."""

    index: int
    assembler: OutputAssembler
    stop_token_ids: Sequence[int]
    matches_strings: bool
    row: EngineRequest | None = None
    num_tokens: int = 0
    num_reasoning_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)

    def advance(self, output: TokenOutput) -> Update | None:
        """Takes one output of the engine; returns None if it changes nothing that a client sees.

        Cancels the row when a stop string ends it before the engine does.
        """
        deltas = [self._push(ids, stop_id) for ids, stop_id in self._pieces(output) if self.finish_reason is None]
        if self.finish_reason is None and output.finish_reason is not None:
            deltas.append(self._end(output))
        reasoning = "".join(delta.reasoning for delta in deltas)
        content = "".join(delta.content for delta in deltas)
        if not reasoning and not content and self.finish_reason is None:
            return None
        self.reasoning.append(reasoning)
        self.content.append(content)
        return Update(self.index, reasoning, content, self.finish_reason)

    def _pieces(self, output: TokenOutput) -> list[tuple[Sequence[int], int | None]]:
        ids, stop_id = output.token_ids, output.stop_token_id
        if not ids:
            return []
        if not self.matches_strings:
            return [(ids, stop_id)]
        # One token at a time: the usage must not count tokens that were decoded past a stop string.
        return [((token_id,), None) for token_id in ids[:-1]] + [((ids[-1],), stop_id)]

    def _push(self, ids: Sequence[int], stop_token_id: int | None) -> TextDelta:
        delta = self.assembler.push(ids, stop_token_id=stop_token_id)
        self.num_tokens += len(ids)
        self._account(delta)
        return delta

    def _end(self, output: TokenOutput) -> TextDelta:
        delta = self.assembler.flush()
        self._account(delta)
        if self.finish_reason is None:
            self.finish_reason = output.finish_reason
            if output.stop_token_id in self.stop_token_ids:
                self.stop_reason = output.stop_token_id
        return delta

    def _account(self, delta: TextDelta) -> None:
        self.num_reasoning_tokens += delta.num_reasoning_tokens
        if delta.matched_stop is not None:
            self.finish_reason, self.stop_reason = "stop", delta.matched_stop
            if self.row is not None:
                self.row.cancel()


class Generation:
    """All choices of one request. A context manager: leaving it, for whatever reason, frees every row.

    `on_overflow` runs when the consumer is more than `max_tokens` tokens behind; the rows are cancelled first.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prepared: PreparedChat,
        *,
        stop_in_reasoning: bool,
        max_tokens: int | None,
        on_overflow: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._prepared = prepared
        self._on_overflow = on_overflow
        request = prepared.request
        self.choices = [
            Choice(
                index=i,
                assembler=OutputAssembler(
                    tokenizer,
                    stop=request.stop,
                    include_stop=request.include_stop_str_in_output,
                    starts_in_reasoning=prepared.starts_in_reasoning,
                    stop_in_reasoning=stop_in_reasoning,
                ),
                stop_token_ids=request.stop_token_ids,
                matches_strings=bool(request.stop),
            )
            for i in range(request.n)
        ]
        self._queue: OutputQueue[tuple[int, TokenOutput] | ApiError] = OutputQueue(
            asyncio.get_running_loop(), _weigh, max_tokens, self._overflow
        )

    def __enter__(self) -> Self:
        for choice, params in zip(self.choices, self._prepared.params, strict=True):
            try:
                choice.row = self._engine.submit(self._prepared.prompt_ids, params, self._receiver(choice.index))
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
