"""Attention over the paged KV cache: one interface, an implementation for each kind of device."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllama.model import native
from jaxllama.model.attention.cpu import CpuAttention
from jaxllama.model.attention.interface import Attention
from jaxllama.model.attention.reference import ReferenceAttention
from jaxllama.model.attention.sharded import ShardedAttention
from jaxllama.model.attention.tpu import TpuAttention
from jaxllama.model.attention.tpu_int8 import Int8TpuAttention
from jaxllama.model.config import LlamaConfig

__all__ = ["Attention", "ReferenceAttention", "ShardedAttention", "choose_attention"]


def choose_attention(config: LlamaConfig, mesh: Mesh, kv_dtype: Any, dtype: Any) -> ShardedAttention:
    """A kernel where it runs, else the reference; `dtype` is that of what enters a product.

    On TPUs there are kernels for a cache of bfloat16 or int8 and heads of 128, on one CPU for bfloat16 and heads of 64.
    """
    platform, kv_dtype = mesh.devices.flat[0].platform, jnp.dtype(kv_dtype).name
    kernel = {"bfloat16": TpuAttention, "int8": Int8TpuAttention}.get(kv_dtype)
    if platform == "tpu" and kernel is not None and config.head_dim % 128 == 0:
        return ShardedAttention(kernel(config.num_layers), mesh)
    if mesh.size > 1:
        return ShardedAttention(ReferenceAttention(), mesh)
    is_bfloat16 = kv_dtype == jnp.dtype(dtype).name == "bfloat16"
    if platform == "cpu" and is_bfloat16 and config.head_dim % 64 == 0 and native.is_available():
        return ShardedAttention(CpuAttention())
    return ShardedAttention(ReferenceAttention())
