"""A decode step and a prefill chunk of a whole model, beside the planner's figures for these devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
from jax.sharding import Mesh

from jaxllama.decode.params import SamplingParams
from jaxllama.decode.state import Chunk, Place, row_state
from jaxllama.engine.calls import Decode, Insert, Prefill, SetPageTable
from jaxllama.engine.device import Device
from jaxllama.engine.sizes import size_engine
from jaxllama.errors import PlanError
from jaxllama.llama.check.model import synthetic
from jaxllama.llama.check.result import Result, Status, judged
from jaxllama.model.cache import kv_bytes_per_token
from jaxllama.model.config import LlamaConfig
from jaxllama.model.mesh import num_page_shards
from jaxllama.model.params import param_specs
from jaxllama.model.platforms.chips import DEVICE_KINDS, GENERATIONS
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.plan import roofline
from jaxllama.plan.planner import plan
from jaxllama.plan.setup import Setup
from jaxllama.plan.topology import Topology
from jaxllama.weights.forms import fit

_STEPS = 8
_REPEATS = 5
_MAX_SLOWER = 1.0 / 0.4
"""Of the roofline: slower than that, something is wrong."""


def check_steps(name: str, config: LlamaConfig, mesh: Mesh, reached: dict[str, float]) -> Iterator[Result]:
    """`config` in bfloat16 with rows at half of a context. `reached` are the devices' own figures, of `check_speed`."""
    is_host = mesh.devices.flat[0].platform == "cpu"
    rows, context = (4, 256) if is_host else (16, 2048)
    run = _Running(config, mesh, rows, context, 128 if is_host else 512)
    setup = planned(config, mesh, rows, context // 2, run.chunk, run.page_size)
    step, chunk = run.step_s(), run.chunk_s()
    figures = _figures(config, mesh, rows, context // 2, run.chunk)
    for what, seconds, (num_bytes, flops) in (
        (f"a step of {rows} rows at {context // 2} tokens", step, figures["step"]),
        (f"a chunk of {run.chunk} tokens", chunk, figures["chunk"]),
    ):
        least = max(num_bytes / reached["bytes_per_s"], flops / reached["flops_per_s"])
        status: Status = "note"
        expected = f"{least * 1e3:,.2f} ms at the memory's and products' rate above"
        found = f"{seconds * 1e3:,.2f} ms, {least / seconds:.0%} of what the devices reached above"
        planner_s = None
        if setup is not None:
            is_step = "step" in what
            planned_step = plan(setup, use_compiler=False).step
            roof = planned_step.roofline if is_step else roofline.chunk_seconds(setup)
            planner_s = planned_step.seconds if is_step else roof / roofline.EFFICIENCY
            status = judged(seconds <= roof * _MAX_SLOWER)
            expected = (
                f"the planner says {planner_s * 1e3:,.2f} ms (±40 %, limit {roof * 1e3:,.2f}) for {setup.topology.name}"
            )
        results = {"seconds": seconds, "least_s": least, "planner_s": planner_s}
        yield Result("model", f"{name}: {what}", status, found, expected, results)


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
