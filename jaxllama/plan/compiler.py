"""The TPU compiler, in a process of its own: `python -m jaxllama.plan.compiler` reads one job from standard input.

A process, because libtpu takes its settings from the environment before JAX is imported, writes to standard error,
may abort, and must not meet the JAX of the caller, which may run on a TPU. It needs no TPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxllama.decode.drafts import Drafting, Paths
from jaxllama.decode.state import Chunk, Place
from jaxllama.decode.steps import decode_steps, prefill
from jaxllama.errors import PlanError, one_line
from jaxllama.model.attention.reference import BLOCK_TOKENS
from jaxllama.model.config import LlamaConfig, RopeScaling
from jaxllama.model.mesh import make_mesh
from jaxllama.model.platforms.chips import GIB
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.model.platforms.platform import Platform
from jaxllama.model.platforms.startup import keep_weights_as_they_are
from jaxllama.plan import roofline
from jaxllama.plan.links import Links
from jaxllama.plan.measure import KernelWork, LargeCopy, Measurement, measure
from jaxllama.plan.setup import Setup
from jaxllama.plan.topology import Topology

PROGRAMS = ("decode", "verify", "prefill")
MISSING = "libtpu, the TPU compiler, is not installed: pip install 'jaxllama[tpu]'"

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # A cached program leaves no HLO to read.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


_POLL_S = 0.5


class CompilerError(Exception):
    """The compiler is missing or failed for another reason than memory."""


@dataclass(frozen=True)
class Compiled:
    """One program as the TPU compiler made it, per device.

    `argument_bytes` are resident inputs with the padding of their tiles, `output_bytes` what is not written in place
    of an input. When it does not fit, `required_bytes` is what the compiler asked for and the rest is zero or None.
    """

    compile_s: float
    fits: bool
    required_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    temporary_bytes: int = 0
    code_bytes: int = 0
    measurement: Measurement | None = None


def is_available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_program(setup: Setup, program: str, time_is_up: Callable[[], bool] = lambda: False) -> Compiled:
    """Compiles the real `decode`, `verify` (decode with drafts) or `prefill` program of `setup` for its topology.

    Raises: CompilerError when libtpu is missing or fails, or when `time_is_up` before it has ended; PlanError for what
    cannot be compiled yet.
    """
    if not is_available():
        raise CompilerError(MISSING)
    compiler = subprocess.Popen(
        [sys.executable, "-m", "jaxllama.plan.compiler"],
        env=os.environ | _ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with compiler:
        stdout, stderr = _output(compiler, written(setup, program), time_is_up)
    answer = stdout.strip().splitlines()[-1:] or ["{}"]
    try:
        result = json.loads(answer[0])
    except json.JSONDecodeError:
        result = {}
    if "refused" in result:
        raise PlanError(result["refused"])
    if "error" in result:
        raise CompilerError(f"the TPU compiler failed on {program} for {setup.topology.name}: {result['error']}")
    if not result:
        last = stderr.strip().splitlines()[-1:] or ["no message"]
        raise CompilerError(
            f"the TPU compiler ended with exit code {compiler.returncode} on {program}: {one_line(last[0])}"
        )
    if result["measurement"] is not None:
        copies = tuple(LargeCopy(**copy) for copy in result["measurement"].pop("large_copies"))
        result["measurement"] = Measurement(**result["measurement"], large_copies=copies)
    return Compiled(**result)


def _output(compiler: subprocess.Popen[str], job: str, time_is_up: Callable[[], bool]) -> tuple[str, str]:
    """What it prints, when it has ended. However this ends, it does too. Raises: CompilerError."""
    told: str | None = job
    try:
        while not time_is_up():
            try:
                return compiler.communicate(told, timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                told = None  # It has it, and what it printed since is kept.
        raise CompilerError("the TPU compiler had no more time")
    finally:
        compiler.kill()


def written(setup: Setup, program: str) -> str:
    """What the compiler's process is told."""
    return json.dumps(dataclasses.asdict(setup) | {"topology": setup.topology.name, "program": program})


def read(text: str) -> tuple[Setup, str]:
    """What `written` wrote."""
    job = json.loads(text)
    program, topology, config = job.pop("program"), Topology.parse(job.pop("topology")), _with_tuples(job.pop("config"))
    config["rope"] = RopeScaling(**_with_tuples(config["rope"]))
    return Setup(config=LlamaConfig(**config), topology=topology, **job), program


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone, and a configuration is hashed."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _main() -> None:
    setup, program = read(sys.stdin.read())
    try:
        result: dict[str, Any] = dataclasses.asdict(_compile(setup, program))
    except PlanError as error:
        result = {"refused": str(error)}
    except Exception as error:  # Whatever libtpu raises becomes one line for the caller.
        result = {"error": f"{type(error).__name__}: {one_line(error, 500)}"}
    print(json.dumps(result))


def _compile(setup: Setup, program: str) -> Compiled:
    generation = setup.topology.generation
    options = {"chip_config_name": generation.chip_config} if generation.chip_config else {}
    keep_weights_as_they_are()
    described: Any = topologies.get_topology_desc(platform="tpu", topology_name=setup.topology.name, **options)
    if len(described.devices) != setup.topology.num_devices:
        raise CompilerError(
            f"libtpu has {len(described.devices)} devices in {setup.topology.name}, "
            f"expected {setup.topology.num_devices}"
        )
    mesh = make_mesh(setup.config, tp=setup.tp, data=setup.data, devices=described.devices)
    kept = {"kv_dtype": setup.kv_dtype, "quantize": setup.quantize}
    platform = describe_platform(setup.config, mesh, dtype=jnp.bfloat16, **kept)
    lowered = _lower(setup, program, mesh, platform)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jaxllama-plan-") as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(time.monotonic() - started, False, required_bytes=_required_bytes(str(error)))
        compile_s = time.monotonic() - started
        texts = sorted(Path(folder).glob("*after_codegen.txt"), key=lambda path: path.stat().st_size)
        text = texts[-1].read_text()
    memory = compiled.memory_analysis()
    kernels, trips = _work(setup, program, platform)
    links = Links(setup.topology, tuple(tuple(device.coords) for device in mesh.devices.flat))
    return Compiled(
        compile_s=compile_s,
        fits=True,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        measurement=measure(text, generation, kernels=kernels, unknown_trips=trips, links=links),
    )


def _lower(setup: Setup, program: str, mesh: Mesh, platform: Platform) -> Any:
    """The program that the engine runs, for the devices of `mesh`."""
    params, state = setup.inputs(mesh, platform)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    if program in ("decode", "verify"):
        keep = jax.ShapeDtypeStruct((setup.num_rows,), jnp.bool_)
        options: dict[str, Any] = {"num_rows": setup.num_rows, "platform": platform}
        if program == "verify":
            paths = Paths.none(setup.num_rows, setup.num_drafts)
            drafting = Drafting(np.int32(0), np.zeros(1 + setup.num_drafts, np.float32), paths)
            options |= {"num_drafts": setup.num_drafts, "drafting": drafting}
        return decode_steps.lower(setup.config, params, state, number, keep, **options)
    if program == "prefill":
        num_chunks = platform.num_groups * setup.chunks_in_group
        rows = () if num_chunks == 1 else (num_chunks,)
        tokens = jax.ShapeDtypeStruct((*rows, setup.chunk_tokens), jnp.int32)
        table = jax.ShapeDtypeStruct((*rows, state.page_table.shape[1]), jnp.int32)
        number = jax.ShapeDtypeStruct(rows, jnp.int32)
        at = (Place(table, number), Chunk(tokens, number, number))
        return prefill.lower(setup.config, params, state.pool, *at, platform=platform)
    raise PlanError(f"program must be one of {', '.join(PROGRAMS)}, got {program!r}")


def _work(setup: Setup, program: str, platform: Platform) -> tuple[KernelWork, tuple[int, ...]]:
    """What Pallas kernels do, and the trips of loops that depend on data.

    Those are steps; then groups of layers, which run once, or the reference's blocks of keys.
    """
    is_decode = program != "prefill"
    kernels = roofline.decode_kernels(setup) if is_decode else roofline.prefill_kernels(setup)
    context = setup.context if is_decode else roofline.mean_prefill_context(setup)
    inner = 1 if platform.layers_per_loop else max(1, math.ceil(context / BLOCK_TOKENS))
    return kernels, ((1, inner) if is_decode else (inner,))


def _required_bytes(message: str) -> int:
    """What a RESOURCE_EXHAUSTED error says the program needs in all, 0 where it does not say."""
    number = r"([\d.]+)([KMGT])"
    found = re.search(rf"Used {number}", message) or re.search(rf"total memory required[^(]*\({number}\)", message)
    if found is None:
        return 0
    return int(float(found.group(1)) * GIB * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[found.group(2)])


if __name__ == "__main__":
    _main()
