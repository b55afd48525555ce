"""Options of a TPU's compiler: what the compiler at hand does not know is left out, or no program would compile."""

from __future__ import annotations

import jax
import pytest
import tiny

from jaxllama.model.mesh import make_mesh
from jaxllama.model.platforms import tpu
from jaxllama.model.platforms.cpu import COMPILER_OPTIONS


def test_options_that_a_compiler_lacks_are_seen():
    device = jax.devices()[0]
    assert tpu.are_known((), device)
    assert tpu.are_known(COMPILER_OPTIONS, device)
    assert not tpu.are_known((*COMPILER_OPTIONS, ("xla_tpu_no_such_option", 1)), device)


def test_what_a_compiler_does_not_know_it_is_not_given(monkeypatch: pytest.MonkeyPatch):
    mesh = make_mesh(tiny.config_of("tinyllama_like"), tp=1)
    kind = mesh.devices.flat[0].device_kind
    monkeypatch.setitem(tpu.DEVICE_KINDS, kind, "v6e")
    assert tpu.compiler_options(mesh) == ()
    monkeypatch.setitem(tpu._COMPILER_OPTIONS, "v6e", COMPILER_OPTIONS)
    assert tpu.compiler_options(mesh) == COMPILER_OPTIONS
