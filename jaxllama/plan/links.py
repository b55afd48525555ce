"""What messages between chips cost: bytes over the links of a slice, and a latency for each hop. No JAX.

The model: a collective uses every link that a chip at the slice's edge has along the axes that its group spans, one
direction at a time. A mesh's edge has one link an axis, a torus two. That is what the best algorithms reach, and
nothing else is on the links meanwhile.

Source: Austin et al. 2025, "How to Scale Your Model" (bandwidth of links, costs of collectives, where slices wrap
around); jax-llm-examples' published steps on a v5e-16 (latency, see bench/LOG.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllama.plan.topology import Topology

HOP_S = 0.34e-6
"""A hop's latency: fitted to a v5e-16, 4.1 µs for an all-reduce of 16 chips, 12 hops there and back."""


@dataclass(frozen=True)
class Links:
    """The links of a slice. `coords` are where the devices of a program's mesh lie, in its order."""

    topology: Topology
    coords: tuple[tuple[int, ...], ...]

    def seconds(self, kind: str, nbytes: float, devices: Sequence[int]) -> float:
        """Of one collective among `devices` (indices of `coords`); `nbytes` are what each of them gets out of it.

        Of a permute, `devices` are one after another those that send and get.
        """
        if len(devices) < 2:
            return 0.0
        if kind == "collective-permute":
            pairs = zip(devices[::2], devices[1::2], strict=True)
            hops = max(sum(self._distances(self.coords[a], self.coords[b])) for a, b in pairs)
            return nbytes / self.topology.generation.link_bytes_per_s + hops * HOP_S
        sides = [len({coord[axis] for coord in (self.coords[i] for i in devices)}) for axis in range(len(self._wraps))]
        spans = [
            (side, wraps and side == size) for side, wraps, size in zip(sides, self._wraps, self._sizes, strict=True)
        ]
        hops = sum(side // 2 if wraps else side - 1 for side, wraps in spans)
        num_links = sum((2 if wraps and side > 2 else 1) for side, wraps in spans if side > 1)
        bandwidth = max(1, num_links) * self.topology.generation.link_bytes_per_s
        others = len(devices) - 1
        if kind in ("all-to-all", "ragged-all-to-all"):
            # Half of what half of them send crosses the middle of the longest side.
            side, wraps = max(spans)
            crossing = nbytes * max(1, side) / (8 if wraps and side > 2 else 4)
            return crossing / self.topology.generation.link_bytes_per_s + hops * HOP_S
        if kind == "all-reduce":
            return 2 * (nbytes * others / len(devices) / bandwidth + hops * HOP_S)
        if kind == "reduce-scatter":
            return nbytes * others / bandwidth + hops * HOP_S
        return nbytes * others / len(devices) / bandwidth + hops * HOP_S

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.topology.sides

    @property
    def _wraps(self) -> tuple[bool, ...]:
        return self.topology.wraps

    def _distances(self, a: tuple[int, ...], b: tuple[int, ...]) -> list[int]:
        found = []
        for one, other, wraps, size in zip(a, b, self._wraps, self._sizes, strict=False):
            direct = abs(one - other)
            found.append(min(direct, size - direct) if wraps else direct)
        return found


def first_group(attributes: str, num_devices: int) -> list[int]:
    """The devices of one group of a collective, by its HLO attributes; of a permute its pairs, one after another.

    Devices are numbered as in the program's mesh. All groups of our programs are alike.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs is not None:
        return [int(number) for number in re.findall(r"\d+", pairs.group(1))]
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed is not None:
        return [int(number) for number in listed.group(1).split(",") if number]
    named = re.search(r"replica_groups=mesh\[(.*?)\](?:[^{]*)\{(.*?)\}", attributes)
    if named is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        return _along(list(sizes.values()), [name in re.findall(r"'([^']+)'", named.group(2)) for name in sizes])
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled is not None:
        per_group, dims = int(tiled.group(2)), [int(size) for size in tiled.group(3).split(",")]
        order = [int(axis) for axis in (tiled.group(4) or "").split(",") if axis] or list(range(len(dims)))
        return _iota(dims, order)[:per_group]
    return list(range(num_devices))


def _strides(sizes: list[int]) -> list[int]:
    strides = [1] * len(sizes)
    for axis in range(len(sizes) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * sizes[axis + 1]
    return strides


def _along(sizes: list[int], chosen: list[bool]) -> list[int]:
    """The devices that differ from the first along the chosen axes alone."""
    found = [0]
    for size, stride, is_chosen in zip(sizes, _strides(sizes), chosen, strict=True):
        if is_chosen:
            found = [at + step * stride for at in found for step in range(size)]
    return found


def _iota(dims: list[int], order: list[int]) -> list[int]:
    """0, 1, 2 … as an array of `dims`, transposed to `order` and made flat."""
    strides, found = _strides(dims), [0]
    for axis in order:
        found = [at + step * strides[axis] for at in found for step in range(dims[axis])]
    return found
