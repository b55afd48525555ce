"""GPUs: plain JAX."""

from __future__ import annotations

from jaxllama.model.platforms.platform import Case, Platform


def describe(case: Case) -> Platform:
    """The defaults. That programs of different sizes agree in bits is not known of any GPU."""
    return Platform("gpu", case.reference())
