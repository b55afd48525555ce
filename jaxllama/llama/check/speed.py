"""What the devices reach: their memory, their matrix units, and the links between them. Medians, after a warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllama.llama.check.result import Result, Status, judged
from jaxllama.model import native
from jaxllama.model.mesh import MESH_AXES
from jaxllama.model.platforms.chips import public_peaks

SHARES = {"bytes_per_s": 0.6, "flops_per_s": 0.45}
"""Of the public figures, what a healthy device reaches at least. Of arithmetic an H200 was seen to reach 0.8 of its
figure; a card that may draw half of that one's power, such as an H100 with PCIe, lowers its clock under such a load."""

_CALL_S = 0.1
_REPEATS = 5
_MAX_ROUNDS = 4096
_ALL = PartitionSpec(MESH_AXES)


def check_speed(mesh: Mesh, reached: dict[str, float]) -> Iterator[Result]:
    """Bandwidth and arithmetic of each device, all at once. `reached` gets "bytes_per_s" and "flops_per_s"."""
    device = mesh.devices.flat[0]
    peak = public_peaks(device.device_kind)
    is_host = device.platform == "cpu"
    reached["bytes_per_s"] = memory_rate(mesh, (2**26 if is_host else _memory_bytes(device)) // 4)
    size = 1024 if is_host else 8192
    uses_own = is_host and native.is_available()
    reached["flops_per_s"] = own_product_rate(mesh, size) if uses_own else product_rate(mesh, size)
    for name, what, unit in (("bytes_per_s", "memory", 1e9), ("flops_per_s", "products, bfloat16", 1e12)):
        public = None if peak is None else getattr(peak, "hbm_bytes_per_s" if name == "bytes_per_s" else name)
        found = f"{reached[name] / unit:,.4g} {'GB/s' if unit == 1e9 else 'TFLOP/s'}"
        status: Status = "note"
        expected = "no public figure known"
        if public is not None:
            status = judged(reached[name] >= SHARES[name] * public)
            found += f", {reached[name] / public:.0%}"
            expected = f"at least {SHARES[name]:.0%} of {public / unit:,.0f}"
        yield Result("speed", f"{what}, a device", status, found, expected, {name: reached[name], "public": public})


def memory_rate(mesh: Mesh, num_values: int) -> float:
    """Bytes a second that each device reads and writes, of an array of so many float32 a device."""

    def run(x: Float[Array, "devices values"], rounds: Int[Array, ""]) -> Float[Array, "devices values"]:
        # Every round reads and writes all of it: XLA does not look into a loop's next round.
        return jax.lax.fori_loop(0, rounds, lambda _, x: x * 0.999 + 0.001, x)

    make = jax.jit(lambda: jnp.ones((mesh.size, num_values)), out_shardings=NamedSharding(mesh, _ALL))
    seconds = a_round(jax.jit(run, donate_argnums=0), make())
    return 2 * 4 * num_values / seconds


def product_rate(mesh: Mesh, size: int) -> float:
    """Operations a second of each device, in products of `size` × `size` matrices."""
    here = NamedSharding(mesh, _ALL)

    def run(
        x: Float[Array, "devices size size"], rounds: Int[Array, ""], weight: Float[Array, "devices size size"]
    ) -> Float[Array, "devices size size"]:
        def once(_: Any, x: Float[Array, "devices size size"]) -> Float[Array, "devices size size"]:
            return jnp.einsum("dij,djk->dik", x, weight, preferred_element_type=jnp.bfloat16)

        return jax.lax.fori_loop(0, rounds, once, x)

    def make(value: float) -> Float[Array, "devices size size"]:
        filled: Array = jax.jit(lambda: jnp.full((mesh.size, size, size), value, jnp.bfloat16), out_shardings=here)()
        return filled

    weight = make(1 / size)
    seconds = a_round(jax.jit(run, donate_argnums=0), make(1.0), weight)
    return 2 * size**3 / seconds


def own_product_rate(mesh: Mesh, size: int) -> float:
    """The same by a CPU's own kernels, with which models run there."""

    def run(
        x: Float[Array, "rows size"], rounds: Int[Array, ""], weight: native.PackedWeight
    ) -> Float[Array, "rows size"]:
        return jax.lax.fori_loop(0, rounds, lambda _, x: native.multiply(x, weight)[0].astype(x.dtype), x)

    everywhere = NamedSharding(mesh, PartitionSpec())
    weight = native.pack(jax.device_put(jnp.full((size, size), 1 / size, jnp.bfloat16), everywhere))
    x = jnp.ones((mesh.shape["data"] * size, size), jnp.bfloat16)  # a group multiplies its own rows
    seconds = a_round(
        jax.jit(run, donate_argnums=0), jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), weight
    )
    return 2 * size**3 / seconds


def check_links(mesh: Mesh) -> Iterator[Result]:
    """All-reduce and all-gather over all devices: a small message's time, and the rate of a large one."""
    if mesh.size == 1:
        yield Result("collectives", "one device", "note", "nothing to send")
        return
    is_host = mesh.devices.flat[0].platform == "cpu"
    large = 2**18 if is_host else 2**23
    shares = {"all-reduce": 2 * (mesh.size - 1) / mesh.size, "all-gather": mesh.size - 1}
    for name, share in shares.items():
        latency = _collective_s(mesh, name, 256)
        num_bytes = 4 * large
        rate = share * num_bytes / _collective_s(mesh, name, large)
        found = f"{latency * 1e6:,.1f} µs for 1 KiB; {rate / 1e9:,.2f} GB/s a device for {num_bytes / 2**20:.0f} MiB"
        figures = {"latency_s": latency, "bytes_per_s": rate}
        yield Result("collectives", f"{name} over {mesh.size}", "note", found, "", figures)


def _collective_s(mesh: Mesh, name: str, num_values: int) -> float:
    def once(_: Any, x: Float[Array, " values"]) -> Float[Array, " values"]:
        if name == "all-reduce":
            return jax.lax.psum(x, MESH_AXES) * (1 / mesh.size)
        gathered = jax.lax.all_gather(x, MESH_AXES, axis=0, tiled=True)
        # What comes back depends on all of it, so that nothing may be left out.
        return x * 0.5 + gathered.reshape(mesh.size, -1).mean(0, keepdims=True).reshape(x.shape) * 0.5

    def run(x: Float[Array, " values"], rounds: Int[Array, ""]) -> Float[Array, " values"]:
        return jax.lax.fori_loop(0, rounds, once, x)

    body = jax.shard_map(run, mesh=mesh, in_specs=(_ALL, PartitionSpec()), out_specs=_ALL, check_vma=False)
    make = jax.jit(lambda: jnp.ones(mesh.size * num_values), out_shardings=NamedSharding(mesh, _ALL))
    return a_round(jax.jit(body, donate_argnums=0), make())


def a_round[T](run: Callable[..., T], x: T, *rest: Any) -> float:
    """Seconds a round of `run(x, rounds, …)`: the difference of many rounds and one, so that launches do not count.

    Processes that share `x` come to one number of rounds, and have to: each waits for the others in every round.
    """
    time_of = partial(_timed, run, rest)
    x, _ = time_of(x, 1)  # compiles
    rounds, seconds = 1, 0.0
    while seconds < _CALL_S and rounds < _MAX_ROUNDS:
        rounds *= 4
        x, seconds = time_of(x, rounds)
        seconds = _of_all_processes(x, seconds)
    times = []
    for _ in range(_REPEATS):
        x, short = time_of(x, 1)
        x, long = time_of(x, 1 + rounds)
        times.append((long - short) / rounds)
    return max(median(times), 1e-9)


def _of_all_processes(x: Any, seconds: float) -> float:
    """The longest of those that share `x`."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(x)):
        return seconds
    from jax.experimental import multihost_utils

    return float(np.max(multihost_utils.process_allgather(np.float32(seconds))))


def _timed[T](run: Callable[..., T], rest: tuple[Any, ...], x: T, rounds: int) -> tuple[T, float]:
    started = time.perf_counter()
    x = jax.block_until_ready(run(x, np.int32(rounds), *rest))
    return x, time.perf_counter() - started


def _memory_bytes(device: jax.Device) -> int:
    """An eighth of what is free, at most a gigabyte."""
    return min(2**30, (free_bytes(device) or 2**31) // 8)


def free_bytes(device: jax.Device) -> int | None:
    """Of a device's memory, None where it does not tell."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return None if not stats or "bytes_limit" not in stats else stats["bytes_limit"] - stats.get("bytes_in_use", 0)
