"""Bars and lines: what takes long is shown, what is quick or told to be quiet is not."""

from __future__ import annotations

import io
import time

import pytest
import tiny
from rich.console import Console

import jaxllama
from jaxllama.model.mesh import make_mesh
from jaxllama.system import progress
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.loading import load_params


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 100 columns would show."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress, "_watched_console", lambda: console)
    return console.file


def test_a_quick_job_shows_no_bar(terminal):
    with progress.show_bytes("load", after_s=60) as on_bytes:
        on_bytes(1, 2, "a")
        on_bytes(2, 2, "b")
    assert terminal.getvalue() == ""


def test_a_long_job_shows_a_bar(terminal):
    with progress.show_bytes("load", after_s=0.01) as on_bytes:
        time.sleep(0.02)
        on_bytes(1, 2, "tensor")
    assert "load" in terminal.getvalue()
    assert "tensor" in terminal.getvalue()


@pytest.mark.parametrize("show", [False, None])
def test_little_or_nothing_is_said_where_nobody_watches(capsys, show):
    with progress.show_bytes("load", show=show) as on_bytes:
        on_bytes(5 * 10**8, 10**9, "a")
    assert capsys.readouterr().err == ""


def test_large_jobs_are_lines_elsewhere(capsys):
    with progress.show_bytes("load") as on_bytes:
        for done in range(0, 4 * 10**9 + 1, 10**8):
            on_bytes(done, 4 * 10**9, "a")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "load: 4.0 of 4.0 GB"


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_loading_and_verifying_tell_all_bytes(tmp_path, monkeypatch, quantize):
    path = tiny.write_checkpoint(tmp_path / "model", "divisible")
    if quantize:
        with jaxllama.load(path, quantize=quantize) as llama:
            llama.save(path := tmp_path / quantize)
    checkpoint = Checkpoint.open(path)
    told: list[tuple[int, int]] = []
    checkpoint.verify(lambda done, total, name: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == sum(file.size for file in checkpoint.manifest.files.values())

    told.clear()
    monkeypatch.setattr(progress, "_ByteLines", lambda name: lambda done, total, name: told.append((done, total)))
    load_params(checkpoint, make_mesh(checkpoint.config, tp=1), "float32")
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1] > 0
    told.clear()
    load_params(checkpoint, make_mesh(checkpoint.config, tp=1), "float32", progress=False)
    assert not told
