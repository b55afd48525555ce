"""How a body is framed: what HTTP does not allow is refused, and what it allows is bounded."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from unit.serving.fakes import FakeLlama
from unit.serving.live import CHAT, body, run, serving

PAYLOAD = json.dumps(body()).encode()
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data, extension=b""):
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def coded(coding, version=b"1.1"):
    return HEAD.replace(b"1.1", version) + b"Transfer-Encoding: " + coding + b"\r\n\r\n" + chunk(PAYLOAD) + END


def one_by_one(extension):
    return b"".join(chunk(PAYLOAD[i : i + 1], extension) for i in range(len(PAYLOAD)))


TRAILERS = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 1000) for i in range(64))
CASES = {
    "plain": (CHUNKED + chunk(PAYLOAD) + END, 200),
    "capitals": (coded(b"Chunked"), 200),
    "a short extension": (CHUNKED + chunk(PAYLOAD, b";a=b") + END, 200),
    "a trailer": (CHUNKED + chunk(PAYLOAD) + b"0\r\nX-Sum: 1\r\n\r\n", 200),
    "a byte a chunk": (CHUNKED + one_by_one(b"") + END, 200),
    "compressed": (coded(b"gzip, chunked"), 400),
    "compressed alone": (coded(b"gzip"), 400),
    "compressed twice": (coded(b"chunked\r\nTransfer-Encoding: gzip"), 400),
    "chunked twice": (coded(b"chunked, chunked"), 400),
    "chunked before another": (coded(b"chunked, identity"), 400),
    "identity": (coded(b"identity"), 400),
    "nothing": (coded(b""), 400),
    "chunked and a length": (coded(b"chunked\r\nContent-Length: 5"), 400),
    "chunked of HTTP/1.0": (coded(b"chunked", b"1.0"), 400),
    "a folded header": (HEAD + b"X-A: 1\r\n 2\r\nContent-Length: %d\r\n\r\n" % len(PAYLOAD) + PAYLOAD, 400),
    "a length in a trailer": (CHUNKED + chunk(PAYLOAD) + b"0\r\nContent-Length: 1\r\n\r\n", 400),
    "a signed length": (HEAD + b"Content-Length: +%d\r\n\r\n" % len(PAYLOAD) + PAYLOAD, 400),
    "an extension of 64 KB": (CHUNKED + chunk(PAYLOAD, b";a=" + b"b" * 65_536) + END, 413),
    "an extension of 8 KB": (CHUNKED + chunk(PAYLOAD, b";a=" + b"b" * 8192) + END, 413),
    "an extension of the last chunk": (CHUNKED + chunk(PAYLOAD) + b"0;" + b"b" * 65_536 + b"\r\n\r\n", 413),
    "many extensions": (CHUNKED + one_by_one(b";" + b"x" * 150) + END, 413),
    "a padded size": (CHUNKED + b"0" * 65_536 + chunk(PAYLOAD) + END, 413),
    "trailers of 64 KB": (CHUNKED + chunk(PAYLOAD) + b"0\r\n" + TRAILERS + b"\r\n", 413),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("read_bytes", [1 << 20, 700])
def test_the_framing_of_a_body_is_checked_and_bounded(name, read_bytes):
    data, status = CASES[name]

    async def test():
        async with serving(FakeLlama(["ok"])) as live:
            reader, writer = await asyncio.open_connection(live.host, live.port)
            answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
            for i in range(0, len(data), read_bytes):
                if answer.done():
                    break
                writer.write(data[i : i + read_bytes])
                await asyncio.sleep(0 if i else 0.02)
            head = await asyncio.wait_for(answer, 30)
            assert int(head.split()[1]) == status, head
            if status == 200:
                # The connection is unharmed.
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                writer.write(CHUNKED + chunk(PAYLOAD) + END)
                assert b" 200 " in (await reader.readuntil(b"\r\n\r\n"))[:20]
            writer.close()

    run(test())


def test_an_extension_without_an_end_is_refused_at_once():
    async def test():
        async with serving(FakeLlama()) as live:
            reader, writer = await asyncio.open_connection(live.host, live.port)
            writer.write(CHUNKED + b"5;" + b"x" * 10_000)
            started = time.monotonic()
            assert b" 413 " in (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30))[:20]
            assert time.monotonic() - started < 15
            writer.close()

    run(test())


def test_megabytes_in_small_honest_chunks_pass():
    text = "x" * 3_000_000
    payload = json.dumps(body(messages=[{"role": "user", "content": text}])).encode()
    chunks = b"".join(chunk(payload[i : i + 500]) for i in range(0, len(payload), 500))

    async def test():
        async with serving(FakeLlama(max_context=4_000_000)) as live:
            status, _, _ = await live.raw(CHUNKED + chunks + END, wait_s=15.0)
            assert status == 200

    run(test())


def test_a_connection_that_says_nothing_is_closed_within_a_minute():
    async def test():
        async with serving(FakeLlama()) as live:
            assert live.service.config.idle_timeout_s < 60
        # The same timer ends a silence before the first request and one after an answer.
        async with serving(FakeLlama(), idle_timeout_s=0.3) as live:
            for said in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
                reader, writer = await asyncio.open_connection(live.host, live.port)
                writer.write(said)
                assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.1 200" if said else b"")
                writer.close()

    run(test())
