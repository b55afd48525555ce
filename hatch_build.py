"""Puts prebuilt kernels into wheels for Linux on x86-64, one library for each instruction set.

It needs a C++ compiler and jaxlib, whose headers the kernels include: `make wheel` builds without isolation, in the
environment that has it. Without either the wheel is the same for all machines, and each compiles its own kernels.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("jaxllama") / "model" / "native"


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """hatchling's interface."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the libraries to `build_data`, and the oldest glibc that they run on to the wheel's tag."""
        if version == "editable":
            return
        missing = [
            what
            for what, there in (
                ("Linux on x86-64", (sys.platform, platform.machine()) == ("linux", "x86_64")),
                ("a C++ compiler", shutil.which("c++") is not None),
                ("jaxlib", importlib.util.find_spec("jaxlib") is not None),
            )
            if not there
        ]
        if missing:
            self.app.display_warning(f"a wheel without prebuilt kernels: they need {', '.join(missing)}")
            return
        folder = Path(self.directory) / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        library = _library(Path(self.root))
        # What is not in every old libstdc++ comes along; the rest of what is needed is glibc.
        static = ("-static-libstdc++", "-static-libgcc", "-s")
        glibc = 17
        for instructions in library.INSTRUCTION_SETS:
            if instructions.machine != "x86_64":
                continue
            path = folder / instructions.file_name
            self.app.display_info(f"kernels for {instructions.name}")
            try:
                library.build(instructions, path, ["c++"], static)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"{instructions.name}: {error.stderr.decode(errors='replace')}") from error
            build_data["force_include"][str(path)] = str(NATIVE / instructions.file_name)
            glibc = max(glibc, *map(int, re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_{glibc}_x86_64"


def _library(root: Path) -> Any:
    """The module of the source tree, whatever is installed."""
    spec = importlib.util.spec_from_file_location("kernels_library", root / NATIVE / "library.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
