"""Models to measure with: their shapes are real ones, their weights are not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxllama.model.config import LlamaConfig, RopeScaling
from jaxllama.model.mesh import partition_spec
from jaxllama.model.params import Params, ParamSpec, build_params, param_specs

_ROPE = RopeScaling(theta=500_000.0)
SMALL = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    rope=_ROPE,
)
"""For CPUs."""
LLAMA_1B = replace(
    SMALL,
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    tie_word_embeddings=True,
)
LLAMA_8B = replace(
    LLAMA_1B,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    head_dim=128,
    tie_word_embeddings=False,
)


def chosen(platform: str, free_bytes: int | None, num_devices: int) -> tuple[str, LlamaConfig]:
    """The largest of the models that leaves 40 % of all devices' free memory; a small one on CPUs."""
    if platform == "cpu":
        return "a synthetic small model", SMALL
    room = 0.6 * (free_bytes or 8 * 2**30) * num_devices
    if _bytes(LLAMA_8B) <= room:
        return "a synthetic 8B", LLAMA_8B
    return fitting("a synthetic 1B", LLAMA_1B, room)


def fitting(name: str, config: LlamaConfig, room: float) -> tuple[str, LlamaConfig]:
    """`config`, or as many of its layers as `room` bytes take."""
    if _bytes(config) <= room:
        return name, config
    a_layer = _bytes(config.cut_to(2)) - _bytes(config.cut_to(1))
    layers = int((room - _bytes(config.cut_to(1))) // a_layer) + 1
    layers = max(1, min(config.num_layers, layers))
    return f"{name}, cut to {layers} of {config.num_layers} layers", config.cut_to(layers)


def _bytes(config: LlamaConfig) -> int:
    return 2 * sum(spec.size for spec in param_specs(config))


def synthetic(config: LlamaConfig, mesh: Mesh, dtype: str) -> Params:
    """Random weights, made on the devices: values stay near 1 in size from layer to layer."""
    num = iter(range(10_000))

    def leaf(spec: ParamSpec) -> Any:
        sharding = NamedSharding(mesh, partition_spec(spec.axes, config, mesh))
        kind = jnp.dtype(spec.dtype or dtype)
        if len(spec.shape) == 1:
            return jax.jit(
                partial(jnp.full, spec.shape, 0.0 if "bias" in str(spec.path[-1]) else 1.0, kind),
                out_shardings=sharding,
            )()
        return _random(spec.shape, kind.name, sharding)(next(num))

    return build_params(config, leaf, None)


@cache
def _random(shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Any:
    """A program for each shape."""

    def make(seed: int) -> jax.Array:
        return (jax.random.normal(jax.random.key(seed), shape, jnp.float32) * shape[-1] ** -0.5).astype(dtype)

    return jax.jit(make, out_shardings=sharding)
