"""What the documentation tells people to run, run: its Python and its commands, page by page, on the default model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from documentation import ROOT, Block, all_blocks
from processes import free_port

CHECKPOINT = ROOT / "models" / "SmolLM2-135M-Instruct"
# What starts a server is the fixture's, and what sets up a machine would change this one.
NOT_RUN = ("jaxllama serve", "make ")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHECKPOINT / "manifest.json").exists(), reason="the default model is not converted: make test"
    ),
]


def runnable(language: str) -> list[Block]:
    found = [block for block in all_blocks() if block.language == language and not block.needs]
    return [block for block in found if not any(text in block.text for text in NOT_RUN)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One device, and a `jaxllama` on the path."""
    programs = tmp_path_factory.mktemp("bin")
    for name, command in (("jaxllama", f"{sys.executable} -m jaxllama"), ("python", sys.executable)):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return environ | {"PATH": f"{programs}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would be: with the model, and a batch's input."""
    path = tmp_path_factory.mktemp("reader")
    (path / "models").mkdir()
    (path / "models" / CHECKPOINT.name).symlink_to(CHECKPOINT)
    (path / "in.jsonl").write_text(
        '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": '
        '{"model": "default", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}}\n'
    )
    return path


@pytest.fixture(scope="module")
def port(folder: Path, environment: dict[str, str]) -> Iterator[int]:
    """A server of the default model."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "jaxllama",
        "serve",
        f"models/{CHECKPOINT.name}",
        "--port",
        str(port),
        "--served-model-name",
        "default",
    ]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "server.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def run(command: list[str], folder: Path, environment: dict[str, str], port: int) -> None:
    command = [part.replace("localhost:8000", f"localhost:{port}") for part in command]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert '"error"' not in done.stdout, done.stdout


@pytest.mark.parametrize("page", sorted({block.page for block in runnable("python")}))
def test_the_python_of_a_page_runs(page, folder, environment, port):
    """All of a page's blocks in their order, in one process."""
    source = "\n".join(block.text for block in runnable("python") if block.page == page)
    run([sys.executable, "-c", source], folder, environment, port)


@pytest.mark.parametrize("block", runnable("sh"), ids=str)
def test_the_commands_of_a_page_run(block, folder, environment, port):
    run(["bash", "-ec", block.text], folder, environment, port)


def test_the_documentation_is_built_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "--quiet",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "generated" / "cli.html").exists()
