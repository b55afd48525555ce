"""`jaxllama batch`: one answer for every line, the server's, whatever the file holds and whenever it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from jaxllama_serving.batch.files import BatchError, InputFile, OutputFile
from jaxllama_serving.batch.run import Counts, run_batch
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.process.cli import add_behaviour, behaviour
from unit.serving.fakes import FakeLlama
from unit.serving.live import body, serving

from jaxllama.__main__ import main
from jaxllama.errors import EngineStoppedError

CONFIG = ServerConfig(("default",))
URL = "/v1/chat/completions"


def line(custom_id: Any, url: str = URL, **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body(**fields)}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(raw) for raw in data.splitlines()]


def run(llama: Any, folder: Path, at_once: int = 4, config: ServerConfig = CONFIG) -> Counts:
    source = InputFile(folder / "in.jsonl", config.max_body_bytes)
    try:
        with OutputFile(folder / "out.jsonl", source.lines) as output:
            return asyncio.run(run_batch(llama, config, source, output, at_once, lambda **_: None))
    finally:
        source.close()


def comparable(reply: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one request to the next: ids, times, and what was cached before."""
    reply.get("usage", {}).pop("prompt_tokens_details", None)
    return {name: value for name, value in reply.items() if name not in ("id", "created")}


# ---- Answers ----


def test_every_line_gets_what_the_server_answers(tmp_path):
    bodies = [
        {"seed": 1},
        {"seed": 2, "n": 3, "max_tokens": 2},
        {"seed": 3, "stop": ["wor"]},
        {"temperature": 9},
        {"model": "other"},
        {"messages": []},
    ]
    completion = {"model": "default", "prompt": ["Once", "Twice"], "max_tokens": 3, "logprobs": 1, "seed": 4}
    requests = [(URL, body(**fields)) for fields in bodies] + [("/v1/completions", completion)]
    write(tmp_path / "in.jsonl", [line(f"no. {i} ü", url) | {"body": x} for i, (url, x) in enumerate(requests)])
    assert run(FakeLlama(), tmp_path) == Counts(lines=7, errors=3)

    async def ask() -> list[tuple[int, Any, Any]]:
        async with serving(FakeLlama(), model_names=("default",)) as live:
            return [await live.post(path=url, json=fields) for url, fields in requests]

    answers = {answer["custom_id"]: answer for answer in read(tmp_path / "out.jsonl")}
    for i, (status, want, _) in enumerate(asyncio.run(ask())):
        answer = answers[f"no. {i} ü"]
        assert set(answer) == {"id", "custom_id", "response", "error"}
        assert answer["error"] is None
        assert set(answer["response"]) == {"status_code", "request_id", "body"}
        assert answer["response"]["status_code"] == status
        assert comparable(answer["response"]["body"]) == comparable(want)
    assert len({answer["id"] for answer in answers.values()}) == len(requests)
    assert len({answer["response"]["request_id"] for answer in answers.values()}) == len(requests)


def test_an_answer_names_the_fields_that_were_ignored(tmp_path):
    message = {"role": "user", "content": "Hi", "mood": "good"}
    write(tmp_path / "in.jsonl", [line("known"), line("unknown", foo=1, messages=[message], temperature=0)])
    assert run(FakeLlama(), tmp_path) == Counts(lines=2, ignored=1)
    answers = {answer["custom_id"]: answer["response"] for answer in read(tmp_path / "out.jsonl")}
    assert "ignored" not in answers["known"]
    assert answers["unknown"]["status_code"] == 200
    assert answers["unknown"]["ignored"] == "foo, messages[0].mood"


def test_strict_fields_refuse_them(tmp_path):
    write(tmp_path / "in.jsonl", [line("unknown", foo=1)])
    config = ServerConfig(("default",), strict_fields=True)
    assert run(FakeLlama(), tmp_path, config=config) == Counts(lines=1, errors=1)
    (answer,) = read(tmp_path / "out.jsonl")
    assert answer["response"]["body"]["error"]["param"] == "foo"


BAD_LINES: list[tuple[Any, str]] = [
    (b"{", "not valid JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b'{"custom_id": "a", "custom_id": "b"}', "appears twice"),
    (b'{"custom_id": NaN}', "NaN is not a JSON number"),
    (b"[" * 100_000, "nested deeper"),
    (b"[]", "the line must be an object"),
    ({"method": "POST", "url": URL, "body": {}}, "custom_id must be a string"),
    (line(7), "custom_id must be a string of 1 to 512 characters, got 7"),
    (line(""), "custom_id must be a string"),
    (line("get") | {"method": "GET"}, "method must be 'POST', got 'GET'"),
    (line("url") | {"url": "/v1/models"}, "url must be one of"),
    (line("text") | {"body": "Hi"}, "body must be an object, got 'Hi'"),
    (line("stream", stream=True), "a batch has no streams"),
    (line("more") | {"priority": 1}, "unknown fields: 'priority'"),
    (line("long", user="x" * CONFIG.max_body_bytes), "bytes, at most"),
]


def test_a_bad_line_is_answered_with_its_number_and_stops_nothing(tmp_path):
    lines = [line("first"), b"", *(bad for bad, _ in BAD_LINES), line("last")]
    write(tmp_path / "in.jsonl", lines)
    llama = FakeLlama()
    assert run(llama, tmp_path) == Counts(lines=len(BAD_LINES) + 2, errors=len(BAD_LINES))
    answers = read(tmp_path / "out.jsonl")
    assert [a["response"]["status_code"] for a in answers if a["custom_id"] in ("first", "last")] == [200, 200]
    errors = {answer["error"]["line"]: answer for answer in answers if answer["error"]}
    for number, (bad, reason) in enumerate(BAD_LINES, start=3):
        error = errors[number]["error"]
        assert error["code"] == "invalid_line"
        assert error["message"].startswith(f"line {number}: ")
        assert reason in error["message"]
        assert errors[number]["response"] is None
        if isinstance(bad, dict) and isinstance(bad.get("custom_id"), str) and 0 < len(bad["custom_id"]) < 5:
            assert errors[number]["custom_id"] == (bad["custom_id"] if bad["custom_id"] != "long" else None)
    # Run again, nothing is left to do, for the same bad lines too.
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(FakeLlama(), tmp_path) == Counts()
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_two_lines_of_one_custom_id_are_refused_with_both_numbers(tmp_path):
    path = write(tmp_path / "in.jsonl", [line("a"), line("b"), b"", line("a", seed=1), line("b", seed=2), line("a")])
    with pytest.raises(BatchError, match=r"'a' on lines 1 and 4; 'b' on lines 2 and 5; 'a' on lines 1 and 6"):
        InputFile(path, 1000)


@pytest.mark.parametrize(("content", "reason"), [(b"", "no request"), (b"\n \n", "no request"), (None, "No such file")])
def test_a_file_without_requests_is_refused(tmp_path, content, reason):
    path = tmp_path / "in.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BatchError, match=reason):
        InputFile(path, 1000)


def test_many_lines_are_worked_on_together(tmp_path):
    write(tmp_path / "in.jsonl", [line(str(i)) for i in range(40)])
    llama = FakeLlama(first_delay_s=0.5)
    start = time.monotonic()
    run(llama, tmp_path, at_once=20)
    assert time.monotonic() - start < 40 * 0.5 / 2
    assert len(read(tmp_path / "out.jsonl")) == 40


# ---- Stopped and taken up again ----


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_last_line_cut_short_is_written_again(tmp_path, cut):
    write(tmp_path / "in.jsonl", [line(str(i), seed=i) for i in range(5)])
    out = tmp_path / "out.jsonl"
    run(FakeLlama(), tmp_path)
    whole = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(whole[:3]) + whole[3][:cut])
    assert run(FakeLlama(), tmp_path) == Counts(lines=2)
    assert out.read_bytes().splitlines(keepends=True)[:3] == whole[:3]
    assert sorted(answer["custom_id"] for answer in read(out)) == list("01234")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1:],
        lambda lines: [line("0", seed=99), *lines[1:]],
        lambda lines: [line("other"), *lines[1:]],
    ],
    ids=["fewer", "changed", "others"],
)
def test_an_output_of_another_input_is_refused_and_left_alone(tmp_path, change):
    lines = [line(str(i), seed=i) for i in range(3)]
    write(tmp_path / "in.jsonl", lines)
    run(FakeLlama(), tmp_path, at_once=1)
    before = (tmp_path / "out.jsonl").read_bytes()
    write(tmp_path / "in.jsonl", change(lines))
    with pytest.raises(BatchError, match=r"out\.jsonl belongs to another input.*: line 1 answers '0'"):
        run(FakeLlama(), tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"# Notes\n", b"no end of line", b'{"id": 7}\n', b"[]\n", b'{"a": 1}'])
def test_a_file_that_is_no_output_is_refused_and_left_alone(tmp_path, content):
    write(tmp_path / "in.jsonl", [line("a")])
    (tmp_path / "out.jsonl").write_bytes(content)
    with pytest.raises(BatchError, match="line 1 is no answer of a batch"):
        run(FakeLlama(), tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_lines_may_be_added_or_moved_between_two_runs(tmp_path):
    lines = [line(str(i), seed=i) for i in range(4)]
    write(tmp_path / "in.jsonl", lines[:2])
    run(FakeLlama(), tmp_path)
    write(tmp_path / "in.jsonl", lines[::-1])
    assert run(FakeLlama(), tmp_path) == Counts(lines=2)
    assert sorted(answer["custom_id"] for answer in read(tmp_path / "out.jsonl")) == list("0123")


def test_two_processes_do_not_write_to_one_file(tmp_path):
    source = InputFile(write(tmp_path / "in.jsonl", [line("a")]), 1000)
    with (
        OutputFile(tmp_path / "out.jsonl", source.lines),
        pytest.raises(BatchError, match="another process writes to it"),
    ):
        OutputFile(tmp_path / "out.jsonl", source.lines)
    source.close()


def test_an_engine_that_fails_ends_the_batch_and_its_lines_stay_open(tmp_path):
    write(tmp_path / "in.jsonl", [line(str(i), seed=i) for i in range(9)])
    llama = FakeLlama(fail_after=1, failure=RuntimeError("broken"), unhealthy="the engine has failed: broken")
    with pytest.raises(EngineStoppedError, match="Run the same command again"):
        run(llama, tmp_path)
    assert read(tmp_path / "out.jsonl") == []
    assert run(FakeLlama(), tmp_path) == Counts(lines=9)


def test_a_line_that_alone_fails_is_answered_with_its_error(tmp_path):
    write(tmp_path / "in.jsonl", [line("a")])
    assert run(FakeLlama(fail_after=1, failure=RuntimeError("nan")), tmp_path) == Counts(lines=1, errors=1)
    assert read(tmp_path / "out.jsonl")[0]["response"]["status_code"] == 500


def test_a_full_disk_ends_the_batch(tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", [line(str(i)) for i in range(9)])

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jaxllama_serving.batch.files.os.write", full)
        with pytest.raises(OSError, match="No space left"):
            run(FakeLlama(), tmp_path)
    assert run(FakeLlama(), tmp_path) == Counts(lines=9)


def test_an_input_that_changes_while_it_runs_ends_the_batch(tmp_path):
    path = write(tmp_path / "in.jsonl", [line("a")])
    source = InputFile(path, 1000)
    write(path, [line("b")])
    with pytest.raises(BatchError, match="line 1 has changed while"):
        source.read(source.lines[0])
    source.close()


# ---- The command ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("batch") / "default", "divisible")


def command(checkpoint: Path, folder: Path, *flags: Any) -> list[str]:
    files = [folder / "in.jsonl", folder / "out.jsonl"]
    return list(map(str, ["batch", *files, "--checkpoint", checkpoint, "--max-rows", 4, "--max-context", 96, *flags]))


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ([line("a"), line("a")], (), "'a' on lines 1 and 2"),
        ([], (), "no request"),
        ([line("a")], ("--max-n", 99), "max_n must be from 1 to 16"),
        ([line("a")], ("--checkpoint", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, checkpoint, lines, flags, message):
    write(tmp_path / "in.jsonl", lines)
    assert main([*command(checkpoint, tmp_path, "--compilation-cache", "off"), *map(str, flags)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("jaxllama batch: ")
    assert text.count("\n") == 1
    assert message in text


def test_no_flag_that_changes_answers_is_left_out():
    parser = argparse.ArgumentParser()
    parser.set_defaults(served_model_name=["default"])
    add_behaviour(parser)
    args = parser.parse_args([])
    flags = {action.dest for action in parser._actions} - {"help"}
    assert set(behaviour(args)) == flags | {"model_names"}


def test_the_input_is_never_the_output(tmp_path, capsys, checkpoint):
    path = write(tmp_path / "in.jsonl", [line("a")])
    before = path.read_bytes()
    args = ["batch", str(path), str(path), "--checkpoint", str(checkpoint), "--compilation-cache", "off"]
    assert main(args) == 2
    assert "is the input itself" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_killed_at_random_it_answers_every_line_once(tmp_path, checkpoint, processes):
    """kill -9 before the first answer, and three times after some; then once more without."""
    rng = random.Random(5)
    params = [
        {"seed": i, "max_tokens": rng.randrange(1, 60), "n": rng.choice([1, 1, 3]), "ignore_eos": True}
        for i in range(80)
    ]
    lines: list[Any] = [line(f"line {i}", **fields) for i, fields in enumerate(params)]
    lines[11], lines[40] = b"not JSON", line("line 40", temperature=9)
    write(tmp_path / "in.jsonl", lines)
    out = tmp_path / "out.jsonl"

    def start() -> subprocess.Popen[str]:
        args = command(checkpoint, tmp_path, "--compilation-cache", tmp_path / "xla")
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxllama", *args], env=environment, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    def num_answers() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    kept = b""
    for until in (0, *sorted(rng.sample(range(5, 60), 3))):
        process = start()
        while num_answers() < until or (until == 0 and not out.exists()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        now = out.read_bytes()
        assert now.startswith(kept)
        kept = now[: now.rfind(b"\n") + 1]
    last = start()
    assert last.wait(300) == 0
    assert out.read_bytes().startswith(kept)
    summary = last.communicate()[1].splitlines()[-1]
    assert "lines had their answers already" in summary
    answers = read(out)
    want = [None if i == 11 else f"line {i}" for i in range(80)]
    assert sorted(map(str, want)) == sorted(str(answer["custom_id"]) for answer in answers)
    by_id = {answer["custom_id"]: answer for answer in answers}
    assert by_id[None]["error"]["line"] == 12
    assert by_id["line 40"]["response"]["status_code"] == 400
    for i in set(range(80)) - {11, 40}:
        choices = by_id[f"line {i}"]["response"]["body"]["choices"]
        assert len(choices) == params[i]["n"]
    again = start()
    assert again.wait(60) == 0
    assert "all 80 lines had their answers already" in again.communicate()[1]
    assert read(out) == answers
