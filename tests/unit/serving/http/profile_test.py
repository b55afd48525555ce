"""`POST /admin/profile`: traces for those who have a key, one at a time, where the server's flag allows it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from jaxllama_serving.config import ServerConfig, ServerConfigError
from jaxllama_serving.process import cli
from jaxllama_serving.protocol import responses
from unit.serving.fakes import FakeLlama
from unit.serving.live import run, serving
from unit.serving.server_test import parse

from jaxllama.system import profile

KEY = {"Authorization": "Bearer sk-one"}
PATH = "/admin/profile"


class FakeTrace:
    """Stands in for JAX's profiler, which is the process's: writes a file, and says when it began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began = threading.Event()
        self.folder = Path()
        monkeypatch.setattr("jax.profiler.start_trace", self.start)
        monkeypatch.setattr("jax.profiler.stop_trace", self.stop)

    def start(self, folder: Path, *, profiler_options: object) -> None:
        self.folder = folder
        self.began.set()

    def stop(self) -> None:
        (self.folder / "trace").write_bytes(b"x" * 9)
        self.began.clear()


def test_it_is_off_by_default_and_needs_keys(tmp_path):
    async def test():
        async with serving(FakeLlama(), api_keys=("sk-one",)) as live:
            status, answer, _ = await live.post(path=PATH, json={}, headers=KEY)
            assert (status, answer["error"]["code"]) == (404, "profiles_off")
            assert "--profile-dir" in answer["error"]["message"]

    run(test())
    with pytest.raises(ServerConfigError, match="profile_dir needs API keys"):
        ServerConfig(("default",), profile_dir=tmp_path)
    assert cli.make_config(parse("ckpt", "--profile-dir", str(tmp_path)), "k").profile_dir == tmp_path


def test_one_trace_at_a_time_and_the_answer_names_its_folder(tmp_path, monkeypatch):
    trace = FakeTrace(monkeypatch)

    async def test():
        async with serving(FakeLlama(), api_keys=("sk-one",), profile_dir=tmp_path / "traces") as live:
            assert (await live.post(path=PATH, json={}))[0] == 401
            assert not trace.began.is_set()
            for seconds in (0, 61, "1", True):
                status, answer, _ = await live.post(path=PATH, json={"seconds": seconds}, headers=KEY)
                assert (status, answer["error"]["param"]) == (400, "seconds")
            first = asyncio.create_task(live.post(path=PATH, json={"seconds": 60}, headers=KEY))
            assert await asyncio.to_thread(trace.began.wait, 10)
            status, answer, _ = await live.post(path=PATH, json={"seconds": 0.1}, headers=KEY)
            assert (status, answer["error"]["code"]) == (409, "profile_running")
            assert (await live.post(headers=KEY, json={"model": "default", "messages": []}))[0] == 400, "others go on"
            live.service.profiler.stop()
            return await first

    status, answer, _ = run(test())
    assert status == 200
    found = responses.Profile.model_validate(answer)
    assert Path(found.folder).parent == tmp_path / "traces"
    assert found.num_bytes == 9
    assert found.seconds < 59


def test_a_client_that_leaves_does_not_leave_the_recorder_taken(tmp_path, monkeypatch):
    trace = FakeTrace(monkeypatch)

    async def test():
        async with serving(FakeLlama(), api_keys=("sk-one",), profile_dir=tmp_path) as live:
            asking = asyncio.create_task(live.post(path=PATH, json={"seconds": 0.3}, headers=KEY))
            assert await asyncio.to_thread(trace.began.wait, 10)
            asking.cancel()
            async with asyncio.timeout(15):
                while (await live.post(path=PATH, json={"seconds": 0.1}, headers=KEY))[0] != 200:
                    await asyncio.sleep(0.05)

    run(test())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_real_trace_shows_what_is_annotated(tmp_path):
    """By JAX's own profiler, in this process."""
    import jax
    import jax.numpy as jnp

    done = threading.Event()

    def work() -> None:
        while not done.wait(0.01):
            with jax.profiler.TraceAnnotation("decode of 3 rows"):
                jnp.ones(7).block_until_ready()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        trace = profile.Profiler(tmp_path).record(0.5)
    finally:
        done.set()
        thread.join(60)
    assert trace is not None
    (path,) = trace.folder.rglob("*.xplane.pb")
    assert b"decode of 3 rows" in path.read_bytes()
    assert trace.num_bytes >= path.stat().st_size
