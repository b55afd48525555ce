"""litellm's `deepinfra/` and `hosted_vllm/` providers."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

MESSAGES = [{"role": "user", "content": "Weather in 'Paris' for 3 days?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.fixture(params=["deepinfra", "hosted_vllm"])
def common(request: pytest.FixtureRequest, url: str) -> dict[str, Any]:
    """What every call has."""
    return {
        "model": f"{request.param}/org/model",
        "messages": MESSAGES,
        "api_base": f"{url}/v1/openai",
        "api_key": "none",
        "timeout": 30,
        "num_retries": 0,
    }


def check_an_answer_and_its_cost(common):
    answer = litellm.completion(**common, temperature=0.3, top_p=0.9, max_tokens=80, stop=["never"], n=1)
    assert answer.choices[0].message.content == "You said: Weather in 'Paris' for 3 days?"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def check_a_stream(common):
    chunks = list(litellm.completion(**common, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "You said: Weather in 'Paris' for 3 days?"
    assert len(chunks) > 3
    assert chunks[-1].usage.completion_tokens > 0


async def check_an_answer_without_blocking(common):
    answer = await litellm.acompletion(**common)
    assert answer.choices[0].message.content.startswith("You said:")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}])
def check_tools(common, choice, stream):
    if common["model"].startswith("deepinfra") and choice != "auto":
        pytest.skip("litellm itself refuses any other tool_choice than auto and none for deepinfra")
    answer = litellm.completion(**common, tools=[WEATHER], tool_choice=choice, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=MESSAGES)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments.replace(" ", "")) == ("weather", '{"city":"Paris","days":3}')
    results = [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    last = litellm.completion(**{**common, "messages": [*MESSAGES, *results]}, tools=[WEATHER])
    assert last.choices[0].message.content == "The tools said: sun"


def check_a_schema(common):
    wanted = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": SCHEMA, "strict": True}}
    answer = litellm.completion(**common, response_format=wanted, allowed_openai_params=["response_format"])
    assert answer.choices[0].message.content.replace(" ", "") == '{"city":"Paris","days":3}'


def check_a_chat_with_what_litellm_adds(common):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi", "reasoning_content": "greet"},
        {"role": "user", "content": "Bye"},
    ]
    answer = litellm.completion(**{**common, "messages": messages}, user="someone", metadata={"a": "b"})
    assert answer.choices[0].message.content == "You said: Bye"


def check_an_unknown_model_is_not_found(common):
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(**{**common, "model": common["model"].replace("org", "nobody")})


def check_a_wrong_value_is_a_bad_request(common):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**common, temperature=9)
