"""The same bits for a request alone, in a batch, in other chunks, and for one query and several.

That a row does not notice its batch holds everywhere. The others are promised where `Platform.programs_agree`, and
worth knowing elsewhere: what holds on a kind of device may be promised there.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxllama.decode.params import SamplingParams
from jaxllama.engine.engine import Engine
from jaxllama.engine.options import EngineOptions
from jaxllama.engine.scheduling.request import TokenOutput
from jaxllama.errors import EngineError
from jaxllama.llama.check.model import synthetic
from jaxllama.llama.check.result import Result, Status, judged
from jaxllama.model.config import LlamaConfig
from jaxllama.model.platforms.describe import describe_platform
from jaxllama.weights.forms import fit

_NUM_TOKENS = 12
_TIMEOUT_S = 150.0
type Answer = tuple[list[int], list[float]]


def check_bits(config: LlamaConfig, mesh: Mesh, dtype: str = "bfloat16") -> Iterator[Result]:
    """Two layers, greedy, tokens and log-probabilities of each."""
    config = config.cut_to(min(2, config.num_layers))
    platform = describe_platform(config, mesh, dtype=dtype)
    params = fit(synthetic(config, mesh, dtype), platform)
    small = min(platform.chunk_sizes)
    context = 4 * small
    options = EngineOptions(max_rows=4, max_context=context, device_timeout_s=_TIMEOUT_S, show_compilation=False)
    rng = np.random.default_rng(2)
    stem = rng.integers(0, config.vocab_size, 7).tolist()
    # The second repeats itself, so that there are drafts.
    lengths = (2 * small + 5, small + 3, 3)
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
    prompts[1] = (stem * len(prompts[1]))[: len(prompts[1])]

    def run(together: bool, **changes: Any) -> list[Answer]:
        engine = Engine(config, params, mesh, dataclasses.replace(options, **changes))
        try:
            if together:
                return _answers(engine, prompts)
            # Each in a scope of its own: what the cache has of another would be other programs' work.
            return [_answers(engine, [prompt], scope=str(i))[0] for i, prompt in enumerate(prompts)]
        finally:
            engine.close()

    alone = run(together=False)
    yield _compared("a row alone, and in a batch", alone, run(together=True), promised=True)
    promised = platform.programs_agree
    chunks = run(together=False, chunk_sizes=(small,))
    yield _compared(f"in chunks as they come, and of {small}", alone, chunks, promised=promised)
    drafted = run(together=True, speculation="lookup")
    yield _compared("one query a step, and several (speculation)", alone, drafted, promised=promised)
    # The answer's own beginning as part of the prompt: prefilled then, decoded before.
    split = _NUM_TOKENS // 2
    engine = Engine(config, params, mesh, options)
    try:
        longer = [[*prompt, *tokens[:split]] for prompt, (tokens, _) in zip(prompts, alone, strict=True)]
        rest = _answers(engine, longer, num_tokens=_NUM_TOKENS - split)
    finally:
        engine.close()
    want = [(tokens[split:], values[split:]) for tokens, values in alone]
    yield _compared("decoded, and prefilled", want, rest, promised=promised)


def _compared(what: str, one: list[Answer], other: list[Answer], *, promised: bool) -> Result:
    same = one == other
    apart = max(
        (abs(a - b) for (_, x), (_, y) in zip(one, other, strict=True) for a, b in zip(x, y, strict=False)), default=0.0
    )
    status: Status = judged(same) if promised else "note"
    found = "the same bits" if same else f"OTHER BITS, log-probabilities up to {apart:.1g} apart"
    expected = "the same bits" if promised else "not promised here"
    return Result("same bits", what, status, found, expected, {"same": same, "apart": apart})


def _answers(
    engine: Engine, prompts: Sequence[list[int]], *, scope: str = "", num_tokens: int = _NUM_TOKENS
) -> list[Answer]:
    """What the engine answers to all of them at once."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_tokens, logprobs=0)
    found: list[Answer] = [([], []) for _ in prompts]
    ended = [threading.Event() for _ in prompts]
    errors: list[Exception] = []

    def collect(index: int, output: TokenOutput) -> None:
        found[index][0].extend(output.token_ids)
        found[index][1].extend(entry.logprob for entry in output.logprobs)
        if output.error is not None:
            errors.append(output.error)
        if output.finish_reason is not None:
            ended[index].set()

    for index, prompt in enumerate(prompts):
        engine.submit(prompt, params, partial(collect, index), cache_scope=scope)
    for event in ended:
        if not event.wait(_TIMEOUT_S):
            raise EngineError(f"no answer within {_TIMEOUT_S:.0f} s: {engine.health() or 'the engine is well'}")
    if errors:
        raise errors[0]
    return found
