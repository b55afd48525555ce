"""Log-probabilities of given tokens, and what decoding must read from memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

from jaxllama import Llama, SamplingParams
from jaxllama.engine.options import StepReport
from jaxllama.errors import NonFiniteLogitsError, RequestError

pytestmark = pytest.mark.optimized

NAME = "divisible"


@pytest.mark.parametrize("length", [1, 2, 128, 129, 300])
def test_prompt_logprobs_are_those_of_the_reference(llama: Llama, length):
    ids = tiny.prompt_of(NAME, length)
    logits = tiny.reference_logits(NAME, ids)
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = list(llama.prompt_logprobs(ids, 3))
    assert [entry.token_id for entry in found] == ids[1:]
    for i, entry in enumerate(found):
        assert entry.logprob == pytest.approx(exact[i, ids[i + 1]], abs=1e-4)
        best = np.sort(exact[i])[::-1]
        np.testing.assert_allclose([value for _, value in entry.top], best[:3], atol=1e-4)
        assert best[entry.rank - 1] == pytest.approx(entry.logprob, abs=1e-4)


def test_scoring_between_requests_changes_no_bit_of_them(llama: Llama):
    params = SamplingParams(temperature=1, seed=5, max_tokens=20, logprobs=2)
    prompt = tiny.prompt_of(NAME, 30)
    before = llama.generate(prompt, params)
    list(llama.prompt_logprobs(tiny.prompt_of(NAME, 200), 20))
    assert llama.generate(prompt, params) == before


def test_scoring_stops_when_nobody_reads_on(llama: Llama):
    entries = llama.prompt_logprobs(tiny.prompt_of(NAME, 300))
    next(entries)
    entries.close()
    with pytest.raises(RequestError, match="num_top"):
        llama.prompt_logprobs([1, 2], 21)
    with pytest.raises(RequestError, match="from 0 to 279"):
        llama.prompt_logprobs([1, 280])


def test_a_prompt_that_makes_nan_is_an_error_and_not_a_figure():
    weights = dict(tiny.weights_of(NAME))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][7] = np.nan
    with tiny.make_llama(weights=weights) as llama:
        assert len(list(llama.prompt_logprobs([1, 2, 3, 4]))) == 3
        with pytest.raises(NonFiniteLogitsError):
            list(llama.prompt_logprobs([1, 7, 3, 4]))


def test_memory_traffic_counts_what_a_step_reads():
    with tiny.make_llama(tp=1) as one, tiny.make_llama(tp=4) as four:
        config = one.config
        # All but the embeddings, of which a step reads a few rows.
        held, embedding = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(one.params[name])) for name in ("layers", "lm_head")
        )
        traffic = one.memory_traffic()
        assert traffic.weight_bytes == held + embedding + one.params["norm"].nbytes
        assert traffic.kv_bytes_per_token == config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
        assert traffic.bytes_per_s is None
        report = StepReport(num_steps=3, num_rows=2, seconds=1.0, kv_tokens=10)
        assert traffic.read_bytes(report) == 3 * (traffic.weight_bytes + 10 * traffic.kv_bytes_per_token)
        assert four.memory_traffic().kv_bytes_per_token == traffic.kv_bytes_per_token / 4
        assert four.memory_traffic().weight_bytes < traffic.weight_bytes / 3


def test_the_engine_reports_every_dispatch():
    with tiny.make_llama() as llama:
        reports: list[StepReport] = []
        llama.engine.on_steps = reports.append
        llama.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=12, ignore_eos=True))
        assert sum(report.num_steps for report in reports) >= 12
        assert {report.num_rows for report in reports} <= {1, 2}
        assert max(report.num_rows for report in reports) == 2
        assert all(report.seconds > 0 and report.kv_tokens >= 3 for report in reports)
