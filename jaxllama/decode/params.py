"""`SamplingParams`: how one request is sampled. Each field is all there is to say of its control. No JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxllama.decode.controls import Boolean, Integer, Number, Strings, TokenIds, TokenNumbers, control, controls_of
from jaxllama.decode.steering import Steering
from jaxllama.errors import GrammarError, RequestError
from jaxllama.text.structured import Structured

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
    `structured` says what the text must look like, after any reasoning; `thinking_budget` how many tokens of reasoning
    may come before its end is forced. Both need the model's tokenizer, so `Llama` and the server look after them.
    `steering` is a vector that is added to the residual stream of a layer.

    Raises: RequestError naming the field, its range and the value.
    """

    temperature: float = control(Number(0, 2), 1.0, flag="0 is greedy", dtype="float32", in_checkpoint=True)
    top_p: float = control(
        Number(0, 1, above=True),
        1.0,
        flag="sample from the likeliest tokens that have this probability together",
        dtype="float32",
        off=(1,),
        in_checkpoint=True,
    )
    min_p: float = control(
        Number(0, 1),
        0.0,
        flag="sample from tokens at least this many times as likely as the likeliest",
        dtype="float32",
        off=(0,),
        in_checkpoint=True,
    )
    top_k: int = control(
        Integer(-1, MAX_TOP_K - 1, f"an integer from 0 to {MAX_TOP_K - 1}, or -1 (0 and -1 are off)"),
        0,
        flag="sample from this many likeliest tokens; 0 is off",
        dtype="int32",
        off=(0, -1),
        in_checkpoint=True,
    )
    max_tokens: int | None = control(
        Integer(0, MAX_TOKENS), None, flag="the most tokens to generate", unset="to the end of the context"
    )
    min_tokens: int = control(Integer(0, MAX_TOKENS), 0, flag="tokens before which the reply does not end")
    presence_penalty: float = control(
        Number(-2, 2), 0.0, flag="taken from the logit of every token of the output", dtype="float32", off=(0,)
    )
    frequency_penalty: float = control(
        Number(-2, 2), 0.0, flag="the same, times how often it is there", dtype="float32", off=(0,)
    )
    repetition_penalty: float = control(
        Number(0.01, 5),
        1.0,
        flag="divides the logits of tokens of the prompt and the output",
        dtype="float32",
        off=(1,),
        in_checkpoint=True,
    )
    stop: tuple[str, ...] = control(Strings(MAX_STOP_STRINGS, MAX_STOP_BYTES), (), flag="stop before TEXT; repeatable")
    include_stop_str_in_output: bool = control(Boolean(), False)
    stop_token_ids: tuple[int, ...] = control(TokenIds(MAX_STOP_TOKEN_IDS), ())
    ignore_eos: bool = control(Boolean(), False, flag="go on past the end of the reply")
    seed: int | None = control(Integer(0, 2**63 - 1), None, flag="the same seed, the same reply", unset="random")
    logit_bias: Mapping[int, float] = control(TokenNumbers(MAX_LOGIT_BIAS, -100, 100), {})
    logprobs: int | None = control(
        Integer(0, MAX_TOP_LOGPROBS),
        None,
        flag="with --json: each token's log-probability, and this many of the likeliest tokens",
        unset="none",
    )
    structured: Structured | None = None
    steering: Steering | None = None
    thinking_budget: int | None = control(Integer(0, MAX_TOKENS), None)

    def __post_init__(self) -> None:
        for name, each in CONTROLS.items():
            object.__setattr__(self, name, each.check(name, getattr(self, name)))
        if self.structured is not None and not isinstance(self.structured, Structured):
            raise GrammarError(f"structured must be a Structured, got {type(self.structured).__name__}", "structured")
        if self.steering is not None and not isinstance(self.steering, Steering):
            raise RequestError(f"steering must be a Steering, got {type(self.steering).__name__}", "steering")
        if self.structured is not None and self.ignore_eos:
            raise RequestError(
                "ignore_eos cannot be combined with structured output, which ends by itself", "ignore_eos"
            )

    def validate_vocab(self, vocab_size: int) -> None:
        """Raises: RequestError for a stop or bias id outside the vocabulary (JAX would drop it in silence)."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"{name}: token id {token_id} is outside the vocabulary (0 to {vocab_size - 1})", name
                    )


CONTROLS = controls_of(SamplingParams)
"""Every control by its name."""
