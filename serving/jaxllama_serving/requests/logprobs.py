"""Log-probabilities in the shapes of OpenAI's two routes and of vLLM's `prompt_logprobs`. Never an infinity."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jaxllama.errors import RequestError
from jaxllama_serving.protocol.errors import invalid
from jaxllama_serving.service import Service

if TYPE_CHECKING:
    from jaxllama import Llama, PromptLogprob, Tokenizer, TokenLogprob

LEAST = -9999.0
"""Told for what is less likely: minus infinity is no JSON. As OpenAI does."""

MAX_PROMPT_ENTRIES = 2**17
"""Of prompt tokens times the alternatives told of each: about 10 MB of JSON."""


def finite(value: float) -> float:
    """Returns `value`, or `LEAST` for what is below it or no number."""
    return max(value, LEAST) if math.isfinite(value) else LEAST


def token_text(data: bytes, prefix: str = "") -> str:
    r"""Returns a token's text; of one that is not UTF-8 by itself `prefix` and its text with bytes like `\xf0\x9f`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + data.decode("utf-8", "backslashreplace")


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Returns the entries of `choices[].logprobs.content`."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": token_text(data), "logprob": finite(logprob), "bytes": list(data)}

    return [{**entry(e.token_id, e.logprob), "top_logprobs": [entry(*top) for top in e.top]} for e in entries]


class CompletionLogprobs:
    """Builds `choices[].logprobs` of a text completion; offsets count characters from where `prompt_tail` ends."""

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder(prompt_tail=prompt_tail)
        self._offset = 0

    def add(self, entries: Iterable[tuple[int, float | None, Sequence[tuple[int, float]]]]) -> dict[str, list[Any]]:
        """Returns the lists for the next tokens: each an id, its log-probability (None: unknown) and the likeliest."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, logprob, top in entries:
            found["tokens"].append(self._name(token_id))
            found["token_logprobs"].append(None if logprob is None else finite(logprob))
            named = {self._name(other): finite(value) for other, value in top}
            if logprob is not None:
                named.setdefault(self._name(token_id), finite(logprob))
            found["top_logprobs"].append(None if logprob is None else named)
            found["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push([token_id]))
        return found

    def _name(self, token_id: int) -> str:
        return token_text(self._tokenizer.token_bytes(token_id), "bytes:")


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[PromptLogprob], num_top: int
) -> list[dict[str, Any] | None]:
    """Returns `prompt_logprobs`: null for the first token, then by id the token and the likeliest, with their ranks."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = token_text(tokenizer.token_bytes(token_id))
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": text}

    found: list[dict[str, Any] | None] = [None]
    for e in entries:
        named = {str(e.token_id): entry(e.token_id, e.logprob, e.rank)}
        for rank, (token_id, logprob) in enumerate(e.top[:num_top], 1):
            named.setdefault(str(token_id), entry(token_id, logprob, rank))
        found.append(named)
    return found


async def score_prompts(
    service: Service,
    llama: Llama,
    prompts: Sequence[Sequence[int]],
    num_top: int,
    param: str,
    *,
    priority: int = 0,
    cache_scope: bytes = b"",
) -> list[list[PromptLogprob]]:
    """Returns the log-probabilities of every prompt's tokens but the first. The engine scores them beside what it runs.

    Raises: ApiError, status 400, for more than `MAX_PROMPT_ENTRIES`, and for a prompt that cannot be scored.
    """
    num_entries = sum(map(len, prompts)) * (num_top + 1)
    if num_entries > MAX_PROMPT_ENTRIES:
        raise invalid(
            f"The log-probabilities of the prompt would have {num_entries} entries, at most {MAX_PROMPT_ENTRIES} are "
            f"allowed. Lower {param} or shorten the prompt.",
            param,
        )
    stop = threading.Event()

    def score(prompt: Sequence[int]) -> list[PromptLogprob]:
        entries: list[PromptLogprob] = []
        if not stop.is_set():
            found = llama.prompt_logprobs(prompt, num_top, priority=priority, cache_scope=cache_scope)
            with contextlib.closing(found):
                for entry in found:
                    if stop.is_set():
                        return []
                    entries.append(entry)
        return entries

    loop = asyncio.get_running_loop()
    try:
        return await asyncio.gather(*(loop.run_in_executor(service.scorer, score, prompt) for prompt in prompts))
    except RequestError as error:
        raise invalid(str(error), param) from None
    finally:
        # A thread cannot be cancelled; this one looks between tokens whether anybody still waits.
        stop.set()
