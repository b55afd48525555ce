"""Throwaway environments: a virtual environment or an npm project for one program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from programs import CHECKS, Program

INSTALL_TIMEOUT_S = 900.0


class InstallError(Exception):
    """The environment could not be made; the message ends with what the installer said."""


def make_environment(program: Program, folder: Path) -> Path | None:
    """Installs the program in `folder`, unless that was done; returns its unpacked sources if their suite is run.

    Raises: InstallError.
    """
    stamp = folder / "installed.json"
    wanted = json.dumps([program.packages, program.without_dependencies, program.suite, program.python, CHECKS])
    if not stamp.is_file() or stamp.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        (_install_node if program.is_node else _install_python)(program, folder)
        stamp.write_text(wanted)
    return next(folder.glob("source/*"), None)


def _install_node(program: Program, folder: Path) -> None:
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    _run("npm", "install", "--no-save", "--no-package-lock", "--no-audit", "--no-fund", *program.packages, cwd=folder)


def _install_python(program: Program, folder: Path) -> None:
    python = folder / "env" / "bin" / "python"
    base = f"python{program.python}" if program.python else sys.executable
    _run(base, "-m", "venv", folder / "env", cwd=folder, environ={"PYENV_VERSION": program.python or ""})
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    if program.without_dependencies:
        _run(*pip, "install", "--no-deps", *program.without_dependencies, cwd=folder)
    _run(*pip, "install", *program.packages, *CHECKS, cwd=folder)
    if program.suite:
        name = program.client.split("==")[0]
        _run(*pip, "download", "--no-deps", "--no-binary", name, "--dest", folder, program.client, cwd=folder)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as sources:
            sources.extractall(folder / "source", filter="data")


def _run(*command: object, cwd: Path, environ: dict[str, str] | None = None) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    try:
        done = subprocess.run(
            [*map(str, command)],
            cwd=cwd,
            env=kept | (environ or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise InstallError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise InstallError(f"{command[0]} took longer than {INSTALL_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("WARNING")]
        raise InstallError("\n".join(lines[-5:]))
