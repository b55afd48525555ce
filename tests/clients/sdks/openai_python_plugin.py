"""Lets the openai package's own tests run against this server: what its routes do not have is left out, with a reason.

Loaded with `-p` beside the suite from the package's source distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from openai.resources import chat, completions

# Of the tests with every parameter at once: what the contract refuses by name, or a value that it cannot allow.
LEFT_OUT = {
    "audio": "no audio",
    "functions": "tools replaced them",
    "function_call": "tools replaced it",
    "logit_bias": "foo is no token id",
    "seed": "negative",
    "suffix": "refused by the contract",
    "best_of": "0 is less than n",
    "web_search_options": "no search",
    "moderation": "no moderation",
    "echo": "with logprobs the first token's is null, as OpenAI's service has it; the package's type says float",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "_delete" in item.name and "test_models" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="no route deletes models"))
        if "/chat/" in item.nodeid and "_create" not in item.name:
            item.add_marker(pytest.mark.skip(reason="no route keeps chats: retrieve, update, list, delete"))


def _reduced(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def reduced(*args: Any, **kwargs: Any) -> Any:
        kept = {name: value for name, value in kwargs.items() if name not in LEFT_OUT}
        if not kept.get("stream"):
            kept.pop("stream_options", None)  # OpenAI too allows them with a stream only
        return create(*args, **kept)

    return reduced


for _resource in (chat.Completions, chat.AsyncCompletions, completions.Completions, completions.AsyncCompletions):
    _resource.create = _reduced(_resource.create)  # type: ignore[method-assign]
