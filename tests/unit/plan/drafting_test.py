"""What the planner says of a draft model, against figures worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllama import LlamaConfig
from jaxllama.__main__ import main
from jaxllama.errors import PlanError
from jaxllama.plan import Setup, Topology, drafting, planner, roofline
from jaxllama.plan.compiler import Compiled, is_available
from jaxllama.plan.measure import Measurement
from jaxllama.plan.setup import resident_bytes

CONFIGS = Path(__file__).parents[3] / "bench" / "configs"
LLAMA_70B, LLAMA_8B = (
    LlamaConfig.from_hf(json.loads((CONFIGS / f"llama3-{size}.json").read_text())) for size in ("70b", "8b")
)


def setups(num_drafts: int = 4, acceptance: float = 0.75, rows: int = 8, **values: Any) -> tuple[Setup, Setup]:
    setup = Setup(LLAMA_70B, Topology.parse("v6e:2x4"), rows=rows, context=2048, **values)
    return drafting.drafted(setup, LLAMA_8B, num_drafts, acceptance)


def analytic(**values: Any) -> drafting.DraftedPlan:
    searches = values.pop("searches", False)
    acceptance = values.get("acceptance", 0.75)
    return drafting.plan_drafted(*setups(**values), acceptance, searches=searches, use_compiler=False)


def test_a_round_is_its_drafts_and_their_verification():
    got = analytic().gain
    model, draft = setups()
    assert got.num_tokens == pytest.approx(1 + 0.75 + 0.75**2 + 0.75**3 + 0.75**4)
    assert got.plain_s == pytest.approx(roofline.decode_seconds(model) / 0.75)
    # 40 tokens do not wait for the arithmetic: the weights are read once for all.
    assert got.verify_s == pytest.approx(got.plain_s)
    assert got.round_s == pytest.approx(got.verify_s + 4 * roofline.decode_seconds(draft) / 0.75)
    assert got.speedup == pytest.approx(got.num_tokens * got.plain_s / got.round_s)


def test_many_rows_pay_for_what_they_verify():
    gains = {gain.rows: gain for gain in analytic().gains}
    assert {1, 2, 4, 8, 16, 32, 64} <= set(gains)
    assert gains[1].speedup > gains[64].speedup
    many = analytic(rows=128, num_drafts=7).gain
    assert many.verify_s > many.plain_s


def test_nothing_is_gained_by_drafts_that_are_never_right():
    got = analytic(acceptance=0.0).gain
    assert got.num_tokens == 1
    assert got.speedup < 1


def test_memory_is_that_of_both_with_one_state():
    got, (model, draft) = analytic(), setups()
    own, other = resident_bytes(model), resident_bytes(draft)
    assert got.memory.weights == own.weights + other.weights
    assert got.memory.kv == own.kv + other.kv
    assert got.memory.state == own.state
    assert got.draft_bytes == (other.weights, other.kv)
    # What drafts are found in, 2,048 tokens of each row, and four masks more.
    plain = resident_bytes(dataclasses.replace(model, num_drafts=0))
    assert own.state - plain.state == model.num_rows * (2048 * 4 + 4 * 128_256 // 8)


def test_it_does_not_fit_where_only_the_model_does():
    alone = analytic()
    rows = alone.max_rows
    assert not analytic(rows=rows + 1).fits
    assert analytic(rows=rows).fits


def test_the_search_drafts_more_where_more_is_right():
    few, many = (analytic(acceptance=a, searches=True).setup.num_drafts for a in (0.3, 0.9))
    assert few < many


def test_compiled_steps_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def compiled(setup: Setup, program: str, *_: Any) -> Compiled:
        seconds = {"decode": 0.020, "verify": 0.022}[program] if setup.config is LLAMA_70B else 0.003
        step = Measurement(seconds, 0.0, 1e9, 0.5, (), {}, {}, 80, exposed_s=0.001)
        arguments = resident_bytes(setup).total + 2**20
        return Compiled(1.0, True, 0, arguments, 0, 2**24, 2**22, step)

    monkeypatch.setattr("jaxllama.plan.planner.compile_program", compiled)
    monkeypatch.setattr("jaxllama.plan.planner.is_available", lambda: True)
    said: list[str] = []
    got = drafting.plan_drafted(*setups(), 0.75, progress=said.append)
    # As the planner of one model takes a schedule, and the messages between its eight chips.
    want = [0.001 + planner._SCHEDULE_SCALE * seconds for seconds in (0.020, 0.022, 0.003)]
    assert [got.gain.plain_s, got.gain.verify_s, got.gain.draft_s] == pytest.approx(want)
    assert set(got.compiled) == {"decode", "verify", "draft"}
    assert sum("compiling" in line for line in said) == 3
    assert got.fits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_drafts": 0}, "draft tokens must be from 1 to 16, got 0"),
        ({"acceptance": 1.2}, "acceptance must be from 0 to 1, got 1.2"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, Any], words: str):
    with pytest.raises(PlanError, match=words):
        setups(**changes)


def test_models_that_do_not_go_together_are_refused():
    model, _ = setups()
    with pytest.raises(PlanError, match="the draft model has 32,000 tokens and the model 128,256"):
        drafting.drafted(model, dataclasses.replace(LLAMA_8B, vocab_size=32_000), 4, 0.7)
    with pytest.raises(PlanError, match="4 KV heads of the draft model and 8 of the model split differently over 8"):
        drafting.drafted(model, dataclasses.replace(LLAMA_8B, num_kv_heads=4), 4, 0.7)


@pytest.fixture
def _without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)


MODELS = (str(CONFIGS / "llama3-70b.json"), "--draft", str(CONFIGS / "llama3-8b.json"))


@pytest.mark.usefixtures("_without_libtpu")
def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]):
    flags = ("--topology", "v6e:2x4", "--rows", "8", "--draft-tokens", "3", "--acceptance", "0.7")
    assert main(["plan", *MODELS, *flags]) == 0
    text = capsys.readouterr().out
    for part in ("a draft model of 8.03B", "3 tokens drafted", "verifying 4 positions of 8 rows", "gain", "fits: yes"):
        assert part in text
    assert main(["plan", *MODELS, *flags, "--json", "--search"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["gain"]["speedup"] > 1
    assert value["gain"]["rows"] == 8
    assert value["bytes_per_device"]["draft_weights"] > 0


@pytest.mark.usefixtures("_without_libtpu")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--search",), "--topology is missing"),
        (("--topology", "v6e:2x4", "--plot", "x.png"), "--plot and --draft exclude each other"),
    ],
)
def test_what_it_cannot_answer_is_one_line(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str):
    assert main(["plan", *MODELS, *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.tpu_aot
@pytest.mark.skipif(not is_available(), reason="libtpu is not installed: pip install 'jaxllama[tpu]'")
def test_the_compiler_s_verification_of_two_layers():
    """Five positions of each row are verified in place, in little more than a plain step's time."""
    config = dataclasses.replace(LLAMA_70B, num_layers=2)
    draft = dataclasses.replace(LLAMA_8B, num_layers=1)
    setup = Setup(config, Topology.parse("v6e:2x4"), rows=8, context=1024)
    got = drafting.plan_drafted(*drafting.drafted(setup, draft, 4, 0.75), 0.75)
    assert set(got.compiled) == {"decode", "verify", "draft"}, got.notes
    verify = got.compiled["verify"]
    assert verify.output_bytes < resident_bytes(got.setup).kv / 4
    assert 1 <= got.gain.verify_s / got.gain.plain_s < 1.5
