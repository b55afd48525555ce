"""Writes tests/golden/tpu_v6e.hlo, a small program as the TPU compiler schedules it. Needs libtpu, not a TPU.

A Megatron-split MLP of 64 rows on four chips, run three times a step, whose result goes into a pool in place; and a
transposed table, which is a copy.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def program(x, up, down, pool, table, steps):
    def step(index, carry):
        x, pool = carry
        x = jax.lax.fori_loop(0, 3, lambda _, x: x + jnp.einsum("bf,ef->be", jnp.einsum("be,fe->bf", x, up), down), x)
        return x, pool.at[index].set(x)

    x, pool = jax.lax.fori_loop(0, steps, step, (x, pool))
    return x, pool, table.T + 0


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices
    mesh = Mesh(np.array(devices), ("tp",))

    def array(shape, *axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    lowered = jax.jit(program, donate_argnums=(0, 3)).lower(
        array((64, 2048)),
        array((8192, 2048), "tp"),
        array((2048, 8192), None, "tp"),
        array((16, 64, 2048)),
        array((2048, 4096)),
        array((), dtype=jnp.int32),
    )
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (text,) = Path(folder).glob("*after_codegen.txt")
        Path(sys.argv[1]).write_text(text.read_text())


if __name__ == "__main__":
    main()
