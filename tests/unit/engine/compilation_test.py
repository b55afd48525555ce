"""Compilations happen once: nothing that a request may ask for makes another, and a later process reuses them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from collector import run
from jax.sharding import NamedSharding, PartitionSpec
from oracle.tiny_models import random_weights

from jaxllama import Llama, SamplingParams, make_mesh
from jaxllama.engine.compilation import (
    announced,
    compile_all,
    enable_compilation_cache,
    num_compilations,
    use_compilation_cache,
)
from jaxllama.model import native
from jaxllama.model.mesh import InPlace

CONTEXT = tiny.SMALL.max_context or 0
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=8)
NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


def prompt(length: int, seed: int = 0) -> list[int]:
    return tiny.prompt_of("divisible", length, seed)


class CompileCount:
    """How many programs JAX has compiled since it was made."""

    def __init__(self) -> None:
        self._start = num_compilations()

    @property
    def num(self) -> int:
        return num_compilations() - self._start


def test_compilations_are_counted():
    count = CompileCount()
    jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    assert count.num == 1
    jnp.zeros((3, 17, 5)) + 2  # an operation outside jit is a program of its own
    assert count.num >= 2


# ---- Several at a time ----


class Program:
    """What `compile_all` is given: `compile` meets the others at the barrier, or fails."""

    def __init__(self, barrier: threading.Barrier | None) -> None:
        self.barrier = barrier

    def compile(self) -> None:
        if self.barrier is None:
            raise ValueError("it does not compile")
        self.barrier.wait(10)


def test_programs_compile_side_by_side(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    steps: list[tuple[int, int, str]] = []
    barrier = threading.Barrier(2)
    programs = {name: lambda: Program(barrier) for name in "abcd"}
    compile_all(programs, lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(n, 4) for n in range(5)]
    assert steps[0][2] == "a, b"
    assert steps[-1][2] == "ready"


def test_a_program_that_does_not_compile_ends_the_others():
    with pytest.raises(ValueError, match="it does not compile"):
        compile_all({"bad": lambda: Program(None), "good": lambda: Program(threading.Barrier(1))}, lambda *_: None)


# ---- Nothing compiles after warm-up ----


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0, 0, 0.3, 1.0, 2.0]),
        top_p=rng.choice([1, 0.5, 0.9]),
        min_p=rng.choice([0, 0.1]),
        top_k=rng.choice([-1, 0, 5, 300]),
        max_tokens=rng.choice([1, 3, 20, 40]),
        min_tokens=rng.choice([0, 4]),
        presence_penalty=rng.choice([0, 1.0]),
        frequency_penalty=rng.choice([0, -0.5]),
        repetition_penalty=rng.choice([1, 1.3]),
        stop_token_ids=tuple(rng.sample(range(280), rng.randrange(5))),
        ignore_eos=rng.random() < 0.5,
        seed=rng.choice([None, 0, rng.getrandbits(63)]),
        logit_bias={rng.randrange(280): rng.uniform(-5, 5) for _ in range(rng.randrange(4))},
        logprobs=rng.choice([None, 0, 5, 20]),
        stop=tuple(rng.sample(["a", "Q", "the", "\n"], rng.choice([0, 0, 2]))),
        include_stop_str_in_output=rng.random() < 0.5,
    )


@pytest.mark.parametrize(("tp", "data"), [(1, 1), (2, 1), (2, 2)])
def test_nothing_compiles_after_warm_up(tp, data, tokenizer_folder):
    """Of a model and sizes that no other test has compiled for, or the programs would be there already."""
    rng = random.Random(1)
    steps: list[tuple[int, int, str]] = []
    options = dataclasses.replace(tiny.SMALL, num_pages=31)  # few: rows are set aside and come back
    sizes = {"max_position_embeddings": 1000 + 10 * tp + data}
    with tiny.make_llama(tp=tp, data=data, options=options, tokenizer_folder=tokenizer_folder, **sizes) as llama:
        before = CompileCount()
        llama.engine.warm_up(lambda *step: steps.append(step))
        assert before.num >= 4
        assert llama.engine.stats().ready
        count, in_stats = CompileCount(), llama.engine.stats().num_compilations
        for num in (1, 2, 3, 194 if tp == data == 1 else 20):
            # One prompt in four asks for several choices of it.
            prompts = [prompt(rng.randrange(1, CONTEXT), rng.getrandbits(32)) for _ in range(num)]
            prompts = [p for p in prompts for _ in range(rng.choice([1, 1, 1, 3]))]
            done = llama.generate(prompts, [random_params(rng) for _ in prompts])
            assert all(completion.finish_reason in ("stop", "length") for completion in done)
        llama.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=5))
        next(llama.stream("An early end", SamplingParams(max_tokens=30, ignore_eos=True)))
        assert count.num == 0
        assert llama.engine.stats().num_compilations == in_stats
    done_steps, totals, names = zip(*steps, strict=True)
    assert list(done_steps) == list(range(totals[0] + 1))
    assert set(totals) == {len(steps) - 1}
    assert all(names)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.4},
        {"temperature": 1.9, "top_k": 7},
        {"top_p": 0.3},
        {"min_p": 0.2},
        {"repetition_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1},
        {"seed": 2**63 - 1},
        {"logit_bias": {1: 2.0, 3: -1}},
        {"min_tokens": 3, "stop_token_ids": (1, 2, 3)},
        {"logprobs": 20},
        {"max_tokens": 17},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_new_value_does_not_recompile(llama: Llama, values):
    run(llama.engine, prompt(3), GREEDY)
    run(llama.engine, prompt(20), GREEDY)
    count = CompileCount()
    run(llama.engine, prompt(6), dataclasses.replace(GREEDY, **values))
    assert count.num == 0


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of the functions that are compiled meanwhile, or read from the cache on disk."""
    names: list[str] = []

    def listen(event: str, _: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("tp", "data", "has_kernels"), [(1, 1, True), (1, 1, False), (2, 2, True)])
def test_each_program_is_compiled_once(tp, data, has_kernels, compiled, monkeypatch):
    """At warm-up, whatever JAX would say of where results lie, which is where the first argument does; sizes are those
    of no other test. The embedding fills its blocks: then packing puts it, the first argument, on a device without its
    mesh."""
    if has_kernels and not native.is_available():
        pytest.skip("no kernels for this CPU")
    if not has_kernels:
        monkeypatch.setattr("jaxllama.model.platforms.cpu.native.is_available", lambda: False)
    sizes = {"max_position_embeddings": 2000 + 100 * has_kernels + 10 * tp + data, "num_hidden_layers": 1}
    sizes["vocab_size"] = 288
    weights = random_weights(tiny.MODELS["divisible"] | sizes, 0)
    with tiny.make_llama(tp=tp, data=data, weights=weights, **sizes) as llama:
        assert llama.engine.platform.packs_weights == has_kernels
        llama.engine.warm_up()
        num_buckets, num_sizes = len(llama.engine._row_buckets), len(llama.engine._plan.program_sizes)
        expected = {"decode_steps": num_buckets, "prefill": num_sizes, "prefill_scores": num_sizes}
        count = Counter(name.removeprefix("jit(").removesuffix(")") for name in compiled)
        assert {name: count[name] for name in expected} == expected
        assert count["insert"] <= 1  # which an earlier test may have compiled: its state has the same shapes
        before = len(compiled)
        run(llama.engine, prompt(40), GREEDY)
        assert compiled[before:] == []


def test_a_result_lies_where_what_was_given_lay():
    """Also where that is one device of a mesh, the same place as the device by itself. JAX says of results what it
    says of the first argument."""
    mesh = make_mesh(tiny.config_of("divisible"), tp=1)
    given = jax.device_put(np.zeros((3, 2), np.float32), NamedSharding(mesh, PartitionSpec(None, None)))
    other = jax.device_put(np.ones((3, 2), np.float32), jax.devices()[0])
    half = InPlace(lambda x, state: (state + x, x), "state", result=lambda state: (state, None))
    for _ in range(3):
        given, _ = half(other, given)
        assert given.sharding == NamedSharding(mesh, PartitionSpec(None, None))
    assert np.asarray(given).tolist() == [[3, 3]] * 3
    inside = jax.jit(lambda x: half(other, x)[0])
    assert np.asarray(inside(given)).tolist() == [[4, 4]] * 3


# ---- The cache on disk ----


@pytest.fixture
def _restored_config() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("_restored_config")
def test_the_folder_is_made_and_used(tmp_path):
    folder = tmp_path / "a" / "b"
    assert enable_compilation_cache(folder) == folder
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)


@pytest.mark.usefixtures("_restored_config")
def test_the_default_folder_is_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert enable_compilation_cache() == tmp_path / ".cache" / "jaxllama" / "xla"


@pytest.mark.usefixtures("_restored_config")
def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        enable_compilation_cache(tmp_path / "file" / "cache")


@pytest.mark.usefixtures("_restored_config")
def test_an_engine_keeps_programs_unless_it_or_jax_says_otherwise(tmp_path, monkeypatch):
    def used(setting: str | None, of_jax: str | None, enabled: bool = True) -> str | None:
        jax.config.update("jax_compilation_cache_dir", of_jax)
        jax.config.update("jax_enable_compilation_cache", enabled)
        use_compilation_cache(setting)
        return jax.config.jax_compilation_cache_dir

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    default, own, other = str(tmp_path / ".cache" / "jaxllama" / "xla"), str(tmp_path / "own"), str(tmp_path / "other")
    assert used(None, None) == default
    assert used(None, own) == own
    assert used(None, None, enabled=False) is None
    assert used("off", None) is None
    assert used("off", own) == own
    assert used(other, None) == used(other, own) == other


@pytest.mark.usefixtures("_restored_config")
def test_a_home_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache(None)
    with pytest.raises(OSError, match="file"):
        use_compilation_cache(tmp_path / "file" / "cache")


# ---- What is said of it ----


def _said(capsys, monkeypatch, seconds: float, *, watched: bool) -> list[str]:
    monkeypatch.setattr("jaxllama.engine.compilation.is_watched", lambda: watched)
    with announced("prefill of 32 tokens", after_s=0.1):
        time.sleep(seconds)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_long_compilation_says_so_and_how_long_it_took(capsys, monkeypatch):
    started, ended = _said(capsys, monkeypatch, 0.3, watched=True)
    assert started == "jaxllama: compiling prefill of 32 tokens …"
    assert ended.startswith("jaxllama: compiled prefill of 32 tokens in ")


def test_a_short_one_and_one_that_nobody_sees_are_silent(capsys, monkeypatch):
    assert _said(capsys, monkeypatch, 0.0, watched=True) == []
    assert _said(capsys, monkeypatch, 0.3, watched=False) == []


def test_the_first_use_of_a_program_is_announced_and_the_next_is_not(capsys, monkeypatch):
    """On a terminal, of an engine that was not told to be quiet, where compiling takes long: here any time is long."""
    said: list[str] = []

    @contextlib.contextmanager
    def say(what: str) -> Iterator[None]:
        said.append(what)
        yield

    monkeypatch.setattr("jaxllama.engine.device.announced", say)
    options = dataclasses.replace(tiny.SMALL, show_compilation=True)
    with tiny.make_llama(options=options) as llama:
        for _ in range(2):
            run(llama.engine, prompt(3), GREEDY)
        size, rows = llama.engine._plan.program_sizes[0], min(llama.engine._row_buckets)
        assert said == [f"prefill of {size} tokens", f"decode of {rows} rows"]
    said.clear()
    with tiny.make_llama(options=dataclasses.replace(options, show_compilation=False)) as llama:
        run(llama.engine, prompt(3), GREEDY)
    assert said == []


PROGRAM = """
import sys
import jax
from jaxllama.engine.compilation import enable_compilation_cache

enable_compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hit" in event else None)
jax.jit(lambda x: x * 3 + 1)(2.0)
print(len(hits))
"""


def test_a_second_process_reuses_what_the_first_compiled(tmp_path):
    def num_hits() -> int:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert num_hits() == 0
    assert any(tmp_path.iterdir())
    assert num_hits() > 0
