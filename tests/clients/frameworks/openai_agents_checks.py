"""openai-agents with three tools, a stream, a structured result and a hand-off."""

from __future__ import annotations

import openai
import pytest
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from pydantic import BaseModel

set_tracing_disabled(True)
CALLED: list[str] = []


@function_tool
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    CALLED.append("add")
    return a + b


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    CALLED.append("weather")
    return f"{city}: sun"


@function_tool
def now() -> str:
    """The time."""
    CALLED.append("now")
    return "noon"


class Forecast(BaseModel):
    """What an agent has to answer."""

    city: str
    days: int


@pytest.fixture
def model(url):
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    return OpenAIChatCompletionsModel(model="org/model", openai_client=client)


@pytest.fixture
def agent(model):
    CALLED.clear()
    settings = ModelSettings(temperature=0.3, top_p=0.9, max_tokens=900, parallel_tool_calls=True, include_usage=True)
    tools = [add, weather, now]
    return Agent(name="Helper", instructions="Use tools.", model=model, tools=tools, model_settings=settings)


async def check_three_tools(agent):
    result = await Runner.run(agent, "In 'Paris', what is 3 and 3?")
    assert sorted(CALLED) == ["add", "now", "weather"]
    assert result.final_output == "The tools said: 6, Paris: sun, noon"
    assert result.context_wrapper.usage.total_tokens > 0


async def check_three_tools_in_a_stream(agent):
    result = Runner.run_streamed(agent, "In 'Paris', what is 3 and 3?")
    kinds = {event.type async for event in result.stream_events()}
    assert sorted(CALLED) == ["add", "now", "weather"]
    assert result.final_output == "The tools said: 6, Paris: sun, noon"
    assert {"raw_response_event", "run_item_stream_event"} <= kinds


async def check_a_required_tool(agent):
    agent.model_settings.tool_choice = "required"
    agent.tool_use_behavior = "stop_on_first_tool"
    result = await Runner.run(agent, "3")
    assert CALLED == ["add"]
    assert result.final_output == "6"


async def check_a_structured_result(model):
    agent = Agent(name="Weather", model=model, output_type=Forecast)
    result = await Runner.run(agent, "'Paris', 3 days")
    assert result.final_output == Forecast(city="Paris", days=3)


async def check_a_conversation_goes_on(agent):
    first = await Runner.run(agent, "In 'Paris'?")
    agent.tools.clear()
    second = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": "And then?"}])
    assert second.final_output == "You said: And then?"
