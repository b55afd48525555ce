"""Laws of checkpoints: what is written is restored bit for bit, on any sharding, and damage is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxllama.weights.arrays.chunks
from jaxllama.errors import CheckpointError, ConfigError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import Params, ParamSpec, build_params, get_param, param_specs
from jaxllama.weights.arrays.files import hash_file
from jaxllama.weights.arrays.writer import ParamsWriter
from jaxllama.weights.checkpoint import MANIFEST, Checkpoint, Manifest
from jaxllama.weights.loading import restore_params

CONFIG = {
    "model_type": "llama",
    "vocab_size": 72,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


def write_checkpoint(folder: Path, dtype: str = "float32", **files: Any) -> Params:
    """Writes a checkpoint without the converter and returns its parameters."""
    config = LlamaConfig.from_hf(CONFIG)
    rng = np.random.default_rng(0)
    params = build_params(config, lambda spec: rng.standard_normal(spec.shape).astype(jnp.dtype(dtype)))
    folder.mkdir(parents=True)
    for name, value in ({"config": CONFIG} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    writer = ParamsWriter(folder, config, dtype)
    records = {}
    for spec in param_specs(config):
        records |= writer.write(spec, get_param(params, spec))
    writer.commit()
    for path in folder.rglob("*"):
        if path.is_file():
            record = hash_file(path)
            # What the writer says of a file is what is on disk.
            assert records.setdefault(path.relative_to(folder).as_posix(), record) == record
    (folder / MANIFEST).write_text(Manifest(dtype, {"kind": "test"}, records, {}).to_json())
    return params


def same(got: Params, want: Params) -> bool:
    """Whether two trees have the same structure, dtypes and bits."""

    def equal(a: Any, b: Any) -> bool:
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    return jax.tree.structure(got) == jax.tree.structure(want) and jax.tree.all(jax.tree.map(equal, got, want))


def everywhere(sharding: Any) -> Params:
    """A tree with one sharding at every leaf."""
    return build_params(LlamaConfig.from_hf(CONFIG), lambda spec: sharding)


def one_device() -> Params:
    return everywhere(SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restore_gives_the_bits_that_were_written(tmp_path: Path, dtype: str) -> None:
    want = write_checkpoint(tmp_path / "c", dtype)
    checkpoint = Checkpoint.open(tmp_path / "c")
    checkpoint.verify()
    assert checkpoint.dtype == dtype
    assert checkpoint.config == LlamaConfig.from_hf(CONFIG)
    assert same(restore_params(checkpoint, jnp.dtype(dtype), one_device()), want)


def test_restore_casts(tmp_path: Path) -> None:
    want = write_checkpoint(tmp_path / "c")
    got = restore_params(Checkpoint.open(tmp_path / "c"), jnp.bfloat16, one_device())
    assert same(got, jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), want))


@pytest.mark.parametrize("axis", [0, 1])
def test_every_device_gets_its_own_shard(tmp_path: Path, axis: int) -> None:
    want = write_checkpoint(tmp_path / "c")
    size = max(n for n in (1, 2, 4, 8) if n <= len(jax.devices()))
    mesh = Mesh(np.array(jax.devices()[:size]), ("x",))

    def sharding(spec: ParamSpec) -> NamedSharding:
        cut = len(spec.shape) > axis and spec.shape[axis] % size == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "x") if cut else PartitionSpec())

    shardings = build_params(LlamaConfig.from_hf(CONFIG), sharding)
    got = restore_params(Checkpoint.open(tmp_path / "c"), jnp.float32, shardings)
    assert same(got, want)
    assert jax.tree.all(jax.tree.map(lambda array, wanted: array.sharding == wanted, got, shardings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_orbax_restores_the_params(tmp_path: Path, dtype: str) -> None:
    want = write_checkpoint(tmp_path / "c", dtype)
    one = SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        assert same(checkpointer.restore(tmp_path / "c" / "params"), want)
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), want)
        restored = checkpointer.restore(tmp_path / "c" / "params", target)
        assert same(restored, want)
        assert isinstance(restored["norm"], jax.Array)
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert same(checkpointer.restore(tmp_path / "c" / "params"), want)


@pytest.mark.parametrize("max_bytes", [500, 1000, 4000])
def test_chunks_of_any_size_hold_the_same_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    # No chunk size divides 72 x 24 and 40 x 24 everywhere, so that padded chunks are among them.
    monkeypatch.setattr(jaxllama.weights.arrays.chunks, "_MAX_CHUNK_BYTES", max_bytes)
    want = write_checkpoint(tmp_path / "c")
    assert len(list((tmp_path / "c" / "params" / "embed_tokens").iterdir())) > 2
    got = restore_params(Checkpoint.open(tmp_path / "c"), jnp.float32, one_device())
    assert same(got, want)


def test_large_tensors_are_cut_where_tensor_parallelism_cuts() -> None:
    config = LlamaConfig.from_hf(
        CONFIG
        | {"hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "head_dim": 128}
    )
    specs = {spec.name: spec for spec in param_specs(config)}
    chunk = jaxllama.weights.arrays.chunks.chunk_shape
    assert chunk(specs["layers.0.down_proj"], 2) == (8192, 28672 // 16)
    assert chunk(specs["layers.0.gate_proj"], 2) == (28672 // 16, 8192)
    assert chunk(specs["layers.0.k_proj"], 2) == (64, 8192)
    assert chunk(specs["embed_tokens"], 2)[0] * 8192 * 2 <= 64 * 2**20
    assert chunk(specs["norm"], 2) == (8192,)


def test_the_end_tokens_are_generation_configs(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", generation_config={"eos_token_id": [2, 7], "temperature": 0.6})
    assert Checkpoint.open(tmp_path / "a").config.eos_token_ids == (2,)
    opened = Checkpoint.open(tmp_path / "b")
    assert opened.config.eos_token_ids == (2, 7)
    assert opened.generation_config["temperature"] == 0.6


def test_an_end_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", generation_config={"eos_token_id": 72})
    with pytest.raises(ConfigError, match="below vocab_size"):
        Checkpoint.open(tmp_path / "c")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "params").mkdir(parents=True)
    for name, message in (("gone", "does not exist"), ("file", "is a file"), ("empty", "not a checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path / name)
    with pytest.raises(CheckpointError, match="an incomplete checkpoint"):
        Checkpoint.open(tmp_path / "half")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "not the manifest of a jaxllama checkpoint"),
        (lambda m: m.update(version=3), "version 3 is not supported"),
        (lambda m: m.update(dtype="int4"), "dtype 'int4'"),
        (lambda m: m.pop("files"), "'files' is malformed"),
        (lambda m: m.update(files={"a": {"size": "x"}}), "'files' is malformed"),
        (lambda m: m.update(files={"a": {"size": 1, "hash": "crc32:12345678"}}), "is no hash that is known"),
        (lambda m: m["files"].update({"../x": {"size": 1, "hash": "blake3:" + "0" * 64}}), "leads out"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 1, "hash": "blake3:" + "0" * 64}}), "leads out"),
        (lambda m: m["files"].pop("params/norm/.zarray"), "tensor norm is not in the checkpoint"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    write_checkpoint(tmp_path / "c")
    path = tmp_path / "c" / MANIFEST
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=message):
        restore_params(Checkpoint.open(tmp_path / "c"), jnp.float32, one_device())


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_a_manifest_that_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Checkpoint.open(tmp_path / "c")


def test_open_lists_every_truncated_and_missing_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c")
    chunk = tmp_path / "c" / "params" / "norm" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (tmp_path / "c" / "params" / "embed_tokens" / "0.0").unlink()
    with pytest.raises(CheckpointError, match=r"2 damaged file\(s\)") as caught:
        Checkpoint.open(tmp_path / "c")
    assert "params/norm/0: 95 bytes, expected 96" in str(caught.value)
    assert "params/embed_tokens/0.0: missing" in str(caught.value)


def test_verify_lists_every_flipped_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c")
    for name in ("params/norm/0", "params/layers.1.down_proj/0.0", "config.json"):
        path = tmp_path / "c" / name
        data = bytearray(path.read_bytes())
        data[-1 if name != "config.json" else data.index(b"2")] ^= 1
        path.write_bytes(data)
    checkpoint = Checkpoint.open(tmp_path / "c")
    (tmp_path / "c" / "params" / "norm" / "1").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"4 damaged") as caught:
        checkpoint.verify()
    for name in (
        "params/norm/0: blake3",
        "layers.1.down_proj/0.0: blake3",
        "config.json: blake3",
        "norm/1: not in the",
    ):
        assert name in str(caught.value)


def test_a_manifest_of_version_1_is_read_and_its_sha256_compared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c")
    path = tmp_path / "c" / MANIFEST
    value = json.loads(path.read_text())
    for name, record in value["files"].items():
        del record["hash"]
        record["sha256"] = hashlib.sha256((tmp_path / "c" / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(value | {"version": 1}))
    checkpoint = Checkpoint.open(tmp_path / "c")
    checkpoint.verify()
    (tmp_path / "c" / "params" / "norm" / "0").write_bytes(bytes(96))
    with pytest.raises(CheckpointError, match="params/norm/0: sha256 is"):
        checkpoint.verify()


def test_a_config_of_another_model_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c")
    checkpoint = Checkpoint.open(tmp_path / "c")
    other = LlamaConfig.from_hf(CONFIG | {"intermediate_size": 48})
    wrong = dataclasses.replace(checkpoint, config=other)
    with pytest.raises(CheckpointError, match=r"gate_proj: shape \(40, 24\), expected \(48, 24\)"):
        restore_params(wrong, jnp.float32, one_device())


def test_the_writer_refuses_another_shape_or_dtype(tmp_path: Path) -> None:
    config = LlamaConfig.from_hf(CONFIG)
    writer = ParamsWriter(tmp_path, config, "float32")
    spec = param_specs(config)[0]
    for array in (np.zeros(spec.shape, np.float64), np.zeros(spec.shape[::-1], np.float32)):
        with pytest.raises(CheckpointError, match="embed_tokens"):
            writer.write(spec, array)
