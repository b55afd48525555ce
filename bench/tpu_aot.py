"""Compiles the 70B and the 8B for the TPU slices that people rent and prints what the compiler says beside our bars.

    python bench/tpu_aot.py                      # everything: an hour on a laptop
    python bench/tpu_aot.py --only 70b:v6e:2x4   # cases whose name contains it

Needs libtpu (pip install 'jaxllama[tpu]'), not a TPU. Times are estimates from the schedule, see
`jaxllama.plan.measure`, with messages between chips beside them: the links' time, and what of it nothing hides.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from jaxllama import LlamaConfig
from jaxllama.errors import PlanError
from jaxllama.plan import Setup, Topology, roofline
from jaxllama.plan.compiler import Compiled, CompilerError, compile_program
from jaxllama.plan.planner import collectives
from jaxllama.plan.setup import resident_bytes

CONFIGS = Path(__file__).parent / "configs"
CONTEXT = 2048
CHUNK = 2048
COLUMNS = (
    "case",
    "fits",
    "weights + KV GiB",
    "temporaries GiB",
    "code MiB",
    "copies > 4 MiB",
    "a layer",
    "outside",
    "HBM / least",
    "async",
    "ms",
    "messages ms",
    "waited ms",
    "bar ms",
    "roofline ms",
    "compile s",
    "misses",
)


@dataclass(frozen=True)
class Case:
    """One program. `bar_ms` and `bar_async` are what it has to reach, None where nobody measured one."""

    model: str
    topology: str
    rows: int
    weights: str = "bf16"
    program: str = "decode"
    bar_ms: float | None = None
    bar_async: float | None = None

    @property
    def name(self) -> str:
        what = f"{self.rows} rows" if self.program == "decode" else f"{CHUNK} tokens"
        return f"{self.model}:{self.topology}:{self.weights}:{self.program}:{what}"


CASES = (
    Case("70b", "v6e:2x4", 64, bar_ms=15.2, bar_async=0.4),
    Case("70b", "v6e:2x4", 8, bar_ms=12.3, bar_async=0.4),
    Case("70b", "v5e:4x4", 64, bar_ms=15.7, bar_async=0.45),
    Case("70b", "v5p:2x2x1", 64, bar_ms=28.5),
    Case("70b", "v5e:2x4", 64, "int8", bar_ms=21.0, bar_async=0.6),
    Case("70b", "v5e:4x4", 8, "int8", bar_ms=7.1, bar_async=0.8),
    Case("70b", "v5e:4x4", 128, "int8", bar_ms=24.4, bar_async=0.8),
    Case("70b", "v6e:2x4", 64, program="prefill", bar_ms=60.0),
    Case("70b", "v5e:4x4", 64, program="prefill", bar_ms=120.0),
    Case("70b", "v5p:2x2x1", 64, program="prefill", bar_ms=192.0),
    Case("70b", "v5e:2x4", 64, "int8", "prefill", bar_ms=238.0),
    Case("8b", "v6e:1x1", 64),
    Case("8b", "v5e:2x2", 64),
    Case("8b", "v5e:2x4", 64),
    Case("8b", "v5p:1x1x1", 64),
)


def misses(case: Case, setup: Setup, got: Compiled, ms: float, least_bytes: float) -> list[str]:
    """The bars that a decode program does not reach, in docs/tpu.md's words."""
    found = ["time"] if case.bar_ms is not None and ms > case.bar_ms else []
    if case.program != "decode" or got.measurement is None:
        return found
    m = got.measurement
    kinds = collectives(m, setup.config.num_layers)
    expected = {"all-reduce": 2} if setup.tp > 1 else {}
    expected |= {"all-to-all": 2} if setup.mesh.shape["rep"] > 1 else {}
    slack = 1.03 if case.topology.startswith("v5p") else 1.01
    bars = {
        "temporaries": got.temporary_bytes <= 0.1 * 2**30,
        "copies": not m.large_copies,
        "traffic": m.hbm_bytes <= slack * least_bytes,
        "collectives a layer": kinds["per_layer"] == expected,
        "collectives outside": sum(kinds["outside_layers"].values()) <= 4,
        "async": case.bar_async is None or m.async_share >= case.bar_async,
        "compile": got.compile_s <= 25,
    }
    return found + [name for name, is_met in bars.items() if not is_met]


def run(case: Case) -> dict[str, object]:
    """One line of the table."""
    config = LlamaConfig.from_hf(json.loads((CONFIGS / f"llama3-{case.model}.json").read_text()))
    topology = Topology.parse(case.topology)
    setup = Setup(
        config,
        topology,
        rows=case.rows,
        context=CONTEXT,
        weights=case.weights,
        chunk_tokens=CHUNK,
        prompt_tokens=CHUNK,
    )
    is_decode = case.program == "decode"
    least_s = roofline.decode_seconds(setup) if is_decode else roofline.chunk_seconds(setup)
    resident = resident_bytes(setup)
    line: dict[str, object] = {"case": case.name, "roofline ms": round(1e3 * least_s, 1), "bar ms": case.bar_ms or "-"}
    line["weights + KV GiB"] = round((resident.weights + resident.kv) / 2**30, 2)
    try:
        got = compile_program(setup, case.program)
    except (CompilerError, PlanError) as error:
        return line | {"misses": str(error)}
    line |= {"fits": got.fits, "compile s": round(got.compile_s)}
    if got.measurement is None:
        return line | {"misses": f"needs {got.required_bytes / 2**30:.2f} GiB"}
    m, found = got.measurement, collectives(got.measurement, config.num_layers)
    least_bytes = least_s * topology.generation.hbm_bytes_per_s if is_decode else 0.0
    ms = 1e3 * m.seconds
    return line | {
        "temporaries GiB": round(got.temporary_bytes / 2**30, 3),
        "code MiB": round(got.code_bytes / 2**20),
        "copies > 4 MiB": sum(copy.count for copy in m.large_copies),
        "a layer": ", ".join(f"{count} {name}" for name, count in found["per_layer"].items()) or "-",
        "outside": ", ".join(f"{count} {name}" for name, count in found["outside_layers"].items()) or "-",
        "HBM / least": round(m.hbm_bytes / least_bytes, 3) if is_decode else "-",
        "async": round(m.async_share, 2),
        "ms": round(ms, 1),
        "messages ms": round(1e3 * m.message_s, 2),
        "waited ms": round(1e3 * m.exposed_s, 2),
        "misses": ", ".join(misses(case, setup, got, ms, least_bytes)) or "none",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the lines there too")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        sys.exit(f"no case contains {args.only!r}; they are: {', '.join(case.name for case in CASES)}")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    lines = []
    for case in cases:
        print(f"compiling {case.name} ...", file=sys.stderr, flush=True)
        lines.append(run(case))
        print(f"| {' | '.join(str(lines[-1].get(column, '-')) for column in COLUMNS)} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
