"""aiperf's load of 40 requests, with the default model's tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NUM_REQUESTS = 40


@pytest.fixture
def hub(checkpoint: str, tmp_path: Path) -> Path:
    """A hub's cache that holds the tokenizer as `org/model`: offline, aiperf looks there alone, never in a folder."""
    cached = tmp_path / "hub" / "models--org--model"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(checkpoint) / name, snapshot)
    return cached.parent


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["chat", "completions"])
def check_forty_requests(url, hub, tmp_path, kind):
    command = [
        *("aiperf", "profile", "--model", "default", "--url", url, "--endpoint-type", kind, "--streaming"),
        *("--tokenizer", "org/model", "--request-count", NUM_REQUESTS, "--concurrency", 4),
        *("--prompt-input-tokens-mean", 40, "--prompt-output-tokens-mean", 12, "--random-seed", 3),
        *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "min_tokens:12"),
        *("--output-artifact-dir", tmp_path, "--ui", "none"),
    ]
    environ = os.environ | {"HF_HUB_CACHE": str(hub)}
    done = subprocess.run(list(map(str, command)), env=environ, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    report = json.loads(next(tmp_path.rglob("profile_export_aiperf.json")).read_text())
    assert report["request_count"]["avg"] == NUM_REQUESTS, report.get("error_summary")
    assert not report.get("error_summary")
    assert report["output_sequence_length"]["avg"] > 0
    assert report["time_to_first_token"]["avg"] > 0
