"""The few calls that the clients make: the model's name, and a chat answer as a stream of events."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from jaxllama.errors import JaxLlamaError

_MAX_EVENT_BYTES = 16 * 2**20
_MAX_QUOTED = 300


class ClientError(JaxLlamaError):
    """A server cannot be reached, refuses a request, or ends an answer with an error.

    **What to do:** check the address (`http://HOST:PORT`, with `/v1` or without), that the server runs (`/health`), and
    the key (`--api-key` or `OPENAI_API_KEY`). The message has what the server itself said.
    """


@dataclass(frozen=True)
class Endpoint:
    """A server's base address, up to the part before `/chat/completions`, and the key to send."""

    url: str
    key: str | None = None

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Endpoint:
        """Reads `http://HOST:PORT`, to which `/v1` is added, or an address with a path, which is taken as it is.

        `key` None is `OPENAI_API_KEY`'s.

        Raises: ClientError for anything that is no http address.
        """
        base = url.rstrip("/").removesuffix("/chat/completions")
        scheme, _, rest = base.partition("://")
        if scheme not in ("http", "https") or not rest or rest.startswith("/"):
            raise ClientError(f"{url!r} is not the address of a server; expected http://HOST:PORT or https://…/v1")
        has_path = "/" in rest
        return cls(base if has_path else f"{base}/v1", key or os.environ.get("OPENAI_API_KEY"))

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    async def model(self, session: aiohttp.ClientSession) -> str:
        """The first model that the server names.

        Raises: ClientError.
        """
        try:
            async with session.get(f"{self.url}/models", headers=self.headers) as response:
                if response.status != 200:
                    raise ClientError(f"{self.url}/models: {await _explain(response)}")
                models = (await response.json())["data"]
                return str(models[0]["id"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClientError(f"{self.url}: cannot be reached ({_name(error)}). Is the server running?") from None
        except (ValueError, LookupError, TypeError):
            raise ClientError(f"{self.url}/models: the answer names no model. Give one with --model") from None

    async def chat(self, session: aiohttp.ClientSession, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Sends a chat request with `stream: true` and yields its chunks as they come.

        Raises: ClientError for a refusal, an error in the stream, or a stream that ends before `[DONE]`.
        """
        is_whole = False
        try:
            request = session.post(f"{self.url}/chat/completions", json={**body, "stream": True}, headers=self.headers)
            async with request as response:
                if response.status != 200:
                    raise ClientError(await _explain(response))
                async for data in _events(response.content):
                    if data == b"[DONE]":
                        is_whole = True
                        break
                    chunk = _parse(data)
                    if "error" in chunk:
                        raise ClientError(_message(chunk) or "the stream ended with an error")
                    yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClientError(f"{self.url}: the connection failed ({_name(error)})") from None
        if not is_whole:
            raise ClientError("the stream ended before [DONE]")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event. Source: WHATWG HTML, section 9.2.6."""
    data: list[bytes] = []
    num_bytes = 0
    pending = b""
    async for part in content.iter_any():
        *lines, pending = (pending + part).split(b"\n")
        if len(pending) + num_bytes > _MAX_EVENT_BYTES:
            raise ClientError(f"the server sent an event of more than {_MAX_EVENT_BYTES >> 20} MiB")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
                num_bytes += len(line)
            elif not line and data:
                yield b"\n".join(data)
                data, num_bytes = [], 0


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ClientError(f"the server sent an event that is no JSON object: {data[:80]!r}")
    return value


async def _explain(response: aiohttp.ClientResponse) -> str:
    """A refusal in one line: the status, and the message of OpenAI's envelope where there is one."""
    text = (await response.content.read(65_536)).decode(errors="replace")
    try:
        said = _message(json.loads(text))
    except ValueError:
        said = None
    return f"{response.status} {response.reason}: {said or ' '.join(text.split())[:_MAX_QUOTED] or 'no explanation'}"


def _message(value: Any) -> str | None:
    error = value.get("error") if isinstance(value, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(said).split())[:_MAX_QUOTED] if said else None


def _name(error: BaseException) -> str:
    return " ".join(str(error).split())[:_MAX_QUOTED] or type(error).__name__
