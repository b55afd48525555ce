"""The TPU and GPU kernels, in Pallas's interpreter, beside the bounds that a device's own would have to keep.

A right one keeps them on ragged rows of many seeds, one that is a little wrong does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import pytest
import tiny

from jaxllama.model.attention import Attention, ShardedAttention
from jaxllama.model.attention.agreement import Agreement, agreements
from jaxllama.model.attention.gpu import GpuAttention
from jaxllama.model.attention.tpu import TpuAttention
from jaxllama.model.attention.tpu_int8 import Int8TpuAttention
from jaxllama.model.cache import HeadLayout

# A minute or two each.
pytestmark = [pytest.mark.optimized, pytest.mark.slow]
pytest.importorskip("flywheel_tpu")

SEEDS = range(8)
HEADS = {64: (6, 3), 128: (4, 1)}
KINDS = {"bfloat16": TpuAttention, "int8": Int8TpuAttention}


@dataclass(frozen=True)
class Broken:
    """A kernel that is given something else."""

    kernel: Any
    how: str

    def _instead(self, q: Any, table: Any) -> tuple[Any, Any]:
        if self.how == "2 % of the scale":
            return q * 1.02, table
        if self.how == "another row's queries":
            return q[::-1], table
        return q, table.at[..., 0].set(table[..., 1])  # A page twice, and one not at all.

    def _call(self, name: str, q: Any, kv: Any, pool: Any, table: Any, *rest: Any) -> Any:
        q, table = self._instead(q, table)
        return getattr(self.kernel, name)(q, kv, pool, table, *rest)

    def decode(self, *args: Any) -> Any:
        return self._call("decode", *args)

    def verify(self, *args: Any) -> Any:
        return self._call("verify", *args)

    def prefill(self, *args: Any) -> Any:
        return self._call("prefill", *args)

    def validate(self, **_: int) -> None:
        pass


def found(platform: str, kv_dtype: str, head_dim: int, seed: int, broken: str | None = None) -> list[Agreement]:
    heads, kv_heads = HEADS[head_dim]
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = tiny.config_of("divisible", num_hidden_layers=2, **sizes)
    layout = HeadLayout.in_lanes(config, 1) if platform == "tpu" else None
    kernel: Attention = GpuAttention(interpret=True)
    if platform == "tpu":
        kernel = KINDS[kv_dtype](config.num_layers, True, layout)
    if broken is not None:
        kernel = Broken(kernel, broken)
    return agreements(
        ShardedAttention(kernel),
        config,
        page_size=128 if platform == "tpu" else 16,
        dtype=jnp.bfloat16,
        kv_dtype=kv_dtype,
        needs_clean_pages=platform == "tpu" and kv_dtype == "bfloat16",
        layout=layout,
        seed=seed,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_right_kernel_is_within_the_bounds(platform, kv_dtype, head_dim, seed):
    agreed = found(platform, kv_dtype, head_dim, seed)
    assert all(each.holds for each in agreed), agreed


@pytest.mark.parametrize("broken", ["2 % of the scale", "another row's queries", "another page"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_kernel_that_is_a_little_wrong_is_not(platform, kv_dtype, broken):
    """Each way of calling it by itself, but for another row's of a chunk, which has one row: its queries turn round."""
    agreed = found(platform, kv_dtype, 64, 0, broken)
    assert not [each.call for each in agreed if each.share <= 1]
