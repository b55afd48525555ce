"""Answers a batch: every line goes through the server's own routes, over a socket that nobody else can reach.

So a line's answer is what the same body gets over HTTP: the same checks, defaults, errors and JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from jaxllama.errors import EngineStoppedError
from jaxllama_serving.batch.files import InputFile, Line, LineError, OutputFile
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.context import IGNORED_HEADER
from jaxllama_serving.http.events import to_json
from jaxllama_serving.process.inside import inside_session

if TYPE_CHECKING:
    from jaxllama import Llama
    from jaxllama.system.progress import Advance

IGNORED = "ignored"
"""What an answer has beside its body where the request's had fields that mean nothing here: their paths."""
_JSON = {"Content-Type": "application/json"}


@dataclass
class Counts:
    """Lines answered in this run: in all, with an error, and with fields that mean nothing here."""

    lines: int = 0
    errors: int = 0
    ignored: int = 0


async def run_batch(
    llama: Llama, config: ServerConfig, source: InputFile, output: OutputFile, num_at_once: int, advance: Advance
) -> Counts:
    """Appends the answer of every line of `source` that `output` lacks, working on `num_at_once` lines together.

    Raises: EngineStoppedError when the engine has failed (lines without an answer stay without), BatchError, OSError.
    """
    counts = Counts()
    todo = (line for line in source.lines if line.id not in output.done)
    answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def work(session: aiohttp.ClientSession) -> None:
        for line in todo:
            await answers.put(await _answer(session, llama, source, line))

    async def write() -> None:
        while batch := await _take(answers):
            # One write and one fsync for all that came while the last went to the disk.
            await asyncio.to_thread(output.append, batch)
            for answer in batch:
                counts.lines += 1
                counts.errors += _has_failed(answer)
                counts.ignored += IGNORED in (answer["response"] or {})
                advance(items=1, tokens=_num_tokens(answer))

    async with inside_session(llama, config) as session, _raising_one(), asyncio.TaskGroup() as writers:
        writers.create_task(write())
        async with asyncio.TaskGroup() as workers:
            for _ in range(num_at_once):
                workers.create_task(work(session))
        await answers.put(None)
    return counts


async def _take(answers: asyncio.Queue[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Waits for an answer and returns all there are; none at the end."""
    taken = [await answers.get()]
    while not answers.empty():
        taken.append(answers.get_nowait())
    if taken[-1] is None and len(taken) > 1:
        answers.put_nowait(taken.pop())
    return [answer for answer in taken if answer is not None]


@asynccontextmanager
async def _raising_one() -> AsyncIterator[None]:
    """A task group's first exception instead of its group."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise next(_leaves(group)) from None


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


async def _answer(session: aiohttp.ClientSession, llama: Llama, source: InputFile, line: Line) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": line.id, "custom_id": line.custom_id, "response": None, "error": None}
    try:
        request = source.read(line)
    except LineError as error:
        message = f"line {line.number}: {error}"
        return {**answer, "error": {"code": "invalid_line", "message": message, "line": line.number}}
    async with session.post(request["url"], data=to_json(request["body"]), headers=_JSON) as response:
        body = await response.json()
        reason = llama.engine.health()
        if response.status >= 500 and reason is not None:
            raise EngineStoppedError(f"{reason}. Run the same command again to answer the lines that are left")
        ignored = response.headers.get(IGNORED_HEADER)
        found = {
            "status_code": response.status,
            "request_id": response.headers["X-Request-Id"],
            **({IGNORED: ignored} if ignored is not None else {}),
            "body": body,
        }
        return {**answer, "response": found}


def _has_failed(answer: Mapping[str, Any]) -> bool:
    return answer["response"] is None or answer["response"]["status_code"] != 200


def _num_tokens(answer: Mapping[str, Any]) -> int:
    return 0 if _has_failed(answer) else int(answer["response"]["body"]["usage"]["completion_tokens"])
