"""The doctor finds what is wrong with a machine that a test makes so, and tells no secret."""

from __future__ import annotations

import json
import shutil
import socket

import jax
import pytest

from jaxllama.__main__ import main
from jaxllama.model.native import library
from jaxllama.system import doctor


def found(name: str, **options: object) -> list[doctor.Finding]:
    return [finding for finding in doctor.examine(**options) if finding.name == name]  # type: ignore[arg-type]


def test_a_sound_machine_has_no_problem(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free_port = taken.getsockname()[1]
    code = main(["doctor", "--json", "--port", str(free_port), "--compilation-cache", str(tmp_path)])
    findings = json.loads(capsys.readouterr().out)
    assert code == 0, [finding for finding in findings if finding["status"] == "problem"]
    assert {"python", "jaxllama", "libraries", "devices", "caches", "disk", "memory", "port"} <= {
        f["name"] for f in findings
    }
    devices = next(finding["text"] for finding in findings if finding["name"] == "devices")
    assert devices.startswith(f"{len(jax.devices())} × cpu")


def test_a_port_that_is_taken_is_a_problem(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["doctor", "--port", str(port)]) == 1
    shown = capsys.readouterr().out
    assert f"FAIL  port         {port} cannot be had" in shown
    assert "--port 0" in shown
    assert found("port", port=99999)[0].status == "problem"


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    (finding,) = [f for f in found("caches", compilation_cache=blocked / "xla") if f.status == "warning"]
    assert str(blocked) in finding.text
    assert "--compilation-cache" in finding.advice


def test_the_size_of_a_cache_counts_each_file_once(tmp_path):
    (tmp_path / "blob").write_bytes(bytes(1000))
    (tmp_path / "link").symlink_to("blob")
    assert doctor._size(tmp_path) == (1, 1000)


def test_no_compiler_is_a_warning(monkeypatch):
    monkeypatch.setattr(library, "supported", lambda: [library.INSTRUCTION_SETS[-1]])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (finding,) = found("CPU kernels")
    assert finding.status == "warning"
    assert "C++ compiler" in finding.text


def test_a_tpu_that_jax_does_not_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "may_have_tpu", lambda: True)
    assert [finding.status for finding in found("devices")] == ["ok", "problem"]


def test_devices_that_cannot_start_are_a_problem_and_the_rest_is_told(monkeypatch):
    def fail() -> None:
        raise RuntimeError("The TPU is already in use by process 42")

    monkeypatch.setattr(jax, "devices", fail)
    findings = doctor.examine()
    (finding,) = [finding for finding in findings if finding.name == "devices"]
    assert (finding.status, finding.advice) == ("problem", "end the process that holds it")
    assert any(finding.name == "memory" for finding in findings)


def test_a_look_that_fails_is_a_finding(monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("broken\nmachine")

    monkeypatch.setattr(doctor, "_free_memory_bytes", fail)
    assert [finding.text for finding in found("memory")] == ["could not be looked at: broken machine"]


def test_old_libraries_are_named(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy>=99", "jax>=0.4", 'x>=1; extra == "y"'])
    assert [requirement for requirement, _ in doctor._too_old()] == ["numpy>=99"]


@pytest.mark.parametrize("name", ["HF_TOKEN", "JAXLLAMA_API_KEYS", "OPENAI_API_KEY"])
def test_secrets_are_not_told(monkeypatch, name):
    monkeypatch.setenv(name, "secret-value")
    text = doctor.as_text(doctor.examine())
    assert f"{name} is set" in text
    assert "secret" not in text
