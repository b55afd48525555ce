"""What one output may say next: when its reasoning must end, and the grammar of its content."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from jaxtyping import UInt32

from jaxllama.errors import GrammarError
from jaxllama.text.encoding.detokenize import IncrementalDecoder
from jaxllama.text.encoding.tokenizer import Tokenizer
from jaxllama.text.reasoning import THINK, ReasoningSplitter, ReasoningTags
from jaxllama.text.structured import Grammar, GrammarCompiler, GrammarSource, GrammarState, num_mask_words

FOREVER = 1 << 40
_MAX_GRAMMARS_KEPT = 64
_MAX_NEWLINES = 2  # between the end of the reasoning and a grammar's content, as R1 writes them


@dataclass(frozen=True)
class ReasoningTokens:
    """A tokenizer's tags of reasoning: their ids where they are single tokens, else None.

    `tags` are their text, `forced` are the ids that end the reasoning, `newlines` how many newlines a token of nothing
    else holds, `blank` all tokens of white space.
    """

    open_id: int | None
    close_id: int | None
    forced: tuple[int, ...]
    newlines: dict[int, int]
    blank: frozenset[int]
    tags: ReasoningTags = THINK

    @classmethod
    def of(cls, tokenizer: Tokenizer, tags: ReasoningTags = THINK) -> ReasoningTokens:
        """Those of `tokenizer`. Walks its vocabulary: keep the result."""
        open_id, close_id = (tokenizer.special_tokens.get(tag) for tag in (tags.open, tags.close))
        if open_id is None or close_id is None:
            return cls(None, None, tuple(tokenizer.encode(tags.close, add_bos=False)), {}, frozenset(), tags)
        texts = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
        newlines = {i: len(text) for i, text in texts.items() if text and not text.strip(b"\n")}
        blank = frozenset(i for i, text in texts.items() if not text.strip())
        return cls(open_id, close_id, (close_id,), newlines, blank, tags)


class OutputConstraint:
    """The rule of one output, token by token.

    `starts_in_reasoning` is `RenderedChat.starts_in_reasoning`. After `thinking_budget` tokens of reasoning the closing
    tag is forced. The grammar is that of the content: with single-token tags it begins after the closing tag; where the
    output does not start in the reasoning, its first token may open it instead. Where the tags are text, `grammar` is
    that of the whole output (`GrammarSource.after`). No stop id comes before `min_tokens` tokens while the grammar can
    go on.

    The engine asks `num_free` before it runs: so many tokens may be sampled before the next must be looked at; at 0
    `mask` says which may come. `halt_id` ends a run of the device early: what follows it is not free.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        grammar: Grammar | None = None,
        tokens: ReasoningTokens | None = None,
        decoder: IncrementalDecoder | None = None,
        starts_in_reasoning: bool | None = None,
        thinking_budget: int | None = None,
        min_tokens: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """`tokens` and, where the tags are text, `decoder` are needed unless `starts_in_reasoning` is None."""
        assert tokens is not None or starts_in_reasoning is None
        self._vocab_size = vocab_size
        self._state: GrammarState | None = grammar.start() if grammar is not None else None
        self._tokens = tokens if starts_in_reasoning is not None else None
        self._min_tokens = min_tokens
        self._stop_ids = list(stop_ids)
        self._num_tokens = 0
        self._budget = FOREVER if thinking_budget is None else thinking_budget
        self._num_forced = 0
        self._num_newlines = _MAX_NEWLINES
        self._in_reasoning = bool(starts_in_reasoning)
        self._may_open = starts_in_reasoning is False
        self._has_ids = self._tokens is not None and self._tokens.close_id is not None
        self._splitter: ReasoningSplitter | None = None
        if self._tokens is not None and not self._has_ids:
            assert decoder is not None
            self._decoder = decoder
            self._splitter = ReasoningSplitter(self._in_reasoning, self._tokens.tags)

    @property
    def halt_id(self) -> int | None:
        """The id after which the device must wait: the closing tag, when a grammar follows it."""
        waits = self._in_reasoning and self._has_ids and self._state is not None and self._min_tokens == 0
        return self._tokens.close_id if waits and self._tokens is not None else None

    @property
    def num_free(self) -> int:
        """How many tokens may come unseen, the next included; 0 if `mask` must be asked for the next."""
        left = FOREVER
        if self._in_reasoning:
            left = max(self._budget, 0)
        elif self._may_open and self._budget < FOREVER:
            left = self._budget + 1
        if self._state is None:
            return left
        if not (self._in_reasoning and self._has_ids):
            return 0
        return left if self.halt_id is not None else min(left, 1)

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """The tokens that may come next, bit i % 32 of word i // 32 for token i.

        Raises: GrammarError if the grammar needs too much work.
        """
        if self._in_reasoning and (self._budget <= 0 or self._num_forced):
            assert self._tokens is not None
            return self._only(self._tokens.forced[self._num_forced])
        assert self._state is not None, "nothing to ask for"
        mask = self._state.mask()
        extra = self._extra_ids()
        for token_id in extra:
            mask[token_id // 32] |= np.uint32(1 << token_id % 32)
        if self._num_tokens < self._min_tokens:
            without = mask.copy()
            for token_id in self._stop_ids:
                without[token_id // 32] &= ~np.uint32(1 << token_id % 32)
            mask = without if without.any() else mask
        return mask

    def advance(self, token_id: int) -> None:
        """Takes the next token.

        Raises: GrammarError if the grammar needs too much work.
        """
        self._num_tokens += 1
        if self._splitter is not None:
            self._follow_text(token_id)
        elif self._has_ids and self._follow_ids(token_id):
            return
        if self._state is not None and token_id not in self._stop_ids:
            self._state.advance(token_id)

    def fork(self) -> Self | None:
        """A copy to look ahead with; None while tags that are text may come, which take decoding."""
        if self._splitter is not None and (self._in_reasoning or self._may_open):
            return None
        ahead = copy.copy(self)
        # Nothing of the reasoning comes any more.
        ahead._splitter = None
        ahead._state = None if self._state is None else self._state.fork()
        return ahead

    def begin(self, ids: Sequence[int]) -> None:
        """Takes tokens that the prompt already has of the content.

        Raises: GrammarError if they do not fit.
        """
        if self._state is not None:
            for token_id in ids:
                self._state.advance(token_id)

    def _extra_ids(self) -> list[int]:
        """Ids that may come besides the grammar's: the opening tag at the start, newlines after the closing one."""
        if self._tokens is None or not self._has_ids:
            return []
        if self._may_open and self._num_tokens == 0 and self._tokens.open_id is not None:
            return [self._tokens.open_id]
        if self._may_open:
            return []
        return [i for i, count in self._tokens.newlines.items() if count <= self._num_newlines]

    def _follow_ids(self, token_id: int) -> bool:
        """Whether this token belongs to the reasoning, its tags, or the newlines after it."""
        assert self._tokens is not None
        if self._in_reasoning:
            self._budget -= 1
            if token_id == self._tokens.close_id:
                self._in_reasoning = False
            return True
        if self._may_open:
            if token_id == self._tokens.open_id and (self._state is None or self._num_tokens == 1):
                self._in_reasoning, self._may_open = True, False
                return True
            # White space may come before the opening tag, but not in a grammar.
            if self._state is not None or token_id not in self._tokens.blank:
                self._may_open = False
                self._num_newlines = 0
            return False
        count = self._tokens.newlines.get(token_id, _MAX_NEWLINES + 1)
        if self._state is not None and count <= self._num_newlines:
            self._num_newlines -= count
            return True
        self._num_newlines = 0
        return False

    def _follow_text(self, token_id: int) -> None:
        assert self._splitter is not None
        assert self._tokens is not None
        was_inside = self._in_reasoning
        if was_inside and self._budget <= 0:
            self._num_forced += 1
        self._splitter.push(self._decoder.push((token_id,)))
        self._in_reasoning = self._splitter.is_inside
        self._may_open = self._splitter.is_undecided
        if was_inside:
            self._budget -= 1
        if self._num_forced == len(self._tokens.forced):
            self._num_forced, self._budget = 0, 0

    def _only(self, token_id: int) -> UInt32[np.ndarray, " words"]:
        mask = np.zeros(num_mask_words(self._vocab_size), np.uint32)
        mask[token_id // 32] = np.uint32(1 << token_id % 32)
        return mask


class ConstraintMaker:
    """Makes the constraints of one model's outputs. Threads may share it."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int], tags: ReasoningTags = THINK
    ) -> None:
        self.tags = tags
        self.compiler = GrammarCompiler(tokenizer, vocab_size, eos_ids)
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()

    @cached_property
    def _tokens(self) -> ReasoningTokens:
        return ReasoningTokens.of(self._tokenizer, self.tags)

    def compile(self, source: GrammarSource, name: str, starts_in_reasoning: bool | None) -> Grammar:
        """The grammar of the content, for `make` with the same `starts_in_reasoning`.

        Raises: GrammarError, whose param is `name`.
        """
        if starts_in_reasoning and self._tokens.close_id is None:
            source = source.after(self.tags.close)
        key = source.to_llguidance()
        with self._lock:
            grammar = self._compiled.pop(key, None)
        if grammar is None:
            grammar = self.compiler.compile(source, name)
        with self._lock:
            self._compiled[key] = grammar
            if len(self._compiled) > _MAX_GRAMMARS_KEPT:
                self._compiled.popitem(last=False)
        return grammar

    def make(
        self,
        grammar: Grammar | None = None,
        *,
        starts_in_reasoning: bool | None = None,
        thinking_budget: int | None = None,
        min_tokens: int = 0,
        begun: str = "",
    ) -> OutputConstraint | None:
        """The constraint of one output, None if nothing constrains it. `begun` is content that the prompt ends with.

        Raises: GrammarError if `begun` does not fit the grammar.
        """
        if starts_in_reasoning is None:
            thinking_budget = None
        if grammar is None and thinking_budget is None:
            return None
        constraint = OutputConstraint(
            vocab_size=self._vocab_size,
            grammar=grammar,
            tokens=None if starts_in_reasoning is None else self._tokens,
            decoder=self._tokenizer.decoder(),
            starts_in_reasoning=starts_in_reasoning,
            thinking_budget=thinking_budget,
            min_tokens=min_tokens,
            stop_ids=self._eos_ids,
        )
        if begun:
            try:
                constraint.begin(self.compiler.encode(begun))
            except GrammarError:
                raise GrammarError(
                    "the message to continue does not begin a text of this grammar", "messages"
                ) from None
        return constraint
