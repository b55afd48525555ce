"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxllama.model.params import num_params
from jaxllama.plan.planner import Estimate, Plan, collectives, describe_mesh

_GIB = 2**30
_WHAT = {"decode": "decode step", "prefill": "prefill chunk"}


def as_text(p: Plan) -> str:
    """What `jaxllama plan` prints."""
    return "\n".join(_lines(p)) + "\n"


def _lines(p: Plan) -> Iterator[str]:
    s, memory = p.setup, p.memory
    mesh = " x ".join(f"{name} {size}" for name, size in s.mesh.shape.items())
    size = f"{num_params(s.config) / 1e9:.2f}B parameters in {s.weights}"
    yield f"{size}, KV in {s.kv}, {s.rows:,} rows of {s.context:,} tokens"
    yield f"{s.topology.name}: {s.topology.num_chips} chips, {s.topology.num_devices} devices, mesh {mesh}"
    yield ""
    words = "fits: yes," if p.fits else "fits: NO,"
    yield f"{words} {abs(memory.free) / _GIB:.2f} GiB {'free' if memory.free >= 0 else 'too much'} on each device"
    for name in ("weights", "kv", "state", "temporaries"):
        yield f"  {name:<12}{getattr(memory, name) / _GIB:8.2f} GiB"
    yield f"  {'total':<12}{memory.total / _GIB:8.2f} GiB of {memory.available / _GIB:.2f}"
    yield f"largest: {p.max_rows:,} rows of {s.context:,} tokens, or {s.rows:,} rows of {p.max_context:,} tokens"
    if p.fits:
        yield from _speed(p)
    yield from _program(p)
    yield ""
    yield from (f"note: {note}" for note in p.notes)


def _speed(p: Plan) -> Iterator[str]:
    s = p.setup
    yield ""
    yield f"{p.method:<26}{'estimate':>10}{'range':>20}{'roofline':>11}"

    def row(name: str, e: Estimate) -> str:
        span = f"{e.low * 1e3:.1f} to {e.high * 1e3:.1f}"
        return f"{name:<26}{e.seconds * 1e3:>10.1f}{span:>20}{e.roofline * 1e3:>11.1f}"

    yield row("decode step, ms", p.step)
    low, high = s.rows / p.step.high, s.rows / p.step.low
    span = f"{low:,.0f} to {high:,.0f}"
    yield f"{'tokens/s, all rows':<26}{p.tokens_per_s:>10,.0f}{span:>20}{s.rows / p.step.roofline:>11,.0f}"
    yield row(f"first token of {s.prompt_tokens:,}, ms", p.first_token)
    if p.dollars_per_million_tokens is not None:
        yield f"{'$ per million tokens':<26}{p.dollars_per_million_tokens:>10.2f}"


def _program(p: Plan) -> Iterator[str]:
    layers = p.setup.config.num_layers
    for name, program in p.compiled.items():
        m = program.measurement
        if m is None:
            continue
        found = collectives(m, layers)
        copies = sum(copy.count for copy in m.large_copies)
        most = f", the largest {max(c.bytes for c in m.large_copies) / 2**20:.0f} MiB" if copies else ""
        yield ""
        yield f"the compiled {_WHAT[name]}, on one device:"
        if name == "prefill" and (num := p.setup.data * p.setup.chunks_in_group) > 1:
            yield f"  chunks         {num} of {p.setup.chunk_tokens:,} tokens a call, of any prompts"
        yield f"  collectives    {_counts(found['per_layer'])} a layer; {_counts(found['outside_layers'])} outside"
        if m.message_s:
            waited = f"{1e3 * m.exposed_s:.2f} ms of it waited for"
            yield f"  messages       {1e3 * m.message_s:.2f} ms on the links between chips, {waited}"
        yield f"  HBM traffic    {m.hbm_bytes / 1e9:.2f} GB, {m.async_share:.0%} of it copied beside computation"
        yield f"  large copies   {copies or 'none'}{most}"
        yield f"  temporaries    {program.temporary_bytes / _GIB:.2f} GiB, compiled in {program.compile_s:.0f} s"


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in kinds.items()) or "none"


def as_table(plans: Sequence[Plan]) -> str:
    """The plans of a search, one a line, in order."""
    columns = ("GiB free", "step ms", "tokens/s", "a chip", "max rows", "$/M")
    lines = [f"{'':>4}{'mesh':<36}{'method':<10}" + "".join(f"{column:>10}" for column in columns)]
    for number, p in enumerate(plans, 1):
        cost = p.dollars_per_million_tokens
        values = (
            f"{p.memory.free / _GIB:.1f}",
            f"{p.step.seconds * 1e3:.1f}",
            f"{p.tokens_per_s:,.0f}",
            f"{p.tokens_per_s / p.setup.topology.num_chips:,.0f}",
            f"{p.max_rows:,}",
            "-" if cost is None else f"{cost:.2f}",
        )
        lines.append(f"{number:>3} {describe_mesh(p.setup):<36}{p.method:<10}" + "".join(f"{v:>10}" for v in values))
    return "\n".join(lines) + "\n"
