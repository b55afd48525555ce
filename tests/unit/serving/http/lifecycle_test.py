"""Every request ends: clients that leave, stall or dawdle, servers that drain, and limits that hold."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from unit.serving.fakes import FakeLlama
from unit.serving.live import CHAT, body, run, serving, until


def request_bytes(**fields):
    payload = json.dumps(body(**fields)).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_rows_at_once(stream, n):
    llama = FakeLlama(repeats=True, delay_s=0.01)

    async def test():
        async with serving(llama) as live:
            reader, writer = await asyncio.open_connection(live.host, live.port)
            writer.write(request_bytes(stream=stream, n=n))
            await until(lambda: llama.engine.num_running == n)
            if stream:
                await reader.readuntil(b"data: ")
            writer.close()
            await until(lambda: llama.engine.num_running == 0, 1.0)
            await until(lambda: live.service.requests.num == 0, 1.0)
            assert (await live.get("/ready"))[0] == 200

    run(test())


def test_a_client_that_leaves_while_it_waits_for_the_first_token_frees_its_row():
    llama = FakeLlama(first_delay_s=30)

    async def test():
        async with serving(llama) as live:
            _, writer = await asyncio.open_connection(live.host, live.port)
            writer.write(request_bytes(stream=True))
            await until(lambda: llama.engine.num_running == 1)
            writer.close()
            await until(lambda: llama.engine.num_running == 0, 1.0)

    run(test())


async def _stall(llama, **config):
    """Opens a stream, reads nothing of it, and waits until the server has given it up."""
    async with serving(llama, **config) as live:
        sock = socket.create_connection((live.host, live.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            sock.sendall(request_bytes(stream=True))
            await until(lambda: llama.engine.num_running == 1)
            await until(lambda: llama.engine.num_running == 0, 8.0)
            await until(lambda: live.service.requests.num == 0, 2.0)
            assert (await live.get("/ready"))[0] == 200
        finally:
            sock.close()


def test_a_reader_that_stalls_is_dropped_when_its_buffer_is_full():
    run(_stall(FakeLlama(["x" * 50_000], repeats=True, delay_s=0.001), max_stream_tokens=50))


def test_a_reader_that_stalls_is_dropped_after_a_while():
    run(
        _stall(FakeLlama(["x" * 50_000], repeats=True, delay_s=0.005), write_timeout_s=0.3, max_stream_tokens=1_000_000)
    )


def test_draining_finishes_what_runs_and_refuses_the_rest():
    llama = FakeLlama(["a"] * 20, delay_s=0.02)

    async def test():
        async with serving(llama) as live:
            running = [asyncio.create_task(live.events()), asyncio.create_task(live.post())]
            await until(lambda: llama.engine.num_running == 2)
            draining = asyncio.create_task(live.service.drain(10.0))
            await asyncio.sleep(0.05)
            status, _, headers = await live.post()
            assert (status, "Retry-After" in headers) == (503, True)
            assert (await live.get("/ready"))[0] == 503
            assert await draining == 0
            events, (status, answer, _) = await asyncio.gather(*running)
            assert events[-1] == "[DONE]"
            assert (status, answer["choices"][0]["message"]["content"]) == (200, "a" * 20)

    run(test())


def test_the_drain_deadline_ends_what_still_runs():
    llama = FakeLlama(repeats=True, delay_s=0.01)

    async def test():
        async with serving(llama) as live:
            running = [asyncio.create_task(live.events()), asyncio.create_task(live.post())]
            await until(lambda: llama.engine.num_running == 2)
            assert await live.service.drain(0.1) == 2
            events, (status, answer, _) = await asyncio.gather(*running)
            assert events[-1]["error"]["type"] == "service_unavailable"
            assert (status, answer["error"]["type"]) == (503, "service_unavailable")
            await until(lambda: llama.engine.num_running == 0)

    run(test())


def test_a_slow_head_is_408():
    async def test():
        async with serving(FakeLlama(), header_timeout_s=0.3) as live:
            reader, writer = await asyncio.open_connection(live.host, live.port)
            for piece in (b"GET /hea", b"lth HTTP/1.1\r\n", b"Host"):
                writer.write(piece)
                await asyncio.sleep(0.07)
            answer = await asyncio.wait_for(reader.read(), 30)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"type": "timeout"' in answer
            writer.close()

    run(test())


def test_a_head_is_not_slow_because_its_connection_is_old():
    async def test():
        async with serving(FakeLlama(), header_timeout_s=1) as live:
            reader, writer = await asyncio.open_connection(live.host, live.port)
            for _ in range(3):
                writer.write(b"GET /health HTTP/1.1\r\n")
                await asyncio.sleep(0.3)
                writer.write(b"Host: x\r\n\r\n")
                assert b"200 OK" in await reader.readuntil(b"}")
                await asyncio.sleep(0.2)
            writer.close()

    run(test())


def test_an_idle_connection_is_closed():
    async def test():
        async with serving(FakeLlama(), idle_timeout_s=0.2) as live:
            reader, writer = await asyncio.open_connection(live.host, live.port)
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()

    run(test())


def test_a_slow_body_is_408():
    async def test():
        async with serving(FakeLlama(), body_timeout_s=0.2) as live:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
            status, headers, answer = await live.raw(head.encode())
            assert (status, answer["error"]["type"], headers["connection"]) == (408, "timeout", "close")

    run(test())


def test_connections_are_capped():
    async def test():
        async with serving(FakeLlama(), max_connections=3) as live:
            held = [await asyncio.open_connection(live.host, live.port) for _ in range(3)]
            await asyncio.sleep(0.05)
            reader, writer = await asyncio.open_connection(live.host, live.port)
            answer = await asyncio.wait_for(reader.read(), 30)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After" in answer
            writer.close()
            for _, other in held:
                other.close()
            await asyncio.sleep(0.1)
            assert (await live.get("/health"))[0] == 200

    run(test())


def test_many_streams_at_once_do_not_mix():
    async def test():
        llama = FakeLlama(delay_s=0.001)
        llama.set_scripts(*[[f"<{i}>"] * 20 for i in range(32)])
        async with serving(llama) as live:
            streams = await asyncio.gather(*(live.events() for _ in range(32)))
            texts = set()
            for events in streams:
                texts.add("".join(c["choices"][0]["delta"].get("content", "") for c in events[:-1]))
            assert texts == {f"<{i}>" * 20 for i in range(32)}

    run(test())


def test_pipelined_requests_are_answered_in_order():
    async def test():
        async with serving(FakeLlama(["ok"])) as live:
            reader, writer = await asyncio.open_connection(live.host, live.port)
            writer.write(request_bytes() * 3)
            for _ in range(3):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                assert json.loads(await reader.readexactly(length))["choices"][0]["message"]["content"] == "ok"
            writer.close()

    run(test())
