"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxllama.decode.params import MAX_TOP_LOGPROBS, SamplingParams
from jaxllama.engine.scheduling.constraint import Constraint
from jaxllama.engine.scheduling.foresight import Foresight
from jaxllama.errors import ContextLengthError, RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, with the likeliest tokens at its place (id, log-probability), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptLogprob:
    """A prompt token's log-probability given those before it, and how many tokens are likelier, plus one (`rank`).

    `top` are the likeliest tokens at its place (id, log-probability), best first. `is_greedy`: it is the likeliest
    itself, of equals the first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()
    is_greedy: bool = False


@dataclass(frozen=True)
class TokenOutput:
    """New tokens of one request. The last output of a request, and no other, has a `finish_reason`.

    `token_ids` include the stop token; `stop_token_id` is its id if one ended the request. `error` is set exactly when
    `finish_reason` is "error". `scores` are what a request has instead that generates nothing (`Scoring`).
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: Exception | None = None
    scores: tuple[PromptLogprob, ...] = ()


@dataclass
class Scoring:
    """What a request wants that scores its prompt: each token from index `first` on (1 or more), with `num_top` others.

    `next` is the first token whose score is not told yet.
    """

    first: int
    num_top: int
    next: int = field(init=False)

    def __post_init__(self) -> None:
        self.next = self.first

    @classmethod
    def of(cls, num_ids: int, first: int, num_top: int) -> Scoring:
        """That of a prompt of `num_ids`. Raises: RequestError."""
        if not 1 <= first < num_ids:
            raise RequestError(
                f"first must be from 1 to {num_ids - 1}, as there are {num_ids} ids, got {first}", "first"
            )
        if not 0 <= num_top <= MAX_TOP_LOGPROBS:
            raise RequestError(f"num_top must be from 0 to {MAX_TOP_LOGPROBS}, got {num_top}", "num_top")
        return cls(first, num_top)


@dataclass(eq=False)
class EngineRequest:
    """One accepted request. Callers read `id`, `seed`, `queued_s` and `num_cached_tokens` and call `cancel`; the
    rest belongs to the engine's thread.

    `num_cached_tokens` is how much of the prompt was found in the cache, None until the request is admitted.
    `num_accepted` of the tokens were drafts that had been right (speculation), `num_predicted` of those were found in
    `prediction`, what the output may resemble.
    The draft model's cache has `draft_length` of its tokens, as far as is known.
    `page_keys` name the full pages of the prompt less its last token, `part_key` the page that the end of what comes
    before the first score fills in part, empty where that cannot be copied. `foresight` is what is thought to come
    where it has a constraint. `saved_as` numbers the copy that the devices' hosts keep of the pages of a request that
    was set aside. With `scoring` it ends when its prompt is in the cache.
    """

    prompt: list[int]
    params: SamplingParams
    on_output: Callable[[TokenOutput], None]
    budget: int
    stop_ids: frozenset[int]
    priority: int
    arrival: int
    wake: Callable[[], None]
    constraint: Constraint | None = None
    halt_id: int | None = None  # the constraint's, when the row was made
    scoring: Scoring | None = None
    scope: bytes = b""
    page_keys: list[bytes] = field(default_factory=list)
    part_key: bytes = b""
    foresight: Foresight | None = None
    id: str = field(default_factory=lambda: f"req-{secrets.token_hex(8)}")
    seed: int = 0
    generated: list[int] = field(default_factory=list)
    row: int | None = None
    shard: int = 0  # of its row and pages; the last one's if it has none now
    pages: list[int] = field(default_factory=list)
    num_shared_pages: int = 0
    num_released: int = 0  # pages at the start that no layer reads any more: they are given back, and 0 in `pages`
    num_prefilled: int = 0
    draft_length: int = 0
    num_cached_tokens: int | None = None
    num_accepted: int = 0
    num_predicted: int = 0
    prediction: list[int] = field(default_factory=list)
    saved_as: int | None = None
    is_running: bool = False
    is_finished: bool = False
    is_cancelled: bool = False
    made_at: float = field(default_factory=time.monotonic)
    queued_s: float | None = None  # from `submit` to the first row

    def cancel(self) -> None:
        """Ends the request at the next dispatch with finish_reason "cancelled". Does nothing if it has ended."""
        self.is_cancelled = True
        self.wake()

    @property
    def is_saved(self) -> bool:
        """Whether its keys and values are kept on the hosts, so that there is nothing to prefill."""
        return self.saved_as is not None

    @property
    def num_to_prefill(self) -> int:
        """Tokens whose keys and values must be in the cache before decoding: all but the last."""
        return len(self.prompt) + len(self.generated) - 1

    @property
    def is_launched(self) -> bool:
        """Whether all that it computes is on its way to the device, though not all of it is read."""
        return self.scoring is not None and self.num_prefilled >= self.num_to_prefill

    @property
    def has_all_scores(self) -> bool:
        """Whether its scores are told, all of them finite."""
        return self.scoring is not None and self.scoring.next == len(self.prompt)

    @property
    def part_end(self) -> int:
        """Where the part that `part_key` names ends: the token there gives the first score."""
        assert self.scoring is not None
        return self.scoring.first - 1

    def findable_keys(self, page_size: int) -> list[bytes]:
        """Names of the pages that it may take from others: what it scores it must compute."""
        return self.page_keys if self.scoring is None else self.page_keys[: (self.scoring.first - 1) // page_size]

    @property
    def order(self) -> tuple[int, int]:
        """Lower goes first: priority, then arrival."""
        return (self.priority, self.arrival)


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raises: RequestError for ids outside the vocabulary; there is at least one."""
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise RequestError(f"the {name} has token ids outside 0 to {vocab_size - 1}", name)


def checked_prompt(
    prompt_ids: Sequence[int], vocab_size: int, max_context: int, *, generates: bool = True
) -> list[int]:
    """A prompt that can run: with room for one more token, or with a last token of which nothing has to follow.

    Raises: RequestError, ContextLengthError.
    """
    prompt = [int(token_id) for token_id in prompt_ids]
    if not prompt:
        raise RequestError("the prompt is empty; it needs at least one token", "prompt")
    check_ids(prompt, vocab_size, "prompt")
    if len(prompt) + (1 if generates else -1) > max_context:
        more = ", which must hold at least one more" if generates else " and one more"
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens; this model's context is {max_context}{more}", "prompt"
        )
    return prompt
