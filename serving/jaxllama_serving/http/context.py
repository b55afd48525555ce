"""What one request carries from the outermost middleware to its handler and back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiohttp import web

from jaxllama_serving.protocol.base import name_fields

IGNORED_HEADER = "X-Jaxllama-Ignored"


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
    num_ignored_fields: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    def ignore(self, fields: Sequence[str]) -> None:
        """Has the answer name the paths of fields that mean nothing here."""
        self.num_ignored_fields = len(fields)
        if fields:
            self.headers[IGNORED_HEADER] = name_fields(fields)


CONTEXT = web.RequestKey("context", RequestContext)
