"""The programs on GPUs, as far as a machine without one can tell: they lower for CUDA, and its compiler takes them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxllama.decode.state import Chunk, Place, state_shapes
from jaxllama.decode.steps import decode_steps, prefill, prefill_logits
from jaxllama.model.params import build_params

ROOT = Path(__file__).parents[4]
PLATFORMS = ("cuda", "rocm")
ROWS, PAGES, PAGE_SIZE, CONTEXT = 3, 25, 4, 96


def traced(name: str):
    """Each program, traced on shapes alone."""
    config = tiny.config_of(name)
    params = build_params(config, lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16))
    state = state_shapes(
        config, num_rows=ROWS, num_pages=PAGES, page_size=PAGE_SIZE, max_context=CONTEXT, dtype=jnp.bfloat16
    )
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    tokens, pages = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in (8, CONTEXT // PAGE_SIZE))
    keep = jax.ShapeDtypeStruct((ROWS,), jnp.bool_)
    chunk = (config, params, state.pool, Place(pages, scalar), Chunk(tokens, scalar, scalar))
    return {
        "decode_steps": decode_steps.trace(config, params, state, scalar, keep, num_rows=ROWS),
        "prefill": prefill.trace(*chunk),
        "prefill_logits": prefill_logits.trace(*chunk),
    }


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["divisible", "smollm2_like"])
def test_the_programs_lower_for_other_platforms(name, platform):
    for program, trace in traced(name).items():
        text = trace.lower(lowering_platforms=(platform,)).as_text()
        assert "func.func public @main" in text
        # The state is donated everywhere, and nothing calls a CPU's library.
        assert "tf.aliasing_output" in text or "jax.buffer_donor" in text, program
        assert "cpu" not in text.lower(), program


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_of_float32_are_products_of_float32(platform):
    """A TPU would round what enters them to bfloat16, a GPU to TF32: attention's were."""
    config = tiny.config_of("divisible")
    params = build_params(config, lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32))
    state = state_shapes(
        config, num_rows=ROWS, num_pages=PAGES, page_size=PAGE_SIZE, max_context=CONTEXT, dtype=jnp.float32
    )
    scalar, keep = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.bool_)
    trace = decode_steps.trace(config, params, state, scalar, keep, num_rows=ROWS)
    products = [
        line for line in trace.lower(lowering_platforms=(platform,)).as_text().splitlines() if "dot_general" in line
    ]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products), products


def test_lowering_for_a_platform_can_fail():
    """The test above would see a program that a platform lacks."""
    only_on_cpus = jax.jit(lambda x: jax.lax.platform_dependent(x, cpu=jnp.cos))
    trace = only_on_cpus.trace(jax.ShapeDtypeStruct((), jnp.float32))
    with pytest.raises(NotImplementedError):
        trace.lower(lowering_platforms=("cuda",))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="jax-cuda12-plugin is not installed")
def test_the_cuda_compiler_takes_the_programs_and_copies_no_cache():
    """SmolLM2 on an H100 that is not there: one minute. The pool is 0.70 GiB, the weights 0.25."""
    config = ROOT / "models" / "SmolLM2-135M-Instruct" / "config.json"
    command = [sys.executable, ROOT / "bench" / "gpu_aot.py", config]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert found.returncode == 0, found.stderr
    rows = [line.strip("| ").split(" | ") for line in found.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["decode_steps, 16 rows", "prefill, 512 tokens"]
    for _, arguments, aliased, temporaries, _ in rows:
        assert 0.9 < float(arguments) < 1.0
        assert 0.70 < float(aliased) < 0.72
        assert float(temporaries) < 0.1
