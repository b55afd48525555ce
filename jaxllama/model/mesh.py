"""The device mesh, and the one table from logical axes to mesh axes.

Tensor parallelism is `kv` × `rep`: KV heads are split over `kv`, query heads, ffn and vocabulary over both, so that it
may be wider than the number of KV heads. Rows are split over `data`, and for attention, with the pages of the cache,
over `rep` too (`attention/sharded.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllama.errors import ConfigError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.params import Params, build_params
from jaxllama.model.platforms.startup import prepare_jax

MESH_AXES = ("data", "kv", "rep")

RULES: Mapping[str, tuple[str, ...]] = {
    "rows": ("data",),
    "vocab": ("kv", "rep"),
    "heads": ("kv", "rep"),
    "kv_heads": ("kv",),
    "ffn": ("kv", "rep"),
    "embed": (),
    "pages": ("data", "rep"),
    "page": (),
    "head_dim": (),
    "embed_scale": (),
}
"""Which mesh axes split each logical axis. Query heads that they do not divide are split over the first alone, which
the number of KV heads divides; another axis whose number of units they do not divide is replicated."""


def make_mesh(
    config: LlamaConfig, *, tp: int | None = None, data: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data` × `tp` devices for `config`; `tp` None takes every device that `data` leaves.

    `tp` is split into `kv` = gcd(num_kv_heads, tp) and `rep` = tp / kv.

    Raises: ConfigError if there are fewer devices than data × tp.
    """
    if devices is None:
        prepare_jax()
        devices = jax.devices()
    devices = list(devices)
    if data < 1 or (tp is not None and tp < 1):
        raise ConfigError(f"data and tp must be at least 1, got data={data} and tp={tp}")
    tp = max(1, len(devices) // data) if tp is None else tp
    if data * tp > len(devices):
        raise ConfigError(f"a mesh of data={data} × tp={tp} needs {data * tp} devices, there are {len(devices)}")
    shape = mesh_shape(config, tp=tp, data=data)
    return Mesh(np.asarray(devices[: data * tp]).reshape(shape), MESH_AXES)


def mesh_shape(config: LlamaConfig, *, tp: int, data: int) -> tuple[int, int, int]:
    """The sizes of `MESH_AXES`."""
    kv = math.gcd(config.num_kv_heads, tp)
    return data, kv, tp // kv


def num_page_shards(mesh: Mesh) -> int:
    """Into how many parts the pages of the KV cache are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["pages"])


def splitting(axes: Sequence[str], mesh: Mesh) -> tuple[str, ...]:
    """Those of the mesh axes `axes` that have more than one device; equal shardings look equal without the others."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def partition_spec(
    axes: Sequence[str | None], config: LlamaConfig, mesh: Mesh, *, num_rows: int | None = None
) -> PartitionSpec:
    """The mesh axes that split an array whose dimensions have the logical names `axes` (None: not split).

    Raises: ConfigError for an unknown name, or if two dimensions would take the same mesh axis.
    """
    units = {
        "rows": num_rows or 0,
        "vocab": config.vocab_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "ffn": config.intermediate_size,
        "pages": num_page_shards(mesh),  # a pool has so many equal parts
    }
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name in axes:
        if name is not None and name not in RULES:
            raise ConfigError(f"unknown logical axis {name!r}; known: {', '.join(RULES)}")
        mesh_axes = splitting(RULES.get(name or "", ()), mesh)
        while mesh_axes and units[name or ""] % math.prod(mesh.shape[axis] for axis in mesh_axes):
            mesh_axes = mesh_axes[:-1] if name == "heads" else ()
        if not mesh_axes:
            entries.append(None)
            continue
        if taken & set(mesh_axes):
            raise ConfigError(
                f"axes {tuple(axes)}: two dimensions map to mesh axis {', '.join(taken & set(mesh_axes))}"
            )
        taken |= set(mesh_axes)
        entries.append(mesh_axes)
    return PartitionSpec(*entries)


def uneven_splits(config: LlamaConfig, mesh: Mesh) -> list[str]:
    """What of the model the devices do not divide, in words: such weights are on several devices each.

    KV heads are not told: `rep` is there for devices beyond their number.
    """
    tp = mesh.shape["kv"] * mesh.shape["rep"]
    units = {"heads": config.num_heads, "ffn": config.intermediate_size, "vocab": config.vocab_size}
    words = {"heads": "query heads", "ffn": "feed-forward columns", "vocab": "tokens"}
    found = []
    for name, count in units.items():
        (entry,) = partition_spec((name,), config, mesh)
        axes = (entry,) if isinstance(entry, str) else entry or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if parts != tp:
            found.append(f"{count:,} {words[name]} are split over {parts} of {tp} devices: {tp // parts} hold the same")
    return found


def param_shardings(config: LlamaConfig, mesh: Mesh, quantize: str | None = None) -> Params:
    """The sharding of every weight, in the shape of the `Params` tree."""
    return build_params(config, lambda spec: NamedSharding(mesh, partition_spec(spec.axes, config, mesh)), quantize)
