"""llama-index's DeepInfra client."""

from __future__ import annotations

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.deepinfra import DeepInfraLLM


@pytest.fixture
def llm(url):
    return DeepInfraLLM(model="org/model", api_base=url, api_key="none", max_tokens=200, max_retries=1, timeout=30)


def weather(city: str, days: int) -> str:
    """The weather of a city."""
    return f"{city}: sun for {days} days"


CHAT = [ChatMessage(role="system", content="Be brief"), ChatMessage(role="user", content="Hi")]


def check_a_completion(llm):
    assert "Once upon a time" in llm.complete("Once upon a time").text


def check_a_completion_stream(llm):
    pieces = list(llm.stream_complete("Once upon a time"))
    assert len(pieces) > 1
    assert "Once upon a time" in pieces[-1].text


def check_a_chat(llm):
    assert llm.chat(CHAT, top_p=0.9, stop=["never"]).message.content == "You said: Hi"


def check_a_chat_stream(llm):
    pieces = list(llm.stream_chat(CHAT))
    assert "".join(piece.delta for piece in pieces) == "You said: Hi"


async def check_without_blocking(llm):
    assert (await llm.achat(CHAT)).message.content == "You said: Hi"
    pieces = [piece async for piece in await llm.astream_chat(CHAT)]
    assert "".join(piece.delta for piece in pieces) == "You said: Hi"
    assert "Once" in (await llm.acomplete("Once")).text


def check_a_tool(llm):
    tool = FunctionTool.from_defaults(weather)
    answer = llm.chat_with_tools([tool], user_msg="Weather in 'Paris' for 3 days?")
    (call,) = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Paris", "days": 3})
    assert tool(**call.tool_kwargs).content == "Paris: sun for 3 days"


def check_a_tool_result_as_history(llm):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    history = [
        *CHAT,
        ChatMessage(role="assistant", content=None, additional_kwargs={"tool_calls": [call]}),
        ChatMessage(role="tool", content="rain", additional_kwargs={"tool_call_id": "call_1"}),
    ]
    assert llm.chat(history).message.content == "The tools said: rain"
