"""Structured output: JSON schemas, regular expressions, choices and grammars as masks over the vocabulary.

llguidance does the parsing. Its limits bound the work of compiling and of each step; ours bound what it is given.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self

import llguidance
import numpy as np
from jaxtyping import UInt32

from jaxllama.errors import GrammarError, one_line
from jaxllama.text.encoding.backend import guarded
from jaxllama.text.encoding.specials import Splitter
from jaxllama.text.encoding.tokenizer import Tokenizer

MAX_SCHEMA_CHARS = 65_536
MAX_SCHEMA_DEPTH = 64
MAX_REGEX_CHARS = 8_192
MAX_GRAMMAR_CHARS = 65_536
MAX_CHOICES = 1_000
MAX_CHOICE_CHARS = 1_024
# llguidance speaks of 50,000 units of lexer fuel and 20,000 items a millisecond: about 20 ms to begin, 15 ms a step.
_LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# One space, or a line break and its indentation: enough for every usual layout, and no endless white space.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,40})?"}


@dataclass(frozen=True)
class Structured:
    """What an output must look like; exactly one of the fields is given.

    `json` is a JSON schema (`{"type": "object"}`: any object), `regex` matches the whole output (Rust's syntax, no
    look-around), `choice` lists texts, `grammar` is Lark or GBNF. An output that `max_tokens` cuts off is only the
    beginning of such a text.

    Raises: GrammarError naming the field if it is malformed or too large. `GrammarCompiler.compile` finds the rest.
    """

    json: Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise GrammarError(f"structured output needs one of json, regex, choice and grammar, got {given or 'none'}")
        getattr(self, f"_check_{given[0]}")()

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None)

    def source(self) -> GrammarSource:
        """The grammar of the whole output.

        Raises: GrammarError if GBNF cannot be read.
        """
        return GrammarSource("@content", parts={"content": self._part()})

    def _part(self) -> dict[str, Any]:
        if self.json is not None:
            return json_part(self.json)
        if self.regex is not None:
            grammar = json.loads(llguidance.LLMatcher.grammar_from_regex(self.regex))["grammars"][0]
            return {"lark_grammar": grammar["lark_grammar"]}
        if self.choice is not None:
            return {"lark_grammar": "start: " + " | ".join(map(quote, dict.fromkeys(self.choice)))}
        try:
            return {"lark_grammar": llguidance.gbnf_to_lark.any_to_lark(self.grammar)}  # type: ignore[arg-type]
        except Exception as error:
            raise GrammarError(f"grammar: it is neither Lark nor GBNF: {_first_line(error)}") from None

    def _check_json(self) -> None:
        check_schema(self.json, "json")

    def _check_regex(self) -> None:
        _check_text("regex", self.regex, MAX_REGEX_CHARS)

    def _check_grammar(self) -> None:
        _check_text("grammar", self.grammar, MAX_GRAMMAR_CHARS)

    def _check_choice(self) -> None:
        choice = self.choice
        if isinstance(choice, str) or not isinstance(choice, Sequence) or not 1 <= len(choice) <= MAX_CHOICES:
            raise GrammarError(f"choice must be a list of 1 to {MAX_CHOICES} texts", "choice")
        for text in choice:
            _check_text("choice", text, MAX_CHOICE_CHARS)
        object.__setattr__(self, "choice", tuple(choice))


def check_schema(schema: Any, name: str) -> None:
    """Raises: GrammarError unless `schema` is an object within the bounds on size and depth."""
    if not isinstance(schema, Mapping):
        raise GrammarError(f"{name} must be a JSON schema, an object; got {type(schema).__name__}", name)
    if _depth_exceeds(schema, MAX_SCHEMA_DEPTH):
        raise GrammarError(f"{name}: the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels", name)
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise GrammarError(f"{name}: the schema is not JSON: {_first_line(error)}", name) from None
    if size > MAX_SCHEMA_CHARS:
        raise GrammarError(f"{name}: the schema has {size} characters, at most {MAX_SCHEMA_CHARS} are allowed", name)


def json_part(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A named part of a `GrammarSource`: JSON of this schema."""
    return {"json_schema": {**schema, "x-guidance": _JSON_OPTIONS}}


@dataclass(frozen=True)
class GrammarSource:
    """A grammar before it is compiled: the right side of Lark's `start`, other rules, and grammars named with `@`."""

    start: str
    rules: str = ""
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def after(self, tag: str) -> Self:
        """This grammar after any text that ends with `tag` and at most two newlines."""
        rules = f"before[suffix={quote(tag)}]: /(?s:.*)/\n{self.rules}"
        return type(self)(f"before /\\n{{0,2}}/ ({self.start})", rules, self.parts)

    def to_llguidance(self) -> str:
        """The form that llguidance reads."""
        main = {"name": "main", "lark_grammar": f"start: {self.start}\n{self.rules}"}
        return json.dumps({"grammars": [main, *({"name": name, **part} for name, part in self.parts.items())]})


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Threads may share it; the first use takes about a second.

    `eos_ids` end an output wherever its grammar is complete; special tokens never count as the text they spell.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._splitter = Splitter(tokenizer.specials)
        self._limits = llguidance.LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        self._lock = threading.Lock()
        self._tokens: llguidance.LLTokenizer | None = None

    def literal(self, text: str) -> str:
        """Lark for exactly this text, special tokens that it spells as their ids. Nothing for no text."""
        return " ".join(
            quote(piece) if isinstance(piece, str) else f"<[{piece.id}]>" for piece in self._splitter.split(text)
        )

    def encode(self, text: str) -> list[int]:
        """Ids whose bytes are those of `text`, for `GrammarState.advance`."""
        return self._get_tokens().tokenize_str(text)

    def compile(self, source: GrammarSource, name: str) -> Grammar:
        """The grammar, ready to start.

        Raises: GrammarError, whose param is `name`, if it is malformed, unsatisfiable, not supported or too large.
        """
        if not self._eos_ids:
            raise GrammarError(f"{name}: this model has no end-of-sequence id, which structured output needs", name)
        what = f"{name}: cannot be used"
        make = llguidance.LLMatcher
        matcher = guarded(what, make, self._get_tokens(), source.to_llguidance(), log_level=0, limits=self._limits)
        # Some grammars turn out too large only here.
        guarded(what, matcher.compute_bitmask)
        if matcher.is_error():
            raise GrammarError(f"{what}: {_first_line(matcher.get_error())}", name)
        return Grammar(matcher, self._vocab_size)

    def _get_tokens(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokens is None:
                self._tokens = self._make_tokens()
            return self._tokens

    def _make_tokens(self) -> llguidance.LLTokenizer:
        tokenizer, size = self._tokenizer, self._vocab_size
        specials = {*tokenizer.special_tokens.values(), *self._eos_ids}
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(size)]
        ids = {text: i for i, text in enumerate(tokens) if i not in specials}
        longest = max(map(len, ids))

        def encode(text: bytes | str) -> list[int]:
            data = text if isinstance(text, bytes) else text.encode()
            found = tokenizer.encode(data.decode(errors="replace"), add_bos=False)
            # SentencePiece begins a text with a space that is not there.
            return found if b"".join(tokens[i] for i in found) == data else list(_longest_first(data, ids, longest))

        described = _Described(
            eos_token_id=self._eos_ids[0],
            bos_token_id=None,
            tokens=tokens,
            special_token_ids=sorted(specials),
            encode=encode,
        )
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(described), n_vocab=size, eos_token=self._eos_ids, slices=None
        )


class _Described(SimpleNamespace):
    """A tokenizer as llguidance wants it described: attributes, and a call that encodes."""

    def __call__(self, text: bytes | str) -> list[int]:
        ids: list[int] = self.encode(text)
        return ids


class Grammar:
    """A compiled grammar, from which any number of outputs start."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = num_mask_words(vocab_size)

    def start(self) -> GrammarState:
        """The state of a new output."""
        return GrammarState(self._matcher.deep_copy(), self._num_words)


class GrammarState:
    """Where one output stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    def fork(self) -> GrammarState:
        """A copy that goes its own way."""
        return GrammarState(self._matcher.deep_copy(), self._num_words)

    def mask(self) -> UInt32[np.ndarray, " words"]:
        """The tokens that may come next, bit i % 32 of word i // 32 for token i: a stop id where the output may end.

        Raises: GrammarError if the step takes too much work.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error() or not bits.any():
            raise GrammarError(f"the grammar cannot go on: {_first_line(self._matcher.get_error() or 'no token fits')}")
        return bits[: self._num_words].copy()

    def advance(self, token_id: int) -> None:
        """Takes one token that the mask allowed.

        Raises: GrammarError if it was not, or the step takes too much work.
        """
        if not self._matcher.consume_token(token_id):
            raise GrammarError(f"the grammar cannot go on: {_first_line(self._matcher.get_error())}")


def num_mask_words(vocab_size: int) -> int:
    """Words of 32 bits that have one for each token."""
    return -(-vocab_size // 32)


def quote(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _check_text(name: str, text: Any, max_chars: int) -> None:
    if not isinstance(text, str) or not 1 <= len(text) <= max_chars:
        raise GrammarError(f"{name} must be a text of 1 to {max_chars} characters", name)
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise GrammarError(f"{name} holds a lone surrogate", name)


def _longest_first(data: bytes, ids: Mapping[bytes, int], longest: int) -> Iterator[int]:
    """Tokens whose bytes are `data`; bytes that no token has are left out."""
    at = 0
    while at < len(data):
        length = next((n for n in range(min(longest, len(data) - at), 0, -1) if data[at : at + n] in ids), 0)
        if length:
            yield ids[data[at : at + length]]
        at += max(length, 1)


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not level:
            return False
    return True


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0] if lines else type(error).__name__)
