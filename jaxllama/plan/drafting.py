"""What a draft model gains on a slice, and what both models need there.

A round drafts k tokens of each row, one step of the draft model after another, and verifies them in one step of the
model. Of drafts that are each accepted with probability a, 1 + a + a² + … + a^k tokens come of it.

Source: Leviathan et al. 2023, arXiv:2211.17192, equation 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxllama.engine.scheduling.speculation import MAX_DRAFT_TOKENS
from jaxllama.errors import PlanError
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import mesh_shape
from jaxllama.model.params import num_params
from jaxllama.plan import roofline
from jaxllama.plan.compiler import Compiled
from jaxllama.plan.planner import MAX_ROWS, Memory, compile_programs, describe_mesh, largest, memory_of, seconds_of
from jaxllama.plan.setup import Setup

_GIB = 2**30
_SEARCHED = range(1, 9)


@dataclass(frozen=True)
class Gain:
    """A round of `rows` sequences beside plain steps, in seconds. `draft_s` is one step of the draft model."""

    rows: int
    num_drafts: int
    acceptance: float
    plain_s: float
    draft_s: float
    verify_s: float

    @property
    def round_s(self) -> float:
        """Drafts, and their verification."""
        return self.num_drafts * self.draft_s + self.verify_s

    @property
    def num_tokens(self) -> float:
        """Expected of each row in a round."""
        return sum(self.acceptance**depth for depth in range(self.num_drafts + 1))

    @property
    def speedup(self) -> float:
        """Tokens in a time, plain decoding's being 1."""
        return self.num_tokens * self.plain_s / self.round_s


@dataclass(frozen=True)
class DraftedPlan:
    """The answer for two setups on one mesh, the model's with `num_drafts`, and the draft model's.

    `compiled` are the programs "decode", "verify" and "draft", none where nothing was compiled. `gain` is for the rows
    asked for, `gains` for other numbers of rows, which are scaled by the analytic model.
    """

    setup: Setup
    draft: Setup
    acceptance: float
    memory: Memory
    draft_bytes: tuple[int, int]
    max_rows: int
    gain: Gain
    gains: tuple[Gain, ...]
    compiled: Mapping[str, Compiled]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.free >= 0 and all(program.fits for program in self.compiled.values())


def drafted(setup: Setup, draft: LlamaConfig, num_drafts: int, acceptance: float) -> tuple[Setup, Setup]:
    """The setups of the model and the draft model.

    Raises: PlanError for numbers and models that do not go together.
    """
    if not 1 <= num_drafts <= MAX_DRAFT_TOKENS:
        raise PlanError(f"draft tokens must be from 1 to {MAX_DRAFT_TOKENS}, got {num_drafts}")
    if not 0 <= acceptance <= 1:
        raise PlanError(f"acceptance must be from 0 to 1, got {acceptance}")
    if draft.vocab_size != setup.config.vocab_size:
        raise PlanError(
            f"the draft model has {draft.vocab_size:,} tokens and the model {setup.config.vocab_size:,}; "
            "it must have the same vocabulary"
        )
    shapes = [mesh_shape(config, tp=setup.tp, data=setup.data) for config in (setup.config, draft)]
    if shapes[0] != shapes[1]:
        raise PlanError(
            f"{draft.num_kv_heads} KV heads of the draft model and {setup.config.num_kv_heads} of the model split "
            f"differently over {setup.tp} devices; the two must share one mesh"
        )
    return dataclasses.replace(setup, num_drafts=num_drafts), dataclasses.replace(setup, config=draft)


def plan_drafted(
    setup: Setup,
    draft: Setup,
    acceptance: float,
    *,
    searches: bool = False,
    use_compiler: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> DraftedPlan:
    """Compiles the model's plain step and the one that verifies, and the draft model's step, and says what one gains.

    `searches` looks for the number of drafts that gains most, by the analytic model from the compiled plain steps on,
    and compiles that verification.
    """
    compiled: dict[str, Compiled] = {}
    notes: list[str] = []
    if use_compiler:
        own, notes = compile_programs(setup, ("decode",), progress)
        drafts, more = compile_programs(draft, ("decode",), progress)
        compiled, notes = own, notes or more
        if "decode" in drafts:
            compiled["draft"] = drafts["decode"]
    if searches:
        best = max(_SEARCHED, key=lambda k: _gain(_with(setup, k), draft, setup.rows, acceptance, compiled).speedup)
        setup = _with(setup, best)
    if compiled and not notes:
        own, notes = compile_programs(setup, ("verify",), progress)
        compiled |= own
    rows = sorted({*(2**power for power in range(MAX_ROWS.bit_length())), setup.rows})
    most = largest(MAX_ROWS, lambda n: _memory(setup, draft, n, compiled).free >= 0)
    shown = [n for n in rows if n <= max(most, setup.rows) and n * (1 + setup.num_drafts) <= 1024]
    resident = _memory(setup, draft, setup.rows, compiled), memory_of(setup, {})
    return DraftedPlan(
        setup=setup,
        draft=draft,
        acceptance=acceptance,
        memory=resident[0],
        draft_bytes=(resident[0].weights - resident[1].weights, resident[0].kv - resident[1].kv),
        max_rows=most,
        gain=_gain(setup, draft, setup.rows, acceptance, compiled),
        gains=tuple(_gain(setup, draft, n, acceptance, compiled) for n in shown),
        compiled=compiled,
        notes=(*notes, *_basis(compiled)),
    )


def _with(setup: Setup, num_drafts: int) -> Setup:
    return dataclasses.replace(setup, num_drafts=num_drafts)


def _gain(setup: Setup, draft: Setup, rows: int, acceptance: float, compiled: Mapping[str, Compiled]) -> Gain:
    tokens = 1 + setup.num_drafts
    plain = _seconds(setup, rows, 1, compiled.get("decode"))
    verify = _seconds(setup, rows, tokens, compiled.get("verify"))
    if "verify" not in compiled and "decode" in compiled:
        # As much slower than the plain step as the analytic model says.
        ratio = roofline.decode_seconds(_at(setup, rows), tokens) / roofline.decode_seconds(_at(setup, rows))
        verify = plain * ratio
    return Gain(rows, setup.num_drafts, acceptance, plain, _seconds(draft, rows, 1, compiled.get("draft")), verify)


def _seconds(setup: Setup, rows: int, tokens: int, program: Compiled | None) -> float:
    """Of a step with `rows` rows of `tokens` tokens, scaled from the compiled one as the analytic model has it."""
    roof = roofline.decode_seconds(_at(setup, rows), tokens)
    if program is None or program.measurement is None:
        return roof / roofline.EFFICIENCY
    anchor = roofline.decode_seconds(setup, tokens)
    return roof * seconds_of(setup, anchor, program.measurement) / anchor


def _at(setup: Setup, rows: int) -> Setup:
    return dataclasses.replace(setup, rows=rows)


def _memory(setup: Setup, draft: Setup, rows: int, compiled: Mapping[str, Compiled]) -> Memory:
    """Of both models on one device: two of weights and KV, one of the rows' state, the larger of their temporaries."""
    own = {name: program for name, program in compiled.items() if name != "draft"}
    others = {"decode": compiled["draft"]} if "draft" in compiled else {}
    model, other = memory_of(_at(setup, rows), own, setup), memory_of(_at(draft, rows), others, draft)
    return dataclasses.replace(
        model,
        weights=model.weights + other.weights,
        kv=model.kv + other.kv,
        temporaries=max(model.temporaries, other.temporaries),
    )


def _basis(compiled: Mapping[str, Compiled]) -> Iterator[str]:
    if "verify" in compiled:
        yield "steps are read from the compiled schedules, with messages between chips; prefill and the host are not"
    yield "other rows are scaled by the analytic model; rows that draft with others' acceptance gain otherwise"


def as_text(p: DraftedPlan) -> str:
    """What `jaxllama plan --draft` prints."""
    return "\n".join(_lines(p)) + "\n"


def _lines(p: DraftedPlan) -> Iterator[str]:
    s, d, memory = p.setup, p.draft, p.memory
    model, other = (f"{num_params(setup.config) / 1e9:.2f}B" for setup in (s, d))
    yield f"{model} parameters in {s.weights}, a draft model of {other}, KV in {s.kv}"
    yield f"{s.rows:,} rows of {s.context:,} tokens on {describe_mesh(s)}"
    yield f"{s.num_drafts} tokens drafted of a row, each right with a probability of {p.acceptance:g}"
    yield ""
    words = "fits: yes," if p.fits else "fits: NO,"
    yield f"{words} {abs(memory.free) / _GIB:.2f} GiB {'free' if memory.free >= 0 else 'too much'} on each device"
    drafts = dict(zip(("weights", "kv"), p.draft_bytes, strict=True))
    for name in ("weights", "kv", "state", "temporaries"):
        part = f", {drafts[name] / _GIB:.2f} of them the draft model's" if name in drafts else ""
        yield f"  {name:<12}{getattr(memory, name) / _GIB:8.2f} GiB{part}"
    yield f"  {'total':<12}{memory.total / _GIB:8.2f} GiB of {memory.available / _GIB:.2f}"
    yield f"largest: {p.max_rows:,} rows of {s.context:,} tokens"
    yield ""
    names = ("rows", "plain ms", "draft ms", "verify ms", "round ms", "tokens", "plain t/s", "t/s", "gain")
    yield "".join(f"{name:>11}" for name in names)
    for gain in p.gains:
        times = "".join(f"{1e3 * t:>11.2f}" for t in (gain.plain_s, gain.draft_s, gain.verify_s, gain.round_s))
        plain = gain.rows / gain.plain_s
        rates = f"{gain.num_tokens:>11.2f}{plain:>11,.0f}{plain * gain.speedup:>11,.0f}{gain.speedup:>11.2f}"
        yield f"{gain.rows:>11}{times}{rates}{' <' if gain.rows == s.rows else ''}"
    yield ""
    ratio = p.gain.verify_s / p.gain.plain_s
    yield f"verifying {1 + s.num_drafts} positions of {s.rows:,} rows takes {ratio:.3f} times a plain step"
    yield ""
    yield from (f"note: {note}" for note in p.notes)


def as_json(p: DraftedPlan) -> dict[str, Any]:
    """Every figure by name: bytes per device, seconds, tokens per second of all rows."""
    s, memory = p.setup, p.memory
    weights, kv = p.draft_bytes
    return {
        "fits": p.fits,
        "method": "compiled" if p.compiled else "analytic",
        "topology": s.topology.name,
        "mesh": dict(s.mesh.shape),
        "num_params": num_params(s.config),
        "draft_num_params": num_params(p.draft.config),
        **{name: getattr(s, name) for name in ("weights", "kv", "rows", "context")},
        "draft_tokens": s.num_drafts,
        "acceptance": p.acceptance,
        "bytes_per_device": dataclasses.asdict(memory)
        | {"total": memory.total, "free": memory.free, "draft_weights": weights, "draft_kv": kv},
        "max_rows": p.max_rows,
        "gain": _gain_json(p.gain),
        "gains": [_gain_json(gain) for gain in p.gains],
        "programs": {name: dataclasses.asdict(program) for name, program in p.compiled.items()},
        "notes": list(p.notes),
    }


def _gain_json(gain: Gain) -> dict[str, float]:
    plain = gain.rows / gain.plain_s
    return {
        "rows": gain.rows,
        "plain_step_s": gain.plain_s,
        "draft_step_s": gain.draft_s,
        "verify_step_s": gain.verify_s,
        "round_s": gain.round_s,
        "tokens_a_round": gain.num_tokens,
        "plain_tokens_per_s": plain,
        "tokens_per_s": plain * gain.speedup,
        "speedup": gain.speedup,
    }
