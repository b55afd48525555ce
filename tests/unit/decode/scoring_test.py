"""Log-probabilities of given tokens through the engine, and what decoding must read from memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from oracle.tiny_models import random_weights

from jaxllama import Llama, SamplingParams
from jaxllama.engine.options import StepReport
from jaxllama.errors import ContextLengthError, NonFiniteLogitsError, RequestError

pytestmark = pytest.mark.optimized

NAME = "divisible"
SIZES = replace(tiny.SMALL, max_context=384, num_pages=401, chunk_sizes=(8, 32, 160))


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    """With a context that several chunks fill, one of them of more than a block of the head."""
    with tiny.make_llama(options=SIZES) as model:
        yield model


def exact_logprobs(ids: list[int]) -> np.ndarray:
    """Float64 log-probabilities of every token after each of `ids`."""
    logits = tiny.reference_logits(NAME, ids)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("length", [1, 2, 9, 129, 300])
def test_prompt_logprobs_are_those_of_the_reference(llama: Llama, length):
    ids = tiny.prompt_of(NAME, length)
    exact = exact_logprobs(ids)
    found = list(llama.prompt_logprobs(ids, 3))
    assert [entry.token_id for entry in found] == ids[1:]
    for i, entry in enumerate(found):
        assert entry.logprob == pytest.approx(exact[i, ids[i + 1]], abs=1e-4)
        best = np.sort(exact[i])[::-1]
        np.testing.assert_allclose([value for _, value in entry.top], best[:3], atol=1e-4)
        assert best[entry.rank - 1] == pytest.approx(entry.logprob, abs=1e-4)
        assert entry.is_greedy == (entry.top[0][0] == entry.token_id) == (entry.rank == 1)


@pytest.mark.parametrize("options", [{}, {"data": 2, "tp": 2}], ids=["one device", "four devices"])
def test_continuations_have_the_log_probabilities_of_the_reference(options):
    """Endings of one context, long and short contexts, and a continuation that greedy decoding would say."""
    contexts = [tiny.prompt_of(NAME, length, seed) for seed, length in enumerate([1, 4, 7, 40, 41])]
    with tiny.make_llama(options=SIZES, **options) as llama:
        greedy = llama.generate(contexts[3], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)).token_ids
        endings = [tiny.prompt_of(NAME, length, 50 + length) for length in (1, 2, 9, 17)]
        pairs = [(context, ending) for context in contexts for ending in endings] + [(contexts[3], list(greedy))]
        scores = llama.score(*map(list, zip(*pairs, strict=True)), per_token=True)
        again = llama.score(*map(list, zip(*pairs[::-1], strict=True)), per_token=True)[::-1]
        assert scores == again
    for (context, ending), score in zip(pairs, scores, strict=True):
        exact = exact_logprobs([*context, *ending])[len(context) - 1 : -1]
        own = exact[np.arange(len(ending)), ending]
        assert score.logprob == pytest.approx(own.sum(), abs=1e-4)
        np.testing.assert_allclose([token.logprob for token in score.tokens], own, atol=1e-4)
        assert score.is_greedy == bool((exact.argmax(axis=1) == ending).all())
        assert score.num_tokens == len(ending)
    assert scores[-1].is_greedy


def test_one_context_of_several_endings_is_computed_once(llama: Llama):
    context = tiny.prompt_of(NAME, 64, 9)
    before = llama.engine.stats()
    scores = llama.score(context, [[i, i + 1] for i in range(8)])
    after = llama.engine.stats()
    assert after.num_prompt_tokens - before.num_prompt_tokens == 8 * 66
    # All but the context's last token, whose logits say how likely an ending's first one is, or but its last page.
    own = 63 if llama.engine.platform.starts_anywhere else 60
    assert after.num_prompt_tokens_cached - before.num_prompt_tokens_cached == 7 * own
    assert [score.tokens for score in scores] == [None] * 8
    assert llama.score(context, [[i, i + 1] for i in range(8)]) == scores


def test_scores_do_not_depend_on_what_else_runs():
    """Nor do a request's bits on what is scored beside it; pages run out, and requests are set aside meanwhile."""
    contexts = [tiny.prompt_of(NAME, 30 + 3 * i, i) for i in range(6)]
    params = SamplingParams(temperature=1, seed=5, max_tokens=50, logprobs=2, ignore_eos=True)
    with tiny.make_llama(options=replace(tiny.SMALL, num_pages=49)) as llama:
        alone = [llama.score(context, [1, 2, 3]) for context in contexts]
        said = llama.generate(contexts, params)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(llama.generate, contexts, params), pool.submit(llama.score, contexts, [[1, 2, 3]] * 6)]
            assert both[0].result() == said
            assert both[1].result() == alone


def test_texts_are_encoded_as_one_and_spaces_belong_to_what_follows(tokenizer_folder):
    with tiny.make_llama(tokenizer_folder=tokenizer_folder) as llama:
        encode = llama.tokenizer.encode
        ids = encode("What is this? A cat")
        assert llama.score("What is this?", " A cat") == llama.score(ids[:13], ids[13:])
        assert llama.score("What is this? ", "A cat") == llama.score("What is this?", " A cat")
        assert llama.score("What", [" A", encode(" A")]) == [llama.score("What", " A")] * 2
        for prompts, continuations, message in (
            ("", "a", "no tokens"),
            ("a", "", "no tokens"),
            (["a", "b"], ["c"], "2 prompts and 1"),
            ("a", [[280]], "from 0 to 279"),
            ("a" * 90, "b" * 10, "than the 97"),
        ):
            with pytest.raises(RequestError, match=message):
                llama.score(prompts, continuations)


def test_a_warm_engine_scores_without_compiling():
    """And a context may be full to its last token, of which nothing follows."""
    with tiny.make_llama(options=SIZES) as llama:
        llama.engine.warm_up()
        before = llama.engine.stats().num_compilations
        for length in (2, 9, 33, 200, 385):
            assert len(list(llama.prompt_logprobs(tiny.prompt_of(NAME, length), length % 21))) == length - 1
        assert llama.engine.stats().num_compilations == before


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
    with pytest.raises(ContextLengthError, match="than the 385"):
        llama.prompt_logprobs([1] * 386)
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
    # A device's parts of matrices fill their blocks.
    sizes = {"intermediate_size": 256}
    weights = random_weights(tiny.MODELS["divisible"] | sizes, 0)
    one, four = (tiny.make_llama(tp=tp, weights=weights, **sizes) for tp in (1, 4))
    with one, four:
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
