"""Laws of reading models from buckets: the bits of the same files on a disk, whatever a connection does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import bucket
import pytest
from jaxllama_convert import convert
from unit.weights.places.hub_test import assert_same_bits, params_of
from unit.weights.sources.sources import BF16, CONFIG, weights, write_hf

from jaxllama import Checkpoint
from jaxllama.errors import CheckpointError, StoreError
from jaxllama.weights.places import open_place, retries, short_name
from jaxllama.weights.places.bucket import open_bucket


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[bucket.Store]:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    with bucket.running() as running:
        environ = {
            "AWS_ENDPOINT_URL": running.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "GOOGLE_BASE_URL": running.url,
            "GOOGLE_BEARER_TOKEN": "token",
        }
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_a_bucket_holds_has_the_bits_of_the_same_files(
    store: bucket.Store, tmp_path: Path, scheme: str, quantize: str | None
) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16), shards=2)
    convert(tmp_path / "src", tmp_path / "out", quantize=quantize)
    store.add("models/deep/src", tmp_path / "src")
    store.add("models/deep/out", tmp_path / "out")
    # What begins with the same name is not of the folder.
    store.objects["models/deep/out-other/config.json"] = b"{}"
    want = params_of(tmp_path / "out", 3)
    assert_same_bits(params_of(f"{scheme}://models/deep/src", 3, quantize), want)
    assert_same_bits(params_of(f"{scheme}://models/deep/out", 3), want)
    Checkpoint.open(f"{scheme}://models/deep/out").verify()
    assert short_name(f"{scheme}://models/deep/out/") == "out"


@pytest.mark.parametrize("fault", ["500", "503", "429", "dropped"])
def test_a_fault_of_the_store_costs_time_and_nothing_else(store: bucket.Store, tmp_path: Path, fault: str) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16))
    store.add("models/src", tmp_path / "src")
    store.faults += [fault, "", "", fault, fault]
    assert_same_bits(params_of("s3://models/src"), params_of(tmp_path / "src"))
    assert not store.faults


def test_a_file_that_changes_is_an_error_that_names_it(store: bucket.Store, tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    store.add("models/src", tmp_path / "src")
    place = open_place("s3://models/src")
    file = place.stat("config.json")
    assert file is not None
    store.objects["models/src/config.json"] += b" "
    with pytest.raises(StoreError, match=r"s3://models/src/config\.json: has changed"):
        place.read_into(file, 0, memoryview(bytearray(4)))


def test_what_is_incomplete_or_damaged_is_named(store: bucket.Store, tmp_path: Path) -> None:
    write_hf(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out")
    store.add("models/out", tmp_path / "out")
    name = "models/out/params/norm/0"
    store.objects[name] = store.objects[name][:-1] + b"\xff"
    with pytest.raises(CheckpointError, match="params/norm/0: blake3"):
        Checkpoint.open("gs://models/out").verify()
    store.objects[name] = store.objects[name][:-1]
    with pytest.raises(CheckpointError, match=r"gs://models/out: 1 damaged.*params/norm/0: \d+ bytes, expected"):
        Checkpoint.open("gs://models/out")
    del store.objects["models/out/manifest.json"]
    with pytest.raises(CheckpointError, match=r"gs://models/out: has no manifest\.json: an incomplete checkpoint"):
        params_of("gs://models/out")
    with pytest.raises(CheckpointError, match="nothing there"):
        Checkpoint.open("gs://models/gone")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_one_of_two_creates_an_object(store: bucket.Store, scheme: str) -> None:
    place = open_bucket(f"{scheme}://models/out")
    assert place.create("lock", b"first")
    assert not open_bucket(f"{scheme}://models/out").create("lock", b"second")
    place.put("other", b"1")
    place.put("other", b"22")
    assert store.objects == {"models/out/lock": b"first", "models/out/other": b"22"}
