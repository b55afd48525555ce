"""From a request's body to token ids and sampling parameters. Slow for long prompts: runs in a worker thread."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxllama import SamplingParams
from jaxllama.decode.params import CONTROLS
from jaxllama_serving.config import ServerConfig, ServerConfigError
from jaxllama_serving.protocol.base import unknown_fields
from jaxllama_serving.protocol.chat import ChatRequest, parse_chat_request
from jaxllama_serving.protocol.completions import CompletionRequest, parse_completion_request
from jaxllama_serving.protocol.errors import invalid, model_not_found
from jaxllama_serving.protocol.shared_fields import DEVICE_CONTROLS, GenerationRequest
from jaxllama_serving.protocol.strict_json import decode
from jaxllama_serving.requests.chat_prompt import ChatPrompt, make_prompt

if TYPE_CHECKING:
    from jaxllama import Llama


_MAX_PREDICTION_CHARACTERS = 100_000
"""More is not looked at; the engine takes fewer tokens."""


@dataclass(frozen=True)
class Prepared:
    """A request ready for the engine: one `SamplingParams` per choice; the choices of one prompt follow each other.

    `ignored` are the paths of its fields that mean nothing here.
    """

    request: GenerationRequest
    ignored: tuple[str, ...]
    prompts: tuple[list[int], ...]
    params: tuple[SamplingParams, ...]
    seed: int

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts; each counts once, however many choices it has."""
        return sum(map(len, self.prompts))

    @property
    def scored(self) -> tuple[int | None, str]:
        """How many likeliest tokens to find at every place of the prompts (None: no scores), and who asks for them."""
        return self.request.prompt_logprobs, "prompt_logprobs"

    def prompt_of(self, index: int) -> int:
        """Which prompt choice `index` continues."""
        return index * len(self.prompts) // len(self.params)


@dataclass(frozen=True)
class PreparedChat(Prepared):
    """`prompt` is what forms the answers besides sampling, `prediction` what they may resemble."""

    request: ChatRequest
    prompt: ChatPrompt
    prediction: list[int]


@dataclass(frozen=True)
class PreparedCompletion(Prepared):
    """`texts` are the prompts as `echo` shows them."""

    request: CompletionRequest
    texts: tuple[str, ...]

    @property
    def scored(self) -> tuple[int | None, str]:
        """As for any request; an echo with logprobs needs the prompts' scores too."""
        echoed = self.request.logprobs if self.request.echo else None
        wanted = [n for n in (echoed, self.request.prompt_logprobs) if n is not None]
        return max(wanted, default=None), "prompt_logprobs" if echoed is None else "logprobs"


def prepare_chat(llama: Llama, config: ServerConfig, body: bytes) -> PreparedChat:
    """Returns the request in `body`, rendered and encoded.

    Raises: ApiError (400, 404), RequestError, ChatTemplateError.
    """
    request = parse_chat_request(decode(body), strict_fields=config.strict_fields)
    check_model(request.model, config)
    # Sampling parameters first: rendering and encoding are what costs.
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    seed, params = _params_of_choices(llama, config, request, request.n, request.max_new_tokens, logprobs)
    prompt = make_prompt(llama, config, request, request.n)
    num_prompt = len(prompt.prompt_ids)
    _check_length(num_prompt, request.max_new_tokens, llama.max_context, "messages", strict=config.strict_length)
    ignored = (*unknown_fields(request), *prompt.ignored)
    prediction: list[int] = []
    if request.prediction is not None:
        assert llama.tokenizer is not None  # the server does not start without one
        prediction = llama.tokenizer.encode(request.prediction.text[:_MAX_PREDICTION_CHARACTERS], add_bos=False)
    return PreparedChat(request, ignored, (prompt.prompt_ids,), params, seed, prompt, prediction)


def prepare_completion(llama: Llama, config: ServerConfig, body: bytes) -> PreparedCompletion:
    """Returns the request in `body`, its texts encoded as the tokenizer does by itself (BOS included, if it adds one).

    Raises: ApiError (400, 404), RequestError.
    """
    request = parse_completion_request(decode(body), strict_fields=config.strict_fields)
    check_model(request.model, config)
    if request.best_of is not None and request.best_of > config.max_n:
        raise invalid(f"best_of must be an integer from n to {config.max_n}, got {request.best_of}", "best_of")
    num_choices = len(request.prompt) * request.num_drawn
    # The best are those with the likeliest tokens.
    logprobs = 0 if request.logprobs is None and request.num_drawn > request.n else request.logprobs
    seed, params = _params_of_choices(llama, config, request, num_choices, request.max_new_tokens, logprobs)
    assert llama.tokenizer is not None  # the server does not start without one
    prompts, texts = [], []
    for prompt in request.prompt:
        ids = llama.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise invalid("The prompt has no tokens; it needs at least one.", "prompt")
        check_ids(ids, llama, "prompt")
        _check_length(len(ids), request.max_new_tokens, llama.max_context, "prompt", strict=config.strict_length)
        prompts.append(ids)
        texts.append(prompt if isinstance(prompt, str) else llama.tokenizer.decode(ids))
    return PreparedCompletion(request, unknown_fields(request), tuple(prompts), params, seed, tuple(texts))


def check_model(name: str, config: ServerConfig) -> None:
    """Raises: ApiError, status 404, for a model that is not served."""
    if name not in config.model_names:
        raise model_not_found(name, config.model_names)


def check_ids(ids: Sequence[int], llama: Llama, param: str) -> None:
    """Raises: ApiError, status 400, for an id outside the vocabulary."""
    if ids and max(ids) >= llama.config.vocab_size:
        raise invalid(
            f"{param}: token id {max(ids)} is outside the vocabulary (0 to {llama.config.vocab_size - 1})", param
        )


def _params_of_choices(
    llama: Llama,
    config: ServerConfig,
    request: GenerationRequest,
    num_choices: int,
    max_tokens: int | None,
    logprobs: int | None,
) -> tuple[int, tuple[SamplingParams, ...]]:
    if request.n > config.max_n:
        raise invalid(f"n must be an integer from 1 to {config.max_n}, got {request.n}", "n")
    seed = request.seed if request.seed is not None else draw_seed()
    params = sampling_params(request, config, generation_config(llama))
    params = replace(params, max_tokens=max_tokens, logprobs=logprobs)
    params.validate_vocab(llama.config.vocab_size)
    return seed, tuple(replace(params, seed=choice_seed(seed, i)) for i in range(num_choices))


def sampling_params(request: GenerationRequest, config: ServerConfig, generation: Mapping[str, Any]) -> SamplingParams:
    """Returns the request's controls but for the budget and the seed, defaults filled in.

    They are the checkpoint's own under `--generation-config auto`.
    """
    given = {name: getattr(request, name) for name in DEVICE_CONTROLS}
    defaults = generation_defaults(generation) if config.generation_config == "auto" else {}
    return SamplingParams(
        **defaults | {name: value for name, value in given.items() if value is not None},
        min_tokens=request.min_tokens,
        stop=tuple(request.stop),
        include_stop_str_in_output=request.include_stop_str_in_output,
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        logit_bias={int(token_id): bias for token_id, bias in request.logit_bias.items()},
    )


def generation_config(llama: Llama) -> Mapping[str, Any]:
    """Returns the checkpoint's generation_config.json; of a model that came from none, an empty one."""
    return llama.checkpoint.generation_config if llama.checkpoint is not None else {}


def generation_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sampling defaults a checkpoint's generation_config.json names, checked.

    Raises: ServerConfigError if one is out of range (found when the server starts, not by a client).
    """
    names = [name for name, control in CONTROLS.items() if control.in_checkpoint]
    found = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ServerConfigError(f"--generation-config auto: generation_config.json: {error}") from None
    return found


def draw_seed() -> int:
    """Returns a random seed that every JSON reader keeps exact (JavaScript's integers end at 2^53)."""
    return secrets.randbelow(2**53)


def choice_seed(seed: int, index: int) -> int:
    """Returns choice `index`'s seed: the request's own for choice 0, else a hash of both, exact in every JSON reader.

    A hash, not `seed + index`: neighbouring seeds would otherwise share choices.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 11


def _check_length(num_prompt: int, max_tokens: int | None, max_context: int, param: str, *, strict: bool) -> None:
    if num_prompt >= max_context:
        raise invalid(
            f"The prompt has {num_prompt} tokens, but the context holds {max_context}, the answer included.",
            param,
            "context_length_exceeded",
        )
    if strict and max_tokens is not None and num_prompt + max_tokens > max_context:
        raise invalid(
            f"The prompt has {num_prompt} tokens and max_tokens is {max_tokens}: together {num_prompt + max_tokens}, "
            f"but the context holds {max_context}.",
            "max_tokens",
            "context_length_exceeded",
        )
