"""What one request carries from the outermost middleware to its handler and back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class RequestContext:
    """The request's id, the headers of its response (a stream must send them itself), and its tokens for the log.

    `started` is the `time.monotonic()` at its head; `failed` tells of a stream that ended with an error after its 200.
    `key` is the digest of the API key, if keys are needed.
    """

    id: str
    headers: dict[str, str]
    started: float = field(default_factory=time.monotonic)
    failed: bool = False
    key: bytes | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


CONTEXT = web.RequestKey("context", RequestContext)
