"""Schemathesis against the server's own document: no 5xx, no status or answer that it does not describe."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from unit.serving.fakes import FakeLlama
from unit.serving.live import serving_in_thread

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
)


def fuzz(url: str, folder: Path, *options: str) -> int:
    """Runs Schemathesis in `folder` and returns how many cases it tried."""
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", "--no-color", "--mode=all"]
    done = subprocess.run(
        [*command, f"--checks={','.join(CHECKS)}", "--generation-database=none", *options],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    found = re.search(r"(\d+) generated, \1 passed", done.stdout)
    assert found, done.stdout[-2000:]
    return int(found[1])


def test_a_few_cases_of_every_route(tmp_path):
    with serving_in_thread(FakeLlama(["a", "b"])) as url:
        cases = fuzz(
            url, tmp_path, "--phases=examples,fuzzing", "--max-examples=30", "--exclude-path-regex=openai/", "--seed=1"
        )
    assert cases > 100


@pytest.mark.slow
def test_a_thousand_cases_against_a_model(tmp_path):
    """A real tiny model, so that what passes the protocol also passes the engine."""
    options = tiny.SMALL
    with tiny.make_llama(options=options, tokenizer_folder=tiny.write_tokenizer(tmp_path)) as llama:
        llama.engine.warm_up()
        with serving_in_thread(llama) as url:
            assert fuzz(url, tmp_path, "--max-examples=25", "--seed=2") > 1000
