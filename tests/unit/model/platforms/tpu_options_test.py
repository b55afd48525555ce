"""Options of a TPU's compiler: what the compiler at hand does not know is left out, or no program would compile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxllama.model.mesh import make_mesh
from jaxllama.model.platforms import tpu
from jaxllama.model.platforms.cpu import COMPILER_OPTIONS, PLAIN
from jaxllama.model.platforms.platform import Platform
from jaxllama.model.platforms.program import program


def test_options_that_a_compiler_lacks_are_seen():
    device = jax.devices()[0]
    assert tpu.are_known((), device)
    assert tpu.are_known(COMPILER_OPTIONS, device)
    assert not tpu.are_known((*COMPILER_OPTIONS, ("xla_tpu_no_such_option", 1)), device)


def test_what_a_compiler_does_not_know_it_is_not_given(monkeypatch: pytest.MonkeyPatch):
    mesh = make_mesh(tiny.config_of("tinyllama_like"), tp=1)
    kind = mesh.devices.flat[0].device_kind
    monkeypatch.setitem(tpu.DEVICE_KINDS, kind, "v6e")
    assert tpu.step_options(mesh) == ()
    monkeypatch.setitem(tpu._STEP_OPTIONS, ("v6e", "int8"), COMPILER_OPTIONS)
    assert tpu.step_options(mesh, "int8") == COMPILER_OPTIONS
    assert tpu.step_options(mesh) == ()


def test_steps_alone_are_compiled_with_step_options():
    platform = dataclasses.replace(PLAIN, step_options=(("xla_tpu_no_such_option", 1),))

    @program("x", static_argnames=(), is_step=True)
    def step(x: jax.Array, *, platform: Platform = platform) -> jax.Array:
        return x + 1

    @program("x", static_argnames=())
    def chunk(x: jax.Array, *, platform: Platform = platform) -> jax.Array:
        return x + 1

    assert chunk(jnp.zeros(()), platform=platform) == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        step(jnp.zeros(()), platform=platform)
