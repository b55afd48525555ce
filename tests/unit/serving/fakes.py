"""A model that says what a test scripts: the exact interface the server uses, with neither jax nor weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from jaxllama.decode.params import SamplingParams
from jaxllama.engine.options import EngineStats
from jaxllama.errors import ChatTemplateError, ContextLengthError, EngineStoppedError, QueueFullError
from jaxllama.text.encoding.detokenize import ByteDecoder
from jaxllama.text.messages import for_template, normalized
from jaxllama.text.reasoning import THINK as THINK_TAGS
from jaxllama.text.reasoning import ReasoningTags
from jaxllama.text.tools import ToolFormat, choose_format

EOS = 0
THINK, END_THINK = 1, 2
BOS, PROMPT = 3, 5
FIRST_WORD = 10


@dataclass(frozen=True)
class FakeOutput:
    """`TokenOutput`, field for field."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Any, ...] = ()
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class FakeLogprob:
    """`TokenLogprob` or `PromptLogprob`, field for field."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 1


class FakeTokenizer:
    """Every distinct piece of the script is one token; a prompt has one token for each character."""

    bos_token_id = None
    eos_token_id = EOS
    vocab_size = 1000
    named_tokens: Mapping[str, str] = MappingProxyType({"eos_token": "<eos>"})

    def __init__(self, *, tags: bool = False) -> None:
        self.special_tokens = {"<eos>": EOS, **({"<think>": THINK, "</think>": END_THINK} if tags else {})}
        self._pieces: list[bytes] = []

    def ids_of(self, pieces: Sequence[str | bytes | int]) -> list[int]:
        """Returns the ids of the pieces, adding those that are new; an int stands for itself."""
        return [piece if isinstance(piece, int) else self._id_of(piece) for piece in pieces]

    def _id_of(self, piece: str | bytes) -> int:
        data = piece.encode() if isinstance(piece, str) else piece
        if data not in self._pieces:
            self._pieces.append(data)
        return FIRST_WORD + self._pieces.index(data)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < FIRST_WORD:
            return b"x" if token_id == PROMPT else b""
        return self._pieces[token_id - FIRST_WORD] if token_id - FIRST_WORD < len(self._pieces) else b""

    def decoder(
        self, *, skip_special: bool = True, prompt_tail: Sequence[int] = (), shown: Sequence[str] = ()
    ) -> ByteDecoder:
        return ByteDecoder(self.token_bytes, prompt_tail=prompt_tail)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """One token a character, and one before all unless `add_bos` is false."""
        return [*([] if add_bos is False else [BOS]), *([PROMPT] * len(text))]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def encode_rendered(self, rendered: Any) -> list[int]:
        return [PROMPT] * len(rendered.text)


@dataclass
class FakeTemplate:
    """Renders role and content on a line each; remembers what it was given."""

    starts_in_reasoning: bool | None = None
    seen: list[list[dict[str, Any]]] = field(default_factory=list)
    delay_s: float = 0.0

    source: str = "<|im_start|>"
    variables: frozenset[str] = frozenset()
    own_variables: frozenset[str] = frozenset({"messages", "tools", "bos_token"})
    reasoning_tags: ReasoningTags = THINK_TAGS

    @property
    def has_reasoning(self) -> bool:
        return self.starts_in_reasoning is not None

    @property
    def tool_format(self) -> ToolFormat:
        return choose_format(self.source)

    def variant(self, *, with_tools: bool) -> FakeTemplate:
        return self

    def render(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[Any] = (), tool_format: Any, **options: Any
    ) -> Any:
        messages = for_template(
            normalized(messages), tools, tool_format, self.variables | {"tool_calls"}, self.variables
        )
        self.seen.append(messages)
        self.options = {**options, "tools": [tool.definition for tool in tools]}
        time.sleep(self.delay_s)
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if "refuse me" in text:
            raise ChatTemplateError("The chat template refuses these messages: roles must alternate")
        return SimpleNamespace(text=text, starts_in_reasoning=self.starts_in_reasoning, continued="")


class FakeRequest:
    """One row, played by a thread of its own."""

    def __init__(
        self,
        engine: FakeEngine,
        params: SamplingParams,
        on_output: Callable[[Any], None],
        index: int,
        prediction: list[int],
    ) -> None:
        self.prediction, self.num_predicted = prediction, len(prediction) // 2
        self.num_accepted = self.num_predicted
        self.id, self.seed, self.index = f"row-{index}", params.seed, index
        self.params, self._engine, self._on_output = params, engine, on_output
        self.cancelled = threading.Event()
        self.ended = threading.Event()
        self.num_sent = 0
        self.queued_s, self.num_cached_tokens = 0.001, engine.num_cached_tokens and engine.num_cached_tokens + index

    def cancel(self) -> None:
        self.cancelled.set()

    def play(self) -> None:
        engine = self._engine
        try:
            self._on_output(self._play(engine.script_of(self)))
        finally:
            self.ended.set()

    def _output(self, ids: tuple[int, ...], **fields: Any) -> FakeOutput:
        entries = () if self.params.logprobs is None else tuple(self._engine.logprob(i, self) for i in ids)
        return FakeOutput(ids, entries, **fields)

    def _play(self, script: list[int]) -> FakeOutput:
        engine, budget = self._engine, self.params.max_tokens
        self.cancelled.wait(engine.first_delay_s)
        while True:
            if self.cancelled.is_set():
                return FakeOutput(finish_reason="cancelled")
            if engine.fail_after is not None and self.num_sent >= engine.fail_after:
                return FakeOutput(finish_reason="error", error=engine.failure)
            if budget is not None and self.num_sent >= budget:
                return FakeOutput(finish_reason="length")
            batch = tuple(script[self.num_sent : self.num_sent + engine.batch])
            if budget is not None:
                batch = batch[: budget - self.num_sent]
            self.num_sent += len(batch)
            stops = {EOS, *self.params.stop_token_ids} if not self.params.ignore_eos else set()
            for n, token_id in enumerate(batch):
                if token_id in stops:
                    return self._output(batch[: n + 1], finish_reason="stop", stop_token_id=token_id)
            if self.num_sent >= len(script) and not engine.repeats:
                return self._output(batch, finish_reason="length")
            if self.num_sent >= len(script):
                script = script * 2
            self._on_output(self._output(batch))
            self.cancelled.wait(engine.delay_s)


@dataclass
class FakeEngine:
    """Plays `script` (or one of `scripts`, by row) to every request, `batch` tokens at a time."""

    script: list[int] = field(default_factory=list)
    scripts: list[list[int]] | None = None
    batch: int = 1
    delay_s: float = 0.0
    first_delay_s: float = 0.0
    repeats: bool = False
    fail_after: int | None = None
    failure: Exception | None = None
    max_queue: int | None = None
    max_context: int = 4096
    num_cached_tokens: int = 0
    unhealthy: str | None = None
    stopped: bool = False
    rows: list[FakeRequest] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    scopes: list[bytes] = field(default_factory=list)
    predictions: list[list[int]] = field(default_factory=list)
    logprobs: dict[int, float] = field(default_factory=dict)
    failed: bool = False
    hangs: bool = False
    on_steps: Any = None

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: Callable[[Any], None],
        *,
        priority: int = 0,
        constraint: Any = None,
        cache_scope: bytes = b"",
        prediction: Sequence[int] = (),
    ) -> FakeRequest:
        if self.stopped:
            raise EngineStoppedError("the engine has stopped")
        if len(prompt_ids) > self.max_context:
            raise ContextLengthError(f"the prompt has {len(prompt_ids)} tokens", "prompt")
        if self.max_queue is not None and self.num_running >= self.max_queue:
            raise QueueFullError("256 requests wait already")
        row = FakeRequest(self, params, on_output, len(self.rows), list(prediction))
        self.rows.append(row)
        self.prompts.append(list(prompt_ids))
        self.priorities.append(priority)
        self.scopes.append(cache_scope)
        self.predictions.append(list(prediction))
        threading.Thread(target=row.play, daemon=True).start()
        return row

    def script_of(self, row: FakeRequest) -> list[int]:
        return self.scripts[row.index % len(self.scripts)] if self.scripts else self.script

    def logprob(self, token_id: int, row: FakeRequest) -> FakeLogprob:
        """Of a token: what `logprobs` says, else minus its id; rows differ a little. Token 20 - i is i-th likeliest."""
        value = self.logprobs.get(token_id, -float(token_id)) - row.index / 8
        top = tuple((20 - i, -float(i + 1)) for i in range(row.params.logprobs or 0))
        return FakeLogprob(token_id, value, top)

    @property
    def num_running(self) -> int:
        return sum(not row.ended.is_set() for row in self.rows)

    def health(self) -> str | None:
        return self.unhealthy

    def stats(self) -> EngineStats:
        running = self.num_running
        return EngineStats(
            num_running=running,
            num_waiting=0,
            num_pages_used=running,
            num_pages=64,
            num_cached_pages=2,
            num_prompt_tokens=sum(map(len, self.prompts)),
            num_prompt_tokens_cached=self.num_cached_tokens,
            ready=self.unhealthy is None,
            has_failed=self.failed,
            device_hangs=self.hangs,
            num_compilations=7,
        )

    def give_up(self, reason: str) -> None:
        self.failure, self.fail_after = EngineStoppedError(reason), 0

    def drain(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.stopped = True
        for row in self.rows:
            row.cancel()


class FakeLlama:
    """`Llama` around a `FakeEngine` that says `pieces`, then stops at the end-of-sequence token."""

    def __init__(
        self,
        pieces: Sequence[str | bytes | int] = ("Hello", " ", "world", "!"),
        *,
        starts_in_reasoning: bool | None = None,
        generation_config: dict[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        self.tokenizer = FakeTokenizer(tags=starts_in_reasoning is not None)
        ends = [] if engine.get("repeats") else [EOS]
        self.engine = FakeEngine(script=[*self.tokenizer.ids_of(pieces), *ends], **engine)
        self.chat_template: FakeTemplate | None = FakeTemplate(starts_in_reasoning)
        self.max_context = self.engine.max_context
        self.config = SimpleNamespace(vocab_size=self.tokenizer.vocab_size)
        self.checkpoint = SimpleNamespace(
            path=Path("/nowhere/fake"), generation_config=generation_config or {}, manifest={"files": {}}
        )
        self.closed = False
        self.num_scored, self.score_delay_s = 0, 0.0

    def set_scripts(self, *scripts: Sequence[str | bytes | int]) -> None:
        """Gives each row its own pieces, in the order of submission."""
        self.engine.scripts = [[*self.tokenizer.ids_of(pieces), EOS] for pieces in scripts]

    def memory_traffic(self) -> Any:
        """A device reads 1 GB a step, and has a bandwidth only if the server is told."""
        return SimpleNamespace(bytes_per_s=None, read_bytes=lambda report: report.num_steps * 1e9)

    def prompt_logprobs(
        self, ids: Sequence[int], num_top: int = 0, *, priority: int = 0, cache_scope: bytes = b""
    ) -> Any:
        """Place i has log-probability -i and rank i, and likeliest are the ids 20, 19, …"""
        for i, token_id in enumerate(ids[1:], 1):
            self.num_scored += 1
            time.sleep(self.score_delay_s)
            yield FakeLogprob(token_id, -float(i), tuple((21 - k, -k / 10) for k in range(1, num_top + 1)), i)

    def close(self) -> None:
        self.engine.close()
        self.closed = True
