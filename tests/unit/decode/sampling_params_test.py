"""`SamplingParams` refuses by name what is out of range."""

from __future__ import annotations

from typing import Any

import pytest

from jaxllama import SamplingParams
from jaxllama.decode.params import CONTROLS
from jaxllama.decode.sampling import FILTERS, PENALTIES, ControlArrays
from jaxllama.errors import RequestError

BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "1"),
    ("temperature", None),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("top_k", -2),
    ("top_k", 1000),
    ("top_k", 1.0),
    ("top_k", True),
    ("max_tokens", -1),
    ("max_tokens", 1_000_001),
    ("max_tokens", 2**64),
    ("max_tokens", 1.5),
    ("min_tokens", -1),
    ("min_tokens", None),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", float("nan")),
    ("repetition_penalty", 0),
    ("repetition_penalty", 5.1),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", "7"),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("stop", ["x"] * 17),
    ("stop", [""]),
    ("stop", ["x" * 1025]),
    ("stop", [3]),
    ("stop_token_ids", list(range(65))),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**31]),
    ("stop_token_ids", [1.0]),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ("logit_bias", {-1: 0.0}),
    ("logit_bias", {"5": 0.0}),
    ("logit_bias", {5: 101}),
    ("logit_bias", {5: float("nan")}),
    ("logit_bias", {5: None}),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:24])
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert (caught.value.param or "").startswith(name)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0, "top_p": 1, "min_p": 0, "top_k": -1, "max_tokens": 0},
        {"temperature": 2, "top_p": 1e-9, "min_p": 1, "top_k": 999, "max_tokens": 1_000_000, "min_tokens": 1_000_000},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.01, "seed": 0, "logprobs": 0},
        {"repetition_penalty": 5, "seed": 2**63 - 1, "logprobs": 20, "stop": ["é" * 512] * 16},
        {"stop_token_ids": list(range(64)), "logit_bias": dict.fromkeys(range(1024), -100)},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(values):
    SamplingParams(**values)


def test_stop_may_be_one_string():
    assert SamplingParams(stop="abc").stop == ("abc",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "bc"]).stop == ("a", "bc")  # type: ignore[arg-type]


def test_parameters_do_not_change_with_what_they_were_made_of():
    bias, stops = {1: 2.0}, [5]
    params = SamplingParams(logit_bias=bias, stop_token_ids=stops)  # type: ignore[arg-type]
    bias[2], stops[0] = 1.0, 6
    assert params.logit_bias == {1: 2.0}
    assert params.stop_token_ids == (5,)


@pytest.mark.parametrize("values", [{"stop_token_ids": (257,)}, {"logit_bias": {257: 1.0}}])
def test_ids_outside_the_vocabulary_are_refused(values):
    params = SamplingParams(**values)
    params.validate_vocab(258)
    with pytest.raises(RequestError, match="257 is outside") as caught:
        params.validate_vocab(257)
    assert caught.value.param in values


# ---- One description of each control ----


@pytest.mark.parametrize("name", CONTROLS)
def test_a_default_is_allowed_and_stays_as_it_is(name):
    assert CONTROLS[name].check(name, CONTROLS[name].default) == getattr(SamplingParams(), name)


@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control.off])
def test_what_is_off_is_allowed_and_comes_to_the_device_as_one_value(name):
    control = CONTROLS[name]
    for value in control.off:
        assert control.on_device(getattr(SamplingParams(**{name: value}), name)) == control.off[0]


def test_the_device_filters_by_controls_that_can_be_off():
    for name in (*FILTERS, *PENALTIES):
        assert name in ControlArrays._fields
        assert CONTROLS[name].off


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_a_boolean_is_true_or_false(value):
    with pytest.raises(RequestError, match="ignore_eos must be a boolean"):
        SamplingParams(ignore_eos=value)
