"""What each route answers: of these the OpenAPI document is made, and the tests hold the answers against them.

A field with a default is left out of an answer unless the request, or the server's flags, ask for it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

type FinishReason = Literal["stop", "length", "tool_calls"]


class _Response(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ErrorDetails(_Response):
    """What went wrong, and where."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Response):
    """Every error of every route."""

    error: ErrorDetails


class PromptTokensDetails(_Response):
    """How many tokens of the prompt were found in the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(_Response):
    """Tokens of the completion that were reasoning, and that speculation saved a step for; of a prediction those that
    saved a step, and the others."""

    reasoning_tokens: int
    accepted_draft_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(_Response):
    """Tokens, and with prices set their cost in dollars. A prompt counts once for all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    estimated_cost: float = 0.0


class TopLogprob(_Response):
    """A token and its log-probability; `bytes` are exact where the text is not UTF-8 by itself."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, with the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Response):
    """One entry a token, but for a stop token at the end; those of the reasoning apart."""

    content: list[TokenLogprob]
    refusal: None
    reasoning_content: list[TokenLogprob] = []


class PromptLogprob(_Response):
    """A token that could stand at a place of the prompt. Rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


type PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(_Response):
    """What the model calls; the arguments are JSON."""

    name: str
    arguments: str


class ResponseCall(_Response):
    """A tool call. Its id goes into the message with the result."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(_Response):
    """A name, or more of the arguments."""

    name: str = ""
    arguments: str


class CallDelta(_Response):
    """What a chunk adds to a call; its first has the id, type and name."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionDelta


class ChatResponseMessage(_Response):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[ResponseCall] = []


class _Choice(_Response):
    index: int
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    seed: int = 0
    token_ids: list[int] = []


class ChatChoice(_Choice):
    """One answer."""

    message: ChatResponseMessage
    logprobs: ChatLogprobs | None


class ChatDelta(_Response):
    """What a chunk adds to the message."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[CallDelta] = []


class ChatChunkChoice(_Choice):
    """What a chunk adds to one answer."""

    delta: ChatDelta
    logprobs: ChatLogprobs | None


class _Head(_Response):
    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int
    service_tier: Literal["default"] = "default"


class ChatCompletion(_Head):
    """The answer to a chat request."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = []
    prompt_logprobs: PromptLogprobs = []


class ChatCompletionChunk(_Head):
    """One event of a chat stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] = []


class CompletionLogprobs(_Response):
    """One entry a token in each list; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Choice):
    """One completion, or what a chunk adds to it."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] = []
    prompt_logprobs: PromptLogprobs = []


class Completion(_Head):
    """The answer to a text completion request, or one event of its stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelLimits(_Response):
    """What the server allows of one request."""

    max_n: int
    max_body_bytes: int
    request_timeout_s: float = 0.0


class Pricing(_Response):
    """Dollars per million tokens."""

    input: float
    output: float


class Model(_Response):
    """A served name. `max_model_len` is the context: prompt and completion together, in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    limits: ModelLimits
    max_model_len: int = 0
    pricing: Pricing = Field(default_factory=lambda: Pricing(input=0.0, output=0.0))


class ModelList(_Response):
    """All served names."""

    object: Literal["list"]
    data: list[Model]


class Tokens(_Response):
    """Ids of a text or a chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] = []


class Text(_Response):
    """Text of ids."""

    prompt: str
    count: int


class TokenizerInfo(_Response):
    """The tokens that begin, end and fill texts, by their names and ids; null for what the tokenizer lacks."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    vocab_size: int
    model_max_length: int


class Status(_Response):
    """All is well; but for a `kernel_fault`, what a kernel does wrong on these devices, so that a slower one runs."""

    status: Literal["ok", "ready"]
    kernel_fault: str = ""


class Profile(_Response):
    """A trace in a folder of the server's machine: seconds recorded, and bytes written."""

    folder: str
    seconds: float
    num_bytes: int


class Version(_Response):
    """What runs."""

    version: str
    system_fingerprint: str | None
