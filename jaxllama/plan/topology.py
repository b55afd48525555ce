"""The slices of TPUs that can be rented. No JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxllama.errors import PlanError
from jaxllama.model.platforms.chips import GENERATIONS, Generation


@dataclass(frozen=True)
class Topology:
    """A slice, such as v6e:2x4."""

    generation: Generation
    size: str

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Reads `GENERATION:AxB` or `GENERATION:AxBxC`.

        Raises: PlanError that lists the known ones.
        """
        generation, _, size = name.partition(":")
        known = GENERATIONS.get(generation)
        if known is not None and size in known.sizes:
            return cls(known, size)
        listed = "; ".join(f"{g.name}: {', '.join(g.sizes)}" for g in GENERATIONS.values())
        raise PlanError(f"unknown topology {name!r}, expected GENERATION:SIZE such as v6e:2x4. Known: {listed}")

    @property
    def name(self) -> str:
        return f"{self.generation.name}:{self.size}"

    @property
    def sides(self) -> tuple[int, ...]:
        """Chips along each axis."""
        return tuple(int(side) for side in self.size.split("x"))

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each axis's last chip is linked to its first: a flat pod's whole side, and slices of whole cubes."""
        if len(self.sides) == 2:
            return tuple(side == 16 for side in self.sides)
        return (all(side % 4 == 0 for side in self.sides),) * len(self.sides)

    @property
    def num_chips(self) -> int:
        return math.prod(self.sides)

    @property
    def num_devices(self) -> int:
        """JAX devices."""
        return self.num_chips * self.generation.devices_per_chip


def all_topologies() -> tuple[Topology, ...]:
    """Every known slice, the smallest of each generation first."""
    return tuple(Topology(generation, size) for generation in GENERATIONS.values() for size in generation.sizes)
