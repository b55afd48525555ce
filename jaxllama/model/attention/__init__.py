"""Attention over the paged KV cache: one interface, an implementation for each kind of device.

`jaxllama.model.platforms` says which of them runs where.
"""

from __future__ import annotations

from jaxllama.model.attention.interface import Attention
from jaxllama.model.attention.reference import ReferenceAttention
from jaxllama.model.attention.sharded import ShardedAttention

__all__ = ["Attention", "ReferenceAttention", "ShardedAttention"]
