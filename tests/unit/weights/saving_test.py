"""Laws of saving: the same bits from any mesh and any number of processes, and never half a checkpoint."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from collector import Collector
from processes import START_TIMEOUT_S, Process, free_port
from unit.weights.places.bucket_test import store as store

import jaxllama
from jaxllama import Checkpoint, Llama, SamplingParams, make_mesh
from jaxllama.errors import CheckpointError, LockstepError, PlaceError
from jaxllama.weights import saving
from jaxllama.weights.arrays import chunks as zarr
from jaxllama.weights.arrays import files, writer
from jaxllama.weights.forms import get_whole
from jaxllama.weights.loading import load_params
from jaxllama.weights.saving import save_params


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix has many chunks, as large ones have."""
    monkeypatch.setattr(zarr, "_MIN_CHUNK_BYTES", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("saving") / "model", "divisible")


def load(folder: Path, *, tp: int = 1, data: int = 1, **how: Any) -> Llama:
    return jaxllama.load(folder, make_mesh(Checkpoint.open(folder).config, tp=tp, data=data), **how)


def bits(llama: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Of every stored array, in whatever form the devices have it."""
    parts = saving._parts(llama.config, llama.params)
    arrays = [np.asarray(get_whole(llama.params, part)) for part in parts]
    return [(array.dtype.name, array.shape, array.tobytes()) for array in arrays]


def on_one_device(folder: Path) -> Any:
    """The weights as another process would load them, the files having been checked against the manifest."""
    opened = Checkpoint.open(folder)
    opened.verify()
    params = load_params(opened, make_mesh(opened.config, tp=1), None)
    return SimpleNamespace(config=opened.config, params=params)


def nothing_but(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


@pytest.mark.parametrize(
    ("name", "tp", "data", "dtype", "quantize"),
    [
        ("divisible", 8, 1, "float32", None),
        ("divisible", 4, 2, "bfloat16", "int8"),
        ("wide_heads_tied", 2, 1, "bfloat16", None),
        ("wide_heads_tied", 1, 1, "float32", "int8"),
        ("biased", 3, 2, "float32", "int8"),
    ],
)
def test_a_saved_model_loads_with_the_same_bits(tmp_path, name, tp, data, dtype, quantize):
    config = tiny.MODELS[name] | {"vocab_size": 280}
    source = tiny.write_checkpoint(tmp_path / "source", name, tiny.random_weights(config, 0), vocab_size=280)
    with load(source, tp=tp, data=data, dtype=dtype, quantize=quantize) as llama:
        saved = llama.save(tmp_path / "out" / "saved")
        want = bits(llama)
    assert (saved.dtype, saved.manifest.quantize, saved.config) == (dtype, quantize, llama.config)
    assert saved.manifest.source["files"]["manifest.json"]["size"] == (source / "manifest.json").stat().st_size
    assert bits(on_one_device(saved.path)) == want
    for file in source.iterdir():
        if file.name not in ("manifest.json", "params"):
            assert (saved.path / file.name).read_bytes() == file.read_bytes()
    assert nothing_but(tmp_path / "out", "saved")
    with load(saved.path, tp=2) as again:
        assert bits(again) == want
        assert again.tokenizer is not None


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_in_parts_are_saved_whole(tmp_path, model, quantize, monkeypatch):
    with load(model, tp=4, quantize=quantize) as llama:
        want = bits(llama)
    with monkeypatch.context() as on_tpu:
        on_tpu.setattr("jaxllama.model.platforms.cpu.native.is_available", lambda: False)
        on_tpu.setattr("jaxllama.weights.forms.num_ffn_parts", lambda *_: 3)
        with load(model, tp=4, quantize=quantize) as llama:
            assert len(llama.params["layers"][0]["ffn_parts"]) == 3
            saved = llama.save(tmp_path / "saved")
    assert bits(on_one_device(saved.path)) == want


def test_requests_run_while_a_model_is_saved(tmp_path, model):
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    with load(model, options=tiny.SMALL) as llama:
        want = llama.generate([5, 6, 7], params).token_ids
        running = Collector(llama.engine, [5, 6, 7], params)
        llama.save(tmp_path / "saved").verify()
        assert tuple(running.wait().tokens) == want


def test_a_device_finds_its_shard_in_files_of_its_own(tmp_path, model):
    with load(model, tp=8) as llama:
        saved = llama.save(tmp_path / "saved")
    # 72 rows of ffn on 8 devices; 24 of KV heads on 4, and copies of those on the other 4, which write nothing.
    for name, chunk in {"gate_proj": [9, 52], "k_proj": [3, 52], "down_proj": [52, 9]}.items():
        assert json.loads((saved.path / f"params/layers.0.{name}/.zarray").read_text())["chunks"] == chunk


def test_shards_of_a_prime_number_of_rows_stay_whole(monkeypatch):
    monkeypatch.setattr(zarr, "_MAX_CHUNK_BYTES", 30 * 52 * 4)
    config = tiny.config_of("divisible", vocab_size=8 * 37)
    params = jax.device_put(
        np.zeros((8 * 37, 52), np.float32), jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    )
    embed = next(spec for spec in jaxllama.model.params.param_specs(config) if spec.name == "embed_tokens")
    assert zarr.chunk_of_shards(embed, params) == (37, 52)


def test_what_is_there_stays(tmp_path, model):
    with load(model) as llama:
        llama.save(tmp_path / "saved")
        before = (tmp_path / "saved" / "manifest.json").stat().st_mtime_ns
        (tmp_path / "file").touch()
        for name in ("saved", "file"):
            with pytest.raises(CheckpointError, match=f"{name}: exists"):
                llama.save(tmp_path / name)
        (tmp_path / "empty").mkdir()
        llama.save(tmp_path / "empty").verify()
    assert (tmp_path / "saved" / "manifest.json").stat().st_mtime_ns == before
    assert nothing_but(tmp_path, "saved", "file", "empty")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(path: Path, data: Any) -> Any:
        if path.parent.name == "layers.1.up_proj":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, data)

    write = files.write_file
    monkeypatch.setattr(files, "write_file", fail)
    with load(model) as llama, pytest.raises(CheckpointError, match=r"up_proj.*: No space left on device"):
        llama.save(tmp_path / "saved")
    assert nothing_but(tmp_path)


def test_one_save_at_a_time_has_a_folder(tmp_path, model, monkeypatch):
    def save_again(*_: Any) -> dict[str, Any]:
        with pytest.raises(CheckpointError, match="is being saved by another process"):
            save_params(llama.checkpoint, llama.params, tmp_path / "saved", None)
        return {}

    monkeypatch.setattr(writer.ParamsWriter, "commit", save_again)
    with load(model) as llama, pytest.raises(CheckpointError):
        llama.save(tmp_path / "saved")
    assert nothing_but(tmp_path)


def test_a_model_of_no_checkpoint_and_a_follower_cannot_save(tmp_path, model):
    with tiny.make_llama() as llama, pytest.raises(CheckpointError, match="of no checkpoint"):
        llama.save(tmp_path / "saved")
    follower: Any = SimpleNamespace(is_leader=False, process_id=3)
    with pytest.raises(LockstepError, match="process 3 follows process 0"):
        save_params(Checkpoint.open(model), {}, tmp_path / "saved", follower)
    assert nothing_but(tmp_path)


@pytest.mark.parametrize(
    ("other_folder", "reason"),
    [
        ("{}", "process 1: .* No space left"),
        ("{}/other", "process 1: .*other is not the folder that process 0"),
    ],
)
def test_another_process_that_cannot_write_is_named(tmp_path, model, monkeypatch, other_folder, reason):
    answers: list[Any] = []

    def ask(_: str, question: bytes) -> list[bytes]:
        folder, token = json.loads(question)
        with pytest.MonkeyPatch.context() as patch:
            if reason.endswith("left"):
                patch.setattr(files, "write_file", full)
            return [answers[0](json.dumps([other_folder.format(folder), token]).encode())]

    def full(path: Path, data: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with load(model) as llama:
        group: Any = SimpleNamespace(is_leader=True, ask=ask, answer_with=lambda _, answer: answers.append(answer))
        jaxllama.weights.saving.answer_saves(llama.config, llama.params, group)
        with pytest.raises(CheckpointError, match=reason):
            save_params(llama.checkpoint, llama.params, tmp_path / "saved", group)
    assert nothing_but(tmp_path)


PROGRAM = """
import os, signal, sys
import jaxllama
from jaxllama.weights.arrays import chunks as zarr, writer
from jaxllama.hosts import group as distributed

address, process_id, model, out = sys.argv[1:]
zarr._MIN_CHUNK_BYTES = 1
num_written = 0

def write_shards(writer, part, array):
    global num_written
    num_written += 1
    files = original(writer, part, array)
    folder = str(getattr(writer._files, "folder", ""))
    if "saved-2" not in folder:
        sys.stdout.write("".join(f"{'folder' if folder else 'bucket'}:{name}\\n" for name in files))
        num_written = 0
    elif num_written > 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return files

original = writer.ParamsWriter.write_shards
if process_id == "1":
    writer.ParamsWriter.write_shards = write_shards
group = distributed.join(address, num_processes=2, process_id=int(process_id), join_timeout_s=60)
llama = jaxllama.load(model, dtype="bfloat16", quantize="int8", group=group)
if group.is_leader:
    print("saved", llama.save(out).path, flush=True)
    print("in a bucket", llama.save("s3://models/saved").place, flush=True)
    print("exported", llama.export(out + "-exported"), flush=True)
    llama.save(out + "-2")
else:
    llama.engine.follow()
"""


def test_two_processes_save_and_export_as_one_and_one_killed_half_way_leaves_no_checkpoint(tmp_path, model, store):
    address, out = f"127.0.0.1:{free_port()}", tmp_path / "saved"
    processes = [Process(tmp_path, f"{i}", "-c", PROGRAM, address, i, model, out) for i in range(2)]
    try:
        processes[0].wait_for(f"exported {out}-exported", START_TIMEOUT_S)
        assert [process.code() for process in processes] == [1, -9], processes[0].text
        assert "process 1 (host " in processes[0].text
    finally:
        for process in processes:
            process.end()
    # Of four devices process 1 has the last two, and wrote their half of the ffn's eight chunks.
    written = {name for name in processes[1].text.split() if "layers.0.gate_proj.values" in name}
    files = {f"params/layers.0.gate_proj.values/{i}.0" for i in (4, 5, 6, 7)}
    assert written == {f"{where}:{name}" for where in ("folder", "bucket") for name in files}
    with load(model, dtype=jnp.bfloat16, quantize="int8", tp=4) as llama:
        want = bits(llama)
        assert bits(on_one_device(out)) == want
        assert bits(on_one_device("s3://models/saved")) == want
        assert not any(".partial" in name for name in store.objects)
        llama.export(tmp_path / "exported")
        exported = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "saved-exported").iterdir()} == exported
        assert not (tmp_path / "saved-2").exists()
        assert (tmp_path / ".saved-2.saving" / "checkpoint").exists()
        # What was left is in nobody's way.
        assert bits(on_one_device(llama.save(tmp_path / "saved-2").path)) == want
    assert not (tmp_path / ".saved-2.saving").exists()


@pytest.mark.parametrize(("scheme", "tp", "quantize"), [("gs", 4, None), ("s3", 2, "int8")])
def test_a_model_saved_to_a_bucket_loads_with_the_same_bits(store, tmp_path, model, scheme, tp, quantize):
    url = f"{scheme}://models/saved"
    store.write_faults += ["", "", "", "500", "dropped", "lost"]
    with load(model, tp=tp, quantize=quantize) as llama:
        saved = llama.save(url)
        want = bits(llama)
        with pytest.raises(PlaceError, match=f"{url}: exists; choose another folder, or remove it first"):
            llama.save(url)
    saved.verify()
    assert bits(on_one_device(url)) == want
    assert not any(".partial" in name for name in store.objects)
    for file in model.iterdir():
        if file.name not in ("manifest.json", "params"):
            assert store.objects[f"models/saved/{file.name}"] == file.read_bytes()


def test_a_save_to_a_bucket_that_fails_leaves_no_checkpoint_and_is_in_nobody_s_way(store, model, monkeypatch):
    with load(model) as llama:
        with monkeypatch.context() as patch:
            patch.setattr(writer.ParamsWriter, "commit", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llama.save("s3://models/saved")
        with pytest.raises(CheckpointError, match="incomplete"):
            Checkpoint.open("s3://models/saved")
        llama.save("s3://models/saved").verify()
