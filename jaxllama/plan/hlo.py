"""The text of scheduled HLO as instructions. No JAX.

The text is XLA's `*after_codegen.txt`: instructions in the order in which they run, with the memory of every value
(`S(1)` is VMEM, none is HBM) and the compiler's own `estimated_cycles` for what it compiled itself.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32}
_BITS |= {"u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_SHAPE = re.compile(rf"\b({'|'.join(_BITS)})\[([0-9,]*)\](\{{[^{{}}]*\}})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)(?:#(\d+))?")


@dataclass(frozen=True)
class Shape:
    """One array of a value. `size` is in bytes, without the padding of its tiles."""

    size: int
    in_hbm: bool


def _shapes(type_text: str) -> list[Shape]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(type_text):
        count = math.prod(int(dim) for dim in dims.split(",") if dim)
        found.append(Shape(count * _BITS[dtype] // 8, "S(" not in layout))
    return found


@dataclass(frozen=True, eq=False)
class Instruction:
    """`operands` are names, with the index where one element of a tuple is meant."""

    name: str
    type: str
    op: str
    arguments: str
    attributes: str
    is_root: bool
    computation: Computation

    @cached_property
    def operands(self) -> list[tuple[str, int | None]]:
        return [(name, int(index) if index else None) for name, index in _OPERAND.findall(self.arguments)]

    @cached_property
    def shapes(self) -> list[Shape]:
        return _shapes(self.type)

    def size(self, *, hbm_only: bool = False) -> int:
        return sum(shape.size for shape in self.shapes if shape.in_hbm or not hbm_only)

    def operand_shapes(self, index: int) -> list[Shape]:
        name, element = self.operands[index]
        source = self.computation.instructions.get(name)
        shapes = source.shapes if source is not None else []
        return shapes if element is None else shapes[element : element + 1]

    def called(self, key: str) -> str | None:
        match = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return match.group(1) if match else None

    @cached_property
    def base_op(self) -> str:
        return re.sub(r"-(start|done|update)$", "", self.op)


@dataclass(eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions.values() if i.op == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Who reads a value, and as which operand."""
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for position, (name, _) in enumerate(instruction.operands):
                users.setdefault(name, []).append((instruction, position))
        return users


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: Computation

    @classmethod
    def parse(cls, text: str) -> Program:
        computations: dict[str, Computation] = {}
        current = entry = None
        for line in text.split("\n"):
            if header := _COMPUTATION.match(line):
                current = computations[header.group(2)] = Computation(header.group(2))
                entry = current if header.group(1) else entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                root, name, type_text, op, rest = match.groups()
                end = rest.find("), ")
                end = rest.rfind(")") if end < 0 else end
                current.instructions[name] = Instruction(
                    name, type_text, op, rest[:end], rest[end + 1 :], bool(root), current
                )
        if entry is None:
            raise ValueError("the text holds no ENTRY computation; expected a scheduled HLO module")
        return cls(computations, entry)

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs; None where data decides."""
        if known := re.search(r'known_trip_count[":{ ]*n[": ]*"?(\d+)', loop.attributes):
            return int(known.group(1))
        condition, body = (self.computations[loop.called(key) or ""] for key in ("condition", "body"))
        bounds = [
            int(i.arguments)
            for i in condition.instructions.values()
            if i.op == "constant" and re.match(r"[su]32\[\]", i.type) and i.arguments.isdigit() and int(i.arguments) > 1
        ]
        if len(bounds) != 1:
            return None
        if "windowed_dot_general" not in condition.name:
            return bounds[0]
        # Its counter advances by the steps that are unrolled in the body, of two permutes each.
        permutes = sum(i.op == "collective-permute-start" for i in body.instructions.values())
        return max(1, bounds[0] // max(1, permutes // 2))

    def first_branch(self, conditional: Instruction) -> Computation | None:
        branches = re.search(r"branch_computations=\{%([\w.\-]+)", conditional.attributes)
        name = branches.group(1) if branches else conditional.called("false_computation")
        return self.computations.get(name or "")

    def wrapped(self, instruction: Instruction) -> Computation | None:
        """The computation that a fusion, a call, an asynchronous or a custom instruction runs."""
        # On newer chips collectives are custom calls on their own cores, with the collective inside.
        named = re.search(r"\b(?:calls=|to_apply=|called_computations=\{)%([\w.\-]+)", instruction.attributes)
        return self.computations.get(named.group(1)) if named else None
