"""Many hosts, as processes of this machine: the tokens of one process, and a lost process is named and ends all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import shutil
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from collector import Collector, held
from processes import START_TIMEOUT_S, Process, free_port

from jaxllama import Engine, SamplingParams
from jaxllama.decode.state import row_state
from jaxllama.engine.calls import CALLS, Decode, ForgetPages, Insert, RestorePages, SavePages, SetPageTable
from jaxllama.engine.device import Device
from jaxllama.errors import ConfigError, LockstepError
from jaxllama.hosts import group as distributed
from jaxllama.hosts import link
from jaxllama.hosts.group import join
from jaxllama.hosts.lockstep import check_processes, follow, from_bytes, to_bytes
from jaxllama.weights.arrays import chunks as zarr

REQUEST_TIMEOUT_S = 240.0
NAMED_WITHIN_S = 15.0
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 40},
    {"temperature": 1, "seed": 1, "max_tokens": 40, "n": 3},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "seed": 2, "max_tokens": 30, "presence_penalty": 1},
    {"temperature": 0.7, "min_p": 0.02, "seed": 3, "repetition_penalty": 1.2, "logit_bias": {"65": 5}},
    {"temperature": 2, "seed": 4, "structured_outputs": {"regex": "[a-z]{9}é"}},
]


# ---- Calls as bytes ----


KINDS: dict[str, type] = {kind.__name__: kind for kind in CALLS}
TABLE = to_bytes(SetPageTable(np.zeros(4, np.int32)))


def test_a_call_survives_its_bytes():
    config = tiny.config_of("divisible")
    row = row_state(config, SamplingParams(seed=1), prompt=[1, 2], generated=[3], remaining=4, seed=2**40)
    calls: list[tuple[Any, ...]] = [
        Insert(np.int32(-3), row),
        Decode(np.int32(1), np.array([True, False]), np.int32(2)),
        SetPageTable(np.zeros((0, 4), np.int32)),
    ]
    for call in calls:
        got = from_bytes(to_bytes(call), KINDS)
        assert type(got) is type(call)
        assert jax.tree.structure(got) == jax.tree.structure(call)
        for array, want in zip(jax.tree.leaves(got), jax.tree.leaves(call), strict=True):
            assert (array.shape, array.dtype) == (np.shape(want), np.asarray(want).dtype)
            assert np.array_equal(array, want)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0\0\0\2{}",
        b"\0\0\0\xff[]",
        TABLE[:-1],
        TABLE + b"x",
        TABLE.replace(b"int32", b"int99"),
        TABLE.replace(b"[4]", b"[-]"),
    ],
)
def test_bytes_that_are_no_call_are_refused(message: bytes):
    with pytest.raises(LockstepError, match="process 0 sent"):
        from_bytes(message, KINDS)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({}, "asks for 'SetPageTable', which this version does not know"),
        ({"SetPageTable": Decode}, "1 arrays, which are too few"),
        ({"SetPageTable": tuple}, "1 arrays, which are too many"),
    ],
)
def test_a_call_of_another_version_is_refused(kinds: dict[str, type], said: str):
    with pytest.raises(LockstepError, match=said):
        from_bytes(TABLE, kinds)


def test_a_follower_holds_the_same_bits_when_rows_were_set_aside():
    """Every call of an engine with few pages and two shards, made again on other devices from their bytes."""
    messages: list[bytes] = []
    leader: Any = SimpleNamespace(
        num_processes=1, is_leader=True, publish=messages.append, on_failure=lambda _: None, close=lambda: None
    )
    options = dataclasses.replace(tiny.SMALL, num_pages=26)
    params = SamplingParams(seed=1, ignore_eos=True, max_tokens=60)
    with tiny.make_llama(tp=8, options=options) as llama:
        config, mesh = llama.config, llama.mesh
        engine = Engine(config, llama.params, mesh, options, leader)
        with held(engine):
            done = [Collector(engine, tiny.prompt_of("divisible", 20, seed=i), params) for i in range(5)]
            cancelled = Collector(engine, tiny.prompt_of("divisible", 20, seed=9), params)
        done[0].wait()
        cancelled.request.cancel()
        assert [collector.wait().finish_reason for collector in done] == ["length"] * 5
        engine.close()
        kinds = [type(from_bytes(message, KINDS)) for message in messages]
        assert kinds.count(SavePages) == kinds.count(RestorePages) + kinds.count(ForgetPages) >= 2
        follower = Device(config, llama.params, mesh, engine._shapes, engine.platform)
        group: Any = SimpleNamespace(is_leader=False, messages=lambda: iter(messages))
        follow(follower.run, CALLS, group)
        pair = (engine._device, follower)
        for got, want in zip(*(jax.tree.leaves(device._get_state()) for device in pair), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
        assert not engine._device._saved
        assert not follower._saved


# ---- Who takes part ----


def test_a_mesh_has_devices_of_every_process_of_the_group():
    def mesh(*process_ids: int) -> Any:
        return SimpleNamespace(devices=np.array([SimpleNamespace(process_index=i) for i in process_ids]))

    two: Any = SimpleNamespace(num_processes=2)
    check_processes(mesh(0, 0), None)
    check_processes(mesh(0, 0, 1, 1), two)
    with pytest.raises(ConfigError, match=r"spans 2 processes\. Give their group"):
        check_processes(mesh(0, 1), None)
    with pytest.raises(ConfigError, match="2 devices spans 1 of 2 processes"):
        check_processes(mesh(0, 0), two)


@pytest.mark.parametrize(("num_processes", "process_id"), [(1, 0), (2, 2), (2, -1)])
def test_a_process_id_out_of_range_is_refused(num_processes: int, process_id: int):
    with pytest.raises(ConfigError, match=f"process_id={process_id}"):
        join("127.0.0.1:9", num_processes=num_processes, process_id=process_id)


def test_a_coordinator_that_is_unknown_or_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LockstepError, match=f"process 0 cannot listen at {address}: .*in use"):
            join(address, num_processes=2, process_id=0)
    with pytest.raises(LockstepError, match=r"'no-such-host.invalid' is not known"):
        join("no-such-host.invalid:8492", num_processes=2, process_id=0)


def test_who_died_before_all_were_there_may_come_again(capsys: pytest.CaptureFixture[str]):
    port = free_port()
    errors: list[LockstepError] = []

    def lead() -> None:
        try:
            join(f"127.0.0.1:{port}", num_processes=3, process_id=0, join_timeout_s=3)
        except LockstepError as error:
            errors.append(error)

    def say_hello() -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        hello = {"process_id": 1, "num_processes": 3, "name": "process 1", "settings": {"jax": jax.__version__}}
        payload = json.dumps(hello).encode()
        sock.sendall(struct.pack("!BI", 1, len(payload)) + payload)
        return sock

    leader = threading.Thread(target=lead)
    leader.start()
    deadline = time.monotonic() + 10
    while True:
        try:
            say_hello().close()
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
    with say_hello() as second, say_hello() as third:
        assert b"process 1 has that process id already" in third.recv(1000)
        assert b"process 2 has not joined within 3 s" in second.recv(1000)
    leader.join(10)
    assert "process 2 has not joined within 3 s" in str(errors[0])
    assert "Refused: process 1: process 1 has that process id already" in capsys.readouterr().out


# ---- One process's view of another ----


class Peer:
    """A group of two in this process, process 0 or 1, and the other end of its connection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, process_id: int) -> None:
        self.exits: list[float] = []
        self.failed = threading.Event()
        monkeypatch.setattr(distributed, "_exit_after", self.exits.append)
        here, self.sock = socket.socketpair()
        self.sock.settimeout(10)
        near = link.Link(here, 1 - process_id, f"process {1 - process_id} (host x, pid 1)")
        self.group = distributed.Group(process_id, [near], 2, 1.0, None)
        self.reasons: list[str] = []
        self.group.on_failure(self._on_failure)

    def _on_failure(self, error: LockstepError) -> None:
        self.reasons.append(str(error))
        self.failed.set()

    def send(self, kind: int, payload: bytes = b"") -> None:
        self.sock.sendall(struct.pack("!BI", kind, len(payload)) + payload)

    def wait(self, timeout_s: float = 10) -> str:
        assert self.failed.wait(timeout_s)
        time.sleep(0.2)
        assert len(self.reasons) == len(self.exits) == 1
        return self.reasons[0]


@pytest.fixture
def make_peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Peer]]:
    peers: list[Peer] = []

    def make(process_id: int) -> Peer:
        peers.append(Peer(monkeypatch, process_id))
        return peers[-1]

    yield make
    for peer in peers:
        # Or the group's threads would end the tests' process once `_exit_after` is itself again.
        peer.group._closed.set()
        peer.sock.close()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda peer: None, "process 1 (host x, pid 1) has stopped answering: nothing from it for 1 s"),
        (lambda peer: peer.sock.close(), "process 1 (host x, pid 1) is gone: its connection closed"),
        (lambda peer: peer.send(link.FAILED, b"OOM"), "process 1 (host x, pid 1) failed: OOM"),
        (lambda peer: peer.send(link.STOP), "process 1 (host x, pid 1) has left before process 0 closed"),
        (lambda peer: peer.sock.sendall(b"GET / HTTP/1.1"), "process 1 (host x, pid 1) sent what no jaxllama sends"),
    ],
    ids=["silent", "gone", "failed", "left", "nonsense"],
)
def test_process_0_names_the_process_at_fault_once(act, reason, make_peer, capsys):
    peer = make_peer(0)
    act(peer)
    assert peer.wait().startswith(reason)
    assert f"jaxllama: {reason}" in capsys.readouterr().err


def test_a_process_that_beats_is_alive_and_one_that_fails_blames_itself_last(make_peer):
    peer = make_peer(0)
    for _ in range(6):
        peer.send(link.BEAT)
        time.sleep(0.4)
    assert not peer.failed.is_set()
    # A program broke here because process 1 died, which is seen a moment later.
    failing = threading.Thread(target=peer.group.fail, args=(RuntimeError("connection reset"),), daemon=True)
    failing.start()
    time.sleep(0.1)
    peer.sock.close()
    assert peer.wait() == "process 1 (host x, pid 1) is gone: its connection closed"


def test_a_process_whose_own_program_fails_names_itself(monkeypatch, make_peer):
    monkeypatch.setattr(distributed, "_EXPLANATION_S", 0.1)
    peer = make_peer(0)
    peer.group.fail(RuntimeError("out of\nmemory"))
    assert peer.wait() == "process 0 failed: RuntimeError: out of memory"
    assert link.Link(peer.sock, 0, "").receive() == (link.FAILED, b"RuntimeError: out of memory")


def test_a_link_of_a_high_descriptor_beats_too():
    """A server of a thousand connections: `select` refuses descriptors past 1,023."""
    near, far = socket.socketpair()
    high = socket.socket(fileno=fcntl.fcntl(near.detach(), fcntl.F_DUPFD, 1500))
    with high, far:
        far.settimeout(10)
        link.Link(high, 1, "process 1").try_send(link.BEAT)
        assert link.Link(far, 0, "process 0").receive() == (link.BEAT, b"")


def test_a_link_whose_reader_is_stuck_holds_nobody_up():
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(1 << 16))
        near.setblocking(True)
        link.Link(near, 1, "process 1").try_send(link.BEAT)


def test_a_follower_takes_messages_in_order_and_process_0s_verdict(make_peer):
    peer = make_peer(1)
    for i in range(3):
        peer.send(link.MESSAGE, bytes([i]))
    messages = peer.group.messages()
    assert [next(messages) for _ in range(3)] == [b"\0", b"\1", b"\2"]
    peer.send(link.FAILED, b"process 3 (host y, pid 2) is gone: its connection closed")
    assert peer.wait() == "process 3 (host y, pid 2) is gone: its connection closed"


# ---- Processes ----


class Server(Process):
    """`jaxllama serve` in a process of its own."""

    def __init__(self, folder: Path, name: str, *flags: Any, devices: int = 2) -> None:
        self.port = free_port()
        super().__init__(folder, name, "-m", "jaxllama", "serve", *flags, "--port", self.port, devices=devices)

    def fetch(self, path: str, fields: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON."""
        data = None
        if fields is not None:
            messages = [{"role": "user", "content": "Hello"}]
            data = json.dumps({"model": "default", "messages": messages} | fields).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of many small chunks: a device's shard is files of its own. One layer: every server compiles it."""
    folder = tmp_path_factory.mktemp("lockstep") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr, "_MIN_CHUNK_BYTES", 1)
        return tiny.write_checkpoint(folder, "divisible", max_position_embeddings=128, num_hidden_layers=1)


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    """Compiled programs, kept from one run to the next."""
    folder: Path = request.config.cache.mkdir("xla-many-hosts")
    return folder


@contextlib.contextmanager
def started(model: Path, folder: Path, cache: Path, num_processes: int = 2, *flags: Any) -> Iterator[list[Server]]:
    """All processes of one server, process 0 first; ready, and ended afterwards."""
    address = f"127.0.0.1:{free_port()}"
    processes = [
        Server(folder, f"process{i}", *common(model, cache), *many(address, num_processes, i), *flags)
        for i in range(num_processes)
    ]
    try:
        processes[0].wait_for("Ready in")
        yield processes
    finally:
        for process in processes:
            process.end()


def common(model: Path, cache: Path) -> list[Any]:
    return [model, "--served-model-name", "default", "--max-rows", 2, "--compilation-cache", cache]


def many(address: str, num_processes: int, process_id: int) -> list[Any]:
    return ["--coordinator", address, "--num-processes", num_processes, "--process-id", process_id]


def answers(server: Server) -> list[tuple[str, str]]:
    """The texts of REQUESTS, which run together, with their ends."""
    results: list[Any] = [None] * len(REQUESTS)

    def ask(i: int) -> None:
        results[i] = server.fetch("/v1/chat/completions", REQUESTS[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for status, _ in results] == [200] * len(REQUESTS), results
    return [(c["message"]["content"], c["finish_reason"]) for _, answer in results for c in answer["choices"]]


def only_shards_of(model: Path, process_id: int, num_processes: int, folder: Path) -> Path:
    """A copy of `model` in which every chunk that only other processes need is NaN."""
    copy = Path(shutil.copytree(model, folder))
    num_poisoned = 0
    for array in (copy / "params").iterdir():
        if array.name.endswith("norm") or not (array / ".zarray").is_file():
            continue  # Norms are replicated: every process reads them whole.
        chunks = sorted(
            (p for p in array.iterdir() if p.name != ".zarray"), key=lambda p: [*map(int, p.name.split("."))]
        )
        assert len(chunks) >= 8
        assert len(chunks) % num_processes == 0
        mine = len(chunks) // num_processes
        for i, chunk in enumerate(chunks):
            if not process_id * mine <= i < (process_id + 1) * mine:
                chunk.write_bytes(b"\xff" * chunk.stat().st_size)
                num_poisoned += 1
    assert num_poisoned > 0
    return copy


def of_one_process(model: Path, folder: Path, cache: Path, devices: int, *flags: Any) -> list[tuple[str, str]]:
    """What one process with all the devices answers."""
    server = Server(folder, "one", *common(model, cache), "--num-processes", 1, *flags, devices=devices)
    try:
        server.wait_for("Ready in")
        return answers(server)
    finally:
        server.end()


def test_two_processes_answer_as_one_each_reading_its_own_shards(model, cache, tmp_path):
    expected = of_one_process(model, tmp_path, cache, 4)
    address = f"127.0.0.1:{free_port()}"
    processes = [
        Server(
            tmp_path,
            f"process{i}",
            *common(only_shards_of(model, i, 2, tmp_path / f"model{i}"), cache),
            *many(address, 2, i),
        )
        for i in range(2)
    ]
    try:
        processes[0].wait_for("Ready in")
        assert answers(processes[0]) == expected
        status, scored = processes[0].fetch("/v1/chat/completions", {"prompt_logprobs": 0, "max_tokens": 1})
        assert status == 200, scored
        first, *others = scored["prompt_logprobs"]
        assert first is None
        assert len(others) == scored["usage"]["prompt_tokens"] - 1
        assert all(entry["logprob"] < 0 for each in others for entry in each.values())
        # A follower's signal alone changes nothing; process 0's ends both.
        processes[1].process.send_signal(signal.SIGTERM)
        processes[1].wait_for("Process 0 decides", 60)
        assert processes[0].fetch("/ready")[0] == 200
        processes[0].process.send_signal(signal.SIGTERM)
        assert [process.code() for process in processes] == [0, 0], [process.text for process in processes]
    finally:
        for process in processes:
            process.end()


@pytest.mark.slow
def test_two_processes_with_a_group_of_devices_each_answer_as_one(model, cache, tmp_path):
    """Each prefills its own prompts, in calls that both make."""
    expected = of_one_process(model, tmp_path, cache, 4, "--data", 2)
    with started(model, tmp_path, cache, 2, "--data", 2) as processes:
        assert answers(processes[0]) == expected


def lose(processes: list[Server], lost: int, how: signal.Signals, name: str) -> float:
    """Loses a process while a request streams: the client gets an error, /health a 503, all others end and say why.

    Returns how many seconds the naming took.
    """
    leader = processes[0]
    payload = {"messages": [{"role": "user", "content": "Hello"}], "model": "default", "stream": True}
    # Longer than the context lets one request run: choices that wait keep the server busy throughout.
    payload |= {"ignore_eos": True, "n": 16, "seed": 1}
    request = urllib.request.Request(
        f"http://127.0.0.1:{leader.port}/v1/chat/completions",
        json.dumps(payload).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as stream:
        assert stream.readline().startswith(b"data: ")
        began = time.monotonic()
        processes[lost].process.send_signal(how)
        rest = stream.read().decode()
    assert "[DONE]" not in rest
    assert '"error"' in rest.splitlines()[-2] or '"error"' in rest.splitlines()[-1], rest[-500:]
    status, body = leader.fetch("/health")
    took_s = time.monotonic() - began
    assert status == 503
    assert name in body["error"]["message"]
    for i, process in enumerate(processes):
        if i != lost:
            assert process.code(NAMED_WITHIN_S - took_s) == 1
            assert name in process.text
            assert "Check failure stack trace" not in process.text
    return took_s


def test_a_killed_process_is_named_and_the_server_fails(model, cache, tmp_path):
    with started(model, tmp_path, cache) as processes:
        took_s = lose(processes, 1, signal.SIGKILL, "process 1 (host ")
        assert took_s < NAMED_WITHIN_S
        assert "is gone: its connection closed" in processes[0].text


def test_a_stopped_process_is_named_and_the_server_fails(model, cache, tmp_path):
    with started(model, tmp_path, cache, 2, "--heartbeat-timeout", 4) as processes:
        lose(processes, 1, signal.SIGSTOP, "process 1 (host ")
        assert "has stopped answering: nothing from it for 4 s" in processes[0].text
        processes[1].process.send_signal(signal.SIGCONT)
        assert processes[1].code() == 1
        assert "process 1" in processes[1].text


def test_a_leader_killed_while_it_compiles_is_named_and_the_others_end(model, cache, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    processes = [Server(tmp_path, f"process{i}", *common(model, cache), *many(address, 2, i)) for i in range(2)]
    try:
        processes[1].wait_for("follows process 0")
        processes[0].wait_for("Compiling 0")
        processes[0].process.kill()
        assert processes[1].code() == 1
        assert "process 0 (at 127.0.0.1:" in processes[1].text
        assert "is gone: its connection closed" in processes[1].text
        assert "Check failure stack trace" not in processes[1].text
    finally:
        for process in processes:
            process.end()


def test_processes_that_never_come_or_differ_are_named(model, cache, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    flags = (*common(model, cache), "--join-timeout", 8)
    leader = Server(tmp_path, "leader", *flags, *many(address, 3, 0))
    late = Server(tmp_path, "other", *flags, "--max-rows", 8, *many(address, 3, 1))
    lonely = Server(
        tmp_path, "lonely", *common(model, cache), "--join-timeout", 2, *many(f"127.0.0.1:{free_port()}", 2, 1)
    )
    try:
        speak_http_to(address)
        assert leader.code(START_TIMEOUT_S) == 1
        assert "processes 1, 2 have not joined within 8 s" in leader.text
        assert "--max-rows is 8 there and 2 in process 0" in leader.text
        assert late.code(START_TIMEOUT_S) == 1
        assert "process 0 refuses process 1" in late.text
        assert "--max-rows is 8 there and 2 in process 0" in late.text
        assert lonely.code(START_TIMEOUT_S) == 1
        assert "process 0 cannot be reached at 127.0.0.1:" in lonely.text
    finally:
        for process in (leader, late, lonely):
            process.end()


def speak_http_to(address: str) -> None:
    """A stranger at the coordinator's port is worth no word, and hurts nobody."""
    host, _, port = address.partition(":")
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=10) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                with contextlib.suppress(ConnectionError):
                    assert sock.recv(100) == b""
                return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_process_that_cannot_load_is_named(model, cache, tmp_path):
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    # Its size is right, so it shows only after the processes have met.
    array = damaged / "params" / "norm" / ".zarray"
    array.write_bytes(b"?" * array.stat().st_size)
    address = f"127.0.0.1:{free_port()}"
    processes = [
        Server(tmp_path, f"process{i}", *common(folder, cache), *many(address, 2, i))
        for i, folder in enumerate((model, damaged))
    ]
    try:
        assert [process.code(START_TIMEOUT_S) for process in processes] == [1, 1]
        assert "process 1 (host " in processes[0].text
        assert "failed: CheckpointError: " in processes[0].text
        assert "jaxllama serve: " in processes[1].text
        assert "norm/.zarray" in processes[1].text
    finally:
        for process in processes:
            process.end()


@pytest.mark.slow
def test_four_processes_answer_as_one_fail_and_start_again(model, cache, tmp_path):
    expected = of_one_process(model, tmp_path, cache, 8)
    address = f"127.0.0.1:{free_port()}"
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        flags = [*common(model, cache), "--join-timeout", 30]
        processes = [Server(folder, f"process{i}", *flags, *many(address, 4, i)) for i in range(4)]
        try:
            processes[0].wait_for("Ready in")
            assert answers(processes[0]) == expected
            lose(processes, 2, signal.SIGKILL, "process 2 (host ")
        finally:
            for process in processes:
                process.end()
