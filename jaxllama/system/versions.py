"""Which libraries there are."""

from __future__ import annotations

from importlib import metadata

_VERSIONED = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "tokenizers",
    "llguidance",
    "aiohttp",
    "pydantic",
)


def installed() -> dict[str, str]:
    """Versions of the libraries that decide how things run, by name; those that are there."""
    found = {name: version_of(name) for name in _VERSIONED}
    return {name: version for name, version in found.items() if version}


def version_of(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
