"""Several processes as one: whether every host computes the same bits, and what messages between all devices bring.

Each process looks at its own devices first. Then process 0 gathers what they found, and all run the same programs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxllama.hosts.group import Group
from jaxllama.llama.check.kernels import logits_of
from jaxllama.llama.check.result import Result, collected, judged
from jaxllama.llama.check.speed import check_links
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import MESH_AXES, make_mesh

_NUM_VALUES = 4096


def lead(group: Group, own: list[Result], config: LlamaConfig, say: Callable[[str], None]) -> list[Result]:
    """Process 0's part: `own`, what does not hold in the others, and what all do together.

    Raises: LockstepError when a process is gone.
    """
    results = list(own)
    for process_id, answer in enumerate(group.ask("alone"), start=1):
        found = [Result(**result) for result in json.loads(answer)]
        failed = [result for result in found if result.status == "fails"]
        count = f"{sum(result.status == 'holds' for result in found)} hold, {len(failed)} do not"
        results.append(Result("hosts", f"process {process_id}, its own devices", judged(not failed), count))
        results += [dataclasses.replace(result, what=f"process {process_id}: {result.what}") for result in failed]
    group.publish(b"together")
    results += collected((("hosts", lambda: _together(group, config)),), say)
    group.close()
    return results


def follow(group: Group, own: list[Result], config: LlamaConfig) -> None:
    """The other processes' part. Returns when process 0 ends."""
    alone = json.dumps([dataclasses.asdict(result) for result in own]).encode()
    group.answer_with("alone", lambda _: alone)
    for _ in group.messages():
        mesh = _all_devices()
        answer = json.dumps({"model": _model_bits(config), "messages": _message_bits(mesh)}).encode()
        list(check_links(mesh))
        group.answer_with("together", lambda _, answer=answer: answer)  # type: ignore[misc]
    group.close()


def _together(group: Group, config: LlamaConfig) -> Iterator[Result]:
    mesh = _all_devices()
    mine = {"model": _model_bits(config), "messages": _message_bits(mesh)}
    links = list(check_links(mesh))
    others = [json.loads(answer) for answer in group.ask("together")]
    for name, what in (
        ("model", "logits of two layers, one device of each process"),
        ("messages", f"an all-gather and an all-reduce over {mesh.size} devices of all processes"),
    ):
        other = [str(process_id) for process_id, found in enumerate(others, start=1) if found[name] != mine[name]]
        is_right = "wrong" not in mine[name]
        found = "the same bits" if not other else f"OTHER BITS in process {', '.join(other)}"
        found += "" if is_right else f", and {mine[name]} in process 0"
        yield Result(
            "hosts", what, judged(is_right and not other), found, f"the same bits in {1 + len(others)} processes"
        )
    for link in links:
        yield dataclasses.replace(link, part="hosts")


def _all_devices() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(-1, 1, 1), MESH_AXES)


def _model_bits(config: LlamaConfig) -> str:
    mesh = make_mesh(config, tp=1, devices=jax.local_devices()[:1])
    return hashlib.sha256(logits_of(config.cut_to(min(2, config.num_layers)), mesh).tobytes()).hexdigest()


def _message_bits(mesh: Mesh) -> str:
    """A hash of what arrives at this process's devices, or what is wrong with it."""
    values = np.random.default_rng(3).standard_normal((mesh.size, _NUM_VALUES)).astype(np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    x = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def exchange(
        x: Float[Array, "own values"],
    ) -> tuple[Float[Array, "devices values"], Float[Array, " values"]]:
        return jax.lax.all_gather(x, MESH_AXES, axis=0, tiled=True), jax.lax.psum(x[0], MESH_AXES)

    whole = (PartitionSpec(), PartitionSpec())
    gathered, summed = jax.jit(
        jax.shard_map(exchange, mesh=mesh, in_specs=PartitionSpec(MESH_AXES), out_specs=whole, check_vma=False)
    )(x)
    sums = [np.asarray(shard.data) for shard in summed.addressable_shards]
    if any(not np.array_equal(np.asarray(shard.data), values) for shard in gathered.addressable_shards):
        return "a wrong all-gather"
    # In any order: each of the sums rounds to float32 once, to half a last place.
    bound = (mesh.size - 1) * 2.0**-24 * np.abs(values.astype(np.float64)).sum(0)
    if any((np.abs(each - values.sum(0, dtype=np.float64)) > bound).any() for each in sums):
        return "a wrong all-reduce"
    if any(not np.array_equal(each, sums[0]) for each in sums):
        return "a wrong all-reduce: its devices have other bits"
    return hashlib.sha256(sums[0].tobytes()).hexdigest()
