"""Attention over the paged KV cache: one function, an implementation for each kind of device."""

from jaxllama.attention.reference import paged_attention

__all__ = ["paged_attention"]
