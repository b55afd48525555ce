"""Processes of jaxllama beside the tests' own, as many hosts would run them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 60.0


class Process:
    """Python with these arguments in a process of its own, on two fake devices, or `devices`; `text` is its output."""

    def __init__(self, folder: Path, name: str, *arguments: Any, devices: int = 2) -> None:
        self.log = folder / f"{name}.log"
        environ = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "PYTHONUNBUFFERED": "1",
        }
        # Not for these tests' speed but their start: JAX lets process 0 alone keep what it compiled.
        environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=log, stderr=log, env=environ)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.text:
            assert time.monotonic() < deadline, f"no {text!r} within {timeout_s} s:\n{self.text}"
            assert self.process.poll() is None or text in self.text, f"ended before {text!r}:\n{self.text}"
            time.sleep(0.05)

    def code(self, timeout_s: float = END_TIMEOUT_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout_s} s:\n{self.text}") from None

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
