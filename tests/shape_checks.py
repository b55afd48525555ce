"""With CHECK_SHAPES set (`make test-shapes`), every annotated array is checked while tests run: its dtype, and that the
sizes of one call agree."""

from __future__ import annotations

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGES = ("jaxllama.model", "jaxllama.decode")

# An int is good enough where a float is asked for, as type checkers have it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Call it before anything of `PACKAGES` is imported. Programs are checked while they are traced."""
    # A program takes NumPy's arrays too.
    jaxtyping.Array = jax.Array | np.ndarray  # type: ignore[misc,assignment]
    install_import_hook(PACKAGES, "shape_checks.check")
