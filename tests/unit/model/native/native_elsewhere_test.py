"""The kernels where they are not at home: from a wheel, by another compiler, on an emulated ARM, under sanitizers."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxllama.model.native import library

ROOT = Path(__file__).parents[4]
NATIVE = ROOT / "jaxllama" / "model" / "native"
CHECK = Path(__file__).with_name("native_check.cc")
PROGRAM = """
import logging
logging.basicConfig(level=logging.INFO)
import jax.numpy as jnp
from jaxllama.model import native
assert native.is_available()
[y] = native.multiply(jnp.ones((3, 70), "bfloat16"), native.pack(jnp.ones((33, 70), "bfloat16")))
assert y.shape == (3, 33) and (y == 70).all()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="prebuilt kernels are for Linux on x86-64"
)
def test_a_wheel_s_kernels_load_without_a_compiler(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=500)
    [wheel] = tmp_path.glob("*.whl")
    assert "-py3-none-manylinux_2_" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    libraries = sorted(path.name for path in (tmp_path / "site" / "jaxllama" / "model" / "native").glob("*.so"))
    assert libraries == ["kernels-amx.so", "kernels-avx2.so", "kernels-avx512-bf16.so", "kernels-avx512.so"]
    environment = {"PATH": "/nonexistent", "PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path / "home")}
    environment |= {name: os.environ[name] for name in ("JAX_PLATFORMS",) if name in os.environ}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    assert ", brought" in run.stderr
    assert not (tmp_path / "home" / ".cache" / "jaxllama" / "native").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="the extra `compiler` is not installed")
def test_the_compiler_of_the_extra_makes_them(tmp_path):
    environment = {"PATH": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert ", compiled" in run.stderr


def check(compiler: str, flags: list[str], to: Path, *emulator: str) -> list[str]:
    """What `native_check.cc` prints: the instruction set, and a hash of the products' bits."""
    command = [compiler, "-std=c++17", "-ffp-contract=off", "-w", "-I", str(NATIVE), *flags, str(CHECK), "-o", str(to)]
    subprocess.run(command, check=True, timeout=500)
    run = subprocess.run([*emulator, str(to)], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.split()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", [each.name for each in library.INSTRUCTION_SETS])
def test_every_instruction_set_of_this_cpu_is_exact(name, tmp_path):
    """A process loads the best one only."""
    found = {each.name: each for each in library.supported()}
    if name not in found:
        pytest.skip(f"this CPU has no {name}")
    check("c++", ["-O1", *found[name].flags], tmp_path / name)


@pytest.mark.skipif(not library.supported() or shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("source", ["products.cc", "attention.cc"])
def test_the_compiler_keeps_what_fetches_memory_ahead(source):
    """GCC dropped all of it once, which no result shows."""
    flags = [*library.FLAGS, *library.supported()[-1].flags]
    made = subprocess.run(
        ["c++", *flags, "-S", str(NATIVE / source), "-o", "-"], check=True, capture_output=True, text=True, timeout=500
    )
    assert made.stdout.count("prefetch") + made.stdout.count("prfm") >= 20


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in library.cpu_features().split(), reason="compares with AVX2")
@pytest.mark.skipif(
    None in (shutil.which("qemu-aarch64"), shutil.which("aarch64-linux-gnu-g++"), shutil.which("g++")),
    reason="needs qemu-user, g++-aarch64-linux-gnu and g++",
)
def test_arm_s_kernels_have_the_bits_of_avx2(tmp_path):
    arm = check("aarch64-linux-gnu-g++", ["-O2", "-static"], tmp_path / "arm", "qemu-aarch64")
    x86 = check("g++", ["-O1", "-march=x86-64-v3", "-fsanitize=address,undefined"], tmp_path / "x86")
    assert (arm[0], x86[0]) == ("NEON", "AVX2")
    assert arm[1] == x86[1]
