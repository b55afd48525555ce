"""The runner of outside programs: one that cannot be installed or breaks is a line of the summary, and no more."""

from __future__ import annotations

import contextlib
import sys

import pytest
from clients import run
from environments import InstallError
from programs import PROGRAMS

REPORT = """<testsuites><testsuite>
<testcase name="check_a"/><testcase name="check_b"><skipped message="no such route"/></testcase>
</testsuite></testsuites>"""


def test_every_program_has_its_line_whatever_happens(monkeypatch, capsys, tmp_path):
    names = [program.name for program in PROGRAMS]

    def make_environment(program, folder):
        if program.name == names[0]:
            raise InstallError("ERROR: first\nERROR: No matching distribution found for it==1")
        if program.name == names[1]:
            raise OSError(28, "No space left on device")

    def run_checks(program, folder, source, scratch, url, model):
        if program.name == names[2]:
            (scratch / "report.xml").write_text("<testsuites><te")
        elif program.name != names[3]:
            (scratch / "report.xml").write_text(REPORT)
        return "ended after 900 s"

    monkeypatch.setattr(run, "make_environment", make_environment)
    monkeypatch.setattr(run, "_run_checks", run_checks)
    monkeypatch.setattr(run, "serving", lambda kind, model: contextlib.nullcontext("http://127.0.0.1:1"))
    monkeypatch.setattr(sys, "argv", ["run.py", "--work", str(tmp_path)])
    assert run.main() == 1
    summary = capsys.readouterr().out.split("\n\n")[-1]
    assert [line.split(" | ")[0] for line in summary.splitlines()[2:] if line[0] == "|"] == [f"| {n}" for n in names]
    lines = [line for line in summary.splitlines() if line.startswith("* ")]
    assert lines[0] == f"* {names[0]}: not installed: ERROR: first ERROR: No matching distribution found for it==1"
    assert lines[1] == f"* {names[1]}: OSError: [Errno 28] No space left on device"
    assert lines[2].startswith(f"* {names[2]}: ParseError: ")
    assert lines[3] == f"* {names[3]}: no report: ended after 900 s"
    assert lines[4:] == [f"* {name}, skipped 1: no such route" for name in names[4:]]


def test_a_program_that_nobody_knows_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "nobody"])
    with pytest.raises(SystemExit) as exit:
        run.main()
    assert exit.value.code == 2
    assert "nobody" in capsys.readouterr().err
