"""Laws of adapters: what peft's merged model computes, the same bits however it is read, and refusals that list."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from jaxllama_convert import convert
from oracle.tiny_families import TINY_FAMILIES
from oracle.tiny_models import TINY_MODELS, checksum, draw_weights
from safetensors.numpy import load_file, save_file
from unit.weights.places.hub_test import hub as hub
from unit.weights.sources.sources import BF16, write_hf

import jaxllama
from jaxllama import Checkpoint, EngineOptions, Llama
from jaxllama.__main__ import main
from jaxllama.errors import ConversionError
from jaxllama.weights.exporting.export import export
from jaxllama.weights.opening import open_model
from jaxllama.weights.sources.adapters.settings import read_settings
from jaxllama.weights.sources.adapters.tensors import AdaptedTensor
from jaxllama.weights.sources.source import SourceTensor
from jaxllama.weights.sources.stored import Storage, read_rounded, read_stored

GOLDEN = Path(__file__).parents[3] / "golden"
ADAPTERS = GOLDEN / "adapters"
CASES = sorted(path.name for path in ADAPTERS.iterdir())
TOLERANCE = 2e-5  # of the logits' spread; measured: up to 5e-6
OPTIONS = EngineOptions(max_rows=1, max_context=64, page_size=4, num_pages=40, chunk_sizes=(32,))


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "adapters.npz"))


def base_of(case: str) -> str:
    return str(golden()[f"{case}/base"])


def write_base(folder: Path, case: str, dtype: Any = np.float32) -> Path:
    """The base that the case was trained on, by transformers' names."""
    shapes = {key: tuple(shape) for key, shape in json.loads(str(golden()[f"{case}/shapes"])).items()}
    weights = draw_weights(shapes, 0)
    assert checksum(weights) == str(golden()[f"{case}/base_sha256"])
    config = (TINY_MODELS | TINY_FAMILIES)[base_of(case)]
    write_hf(folder, config, {name: value.astype(dtype) for name, value in weights.items()}, shards=2)
    return folder


def load(place: Path | str, *, tp: int = 1, data: int = 1, **how: Any) -> Llama:
    config = open_model(place, how.get("adapters", ())).config
    return jaxllama.load(place, jaxllama.make_mesh(config, tp=tp, data=data), options=OPTIONS, **how)


def logits(place: Path | str, ids: np.ndarray, **how: Any) -> np.ndarray:
    with load(place, **how) as llama:
        return llama.logits(ids.tolist())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pefts_merged_model(tmp_path, case):
    base = write_base(tmp_path / "base", case)
    ids, want = golden()[f"{case}/ids"], golden()[f"{case}/logits"]
    assert np.abs(logits(base, ids, adapters=[ADAPTERS / case]) - want).max() < TOLERANCE * want.std()
    if not case.startswith("resized"):
        assert np.abs(logits(base, ids) - want).max() > 0.1 * want.std()


def test_adapters_are_merged_in_order(tmp_path):
    base = write_base(tmp_path / "base", "plain")
    first, second = (ADAPTERS / str(name) for name in golden()["in_order/names"])
    ids, want = golden()["in_order/ids"], golden()["in_order/logits"]
    assert np.abs(logits(base, ids, adapters=[first, second]) - want).max() < TOLERANCE * want.std()
    # DoRA's lengths are those after it: the order shows.
    assert np.abs(logits(base, ids, adapters=[second, first]) - want).max() > 0.01 * want.std()


@pytest.mark.parametrize("case", ["dora", "resized_tied", "embedding_dora", "saved_tied", "fused"])
@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", None), ("float32", "int8")])
def test_served_straight_and_converted_have_the_same_bits(tmp_path, case, dtype, quantize):
    """And merged into a converted checkpoint: what is read in one way or another is the same."""
    base = write_base(tmp_path / "base", case, BF16 if dtype == "bfloat16" else np.float32)
    adapter = [ADAPTERS / case]
    ids = golden()[f"{case}/ids"]
    convert(base, tmp_path / "merged", quantize=quantize, adapters=adapter)
    convert(base, tmp_path / "plain")
    want = logits(tmp_path / "merged", ids)
    np.testing.assert_array_equal(logits(base, ids, adapters=adapter, quantize=quantize), want)
    np.testing.assert_array_equal(logits(tmp_path / "plain", ids, adapters=adapter, quantize=quantize), want)


def rows_of(case: str, base: Path) -> list[tuple[str, SourceTensor]]:
    reader: Any = open_model(base, [ADAPTERS / case]).reader
    return [(name, tensor) for (name, _), tensor in reader._tensors.items()]


@pytest.mark.parametrize("case", ["dora", "embedding_dora", "fused", "embedding"])
def test_a_row_has_the_same_bits_whatever_rows_it_is_read_with(tmp_path, case, monkeypatch):
    monkeypatch.setattr("jaxllama.weights.sources.adapters.tensors._TILE_ROWS", 16)
    for name, tensor in rows_of(case, write_base(tmp_path / "base", case)):
        if not isinstance(tensor, AdaptedTensor):
            continue
        rows = tensor.shape[0]
        whole = tensor.read_rows(0, rows, hashed=False)
        assert whole.dtype == np.float32
        for start, stop in ((0, 1), (1, min(18, rows)), (15, min(17, rows)), (rows - 1, rows)):
            np.testing.assert_array_equal(tensor.read_rows(start, stop, hashed=False), whole[start:stop], name)


def test_the_sum_is_rounded_once(tmp_path):
    """From bfloat16 and float32 factors: not the product first, nor the sum to bfloat16 before int8."""
    base = write_base(tmp_path / "base", "plain", BF16)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensor = dict(rows_of("plain", base))[name]
    config = json.loads((ADAPTERS / "plain" / "adapter_config.json").read_text())
    factors = load_file(ADAPTERS / "plain" / "adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    product = factors[f"{module}.lora_B.weight"].astype(np.float64) @ factors[f"{module}.lora_A.weight"]
    weight = draw_weights({k: tuple(v) for k, v in json.loads(str(golden()["plain/shapes"])).items()}, 0)[name]
    exact = weight + config["lora_alpha"] / config["r"] * product
    rows = tensor.shape[0]
    np.testing.assert_allclose(tensor.read_rows(0, rows, hashed=False), exact, rtol=1e-5, atol=1e-6)
    stored = read_stored(tensor, 0, rows, Storage("bfloat16", None).numpy_dtype)
    np.testing.assert_array_equal(stored, tensor.read_rows(0, rows, hashed=False).astype(BF16))
    values, scale = read_rounded(tensor, 0, rows, np.dtype(np.float32))
    assert np.abs(values * scale[:, None] - exact).max() <= scale.max() / 2 + 1e-6


@pytest.mark.parametrize(("tp", "data"), [(4, 1), (2, 2)])
def test_a_mesh_of_four_has_the_same_weights(tmp_path, tp, data):
    base = write_base(tmp_path / "base", "plain")
    ids, want = golden()["plain/ids"], golden()["plain/logits"]
    got = logits(base, ids, adapters=[ADAPTERS / "plain"], tp=tp, data=data)
    assert np.abs(got - want).max() < TOLERANCE * want.std()


def test_an_int8_base_is_dequantised_merged_and_rounded_anew(tmp_path, caplog):
    base = write_base(tmp_path / "base", "plain")
    convert(base, tmp_path / "int8", dtype="float32", quantize="int8")
    opened = open_model(tmp_path / "int8", [ADAPTERS / "plain"])
    assert opened.manifest.quantize == "int8"
    assert "matrices that are int8, once they are dequantised" in caplog.text
    with load(tmp_path / "int8", adapters=[ADAPTERS / "plain"]) as llama, load(tmp_path / "int8") as plain:
        saved, before = llama.save(tmp_path / "saved"), plain.save(tmp_path / "before")
    changed = {
        name.split("/")[1]
        for name, record in saved.manifest.files.items()
        if name.endswith(".0") and record != before.manifest.files.get(name)
    }
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in changed}
    # Only what has an adapter is rounded anew.
    assert names == {"q_proj", "v_proj", "down_proj"}
    ids, want = golden()["plain/ids"], golden()["plain/logits"]
    assert 1e-4 < np.abs(logits(tmp_path / "saved", ids) - want).max() / want.std() < 0.3


def test_the_manifest_names_the_adapters_and_the_fingerprint_differs(tmp_path):
    from jaxllama_serving.service import fingerprint

    base = write_base(tmp_path / "base", "plain")
    first, second = ADAPTERS / "plain", ADAPTERS / "second"
    convert(base, tmp_path / "out", adapters=[first, second])
    records = Checkpoint.open(tmp_path / "out").manifest.source["adapters"]
    assert [record["name"] for record in records] == ["plain", "second"]
    files = records[0]["files"]
    assert files["adapter_model.safetensors"]["size"] == (first / "adapter_model.safetensors").stat().st_size
    assert len(files["adapter_config.json"]["hash"].rpartition(":")[2]) == 64
    prints = set()
    for adapters in ([], [first], [second], [first, second], [second, first]):
        with load(base, adapters=adapters) as llama:
            prints.add(fingerprint(llama))
            saved = llama.save(tmp_path / f"saved{len(prints)}")
        assert len(saved.manifest.source.get("adapters", ())) == len(adapters)
    assert len(prints) == 5


def test_a_conversion_with_another_adapter_starts_over(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", "plain")
    convert(base, tmp_path / "want", adapters=[ADAPTERS / "second"])
    with monkeypatch.context() as patch:
        patch.setattr("jaxllama_convert.write._Job._commit", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(base, tmp_path / "out", adapters=[ADAPTERS / "plain"])
    report = convert(base, tmp_path / "out", adapters=[ADAPTERS / "second"])
    assert report.num_resumed == 0
    ids = golden()["plain/ids"]
    np.testing.assert_array_equal(logits(tmp_path / "out", ids), logits(tmp_path / "want", ids))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_adapters_own_tokenizer_takes_the_bases_place(tmp_path):
    import tiny

    base = write_base(tmp_path / "base", "resized")
    adapter = Path(shutil.copytree(ADAPTERS / "resized", tmp_path / "adapter"))
    (base / "tokenizer_config.json").write_text("{}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    tiny.write_tokenizer(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tokenizer" / name, adapter)
    opened = open_model(base, [adapter])
    assert opened.config.vocab_size == 152
    assert json.loads((opened.path / "config.json").read_text())["vocab_size"] == 152
    assert (opened.path / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert not (opened.path / "chat_template.jinja").exists()


def test_an_export_has_the_adapters_merged(tmp_path):
    base = write_base(tmp_path / "base", "saved_tied")
    export(base, tmp_path / "back", adapters=[ADAPTERS / "saved_tied"])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False
    ids, want = golden()["saved_tied/ids"], golden()["saved_tied/logits"]
    assert np.abs(logits(tmp_path / "back", ids) - want).max() < TOLERANCE * want.std()


def changed(folder: Path, case: str, **changes: Any) -> Path:
    """A copy of an adapter, with other settings; None removes one."""
    adapter = Path(shutil.copytree(ADAPTERS / case, folder / "adapter"))
    path = adapter / "adapter_config.json"
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))
    return adapter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' .* changes the base's weights"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"some_new_method": {"a": 1}}, "not understood: 'some_new_method'"),
        ({"bias": "some"}, "bias 'some'"),
        ({"r": 0}, "r must be a positive integer"),
        ({"r": 5}, r"lora_A.weight has shape \[4, 64\], expected \[5, 64\]"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj.lora_A.weight has shape \[4, 64\], expected \[2, 64\]"),
        ({"target_modules": ["q_proj"]}, "4 thing.*the file has an adapter for .*v_proj, target_modules does not name"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "up_proj"]}, "has no adapter for .*up_proj"),
        ({"target_modules": "(a+)+"}, "repeats too much"),
        ({"layers_to_transform": [0]}, "has an adapter for model.layers.1"),
        ({"exclude_modules": ["down_proj"]}, "has an adapter for .*down_proj"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, which is not in the file"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ],
)
def test_settings_that_are_not_merged_or_do_not_fit_are_named(tmp_path, changes, message):
    base = write_base(tmp_path / "base", "plain")
    with pytest.raises((ConversionError, jaxllama.errors.ConfigError), match=message):
        open_model(base, [changed(tmp_path, "plain", **changes)])


@pytest.mark.parametrize(
    ("changes", "modules"),
    [
        ({"target_modules": ["q_proj"]}, {0, 1, 2, 3}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 3]}, {1, 3}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"}, {2}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": ["blocks"]}, set()),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, {1}),
        ({"target_modules": ["proj"]}, set()),
        ({"target_modules": r".*\.[02]\..*q_proj"}, {0, 2}),
        ({"target_modules": r"q_proj"}, set()),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, {1, 2, 3}),
        ({"target_modules": "All-Linear", "modules_to_save": ["layers.1"]}, {0, 2, 3}),
    ],
)
def test_modules_are_targets_as_peft_reads_them(changes, modules):
    settings = read_settings({"peft_type": "LORA", **changes}, "adapter_config.json")
    assert {i for i in range(4) if settings.is_target(f"model.layers.{i}.self_attn.q_proj")} == modules
    assert not settings.is_target("lm_head")


def test_scaling_is_pefts():
    value = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"q.*": 3}}
    settings = read_settings(value, "")
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert [settings.scaling(name) for name in names] == [3 / 4, 6 / 4, 6 / 8]
    assert read_settings(value | {"use_rslora": True}, "").scaling(names[2]) == 6 / 8**0.5


def test_all_misfits_of_another_base_are_listed(tmp_path):
    base = write_base(tmp_path / "base", "embedding_tied")
    adapter = changed(tmp_path, "modules_to_save", base_model_name_or_path="org/tiny")
    with pytest.raises(ConversionError) as caught:
        open_model(base, [adapter])
    text = str(caught.value)
    assert f"{adapter}: " in text
    assert "model.layers.0.self_attn.o_proj.lora_A.weight has shape [4, 64], expected [4, 96]" in text
    assert "model.layers.1.self_attn.o_proj.lora_B.weight has shape [64, 4], expected [42, 4]" in text
    assert "the file has no adapter for model.layers.2.self_attn.o_proj" in text
    assert "it was trained on 'org/tiny'" in text


def _rename(tensors: dict[str, np.ndarray]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 64), np.float32)
    tensors["something.else"] = np.zeros(3, np.float32)


def _integers(tensors: dict[str, np.ndarray]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].astype(np.int32)


def _half(tensors: dict[str, np.ndarray]) -> None:
    del tensors[max(tensors)]


def _nan(tensors: dict[str, np.ndarray]) -> None:
    tensors[min(tensors)][0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"unexpected something\.else.*unexpected model\.layers\.7\.self_attn\.q_proj"),
        (_integers, r"unexpected .*lora_A\.weight \(I32\)"),
        (_half, r"v_proj\.lora_B\.weight is missing"),
        (_nan, r"down_proj\.weight with adapters has .* NaN"),
    ],
)
def test_tensors_that_do_not_belong_are_named(tmp_path, change: Callable[[dict[str, np.ndarray]], None], message):
    base = write_base(tmp_path / "base", "plain")
    adapter = changed(tmp_path, "plain")
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=message):
        convert(base, tmp_path / "out", adapters=[adapter])
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_the_embedding_has_no_adapter_of_its_own(tmp_path):
    base = write_base(tmp_path / "base", "embedding_tied")
    adapter = changed(tmp_path, "embedding_tied", target_modules=["lm_head"])
    factors = {"lora_A": np.zeros((4, 42), np.float32), "lora_B": np.zeros((131, 4), np.float32)}
    named = {f"base_model.model.lm_head.{name}.weight": value for name, value in factors.items()}
    save_file(named, adapter / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match="lm_head is the embedding in this model"):
        open_model(base, [adapter])


def test_pickles_and_folders_that_are_no_adapters_are_refused(tmp_path):
    base = write_base(tmp_path / "base", "plain")
    with pytest.raises(ConversionError, match=r"base: has no adapter_config\.json"):
        open_model(base, [base])
    adapter = changed(tmp_path, "plain")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConversionError, match=r"adapter_model\.bin: pickled weights .* never opened"):
        open_model(base, [adapter])
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ConversionError, match=r"has no adapter_model\.safetensors"):
        open_model(base, [adapter])
    with pytest.raises(ConversionError, match="give the folder that holds it"):
        open_model(base, [ADAPTERS / "plain" / "adapter_model.safetensors"])


def test_model_and_adapter_come_from_the_hub_or_its_cache(tmp_path, hub, monkeypatch, caplog):
    base = write_base(tmp_path / "base", "plain")
    adapter = changed(tmp_path, "plain", base_model_name_or_path="some-org/other")
    hub.add("some-org/base", base)
    hub.add("some-org/lora", adapter)
    ids = golden()["plain/ids"]
    want = logits(base, ids, adapters=[adapter])
    np.testing.assert_array_equal(logits("some-org/base", ids, adapters=["some-org/lora"]), want)
    assert "was trained on some-org/other, and is merged into some-org/base" in caplog.text
    folder = tmp_path / "cache" / "models--some-org--lora"
    (folder / "refs").mkdir(parents=True)
    commit = hub.repos["some-org/lora"].commit
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(adapter, folder / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(logits(base, ids, adapters=["some-org/lora"]), want)


def test_the_server_and_every_process_of_it_take_adapters(tmp_path, monkeypatch):
    from jaxllama_serving.process import cli

    base = write_base(tmp_path / "base", "plain")
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    plain = parser.parse_args([str(base)])
    args = parser.parse_args([str(base), "--adapter", str(ADAPTERS / "plain"), "--adapter", str(ADAPTERS / "second")])
    taken: dict[str, Any] = {}
    monkeypatch.setattr(jaxllama, "load", lambda place, **how: taken.update(how))
    cli.load_model(args, max_queue=1)
    assert taken["adapters"] == [str(ADAPTERS / "plain"), str(ADAPTERS / "second")]
    # Processes with other adapters do not run together.
    assert cli._settings(args)["the checkpoint"] != cli._settings(plain)["the checkpoint"]


def test_a_merged_checkpoint_is_verified_against_its_base_with_its_adapters(tmp_path, capsys):
    base = write_base(tmp_path / "base", "resized_tied")
    adapter, other = str(ADAPTERS / "resized_tied"), str(changed(tmp_path, "resized_tied", revision="x"))
    assert main(["convert", str(base), str(tmp_path / "out"), "--adapter", adapter, "--quantize", "int8"]) == 0
    against = ["verify", str(tmp_path / "out"), "--against", str(base), "--quiet"]
    assert main([*against, "--adapter", adapter]) == 0
    for given in ([], ["--adapter", other], ["--adapter", adapter, "--adapter", adapter]):
        capsys.readouterr()
        assert main([*against, *given]) == 1
        assert "it has the adapters 'resized_tied' (" in capsys.readouterr().out


def test_the_commands_take_adapters(tmp_path, capsys):
    base = write_base(tmp_path / "base", "plain")
    adapters = ["--adapter", str(ADAPTERS / "plain"), "--adapter", str(ADAPTERS / "second")]
    assert main(["convert", str(base), str(tmp_path / "out"), *adapters]) == 0
    assert main(["export", str(base), str(tmp_path / "back"), *adapters]) == 0
    ids = golden()["in_order/ids"]
    np.testing.assert_array_equal(logits(tmp_path / "out", ids), logits(tmp_path / "back", ids))
    assert main(["convert", str(base), str(tmp_path / "no"), "--adapter", str(base)]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err
