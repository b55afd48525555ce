"""What checks of clients know of the server; imports nothing of ours, for it runs in the clients' environments."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def url() -> str:
    """The server's root, without `/v1`."""
    return os.environ["JAXLLAMA_URL"]


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """The default model's folder, for clients that want its tokenizer."""
    return os.environ["JAXLLAMA_CHECKPOINT"]
