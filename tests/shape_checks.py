"""With CHECK_SHAPES set (`make test-shapes`), every annotated array is checked while tests run: its dtype, and that the
sizes of one call agree."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGES = ("jaxllama.model", "jaxllama.decode")

# An int is good enough where a float is asked for, as type checkers have it.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    """Has `function` checked, but no constructor: JAX makes its pytrees of placeholders too, and what people are to
    make refuses wrong types by itself."""
    return function if function.__name__ == "__init__" else _check(function)


def install() -> None:
    """Call it before anything of `PACKAGES` is imported. Programs are checked while they are traced."""
    # A program takes NumPy's arrays too.
    jaxtyping.Array = jax.Array | np.ndarray  # type: ignore[misc,assignment]
    install_import_hook(modules(), "shape_checks.check")


def modules() -> list[str]:
    """Those of `PACKAGES` that annotate arrays. To others tests give what is wrong, and they refuse it themselves."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        (place,) = spec.submodule_search_locations or ()
        folder = Path(place)
        for path in folder.rglob("*.py"):
            if "from jaxtyping import" in path.read_text(encoding="utf-8"):
                name = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
                found.append(name.removesuffix(".__init__"))
    return found
