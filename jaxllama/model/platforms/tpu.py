"""TPUs: Pallas kernels for a cache in bfloat16 or int8 and heads of up to 256; else plain JAX."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from jaxllama.model.attention import ShardedAttention
from jaxllama.model.attention.tpu import TpuAttention
from jaxllama.model.attention.tpu_int8 import Int8TpuAttention
from jaxllama.model.cache import HeadLayout
from jaxllama.model.config import LlamaConfig
from jaxllama.model.platforms.chips import DEVICE_KINDS, Generation, Peaks, public_peaks
from jaxllama.model.platforms.platform import Case, CompilerOptions, Platform

_KERNELS = {"bfloat16": TpuAttention, "int8": Int8TpuAttention}
_MAX_HEAD_DIM = 256

PAGE_SIZE = 128
CHUNK_SIZES = (128, 512, 2048)
MAX_PART_BYTES = 32 * 2**20
"""Of a matrix that the compiler prefetches whole into VMEM, 128 MiB on most TPUs (`weights/parts.py`)."""

_WHOLE_AND_IN_ORDER: CompilerOptions = (
    # A copy from HBM in one piece, started in the order in which it is needed.
    ("xla_tpu_sliced_prefetch_max_slices", 1),
    ("xla_tpu_enforce_prefetch_fifo_order", True),
)
_EARLY: CompilerOptions = (
    *_WHOLE_AND_IN_ORDER,
    # Started up to 30 times as early as it takes (8): its buffer is busy for longer, but more matrices come whole.
    ("xla_gf_vmem_max_overlap_to_mem_size_async_copy_ratio", 30),
    # What an operation gains from VMEM, by its code instead of its bytes.
    ("xla_msa_use_bundle_aware_cost_model", "ENABLED"),
)
_STEP_OPTIONS: dict[tuple[str, str | None], CompilerOptions] = {
    ("v6e", None): _EARLY,
    ("v6e", "int8"): _EARLY,
    ("v5e", None): _EARLY,
    ("v5e", "int8"): _WHOLE_AND_IN_ORDER,
}
"""Of libtpu 0.0.50, by generation and `Case.quantize`: which matrices are prefetched. A step of the 70B takes 16.4 ms
without on v6e-8, by the compiler's schedule; a chunk of 80 layers waits longer with them. On a v5e with int8 products
take as long as reading, and coming early costs 2 % (bench/LOG.md)."""

_LAYERS_PER_LOOP: dict[tuple[str, str | None], int] = {("v5e", None): 10}
"""As `_STEP_OPTIONS`, where it is not 20: with their options 10 take 4.21 ms where 20 in one piece take 4.41."""


def describe(case: Case) -> Platform:
    """What the compiled 70B was measured to want (bench/LOG.md)."""
    layout = head_layout(case.config, case.kv_dtype, case.mesh.shape["kv"])
    kind = case.mesh.devices.flat[0].device_kind
    peaks = public_peaks(kind)
    shared = 0 if peaks is None else shared_tokens(peaks, tp=case.mesh.shape["kv"] * case.mesh.shape["rep"])
    if layout is None:
        return Platform("tpu", case.reference(), max_part_bytes=MAX_PART_BYTES, shared_tokens=shared)
    splits_rows = case.mesh.shape["rep"] > 1
    kernel = _KERNELS[case.kv_dtype](case.config.num_layers, layout=layout, keeps_pairs=splits_rows)
    return replace(
        with_kernel(kernel, case.mesh),
        shared_tokens=shared,
        step_options=step_options(case.mesh, case.quantize),
        layers_per_loop=_LAYERS_PER_LOOP.get((DEVICE_KINDS.get(kind, ""), case.quantize), 20),
    )


def step_options(mesh: Mesh, quantize: str | None = None) -> CompilerOptions:
    """What decode steps for `mesh` and such weights are compiled with; nothing where its compiler lacks one of them."""
    # Of several hosts each asks for a device of its own.
    devices = [*mesh.devices.flat]
    device = next((device for device in devices if device.process_index == jax.process_index()), devices[0])
    options = _STEP_OPTIONS.get((DEVICE_KINDS.get(device.device_kind, ""), quantize), ())
    return options if are_known(options, device) else ()


@functools.cache
def are_known(options: CompilerOptions, device: jax.Device) -> bool:
    """Whether `device`'s compiler takes `options`: another libtpu may have other names."""
    if not options:
        return True
    number: Any = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x).lower(number).compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return False
    return True


def shared_tokens(chip: Peaks | Generation, tp: int) -> int:
    """With so many tokens products take as long as reading bfloat16 weights does. Messages between chips grow with the
    tokens, and take about as long as the rest: there it is half."""
    balance = chip.flops_per_s / chip.hbm_bytes_per_s
    return int(balance if tp == 1 else balance / 2)


def head_layout(config: LlamaConfig, kv_dtype: str, num_shards: int) -> HeadLayout | None:
    """How pages hold the KV heads that each of `num_shards` has; None where no kernel takes them."""
    if kv_dtype not in _KERNELS:
        return None
    layout = HeadLayout.in_lanes(config, num_shards)
    return layout if layout.width <= _MAX_HEAD_DIM else None


def with_kernel(kernel: TpuAttention, mesh: Mesh) -> Platform:
    """A TPU whose attention is `kernel`."""
    return Platform(
        "tpu",
        ShardedAttention(kernel, mesh),
        keeps_float32=False,
        splits_tokens=True,
        layers_per_loop=20,
        head_layout=kernel.layout,
        max_part_bytes=MAX_PART_BYTES,
        page_size=PAGE_SIZE,
        chunk_sizes=CHUNK_SIZES,
        # The int8 kernel never uses what lies past a row's end; the other multiplies it with 0.
        needs_clean_pages=not isinstance(kernel, Int8TpuAttention),
    )
