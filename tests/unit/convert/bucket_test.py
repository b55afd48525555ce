"""Laws of converting into a bucket: the bits of a folder, nothing on the disk, and a kill costs no work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import bucket
import pytest
from jaxllama_convert import OutputError, convert
from unit.convert.write_test import run_cli
from unit.weights.places.bucket_test import store as store
from unit.weights.places.upload_test import Killed, kill_at
from unit.weights.sources.sources import BF16, CONFIG, weights, write_gguf, write_hf

import jaxllama.weights.arrays.chunks
from jaxllama import Checkpoint
from jaxllama.errors import CheckpointError, ConversionError, PlaceError, StoreError
from jaxllama.weights.places import lease

SMALL = CONFIG | {"num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_S", 0.05)
    monkeypatch.setattr(lease, "POLL_S", 0.01)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_hf(tmp_path / "src", SMALL, weights(SMALL, BF16), shards=2)
    return tmp_path / "src"


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def objects_of(store: bucket.Store, prefix: str = "models/out/") -> dict[str, bytes]:
    return {name.removeprefix(prefix): data for name, data in store.objects.items() if name.startswith(prefix)}


def without_times(files: dict[str, bytes]) -> dict[str, Any]:
    """Orbax's metadata has times and folders in it, so its content and hash differ from run to run."""
    manifest = json.loads(files["manifest.json"])
    of_orbax = {name for name in files if name.startswith("params/") and name.count("/") == 1}
    assert of_orbax
    for name in of_orbax:
        manifest["files"][name] = "differs"
    return {name: data for name, data in files.items() if name not in of_orbax} | {"manifest.json": manifest}


@pytest.mark.parametrize(("scheme", "quantize"), [("gs", None), ("s3", "int8")])
def test_a_bucket_gets_what_a_folder_gets(
    store: bucket.Store,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    quantize: str | None,
) -> None:
    monkeypatch.setattr(jaxllama.weights.arrays.chunks, "_MIN_CHUNK_BYTES", 1)
    convert(source, tmp_path / "out", quantize=quantize)
    # From a bucket to a bucket: nothing of the source is on this machine.
    store.add("models/src", source)
    monkeypatch.chdir(tmp_path / "out")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    report = convert(f"{scheme}://models/src", f"{scheme}://models/out", quantize=quantize, verify=True)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert without_times(objects_of(store)) == without_times(files_of(tmp_path / "out"))
    assert report.path == f"{scheme}://models/out"
    Checkpoint.open(f"{scheme}://models/out").verify()


def test_killed_at_twenty_moments_and_resumed(
    store: bucket.Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "out")
    want = without_times(files_of(tmp_path / "out"))
    resumed = []
    for moment in range(20):
        store.objects.clear()
        with monkeypatch.context() as patch:
            kill_at(patch, 2 + moment * 3)
            with pytest.raises(Killed):
                convert(source, "s3://models/out")
        if "models/out/manifest.json" in store.objects:
            Checkpoint.open("s3://models/out").verify()
            with pytest.raises(PlaceError, match="exists; give --force"):
                convert(source, "s3://models/out")
            # What is left of one that was killed when all was done: a lock that nobody holds.
            store.objects.pop("models/out/.partial/lock", None)
        else:
            with pytest.raises(CheckpointError, match=r"no manifest\.json"):
                Checkpoint.open("s3://models/out")
            resumed.append(convert(source, "s3://models/out").num_resumed)
        assert without_times(objects_of(store)) == want
    assert resumed[0] == 0
    assert max(resumed) > 8
    assert len(resumed) > 15


KILLER = """
import os, signal, sys
import jaxllama.weights.places.bucket as bucket
from jaxllama_convert import convert
calls, write = 0, bucket.BucketPlace.write
def killer(self, name, data):
    global calls
    calls += 1
    if calls == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, name, data)
bucket.BucketPlace.write = killer
convert(sys.argv[1], "s3://models/out")
"""


def test_a_process_that_is_killed_leaves_work_that_another_resumes(
    store: bucket.Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It sees that the holder of the lock has ended, and does not wait.
    monkeypatch.setattr(lease, "STALE_S", 60.0)
    command = [sys.executable, "-c", KILLER, str(source)]
    done = subprocess.run(command, timeout=120, capture_output=True, check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert "models/out/.partial/lock" in store.objects
    assert "models/out/manifest.json" not in store.objects
    assert convert(source, "s3://models/out").num_resumed > 0
    convert(source, tmp_path / "out")
    assert without_times(objects_of(store)) == without_times(files_of(tmp_path / "out"))


@pytest.mark.parametrize("fault", ["500", "429", "412", "dropped", "lost", "short", "etag"])
def test_an_answer_that_is_wrong_once_costs_at_most_another_run(store: bucket.Store, source: Path, fault: str) -> None:
    for write in (1, 9, 30):
        store.objects.clear()
        store.write_faults[:] = [""] * write + [fault]
        try:
            convert(source, "gs://models/out")
        except (StoreError, OutputError):
            assert "models/out/manifest.json" not in store.objects
            convert(source, "gs://models/out")
        Checkpoint.open("gs://models/out").verify()
        assert not any(name.startswith("models/out/.partial") for name in store.objects)


@pytest.mark.parametrize("fault", ["500", "429", "412", "dropped", "short", "repeated", "etag"])
def test_an_answer_to_a_read_that_is_wrong_once(store: bucket.Store, source: Path, tmp_path: Path, fault: str) -> None:
    store.add("models/src", source)
    convert(source, tmp_path / "out")
    for read in (3, 9, 14):
        for name in [name for name in store.objects if name.startswith("models/out/")]:
            del store.objects[name]
        store.faults[:] = [""] * read + [fault]
        try:
            convert("s3://models/src", "s3://models/out")
        except (StoreError, ConversionError, PlaceError):
            # What says that a file has changed is not tried again.
            assert fault in ("412", "etag")
            assert "models/out/manifest.json" not in store.objects
            convert("s3://models/src", "s3://models/out")
        assert without_times(objects_of(store)) == without_times(files_of(tmp_path / "out"))


def test_force_replaces_a_checkpoint_and_nothing_else(store: bucket.Store, source: Path, tmp_path: Path) -> None:
    convert(source, "s3://models/out", quantize="int8")
    before = dict(store.objects)
    with pytest.raises(PlaceError, match="s3://models/out: exists; give --force"):
        convert(source, "s3://models/out")
    assert store.objects == before
    store.objects["models/out/notes.txt"] = b"mine"
    convert(source, "s3://models/out", force=True)
    convert(source, tmp_path / "out")
    assert store.objects.pop("models/out/notes.txt") == b"mine"
    assert without_times(objects_of(store)) == without_times(files_of(tmp_path / "out"))


@pytest.mark.parametrize("dst", ["s3://models/src", "s3://models/src/out", "s3://models", "s3://models/src/"])
def test_the_destination_is_apart_from_the_source(store: bucket.Store, source: Path, dst: str) -> None:
    store.add("models/src", source)
    before = dict(store.objects)
    for force in (False, True):
        with pytest.raises(ConversionError, match=r"inside the source|holds the source"):
            convert("s3://models/src", dst, force=force)
    assert store.objects == before


def test_beside_a_gguf_file_is_fine(store: bucket.Store, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    store.objects["models/src/model.gguf"] = (tmp_path / "model.gguf").read_bytes()
    convert("gs://models/src/model.gguf", "gs://models/src/model")
    Checkpoint.open("gs://models/src/model").verify()


def test_the_command_says_where_and_which_code(store: bucket.Store, source: Path, capsys: Any) -> None:
    assert run_cli(source, "s3://models/out", "--max-in-flight", "0.5") == 0
    assert "wrote s3://models/out" in capsys.readouterr().err
    assert run_cli(source, "s3://models/out") == 2
    assert run_cli(source, "http://models/out") == 2
    assert "expected gs://bucket/path or s3://bucket/path" in capsys.readouterr().err
