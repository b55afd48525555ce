"""From a request's output tokens to its text: decoding, reasoning, stop strings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllama.text.encoding.tokenizer import Tokenizer
from jaxllama.text.reasoning import THINK, Part, ReasoningSplitter, ReasoningTags
from jaxllama.text.stops import StopMatcher
from jaxllama.text.tool_parsing import ToolDelta, ToolParser

PROMPT_TAIL = 16
"""Tokens of the prompt that its continuation is decoded after: a character or a space may begin there."""


@dataclass(frozen=True)
class TextDelta:
    """What a few tokens add to the output. `matched_stop` is the stop string that ends it here, if one does."""

    content: str = ""
    reasoning: str = ""
    matched_stop: str | None = None
    num_reasoning_tokens: int = 0
    tool_calls: tuple[ToolDelta, ...] = ()


class OutputAssembler:
    """Turns the tokens of one output into content and reasoning, as they come.

    `starts_in_reasoning` is `RenderedChat.starts_in_reasoning`: None leaves the tags in the content. Where the tags
    (`reasoning_tags`, those of `ChatTemplate`) are single tokens only those count, and a reply may spell them; else
    the text of the tags counts. `stop` ends the content, with `stop_in_reasoning` the reasoning too.
    `num_reasoning_tokens` counts the tokens of the reasoning and its tags.

    Special tokens never show (see `Tokenizer.decode`). The deltas joined are the same however the tokens are pushed.
    After `prompt_tail`, the last ids of the prompt, the text continues the prompt's (see `Tokenizer.decoder`); with
    `continues` the reasoning does too, and keeps its first newlines.

    `tools` finds calls in the content: they are no text, and stop strings do not act on them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        starts_in_reasoning: bool | None = None,
        reasoning_tags: ReasoningTags = THINK,
        stop_in_reasoning: bool = False,
        prompt_tail: Sequence[int] = (),
        continues: bool = False,
        tools: ToolParser | None = None,
    ) -> None:
        self._decoder = tokenizer.decoder(prompt_tail=prompt_tail, shown=tools.marks if tools is not None else ())
        known = tokenizer.special_tokens
        ids = (known.get(reasoning_tags.open), known.get(reasoning_tags.close))
        self._open_id, self._close_id = ids if None not in ids else (None, None)
        self._splitter = None
        if starts_in_reasoning is not None:
            self._splitter = ReasoningSplitter(
                starts_in_reasoning, reasoning_tags, tags_in_text=self._open_id is None, continues=continues
            )
        self._tools = tools
        self._content_stops = StopMatcher(stop, include_stop)
        self._reasoning_stops = StopMatcher(stop if stop_in_reasoning else (), include_stop)
        self._include_stop = include_stop
        self._num_undecided = 0
        self._clear()
        self._matched: str | None = None
        self._is_told = False

    def push(self, token_ids: Sequence[int], *, stop_token_id: int | None = None) -> TextDelta:
        """Adds tokens. `stop_token_id` says that the last is a stop token: it has no text, unless stops are included.

        After a stop string has matched, which one delta tells, deltas are empty.
        """
        shown = token_ids if stop_token_id is None or self._include_stop else token_ids[:-1]
        for token_id in shown:
            if self._matched is not None:
                break
            self._push_one(token_id)
        return self._take()

    def flush(self) -> TextDelta:
        """The end of the output: releases what was held back. May still find a stop string that was undecided."""
        if self._matched is None:
            self._add_text(self._decoder.flush())
            if self._splitter is not None:
                self._add_parts(self._splitter.flush())
            if self._tools is not None:
                self._add_tool_parts(self._tools.flush())
            for stops in (self._reasoning_stops, self._content_stops):
                self._flush_stops(stops)
        return self._take()

    def _push_one(self, token_id: int) -> None:
        if self._splitter is None:
            self._add_text(self._decoder.push((token_id,)))
            return
        was_inside = self._splitter.is_inside
        if self._open_id is not None and token_id in (self._open_id, self._close_id):
            self._add_text(self._decoder.flush())
            self._add_parts(self._splitter.open_tag() if token_id == self._open_id else self._splitter.close_tag())
        else:
            self._add_text(self._decoder.push((token_id,)))
        self._count(was_inside)

    def _count(self, was_inside: bool) -> None:
        """Counts this token as reasoning; tokens that may yet open it are counted once they do."""
        assert self._splitter is not None
        if was_inside:
            self._num_reasoning_tokens += 1
        elif self._splitter.is_undecided:
            self._num_undecided += 1
        else:
            self._num_reasoning_tokens += self._num_undecided + 1 if self._splitter.is_inside else 0
            self._num_undecided = 0

    def _add_text(self, text: str) -> None:
        if self._splitter is None:
            self._add_parts([("content", text)])
        else:
            self._add_parts(self._splitter.push(text))

    def _add_parts(self, parts: Sequence[Part]) -> None:
        for kind, text in parts:
            if self._matched is not None:
                return
            # A stop string does not reach across the other kind of text.
            other = self._content_stops if kind == "reasoning" else self._reasoning_stops
            self._flush_stops(other)
            if kind == "content" and self._tools is not None:
                self._add_tool_parts(self._tools.push(text))
            else:
                self._add_stopped(self._reasoning_stops if kind == "reasoning" else self._content_stops, text)

    def _add_tool_parts(self, parts: Sequence[str | ToolDelta]) -> None:
        for part in parts:
            if isinstance(part, str):
                self._add_stopped(self._content_stops, part)
            elif self._matched is None:
                self._flush_stops(self._content_stops)
                self._tool_calls += [part] if self._matched is None else []

    def _add_stopped(self, stops: StopMatcher, text: str) -> None:
        if self._matched is None:
            emitted, self._matched = stops.push(text)
            self._emit(stops, emitted)

    def _flush_stops(self, stops: StopMatcher) -> None:
        if self._matched is None:
            self._emit(stops, stops.flush())
            self._matched = stops.matched

    def _emit(self, stops: StopMatcher, text: str) -> None:
        if stops is self._content_stops:
            self._content += text
        else:
            self._reasoning += text

    def _clear(self) -> None:
        self._content = self._reasoning = ""
        self._tool_calls: list[ToolDelta] = []
        self._num_reasoning_tokens = 0

    def _take(self) -> TextDelta:
        matched = None if self._is_told else self._matched
        self._is_told = self._matched is not None
        calls = tuple(self._tool_calls)
        delta = TextDelta(self._content, self._reasoning, matched, self._num_reasoning_tokens, calls)
        self._clear()
        return delta


@dataclass
class GrowingOutput:
    """One output as it grows: the engine's tokens become text, up to the stop string or the token that ends them.

    `token_ids` are its tokens up to the end, a stop token or a stop string's last included. `logprobs` has one entry a
    token where the engine gives any, and `is_reasoning` says which of them are of the reasoning. `assembler` None: a
    model without tokenizer, whose output has no text. `ended_by_token`: the last token is a stop token.
    """

    assembler: OutputAssembler | None
    has_stops: bool = False
    stop_token_ids: Collection[int] = ()
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    is_reasoning: list[bool] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    num_reasoning_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    ended_by_token: bool = False

    def add(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Any] = (),
        finish_reason: str | None = None,
        stop_token_id: int | None = None,
    ) -> TextDelta:
        """Takes in what the engine produced (`TokenOutput`); nothing once the output has ended.

        `matched_stop` of the delta says that a stop string ended the output here, maybe before the engine does.
        """
        deltas: list[TextDelta] = []
        for piece, is_stop, entries in self._pieces(token_ids, logprobs, stop_token_id):
            if self.finish_reason is None:
                self.token_ids += piece
                self.logprobs += entries
                self.is_reasoning += [False] * len(entries)
                self.ended_by_token = is_stop
                deltas.append(self._push(piece, stop_token_id if is_stop else None))
        if self.finish_reason is None and finish_reason is not None:
            deltas.append(self._flush())
            if self.finish_reason is None:
                self.finish_reason = finish_reason
                self.stop_reason = stop_token_id if stop_token_id in self.stop_token_ids else None
        delta = TextDelta(
            "".join(delta.content for delta in deltas),
            "".join(delta.reasoning for delta in deltas),
            next((delta.matched_stop for delta in deltas if delta.matched_stop is not None), None),
            sum(delta.num_reasoning_tokens for delta in deltas),
            tuple(call for delta in deltas for call in delta.tool_calls),
        )
        self.reasoning.append(delta.reasoning)
        self.content.append(delta.content)
        return delta

    def _pieces(
        self, ids: Sequence[int], logprobs: Sequence[Any], stop_token_id: int | None
    ) -> list[tuple[Sequence[int], bool, Sequence[Any]]]:
        if not ids:
            return []
        if not self.has_stops and not logprobs:
            return [(ids, stop_token_id is not None, ())]
        # One token at a time: what was decoded past a stop string does not count, and each has its own log-probability.
        last = len(ids) - 1
        return [((ids[i],), stop_token_id is not None and i == last, logprobs[i : i + 1]) for i in range(len(ids))]

    def _push(self, ids: Sequence[int], stop_token_id: int | None) -> TextDelta:
        if self.assembler is None:
            return TextDelta()
        return self._account(self.assembler.push(ids, stop_token_id=stop_token_id))

    def _flush(self) -> TextDelta:
        return TextDelta() if self.assembler is None else self._account(self.assembler.flush())

    def _account(self, delta: TextDelta) -> TextDelta:
        self.num_reasoning_tokens += delta.num_reasoning_tokens
        # Tokens that may yet open the reasoning are counted, and marked, once they do.
        if num_marked := min(delta.num_reasoning_tokens, len(self.is_reasoning)):
            self.is_reasoning[-num_marked:] = [True] * num_marked
        if delta.matched_stop is not None:
            self.finish_reason, self.stop_reason = "stop", delta.matched_stop
        return delta
