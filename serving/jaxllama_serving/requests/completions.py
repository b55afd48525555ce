"""`POST …/completions`: text in, text out, without a chat template."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web

from jaxllama import OutputAssembler
from jaxllama.text.output import PROMPT_TAIL
from jaxllama_serving.requests.choices import Choice, Choices, Update
from jaxllama_serving.requests.logprobs import CompletionLogprobs, prompt_logprobs
from jaxllama_serving.requests.prepare import PreparedCompletion, prepare_completion
from jaxllama_serving.requests.response import Response
from jaxllama_serving.requests.run import run_request

if TYPE_CHECKING:
    from jaxllama import TokenLogprob


async def completions(request: web.Request) -> web.StreamResponse:
    """Answers one text completion request, in one piece or as a stream."""
    return await run_request(request, prepare_completion, CompletionResponse)


@dataclass(frozen=True, kw_only=True)
class CompletionResponse(Response):
    """The answer to a text completion request. Choice `i * n + j` is completion j of prompt i."""

    id_prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    prepared: PreparedCompletion
    streamed: dict[int, CompletionLogprobs] = field(default_factory=dict)

    def choices(self) -> list[Choice]:
        """Returns the choices, not begun; with best_of, all that are drawn."""
        choices = []
        for i, params in enumerate(self.prepared.params):
            prompt = self.prepared.prompts[self.prepared.prompt_of(i)]
            assembler = OutputAssembler(
                self.tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                prompt_tail=prompt[-PROMPT_TAIL:],
            )
            choice = Choice.begin(i, prompt, params, assembler)
            # lm-eval takes the last entry of an echo for the generated token's, whatever token that is.
            choice.tells_stop = self.prepared.request.echo
            choices.append(choice)
        return choices

    def body_choices(self, choices: Choices) -> list[dict[str, Any]]:
        """Returns the finished choices, of each prompt the `n` best."""
        request = self.prepared.request
        found: list[Choice] = []
        for start in range(0, len(choices.all), request.num_drawn):
            drawn = list(choices.all[start : start + request.num_drawn])
            if request.num_drawn > request.n:
                drawn = sorted(drawn, key=_mean_logprob, reverse=True)[: request.n]
            found += drawn
        return [self._choice(choice, index) for index, choice in enumerate(found)]

    def _choice(self, choice: Choice, index: int) -> dict[str, Any]:
        text, ids, logprobs = self._echoed(choice)
        text += "".join(choice.output.content)
        lists = logprobs.add([*ids, *_entries(choice.logprobs()[0])]) if logprobs is not None else None
        return {
            "index": index,
            "text": text,
            "logprobs": lists,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.output.stop_reason,
            **self._prompt_fields(choice),
            **self.extras(choice),
        }

    def opening(self, choices: Choices, index: int) -> list[dict[str, Any]]:
        """Returns a chunk with what is known of a choice beforehand: the echo, the prompt's tokens, the seed."""
        choice = choices.all[index]
        text, ids, logprobs = self._echoed(choice)
        fields = self._prompt_fields(choice)
        if self.prepared.request.return_seed:
            fields["seed"] = choice.params.seed
        lists = None
        if logprobs is not None:
            self.streamed[index] = logprobs
            lists = logprobs.add(ids) if self.prepared.request.echo else None
        if not text and not fields:
            return []
        return [self.frame(choices, {**_chunk(index, text), "logprobs": lists, **fields})]

    def update_chunks(self, choices: Choices, update: Update) -> list[dict[str, Any]]:
        """Returns an update's one chunk; the last has the finish reason."""
        choice = _chunk(update.index, update.content)
        if update.index in self.streamed:
            choice["logprobs"] = self.streamed[update.index].add(_entries(update.logprobs))
        if self.prepared.request.return_token_ids:
            choice["token_ids"] = list(update.token_ids)
        if update.finish_reason is not None:
            choice["finish_reason"] = update.finish_reason
            choice["stop_reason"] = choices.all[update.index].output.stop_reason
        return [self.frame(choices, choice)]

    def _echoed(
        self, choice: Choice
    ) -> tuple[str, list[tuple[int, float | None, Sequence[tuple[int, float]]]], CompletionLogprobs | None]:
        """The text before the completion, its tokens with log-probabilities, and what builds the lists of them all."""
        request, prompt = self.prepared.request, self.prepared.prompt_of(choice.index)
        if not request.echo:
            tail = choice.prompt_ids[-PROMPT_TAIL:]
            return "", [], None if request.logprobs is None else CompletionLogprobs(self.tokenizer, tail)
        text = self.prepared.texts[prompt]
        if request.logprobs is None or self.scores is None:
            return text, [], None
        scores = [(e.token_id, e.logprob, e.top[: request.logprobs]) for e in self.scores[prompt]]
        return text, [(choice.prompt_ids[0], None, ()), *scores], CompletionLogprobs(self.tokenizer)

    def _prompt_fields(self, choice: Choice) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.prepared.request.return_token_ids:
            fields["prompt_token_ids"] = choice.prompt_ids
        num_top = self.prepared.request.prompt_logprobs
        if num_top is not None and self.scores is not None:
            scores = self.scores[self.prepared.prompt_of(choice.index)]
            fields["prompt_logprobs"] = prompt_logprobs(self.tokenizer, scores, num_top)
        return fields


def _chunk(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}


def _entries(entries: Sequence[TokenLogprob]) -> Iterator[tuple[int, float | None, Sequence[tuple[int, float]]]]:
    return ((entry.token_id, entry.logprob, entry.top) for entry in entries)


def _mean_logprob(choice: Choice) -> float:
    told, _ = choice.logprobs()
    return math.fsum(entry.logprob for entry in told) / max(1, len(told))
