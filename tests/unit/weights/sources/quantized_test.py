"""Laws of quantised safetensors: the values that each format's own library gives, in whatever slices they are read."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxllama_convert import convert
from safetensors.numpy import load_file, save_file
from unit.weights.sources.gguf_test import stored
from unit.weights.sources.sources import BF16, CONFIG, weights

from jaxllama.errors import ConfigError, ConversionError, JaxLlamaError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.int8 import quantize_rows
from jaxllama.system.hashing import hash_bytes
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors
from jaxllama.weights.sources.patterns import compile_pattern
from jaxllama.weights.sources.quantized.interface import Int8Tensor, unpack_words
from jaxllama.weights.sources.source import Source

GOLDEN = Path(__file__).parents[3] / "golden" / "quantised"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())["cases"]
MODEL = CONFIG | {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
K_PROJ = "model.layers.0.self_attn.k_proj"
AS_INT8 = {"ct_w8a8", "ct_w8a16", "ct_w4a16_channel", "bnb_int8"}


@functools.cache
def dense() -> Mapping[str, np.ndarray]:
    """The tensors that no case quantises, float32 values that bfloat16 holds."""
    quantised = CASES["awq"]["values"]
    return {n: w.astype(BF16).astype(np.float32) for n, w in weights(MODEL).items() if n not in quantised}


def write_case(folder: Path, case: str, quantization_config: Any = None, **changes: Any) -> Path:
    """A model whose second shard is the golden file. `changes` are tensors to put in or (None) leave out."""
    folder.mkdir(exist_ok=True)
    config = MODEL | {"quantization_config": quantization_config or CASES[case]["quantization_config"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: weight.astype(BF16) for name, weight in dense().items()}, folder / "a.safetensors")
    names = dict.fromkeys(dense(), "a.safetensors")
    # NumPy does not read FP8 through safetensors, so that what is changed lies in a file of its own.
    shutil.copy(GOLDEN / f"{case}.safetensors", folder / "b.safetensors")
    header = json.loads((folder / "b.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    names |= dict.fromkeys((name for name in header if name != "__metadata__"), "b.safetensors")
    if changes:
        tensors = load_file(folder / "b.safetensors") | changes
        save_file({name: value for name, value in tensors.items() if value is not None}, folder / "b.safetensors")
        names |= dict.fromkeys(changes, "b.safetensors")
        names = {name: file for name, file in names.items() if changes.get(name, 0) is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def read(source: Source, name: str, step: int) -> np.ndarray:
    tensor = source.tensors[name]
    starts = range(0, tensor.shape[0], step)
    return np.concatenate([tensor.read_rows(at, min(at + step, tensor.shape[0]), hashed=False) for at in starts])


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values.astype("<f4")).tobytes()).hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_formats_own_library(tmp_path: Path, case: str) -> None:
    source = open_source(write_case(tmp_path / "in", case))
    match_tensors(LlamaConfig.from_hf(source.config), source.tensors, source.name)
    for name, want in CASES[case]["values"].items():
        whole = read(source, name, source.tensors[name].shape[0])
        assert whole.reshape(-1)[:4].astype(np.float32).tolist() == want["first"], name
        assert digest(whole) == want["sha256"], name
        for step in (1, 7, 40):
            assert np.array_equal(read(source, name, step), whole), f"{name} in slices of {step}"
    source.close()


@pytest.mark.parametrize("case", CASES)
def test_several_matrices_that_were_quantised_as_one_come_apart(tmp_path: Path, case: str) -> None:
    """Phi-3's q, k and v, and its gate and up."""
    source = open_source(write_case(tmp_path / "in", case))
    for name in CASES[case]["values"]:
        tensor = source.tensors[name]
        whole = read(source, name, tensor.shape[0])
        edges = [0, 5, tensor.shape[0] - 8, tensor.shape[0]]
        for start, stop in itertools.pairwise(edges):
            part = tensor.part(start, stop)
            assert part.shape == (stop - start, tensor.shape[1])
            assert part.is_readable
            cut = [part.read_rows(at, at + 1, hashed=False) for at in range(stop - start)]
            assert np.array_equal(np.concatenate(cut), whole[start:stop]), name
            if isinstance(tensor, Int8Tensor):
                assert isinstance(part, Int8Tensor)
                stored = part.read_int8_rows(0, stop - start, hashed=False)
                for got, want in zip(stored, tensor.read_int8_rows(start, stop, hashed=False), strict=True):
                    assert np.array_equal(got, want)
    source.close()


@pytest.mark.parametrize("case", ["ct_w4a16_asym", "gptq_4bit_desc_act", "bnb_nf4_double", "fp8_block"])
def test_a_conversion_stores_them_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("jaxllama_convert.copying.SLICE_BYTES", 7 * 96)
    convert(write_case(tmp_path / "in", case), tmp_path / "exact", dtype="float32")
    report = convert(tmp_path / "in", tmp_path / "out", verify=True)
    assert report.dtype == "bfloat16"
    exact, got = stored(tmp_path / "exact"), stored(tmp_path / "out")
    for name, want in CASES[case]["values"].items():
        assert digest(exact[name]) == want["sha256"], name
        assert np.array_equal(got[name], exact[name].astype(BF16)), name
    for name, want in dense().items():
        assert np.array_equal(got[name].astype(np.float32), want), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["files"]
    assert {file["hash"] for file in files.values()} == {
        hash_bytes((tmp_path / "in" / name).read_bytes()) for name in ("a.safetensors", "b.safetensors")
    }


def int8_of(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    param = name.removeprefix("model.").replace("self_attn.", "").removesuffix(".weight")
    values = np.fromfile(path / "params" / f"{param}.values" / "0.0", np.int8)
    return values, np.fromfile(path / "params" / f"{param}.scale" / "0", np.float32)


@pytest.mark.parametrize("case", ["ct_w8a8", "ct_w8a16", "bnb_int8", "ct_w4a16_channel", "ct_w4a16"])
def test_int8_with_a_scale_a_row_is_taken_as_it_is_and_others_are_rounded_again(tmp_path: Path, case: str) -> None:
    report = convert(write_case(tmp_path / "in", case), tmp_path / "out", quantize="int8")
    source = open_source(tmp_path / "in")
    for name in CASES[case]["values"]:
        tensor = source.tensors[name]
        assert isinstance(tensor, Int8Tensor) == (case in AS_INT8)
        values, scale = int8_of(tmp_path / "out", name)
        if isinstance(tensor, Int8Tensor):
            want_values, want_scale = tensor.read_int8_rows(0, tensor.shape[0], hashed=False)
            # The product is what the library gives, but for the order of its roundings.
            exact = want_values * want_scale[:, None].astype(np.float64)
            assert np.allclose(exact, read(source, name, 99).astype(np.float64), rtol=2**-8, atol=0)
        else:
            want_values, want_scale = quantize_rows(read(source, name, 99).astype(BF16))
        assert np.array_equal(values.reshape(tensor.shape), want_values)
        assert np.array_equal(scale, want_scale)
    source.close()
    doubly = [warning for warning in report.warnings if "a second time" in warning]
    assert len(doubly) == (case not in AS_INT8), report.warnings


def test_the_stored_int8_is_the_files(tmp_path: Path) -> None:
    convert(write_case(tmp_path / "in", "ct_w8a8"), tmp_path / "out", quantize="int8")
    golden = load_file_of(tmp_path / "in" / "b.safetensors")
    values, scale = int8_of(tmp_path / "out", f"{K_PROJ}.weight")
    assert values.tobytes() == golden[f"{K_PROJ}.weight"]
    assert np.array_equal(scale, np.frombuffer(golden[f"{K_PROJ}.weight_scale"], BF16).astype(np.float32))


def load_file_of(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor, read without our reader."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {n: data[8 + length :][slice(*entry["data_offsets"])] for n, entry in header.items()}


CT = CASES["ct_w8a16"]["quantization_config"]
GROUP = CT["config_groups"]["group_0"]


def group(**changes: Any) -> dict[str, Any]:
    return CT | {"config_groups": {"group_0": GROUP | changes}}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown method": ("awq", {"quant_method": "quip"}, "'quip' is not supported"),
    "no method": ("awq", {"bits": 4}, "'None' is not supported"),
    "unknown field": ("awq", CASES["awq"]["quantization_config"] | {"rotated": True}, "not understood: 'rotated'"),
    "awq gemv": ("awq", CASES["awq"]["quantization_config"] | {"version": "gemv"}, "version"),
    "awq without zero points": ("awq", CASES["awq"]["quantization_config"] | {"zero_point": False}, "zero_point"),
    "kv cache": ("ct_w8a16", CT | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "sparsity": ("ct_w8a16", CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format"),
    "transform": ("ct_w8a16", CT | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "activations only": ("ct_w8a16", group(weights=None), "rounds activations alone"),
    "output activations": ("ct_w8a16", group(output_activations={"num_bits": 8}), "output_activations"),
    "unknown of weights": ("ct_w8a16", group(weights=GROUP["weights"] | {"shift": 1}), "'shift'"),
    "nvfp4": ("ct_w8a16", CT | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    "no target": ("ct_w8a16", group(targets=["re:.*v_proj"]), "none is for model.layers.0.self_attn"),
    "ignored and quantised": ("ct_w8a16", CT | {"ignore": ["re:.*k_proj"]}, "quantised all the same"),
    "hostile pattern": ("ct_w8a16", CT | {"ignore": [r"re:(a+)+$"]}, "repeats too much"),
    "broken pattern": ("ct_w8a16", CT | {"ignore": ["re:("]}, "not a regular expression"),
    "marlin": ("gptq_4bit", CASES["gptq_4bit"]["quantization_config"] | {"checkpoint_format": "marlin"}, "marlin"),
    "gptq dynamic": (
        "gptq_4bit",
        CASES["gptq_4bit"]["quantization_config"] | {"dynamic": {"+:.*down": {"bits": 8}}},
        "settings of their own",
    ),
    "wrong bits": ("gptq_4bit", CASES["gptq_4bit"]["quantization_config"] | {"bits": 8}, "expected"),
    "wrong group": ("awq", CASES["awq"]["quantization_config"] | {"group_size": 16}, "scales is F16"),
    "fp8 e5m2": ("fp8_block", CASES["fp8_block"]["quantization_config"] | {"fmt": "e5m2"}, "e5m2"),
    "fp8 wrong block": (
        "fp8_block", CASES["fp8_block"]["quantization_config"] | {"weight_block_size": [8, 8]}, "[4, 12]"
    ),
    "method of another": ("fp8_block", CASES["awq"]["quantization_config"], "no tensor is of this format"),
    "not an object": ("awq", {"quant_method": ["awq"]}, "is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, case: str) -> None:
    golden, quantization_config, message = REFUSED[case]
    write_case(tmp_path / "in", golden, quantization_config)
    with pytest.raises(JaxLlamaError) as caught:
        convert(tmp_path / "in", tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_part_and_a_wrong_one_are_named(tmp_path: Path) -> None:
    write_case(tmp_path / "a", "awq", **{f"{K_PROJ}.qzeros": None})
    with pytest.raises(ConversionError, match=r"k_proj\.qzeros is missing"):
        open_source(tmp_path / "a")
    write_case(tmp_path / "b", "gptq_4bit", **{f"{K_PROJ}.g_idx": np.full(96, 3, np.int32)})
    with pytest.raises(ConversionError, match=r"g_idx names group 3, expected 0 to 2"):
        open_source(tmp_path / "b")
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 97]}
    bad = np.frombuffer(json.dumps(state).encode(), np.uint8)
    write_case(tmp_path / "c", "bnb_fp4", **{f"{K_PROJ}.weight.quant_state.bitsandbytes__fp4": bad})
    with pytest.raises(ConversionError, match="its name says otherwise"):
        open_source(tmp_path / "c")


def test_biases_of_zeros_are_dropped_and_others_are_not(tmp_path: Path) -> None:
    write_case(tmp_path / "a", "gptq_4bit", **{f"{K_PROJ}.bias": np.zeros(32, np.float16)})
    source = open_source(tmp_path / "a")
    match_tensors(LlamaConfig.from_hf(source.config), source.tensors, "a")
    write_case(tmp_path / "b", "gptq_4bit", **{f"{K_PROJ}.bias": np.ones(32, np.float16)})
    with pytest.raises(ConversionError, match=r"unexpected .*k_proj\.bias"):
        convert(tmp_path / "b", tmp_path / "out")


def test_empty_settings_are_no_quantisation(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {}}))
    save_file(weights(CONFIG), tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_packed_words_unpack_whatever_lies_across_them(num_bits: int) -> None:
    values = np.random.default_rng(num_bits).integers(0, 2**num_bits, (3, 75))
    whole = [sum(int(v) << (num_bits * i) for i, v in enumerate(row)) for row in values]
    num_words = -(-75 * num_bits // 32)
    words = np.array([[(row >> (32 * i)) & 0xFFFF_FFFF for i in range(num_words)] for row in whole], np.uint32)
    assert np.array_equal(unpack_words(words.view(np.int32), num_bits, 75), values)


HOSTILE = [
    r"(a+)+$",
    r"(.*|a)(.*)(.*)(.*)(.*)x",
    r"(a|a)*b",
    r"(a|b|ab)+c",
    r"(.*)(.*)(.*)(.*)(.*)x",
    r"(a+)\1",
    "a" * 1001,
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_could_take_forever_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError):
        compile_pattern(pattern, "here")


def test_patterns_that_people_write_are_matched() -> None:
    unsloth = r"(?:.*?(?:text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.up_proj)"
    for pattern in (
        unsloth,
        r".*self_attn\.(q|k)_proj$",
        r"model\.layers\.\d+\.mlp\..*",
        r"(?:.*\.)?lm_head",
        r".*\.[qk]_proj",
    ):
        assert compile_pattern(pattern, "here").pattern == pattern
