"""CPUs: our own kernels on one of them, for bfloat16; plain JAX otherwise."""

from __future__ import annotations

from jaxllama.model import native
from jaxllama.model.attention import ReferenceAttention, ShardedAttention
from jaxllama.model.attention.cpu import CpuAttention
from jaxllama.model.platforms.platform import Case, Platform

COMPILER_OPTIONS = (("xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"),)
"""Keeps a row's bits independent of the number of rows. XLA gives large reductions to a library that sums in another
order than its own loops, which it uses for small ones; the library's products do not depend on the number of rows."""


def describe(case: Case) -> Platform:
    """A cache in bfloat16 and heads of a multiple of 64 have a kernel, on one CPU that has the instructions."""
    has_kernels = case.mesh.size == 1 and case.dtype == "bfloat16" and native.is_available()
    attends = has_kernels and case.kv_dtype == "bfloat16" and case.config.head_dim % 64 == 0
    attention = ShardedAttention(CpuAttention()) if attends else case.reference()
    return Platform(
        "cpu",
        attention,
        compiler_options=COMPILER_OPTIONS,
        packs_weights=has_kernels,
        has_row_buckets=attention.num_shards == 1,
        # Measured, by our kernels and through XLA, on one device or more (bench/LOG.md; a test repeats it). In float32
        # sums are taken in another order, and with `data` above 1 nobody has looked.
        programs_agree=case.dtype == "bfloat16" and case.mesh.shape["data"] == 1,
    )


PLAIN = Platform("cpu", ShardedAttention(ReferenceAttention()), compiler_options=COMPILER_OPTIONS)
"""Plain JAX on one device."""
