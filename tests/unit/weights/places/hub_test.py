"""Laws of reading models from the hub: the bits of a conversion, each byte once, whatever a connection does."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub as standin
import jax
import numpy as np
import pytest
import tiny
from huggingface_hub import constants
from jaxllama_convert import convert
from unit.weights.sources.sources import BF16, CONFIG, GGUF_CONFIG, weights, write_gguf, write_hf

import jaxllama
from jaxllama import Checkpoint, make_mesh
from jaxllama.errors import ConversionError, PlaceError, StoreError
from jaxllama.weights.loading import load_params
from jaxllama.weights.opening import open_model, read_config
from jaxllama.weights.places import LocalPlace, open_place, retries, short_name

MODEL = "some-org/tiny-llama"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.chdir(tmp_path)
    with standin.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


def params_of(place: Any, tp: int = 1, quantize: str | None = None) -> Any:
    checkpoint = open_model(place)
    return load_params(checkpoint, make_mesh(checkpoint.config, tp=tp), checkpoint.dtype, quantize)


def assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("dtype", "tp"), [(BF16, 1), (np.float32, 3), (np.float16, 6)])
def test_a_model_of_the_hub_has_the_bits_of_its_conversion(
    hub: standin.Hub, tmp_path: Path, dtype: Any, tp: int, quantize: str | None
) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, dtype), shards=3)
    hub.add(MODEL, tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", quantize=quantize)
    want = params_of(tmp_path / "out", tp)
    assert_same_bits(params_of(MODEL, tp, quantize), want)
    assert_same_bits(params_of(tmp_path / "src", tp, quantize), want)


@pytest.mark.parametrize("tp", [1, 3])
def test_every_byte_is_read_once(hub: standin.Hub, tmp_path: Path, tp: int) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16), shards=2)
    repo = hub.add(MODEL, tmp_path / "src")
    params_of(MODEL, tp)
    large = {name: len(data) for name, data in repo.files.items() if standin.is_large(name)}
    for name, size in large.items():
        spans = sorted((start, stop) for file, start, stop in hub.ranges if file == name)
        assert spans[0][0] == 0
        assert spans[-1][1] == size
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert not hub.leaked


def test_a_gguf_file_of_the_hub_is_read_with_its_tokenizer(hub: standin.Hub, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    write_gguf(tmp_path / "src" / "model.gguf")
    write_gguf(tmp_path / "src" / "other.gguf", tensors=weights(GGUF_CONFIG, seed=5))
    hub.add(MODEL, tmp_path / "src")
    convert(tmp_path / "src" / "model.gguf", tmp_path / "out")
    assert_same_bits(params_of(f"{MODEL}:model.gguf", 2), params_of(tmp_path / "out", 2))
    assert read_config(f"{MODEL}:model.gguf") == Checkpoint.open(tmp_path / "out").config
    with pytest.raises(PlaceError, match=r"no file gone\.gguf; its GGUF files: model\.gguf, other\.gguf"):
        open_model(f"{MODEL}:gone.gguf")


def test_text_is_completed_without_a_conversion_or_a_copy(hub: standin.Hub, tmp_path: Path) -> None:
    weights = tiny.weights_of("divisible")
    write_hf(tmp_path / "src", tiny.MODELS["divisible"], weights)
    tiny.write_tokenizer(tmp_path / "src")
    hub.add(MODEL, tmp_path / "src")
    with jaxllama.load(MODEL, make_mesh(tiny.config_of("divisible"), tp=1), options=tiny.SMALL) as llama:
        assert llama.chat_template is not None
        got = llama.generate("Hello", jaxllama.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        saved = llama.save(tmp_path / "saved")
    tiny.assert_greedy("divisible", got.prompt_token_ids, got.token_ids)
    assert saved.manifest.source["name"] == MODEL
    assert not (tmp_path / "cache").exists()


# What an answer does wrong once, and is made up for.
@pytest.mark.parametrize("fault", ["429", "500", "503", "403", "dropped", "short", "repeated", "slow"])
def test_a_fault_of_the_store_costs_time_and_nothing_else(hub: standin.Hub, tmp_path: Path, fault: str) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16))
    hub.add(MODEL, tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out")
    checkpoint = open_model(MODEL)
    hub.faults += [fault, "", fault]
    got = load_params(checkpoint, make_mesh(checkpoint.config, tp=1), checkpoint.dtype)
    assert not hub.faults
    assert_same_bits(got, params_of(tmp_path / "out"))


def test_what_arrived_before_a_connection_was_lost_is_not_read_again(hub: standin.Hub, tmp_path: Path) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16))
    size = len(hub.add(MODEL, tmp_path / "src").files["model.safetensors"])
    hub.faults += ["", "", "dropped", "short", "dropped"]
    params_of(MODEL)
    assert hub.num_read == size


@pytest.mark.parametrize(("fault", "message"), [("etag", "ETag"), ("shrunk", "bytes now"), ("no ranges", "no ranges")])
def test_a_file_that_changes_is_an_error_that_names_it(
    hub: standin.Hub, tmp_path: Path, fault: str, message: str
) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16))
    hub.add(MODEL, tmp_path / "src")
    checkpoint = open_model(MODEL)
    hub.faults += [fault]
    with pytest.raises(StoreError, match=rf"{MODEL}@0123456789ab/model\.safetensors.*{message}"):
        load_params(checkpoint, make_mesh(checkpoint.config, tp=1), checkpoint.dtype)


def test_a_store_that_never_answers_is_given_up(hub: standin.Hub, tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    hub.add(MODEL, tmp_path / "src")
    hub.faults += ["500"] * 100
    with pytest.raises(StoreError, match="gave up after 7 attempts"):
        open_model(MODEL)


def test_a_busy_hub_is_asked_again(hub: standin.Hub, tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    hub.add(MODEL, tmp_path / "src")
    hub.api_faults += ["429", "503"]
    assert open_place(MODEL).stat("config.json") is not None


def test_what_is_missing_private_or_gated_says_what_to_do(
    hub: standin.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hf(tmp_path / "src")
    repo = hub.add(MODEL, tmp_path / "src")
    with pytest.raises(PlaceError, match=r"has no such model that is public; .* HF_TOKEN, .*no .*/some-org/gone eith"):
        open_place("some-org/gone")
    with pytest.raises(PlaceError, match="not this revision"):
        open_place(f"{MODEL}@v2")
    repo.is_private = True
    with pytest.raises(PlaceError, match="for a private one set HF_TOKEN, or run: hf auth login"):
        open_place(MODEL)
    monkeypatch.setenv("HF_TOKEN", standin.TOKEN)
    assert open_place(MODEL).stat("config.json") is not None
    assert load_params(open_model(MODEL), make_mesh(read_config(MODEL), tp=1), "float32")
    repo.is_gated = True
    with pytest.raises(PlaceError, match=f"is gated. Accept its terms at {hub.url}/{MODEL} with the account") as caught:
        open_place(MODEL)
    assert standin.TOKEN not in str(caught.value)
    assert not hub.leaked


def test_a_local_path_wins(hub: standin.Hub, tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    hub.add(MODEL, tmp_path / "src")
    write_hf(tmp_path / MODEL, tensors=weights(CONFIG, seed=3))
    assert isinstance(open_place(MODEL), LocalPlace)
    assert not hub.requests
    assert short_name(MODEL) == "tiny-llama"


def test_a_wrong_name_says_what_was_tried(hub: standin.Hub, tmp_path: Path) -> None:
    with pytest.raises(PlaceError, match=rf"looked for {tmp_path}/no/such/model\).*org/name.*gs://"):
        open_place("no/such/model")
    with pytest.raises(PlaceError, match="expected gs://bucket/path or s3://bucket/path"):
        open_place("https://example.org/model")
    # A `Path` is of this machine, whatever it looks like.
    with pytest.raises(PlaceError, match=f"{tmp_path}/{MODEL}: does not exist"):
        open_place(Path(MODEL))
    assert not hub.requests


def test_what_the_cache_has_is_not_fetched(hub: standin.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16))
    hub.add(MODEL, tmp_path / "src")
    want = params_of(MODEL)
    folder = tmp_path / "cache" / f"models--{MODEL.replace('/', '--')}"
    commit = hub.repos[MODEL].commit
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for path in (tmp_path / "src").iterdir():
        (folder / "blobs" / path.name).write_bytes(path.read_bytes())
        (folder / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{path.name}")
    hub.requests.clear()
    assert_same_bits(params_of(MODEL), want)
    assert hub.requests == [f"GET /api/models/{MODEL}"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_bits(params_of(MODEL), want)
    assert len(hub.requests) == 1
    with pytest.raises(PlaceError, match=r"HF_HUB_OFFLINE is set.*hf download some-org/other"):
        open_place("some-org/other")


def test_a_source_that_cannot_be_converted_is_refused_before_its_weights_are_read(
    hub: standin.Hub, tmp_path: Path
) -> None:
    write_hf(tmp_path / "src", CONFIG | {"hidden_size": 24}, weights(CONFIG, BF16))
    repo = hub.add(MODEL, tmp_path / "src")
    with pytest.raises(ConversionError, match="do not fit config"):
        open_model(MODEL)
    assert hub.num_read < len(repo.files["model.safetensors"]) / 4


def test_a_conversion_streams_from_the_hub(hub: standin.Hub, tmp_path: Path) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16), shards=2)
    repo = hub.add(MODEL, tmp_path / "src")
    hub.faults += ["", "dropped", "500"]
    convert(MODEL, tmp_path / "out", verify=True)
    convert(tmp_path / "src", tmp_path / "same")
    assert_same_bits(params_of(tmp_path / "out"), params_of(tmp_path / "same"))
    files, want = (Checkpoint.open(tmp_path / name).manifest.source["files"] for name in ("out", "same"))
    assert {name: record["size"] for name, record in files.items()} == {n: r["size"] for n, r in want.items()}
    # The hash that the hub says, which is compared with what was read.
    shas = {name: f"sha256:{hashlib.sha256((tmp_path / 'src' / name).read_bytes()).hexdigest()}" for name in want}
    assert {name: record["hash"] for name, record in files.items()} == shas
    assert hub.num_read == sum(len(data) for name, data in repo.files.items() if standin.is_large(name))
    assert not (tmp_path / "cache").exists()


def test_nothing_stays_connected_once_the_weights_are_read(hub: standin.Hub, tmp_path: Path) -> None:
    write_hf(tmp_path / "src", shards=2)
    hub.add(MODEL, tmp_path / "src")
    model = open_model(MODEL)
    for _ in range(2):
        load_params(model, make_mesh(model.config, tp=1), model.dtype, None)
        # The hub's client keeps the one connection over which it asks for addresses.
        deadline = time.monotonic() + 5
        while hub.num_connections > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert hub.num_connections <= 1
