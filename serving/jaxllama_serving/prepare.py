"""From a request's body to token ids and sampling parameters. Slow for long prompts: runs in a worker thread."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxllama import SamplingParams
from jaxllama_serving.config import ServerConfig, ServerConfigError
from jaxllama_serving.errors import invalid, model_not_found
from jaxllama_serving.protocol.chat import ChatRequest, parse_chat_request
from jaxllama_serving.strict_json import decode

if TYPE_CHECKING:
    from jaxllama import Llama


@dataclass(frozen=True)
class PreparedChat:
    """A request ready for the engine: one `SamplingParams` per choice, all over the same prompt.

    `starts_in_reasoning` is None when the output is not to be split into reasoning and content.
    """

    request: ChatRequest
    dropped: tuple[str, ...]
    prompt_ids: list[int]
    params: tuple[SamplingParams, ...]
    seed: int
    starts_in_reasoning: bool | None


def prepare_chat(llama: Llama, config: ServerConfig, body: bytes) -> PreparedChat:
    """Returns the request in `body`, rendered and encoded.

    Raises: ApiError (400, 404), RequestError, ChatTemplateError.
    """
    request, dropped = parse_chat_request(decode(body), lenient=config.lenient)
    if request.model not in config.model_names:
        raise model_not_found(request.model, config.model_names)
    if request.n > config.max_n:
        raise invalid(f"n must be an integer from 1 to {config.max_n}, got {request.n}", "n")
    if llama.chat_template is None or llama.tokenizer is None:
        raise invalid("This model has no chat template, so it cannot chat.", "messages")
    # Sampling parameters first: rendering and encoding are what costs.
    seed = request.seed if request.seed is not None else draw_seed()
    params = sampling_params(request, config, generation_config(llama))
    params.validate_vocab(llama.config.vocab_size)
    rendered = llama.chat_template.render(template_messages(request))
    prompt_ids = llama.tokenizer.encode_rendered(rendered)
    _check_length(len(prompt_ids), request.max_new_tokens, llama.max_context, strict=config.strict_length)
    return PreparedChat(
        request=request,
        dropped=dropped,
        prompt_ids=prompt_ids,
        params=tuple(replace(params, seed=choice_seed(seed, i)) for i in range(request.n)),
        seed=seed,
        starts_in_reasoning=rendered.starts_in_reasoning,
    )


def template_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """Returns the messages as templates want them: text content, `developer` as `system`, the system message first.

    Raises: ApiError for a second system message.
    """
    system: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for i, message in enumerate(request.messages):
        if message.role in ("system", "developer"):
            if system:
                raise invalid(
                    f"messages[{i}] is a second system message, at most one is allowed", f"messages[{i}].role"
                )
            system.append({"role": "system", "content": message.text})
        elif message.role == "tool":
            rest.append({"role": "tool", "content": message.text, "tool_call_id": message.tool_call_id})
        else:
            rest.append({"role": message.role, "content": message.text})
    return system + rest


def sampling_params(request: ChatRequest, config: ServerConfig, generation: Mapping[str, Any]) -> SamplingParams:
    """Returns the request's controls, defaults filled in: the checkpoint's own under `--generation-config auto`."""
    defaults = generation_defaults(generation) if config.generation_config == "auto" else {}

    def choose(name: str, fallback: float) -> Any:
        given = getattr(request, name)
        return given if given is not None else defaults.get(name, fallback)

    return SamplingParams(
        temperature=choose("temperature", 1.0),
        top_p=choose("top_p", 1.0),
        min_p=choose("min_p", 0.0),
        top_k=choose("top_k", 0),
        max_tokens=request.max_new_tokens,
        min_tokens=request.min_tokens,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=choose("repetition_penalty", 1.0),
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
    names = ("temperature", "top_p", "min_p", "top_k", "repetition_penalty")
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
    """Returns choice `index`'s seed: the request's own for choice 0, else a hash of both.

    A hash, not `seed + index`: neighbouring seeds would otherwise share choices.
    """
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]) >> 1


def _check_length(num_prompt: int, max_tokens: int | None, max_context: int, *, strict: bool) -> None:
    if num_prompt > max_context:
        raise invalid(
            f"The prompt has {num_prompt} tokens, but the context holds {max_context}.",
            "messages",
            "context_length_exceeded",
        )
    if strict and max_tokens is not None and num_prompt + max_tokens > max_context:
        raise invalid(
            f"The prompt has {num_prompt} tokens and max_tokens is {max_tokens}: together {num_prompt + max_tokens}, "
            f"but the context holds {max_context}.",
            "max_tokens",
            "context_length_exceeded",
        )
