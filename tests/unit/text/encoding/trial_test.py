"""A hostile tokenizer is one line of error, whatever it does to the process that tries it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllama.errors import TokenizerError
from jaxllama.text.encoding.trial import CPU_S, MEMORY_BYTES, bounds_of, try_tokenizer

_BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}


def _growing(times: int, steps: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * times}
    return {"type": "Sequence", "normalizers": [step] * steps}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "an empty vocabulary": ({"model": _BPE | {"vocab": {}}}, "empty vocabulary"),
    "no letter in the vocabulary": ({"model": _BPE | {"vocab": {"\u4e00": 0}}}, "no tokens"),
    "no model": ({"model": None}, "cannot load"),
    "a normaliser that grows text a little": ({"normalizer": _growing(10, 3)}, "tokens of a text of"),
    "a normaliser that fills the memory": ({"normalizer": _growing(100, 5)}, "beyond"),
    "a pattern that never ends": ({"pre_tokenizer": _split("(a|aa)+$|(a+)+b")}, "retry-limit"),
    "ids beyond the model": ({"model": _BPE | {"vocab": {"a": 0, "b": 999}}}, "vocab_size=100"),
}


def _write(folder: Path, changes: dict[str, Any]) -> Path:
    spec = {"version": "1.0", "added_tokens": [], "model": _BPE}
    (folder / "tokenizer.json").write_text(json.dumps(spec | changes))
    return folder


def _refused(folder: Path, **bounds: Any) -> str:
    with pytest.raises(TokenizerError) as caught:
        try_tokenizer(folder, 100, **bounds)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_is_one_line(tmp_path, capfd, case):
    changes, reason = HOSTILE[case]
    assert reason in _refused(_write(tmp_path, changes))
    # A panic of Rust's writes pages to standard error, past Python.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["[]", '[{"model": 1}]', "null", "3", '"x"', "", "{"])
def test_what_is_no_tokenizer_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in _refused(tmp_path)


def test_bounds_grow_with_the_files_so_that_a_small_hostile_one_ends_soon(tmp_path, capfd):
    _write(tmp_path, {"normalizer": _growing(100, 5)})
    memory_bytes, cpu_s = bounds_of(tmp_path)
    assert (memory_bytes, cpu_s) <= (MEMORY_BYTES / 3, CPU_S / 3)
    assert f"{memory_bytes / 2**30:.2g} GiB" in _refused(tmp_path)
    assert capfd.readouterr() == ("", "")
    (tmp_path / "tokenizer.model").write_bytes(b"x" * 2_000_000)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 8_000_000)  # no file of a tokenizer's
    assert (memory_bytes, cpu_s) < bounds_of(tmp_path) < (MEMORY_BYTES, CPU_S)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 30_000_000)
    assert bounds_of(tmp_path) == (MEMORY_BYTES, CPU_S)


def test_time_is_bounded_by_the_processor_and_by_the_clock(tmp_path):
    _write(tmp_path, {"normalizer": _growing(20, 5)})
    assert "1 s of processor time" in _refused(tmp_path, cpu_s=1)
    assert "longer than 0.01 s" in _refused(tmp_path, wall_s=0.01)


def test_a_good_tokenizer_passes(tokenizer_folder):
    try_tokenizer(tokenizer_folder, 280)


def test_a_trial_loads_no_jax():
    code = "import sys, jaxllama.text.encoding.trial; print([m for m in ('jax', 'flax', 'orbax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
