"""`make test-shapes` checks what annotations say of arrays, and is not broken between two of its runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import shape_checks

ROOT = Path(__file__).parents[2]
# A quick one that reaches most of the two packages, and some that give wrong types to be refused.
TESTS = (
    "decode/functional_test.py::test_rows_say_what_the_engine_says",
    "decode/sampling_params_test.py",
)
WRONG = """
import sys
sys.path.insert(0, "tests")
import shape_checks
shape_checks.install()
import jax.numpy as jnp
import jaxtyping
from jaxllama.decode.sampling import keep_min_p
keep_min_p(jnp.zeros((2, 3)), jnp.zeros(2))
for bad in (jnp.zeros(3), jnp.zeros((2, 1)), jnp.zeros(2, int)):
    try:
        keep_min_p(jnp.zeros((2, 3)), bad)
    except jaxtyping.TypeCheckError:
        continue
    raise AssertionError(bad.shape)
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"CHECK_SHAPES": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False
    )


def test_a_wrong_shape_or_dtype_is_an_error():
    done = run("-c", WRONG)
    assert done.returncode == 0, done.stderr


def test_a_part_of_the_suite_passes_with_shapes_checked():
    done = run("-m", "pytest", "-q", "-m", "not slow", *(f"tests/unit/{test}" for test in TESTS))
    assert done.returncode == 0, done.stdout[-3000:]


def test_modules_that_annotate_arrays_are_found_and_others_are_not():
    found = shape_checks.modules()
    assert {"jaxllama.decode.steps", "jaxllama.model.forward", "jaxllama.model.native"} <= {*found}
    assert "jaxllama.decode.params" not in found
