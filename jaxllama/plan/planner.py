"""Whether a model fits a slice, with how many rows, how fast and for how much, from the TPU compiler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllama.errors import PlanError
from jaxllama.model.mesh import uneven_splits
from jaxllama.model.params import num_params
from jaxllama.plan import roofline
from jaxllama.plan.compiler import MISSING, Compiled, CompilerError, compile_program, is_available
from jaxllama.plan.measure import Measurement
from jaxllama.plan.setup import Setup, as_mesh, resident_bytes
from jaxllama.plan.topology import all_topologies

MAX_ROWS = 2**16
_BAND_MEASURED = 0.15
_BAND_COMPILED = 0.25
_BAND_ANALYTIC = 0.4
_NUM_COMPILED_IN_SEARCH = 3
_SCHEDULE_SCALE = 0.72
"""Of a schedule's time where messages are counted beside it: elementwise work is overrated by the compiler.

Fitted with `links.HOP_S` to the five published steps of a v5e-16 (8 to 128 rows of the 70B in int8): within 2 %. One
chip has no messages to tell them apart from, so there a schedule's time stands as it is.
"""


@dataclass(frozen=True)
class Memory:
    """HBM of one device in bytes. `temporaries` are the larger program's, with all compiled code and its outputs."""

    weights: int
    kv: int
    state: int
    temporaries: int
    available: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.state + self.temporaries

    @property
    def free(self) -> int:
        """Negative where it does not fit."""
        return self.available - self.total


@dataclass(frozen=True)
class Estimate:
    """Seconds, with the range that the error band leaves, and the least that the hardware allows."""

    seconds: float
    low: float
    high: float
    roofline: float

    @classmethod
    def within(cls, band: float, seconds: float, roof: float, *, is_overrated: bool) -> Estimate:
        """`seconds` ± `band`, never below the roofline, and down to it where time is overrated."""
        return cls(seconds, roof if is_overrated else max(roof, seconds * (1 - band)), seconds * (1 + band), roof)


@dataclass(frozen=True)
class Plan:
    """The answer for one setup. `method` is "compiled" or "analytic"; `band` the relative error of its times.

    `compiled` holds the programs by name, none where nothing was compiled. `max_rows` is for the context asked for, and
    `max_context` for the rows asked for, 0 where not even one fits. `notes` say what the figures rest on.
    """

    setup: Setup
    method: str
    band: float
    fits: bool
    memory: Memory
    max_rows: int
    max_context: int
    step: Estimate
    first_token: Estimate
    compiled: Mapping[str, Compiled]
    dollars_per_chip_hour: float | None
    notes: tuple[str, ...]

    @property
    def decode(self) -> Measurement | None:
        """What was read from the compiled decode program."""
        program = self.compiled.get("decode")
        return program.measurement if program is not None else None

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together."""
        return self.setup.rows / self.step.seconds

    @property
    def dollars_per_million_tokens(self) -> float | None:
        """Of generated tokens with every row busy, prefill not counted."""
        if self.dollars_per_chip_hour is None:
            return None
        return self.dollars_per_chip_hour * self.setup.topology.num_chips / 3600 / self.tokens_per_s * 1e6

    def step_seconds_at(self, rows: int) -> float:
        """The step's time with other rows: the roofline there, scaled as the estimate is to its own roofline."""
        other = dataclasses.replace(self.setup, rows=rows)
        return roofline.decode_seconds(other) * self.step.seconds / self.step.roofline


def plan(
    setup: Setup,
    *,
    dollars_per_chip_hour: float | None = None,
    use_compiler: bool = True,
    progress: Callable[[str], None] = lambda _: None,
    time_is_up: Callable[[], bool] = lambda: False,
) -> Plan:
    """Compiles the decode and prefill programs of `setup` for its topology and reads what they need.

    Without libtpu, or where it fails, the analytic model answers, and `notes` say so. `progress` gets a line before
    each compilation. When `time_is_up` the compiler is ended, and the analytic model answers too.
    """
    compiled: dict[str, Compiled] = {}
    notes: list[str] = []
    if use_compiler:
        compiled, notes = compile_programs(setup, ("decode", "prefill"), progress, time_is_up)
    return _plan(setup, compiled, notes, dollars_per_chip_hour)


def compile_programs(
    setup: Setup,
    programs: Sequence[str],
    progress: Callable[[str], None],
    time_is_up: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Compiled], list[str]]:
    """The programs by name up to the first that does not fit, or none of them and a note that says why."""
    compiled: dict[str, Compiled] = {}
    if not is_available():
        return compiled, [f"{MISSING}. The analytic model answers instead"]
    try:
        for program in programs:
            progress(f"compiling {program} for {describe_mesh(setup)} ...")
            compiled[program] = compile_program(setup, program, time_is_up)
            progress(f"  {compiled[program].compile_s:.0f} s")
            if not compiled[program].fits:
                break
    except (CompilerError, PlanError) as error:
        return {}, [f"{error}. The analytic model answers instead"]
    return compiled, []


def _plan(setup: Setup, compiled: Mapping[str, Compiled], notes: list[str], dollars: float | None) -> Plan:
    memory = memory_of(setup, compiled)
    measured = {name: c.measurement for name, c in compiled.items() if c.measurement is not None}
    fits = memory.free >= 0 and all(c.fits for c in compiled.values())
    for name, program in compiled.items():
        if not program.fits:
            asked = f" ({_gib(program.required_bytes)} of {_gib(memory.available)})" if program.required_bytes else ""
            notes.append(f"the compiler ran out of HBM on {name}{asked}")
    is_compiled = "decode" in measured and "prefill" in measured
    band = _band(setup) if is_compiled else _BAND_ANALYTIC
    step_roof, chunk_roof = roofline.decode_seconds(setup), roofline.chunk_seconds(setup)
    step, chunk = step_roof / roofline.EFFICIENCY, chunk_roof / roofline.EFFICIENCY
    if is_compiled:
        step = seconds_of(setup, step_roof, measured["decode"])
        chunk = seconds_of(setup, chunk_roof, measured["prefill"])
    calls = roofline.num_calls(setup)
    is_overrated = is_compiled and not measured["decode"].num_kernel_calls
    return Plan(
        setup=setup,
        method="compiled" if compiled else "analytic",
        band=band,
        fits=fits,
        memory=memory,
        max_rows=largest(MAX_ROWS, lambda rows: _fits(dataclasses.replace(setup, rows=rows), compiled, setup)),
        max_context=_max_context(setup, compiled),
        step=Estimate.within(band, step, step_roof, is_overrated=is_overrated),
        first_token=Estimate.within(
            band, calls * chunk + step, calls * chunk_roof + step_roof, is_overrated=is_overrated
        ),
        compiled=compiled,
        dollars_per_chip_hour=dollars,
        notes=tuple(
            notes
            + (_basis(setup, measured["decode"] if is_compiled else None) if fits else [])
            + uneven_splits(setup.config, as_mesh(setup))
        ),
    )


def seconds_of(setup: Setup, roof: float, m: Measurement) -> float:
    """Of one run: what its schedule takes, and the messages that nothing hides."""
    scale = 1.0 if setup.topology.num_devices == 1 else _SCHEDULE_SCALE
    return max(roof, scale * m.seconds) + m.exposed_s


def _band(setup: Setup) -> float:
    return _BAND_MEASURED if setup.topology.generation.name == "v5e" else _BAND_COMPILED


def _basis(setup: Setup, decode: Measurement | None) -> list[str]:
    chip = setup.topology.generation.name
    if decode is None:
        return [f"times are the roofline over {roofline.EFFICIENCY}, within {_BAND_ANALYTIC:.0%}"]
    checked = "the same method gave -1 to +2 % against published times of a v5e-16, which it was fitted to"
    unchecked = "" if chip == "v5e" else f"; {chip} was not compared with hardware"
    if chip == "v6e":
        unchecked = "; published servers on a v6e-8 take 25 % more than its steps, work of their hosts included"
    notes = [
        f"times are read from the compiled schedule, within {_band(setup):.0%}: {checked}{unchecked}",
        "messages between chips are counted by public figures of their links; those to the host are not",
        "other rows and contexts are scaled from the compiled ones by the analytic model",
    ]
    if not decode.num_kernel_calls:
        notes.append("attention is plain JAX in these programs, which is overrated up to ten times: they may be faster")
    return notes


def memory_of(setup: Setup, compiled: Mapping[str, Compiled], anchor: Setup | None = None) -> Memory:
    """Of `setup`, from programs compiled for `anchor` (None: for `setup` itself)."""
    resident = resident_bytes(setup)
    anchor = setup if anchor is None else anchor
    at_anchor = resident if anchor == setup else resident_bytes(anchor)
    available = setup.topology.generation.hbm_bytes
    decode = compiled.get("decode")
    padding = max(0, decode.argument_bytes - at_anchor.total) if decode is not None and decode.fits else 0
    temporaries = 0
    for name, program in compiled.items():
        if program.fits:
            own = program.temporary_bytes + program.output_bytes
        else:
            own = max(roofline.temporary_bytes(anchor), program.required_bytes - at_anchor.total)
        # A step's temporaries grow with its rows; a chunk's do not.
        growth = max(1.0, setup.rows / anchor.rows) if name != "prefill" else 1.0
        temporaries = max(temporaries, math.ceil(own * growth))
    temporaries = temporaries + sum(c.code_bytes for c in compiled.values())
    if not compiled:
        temporaries = roofline.temporary_bytes(setup)
    return Memory(resident.weights, resident.kv, resident.state + padding, temporaries, available)


def _fits(setup: Setup, compiled: Mapping[str, Compiled], anchor: Setup) -> bool:
    return memory_of(setup, compiled, anchor).free >= 0


def _max_context(setup: Setup, compiled: Mapping[str, Compiled]) -> int:
    limit, page = setup.config.max_position_embeddings, setup.page_size

    def fits(pages: int) -> bool:
        context = min(limit, pages * page)
        other = dataclasses.replace(setup, context=context, prompt_tokens=min(setup.prompt_tokens, context))
        return _fits(other, compiled, setup)

    return min(limit, page * largest(-(-limit // page), fits))


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, 0 for none, by bisection."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def search(
    setups: Sequence[Setup],
    *,
    dollars: Callable[[str], float | None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Plan]:
    """Plans for all `setups` that fit, the best first: the cheapest by token, or without prices the most tokens a chip.

    All are ranked by the analytic model; the best few are then compiled, and only those are recommended from.

    Raises: PlanError if none fits.
    """
    plans = [plan(s, dollars_per_chip_hour=dollars(s.topology.generation.name), use_compiler=False) for s in setups]
    fitting = sorted((p for p in plans if p.fits), key=_rank)
    if not fitting:
        raise PlanError(
            f"nothing fits of {', '.join(sorted({s.topology.name for s in setups}))} with {setups[0].rows} rows of "
            f"{setups[0].context} tokens, {setups[0].weights} weights and {setups[0].kv} KV"
        )
    if not is_available():
        return [plan(fitting[0].setup, dollars_per_chip_hour=fitting[0].dollars_per_chip_hour), *fitting[1:]]
    done = [
        plan(p.setup, dollars_per_chip_hour=p.dollars_per_chip_hour, progress=progress)
        for p in fitting[:_NUM_COMPILED_IN_SEARCH]
    ]
    return sorted((p for p in done if p.fits), key=_rank) + fitting[_NUM_COMPILED_IN_SEARCH:]


def candidates(setup: Setup, *, everywhere: bool) -> list[Setup]:
    """The meshes that split rows and heads evenly, of the setup's topology or, `everywhere`, of all slices.

    Slices with more devices than query heads are left out of the latter.
    """
    found = []
    small = [topology for topology in all_topologies() if topology.num_devices <= setup.config.num_heads]
    for topology in small if everywhere else (setup.topology,):
        for data in range(1, topology.num_devices + 1):
            tp = topology.num_devices // data
            splits_evenly = topology.num_devices % data == 0 and setup.rows % data == 0
            if splits_evenly and setup.config.num_heads % tp == 0:
                found.append(dataclasses.replace(setup, topology=topology, data=data))
    return found


def _rank(p: Plan) -> tuple[float, float]:
    cost = p.dollars_per_million_tokens
    return (cost if cost is not None else p.setup.topology.num_chips / p.tokens_per_s, p.step.seconds)


def describe_mesh(setup: Setup) -> str:
    """E.g. `v6e:2x4, data 1 x tp 8`."""
    return f"{setup.topology.name}, data {setup.data} x tp {setup.tp}"


def as_json(p: Plan) -> dict[str, Any]:
    """Every figure by name: bytes per device, seconds, tokens per second of all rows, dollars. None where unknown."""
    s, memory = p.setup, p.memory
    asked = ("weights", "kv", "rows", "context", "page_size", "chunk_tokens", "chunks_in_group", "prompt_tokens")
    by_time = {"low": p.step.high, "estimate": p.step.seconds, "high": p.step.low, "roofline": p.step.roofline}
    return {
        "fits": p.fits,
        "method": p.method,
        "topology": s.topology.name,
        "num_chips": s.topology.num_chips,
        "num_devices": s.topology.num_devices,
        "mesh": dict(s.mesh.shape),
        "num_params": num_params(s.config),
        **{name: getattr(s, name) for name in asked},
        "bytes_per_device": dataclasses.asdict(memory) | {"total": memory.total, "free": memory.free},
        "max_rows": p.max_rows,
        "max_context": p.max_context,
        "error_band": p.band,
        "step_s": dataclasses.asdict(p.step) if p.fits else None,
        "time_to_first_token_s": dataclasses.asdict(p.first_token) if p.fits else None,
        "tokens_per_s": {name: s.rows / seconds for name, seconds in by_time.items()} if p.fits else None,
        "dollars_per_million_tokens": p.dollars_per_million_tokens if p.fits else None,
        "collectives": None if p.decode is None else collectives(p.decode, s.config.num_layers),
        "programs": {name: dataclasses.asdict(program) for name, program in p.compiled.items()},
        "notes": list(p.notes),
    }


def collectives(m: Measurement, num_layers: int) -> dict[str, dict[str, int]]:
    """How often each kind runs: `per_run`, and of that `per_layer` and `outside_layers`."""
    return {
        "per_run": m.collectives,
        "per_layer": {name: count // num_layers for name, count in m.collectives.items() if count >= num_layers},
        "outside_layers": {name: count % num_layers for name, count in m.collectives.items() if count % num_layers},
    }


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"
