"""Laws of `inspect` and `verify`: no weights are read to say what a model is; what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bucket
import pytest
import tiny
from jaxllama_convert import convert
from jaxllama_convert.checks.inspect import inspect
from jaxllama_convert.checks.verify import verify
from unit.weights.places.bucket_test import store as store
from unit.weights.sources.quantized_test import write_case
from unit.weights.sources.sources import BF16, CONFIG, weights, write_gguf, write_hf

from jaxllama.__main__ import main
from jaxllama.errors import CheckpointError, PlaceError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16), shards=2)
    return tmp_path / "src"


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_source_and_its_checkpoint_are_the_same_model(tmp_path: Path, source: Path, quantize: str | None) -> None:
    convert(source, tmp_path / "out", quantize=quantize)
    one, two = inspect(source), inspect(tmp_path / "out")
    assert (one.kind, two.kind) == ("safetensors", "jaxllama")
    for name in ("architecture", "num_params", "model", "rope", "generation", "tokenizer", "chat_template"):
        assert getattr(one, name) == getattr(two, name), name
    assert one.num_params == sum(value.size for value in weights(CONFIG, BF16).values())
    assert list(one.dtypes) == ["BF16"]
    assert set(two.dtypes) == ({"bfloat16"} if quantize is None else {"bfloat16", "int8", "float32"})
    assert (one.quantization, two.quantization) == (None, quantize)
    arrays = [path for path in (tmp_path / "out" / "params").glob("*/*") if path.name != ".zarray"]
    assert two.num_bytes == sum(path.stat().st_size for path in arrays)
    assert not one.problems + two.problems


def test_no_weights_are_read(store: bucket.Store, tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    write_gguf(tmp_path / "model.gguf")
    store.add("models/src", source)
    store.add("models/out", tmp_path / "out")
    store.objects["models/gguf/model.gguf"] = (tmp_path / "model.gguf").read_bytes()
    for url in ("s3://models/src", "gs://models/out", "s3://models/gguf/model.gguf"):
        assert not inspect(url).problems
    headers = {}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        headers[name] = 8 + int.from_bytes(store.objects[f"models/src/{name}"][:8], "little")
    for request in store.requests:
        _, key, span = request.split(" ")
        if span and key.endswith(".safetensors"):
            assert int(span.rpartition("-")[2]) < headers[key.rpartition("/")[2]]
        assert not key.startswith("models/out/params/") or key.endswith("/.zarray"), key


def test_what_a_template_can_do_is_found_by_asking_it(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", "divisible")
    manifest = json.loads((folder / "manifest.json").read_text())
    for text, want in {
        "{% for m in messages %}{{ m.content }}{% endfor %}": {"system": True, "variables": []},
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ tools }}<think></think>": {
            "system": False,
            "tools": "native",
            "reasoning": True,
        },
        "{{ raise_exception('no system') if messages[0].role == 'system' }}{{ enable_thinking }}": {
            "system": False,
            "variables": ["enable_thinking"],
        },
    }.items():
        (folder / "chat_template.jinja").write_text(text)
        manifest["files"].pop("chat_template.jinja", None)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        found = inspect(folder)
        assert found.chat_template is not None, found
        assert {name: found.chat_template[name] for name in want} == want


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "architecture 'MambaForCausalLM' is not"),
        ({"quantization_config": {"quant_method": "quip"}}, "quantization 'quip' is not supported"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope type 'spiral' is not supported"),
        ({"hidden_size": 32}, "do not fit config.json"),
    ],
)
def test_what_would_be_refused_is_said_with_all_that_is_known(
    source: Path, change: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(source), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert any(reason in problem for problem in found["problems"]), found["problems"]
    assert found["architecture"] == config["architectures"][0]
    assert found["quantization"] == config.get("quantization_config", {}).get("quant_method")
    assert main(["inspect", str(source)]) == 1
    assert reason in capsys.readouterr().out


def test_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    for name in ("gone", "no/such"):
        with pytest.raises(PlaceError):
            inspect(str(tmp_path / name))
    assert main(["inspect", str(tmp_path / "gone")]) == 2


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_checkpoint_is_its_source_bit_by_bit(tmp_path: Path, source: Path, quantize: str | None, capsys: Any) -> None:
    convert(source, tmp_path / "out", quantize=quantize)
    found = verify(tmp_path / "out", source)
    assert (found.num_tensors, found.problems) == (21, ())
    assert main(["verify", str(tmp_path / "out"), "--against", str(source), "--quiet"]) == 0
    assert "21 tensors compared" in capsys.readouterr().err


def test_one_value_that_differs_from_the_source_is_named(tmp_path: Path, source: Path, capsys: Any) -> None:
    convert(source, tmp_path / "out")
    other = weights(CONFIG, BF16)
    other["model.layers.1.mlp.up_proj.weight"][3, 5] *= 2
    want = other["model.layers.1.mlp.up_proj.weight"][3, 5]
    write_hf(tmp_path / "other", tensors=other)
    found = verify(tmp_path / "out", tmp_path / "other")
    assert len(found.problems) == 1
    assert found.problems[0].startswith("layers.1.up_proj: [3, 5] is ")
    assert f"the source has {want} (1 differ" in found.problems[0]
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "other"), "--quiet"]) == 1
    assert "layers.1.up_proj: [3, 5]" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["ct_w4a16_asym", "fp8_block"])
def test_quantised_sources_are_compared_as_they_are_stored(tmp_path: Path, case: str) -> None:
    write_case(tmp_path / "in", case)
    convert(tmp_path / "in", tmp_path / "out")
    assert not verify(tmp_path / "out", tmp_path / "in").problems


def test_every_damaged_file_is_named_with_what_was_expected(tmp_path: Path, source: Path, capsys: Any) -> None:
    convert(source, tmp_path / "out")
    params = tmp_path / "out" / "params"
    flipped = params / "layers.0.q_proj" / "0.0"
    flipped.write_bytes(bytes(flipped.stat().st_size))
    short = params / "norm" / "0"
    short.write_bytes(short.read_bytes()[:-2])
    (params / "lm_head" / "0.0").unlink()
    (params / "extra").write_bytes(b"")
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "params/norm/0: 38 bytes, expected 40" in lines
    assert "params/lm_head/0.0: missing" in lines
    assert "params/extra: not in the manifest" in lines
    assert any(line.startswith("params/layers.0.q_proj/0.0: blake3 is ") and ", expected " in line for line in lines)


def test_what_is_no_checkpoint_cannot_be_verified(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        verify(source)
    assert main(["verify", str(tmp_path / "gone")]) == 2
