"""Kernels of our own for CPUs: matrix products whose weights are packed once, and paged attention.

XLA's library packs the weights of a product in every call, two thirds of a decode step of one request (bench/LOG.md).
`kernels.cc` is compiled for this very machine by its C++ compiler, which takes seconds, when a model is first loaded;
the result is kept beside JAX's compiled programs. Without AVX-512 BF16 or a compiler everything runs through XLA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from jaxtyping import Array, BFloat16, Float, Int32

logger = logging.getLogger("jaxllama.model.native")

BLOCK_WIDTH = 64
"""Outputs that lie together in a packed matrix."""

_SOURCE = Path(__file__).with_name("kernels.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-w")
_COMPILE_TIMEOUT_S = 120


@functools.cache
def is_available() -> bool:
    """Whether this machine has the kernels; compiles and registers them on the first call, and logs why if not."""
    cpu = _cpu()
    if "avx512_bf16" not in cpu.split():
        logger.info("no AVX-512 BF16 on this CPU: products and attention run through XLA")
        return False
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        logger.warning("no C++ compiler (%s): products and attention run through XLA, which takes longer", compiler[0])
        return False
    try:
        library = ctypes.CDLL(str(_compiled(compiler, cpu)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        logger.warning("products and attention run through XLA: kernels.cc was not compiled: %s %s", error, said)
        return False
    for name in ("jaxllama_multiply", "jaxllama_attend"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def multiply(
    x: BFloat16[Array, "*batch inputs"], *weights: BFloat16[Array, "blocks pairs 64 2"]
) -> list[Float[Array, "*batch outputs"]]:
    """`x @ weight.T` in float32 of each of the weights, packed by `weights.forms`. A row's bits depend on no other."""
    outs = [jax.ShapeDtypeStruct((*x.shape[:-1], len(blocks) * BLOCK_WIDTH), jnp.float32) for blocks in weights]
    return [*jax.ffi.ffi_call("jaxllama_multiply", outs)(x, *weights)]


def attend(
    q: BFloat16[Array, "rows tokens heads head_dim"],
    pages: BFloat16[Array, "pages page_size kv2 head_dim"],
    page_table: Int32[Array, "rows max_pages"],
    positions: Int32[Array, "rows tokens"],
) -> BFloat16[Array, "rows tokens heads head_dim"]:
    """As `attention.reference.paged_attention`, for heads of a multiple of 64. A query's bits depend on no other."""
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    result: Array = jax.ffi.ffi_call("jaxllama_attend", out)(q, pages, page_table, positions)
    return result


def _compiled(compiler: list[str], cpu: str) -> Path:
    """The shared library for this source, compiler, CPU and jaxlib; made if it is not there.

    Raises: OSError; RuntimeError without a home folder; subprocess.SubprocessError if the compiler fails or hangs.
    """
    source = _SOURCE.read_bytes()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
    parts = (source, version.stdout, cpu.encode(), jaxlib.__version__.encode(), " ".join(_FLAGS).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path.home() / ".cache" / "jaxllama" / "native"
    path = folder / f"kernels-{key}.so"
    if not path.exists():
        logger.info("compiling %s for this CPU", _SOURCE.name)
        folder.mkdir(parents=True, exist_ok=True)
        # Beside it, then renamed: processes that start together each write a whole file.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            command = [*compiler, *_FLAGS, "-I", jax.ffi.include_dir(), str(_SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
            made.replace(path)
    return path


def _cpu() -> str:
    """The first CPU's features, as Linux lists them; elsewhere nothing."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else ""
