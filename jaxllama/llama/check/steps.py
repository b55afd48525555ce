"""A decode step and a prefill chunk of a whole model, beside the planner's figures for these devices."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxllama.decode.params import SamplingParams
from jaxllama.decode.state import Chunk, Place, row_state
from jaxllama.engine.calls import Decode, Insert, Prefill, SetPageTable
from jaxllama.engine.device import Device
from jaxllama.engine.sizes import size_engine
from jaxllama.errors import PlanError
from jaxllama.llama.check.model import synthetic
from jaxllama.llama.check.result import BUDGET_S, Result, Status, judged
from jaxllama.model.cache import kv_bytes_per_token
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import num_page_shards
from jaxllama.model.params import param_specs
from jaxllama.model.platforms.chips import DEVICE_KINDS, GENERATIONS
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.plan.planner import Plan, plan
from jaxllama.plan.setup import Setup
from jaxllama.plan.topology import Topology
from jaxllama.weights.forms import fit

_STEPS = 8
_REPEATS = 5
_MAX_OVER = 1.5
"""Times the planner's upper end: slower than that, something is wrong. The end itself is an error beside published
times of a v5e-16; no other chip has told yet."""


def _sizes(mesh: Mesh) -> tuple[int, int, int]:
    """Rows, the context that they have room for, and a chunk's tokens at most."""
    return (4, 256, 128) if mesh.devices.flat[0].platform == "cpu" else (16, 2048, 512)


class Planner:
    """The planner's answer for these devices, and where the compiler is installed its own figures.

    Compiling takes minutes on few cores, so it begins at once, beside the other parts, and ends with their budget.
    """

    def __init__(self, config: LlamaConfig, mesh: Mesh) -> None:
        rows, context, chunk = _sizes(mesh)
        platform = describe_platform(config, mesh, dtype="bfloat16")
        chunk = max(size for size in platform.chunk_sizes if size <= chunk)
        self.setup = planned(config, mesh, rows, context // 2, chunk, platform.page_size)
        self._deadline = time.monotonic() + BUDGET_S
        self._plan: Plan | None = None
        self._thread = threading.Thread(target=self._compile, name="jaxllama-check-planner", daemon=True)
        if self.setup is not None:
            self._thread.start()

    def answer(self) -> Plan | None:
        """None for devices that it does not know. Waits for the compiler while there is time."""
        if self.setup is None:
            return None
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return self._plan or plan(self.setup, use_compiler=False)

    def close(self) -> None:
        """Ends the compiler."""
        self._deadline = 0.0
        if self.setup is not None:
            self._thread.join()

    def _compile(self) -> None:
        assert self.setup is not None
        self._plan = plan(self.setup, time_is_up=lambda: time.monotonic() > self._deadline)


def check_steps(
    name: str, config: LlamaConfig, mesh: Mesh, reached: dict[str, float], planner: Planner
) -> Iterator[Result]:
    """`config` in bfloat16 with rows at half of a context. `reached` are the devices' own figures, of `check_speed`."""
    rows, context, most = _sizes(mesh)
    run = _Running(config, mesh, rows, context, most)
    step, chunk = run.step_s(), run.chunk_s()
    figures = _figures(config, mesh, rows, context // 2, run.chunk)
    answer = planner.answer()
    for what, seconds, (num_bytes, flops) in (
        (f"a step of {rows} rows at {context // 2} tokens", step, figures["step"]),
        (f"a chunk of {run.chunk} tokens", chunk, figures["chunk"]),
    ):
        least = max(num_bytes / reached["bytes_per_s"], flops / reached["flops_per_s"])
        status: Status = "note"
        expected = f"{least * 1e3:,.2f} ms at the memory's and products' rate above"
        found = f"{seconds * 1e3:,.2f} ms, {least / seconds:.0%} of what the devices reached above"
        results: dict[str, Any] = {"seconds": seconds, "least_s": least, "planner_s": None}
        if answer is not None:
            low, middle, high = _planned_s(answer, is_step="step" in what)
            status = judged(seconds <= _MAX_OVER * high)
            by = "the compiler's schedule" if answer.method == "compiled" else "bytes and operations"
            expected = f"{low * 1e3:,.2f} to {high * 1e3:,.2f} ms by {by} for {answer.setup.where}; "
            expected += f"at most {_MAX_OVER:g} times that"
            results |= {"planner_s": middle, "planner_high_s": high, "method": answer.method}
        yield Result("model", f"{name}: {what}", status, found, expected, results)


def _planned_s(answer: Plan, *, is_step: bool) -> tuple[float, float, float]:
    """The range, and the time itself in its middle, of a step or of a chunk, which a first token takes with a step."""
    step, first = answer.step, answer.first_token
    if is_step:
        return step.low, step.seconds, step.high
    return first.low - step.low, first.seconds - step.seconds, first.high - step.high


def planned(config: LlamaConfig, mesh: Mesh, rows: int, context: int, chunk: int, page_size: int) -> Setup | None:
    """The planner's setup of these devices; None for a kind or a number that it does not know."""
    generation = GENERATIONS.get(DEVICE_KINDS.get(mesh.devices.flat[0].device_kind, ""))
    if generation is None:
        return None
    for size in generation.sizes:
        topology = Topology(generation, size)
        if topology.num_devices == mesh.size:
            try:
                return Setup(
                    config=config,
                    topology=topology,
                    rows=rows,
                    context=context,
                    chunk_tokens=chunk,
                    prompt_tokens=chunk,
                    page_size=page_size,
                )
            except PlanError:
                return None
    return None


def _figures(config: LlamaConfig, mesh: Mesh, rows: int, context: int, chunk: int) -> dict[str, tuple[float, float]]:
    """Bytes read and operations of one device, of a step and of a chunk at the beginning of a prompt."""
    matrices = [spec for spec in param_specs(config) if len(spec.shape) == 2]
    read = [spec.size for spec in matrices if spec.path[0] != "embed_tokens" or config.tie_word_embeddings]
    layers = sum(spec.size for spec in matrices if spec.path[0] == "layers")
    kv = rows * context * kv_bytes_per_token(config, np.dtype("bfloat16")) / mesh.size
    pairs = 4 * config.num_heads * config.head_dim * config.num_layers / mesh.size
    step = (2 * sum(read) / mesh.size + kv, 2 * sum(read) * rows / mesh.size + pairs * rows * context)
    return {"step": step, "chunk": (2 * layers / mesh.size, 2 * layers * chunk / mesh.size + pairs * chunk * chunk / 2)}


class _Running:
    """A model with every row in place."""

    def __init__(self, config: LlamaConfig, mesh: Mesh, rows: int, context: int, chunk: int) -> None:
        platform = describe_platform(config, mesh, dtype="bfloat16")
        self.page_size = platform.page_size
        self.chunk = max(size for size in platform.chunk_sizes if size <= chunk)
        shards = num_page_shards(mesh)
        self._sizes = sizes = size_engine(
            max_rows=rows,
            max_context=context,
            page_size=platform.page_size,
            chunk_sizes=(self.chunk,),
            num_shards=shards,
            tokens_per_row=context,
            min_rows=platform.min_rows,
        )
        params = fit(synthetic(config, mesh, "bfloat16"), platform)
        self._device = Device(
            config, params, mesh, sizes.state_shapes(config, np.dtype("bfloat16"), platform.head_layout), platform
        )
        params_of_rows = SamplingParams(temperature=0, ignore_eos=True)
        # At half of the context, so that there is room for the steps.
        prompt = [1] * (context // 2)
        self._row = row_state(config, params_of_rows, prompt=prompt, generated=[], remaining=context // 2, seed=0)
        a_row = (sizes.num_pages - 1) // sizes.rows_per_shard
        table = np.zeros((sizes.num_rows, sizes.table_width), np.int32)
        for row in range(sizes.num_rows):
            first = 1 + row % sizes.rows_per_shard * a_row
            table[row, : min(a_row, sizes.table_width)] = first + np.arange(min(a_row, sizes.table_width))
        self._table = table
        self._device.run(SetPageTable(table))

    def step_s(self) -> float:
        """Of many steps in one dispatch, so that its launch hardly counts."""
        keep = np.ones(self._sizes.num_rows, np.bool_)

        def prepare() -> None:
            for row in range(self._sizes.num_rows):
                self._device.run(Insert(np.int32(row), self._row))

        def steps() -> int:
            output = self._device.run(Decode(np.int32(_STEPS), keep, np.int32(self._sizes.num_rows)))
            return int(output.num_steps)

        return self._median(prepare, steps)

    def chunk_s(self) -> float:
        """A chunk at the beginning of a row."""
        tokens = np.ones(self.chunk, np.int32)

        def chunks() -> int:
            for row in range(2):
                place = Place(self._table[row], np.int32(row // self._sizes.rows_per_shard))
                self._device.run(Prefill(place, Chunk(tokens, np.int32(0), np.int32(self.chunk))))
            self._device.wait()
            return 2

        return self._median(lambda: None, chunks)

    def _median(self, prepare: Callable[[], None], run: Callable[[], int]) -> float:
        times = []
        for _ in range(1 + _REPEATS):
            prepare()
            self._device.wait()
            started = time.perf_counter()
            count = run()
            times.append((time.perf_counter() - started) / count)
        return median(times[1:])
