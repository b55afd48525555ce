"""A process has few file descriptors. What was closed holds none, and a model that runs holds none of its files."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest
import tiny
from unit.serving.live import CHAT, body, run, serving
from unit.weights.sources.sources import write_gguf, write_hf

from jaxllama import SamplingParams, load, make_mesh
from jaxllama.errors import ConversionError
from jaxllama.weights.checkpoint import Checkpoint
from jaxllama.weights.loading import load_params
from jaxllama.weights.opening import open_model, read_config
from jaxllama.weights.sources.detect import open_source

FOLDER = Path("/proc/self/fd")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="descriptors are listed by Linux alone")


def descriptors() -> list[str]:
    """What every open descriptor of this process is of."""
    found = []
    for path in FOLDER.iterdir():
        # The listing's own is gone already.
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return sorted(found)


def assert_none_is_left(use: Callable[[], None]) -> None:
    """`use` leaves what is open as it was, but for what is opened once a process."""
    use()
    gc.collect()
    before = descriptors()
    use()
    # What only the garbage collector closes stays open for as long as it likes.
    assert descriptors() == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind of model one."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_checkpoint(folder / "checkpoint", "divisible", max_position_embeddings=96)
    write_hf(folder / "safetensors", shards=2)
    write_gguf(folder / "model.gguf")
    return folder


@pytest.mark.parametrize("name", ["checkpoint", "safetensors", "model.gguf"])
def test_weights_that_are_read_leave_no_file_open(folder, name):
    def use() -> None:
        model = open_model(folder / name)
        assert not [path for path in descriptors() if path.startswith(str(folder))]
        params = load_params(model, make_mesh(model.config, tp=1), jnp.dtype("float32"), None)
        assert not [path for path in descriptors() if path.startswith(str(folder))]
        read_config(folder / name)
        del params

    assert_none_is_left(use)


def test_a_checkpoint_that_was_verified_and_a_source_that_is_refused_leave_none_open(folder, tmp_path):
    write_hf(tmp_path / "broken", shards=2)
    broken = tmp_path / "broken" / "model-00002-of-00002.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])

    def use() -> None:
        checkpoint = Checkpoint.open(folder / "checkpoint")
        checkpoint.verify()
        checkpoint.manifest_bytes()
        with pytest.raises(ConversionError, match="download"):
            open_source(tmp_path / "broken")

    assert_none_is_left(use)


def test_a_model_that_was_closed_leaves_none_open(folder):
    model = folder / "checkpoint"
    mesh = make_mesh(read_config(model), tp=1)

    def use() -> None:
        with load(model, mesh, options=tiny.SMALL) as llama:
            llama.generate("abc", SamplingParams(max_tokens=3))

    assert_none_is_left(use)


def test_a_server_that_was_closed_leaves_none_open(tokenizer_folder):
    async def serve() -> None:
        async with serving(tiny.make_llama(tokenizer_folder=tokenizer_folder)) as live:
            assert (await live.post({"max_tokens": 3}))[0] == 200
            await live.events(max_tokens=3)
            assert (await live.post({"temperature": 9}))[0] == 400
            # A client that goes away in the middle of its stream.
            async with live.session.post(live.url + CHAT, json=body(stream=True)) as response:
                await response.content.readany()

    assert_none_is_left(lambda: run(serve(), 60))
