"""Sampling: `SamplingParams` (host, one request), `SamplingArrays` (device, one row each), the filters and the draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxllama.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_TOP_K = 1000
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Validated when made; `validate_vocab` checks the token ids against a model.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. `repetition_penalty` divides
    positive and multiplies negative logits of tokens in the prompt or the output (Keskar et al. 2019,
    arXiv:1909.05858); `presence_penalty` and `frequency_penalty` are OpenAI's, over the output alone.
    `max_tokens` None means to the end of the context. `seed` None draws one. `stop` strings end the text before
    them; `stop_token_ids` end it as the end-of-sequence ids do, which `ignore_eos` switches off. No stop id is sampled
    before `min_tokens` tokens. `logprobs` k asks for the log-probability of each token and of the k likeliest.

    Raises: RequestError naming the field, its range and the value.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    max_tokens: int | None = None
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 2)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 5)
        _integer("top_k", self.top_k, -1, MAX_TOP_K - 1)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        for name, high in (("max_tokens", MAX_TOKENS), ("seed", 2**63 - 1), ("logprobs", MAX_TOP_LOGPROBS)):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, high)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))

    def validate_vocab(self, vocab_size: int) -> None:
        """Raises: RequestError for a stop or bias id outside the vocabulary (JAX would drop it in silence)."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(f"{name}: token id {token_id} is outside the vocabulary (0 to {vocab_size - 1})", name)


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low < value if open_low else low <= value) or not value <= high:
        raise RequestError(f"{name} must be a number {'above' if open_low else 'from'} {low} to {high}, got {value!r}", name)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer from {low} to {high}, got {value!r}", name)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(strings)}", "stop")
    for text in strings:
        if not isinstance(text, str) or not 1 <= len(text.encode("utf-8", "surrogatepass")) <= MAX_STOP_BYTES:
            raise RequestError(f"stop: each must be a string of 1 to {MAX_STOP_BYTES} bytes, got {text!r:.80}", "stop")
    return strings


def _token_ids(ids: Any) -> tuple[int, ...]:
    ids = tuple(ids)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(f"stop_token_ids: at most {MAX_STOP_TOKEN_IDS}, got {len(ids)}", "stop_token_ids")
    for token_id in ids:
        _integer("stop_token_ids", token_id, 0, 2**31 - 1)
    return ids


def _logit_bias(bias: Any) -> dict[int, float]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias: at most {MAX_LOGIT_BIAS} entries, got {len(bias)}", "logit_bias")
    for token_id, value in bias.items():
        _integer("logit_bias", token_id, 0, 2**31 - 1)
        _number(f"logit_bias[{token_id}]", value, -100, 100)
    return dict(bias)
