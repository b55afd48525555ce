"""Every test runs on eight fake CPU devices, and models are made once for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# bench/device_check.sh runs a GPU kernel's tests on the GPU.
PLATFORM = os.environ.get("TEST_PLATFORM", "cpu")
# By JAX's configuration and not by XLA_FLAGS: the environment would reach the processes that tests start.
jax.config.update("jax_platforms", PLATFORM)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)

if os.environ.get("CHECK_SHAPES"):
    import shape_checks

    shape_checks.install()

if os.environ.get("TEST_INSTRUCTION_SET"):
    from jaxllama.model.native import library

    # Its kernels, although the CPU has better ones: "avx2".
    assert library.load([each for each in library.supported() if each.name == os.environ["TEST_INSTRUCTION_SET"]])
    library._is_loaded = lambda: True  # type: ignore[assignment]

import tiny  # noqa: E402

from jaxllama import Engine, Llama  # noqa: E402
from jaxllama.engine.compilation import enable_compilation_cache  # noqa: E402

_CACHE_BYTES = 2**30


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs from one run to the next, and prints what takes longest."""
    if config.option.durations is None:
        config.option.durations = 10
    cache = getattr(config, "cache", None)
    if cache is not None:
        enable_compilation_cache(cache.mkdir("xla"))
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


@pytest.fixture(scope="session", autouse=True)
def _eight_devices() -> None:
    assert PLATFORM != "cpu" or jax.device_count() == 8


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_module() -> Iterator[None]:
    """A program takes memory maps, of which Linux lets a process have 65,530: all tests together would take more."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _programs_compile_fast(request: pytest.FixtureRequest) -> None:
    """Compiling is most of what tests do. Where numbers are not the point, LLVM does without its optimizations."""
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("optimized") is None)


@pytest.fixture(scope="session")
def llama() -> Iterator[Llama]:
    """The tiny model that most tests share: float32, one device, no tokenizer."""
    with tiny.make_llama() as model:
        yield model


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine of the same model for one test alone."""
    with tiny.make_llama() as model:
        yield model.engine


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the byte-level tokenizer and a ChatML template."""
    return tiny.write_tokenizer(tmp_path_factory.mktemp("byte_level"))
