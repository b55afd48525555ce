"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxllama.plan.planner import Estimate, Plan, describe_mesh

_GIB = 2**30


def as_text(p: Plan) -> str:
    """What `jaxllama plan` prints."""
    return "\n".join(_lines(p)) + "\n"


def _lines(p: Plan) -> Iterator[str]:
    s, memory = p.setup, p.memory
    mesh = " x ".join(f"{name} {size}" for name, size in s.mesh.shape.items())
    size = f"{s.config.num_params / 1e9:.2f}B parameters in {s.weights}"
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
    if p.decode is not None:
        yield from _program(p)
    yield ""
    yield from (f"note: {note}" for note in p.notes)


def _speed(p: Plan) -> Iterator[str]:
    s = p.setup
    yield ""
    yield f"{p.method:<26}{'estimate':>10}{f'within {p.band:.0%}':>20}{'roofline':>11}"

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
    decode, layers = p.decode, p.setup.config.num_layers
    assert decode is not None
    inside = {name: count // layers for name, count in decode.collectives.items() if count >= layers}
    outside = {name: count % layers for name, count in decode.collectives.items() if count % layers}
    yield ""
    yield "the compiled decode step, on one device:"
    yield f"  collectives    {_counts(inside)} a layer; {_counts(outside)} outside the layers"
    yield f"  HBM traffic    {decode.hbm_bytes / 1e9:.2f} GB, {decode.async_share:.0%} of it copied beside computation"
    copies = sum(copy.count for copy in decode.large_copies)
    most = f", the largest {max(c.bytes for c in decode.large_copies) / 2**20:.0f} MiB" if copies else ""
    yield f"  large copies   {copies or 'none'}{most}"
    times = ", ".join(f"{name} {program.compile_s:.0f} s" for name, program in p.compiled.items())
    yield f"  compiled in    {times}"


def _counts(collectives: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in collectives.items()) or "none"


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
