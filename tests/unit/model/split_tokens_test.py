"""A chunk whose tokens are split over the devices between products gives the logits and the cache of a whole one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxllama import make_mesh
from jaxllama.decode.state import Chunk, Place, make_pool
from jaxllama.decode.steps import prefill_logits
from jaxllama.model.cache import KVPool
from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.model.platforms.platform import Case, Platform
from jaxllama.weights.parts import split_ffn

pytestmark = pytest.mark.optimized

CHUNK, PAGE_SIZE = 128, 4


def platform_of(config, mesh, **changes) -> Platform:
    case = Case(config, mesh, "float32", "float32")
    return dataclasses.replace(PLAIN, attention=case.reference(), **changes)


def pool_of(config, mesh, num_pages: int) -> KVPool:
    return make_pool(config, mesh, num_pages=num_pages, page_size=PAGE_SIZE, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("name", "tp", "data", "quantize", "num_parts"),
    [
        ("divisible", 8, 1, None, 1),  # `rep` splits pages too
        ("divisible", 2, 2, "int8", 2),
        ("biased", 2, 1, None, 1),
    ],
)
def test_logits_and_cache_are_those_of_whole_chunks(name, tp, data, quantize, num_parts):
    config = tiny.config_of(name)
    mesh = make_mesh(config, tp=tp, data=data)
    params = split_ffn(tiny.make_params(config, tiny.weights_of(name), mesh, jnp.float32, quantize), num_parts)
    # As many rows as there are groups of `data`, each with pages of its own group.
    tokens = np.array([tiny.prompt_of(name, 2 * CHUNK, seed=row) for row in range(data)], np.int32)
    width = 2 * CHUNK // PAGE_SIZE
    shards = np.arange(data, dtype=np.int32) * mesh.shape["rep"]
    place = Place(jnp.tile(jnp.arange(1, 1 + width, dtype=jnp.int32), (data, 1)), shards)
    got = {}
    for splits in (False, True):
        platform = platform_of(config, mesh, splits_tokens=splits)
        assert (platform.split_tokens(config, data, CHUNK) is not None) == splits
        pool = pool_of(config, mesh, num_pages=(1 + width) * platform.num_shards)
        logits = []
        for start, num in ((0, CHUNK), (CHUNK, 100)):
            at = (np.full(data, count, np.int32) for count in (start, num))
            chunk = Chunk(tokens[:, start : start + CHUNK], *at)
            part, pool = prefill_logits(config, params, pool, place, chunk, platform=platform)
            logits.append(np.asarray(part[:, :num]))
        got[splits] = [*logits, np.asarray(pool.pages)]
    for split, whole in zip(got[True], got[False], strict=True):
        np.testing.assert_allclose(split, whole, atol=2e-5 * np.abs(whole).max())


def test_the_devices_add_up_what_they_keep():
    """Two sums a layer, of which each device gets its own tokens: no sum that all get."""
    config = tiny.config_of("divisible")
    mesh = make_mesh(config, tp=4)
    params = tiny.make_params(config, tiny.weights_of("divisible"), mesh)
    pool = pool_of(config, mesh, num_pages=65)
    place = Place(jnp.arange(64, dtype=jnp.int32), np.int32(0))
    chunk = Chunk(np.zeros(CHUNK, np.int32), np.int32(0), np.int32(CHUNK))
    platform = platform_of(config, mesh, splits_tokens=True)
    text = str(prefill_logits.trace(config, params, pool, place, chunk, platform=platform).jaxpr)
    assert text.count("reduce_scatter[") == text.count("all_gather[") - 1 == 2  # layers are traced once


@pytest.mark.parametrize(
    ("rows", "tokens", "splits", "why"),
    [
        (1, 128, True, "whole tiles of 16 tokens on each of 8 devices"),
        (1, 64, False, "half a tile each"),
        (3, 256, True, "several rows"),
        (64, 1, False, "a step"),
    ],
)
def test_only_chunks_of_whole_tiles_are_split(rows, tokens, splits, why):
    config = tiny.config_of("divisible")
    platform = platform_of(config, make_mesh(config, tp=8), splits_tokens=True)
    assert (platform.split_tokens(config, rows, tokens) is not None) == splits, why


def test_a_model_that_the_devices_do_not_divide_is_not_split():
    config = tiny.config_of("divisible")
    mesh = make_mesh(config, tp=5, devices=jax.devices()[:5])
    assert platform_of(config, mesh, splits_tokens=True).split_tokens(config, 1, 160) is None
