"""Laws of reading GGUF files: values as the gguf package dequantises them, names and config as Hugging Face's."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from jaxllama_convert import convert
from unit.weights.sources.sources import BF16, GGUF_CONFIG, weights, write_gguf

from jaxllama.errors import ConfigError, ConversionError, JaxLlamaError
from jaxllama.model.config import LlamaConfig, RopeScaling
from jaxllama.model.params import param_specs
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.places import LocalPlace
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors
from jaxllama.weights.sources.source import BLOCK_TYPES

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def stored(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, read without Orbax or TensorStore: raw chunks put side by side."""
    checkpoint = Checkpoint.open(path)
    dtype = BF16 if checkpoint.dtype == "bfloat16" else np.dtype(np.float32)
    tensors = {}
    for spec in param_specs(checkpoint.config):
        folder = path / "params" / spec.name
        array = np.fromfile(folder / ".".join("0" * len(spec.shape)), dtype)
        assert {file.name for file in folder.iterdir()} == {".zarray", ".".join("0" * len(spec.shape))}
        tensors[spec.hf_name] = array.reshape(spec.shape)
    return tensors


@pytest.mark.parametrize("quant", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1], ids=lambda q: q.name)
def test_every_type_converts_as_gguf_dequantises_it(tmp_path: Path, quant: Q) -> None:
    want = write_gguf(tmp_path / "model.gguf", quant=quant)
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="float32")
    got = stored(tmp_path / "out")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert np.array_equal(got[name], value), name


def random_blocks(quant: Q, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Rows of block data, of which gguf makes finite numbers; it cannot itself make blocks of most types."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (math.prod(shape) // block, block_bytes), dtype=np.uint8)
    bad = np.ones(len(data), bool)
    while bad.any():
        with np.errstate(all="ignore"):
            values = gguf.dequantize(data[bad], quant)
        data_of_bad = data[bad]
        # Nobody's weights are larger.
        again = ~(np.abs(values) < 1e6).all(axis=1)
        data_of_bad[again] = rng.integers(0, 256, (int(again.sum()), block_bytes), dtype=np.uint8)
        data[bad] = data_of_bad
        bad[bad] = again
    return data.reshape(shape[0], -1)


@pytest.mark.parametrize("quant", [Q[name] for name in BLOCK_TYPES], ids=lambda q: q.name)
def test_every_block_type_is_read_as_gguf_dequantises_it(tmp_path: Path, quant: Q) -> None:
    config = GGUF_CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    want = write_gguf(tmp_path / "model.gguf", config, quant, blocks=random_blocks)
    source = open_source(tmp_path / "model.gguf")
    match_tensors(LlamaConfig.from_hf(source.config), source.tensors, "model")
    for name, value in want.items():
        tensor = source.tensors[name]
        assert np.array_equal(tensor.read_rows(0, tensor.shape[0], hashed=False), value), name
        first = tensor.read_rows(0, tensor.row_multiple, hashed=False)
        assert np.array_equal(first, value[: tensor.row_multiple]), name
    source.close()


def test_the_list_of_block_types_is_ggufs() -> None:
    known = {quant.name for quant in gguf.quants._type_traits}
    assert known - {"BF16"} == set(BLOCK_TYPES)


def test_bfloat16_rounds_the_dequantised_value_to_nearest(tmp_path: Path) -> None:
    want = write_gguf(tmp_path / "model.gguf", quant=Q.Q8_0)
    report = convert(tmp_path / "model.gguf", tmp_path / "out")
    assert report.dtype == "bfloat16"
    for name, value in stored(tmp_path / "out").items():
        assert np.array_equal(value, want[name].astype(BF16)), name


def test_a_tensor_larger_than_a_slice_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 rows of 64 are no multiple of head_dim, so that a slice through a permuted head would show.
    monkeypatch.setattr("jaxllama_convert.copying.SLICE_BYTES", 5 * 64)
    want = write_gguf(tmp_path / "model.gguf", quant=Q.Q4_1)
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype="float32")
    for name, value in stored(tmp_path / "out").items():
        assert np.array_equal(value, want[name]), name


def test_biases_are_permuted_like_their_matrices(tmp_path: Path) -> None:
    config = GGUF_CONFIG | {"attention_bias": True, "mlp_bias": True}
    want = write_gguf(tmp_path / "model.gguf", config)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    got = stored(tmp_path / "out")
    assert "model.layers.1.self_attn.q_proj.bias" in got
    for name, value in want.items():
        assert np.array_equal(got[name], value), name


@pytest.mark.parametrize("tied", [True, False])
def test_config_json_says_what_the_metadata_says(tmp_path: Path, tied: bool) -> None:
    config = GGUF_CONFIG | {"tie_word_embeddings": tied, "rope_theta": 500000.0}
    ids = {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.eos_token_id": 9, "tokenizer.ggml.eot_token_id": 11}
    write_gguf(tmp_path / "model.gguf", config, metadata=ids)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    want = LlamaConfig.from_hf(config | {"bos_token_id": 5, "eos_token_id": [9, 11]})
    assert Checkpoint.open(tmp_path / "out").config == want
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [9, 11]


def _rope(
    tmp_path: Path, metadata: dict[str, Any], divisors: np.ndarray | None = None, head_dim: int = 64
) -> RopeScaling:
    config = GGUF_CONFIG | {"rope_theta": 500000.0, "head_dim": head_dim}
    extra = None if divisors is None else {"rope_freqs.weight": divisors.astype(np.float32)}
    write_gguf(tmp_path / "model.gguf", config, metadata=metadata, extra=extra)
    source = open_source(tmp_path / "model.gguf")
    source.close()
    return LlamaConfig.from_hf(source.config).rope


def _llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """As llama.cpp's converter writes them, one by one."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi / theta ** (-i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_freqs_become_llama3_parameters(tmp_path: Path, factor: float, head_dim: int) -> None:
    divisors = _llama3_divisors(head_dim, 500000.0, factor)
    assert len(set(divisors)) > 3
    want = RopeScaling.from_hf({"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"factor": factor}})
    assert _rope(tmp_path, {}, divisors, head_dim) == want


def test_rope_freqs_of_ones_change_nothing(tmp_path: Path) -> None:
    assert _rope(tmp_path, {}, np.ones(32)).rope_type == "default"


@pytest.mark.parametrize("divisors", [np.linspace(1, 8, 32), np.full(32, np.nan), np.full(32, 0.5), np.ones(31) * 2])
def test_other_rope_freqs_are_an_error_not_a_guess(tmp_path: Path, divisors: np.ndarray) -> None:
    with pytest.raises(JaxLlamaError, match=r"rope_freqs\.weight"):
        _rope(tmp_path, {}, divisors)


def test_linear_scaling_is_read(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    rope = _rope(tmp_path, metadata)
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, "'longrope'"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window"),
        ({"tokenizer.ggml.eos_token_id": 96}, "eos_token_id"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "model.gguf", tmp_path / "out")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", architecture="qwen2moe")
    with pytest.raises(ConfigError, match="'qwen2moe' is not supported; supported: llama, qwen2"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


def test_missing_and_unexpected_tensors_are_listed_at_once(tmp_path: Path) -> None:
    tensors = weights(GGUF_CONFIG)
    del tensors["model.norm.weight"]
    write_gguf(tmp_path / "model.gguf", tensors=tensors, extra={"blk.0.attn_q_norm.weight": np.ones(16, np.float32)})
    with pytest.raises(ConversionError, match=r"missing model\.norm\.weight; unexpected blk\.0\.attn_q_norm\.weight"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


def test_other_types_are_named(tmp_path: Path) -> None:
    tensors = weights(GGUF_CONFIG)
    del tensors["model.norm.weight"]
    write_gguf(tmp_path / "model.gguf", tensors=tensors, extra={"output_norm.weight": np.ones(64, np.float64)})
    with pytest.raises(ConversionError, match=r"model\.norm\.weight has dtype F64, expected one of F32"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _info(name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def _file(tensors: list[bytes], fields: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def _field(key: bytes, kind: int, value: bytes) -> bytes:
    return _string(key) + struct.pack("<I", kind) + value


BAD_FILES = {
    "empty": (b"", "4 bytes expected"),
    "wrong magic": (b"GGML" + b"\0" * 60, "wrong magic"),
    "version 1": (_file([], [], version=1), "version 1"),
    "big-endian": (_file([], [], version=3 << 24), "version 50331648"),
    "2^60 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "too many"),
    "2^60 fields": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "too many"),
    "key of 2^63 bytes": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "too long"),
    "key past the end": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1000), "1000 bytes expected"),
    "key not UTF-8": (_file([], [_field(b"\xff", 4, b"\0\0\0\0")]), "not UTF-8"),
    "key twice": (_file([], [_field(b"k", 0, b"\0")] * 2), "'k' appears twice"),
    "unknown type": (_file([], [_field(b"k", 77, b"\0" * 8)]), "metadata type 77"),
    "array of 2^62": (_file([], [_field(b"k", 9, struct.pack("<IQ", 5, 2**62))]), "too long"),
    "array past the end": (_file([], [_field(b"k", 9, struct.pack("<IQ", 5, 9_999_999))]), "bytes expected"),
    "texts past the end": (_file([], [_field(b"k", 9, struct.pack("<IQ", 8, 9_999_999))]), "bytes expected"),
    "array of arrays": (_file([], [_field(b"k", 9, struct.pack("<IQ", 9, 1))]), "arrays of arrays"),
    "alignment 0": (_file([], [_field(b"general.alignment", 4, b"\0" * 4)]), "power of two"),
    "alignment 3": (_file([], [_field(b"general.alignment", 4, b"\3\0\0\0")]), "power of two"),
    "five dimensions": (_file([_info(dims=(1,) * 5)], []), "5 dimensions"),
    "no dimensions": (_file([_info(dims=())], []), "shape []"),
    "unknown block type": (_file([_info(kind=999)], []), "unknown type 999"),
    "tensor twice": (_file([_info(), _info(offset=128)], [], b"\0" * 256), "appears twice"),
    "overlap": (_file([_info(), _info(b"u", offset=64)], [], b"\0" * 256), "overlaps 't'"),
    "past the end": (_file([_info()], [], b"\0" * 127), "Was the download complete"),
    "offset 2^63": (_file([_info(offset=2**63)], [], b"\0" * 128), "Was the download complete"),
    "overflowing shape": (_file([_info(dims=(2**33, 2**33))], [], b"\0" * 128), "Was the download complete"),
    "rows of no block": (_file([_info(dims=(31,), kind=2)], [], b"\0" * 128), "multiple of 32"),
    "name with ..": (_file([_info(b"../x")], [], b"\0" * 128), "safely"),
    "name with NUL": (_file([_info(b"a\0")], [], b"\0" * 128), "safely"),
    "no architecture": (_file([_info()], [], b"\0" * 128), "architecture None"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_malformed_file_is_named(tmp_path: Path, case: str) -> None:
    data, message = BAD_FILES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(JaxLlamaError) as caught:
        convert(path, tmp_path / "out")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_a_header_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    data = (tmp_path / "model.gguf").read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(data), 4999), len(data) - 1]:
        (tmp_path / "model.gguf").write_bytes(data[:length])
        with pytest.raises(JaxLlamaError):
            open_source(tmp_path / "model.gguf")


def split(path: Path, counts: tuple[int, ...], **metadata: Any) -> tuple[list[Path], dict[str, np.ndarray]]:
    """Writes a model in parts as `gguf-split` does: metadata in the first, some tensors in each. Returns the values."""
    want = write_gguf(path, quant=Q.Q4_0)
    reader = gguf.GGUFReader(path)
    tensors, parts = iter(reader.tensors), []
    for number, count in enumerate(counts):
        parts.append(path.with_name(f"{path.stem}-{number + 1:05d}-of-{len(counts):05d}.gguf"))
        writer = gguf.GGUFWriter(parts[-1], "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", metadata.get("no", number))
        writer.add_uint16("split.count", metadata.get("count", len(counts)))
        writer.add_int32("split.tensors.count", metadata.get("tensors", sum(counts)))
        for _ in range(count):
            tensor = next(tensors)
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert next(tensors, None) is None
    path.unlink()
    return parts, want


@pytest.mark.parametrize("named", ["the first part", "another part", "the folder"])
def test_parts_are_one_model(tmp_path: Path, named: str) -> None:
    (tmp_path / "in").mkdir()
    parts, want = split(tmp_path / "in" / "m.gguf", (0, 12, 9))
    path = {"the first part": parts[0], "another part": parts[2], "the folder": tmp_path / "in"}[named]
    convert(path, tmp_path / "out", dtype="float32")
    got = stored(tmp_path / "out")
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], value) for name, value in want.items())
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert set(source["files"]) == {part.name for part in parts}


BAD_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "too few tensors": ({"tensors": 22}, "split.tensors.count is 22, but the parts have 21"),
    "another count": ({"count": 3}, "split.count is 3, expected 2"),
    "another number": ({"no": 1}, "split.no is 1, expected 0"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_are_not_of_one_model_are_named(tmp_path: Path, case: str) -> None:
    metadata, message = BAD_PARTS[case]
    parts, _ = split(tmp_path / "m.gguf", (10, 11), **metadata)
    with pytest.raises(ConversionError, match=message.replace(".", r"\.")):
        open_source(parts[0])


def test_a_missing_part_and_a_tensor_in_two_are_named(tmp_path: Path) -> None:
    parts, _ = split(tmp_path / "m.gguf", (10, 11))
    parts[1].unlink()
    with pytest.raises(ConversionError, match="m-00002-of-00002"):
        open_source(parts[0])
    header = b"split.no" + struct.pack("<IH", 2, 0)
    assert header in parts[0].read_bytes()
    parts[1].write_bytes(parts[0].read_bytes().replace(header, b"split.no" + struct.pack("<IH", 2, 1)))
    with pytest.raises(ConversionError, match=r"is in m-00001-of-00002\.gguf, too"):
        open_source(parts[0])


def test_our_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    metadata = {"a.bool": True, "a.float": 2.5, "a.text": "é", "a.texts": ["x", "", "ü"], "a.ints": [3, -4]}
    write_gguf(tmp_path / "model.gguf", quant=Q.Q4_0, metadata=metadata)
    from jaxllama.weights.sources.gguf_file import read_gguf_header
    from jaxllama.weights.sources.source import SourceFile

    file = SourceFile(LocalPlace(tmp_path), "model.gguf")
    header = read_gguf_header(file)
    file.place.close()
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert header.metadata == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert {t.name: (t.offset, t.num_bytes, t.dtype, list(t.shape)) for t in header.tensors.values()} == {
        t.name: (t.data_offset, t.n_bytes, t.tensor_type.name, t.shape.tolist()[::-1]) for t in reader.tensors
    }
