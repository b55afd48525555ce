"""Attention over the paged KV cache: one interface, an implementation for each kind of device."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllama.attention.interface import Attention
from jaxllama.attention.reference import ReferenceAttention
from jaxllama.attention.sharded import ShardedAttention
from jaxllama.attention.tpu import TpuAttention
from jaxllama.attention.tpu_int8 import Int8TpuAttention
from jaxllama.config import LlamaConfig

__all__ = ["Attention", "ReferenceAttention", "ShardedAttention", "choose_attention"]


def choose_attention(config: LlamaConfig, mesh: Mesh, kv_dtype: Any) -> ShardedAttention:
    """The TPU kernels where they run (a TPU mesh, a cache of bfloat16 or int8, heads of 128), else the reference."""
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    kernel = {"bfloat16": TpuAttention, "int8": Int8TpuAttention}.get(jnp.dtype(kv_dtype).name)
    if is_tpu and kernel is not None and config.head_dim % 128 == 0:
        return ShardedAttention(kernel(config.num_layers), mesh)
    return ShardedAttention(ReferenceAttention(), mesh if mesh.size > 1 else None)
