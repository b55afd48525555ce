"""CPUs: our own kernels; plain JAX where there are none."""

from __future__ import annotations

from jaxllama.model import native
from jaxllama.model.attention import ReferenceAttention, ShardedAttention
from jaxllama.model.attention.cpu import CpuAttention
from jaxllama.model.config import LlamaConfig
from jaxllama.model.platforms.platform import Case, Platform

COMPILER_OPTIONS = (("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"),)
"""Keeps a row's bits independent of the number of rows. XLA gives large reductions to a library that sums in another
order than its own loops, which it uses for small ones; the library's products do not depend on the number of rows."""


def describe(case: Case) -> Platform:
    """Kernels for all dtypes and heads, where the CPU has the instructions: of products and attention on each device of
    a mesh, of whole layers on one."""
    has_kernels, is_alone = native.is_available(), case.mesh.size == 1
    kernel = CpuAttention(num_callers=len(case.mesh.local_devices))
    attention = ShardedAttention(kernel, None if is_alone else case.mesh) if has_kernels else case.reference()
    return Platform(
        "cpu",
        attention,
        has_layer_kernel=has_kernels and is_alone and _is_plain(case.config),
        compiler_options=COMPILER_OPTIONS,
        packs_weights=has_kernels,
        has_row_buckets=attention.num_shards == 1,
        min_rows=1 if has_kernels else 2,
        # Our kernels take every sum in one order. Through XLA it is so in bfloat16, on one device or more, as measured
        # (bench/LOG.md; a test repeats it); in float32 it is not, and with `data` above 1 nobody has looked.
        max_drafts=7,
        max_verified_tokens=32,
        programs_agree=has_kernels or (case.dtype == "bfloat16" and case.mesh.shape["data"] == 1),
    )


def _is_plain(config: LlamaConfig) -> bool:
    """Whether layers are a Llama's without biases, which have a kernel of their own; others are made of pieces."""
    has_bias = config.attention_bias or config.o_proj_bias or config.mlp_bias
    is_scaled = config.residual_multiplier != 1 or config.attention_multiplier is not None
    return not (has_bias or is_scaled or config.norms_outputs or config.qk_norm is not None)


PLAIN = Platform("cpu", ShardedAttention(ReferenceAttention()), compiler_options=COMPILER_OPTIONS)
"""Plain JAX on one device."""
