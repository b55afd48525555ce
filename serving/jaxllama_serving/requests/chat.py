"""`POST …/chat/completions`: what its answers look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from jaxllama import OutputAssembler
from jaxllama.text.output import PROMPT_TAIL
from jaxllama_serving.requests.choices import Call, Choice, Choices, Update
from jaxllama_serving.requests.logprobs import chat_logprobs, prompt_logprobs
from jaxllama_serving.requests.prepare import PreparedChat, prepare_chat
from jaxllama_serving.requests.response import Response
from jaxllama_serving.requests.run import run_request

if TYPE_CHECKING:
    from jaxllama import TokenLogprob
    from jaxllama.text.tool_parsing import ToolDelta


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers one chat request, in one piece or as a stream."""
    return await run_request(request, prepare_chat, ChatResponse)


@dataclass(frozen=True, kw_only=True)
class ChatResponse(Response):
    """The answer to a chat request."""

    id_prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    prepared: PreparedChat

    def choices(self) -> list[Choice]:
        """Returns the choices, not begun."""
        prompt = self.prepared.prompt
        return [
            Choice.begin(
                i,
                self.prepared.prompts[0],
                params,
                OutputAssembler(
                    self.tokenizer,
                    stop=params.stop,
                    include_stop=params.include_stop_str_in_output,
                    starts_in_reasoning=prompt.starts_in_reasoning,
                    reasoning_tags=prompt.reasoning_tags,
                    stop_in_reasoning=self.config.stop_in_reasoning,
                    prompt_tail=prompt.prompt_ids[-PROMPT_TAIL:] if prompt.continues else (),
                    continues=prompt.continues,
                    tools=prompt.tools.parser() if prompt.tools is not None else None,
                ),
                constraint,
            )
            for i, (params, constraint) in enumerate(zip(self.prepared.params, prompt.constraints, strict=True))
        ]

    @property
    def prediction(self) -> list[int]:
        """As the request predicts it."""
        return self.prepared.prediction

    @property
    def _reasoning_names(self) -> tuple[str, ...]:
        """The fields that hold the reasoning, none if it is not to be shown."""
        if self.prepared.prompt.starts_in_reasoning is None or not self.prepared.request.include_reasoning:
            return ()
        field = self.config.reasoning_field
        return ("reasoning_content", "reasoning") if field == "both" else (field,)

    def body_fields(self) -> dict[str, Any]:
        """Returns the prompt's tokens and their log-probabilities, if asked for."""
        fields: dict[str, Any] = {}
        if self.prepared.request.return_token_ids:
            fields["prompt_token_ids"] = self.prepared.prompts[0]
        if self.scores is not None:
            fields["prompt_logprobs"] = prompt_logprobs(self.tokenizer, self.scores[0], self.prepared.scored[0] or 0)
        return fields

    def body_choices(self, choices: Choices) -> list[dict[str, Any]]:
        """Returns the finished choices."""
        return [self._choice(choice) for choice in choices.all]

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(choice.output.content), "refusal": None}
        message |= dict.fromkeys(self._reasoning_names, "".join(choice.output.reasoning))
        if choice.tool_calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_call(call) for call in choice.tool_calls]
        content, reasoning = choice.logprobs()
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(content, reasoning),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.output.stop_reason,
            **self.extras(choice),
        }

    def opening(self, choices: Choices, index: int) -> list[dict[str, Any]]:
        """Returns the chunk with the role; the first of all has the prompt's tokens, if asked for."""
        chunk = self._chunk(choices, index, {"role": "assistant", "content": ""})
        if self.prepared.request.return_seed:
            chunk["choices"][0]["seed"] = choices.all[index].params.seed
        return [chunk if self.opened else {**chunk, **self.body_fields()}]

    def update_chunks(self, choices: Choices, update: Update) -> list[dict[str, Any]]:
        """Returns an update's chunks: reasoning, content and the end never share one.

        Log-probabilities go with their text, or where it shows nothing, with the nearest chunk.
        """
        choice = choices.all[update.index]
        chunks = []
        if update.reasoning and self._reasoning_names:
            shown = dict.fromkeys(self._reasoning_names, update.reasoning)
            chunks.append(self._chunk(choices, update.index, shown))
        if update.content:
            chunks.append(self._chunk(choices, update.index, {"content": update.content}))
        content_at = len(chunks) - 1 if update.content else -1
        for call in update.tool_calls:
            delta = {"tool_calls": [_call_delta(call, choice.tool_calls[call.index].id)]}
            chunks.append(self._chunk(choices, update.index, delta))
        if update.finish_reason is not None:
            last = self._chunk(choices, update.index, {})
            last["choices"][0]["finish_reason"] = update.finish_reason
            last["choices"][0]["stop_reason"] = choice.output.stop_reason
            chunks.append(last)
        if not chunks:
            return []
        first, with_content = chunks[0]["choices"][0], chunks[content_at]["choices"][0]
        if self.prepared.request.return_token_ids:
            first["token_ids"] = list(update.token_ids)
        if first is with_content:
            first["logprobs"] = self._logprobs(update.logprobs, update.reasoning_logprobs)
        else:
            first["logprobs"] = self._logprobs((), update.reasoning_logprobs)
            with_content["logprobs"] = self._logprobs(update.logprobs, ())
        return chunks

    def _chunk(self, choices: Choices, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return self.frame(choices, {"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _logprobs(self, content: Sequence[TokenLogprob], reasoning: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.prepared.request.logprobs:
            return None
        found: dict[str, Any] = {"content": chat_logprobs(self.tokenizer, content), "refusal": None}
        if self._reasoning_names:
            found["reasoning_content"] = chat_logprobs(self.tokenizer, reasoning)
        return found


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": "".join(call.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _call_delta(delta: ToolDelta, call_id: str) -> dict[str, Any]:
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": call_id, "type": "function", "function": function}
