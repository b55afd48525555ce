"""Compiles the programs for an NVIDIA H100 without a GPU, and prints their memory.

python bench/gpu_aot.py CONFIG.json [--rows 16] [--context 8192] [--chunk 512] [--kernel]

Needs the packages jax-cuda12-plugin and jax-cuda12-pjrt of JAX's own version, best in an environment of its own (1.3 GB
with JAX), and for --kernel also nvidia-cuda-nvcc-cu12. The CUDA compiler gives memory and the program, but no times:
those take a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

# Before JAX's import: the plugin would look for a driver, and fail.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllama.decode.state import Chunk, Place, state_shapes, state_shardings
from jaxllama.decode.steps import decode_steps, prefill
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import make_mesh, num_page_shards, param_shardings
from jaxllama.model.params import build_params
from jaxllama.model.platforms import gpu
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.model.platforms.platform import Case, Platform

PAGE_SIZE = 16
TOKENS_PER_ROW = 2048  # EngineOptions' default
DTYPE = jnp.bfloat16
# The fields of XLA's GpuTargetConfigProto, with an H100 SXM's figures.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100_mesh(config: LlamaConfig, num_devices: int = 1) -> Mesh:
    """A mesh of described devices; there need be none."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology=f"1x1x{num_devices}"
    )
    return make_mesh(config, devices=topology.devices)


def platform_of(config: LlamaConfig, mesh: Mesh, *, with_kernel: bool) -> Platform:
    """What runs on GPUs, or would with the Pallas kernel."""
    if not with_kernel:
        return describe_platform(config, mesh, dtype=DTYPE)
    found = gpu.with_kernel(Case(config, mesh, "bfloat16", "bfloat16"))
    if found is None:
        raise SystemExit(f"the kernel does not take heads of {config.head_dim}")
    return found


def lower_decode(config: LlamaConfig, mesh: Mesh, platform: Platform, *, rows: int, context: int) -> Any:
    """`decode_steps` with every row in use."""
    state = _state(config, mesh, rows, context)
    scalar, keep = _whole(mesh, (), jnp.int32), _whole(mesh, (rows,), jnp.bool_)
    args = (config, _params(config, mesh), state, scalar, keep)
    return decode_steps.lower(*args, num_rows=rows, platform=platform)


def lower_prefill(config: LlamaConfig, mesh: Mesh, platform: Platform, *, rows: int, context: int, chunk: int) -> Any:
    """`prefill` of one chunk, beside the same cache."""
    pool = _state(config, mesh, rows, context).pool
    scalar = _whole(mesh, (), jnp.int32)
    tokens, pages = _whole(mesh, (chunk,), jnp.int32), _whole(mesh, (-(-context // PAGE_SIZE),), jnp.int32)
    args = (config, _params(config, mesh), pool, Place(pages, scalar), Chunk(tokens, scalar, scalar))
    return prefill.lower(*args, platform=platform)


def _params(config: LlamaConfig, mesh: Mesh) -> Any:
    shapes = build_params(config, lambda spec: jax.ShapeDtypeStruct(spec.shape, DTYPE))
    return _sharded(shapes, param_shardings(config, mesh))


def _state(config: LlamaConfig, mesh: Mesh, rows: int, context: int) -> Any:
    num_shards = num_page_shards(mesh)
    shapes = state_shapes(
        config,
        num_rows=rows,
        num_pages=rows // num_shards * TOKENS_PER_ROW // PAGE_SIZE + 1,
        page_size=PAGE_SIZE,
        max_context=context,
        dtype=DTYPE,
        num_shards=num_shards,
    )
    return _sharded(shapes, state_shardings(config, mesh, shapes))


def _sharded(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _whole(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def main() -> None:
    """Prints a table, memory in GiB a device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a model's config.json")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument(
        "--kernel", action="store_true", help="with the Pallas kernel for attention, which is no default"
    )
    args = parser.parse_args()
    config = LlamaConfig.from_hf(json.loads(args.config.read_text()))
    mesh = h100_mesh(config, args.devices)
    sizes = {"rows": args.rows, "context": args.context}
    platform = platform_of(config, mesh, with_kernel=args.kernel)
    print("| program | arguments | aliased | temporaries | shared memory of a block |\n| --- | --- | --- | --- | --- |")
    # Triton asks which GPU it lowers for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if args.kernel else contextlib.nullcontext():
        programs = {
            f"decode_steps, {args.rows} rows": lower_decode(config, mesh, platform, **sizes),
            f"prefill, {args.chunk} tokens": lower_prefill(config, mesh, platform, **sizes, chunk=args.chunk),
        }
    for name, lowered in programs.items():
        with tempfile.TemporaryDirectory(prefix="jaxllama-gpu-") as folder:
            program = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            shared = shared_kib(Path(folder))
        memory = program.memory_analysis()
        figures = (memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes)
        print(f"| {name} | " + " | ".join(f"{figure / 2**30:.3f}" for figure in figures) + f" | {shared} |", flush=True)


def shared_kib(folder: Path) -> str:
    """Of the attention kernel's blocks, of the program dumped there."""
    texts = [path.read_text() for path in folder.glob("*.thunk_sequence.txt")]
    found = {int(size) for text in texts for size in re.findall(r"paged_attention.*shared_memory: (\d+) bytes", text)}
    return ", ".join(f"{size / 1024:.0f} KiB" for size in sorted(found)) or "-"


if __name__ == "__main__":
    main()
