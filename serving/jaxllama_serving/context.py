"""What one request carries from the outermost middleware to its handler and back."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web


@dataclass
class RequestContext:
    """The request's id, the headers of its response (a stream must send them itself), and its tokens for the log."""

    id: str
    headers: dict[str, str]
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


CONTEXT = web.RequestKey("context", RequestContext)
