"""A device that hangs is named; one that is busy, slow, compiling or stopped with its process is not."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from collector import Collector, run, wait_until
from processes import Process, free_port

from jaxllama import SamplingParams
from jaxllama.decode.steps import decode_steps
from jaxllama.errors import EngineStoppedError, LockstepError
from jaxllama.hosts import watch
from jaxllama.hosts.watch import DeviceWatch

TIMEOUT_S = 60.0
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)


def mesh_of(platform: str = "tpu") -> Any:
    kind = {"process_index": 0, "platform": platform, "device_kind": "TPU v6 lite"}
    return SimpleNamespace(devices=np.array([SimpleNamespace(**kind, id=i) for i in range(2)]))


def make(platform: str = "tpu", group: Any = None) -> DeviceWatch:
    made = DeviceWatch(mesh_of(platform), 0.3, group)
    with made.waiting():  # The first wait may be long.
        pass
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_TICK_S", 0.02)
    monkeypatch.setattr(watch, "_ANSWER_S", 0.2)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Numbers of devices that do not answer."""
    found: set[int] = set()
    release = threading.Event()

    def echo(_: Any, number: int) -> int:
        if number in found:
            release.wait(TIMEOUT_S)
        return number

    monkeypatch.setattr(watch, "echo", echo)
    yield found
    release.set()


def hang_in(made: DeviceWatch, **how: Any) -> str:
    with made.waiting(**how):
        assert wait_until(lambda: made.hang is not None, TIMEOUT_S)
        text = made.hang
    assert made.hang is None, "a device that answers after all is well"
    made.close()
    return text or ""


def test_a_device_that_does_not_answer_is_named_with_its_host(silent):
    silent.add(1)
    text = hang_in(make())
    assert text.startswith(f"device 1 (TPU v6 lite) does not answer, on host {socket.gethostname()}, process 0")


def test_devices_that_answer_but_never_finish_are_named_all(silent):
    assert "devices 0, 1 (TPU v6 lite) have not finished a program but still answer" in hang_in(make(), may_work=True)


def test_another_process_s_device_is_named(silent):
    asked: list[str] = []

    def ask(topic: str) -> list[bytes]:
        asked.append(topic)
        return [b"", b"device 5 (TPU v6 lite) does not answer, on host b, process 2 (pid 3)"]

    text = hang_in(make(group=SimpleNamespace(ask=ask)))
    assert text.startswith(
        "device 5 (TPU v6 lite) does not answer, on host b, process 2 (pid 3); the engine has waited"
    )
    assert asked == ["devices"]


@pytest.mark.parametrize("end", ["silent", "lost"])
def test_processes_that_say_nothing_hold_the_verdict_up_no_longer(silent, end):
    release = threading.Event()

    def ask(_: str) -> list[bytes]:
        if end == "lost":
            raise LockstepError("process 1 cannot be reached")
        release.wait(TIMEOUT_S)
        return []

    try:
        assert "have not finished" in hang_in(make(group=SimpleNamespace(ask=ask)))
    finally:
        release.set()


def test_what_is_asked_is_what_comes_back():
    devices = jax.devices()[:3]
    assert [watch.echo(device, number) for number, device in enumerate(devices)] == [0, 1, 2]
    assert watch.answers(devices, TIMEOUT_S) == ""


def test_a_wait_may_take_four_times_the_longest_and_the_first_ten_minutes(monkeypatch):
    now = 0.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now, process_time=time.process_time))
    monkeypatch.setattr(DeviceWatch, "_watch", lambda self: None)
    made = DeviceWatch(mesh_of(), 20.0)
    assert made.patience_s() == 600, "a first step of a minute is no hang"
    with made.waiting():
        now = 2.0
    assert made.patience_s() == 20
    with made.waiting():
        now = 62.0
    assert made.patience_s() == 240


@pytest.mark.parametrize(("platform", "may_work"), [("cpu", False), ("tpu", True)])
def test_a_process_at_work_is_not_a_hang(monkeypatch, silent, platform, may_work):
    """A CPU's long program, or a compilation: as much of the process's time passes as of the clock's."""
    silent.add(0)
    clock = SimpleNamespace(monotonic=time.monotonic, process_time=time.monotonic)
    made = make(platform)
    monkeypatch.setattr(watch, "time", clock)
    with made.waiting(may_work=may_work):
        time.sleep(1.5)
        assert made.hang is None
    made.close()


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch, silent):
    silent.add(0)
    skipped = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + skipped, process_time=lambda: 0.0)
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(DeviceWatch, "patience_s", lambda self: 100.0)
    made = make()
    with made.waiting():
        time.sleep(0.2)
        skipped = 10_000.0
        time.sleep(0.5)
        assert made.hang is None
    made.close()


def test_an_engine_names_its_device_and_goes_on_when_it_answers(monkeypatch):
    """A step that does not return, in a program of the device's own."""
    release = threading.Event()

    def hold(value: np.ndarray) -> np.ndarray:
        release.wait(TIMEOUT_S)
        return value

    held = jax.jit(lambda x: jax.pure_callback(hold, jax.ShapeDtypeStruct((), jnp.int32), x))

    def hang(*args: Any, **options: Any) -> Any:
        state, output = decode_steps(*args, **options)
        return state, output._replace(num_steps=held(output.num_steps))

    with tiny.make_llama(options=dataclasses.replace(tiny.SMALL, device_timeout_s=0.3)) as llama:
        engine = llama.engine
        run(engine, tiny.prompt_of("divisible", 3), GREEDY)
        monkeypatch.setattr("jaxllama.engine.device.decode_steps", hang)
        caller = Collector(engine, tiny.prompt_of("divisible", 3), GREEDY)
        assert wait_until(lambda: engine.stats().device_hangs, TIMEOUT_S)
        assert f"(cpu) has not finished a program but still answers, on host {socket.gethostname()}" in engine.health()
        assert not engine.stats().ready
        release.set()
        caller.wait()
        assert wait_until(lambda: engine.health() is None)
        monkeypatch.undo()
        run(engine, tiny.prompt_of("divisible", 3), GREEDY)


def test_an_engine_that_is_given_up_fails_every_caller():
    release, is_held = threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        is_held.set()
        release.wait(TIMEOUT_S)

    with tiny.make_llama() as llama:
        engine = llama.engine
        engine.submit([1], GREEDY, hold)
        assert is_held.wait(TIMEOUT_S)
        callers = [Collector(engine, tiny.prompt_of("divisible", 9), GREEDY) for _ in range(3)]
        giving_up = threading.Thread(target=engine.give_up, args=("device 7 does not answer",))
        giving_up.start()
        assert wait_until(lambda: "device 7 does not answer" in (engine.health() or ""))
        release.set()
        giving_up.join(TIMEOUT_S)
        for caller in callers:
            assert "device 7 does not answer" in str(caller.wait().error)
        with pytest.raises(EngineStoppedError, match="device 7"):
            engine.submit([1], GREEDY, pytest.fail)


SERVER = """
import os, sys, time
from pathlib import Path
from jaxllama import __main__ as cli
from jaxllama.engine import device
from jaxllama.hosts import watch

flag, process_id, *arguments = sys.argv[1:]
watch.DeviceWatch.patience_s = lambda self: 1.0 if Path(flag).exists() else 600.0
run, echo = device.Device.run, watch.echo

def hanging_run(self, call):
    while process_id == "1" and Path(flag).exists():
        time.sleep(0.1)
    return run(self, call)

def hanging_echo(device, number):
    while process_id == "1" and number == 1:
        time.sleep(0.1)
    return echo(device, number)

device.Device.run, watch.echo = hanging_run, hanging_echo
sys.exit(cli.main(arguments))
"""


def test_of_many_hosts_the_one_whose_device_hangs_is_named_and_all_end_with_code_1(tmp_path, request):
    """Process 1 beats, but what it is told to run never begins, and its second device does not answer."""
    model = tiny.write_checkpoint(tmp_path / "model", "divisible", max_position_embeddings=128, num_hidden_layers=1)
    address, port, flag = f"127.0.0.1:{free_port()}", free_port(), tmp_path / "hang"
    command = ["serve", model, "--served-model-name", "default", "--max-rows", 2, "--port", port]
    command += [
        "--compilation-cache",
        request.config.cache.mkdir("xla-many-hosts"),
        "--exit-on-device-hang",
        "--coordinator",
        address,
        "--num-processes",
        2,
        "--process-id",
    ]
    processes = [Process(tmp_path, f"{i}", "-c", SERVER, flag, i, *command, i) for i in range(2)]
    try:
        processes[0].wait_for("Ready in")
        Path(flag).touch()
        body = json.dumps({"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, timeout=TIMEOUT_S):
            pass
        assert refused.value.code == 503
        refused.value.close()
        named = "(cpu) does not answer, on host "
        processes[0].wait_for(named, TIMEOUT_S)
        assert [process.code(TIMEOUT_S) for process in processes] == [1, 1], processes[0].text
        for process in processes:
            assert "process 1 (pid" in process.text.partition(named)[2].partition("\n")[0], process.text
    finally:
        for process in processes:
            process.end()
