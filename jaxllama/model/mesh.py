"""The device mesh, and the one table from logical axes to mesh axes.

Tensor parallelism is `kv` × `rep`: KV heads are split over `kv`, query heads, ffn and vocabulary over both, so that it
may be wider than the number of KV heads. Rows are split over `data`, and for attention, with the pages of the cache,
over `rep` too (`attention/sharded.py`).

And functions that give back what they were given where it lay (`InPlace`).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

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


class InPlace[T]:
    """A jitted function that is given one argument for good, and gives its successor back where that argument lay.

    Left to itself JAX may say otherwise where a result lies than where the argument did, though it is the same place (a
    mesh of one device and that device): then whatever takes the result is traced and compiled once more.
    """

    def __init__(
        self,
        function: Callable[..., T],
        given: str,
        *,
        result: Callable[[Any], Any] = lambda given: given,
        static_argnames: tuple[str, ...] = (),
        compiler_options: dict[str, str | bool | int] | None = None,
    ) -> None:
        """`given` is the argument's name. `result` makes of its shardings those of the whole result, with None for what
        may lie anywhere."""
        functools.update_wrapper(self, function)
        self._function = function
        self._given, self._index = given, [*inspect.signature(function).parameters].index(given)
        self._result = result
        self._options: dict[str, Any] = {"static_argnames": static_argnames, "compiler_options": compiler_options}
        self._jit = functools.cache(self._jit_for)

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        """Runs it."""
        result: T = self._jitted(args, kwargs)(*args, **kwargs)
        return result

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As of a jitted function: arrays or their shapes to what can be compiled."""
        lowered: jax.stages.Lowered = self._jitted(args, kwargs).lower(*args, **kwargs)
        return lowered

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As of a jitted function."""
        traced: jax.stages.Traced = self._jitted(args, kwargs).trace(*args, **kwargs)
        return traced

    def _jitted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, tree = jax.tree.flatten(kwargs[self._given] if self._given in kwargs else args[self._index])
        return self._jit(tree, *map(_place_of, leaves))

    def _jit_for(self, tree: Any, *places: Sharding | None) -> Any:
        shardings = self._result(jax.tree.unflatten(tree, places))
        return jax.jit(self._function, donate_argnames=self._given, out_shardings=shardings, **self._options)


def in_place[T](
    given: str, *, static_argnames: tuple[str, ...] = (), result: Callable[[Any], Any] = lambda given: given
) -> Callable[[Callable[..., T]], InPlace[T]]:
    """Decorates a function whose whole result is the successor of its argument `given`; `result` as for `InPlace`."""
    return lambda function: InPlace(function, given, static_argnames=static_argnames, result=result)


def _place_of(leaf: Any) -> Sharding | None:
    """Where an array lies, or would; None while it is traced, and where JAX may move it."""
    if isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "committed", True):
        return None
    return getattr(leaf, "sharding", None)
