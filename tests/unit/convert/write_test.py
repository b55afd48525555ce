"""Laws of converting: bit for bit, in bounded memory, and never a checkpoint that looks complete but is not."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from jaxllama_convert import OutputError, cli, convert
from jaxllama_convert.staging import Staging
from unit.weights.sources.sources import BF16, CONFIG, weights, write_gguf, write_hf

import jaxllama.weights.checkpoint
from jaxllama.errors import CheckpointError, ConversionError
from jaxllama.model.params import build_params, get_param, param_specs
from jaxllama.system.hashing import hash_bytes
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.loading import restore_params


def restored(path: Path) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by Hugging Face name, through jaxllama's own restore, after verifying every hash."""
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    shardings = build_params(checkpoint.config, lambda spec: SingleDeviceSharding(jax.devices()[0]))
    params = restore_params(checkpoint, jnp.dtype(checkpoint.dtype), shardings)
    return {spec.hf_name: np.asarray(get_param(params, spec)) for spec in param_specs(checkpoint.config)}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, shards: int, dtype: Any, changes: dict[str, Any]) -> None:
    config = CONFIG | changes
    want = write_hf(tmp_path / "src", config, weights(config, dtype), shards)
    report = convert(tmp_path / "src", tmp_path / "out")
    assert report.dtype == np.dtype(dtype).name
    assert_same(restored(tmp_path / "out"), want)


@pytest.mark.parametrize(("source", "target"), [(np.float32, BF16), (np.float16, BF16), (BF16, np.float32)])
def test_a_cast_rounds_to_nearest(tmp_path: Path, source: Any, target: Any) -> None:
    tensors = write_hf(tmp_path / "src", tensors=weights(CONFIG, source))
    report = convert(tmp_path / "src", tmp_path / "out", dtype=np.dtype(target).name)
    assert_same(restored(tmp_path / "out"), {k: v.astype(np.float32).astype(target) for k, v in tensors.items()})
    assert any("mantissa" in warning for warning in report.warnings) == (target is BF16)


def test_float16_becomes_bfloat16_unless_told_otherwise(tmp_path: Path) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, np.float16))
    assert convert(tmp_path / "src", tmp_path / "out").dtype == "bfloat16"


def test_slices_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllama_convert.copying.SLICE_BYTES", 7)
    want = write_hf(tmp_path / "src", shards=2)
    convert(tmp_path / "src", tmp_path / "out")
    assert_same(restored(tmp_path / "out"), want)


def test_the_manifest_has_the_hash_of_every_file_and_source(tmp_path: Path) -> None:
    tensors = weights(CONFIG) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_hf(tmp_path / "src", tensors=tensors, shards=3)
    convert(tmp_path / "src", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    shards = sorted((tmp_path / "src").glob("*.safetensors"))
    assert sorted(manifest["source"]["files"]) == [path.name for path in shards]
    for path in shards:
        want = {"size": path.stat().st_size, "hash": hash_bytes(path.read_bytes())}
        assert manifest["source"]["files"][path.name] == want
    on_disk = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert on_disk == {*manifest["files"], "manifest.json"}
    assert {"jaxllama", "jax", "orbax-checkpoint"} <= set(manifest["versions"])


def test_a_gguf_file_is_hashed_whole(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": np.ones(8, np.float32)})
    convert(tmp_path / "model.gguf", tmp_path / "out")
    files = Checkpoint.open(tmp_path / "out").manifest.source["files"]
    assert files["model.gguf"]["hash"] == hash_bytes((tmp_path / "model.gguf").read_bytes())


def test_the_files_beside_the_weights_are_copied_byte_for_byte(tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    files = {"generation_config.json": '{ "eos_token_id": 3}', "chat_template.jinja": "{{ messages[0].content }}\r\n"}
    for name, text in files.items():
        (tmp_path / "src" / name).write_bytes(text.encode())
    (tmp_path / "src" / "modeling_evil.py").write_text("raise SystemExit")
    convert(tmp_path / "src", tmp_path / "out")
    for name in (*files, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_evil.py").exists()


def test_an_existing_checkpoint_is_replaced_only_by_force(tmp_path: Path) -> None:
    old = write_hf(tmp_path / "old", tensors=weights(CONFIG, seed=1))
    new = write_hf(tmp_path / "new", tensors=weights(CONFIG, seed=2))
    out = tmp_path / "out"
    out.mkdir()  # An empty folder is as good as none.
    convert(tmp_path / "old", out)
    with pytest.raises(ConversionError, match="give --force"):
        convert(tmp_path / "new", out)
    assert_same(restored(out), old)
    convert(tmp_path / "new", out, force=True)
    assert_same(restored(out), new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "out"]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_checkpoint_is_copied_bit_for_bit(tmp_path: Path, quantize: str | None) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, np.float32))
    convert(tmp_path / "src", tmp_path / "out", quantize=quantize)
    report = convert(tmp_path / "out", tmp_path / "copy")
    first, second = Checkpoint.open(tmp_path / "out"), Checkpoint.open(tmp_path / "copy")
    assert (report.dtype, report.quantize) == (first.dtype, first.manifest.quantize) == ("float32", quantize)
    second.verify()
    of_orbax = {name for name in first.manifest.files if name.startswith("params/") and name.count("/") == 1}
    assert first.manifest.files.keys() == second.manifest.files.keys()
    for name in first.manifest.files.keys() - of_orbax:
        assert first.manifest.files[name] == second.manifest.files[name], name
    origin = hash_bytes((tmp_path / "out" / "manifest.json").read_bytes())
    assert second.manifest.source["files"]["manifest.json"]["hash"] == origin


def test_a_checkpoint_in_another_dtype_is_what_its_source_would_be(tmp_path: Path) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, np.float32))
    convert(tmp_path / "src", tmp_path / "float32")
    convert(tmp_path / "src", tmp_path / "want", dtype="bfloat16", quantize="int8")
    convert(tmp_path / "float32", tmp_path / "got", dtype="bfloat16", quantize="int8")
    want, got = (Checkpoint.open(tmp_path / name).manifest for name in ("want", "got"))
    assert got.quantize == "int8"
    chunks = {name for name in want.files if name.count("/") == 2}
    assert len(chunks) > 20
    assert {name: want.files[name] for name in chunks} == {name: got.files[name] for name in chunks}


def test_a_damaged_checkpoint_is_not_copied(tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out")
    chunk = tmp_path / "out" / "params" / "layers.1.up_proj" / "0.0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(CheckpointError, match=r"1 damaged file.*layers\.1\.up_proj/0\.0"):
        convert(tmp_path / "out", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(ConversionError, match="inside the source"):
        convert(tmp_path / "out", tmp_path / "out", force=True)


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "manifest.json").write_text("[1]")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "folder", "json", "src", "."):
        with pytest.raises(ConversionError):
            convert(tmp_path / "src", tmp_path / name, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_replacement_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    old = write_hf(tmp_path / "old")
    bad = weights(CONFIG)
    bad["model.norm.weight"][0] = np.nan
    write_hf(tmp_path / "bad", tensors=bad)
    convert(tmp_path / "old", tmp_path / "out")
    with pytest.raises(ConversionError, match=r"model\.norm\.weight"):
        convert(tmp_path / "bad", tmp_path / "out", force=True)
    assert_same(restored(tmp_path / "out"), old)


def test_two_conversions_do_not_share_a_destination(tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another conversion"):
            convert(tmp_path / "src", tmp_path / "out")


def test_a_strangers_partial_folder_is_left_alone(tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "precious").touch()
    with pytest.raises(ConversionError, match="in the way"):
        convert(tmp_path / "src", tmp_path / "out")
    assert (tmp_path / ".out.partial" / "precious").exists()


def test_a_full_disk_says_so_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = write_hf(tmp_path / "src")

    def fsync(descriptor: int) -> None:
        """Fails for one tensor, once another one is recorded."""
        if "layers.1.down_proj/0" in os.readlink(f"/proc/self/fd/{descriptor}"):
            deadline = time.monotonic() + 60
            while not (tmp_path / ".out.partial" / "journal.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(jaxllama.weights.arrays.files.os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"tensors/.*No space left on device.*resume"):
            convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = convert(tmp_path / "src", tmp_path / "out")
    assert 0 < report.num_resumed < len(want)
    assert_same(restored(tmp_path / "out"), want)


def test_too_little_space_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "src")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("jaxllama_convert.staging.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="are needed, 1,000 are free"):
        convert(tmp_path / "src", tmp_path / "out")


def test_verify_finds_what_the_disk_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "src")

    def lossy(self: Staging) -> None:
        chunk = self.checkpoint / "params" / "norm" / "0"
        chunk.write_bytes(b"\0" * chunk.stat().st_size)
        finish(self)

    finish = Staging.finish
    monkeypatch.setattr(Staging, "finish", lossy)
    with pytest.raises(OutputError, match="params/norm/0: blake3"):
        convert(tmp_path / "src", tmp_path / "out", verify=True)


def test_another_source_does_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "first", tensors=weights(CONFIG, seed=1))
    want = write_hf(tmp_path / "second", tensors=weights(CONFIG, seed=2))
    with monkeypatch.context() as patch:
        patch.setattr(jaxllama.weights.arrays.writer.ParamsWriter, "commit", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(tmp_path / "first", tmp_path / "out")
    assert convert(tmp_path / "second", tmp_path / "out").num_resumed == 0
    assert_same(restored(tmp_path / "out"), want)


# The process kills itself at the hardest moments of a conversion: before a call for which a condition holds.
KILLER = """
import os, shutil, signal, sys
import jaxllama.weights.arrays.files, jaxllama.weights.arrays.writer, jaxllama_convert.staging, jaxllama_convert.write
_, src, dst, owner, name, condition = sys.argv
owner, calls = eval(owner), 0
original = getattr(owner, name)
def killer(*args, **kwargs):
    global calls
    calls += 1
    if eval(condition):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, killer)
jaxllama_convert.write.convert(src, dst, force=True)
"""
# The moment: the function, the condition, and which checkpoint is at DST afterwards.
KILLS = {
    # When the first tensor is recorded: how many others are written by then, threads decide.
    "while tensors are written": (
        "jaxllama_convert.staging.Staging",
        "record",
        "original(args[0], dict([*args[1].items()][:1])) is None",
        "old",
    ),
    "before Orbax writes its metadata": ("jaxllama.weights.arrays.writer.ParamsWriter", "commit", "True", "old"),
    "while tensors are moved": ("os", "rename", "calls == 7", "old"),
    "before the manifest": ("jaxllama_convert.write._Job", "_write_manifest", "True", "old"),
    "between the renames": ("os", "rename", "str(args[1]) == dst", None),
    "before the clean-up": ("shutil", "rmtree", "str(args[0]).endswith('.partial')", "new"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_and_resumes(tmp_path: Path, moment: str) -> None:
    trees = {
        name: write_hf(tmp_path / name, tensors=weights(CONFIG, seed=seed)) for seed, name in enumerate(("old", "new"))
    }
    out = tmp_path / "out"
    convert(tmp_path / "old", out)
    owner, name, condition, survivor = KILLS[moment]
    command = [sys.executable, "-c", KILLER, str(tmp_path / "new"), str(out), owner, name, condition]
    done = subprocess.run(command, timeout=120, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    if survivor is None:
        # For an instant neither is there: the old one waits to be put back by the next run.
        assert not out.exists()
        with pytest.raises(ConversionError, match="give --force"):
            convert(tmp_path / "new", out)
        assert_same(restored(out), trees["old"])
    else:
        assert_same(restored(out), trees[survivor])
    report = convert(tmp_path / "new", out, force=True)
    assert (report.num_resumed > 0) == (survivor != "new")
    assert_same(restored(out), trees["new"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "out"]


MEMORY = """
import sys
from jaxllama_convert import convert
from jaxllama_convert.memory import peak_ram_bytes
convert(sys.argv[1], sys.argv[2] + "-warm")
before = peak_ram_bytes()
convert(sys.argv[3], sys.argv[2])
print(peak_ram_bytes() - before)
"""


def _memory_growth(tmp_path: Path, config: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes that the peak grew by, of the largest tensor, and of all tensors as written."""
    write_hf(tmp_path / "warm")
    # One random row repeated: the values do not matter, writing gigabytes of them takes long enough.
    row = np.random.default_rng(0).standard_normal(2**15).astype(BF16)
    tensors = {name: np.resize(row, value.shape) for name, value in _shapes(config).items()}
    write_hf(tmp_path / "src", config, tensors, shards=2)
    sizes = [value.nbytes for value in tensors.values()]
    del tensors
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "warm"), str(tmp_path / "out"), str(tmp_path / "src")]
    done = subprocess.run(command, timeout=500, capture_output=True, check=True)
    return int(done.stdout), max(sizes), sum(sizes)


def _shapes(config: dict[str, Any]) -> dict[str, np.ndarray]:
    from jaxllama.model.config import LlamaConfig

    # Without memory: broadcast zeros.
    specs = param_specs(LlamaConfig.from_hf(config))
    return {spec.hf_name: np.broadcast_to(np.zeros((), BF16), spec.shape) for spec in specs}


_MIB = 2**20


def test_memory_holds_two_tensors_not_the_model(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 2048}
    growth, largest, total = _memory_growth(tmp_path, config)
    assert total > 200 * _MIB
    assert growth < 2 * largest + 110 * _MIB < 0.65 * total


@pytest.mark.slow
def test_memory_holds_two_tensors_not_the_model_of_a_gigabyte(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 10, "vocab_size": 8192}
    growth, largest, total = _memory_growth(tmp_path, config)
    assert total > 1000 * _MIB
    assert growth < 2 * largest + 100 * _MIB < 0.2 * total


def run_cli(*arguments: object) -> int:
    """`jaxllama convert …` without the process."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "src")
    assert run_cli(tmp_path / "src", tmp_path / "out", "--verify", "--dtype", "bfloat16") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "peak RAM" in captured.err
    assert "bytes of bfloat16" in captured.err
    assert "no tokenizer.json or tokenizer.model" in captured.err


@pytest.mark.parametrize("kind", ["missing", "corrupt", "exists"])
def test_bad_input_is_two_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    write_hf(tmp_path / "src")
    if kind == "missing":
        shutil.rmtree(tmp_path / "src")
    elif kind == "corrupt":
        (tmp_path / "src" / "model.safetensors").write_bytes(b'\x10\0\0\0\0\0\0\0{"\x1b[31m\\n": 1}  ')
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").touch()
    assert run_cli(tmp_path / "src", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()
    assert str(tmp_path) in error


def test_failure_to_write_is_one_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "src")
    (tmp_path / "file").touch()
    assert run_cli(tmp_path / "src", tmp_path / "file" / "out") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be written" in error


def test_an_interrupt_is_no_traceback(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "src")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jaxllama.weights.arrays.writer.ParamsWriter, "commit", interrupt)
        assert run_cli(tmp_path / "src", tmp_path / "out") == 130
    assert "resume" in capsys.readouterr().err
    assert run_cli(tmp_path / "src", tmp_path / "out") == 0
    assert "21 tensors were there already" in capsys.readouterr().err
