"""Where the kernels' machine code comes from: the wheel, or this machine's C++ compiler.

The sources here become one library for each instruction set, and a process loads the best that its CPU can run. A wheel
for x86-64 brings them (`hatch_build.py`). Elsewhere one is compiled when a model is first loaded, which takes seconds,
and kept beside JAX's compiled programs. A machine without a compiler can have one as a package: `ziglang` is Clang with
the sources of a C++ library, which its first run compiles for a minute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jaxlib.version

logger = logging.getLogger("jaxllama.model.native")

SOURCES = Path(__file__).parent
# -O3 takes twice as long to compile, and its code no less time (bench/LOG.md). Names are hidden because a process may
# hold the libraries of several instruction sets.
FLAGS = (
    *("-std=c++17", "-O2", "-ftree-vectorize", "-fvect-cost-model", "-ffp-contract=off"),
    *("-fPIC", "-fvisibility=hidden", "-w"),
)
_COMPILE_TIMEOUT_S = 600  # Zig's first run compiles the C++ library
_ZIG = [sys.executable, "-m", "ziglang", "c++"]
_loading = threading.Lock()


@dataclass(frozen=True)
class InstructionSet:
    """What a library is compiled for: CPUs that list all of `features` (as Linux spells them) can run it."""

    name: str
    machine: str
    features: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Of the library that a wheel brings."""
        return f"kernels-{self.name}.so"


_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
INSTRUCTION_SETS = (
    InstructionSet(
        "amx", "x86_64", (*_AVX512, "amx_tile", "amx_bf16"), ("-march=x86-64-v4", "-mamx-tile", "-mamx-bf16")
    ),
    InstructionSet("avx512-bf16", "x86_64", (*_AVX512, "avx512_bf16"), ("-march=x86-64-v4", "-mavx512bf16")),
    InstructionSet("avx512", "x86_64", _AVX512, ("-march=x86-64-v4",)),
    InstructionSet("avx2", "x86_64", _AVX2, ("-march=x86-64-v3",)),
    InstructionSet("neon", "aarch64", (), ()),
)
"""The best first."""


def is_available() -> bool:
    """Whether this machine has the kernels; loads and registers them on the first call, and logs which, or why not."""
    with _loading:
        return _is_loaded()


@functools.cache
def _is_loaded() -> bool:
    return load(supported()) is not None


def begin_loading() -> None:
    """Has another thread find out what `is_available` says, which may take a compiler's time."""
    threading.Thread(target=is_available, name="jaxllama-kernels", daemon=True).start()


def load(sets: Sequence[InstructionSet]) -> ctypes.CDLL | None:
    """The library for the first of `sets` that can be had, registered with JAX; None, and a warning, if none can."""
    if not sets:
        logger.info("no kernels for this CPU (%s): products and attention run through XLA", platform.machine())
        return None
    brought = [SOURCES / each.file_name for each in sets if (SOURCES / each.file_name).exists()]
    try:
        library = ctypes.CDLL(str(brought[0] if brought else compiled(sets[0])))
    except FileNotFoundError as error:
        logger.warning("%s: products and attention run through XLA, which takes longer", error)
        return None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        logger.warning("products and attention run through XLA: kernels.cc was not compiled: %s %s", error, said)
        return None
    library.jaxllama_instruction_set.restype = ctypes.c_char_p
    logger.info("kernels for %s, %s", library.jaxllama_instruction_set().decode(), "brought" if brought else "compiled")
    for name in ("jaxllama_multiply", "jaxllama_attend", "jaxllama_layer"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def supported() -> list[InstructionSet]:
    """Those that this machine's CPU can run, the best first."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    features = set(cpu_features().split())
    if "amx_tile" in features and not may_use_tiles():
        features.discard("amx_tile")
    return [each for each in INSTRUCTION_SETS if each.machine == machine and features.issuperset(each.features)]


def may_use_tiles() -> bool:
    """Whether Linux lets this process use AMX's registers, for which every process has to ask.

    Source: the kernel's documentation, "Using XSTATE features in user space applications".
    """
    arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0


def compiled(instructions: InstructionSet) -> Path:
    """The shared library for these sources, compiler and jaxlib; made if it is not there.

    Raises: FileNotFoundError without a compiler; OSError; RuntimeError without a home folder;
    subprocess.SubprocessError if the compiler fails or hangs.
    """
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
    files = [path.read_bytes() for path in source_files()]
    flags = " ".join((*FLAGS, *instructions.flags))
    built_with = (version.stdout, jaxlib.version.__version__.encode(), flags.encode())
    key = hashlib.sha256(b"\0".join((*files, *built_with))).hexdigest()
    folder = _folder()
    path = folder / f"kernels-{instructions.name}-{key[:16]}.so"
    if not path.exists():
        note = " (the first time Zig does, it takes a minute or two more)" if compiler == _ZIG else ""
        logger.info("compiling kernels.cc for this CPU%s", note)
        folder.mkdir(parents=True, exist_ok=True)
        # Beside it, then renamed: processes that start together each write a whole file.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            build(instructions, made, compiler)
            made.replace(path)
    return path


def find_compiler() -> list[str]:
    """The command: `$CXX`, or else `c++`, or else Zig's, if its package is installed.

    Raises: FileNotFoundError.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    command = named or ["c++"]
    if shutil.which(command[0]) is not None:
        return command
    if not named and importlib.util.find_spec("ziglang") is not None:
        return _ZIG
    raise FileNotFoundError(f"no C++ compiler ({command[0]})")


def _folder() -> Path:
    """In that of JAX's compiled programs (`--compilation-cache`), if it is one of this machine's."""
    programs = jax.config.jax_compilation_cache_dir
    if programs and "://" not in programs:
        return Path(programs) / "native"
    return Path.home() / ".cache" / "jaxllama" / "native"


def build(instructions: InstructionSet, to: Path, compiler: list[str], more: Sequence[str] = ()) -> None:
    """Compiles the library, its sources side by side; `more` is for the linker.

    Raises: OSError; subprocess.SubprocessError.
    """
    own = instructions.flags
    if compiler == _ZIG:
        own = tuple(flag.replace("x86-64-v", "x86_64_v") for flag in own)  # as it spells CPUs
    flags = (*FLAGS, *own, "-I", jax.ffi.include_dir())

    def run(*arguments: str) -> None:
        subprocess.run([*compiler, *flags, *arguments], capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)

    def compile_one(source: Path) -> Path:
        made = to.with_name(f"{to.name}.{source.stem}.o")
        run("-c", str(source), "-o", str(made))
        return made

    with ThreadPoolExecutor(thread_name_prefix="jaxllama-c++") as pool:
        objects = [*pool.map(compile_one, sorted(SOURCES.glob("*.cc")))]
    run("-shared", *map(str, objects), *more, "-o", str(to))
    for made in objects:
        made.unlink()


def source_files() -> list[Path]:
    """What the library is made of."""
    return sorted((*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")))


def cpu_features() -> str:
    """The first CPU's features, as Linux lists them; elsewhere nothing."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else ""
