"""GPUs: plain JAX. There is a kernel, which nobody has seen run on a GPU: it is for those who check it first."""

from __future__ import annotations

from jaxllama.model.attention import ShardedAttention
from jaxllama.model.platforms.platform import Case, Platform


def describe(case: Case) -> Platform:
    """The defaults. That programs of different sizes agree in bits is not known of any GPU."""
    return Platform("gpu", case.reference())


def with_kernel(case: Case) -> Platform | None:
    """The same with the Pallas kernel; None where it does not take the model or the cache."""
    from jaxllama.model.attention.gpu import HEAD_DIMS, GpuAttention  # Pallas alone takes half a second.

    takes_it = case.dtype == "bfloat16" and case.kv_dtype in ("bfloat16", "int8")
    if not takes_it or case.config.windows or case.config.head_dim not in HEAD_DIMS:
        return None
    return Platform("gpu", ShardedAttention(GpuAttention(), case.mesh if case.mesh.size > 1 else None))
