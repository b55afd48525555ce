"""Laws of reading Hugging Face folders: what does not fit is named before a byte is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxllama_convert import convert
from safetensors.numpy import load_file, save_file
from unit.weights.sources.sources import BF16, CONFIG, raw_safetensors, weights, write_hf

from jaxllama.errors import ConfigError, ConversionError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import param_specs
from jaxllama.weights.sources.detect import open_source
from jaxllama.weights.sources.names import match_tensors

INDEX = "model.safetensors.index.json"


def refuse(src: Path, *patterns: str, error: type[Exception] = ConversionError) -> None:
    """Checks that converting fails with one line that has every pattern, and leaves nothing behind."""
    dst = src.parent / "out"
    before = sorted(src.parent.iterdir())
    with pytest.raises(error) as caught:
        convert(src, dst)
    for pattern in patterns:
        assert pattern in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 5000
    assert sorted(src.parent.iterdir()) == before


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_every_hf_tensor_maps_exactly_once(tmp_path: Path, shards: int, changes: dict[str, Any]) -> None:
    config = CONFIG | changes
    tensors = write_hf(tmp_path / "src", config, shards=shards)
    source = open_source(tmp_path / "src")
    pairs = match_tensors(LlamaConfig.from_hf(config), source.tensors, "src")
    assert sorted(tensor.name for _, tensor in pairs) == sorted(tensors)
    assert {spec.hf_name for spec, _ in pairs} == {spec.hf_name for spec in param_specs(LlamaConfig.from_hf(config))}
    for spec, tensor in pairs:
        assert spec.hf_name == tensor.name
        rows = tensor.read_rows(0, tensor.shape[0])
        assert np.array_equal(rows, tensors[tensor.name])
    source.close()


def _header(tensor: Any, **others: Any) -> dict[str, Any]:
    return {"model.norm.weight": tensor, **others}


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\0" * 7, "too few"),
    "header past the end": (raw_safetensors(_header(GOOD), b"\0" * 8, length=10_000), "header length"),
    "header length 2^63": (raw_safetensors(_header(GOOD), b"\0" * 8, length=2**63), "header length"),
    "not JSON": (raw_safetensors(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (raw_safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "NaN": (raw_safetensors(b'{"a": NaN}'), "NaN"),
    "deep nesting": (raw_safetensors(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested too deeply"),
    "5,000 digits": (raw_safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a list": (raw_safetensors([1]), "header: expected a JSON object, got list"),
    "duplicate key": (raw_safetensors(b'{"a": 1, "a": 2}'), "duplicate key 'a'"),
    "name with ..": (raw_safetensors({"..": GOOD}, b"\0" * 8), "safely"),
    "name with NUL": (raw_safetensors({"a\0b": GOOD}, b"\0" * 8), "safely"),
    "name with a slash": (raw_safetensors({"a/b": GOOD}, b"\0" * 8), "safely"),
    "empty name": (raw_safetensors({"": GOOD}, b"\0" * 8), "safely"),
    "missing key": (raw_safetensors(_header({"dtype": "F32", "shape": [2]})), "must have dtype"),
    "extra key": (raw_safetensors(_header(GOOD | {"x": 1})), "must have dtype"),
    "entry is a number": (raw_safetensors(_header(3)), "must have dtype"),
    "unknown dtype": (raw_safetensors(_header(GOOD | {"dtype": "F33"}), b"\0" * 8), "unknown dtype"),
    "dtype is a list": (raw_safetensors(_header(GOOD | {"dtype": []}), b"\0" * 8), "unknown dtype"),
    "negative shape": (raw_safetensors(_header(GOOD | {"shape": [-2]}), b"\0" * 8), "malformed shape"),
    "boolean shape": (raw_safetensors(_header(GOOD | {"shape": [True]}), b"\0" * 8), "malformed shape"),
    "float shape": (raw_safetensors(_header(GOOD | {"shape": [2.0]}), b"\0" * 8), "malformed shape"),
    "nine dimensions": (raw_safetensors(_header(GOOD | {"shape": [1] * 9}), b"\0" * 8), "malformed shape"),
    "overflowing shape": (raw_safetensors(_header(GOOD | {"shape": [2**62, 4, 2]}), b"\0" * 8), "expected"),
    "wrong shape": (raw_safetensors(_header(GOOD | {"shape": [3]}), b"\0" * 8), "8 bytes, expected 12"),
    "three offsets": (raw_safetensors(_header(GOOD | {"data_offsets": [0, 8, 8]}), b"\0" * 8), "data_offsets"),
    "offsets reversed": (raw_safetensors(_header(GOOD | {"data_offsets": [8, 0]}), b"\0" * 8), "data_offsets"),
    "negative offset": (raw_safetensors(_header(GOOD | {"data_offsets": [-8, 0]}), b"\0" * 8), "data_offsets"),
    "past the end": (raw_safetensors(_header(GOOD), b"\0" * 7), "Was the download complete"),
    "bytes behind": (raw_safetensors(_header(GOOD), b"\0" * 9), "Was the download complete"),
    "no tensors": (raw_safetensors({}), "has no tensors"),
    "nothing but metadata": (raw_safetensors({"__metadata__": {"format": "pt"}}), "has no tensors"),
    "metadata that are numbers": (raw_safetensors(_header(GOOD, __metadata__={"a": 1}), b"\0" * 8), "__metadata__"),
    "metadata that are a list": (raw_safetensors(_header(GOOD, __metadata__=["a"]), b"\0" * 8), "__metadata__"),
    "metadata that are null": (raw_safetensors(_header(GOOD, __metadata__=None), b"\0" * 8), "__metadata__"),
    "overlap": (raw_safetensors(_header(GOOD, a=GOOD), b"\0" * 8), "overlaps"),
    "hole": (raw_safetensors(_header(GOOD | {"data_offsets": [4, 12]}), b"\0" * 12), "hole"),
}


_LONG = "x" * 1_000_000
LONG_NAMES: dict[str, Any] = {
    "tensor": {_LONG: GOOD},
    "unsafe tensor": {f"..{_LONG}": GOOD},
    "dtype": {"a": GOOD | {"dtype": _LONG}},
    "shape": {"a": GOOD | {"shape": [1] * 100_000}},
    "offsets": {"a": GOOD | {"data_offsets": [1] * 100_000}},
    "entry": {"a": {_LONG: 1}},
    "metadata": {"__metadata__": {_LONG: 1}},
    "duplicate key": f'{{"{_LONG}": 1, "{_LONG}": 2}}'.encode(),
    "many tensors": {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)},
}


@pytest.mark.parametrize("case", LONG_NAMES)
def test_a_long_name_makes_a_short_message(tmp_path: Path, case: str) -> None:
    write_hf(tmp_path / "src")
    data = b"" if case == "many tensors" else b"\0" * 8
    (tmp_path / "src" / "model.safetensors").write_bytes(raw_safetensors(LONG_NAMES[case], data))
    refuse(tmp_path / "src")


@pytest.mark.parametrize("index", [{"weight_map": {_LONG: "a.safetensors"}}, {"weight_map": {"a": _LONG}}])
def test_a_long_name_in_the_index_makes_a_short_message(tmp_path: Path, index: dict[str, Any]) -> None:
    write_hf(tmp_path / "src", shards=2)
    save_file(weights(CONFIG), tmp_path / "src" / "a.safetensors")
    (tmp_path / "src" / INDEX).write_text(json.dumps(index))
    refuse(tmp_path / "src")


@pytest.mark.parametrize("key", ["model_type", "hidden_act", "vocab_size", "rope_scaling", "quantization", _LONG])
def test_a_long_value_in_the_config_makes_a_short_message(tmp_path: Path, key: str) -> None:
    write_hf(tmp_path / "src", CONFIG | {key: _LONG}, weights(CONFIG))
    if key == _LONG:
        (warning, *_) = convert(tmp_path / "src", tmp_path / "out").warnings
        assert len(warning) < 500
    else:
        refuse(tmp_path / "src", "xxx…xxx", error=ConfigError)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_malformed_header_is_named(tmp_path: Path, case: str) -> None:
    write_hf(tmp_path / "src")
    data, message = BAD_FILES[case]
    (tmp_path / "src" / "model.safetensors").write_bytes(data)
    refuse(tmp_path / "src", "model.safetensors", message)


def test_every_misfit_is_listed_at_once(tmp_path: Path) -> None:
    tensors = weights(CONFIG)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((20, 48), np.float32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((44, 20), np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)
    write_hf(tmp_path / "src", tensors=tensors)
    refuse(
        tmp_path / "src",
        "5 tensor(s)",
        "missing model.norm.weight",
        "missing model.layers.1.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.weight has shape [20, 48], expected [48, 20]",
        "unexpected model.layers.7.mlp.up_proj.weight",
        "lm_head.weight has dtype F64",
    )


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    write_hf(tmp_path / "src", tensors=weights(CONFIG) | old)
    convert(tmp_path / "src", tmp_path / "out")


def test_a_tied_model_may_ship_an_equal_head_only(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = weights(config)
    head = tensors["model.embed_tokens.weight"].copy()
    write_hf(tmp_path / "src", config, tensors | {"lm_head.weight": head})
    convert(tmp_path / "src", tmp_path / "same")
    head[3, 5] += 1
    write_hf(tmp_path / "src", config, tensors | {"lm_head.weight": head})
    refuse(tmp_path / "src", "lm_head.weight differs")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_weight_is_named(tmp_path: Path, dtype: Any, value: float) -> None:
    tensors = weights(CONFIG, dtype)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 17] = value
    write_hf(tmp_path / "src", tensors=tensors)
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has 1"):
        convert(tmp_path / "src", tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_a_value_beyond_bfloat16_is_named(tmp_path: Path) -> None:
    tensors = weights(CONFIG)
    tensors["model.norm.weight"][0] = np.finfo(np.float32).max
    write_hf(tmp_path / "src", tensors=tensors)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight .* beyond bfloat16"):
        convert(tmp_path / "src", tmp_path / "out", dtype="bfloat16")


BAD_INDEXES = {
    "leads out": ({"weight_map": {"a": "../x.safetensors"}}, "without folders"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "without folders"),
    "parent": ({"weight_map": {"a": ".."}}, "without folders"),
    "NUL": ({"weight_map": {"a": "a\0b"}}, "without folders"),
    "no map": ({}, "weight_map must map"),
    "a number": ({"weight_map": {"a": 1}}, "weight_map must map"),
    "a list": ([], "expected a JSON object, got list"),
    "no such file": ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: cannot be read"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_named(tmp_path: Path, case: str) -> None:
    write_hf(tmp_path / "src", shards=2)
    index, message = BAD_INDEXES[case]
    (tmp_path / "src" / INDEX).write_text(json.dumps(index))
    refuse(tmp_path / "src", message)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write_hf(src, shards=2)
    first, second = (src / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    doubled = load_file(first) | {"lm_head.weight": np.zeros((70, 20), np.float32), "stray": np.zeros(1, np.float32)}
    moved = load_file(second)
    assert "model.norm.weight" in moved or "model.norm.weight" in doubled
    (moved if "model.norm.weight" in moved else doubled).pop("model.norm.weight")
    save_file(doubled, first)
    save_file(moved | {"lm_head.weight": np.zeros((70, 20), np.float32)}, second)
    refuse(
        src,
        "'lm_head.weight' is in several files",
        "'stray' of",
        "is not in the index",
        "'model.norm.weight' is not in",
    )


def test_a_single_file_beside_an_index_is_ambiguous(tmp_path: Path) -> None:
    write_hf(tmp_path / "src", shards=2)
    save_file(weights(CONFIG), tmp_path / "src" / "model.safetensors")
    refuse(tmp_path / "src", "has both")


def test_files_without_an_index_are_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "src", shards=2)
    (tmp_path / "src" / INDEX).unlink()
    refuse(tmp_path / "src", "2 safetensors files but no")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_no_link_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    src = tmp_path / "src"
    write_hf(src)
    outside = tmp_path / "outside"
    os.rename(src / name, outside) if (src / name).exists() else outside.write_text("{}")
    (src / name).symlink_to(outside)
    refuse(src, name, "leads out")


def test_a_link_inside_the_folder_works(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write_hf(src)
    os.rename(src / "model.safetensors", src / "weights.data")
    (src / "model.safetensors").symlink_to("weights.data")
    convert(src, tmp_path / "out")


def test_the_hugging_face_cache_layout_works(tmp_path: Path) -> None:
    model = tmp_path / "models--me--tiny"
    snapshot, blobs = model / "snapshots" / "abc123", model / "blobs"
    write_hf(snapshot, shards=2)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        os.rename(path, blobs / f"hash{number}")
        path.symlink_to(f"../../blobs/hash{number}")
    convert(snapshot, tmp_path / "out")


def test_the_cache_of_another_model_is_outside(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "abc123"
    other = tmp_path / "models--me--other" / "blobs"
    write_hf(snapshot)
    other.mkdir(parents=True)
    os.rename(snapshot / "model.safetensors", other / "hash")
    (snapshot / "model.safetensors").symlink_to(other / "hash")
    with pytest.raises(ConversionError, match="leads out"):
        open_source(snapshot)


@pytest.mark.parametrize("kind", ["dangling", "loop", "fifo", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    src = tmp_path / "src"
    write_hf(src)
    target = src / "model.safetensors"
    target.unlink()
    if kind == "dangling":
        target.symlink_to("gone")
    elif kind == "loop":
        target.symlink_to("model.safetensors")
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target.mkdir()
    refuse(src, "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    src = tmp_path / "src"
    write_hf(src)
    (src / "model.safetensors").unlink()
    os.mkfifo(src / name)  # Opening it would block for ever.
    refuse(src, name, "never opened")
    refuse(src / name, name, "never opened")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "mrope"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": 2_000_000_000}, "2000000000 layers"),
    ],
)
def test_an_unsupported_model_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG), config=CONFIG | changes)
    refuse(tmp_path / "src", message, error=(ConfigError, ConversionError))  # type: ignore[arg-type]


def test_an_end_token_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    (tmp_path / "src" / "generation_config.json").write_text('{"eos_token_id": [2, 70]}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id"):
        convert(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize(
    "pattern", ["(", "(?<=a", "\\", "(" * 5000, "[[:bogus:]]"], ids=["open", "behind", "slash", "deep", "class"]
)
def test_a_hostile_tokenizer_is_one_error(tmp_path: Path, pattern: str) -> None:
    write_hf(tmp_path / "src")
    tokenizer = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
    (tmp_path / "src" / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse(tmp_path / "src", "src: the tokenizer cannot be used")


@pytest.mark.parametrize("text", ["[]", "null", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    write_hf(tmp_path / "src")
    (tmp_path / "src" / "tokenizer.json").write_text(text)
    refuse(tmp_path / "src", "src: the tokenizer cannot be used: tokenizer.json")


def test_an_unknown_key_is_a_warning_and_a_harmless_one_is_not(tmp_path: Path) -> None:
    harmless = {"torch_dtype": "float16", "use_cache": True, "pretraining_tp": 2, "top_k": 50, "_name_or_path": "x"}
    write_hf(tmp_path / "src", CONFIG | harmless | {"fancy_new_thing": 3, "another": {"a": 1}, "unset": None})
    warnings = convert(tmp_path / "src", tmp_path / "out").warnings
    (named,) = [warning for warning in warnings if warning.startswith("config.json has")]
    assert named.endswith("2 key(s) that no Llama knows, which are ignored: another; fancy_new_thing")


def test_a_key_that_changes_the_computation_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "src", CONFIG | {"partial_rotary_factor": 0.5}, weights(CONFIG))
    refuse(tmp_path / "src", "partial_rotary_factor 0.5", error=ConfigError)


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": 1, "eos_token_id": 2}'])
def test_a_malformed_generation_config_is_named(tmp_path: Path, text: str) -> None:
    write_hf(tmp_path / "src")
    (tmp_path / "src" / "generation_config.json").write_text(text)
    refuse(tmp_path / "src", "generation_config.json")
