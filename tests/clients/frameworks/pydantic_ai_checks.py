"""pydantic-ai: text, streams, tools and structured results in two of its three modes."""

from __future__ import annotations

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Forecast(BaseModel):
    """A forecast."""

    city: str
    days: int


@pytest.fixture(scope="session")
def model(url):
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    return OpenAIChatModel("org/model", provider=provider, settings=ModelSettings(max_tokens=800, timeout=60))


async def check_text_and_history(model):
    agent = Agent(model, instructions="Be brief", model_settings={"temperature": 0.2, "seed": 3, "top_p": 0.9})
    first = await agent.run("One")
    second = await agent.run("Two", message_history=first.all_messages())
    assert (first.output, second.output) == ("You said: One", "You said: Two")
    assert second.usage.output_tokens > 0


async def check_a_stream(model):
    async with Agent(model).run_stream("One") as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == "You said: One"


async def check_tools(model):
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: str, days: int) -> str:
        """The weather of a city."""
        return f"{city}: sun for {days} days"

    result = await agent.run("Weather in 'Paris' for 3 days?")
    assert result.output == "The tools said: Paris: sun for 3 days"


@pytest.mark.parametrize("mode", [ToolOutput, NativeOutput, PromptedOutput])
async def check_a_structured_result(model, mode):
    if mode is PromptedOutput:
        pytest.skip("the fake reads no schema from a prompt")
    result = await Agent(model, output_type=mode(Forecast)).run("'Paris' for 3 days")
    assert result.output == Forecast(city="Paris", days=3)


async def check_a_structured_stream(model):
    async with Agent(model, output_type=NativeOutput(Forecast)).run_stream("'Paris' for 3 days") as result:
        assert await result.get_output() == Forecast(city="Paris", days=3)
