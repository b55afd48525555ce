"""langchain-tests' standard suite of chat models, with `ChatOpenAI` and this server."""

from __future__ import annotations

import os

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChatOpenAI(ChatModelIntegrationTests):
    """Every test of the suite that a chat of text allows."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, object]:
        url = os.environ["JAXLLAMA_URL"] + "/v1/openai"
        return {"model": "default", "base_url": url, "api_key": "none", "stream_usage": True, "max_retries": 0}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "org/model"

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest) -> BaseChatModel:
        return ChatOpenAI(**self.chat_model_params)  # type: ignore[arg-type]
