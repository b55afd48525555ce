"""What a compiled TPU program does: HBM traffic, large copies, collectives, an estimate of its time. No JAX."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from jaxllama.model.platforms.chips import Generation
from jaxllama.plan.hlo import Computation, Instruction, Program
from jaxllama.plan.links import Links, first_group

LARGE_COPY_BYTES = 4 * 2**20

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_FREE = frozenset(
    {
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "constant",
        "after-all",
        "iota",
        "async-update",
        "partition-id",
        "replica-id",
        "add-dependency",
        "opt-barrier",
    }
)
_SLICES = ("dynamic-slice", "slice", "gather")
_IN_PLACE = ("dynamic-update-slice", "scatter")
_ALIASES = ("bitcast", "reshape")
_MOVES = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "bitcast",
        "reshape",
        "copy",
        "transpose",
        "convert",
        "concatenate",
        "pad",
        "slice",
        "dynamic-slice",
        "dynamic-update-slice",
        "broadcast",
    }
)


@dataclass(frozen=True)
class KernelWork:
    """What all Pallas kernels of one run do together; the compiler gives no estimate for them.

    `hbm_bytes` they read and write; they take at least `seconds`.
    """

    hbm_bytes: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class LargeCopy:
    """Data moved to another place in HBM without a computation, at least `LARGE_COPY_BYTES` at a time."""

    op: str
    shape: str
    source: str
    bytes: int
    count: int


@dataclass(frozen=True)
class Measurement:
    """One run of a program on one device.

    `collectives` are how often each kind runs, `collective_bytes` what a device gets from each kind. `async_share` is
    the part of the HBM traffic that is copied beside computation; `stall_s` is time spent waiting for such copies.

    Messages between chips are not in `seconds`: the links need `message_s` for them, of which computation waits for
    `exposed_s`. Both are 0 where no links were given.
    """

    seconds: float
    stall_s: float
    hbm_bytes: float
    async_share: float
    large_copies: tuple[LargeCopy, ...]
    collectives: dict[str, int]
    collective_bytes: dict[str, float]
    num_kernel_calls: int
    message_s: float = 0.0
    exposed_s: float = 0.0


def measure(
    text: str,
    chip: Generation,
    *,
    kernels: KernelWork | None = None,
    unknown_trips: Sequence[int] = (1,),
    links: Links | None = None,
) -> Measurement:
    """Walks the schedule of one run of a program.

    Time is that of a fluid model: an instruction takes its estimated cycles or its HBM bytes over bandwidth, whichever
    is longer; copies between HBM and VMEM run beside it with the bandwidth it leaves, and their `-done` waits for them.
    `unknown_trips` are the trips of loops whose count is data, the outermost first (1 where it ends). Of a conditional
    the first branch counts: JAX puts "false" there, so that decode steps are greedy, without penalties.

    Messages take the links one after another, permutes of opposite directions beside each other. What is started and
    done apart runs beside the work between.

    Source: against the published times of a v5e-16 (jax-llm-examples, int8) the same method gave -4 to +13 %.
    """
    program = Program.parse(text)
    walk = _Walk(program, chip, kernels or KernelWork(), tuple(unknown_trips), links)
    executions = walk.executions()
    walk.run(program.entry, 0)
    hbm = walk.kernel_bytes if executions.kernel_calls else 0.0
    beside = 0.0
    copies: Counter[tuple[str, str, str, int]] = Counter()
    collectives: Counter[str] = Counter()
    collective_bytes: dict[str, float] = {}
    for instruction, count in executions.instructions:
        cost = walk.cost(instruction)
        hbm += count * cost.hbm_bytes
        beside += count * cost.hbm_bytes if instruction.op.endswith("-start") else 0.0
        if cost.large_copy is not None:
            copies[cost.large_copy] += count
        if cost.collective:
            collectives[cost.collective] += count
            collective_bytes[cost.collective] = (
                collective_bytes.get(cost.collective, 0.0) + count * cost.collective_bytes
            )
    return Measurement(
        seconds=walk.seconds,
        stall_s=walk.stall_s,
        hbm_bytes=hbm,
        async_share=beside / hbm if hbm else 0.0,
        large_copies=tuple(LargeCopy(*key, count=count) for key, count in copies.most_common()),
        collectives=dict(collectives),
        collective_bytes=collective_bytes,
        num_kernel_calls=executions.kernel_calls,
        message_s=walk.message_s,
        exposed_s=walk.exposed_s,
    )


@dataclass(frozen=True)
class _Cost:
    hbm_bytes: float = 0.0
    cycles: int = 0
    collective: str = ""
    collective_bytes: float = 0.0
    message_s: float = 0.0
    large_copy: tuple[str, str, str, int] | None = None


@dataclass
class _Executions:
    instructions: list[tuple[Instruction, int]] = field(default_factory=list)
    kernel_calls: int = 0


class _Walk:
    """The schedule, instruction by instruction, and the clock of the fluid model."""

    def __init__(
        self,
        program: Program,
        chip: Generation,
        kernels: KernelWork,
        unknown_trips: tuple[int, ...],
        links: Links | None = None,
    ) -> None:
        self._program, self._chip, self._unknown_trips, self._links = program, chip, unknown_trips, links
        self._costs: dict[Instruction, _Cost] = {}
        self.seconds = self.stall_s = 0.0
        self.kernel_bytes = kernels.hbm_bytes
        self._kernels = kernels
        self._num_kernel_calls = max(1, self.executions().kernel_calls)
        self._copied = self._queued = 0.0
        self._queue_at: dict[str, float] = {}
        self.message_s = self.exposed_s = 0.0
        self._links_free_at = [0.0, 0.0]
        self._arrives_at: dict[str, float] = {}

    def executions(self) -> _Executions:
        """Every instruction that does something, with how often it runs."""
        found = _Executions()
        self._count(self._program.entry, 1, 0, found)
        return found

    def _count(self, computation: Computation, times: int, depth: int, found: _Executions) -> None:
        for instruction, inner, trips, inner_depth in self._steps(computation, depth):
            if inner is not None:
                self._count(inner, times * trips, inner_depth, found)
            else:
                found.instructions.append((instruction, times))
                found.kernel_calls += times * _is_kernel(instruction)

    def _steps(
        self, computation: Computation, depth: int
    ) -> Iterator[tuple[Instruction, Computation | None, int, int]]:
        """What runs, in order: an instruction, or what it enters, how often, and the number of unknown loops around."""
        for instruction in computation.instructions.values():
            if instruction.op in _FREE:
                continue
            if instruction.op == "while":
                body = self._program.computations[instruction.called("body") or ""]
                trips = self._program.trips(instruction)
                if trips is not None:
                    yield instruction, body, trips, depth
                else:
                    trips = self._unknown_trips[depth] if depth < len(self._unknown_trips) else 1
                    yield instruction, body, trips, depth + 1
            elif instruction.op == "conditional":
                branch = self._program.first_branch(instruction)
                if branch is not None:
                    yield instruction, branch, 1, depth
            elif instruction.op == "call":
                inner = self._program.wrapped(instruction)
                if inner is not None:
                    yield instruction, inner, 1, depth
            else:
                yield instruction, None, 1, depth

    def run(self, computation: Computation, depth: int) -> None:
        """Advances the clock through a computation."""
        for instruction, inner, trips, inner_depth in self._steps(computation, depth):
            if inner is not None:
                for _ in range(trips):
                    self.run(inner, inner_depth)
            else:
                self._step(instruction)

    def _step(self, instruction: Instruction) -> None:
        cost, bandwidth = self.cost(instruction), self._chip.hbm_bytes_per_s
        if cost.collective:
            self._send(instruction, cost.message_s)
        elif instruction.op.endswith("-done"):
            self._receive(instruction)
            waits_for = self._queue_at.get(instruction.operands[0][0], 0.0)
            wait = max(0.0, waits_for - self._copied) / bandwidth
            self.stall_s += wait
            self._advance(wait, 0.0)
        elif instruction.op.endswith("-start"):
            self._queued += cost.hbm_bytes
            self._queue_at[instruction.name] = self._queued
        elif _is_kernel(instruction):
            share = 1 / self._num_kernel_calls
            nbytes = self._kernels.hbm_bytes * share
            self._advance(max(nbytes / bandwidth, self._kernels.seconds * share), nbytes)
        else:
            self._advance(max(cost.cycles / self._chip.clock_hz, cost.hbm_bytes / bandwidth), cost.hbm_bytes)

    def _send(self, instruction: Instruction, message_s: float) -> None:
        """Both directions of the links are taken, but by a permute one: those of a ring go both ways at a time."""
        ways = (0, 1)
        if instruction.base_op == "collective-permute":
            ends = first_group(instruction.attributes, 2)
            num_forth = sum(sender < receiver for sender, receiver in zip(ends[::2], ends[1::2], strict=True))
            ways = (int(4 * num_forth < len(ends)),) * 2
        self.message_s += message_s
        arrives_at = max(*(self._links_free_at[way] for way in ways), self.seconds + self.exposed_s) + message_s
        for way in ways:
            self._links_free_at[way] = arrives_at
        self._arrives_at[instruction.name] = arrives_at
        if not instruction.op.endswith("-start"):
            self._wait_for(instruction.name)

    def _receive(self, done: Instruction) -> None:
        if done.operands:
            self._wait_for(done.operands[0][0])

    def _wait_for(self, name: str) -> None:
        self.exposed_s += max(0.0, self._arrives_at.pop(name, 0.0) - self.seconds - self.exposed_s)

    def _advance(self, seconds: float, hbm_bytes: float) -> None:
        spare = max(0.0, seconds * self._chip.hbm_bytes_per_s - hbm_bytes)
        self._copied = min(self._queued, self._copied + spare)
        self.seconds += seconds

    def cost(self, instruction: Instruction) -> _Cost:
        """What one execution costs."""
        if instruction not in self._costs:
            self._costs[instruction] = self._cost(instruction)
        return self._costs[instruction]

    def _message(self, kind: str, nbytes: float, instruction: Instruction) -> _Cost:
        seconds = 0.0
        if self._links is not None:
            group = first_group(instruction.attributes, len(self._links.coords))
            seconds = self._links.seconds(kind, nbytes, group)
        return _Cost(collective=kind, collective_bytes=nbytes, message_s=seconds)

    def _cost(self, instruction: Instruction) -> _Cost:
        op = instruction.op
        if op.endswith(("-done", "-update")):
            return _Cost()
        if instruction.base_op in _COLLECTIVES:
            # The type of a start holds what goes in beside what comes out; an all-reduce's only the latter.
            both = op.endswith("-start") and instruction.base_op != "all-reduce"
            size = max(shape.size for shape in instruction.shapes) if both else instruction.size()
            return self._message(instruction.base_op, size, instruction)
        wrapped = self._program.wrapped(instruction) if op in ("fusion", "async-start") else None
        if wrapped is not None and (found := _collective_in(self._program, wrapped)):
            return self._message(found[0], wrapped.root.size(), found[1])
        if op == "async-start":
            # On a SparseCore it is a call of what it does.
            calls = [i for i in wrapped.instructions.values() if i.op == "call"] if wrapped is not None else []
            wrapped = self._program.wrapped(calls[0]) if calls else wrapped
            inner = [self.cost(i) for i in wrapped.instructions.values()] if wrapped is not None else []
            copy = next((cost.large_copy for cost in inner if cost.large_copy), None)
            return _Cost(hbm_bytes=sum(cost.hbm_bytes for cost in inner), large_copy=copy)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        read, written, moves = _traffic(self._program, instruction)
        copy = None
        # A copy may come through VMEM; what a copy-start moves from there is a result, not a copy.
        source = (
            read
            if op == "copy-start"
            else sum(shape.size for i in range(len(instruction.operands)) for shape in instruction.operand_shapes(i))
        )
        if moves and min(source, written) >= LARGE_COPY_BYTES:
            copy = (op, instruction.type[:60], _source(instruction), int(written))
        return _Cost(read + written, int(cycles.group(1)) if cycles else 0, large_copy=copy)


def _traffic(program: Program, instruction: Instruction) -> tuple[float, float, bool]:
    """HBM bytes read and written, and whether the instruction only moves data."""
    op = instruction.op
    operands = [
        sum(shape.size for shape in instruction.operand_shapes(i) if shape.in_hbm)
        for i in range(len(instruction.operands))
    ]
    written = instruction.size(hbm_only=True)
    if op in _FREE or op == "custom-call":
        # Pallas kernels are counted by `KernelWork`; the other targets only rearrange what a fusion reads.
        return 0.0, 0.0, False
    if op == "fusion":
        return _fusion_traffic(program, instruction, operands)
    if op == "copy-start":
        # (destination, source, context)
        target, source, *_ = instruction.shapes
        return float(source.size * source.in_hbm), float(target.size * target.in_hbm), True
    if op in _IN_PLACE:
        update = sum(s.size for s in instruction.operand_shapes(1 if op == "dynamic-update-slice" else -1))
        return float(min(update, sum(operands))), float(min(update, written)), False
    if op in _SLICES:
        return float(min(instruction.size(), sum(operands))), float(written), op != "gather"
    return float(sum(operands)), float(written), op in ("copy", "transpose", "convert", "concatenate")


def _fusion_traffic(program: Program, fusion: Instruction, operands: list[int]) -> tuple[float, float, bool]:
    body = program.wrapped(fusion)
    if body is None:
        return float(sum(operands)), float(fusion.size(hbm_only=True)), False
    read = 0.0
    for position, size in enumerate(operands):
        if size and position in body.parameters:
            read += min(size, _bytes_read(program, body, body.parameters[position].name))
    roots = [body.instructions[name] for name, _ in body.root.operands] if body.root.op == "tuple" else [body.root]
    written = 0.0
    for shape, root in zip(fusion.shapes, roots, strict=False):
        if shape.in_hbm:
            written += min(shape.size, _bytes_written(program, root))
    return read, written, all(i.op in _MOVES for i in body.instructions.values())


def _bytes_read(program: Program, body: Computation, name: str) -> float:
    """How much of a value its users in a fusion read: their slices, where they take slices only."""
    value = body.instructions[name]
    full = float(value.size())
    total = 0.0
    for user, position in body.users.get(name, []):
        if user.op in _SLICES and position == 0:
            total += user.size()
        elif user.op in _ALIASES and not user.is_root:
            total += _bytes_read(program, body, user.name)
        elif user.op in _IN_PLACE and position == 0:
            continue
        elif user.op == "fusion" and (inner := program.wrapped(user)) and position in inner.parameters:
            parameter = inner.parameters[position]
            is_alias = inner.root.op in (*_ALIASES, "copy", "convert") and inner.root.operands[0][0] == parameter.name
            if is_alias and not user.is_root:
                total += _bytes_read(program, body, user.name) * full / max(1, user.size())
            else:
                total += _bytes_read(program, inner, parameter.name)
        else:
            return full
    return full if value.is_root else min(total, full)


def _bytes_written(program: Program, root: Instruction) -> float:
    """How much of a fusion's result is written: the update alone, where the rest stays in place."""
    if root.op in _IN_PLACE:
        return float(sum(s.size for s in root.operand_shapes(1 if root.op == "dynamic-update-slice" else -1)))
    if root.op in _ALIASES and root.operands[0][0] in root.computation.instructions:
        return _bytes_written(program, root.computation.instructions[root.operands[0][0]])
    if root.op == "fusion" and (inner := program.wrapped(root)) and inner.root.op in _IN_PLACE:
        return _bytes_written(program, inner.root)
    return float(root.size())


def _collective_in(program: Program, computation: Computation) -> tuple[str, Instruction] | None:
    """The collective inside a fusion or an asynchronous computation, by its kind and itself."""
    for instruction in computation.instructions.values():
        if instruction.base_op in _COLLECTIVES:
            # XLA names a sum of which every device keeps its own slice so.
            is_scatter = instruction.base_op == "all-reduce" and "all-reduce-scatter" in computation.name
            return "reduce-scatter" if is_scatter else instruction.base_op, instruction
        inner = program.wrapped(instruction) if instruction.op in ("fusion", "custom-call") else None
        if inner is not None and (found := _collective_in(program, inner)):
            return found
    return None


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attributes


def _source(instruction: Instruction) -> str:
    """The JAX operation it comes from, without the function's name."""
    match = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return re.sub(r"^jit\([^)]*\)/", "", match.group(1))[-70:] if match else ""
