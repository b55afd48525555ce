"""The compilation cache is a folder that a later process reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxllama.compilation import enable_compilation_cache

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def _restored_config() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_made_and_used(tmp_path):
    folder = tmp_path / "a" / "b"
    assert enable_compilation_cache(folder) == folder
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_the_default_folder_is_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert enable_compilation_cache() == tmp_path / ".cache" / "jaxllama" / "xla"


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        enable_compilation_cache(tmp_path / "file" / "cache")


PROGRAM = """
import sys
import jax
from jaxllama.compilation import enable_compilation_cache

enable_compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hit" in event else None)
jax.jit(lambda x: x * 3 + 1)(2.0)
print(len(hits))
"""


def test_a_second_process_reuses_what_the_first_compiled(tmp_path):
    def run() -> int:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        done = subprocess.run(
            command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert run() == 0
    assert any(tmp_path.iterdir())
    assert run() > 0
