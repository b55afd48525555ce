"""What the answers of both generating routes share: ids, usage, token ids, the frame of body and chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from jaxllama_serving.config import ServerConfig
from jaxllama_serving.protocol.shared_fields import SERVICE_TIER
from jaxllama_serving.requests.choices import Choice, Choices, Update
from jaxllama_serving.requests.prepare import Prepared

if TYPE_CHECKING:
    from jaxllama import PromptLogprob, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Response(ABC):
    """Builds the JSON of one answer: the whole body, or the chunks of a stream.

    `scores` are the prompts' log-probabilities, if they were asked for.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    id: str
    created: int
    fingerprint: str | None
    prepared: Prepared
    config: ServerConfig
    tokenizer: Tokenizer
    scores: Sequence[Sequence[PromptLogprob]] | None = None
    opened: set[int] = field(default_factory=set)

    @abstractmethod
    def choices(self) -> list[Choice]:
        """Returns the choices, not begun."""

    @property
    def prediction(self) -> Sequence[int]:
        """What the choices may resemble."""
        return ()

    @abstractmethod
    def body_choices(self, choices: Choices) -> list[dict[str, Any]]:
        """Returns the finished choices as the body shows them."""

    @abstractmethod
    def opening(self, choices: Choices, index: int) -> list[dict[str, Any]]:
        """Returns the chunks that come before any text of a choice."""

    @abstractmethod
    def update_chunks(self, choices: Choices, update: Update) -> list[dict[str, Any]]:
        """Returns an update's chunks."""

    def body_fields(self) -> dict[str, Any]:
        """Returns the fields of the answer as a whole that were asked for."""
        return {}

    def body(self, choices: Choices) -> dict[str, Any]:
        """Returns the answer in one piece."""
        written = self.body_choices(choices)
        return {**self._head(self.kind), "choices": written, "usage": self.usage(choices), **self.body_fields()}

    def chunks(self, choices: Choices, update: Update) -> list[dict[str, Any]]:
        """Returns an update's chunks; before a choice's first, those that open it."""
        opening = [] if update.index in self.opened else self.opening(choices, update.index)
        self.opened.add(update.index)
        return [*opening, *self.update_chunks(choices, update)]

    def frame(self, choices: Choices, choice: dict[str, Any]) -> dict[str, Any]:
        """Returns a chunk around one choice; with continuous_usage_stats it carries the usage so far."""
        chunk = {**self._head(self.chunk_kind), "choices": [choice]}
        options = self.prepared.request.stream_options
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = self.usage(choices)
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, choices: Choices) -> dict[str, Any]:
        """Returns the chunk without choices that tells the usage."""
        return {**self._head(self.chunk_kind), "choices": [], "usage": self.usage(choices)}

    def usage(self, choices: Choices) -> dict[str, Any]:
        """Returns the tokens so far, and their price when prices are set; a prompt counts once for all its choices."""
        prompt, completion = self.prepared.num_prompt_tokens, choices.num_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": choices.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": choices.num_reasoning_tokens},
        }
        if choices.num_accepted_tokens:
            usage["completion_tokens_details"]["accepted_draft_tokens"] = choices.num_accepted_tokens
        if self.prediction:
            accepted, rejected = choices.num_predicted_tokens
            usage["completion_tokens_details"] |= {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": rejected,
            }
        cost = self.config.cost(prompt, completion)
        if cost is not None:
            usage["estimated_cost"] = cost
        return usage

    def extras(self, choice: Choice) -> dict[str, Any]:
        """Returns what a choice tells only if asked: its seed and its tokens."""
        request = self.prepared.request
        extras: dict[str, Any] = {"seed": choice.params.seed} if request.return_seed else {}
        if request.return_token_ids:
            extras["token_ids"] = choice.output.token_ids
        return extras

    def _head(self, kind: str) -> dict[str, Any]:
        tier = {"service_tier": SERVICE_TIER} if self.prepared.request.service_tier is not None else {}
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.prepared.request.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.prepared.seed,
            **tier,
        }
