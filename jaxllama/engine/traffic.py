"""How near a running engine comes to what its devices' memory allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxllama.engine.options import StepReport
from jaxllama.model.cache import kv_bytes_per_token
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import num_page_shards
from jaxllama.model.params import Params
from jaxllama.model.platforms.chips import DEVICE_KINDS, GENERATIONS


@dataclass(frozen=True)
class MemoryTraffic:
    """What one device must read from its memory: `weight_bytes` a step, `kv_bytes_per_token` for each cached token.

    `bytes_per_s` is the device's peak; None if its kind is not known.
    """

    weight_bytes: int
    kv_bytes_per_token: float
    bytes_per_s: float | None

    def read_bytes(self, report: StepReport) -> float:
        """The bytes of one dispatch."""
        return report.num_steps * (self.weight_bytes + report.kv_tokens * self.kv_bytes_per_token)


def memory_traffic(config: LlamaConfig, params: Params, mesh: Mesh, kv_dtype: Any) -> MemoryTraffic:
    """The least traffic: the rows' keys and values, and each weight once a step (of an untied embedding a few rows)."""
    read = {name: part for name, part in params.items() if name != "embed_tokens" or config.tie_word_embeddings}
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(read)
    )
    kv_bytes = kv_bytes_per_token(config, kv_dtype) / mesh.shape["kv"] / num_page_shards(mesh)
    generation = GENERATIONS.get(DEVICE_KINDS.get(mesh.devices.flat[0].device_kind, ""))
    return MemoryTraffic(weights, kv_bytes, generation.hbm_bytes_per_s if generation is not None else None)
