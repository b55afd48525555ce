"""Laws of exporting: the same bytes as were converted, from any mesh, and never half a model."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from jaxllama_convert import convert
from oracle.tiny_families import TINY_FAMILIES
from oracle.tiny_models import TINY_MODELS, random_weights
from safetensors import safe_open
from unit.model.config.families_test import weights_of
from unit.weights.places.bucket_test import store as store
from unit.weights.saving_test import bits, load
from unit.weights.sources.sources import BF16, CONFIG, weights, write_gguf, write_hf

import jaxllama
from jaxllama import Checkpoint, EngineOptions, LlamaConfig
from jaxllama.__main__ import main
from jaxllama.errors import CheckpointError, ConversionError, PlaceError, StoreError
from jaxllama.model.int8 import quantize_rows
from jaxllama.weights.exporting import destination, tensors
from jaxllama.weights.exporting.export import export
from jaxllama.weights.exporting.shards import num_bytes_of

ORACLE = Path(os.environ.get("JAXLLAMA_ORACLE_PYTHON", Path(__file__).parents[3] / ".oracle-venv/bin/python"))
CHECK = Path(__file__).parents[2] / "oracle" / "check_export.py"
OPTIONS = EngineOptions(max_rows=1, max_context=64, page_size=4, num_pages=40, chunk_sizes=(32,))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix has several blocks, as large ones have; nobody waits for the disk."""
    monkeypatch.setattr(tensors, "_BLOCK_BYTES", 1500)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a Hugging Face folder: dtype, shape, bytes. Read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                array = file.get_tensor(name)
                found[name] = (array.dtype.name, array.shape, array.tobytes())
    return found


@functools.cache
def rounded(name: str) -> Mapping[str, np.ndarray]:
    return {key: value.astype(BF16) for key, value in weights_of(name).items()}


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_family_comes_back_byte_for_byte(tmp_path, name):
    """Phi-3's joined matrices too; converted again, every array is the same."""
    write_hf(tmp_path / "hf", TINY_FAMILIES[name] | {"torch_dtype": "bfloat16"}, rounded(name), shards=2)
    convert(tmp_path / "hf", tmp_path / "out")
    report = export(tmp_path / "out", tmp_path / "back", max_shard_size="20KB")
    assert stored(tmp_path / "back") == stored(tmp_path / "hf")
    assert report.num_files == len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    convert(tmp_path / "back", tmp_path / "again")
    assert arrays(tmp_path / "again") == arrays(tmp_path / "out")


def arrays(checkpoint: Path) -> dict[str, bytes]:
    opened = Checkpoint.open(checkpoint)
    names = [name for name in opened.manifest.files if name.count("/") == 2]
    return {name: (checkpoint / name).read_bytes() for name in names}


@pytest.mark.parametrize("name", ["wide_heads_tied", "biased", "phi3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_int8_comes_back_bit_for_bit(tmp_path, name, dtype):
    hf = (TINY_FAMILIES | TINY_MODELS)[name]
    write_hf(tmp_path / "hf", hf, weights_of(name) if name in TINY_FAMILIES else random_weights(hf, 0))
    convert(tmp_path / "hf", tmp_path / "out", dtype=dtype, quantize="int8")
    report = export(tmp_path / "out", tmp_path / "back")
    assert (report.quantize, report.dtype) == ("int8", dtype)
    again = convert(tmp_path / "back", tmp_path / "again", dtype=dtype, quantize="int8")
    assert arrays(tmp_path / "again") == arrays(tmp_path / "out")
    assert not [warning for warning in again.warnings if "matrices" in warning]  # nothing is rounded twice
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == (["lm_head"] if hf["tie_word_embeddings"] else [])
    assert config["torch_dtype"] == dtype


def test_dense_numbers_round_to_the_int8_ones_that_they_stand_for():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5000, 37)) * np.exp(rng.uniform(-40, 20, (5000, 1)))).astype(np.float32)
    x[7] = 0
    values, scale = quantize_rows(x)
    dense = tensors._dense(values, scale)
    again = quantize_rows(dense)
    np.testing.assert_array_equal(again[0], values)
    np.testing.assert_array_equal(again[1], scale)
    exact = values.astype(np.float64) * scale.astype(np.float64)[:, None]
    assert np.all(np.abs(dense - exact) <= 2.5e-7 * np.abs(exact))
    # Without the step some scales would not come back, so that the test can fail.
    assert (quantize_rows(values.astype(np.float32) * scale[:, None])[1] != scale).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_int8_in_another_dtype_is_dense(tmp_path, dtype):
    write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", quantize="int8")
    export(tmp_path / "out", tmp_path / "back", dtype=dtype)
    values, scale = quantize_rows(weights(CONFIG)["lm_head.weight"])
    want = tensors._dense(values, scale).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert stored(tmp_path / "back")["lm_head.weight"] == (dtype, (70, 20), want.tobytes())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == dtype


def test_what_a_dtype_cannot_hold_is_named(tmp_path):
    large = weights(CONFIG)
    large["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    write_hf(tmp_path / "hf", tensors=large)
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.up_proj\.weight has 1 .* beyond float16"):
        export(tmp_path / "hf", tmp_path / "back", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize(
    ("tp", "data", "quantize", "dtype"),
    [(8, 1, None, "float32"), (4, 2, "int8", "bfloat16"), (1, 1, "int8", "float32"), (1, 1, None, "bfloat16")],
)
def test_a_mesh_exports_what_its_checkpoint_would(tmp_path, tp, data, quantize, dtype):
    model = tiny.write_checkpoint(tmp_path / "model", "divisible")
    with load(model, tp=tp, data=data, quantize=quantize, dtype=dtype) as llama:
        saved = llama.save(tmp_path / "saved").path
        assert llama.export(tmp_path / "back", max_shard_size=10_000) == str(tmp_path / "back")
        want = bits(llama)
    export(saved, tmp_path / "direct", max_shard_size=10_000)
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "direct").iterdir()} == {
        name: (tmp_path / "back" / name).read_bytes() for name in names
    }
    assert names >= {"tokenizer.json", "chat_template.jinja", "generation_config.json", "model.safetensors.index.json"}
    with jaxllama.load(tmp_path / "back", one_device(saved), quantize=quantize, dtype=dtype) as again:
        assert bits(again) == want


def test_weights_in_parts_are_exported_whole(tmp_path, monkeypatch):
    model = tiny.write_checkpoint(tmp_path / "model", "divisible")
    export(model, tmp_path / "want")
    monkeypatch.setattr("jaxllama.model.platforms.cpu.native.is_available", lambda: False)
    monkeypatch.setattr("jaxllama.weights.forms.num_ffn_parts", lambda *_: 3)
    with load(model, tp=4) as llama:
        llama.export(tmp_path / "back")
    assert stored(tmp_path / "back") == stored(tmp_path / "want")


def test_a_gguf_becomes_a_folder_that_is_converted_to_the_same(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    export(tmp_path / "model.gguf", tmp_path / "back")
    convert(tmp_path / "model.gguf", tmp_path / "out")
    convert(tmp_path / "back", tmp_path / "again")
    assert arrays(tmp_path / "again") == arrays(tmp_path / "out")


def test_the_index_names_every_tensor_and_a_large_one_has_a_file_of_its_own(tmp_path):
    write_hf(tmp_path / "hf")
    report = export(tmp_path / "hf", tmp_path / "back", max_shard_size=3000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    sizes = {name: 4 * value.size for name, value in weights(CONFIG).items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) == report.num_bytes
    assert index["weight_map"].keys() == sizes.keys()
    for file in set(index["weight_map"].values()):
        held = [name for name, of in index["weight_map"].items() if of == file]
        assert len(held) == 1 or sum(sizes[name] for name in held) <= 3000


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), (7, 7)])
def test_sizes_are_read_as_transformers_reads_them(text, size):
    assert num_bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "5TB", "GB", "1.5GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConversionError, match="expected one as 5GB"):
        num_bytes_of(text)


def test_what_is_there_stays_without_force_and_what_is_not_ours_always(tmp_path):
    write_hf(tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "back")
    before = (tmp_path / "back" / "model.safetensors").stat().st_ino
    with pytest.raises(ConversionError, match="exists; give --force"):
        export(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").stat().st_ino == before
    export(tmp_path / "hf", tmp_path / "back", force=True, dtype="bfloat16")
    assert stored(tmp_path / "back")["lm_head.weight"][0] == "bfloat16"
    write_hf(tmp_path / "other")
    with pytest.raises(ConversionError, match="was not written by jaxllama export"):
        export(tmp_path / "hf", tmp_path / "other", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "back", "other"}


def test_an_export_is_never_made_in_its_source(tmp_path):
    write_hf(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    for place in ("out", "out/back", "."):
        with pytest.raises(ConversionError, match=r"is inside the source|holds the source"):
            export(tmp_path / "out", tmp_path / place, force=True)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConversionError, match="a link to nowhere"):
        export(tmp_path / "out", tmp_path / "link")
    with pytest.raises(PlaceError, match="expected gs://"):
        export(tmp_path / "out", "hub://x")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    write_hf(tmp_path / "hf")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(destination.os, "fsync", full)
        with pytest.raises(StoreError, match=r"model\.safetensors: No space left"):
            export(tmp_path / "hf", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


KILLED = """
import os, signal, sys
from pathlib import Path
from jaxllama.weights.exporting import destination, export

def write(folder, name, num_bytes, parts):
    if name.startswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(folder, name, num_bytes, parts)

def put_in_place(folder, destination, *, old):
    if destination.exists():
        os.rename(destination, old)
    os.kill(os.getpid(), signal.SIGKILL)

original, destination._Folder.write = destination._Folder.write, write
if sys.argv[3] == "renames":
    destination.put_in_place = put_in_place
export.export(sys.argv[1], sys.argv[2], max_shard_size=3000, force=True)
"""


@pytest.mark.parametrize("moment", ["model-00003-", "config.json", "renames"])
def test_a_killed_export_leaves_what_was_there_and_the_next_one_is_whole(tmp_path, moment):
    write_hf(tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "back")
    want = stored(tmp_path / "back")
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "hf", tmp_path / "back", moment], timeout=120)
    assert done.returncode == -9
    assert (tmp_path / ".back.exporting").exists()
    assert moment == "renames" or stored(tmp_path / "back") == want
    with pytest.raises(ConversionError, match="give --force"):
        export(tmp_path / "hf", tmp_path / "back")
    # What stood there between the renames is put back before anything else.
    assert stored(tmp_path / "back") == want
    export(tmp_path / "hf", tmp_path / "back", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "back"}


def test_a_model_of_no_checkpoint_cannot_be_exported(tmp_path):
    with tiny.make_llama() as llama, pytest.raises(CheckpointError, match="of no checkpoint"):
        llama.export(tmp_path / "back")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    write_hf(tmp_path / "hf")
    assert main(["export", str(tmp_path / "hf"), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    assert f"wrote {tmp_path / 'back'}: " in (said := capsys.readouterr().err)
    assert "bytes of bfloat16 in 1 file(s)" in said
    assert main(["export", str(tmp_path / "hf"), str(tmp_path / "back")]) == 2
    assert "give --force to replace it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not ORACLE.exists(), reason="needs transformers: make oracle, or JAXLLAMA_ORACLE_PYTHON")
def test_transformers_gives_the_same_logits(tmp_path):
    cases = [(name, None) for name in TINY_FAMILIES] + [
        ("phi3", "int8"),
        ("wide_heads_tied", "int8"),
        ("biased", "int8"),
    ]
    folders = []
    for name, quantize in cases:
        hf = (TINY_FAMILIES | TINY_MODELS)[name]
        folder = tmp_path / f"{name}-{quantize}"
        write_hf(folder / "src", hf, weights_of(name) if name in TINY_FAMILIES else random_weights(hf, 0))
        convert(folder / "src", folder / "out", quantize=quantize)
        export(folder / "out", folder / "hf", max_shard_size="30KB")
        ids = np.arange(3, 43) * 7 % hf["vocab_size"]
        mesh = jaxllama.make_mesh(LlamaConfig.from_hf(hf), tp=1)
        with jaxllama.load(folder / "out", mesh, options=OPTIONS) as llama:
            np.savez(folder / "logits.npz", ids=ids, logits=llama.logits(ids.tolist()))
        folders.append(folder)
    done = subprocess.run([ORACLE, CHECK, *folders], stdout=subprocess.PIPE, timeout=600, check=True)
    results = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [result["folder"] for result in results] == [folder.name for folder in folders]
    for result in results:
        assert not result["missing"], result
        assert not result["unexpected"], result
        assert result["difference"] < 2e-5, result


def test_a_bucket_gets_the_same_files_and_is_a_model(tmp_path, store):
    model = tiny.write_checkpoint(tmp_path / "model", "divisible")
    export(model, tmp_path / "back", max_shard_size=10_000)
    report = export(model, "s3://models/hf", max_shard_size=10_000)
    assert report.where == "s3://models/hf"
    files = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert store.objects == {f"models/hf/{name}": data for name, data in files.items()}
    with jaxllama.load(model, one_device(model)) as want, jaxllama.load("s3://models/hf", one_device(model)) as got:
        assert bits(got) == bits(want)
        got.export("s3://models/again", max_shard_size=10_000)
    assert all(store.objects[f"models/again/{name}"] == data for name, data in files.items())


def one_device(model: Path) -> Any:
    return jaxllama.make_mesh(Checkpoint.open(model).config, tp=1)


def test_an_export_to_a_bucket_resumes_after_the_last_file(tmp_path, store, monkeypatch):
    model = tiny.write_checkpoint(tmp_path / "model", "divisible")
    export(model, "s3://models/want", max_shard_size=10_000)
    write = destination._Bucket.write

    def fail(bucket: Any, name: str, num_bytes: int, parts: Any) -> None:
        if name == "model-00015-of-00017.safetensors":
            raise StoreError("gone")
        write(bucket, name, num_bytes, parts)

    with monkeypatch.context() as patch:
        patch.setattr(destination._Bucket, "write", fail)
        with pytest.raises(StoreError, match="gone"):
            export(model, "s3://models/hf", max_shard_size=10_000)
    assert "models/hf/config.json" not in store.objects
    before = len(store.requests)
    export(model, "s3://models/hf", max_shard_size=10_000)
    sent = {line.split("/")[-1].split("?")[0] for line in store.requests[before:] if line.startswith(("PUT", "POST"))}
    assert {name for name in sent if name.endswith("safetensors")} == {
        f"model-000{i}-of-00017.safetensors" for i in (15, 16, 17)
    }
    names = [name.removeprefix("models/want/") for name in store.objects if name.startswith("models/want/")]
    assert all(store.objects[f"models/hf/{name}"] == store.objects[f"models/want/{name}"] for name in names)
    assert len(names) == len([name for name in store.objects if name.startswith("models/hf/")])


def test_a_bucket_that_has_a_model_keeps_it_without_force(tmp_path, store):
    write_hf(tmp_path / "hf")
    export(tmp_path / "hf", "s3://models/hf", max_shard_size=3000)
    before = dict(store.objects)
    with pytest.raises(PlaceError, match="give --force"):
        export(tmp_path / "hf", "s3://models/hf")
    assert store.objects == before
    export(tmp_path / "hf", "s3://models/hf", dtype="bfloat16", force=True)
    # What the larger export had besides is gone.
    assert sorted(name for name in store.objects if "safetensors" in name) == ["models/hf/model.safetensors"]
    for place in ("s3://models/hf", "s3://models/hf/inside", "s3://models"):
        with pytest.raises(ConversionError, match="is inside the source"):
            export("s3://models/hf", place, force=True)
