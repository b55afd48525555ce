"""The laws of buckets against moto, another's idea of S3, whose `moto_server` must be on PATH.

It needs an environment of its own (`pip install 'moto[server,s3]'`): it cannot be beside python-dateutil 4.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxllama_convert import convert
from jaxllama_convert.checks.verify import verify
from processes import free_port
from unit.weights.sources.sources import BF16, CONFIG, weights, write_hf

from jaxllama.errors import PlaceError
from jaxllama.weights.places.bucket import open_bucket
from jaxllama.weights.places.upload import open_upload

SERVER = shutil.which("moto_server")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(SERVER is None, reason="no moto_server on PATH")]


@pytest.fixture
def moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with the empty bucket `models`."""
    if subprocess.run([str(SERVER), "--help"], capture_output=True).returncode != 0:
        pytest.skip(f"{SERVER} is of a Python that does not have moto")
    port = free_port()
    process = subprocess.Popen(
        [str(SERVER), "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
        urllib.request.urlopen(urllib.request.Request(f"{url}/models", method="PUT"), timeout=10).close()
        for name, value in {
            "ENDPOINT_URL": url,
            "ACCESS_KEY_ID": "a",
            "SECRET_ACCESS_KEY": "b",
            "REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield url
    finally:
        process.kill()
        process.wait(10)


def test_a_conversion_and_its_replacement(moto: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "src", tensors=weights(CONFIG, BF16), shards=2)
    convert(tmp_path / "src", "s3://models/out", verify=True)
    assert not verify("s3://models/out", tmp_path / "src").problems
    with pytest.raises(PlaceError, match="exists; give --force"):
        convert(tmp_path / "src", "s3://models/out")
    convert(tmp_path / "src", "s3://models/out", quantize="int8", force=True, verify=True)
    assert not verify("s3://models/out", tmp_path / "src").problems
    assert not any(name.startswith(".partial") for name in open_bucket("s3://models/out").all_names())


def test_conditional_puts_and_large_objects(moto: str) -> None:
    place = open_bucket("s3://models/lock")
    first = place.create("lock", b"1")
    assert first is not None
    assert place.create("lock", b"2") is None
    second = place.replace("lock", b"2", first)
    assert second is not None
    assert place.replace("lock", b"3", first) is None
    data = os.urandom(40 * 2**20)
    with open_upload("s3://models/large", "config.json") as work:
        work.begin({})
        work.write_parts("model.safetensors", (data[i : i + 2**20] for i in range(0, len(data), 2**20)))
        work.finish(b"{}")
    assert open_bucket("s3://models/large").read("model.safetensors") == data
