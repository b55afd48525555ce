"""Fields that cannot change an answer: any value is accepted, and has no effect."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from jaxllama_serving.protocol.base import Strict

SERVICE_TIER = "default"
"""What an answer says to whoever asks for a tier: there is one."""


def _any(about: str) -> Any:
    return Field(None, description=f"anything: {about}")


class HarmlessFields(Strict):
    """What clients send for other servers, for their books or for their users."""

    user: Any = _any("who asks; no effect")
    safety_identifier: Any = _any("who asks; no effect")
    metadata: Any = _any("for the client's own books; no effect")
    store: Any = _any("this server stores nothing")
    service_tier: Any = _any("this server has one tier, and answers with it")
    verbosity: Any = _any("no effect")
    prompt_cache_key: Any = _any("no effect: a prompt is found in the cache by its tokens")
    prompt_cache_retention: Any = _any("no effect: the cache forgets what was used least")
