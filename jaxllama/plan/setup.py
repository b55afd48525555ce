"""What is planned: a model on a mesh of a slice, with a number of rows and a context. Shapes, but no compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxllama.decode.state import DecodeState, laid_out, state_shardings
from jaxllama.engine.sizes import EngineSizes, size_engine
from jaxllama.errors import PlanError
from jaxllama.model import cache
from jaxllama.model.cache import HeadLayout
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import MESH_AXES, mesh_shape, num_page_shards, partition_spec
from jaxllama.model.params import Params, ParamSpec, build_params, param_specs, stored_specs
from jaxllama.model.platforms import tpu
from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.model.platforms.platform import Platform
from jaxllama.plan.topology import Topology
from jaxllama.weights.forms import fit

DTYPES = ("bf16", "int8")


@dataclass(frozen=True)
class Setup:
    """One thing to plan: `rows` sequences of `context` tokens each, at full length, on `data` × tp devices.

    A prompt of `prompt_tokens` is prefilled in chunks of `chunk_tokens`. A step that verifies has `num_drafts` of each
    row; 0: there is none.

    Raises: PlanError naming what contradicts what.
    """

    config: LlamaConfig
    topology: Topology
    rows: int
    context: int
    data: int = 1
    weights: str = "bf16"
    kv: str = "bf16"
    page_size: int = tpu.PAGE_SIZE
    chunk_tokens: int = max(tpu.CHUNK_SIZES)
    prompt_tokens: int = 1024
    num_drafts: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "context", "data", "page_size", "chunk_tokens", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weights", "kv"):
            if getattr(self, name) not in DTYPES:
                raise PlanError(f"{name} must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")
        if self.topology.num_devices % self.data:
            raise PlanError(f"data={self.data} does not divide the {self.topology.num_devices} devices of {self.where}")
        if self.chunk_tokens % self.page_size:
            raise PlanError(f"chunk_tokens ({self.chunk_tokens}) must be a multiple of page_size ({self.page_size})")
        object.__setattr__(self, "config", self.config.for_context(self.context))
        if self.context > self.config.max_position_embeddings:
            raise PlanError(
                f"context is {self.context}, the model's own limit is {self.config.max_position_embeddings} tokens"
            )
        if self.prompt_tokens > self.context:
            raise PlanError(f"prompt_tokens ({self.prompt_tokens}) is more than the context ({self.context})")

    @property
    def where(self) -> str:
        return self.topology.name

    @property
    def tp(self) -> int:
        return self.topology.num_devices // self.data

    @property
    def quantize(self) -> str | None:
        """As `jaxllama.load` takes it."""
        return None if self.weights == "bf16" else self.weights

    @property
    def kv_dtype(self) -> Any:
        """Of the cache's pages."""
        return jnp.dtype(jnp.bfloat16 if self.kv == "bf16" else self.kv)

    @property
    def head_layout(self) -> HeadLayout | None:
        """As `Platform.head_layout`."""
        return tpu.head_layout(self.config, self.kv_dtype.name, int(self.mesh.shape["kv"]))

    @property
    def chunks_in_group(self) -> int:
        """How many chunks of `chunk_tokens` each group of `data` has in a call of prefill."""
        shared = tpu.shared_tokens(self.topology.generation, self.tp)
        platform = replace(PLAIN, shared_tokens=shared)
        return platform.chunks_in_group(self.chunk_tokens, 2.0 if self.weights == "bf16" else 1.0)

    @property
    def num_rows(self) -> int:
        """`rows`, and those that the engine adds so that every shard of the cache has equally many."""
        return self._sizes.num_rows

    @property
    def rows_per_shard(self) -> int:
        """How many a device attends for."""
        return self._sizes.rows_per_shard

    @property
    def rows_per_replica(self) -> int:
        """How many a device multiplies its weights with."""
        return self.num_rows // self.data

    @cached_property
    def _sizes(self) -> EngineSizes:
        return size_engine(
            max_rows=self.rows,
            max_context=self.context,
            page_size=self.page_size,
            chunk_sizes=(self.chunk_tokens,),
            num_shards=num_page_shards(as_mesh(self)),
            tokens_per_row=self.context,
            speculation="lookup" if self.num_drafts else "off",
            max_drafts=self.num_drafts,
        )

    @cached_property
    def mesh(self) -> AbstractMesh:
        """The mesh's shape, without devices."""
        return AbstractMesh(mesh_shape(self.config, tp=self.tp, data=self.data), MESH_AXES)

    def state_shapes(self) -> DecodeState:
        """The arrays of the decode state as the engine would make them."""
        return self._sizes.state_shapes(self.config, self.kv_dtype, self.head_layout)

    def inputs(self, mesh: Mesh, platform: Platform) -> tuple[Params, DecodeState]:
        """Shapes, dtypes and shardings of the real programs' weights and state, for ahead-of-time compilation."""

        def leaf(part: ParamSpec) -> Any:
            sharding = NamedSharding(mesh, partition_spec(part.axes, self.config, mesh))
            return jax.ShapeDtypeStruct(part.shape, jnp.dtype(part.dtype or jnp.bfloat16), sharding=sharding)

        shapes = self.state_shapes()
        state: DecodeState = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            laid_out(state_shardings(self.config, mesh, shapes)),
        )
        return fit(build_params(self.config, leaf, self.quantize), platform), state


@dataclass(frozen=True)
class ResidentBytes:
    """What stays in the HBM of one device: weights, the KV pool, and the other arrays of the decode state."""

    weights: int
    kv: int
    state: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.state


def resident_bytes(setup: Setup) -> ResidentBytes:
    """Exact for the library's arrays and shardings, without the padding of their tiles."""
    shapes = setup.state_shapes()
    shardings = state_shardings(setup.config, as_mesh(setup), shapes)
    pool = sum(map(_shard_bytes, jax.tree.leaves(shapes.pool), jax.tree.leaves(shardings.pool)))
    everything = sum(map(_shard_bytes, jax.tree.leaves(shapes), jax.tree.leaves(shardings)))
    return ResidentBytes(weight_bytes(setup), pool, everything - pool)


PARTS = ("embed_tokens", "layers", "norm", "lm_head")


def weight_bytes(setup: Setup, parts: tuple[str, ...] = PARTS) -> int:
    """Bytes that one device holds of these parts of the `Params` tree."""
    return _weight_bytes(setup.config, setup.mesh, setup.quantize, parts)


@lru_cache
def _weight_bytes(config: LlamaConfig, mesh: Any, quantize: str | None, parts: tuple[str, ...]) -> int:
    total = 0
    for spec in param_specs(config):
        if spec.path[0] in parts:
            for part in stored_specs(spec, quantize):
                shard = NamedSharding(mesh, partition_spec(part.axes, config, mesh)).shard_shape(part.shape)
                total += math.prod(shard) * jnp.dtype(part.dtype or jnp.bfloat16).itemsize
    return total


def kv_bytes_per_token(setup: Setup, *, as_kept: bool = False) -> float:
    """Bytes of one token's keys and values, all layers, on one device that holds them.

    `as_kept`: with the zeros beside heads that do not fill their place (`HeadLayout`).
    """
    layout = setup.head_layout if as_kept else None
    return cache.kv_bytes_per_token(setup.config, setup.kv_dtype, layout) / int(setup.mesh.shape["kv"])


def as_mesh(setup: Setup) -> Any:
    """The setup's mesh where a real one is asked for."""
    # Sharding rules only read a mesh's shape, which an abstract one has.
    return setup.mesh


def _shard_bytes(shape: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(shape.shape)) * int(shape.dtype.itemsize)
