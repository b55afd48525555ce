"""What forms of rounding that jaxllama does not have would cost: int8 activations, and int4 weights.

    python bench/rounding.py models/SmolLM2-135M-Instruct [--tokens 512] [--only PATTERN] [--json OUT]

Mean KL in nats from the same model in float32, and the share of positions with the same likeliest token, over the texts
of `accuracy.py`. Weights and activations are rounded and then multiplied in float32; all else is as the engine has it
in bfloat16 on a CPU, float32 between products. Activations have one scale a token, or one a token and shard in the two
products whose inputs are split over devices. The default model is made of 4-bit weights (Q4_1), so that of int4 it says
what rounding twice costs.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from accuracy import ROOT, TEXTS, compare, log_softmax

import jaxllama
from jaxllama.engine.compilation import enable_compilation_cache
from jaxllama.model import dense
from jaxllama.model.linear import Linear, PackedWeight, QuantizedWeight
from jaxllama.model.platforms.cpu import PLAIN
from jaxllama.weights.forms import unpack

_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SPLIT_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Form:
    """Weights of the layers in `bits` (0: not rounded), one scale an output channel or `group` inputs of one.

    The inputs of the products `activations` are rounded to 8 bits; `shards` devices have a part each of those that are
    split. With `rotation`, so many inputs at a time are turned before they are rounded (-1: all together), weights and
    activations alike, so that no channel is larger than others: Ashkboos et al. 2024, arXiv:2404.00456.
    """

    bits: int = 8
    group: int | None = None
    fits: bool = False
    activations: tuple[str, ...] = ()
    shards: int = 1
    rotation: int = 0


def without(*names: str) -> tuple[str, ...]:
    """The other products."""
    return tuple(name for name in _ALL if name not in names)


FORMS = {
    "bfloat16": Form(0),
    "int8 weights": Form(),
    "int8 weights and activations": Form(activations=_ALL),
    "int8 weights and activations, 3 shards": Form(activations=_ALL, shards=3),
    "int8 weights and activations but of down_proj": Form(activations=without("down_proj")),
    "int8 weights and activations but of o_proj and down_proj": Form(activations=without(*_SPLIT_INPUTS)),
    "int8 weights and activations of q, k and v": Form(activations=("q_proj", "k_proj", "v_proj")),
    "int8 weights and activations of gate and up": Form(activations=("gate_proj", "up_proj")),
    "int8 weights and activations of o_proj": Form(activations=("o_proj",)),
    "int8 weights and activations of down_proj": Form(activations=("down_proj",)),
    "int8 weights, rotated": Form(rotation=-1),
    "int8 weights and activations, rotated": Form(activations=_ALL, rotation=-1),
    "int8 weights, rotated by 64": Form(rotation=64),
    "int8 weights and activations, rotated by 64": Form(activations=_ALL, rotation=64),
    "int4 weights, a channel": Form(4),
    "int4 weights, a channel, scales fitted": Form(4, fits=True),
    "int4 weights, groups of 128": Form(4, 128),
    "int4 weights, groups of 128, scales fitted": Form(4, 128, fits=True),
    "int4 weights, groups of 64": Form(4, 64),
    "int4 weights, groups of 64, scales fitted": Form(4, 64, fits=True),
    "int4 weights, groups of 32": Form(4, 32),
    "int4 weights, groups of 32, scales fitted": Form(4, 32, fits=True),
    "int4 weights, groups of 64, scales fitted, rotated": Form(4, 64, fits=True, rotation=-1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=512, help="of each text (default: %(default)s)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of a form's name (default: all)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here as well")
    args = parser.parse_args()
    enable_compilation_cache()
    with jaxllama.load(args.checkpoint, dtype="float32") as llama:
        assert llama.tokenizer is not None
        is_weight = (PackedWeight, QuantizedWeight)
        plain = jax.tree.map(unpack, llama.params, is_leaf=lambda leaf: isinstance(leaf, is_weight))
        config, params = llama.config, jax.tree.map(np.asarray, dense.plain(plain))
        texts = [llama.tokenizer.encode((ROOT / name).read_text())[: args.tokens] for name in TEXTS]
    exact = logprobs(config, params, texts)
    results = []
    for name, form in FORMS.items():
        if not fnmatch.fnmatch(name, args.only):
            continue
        with rounding(form):
            results.append({"form": name} | compare(exact, logprobs(config, rounded_params(params, form), texts)))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def logprobs(config: Any, params: Any, texts: list[list[int]]) -> list[np.ndarray]:
    """Of each text's tokens `[tokens, vocab]`."""

    # A program of its own each time: how it rounds is no argument of it.
    @jax.jit
    def run(params: Any, tokens: Any) -> Any:
        return dense.forward(config, params, tokens, jnp.ones(tokens.shape, bool), platform=PLAIN)[0]

    jax.clear_caches()
    return [log_softmax(np.asarray(run(params, np.array([text], np.int32))[0])) for text in texts]


def rounded_params(params: Any, form: Form) -> Any:
    """Norms in bfloat16; the embedding in 8 bits where the layers are rounded."""

    def leaf(path: Any, x: np.ndarray) -> np.ndarray:
        if x.ndim == 1:
            return x.astype(jnp.bfloat16)
        x = x.astype(jnp.bfloat16).astype(np.float32)
        if not form.bits:
            return x
        if "layers" not in jax.tree_util.keystr(path):
            return rounded(x, 8)
        return rounded(np.asarray(turned(x, form.rotation)), form.bits, form.group, fits=form.fits)

    return jax.tree.map_with_path(leaf, params)


def rounded(x: np.ndarray, bits: int, group: int | None = None, *, fits: bool = False) -> np.ndarray:
    """`x` [out, in] to the nearest of `2**bits - 1` values, one scale an output channel and `group` inputs of it.

    With `fits`, a scale is the one of eight, down to 0.65 of the largest magnitude's, of the least squared error.
    """
    width = x.shape[1]
    group = group or width
    padded = np.pad(x, ((0, 0), (0, -width % group))).reshape(x.shape[0], -1, group)
    most = 2 ** (bits - 1) - 1
    largest = np.maximum(np.abs(padded).max(axis=-1, keepdims=True), 1e-30)

    def by(part: float) -> tuple[np.ndarray, np.ndarray]:
        scale = largest * np.float32(part / most)
        values = np.clip(np.round(padded / scale), -most, most) * scale
        return values, np.square(values - padded).sum(axis=-1, keepdims=True)

    best, error = by(1.0)
    for part in np.linspace(0.95, 0.65, 7) if fits else ():
        values, own = by(part)
        best, error = np.where(own < error, values, best), np.minimum(own, error)
    result: np.ndarray = best.reshape(x.shape[0], -1)[:, :width]
    return result


def turned(x: Any, rotation: int) -> Any:
    """`x` with each `rotation` of its last dimension turned."""
    size = x.shape[-1] if rotation < 0 else rotation
    return (x.reshape(*x.shape[:-1], -1, size) @ _rotation(size)).reshape(x.shape) if rotation else x


@cache
def _rotation(size: int) -> np.ndarray:
    """Hadamard's matrix of a power of two, else a random orthogonal one."""
    if size & (size - 1) == 0:
        return (scipy.linalg.hadamard(size) / np.sqrt(size)).astype(np.float32)
    q: np.ndarray = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0].astype(np.float32)
    return q


@contextmanager
def rounding(form: Form) -> Iterator[None]:
    """Products of the layers take their inputs as `form` has them."""
    init, call = Linear.__init__, Linear.__call__

    def named(self: Any, weights: Any, name: str, dtype: Any) -> None:
        init(self, weights, name, dtype)
        self.name = name

    def of_rounded(self: Any, x: Any, count: Any = None) -> Any:
        x = x.astype(jnp.float32)
        if self.name in _ALL:
            x = turned(x, form.rotation)
        if self.name in form.activations:
            x = _rounded_tokens(x, form.shards if self.name in _SPLIT_INPUTS else 1)
        return call(self, x, count)

    with mock.patch.object(Linear, "__init__", named), mock.patch.object(Linear, "__call__", of_rounded):
        yield


def _rounded_tokens(x: Any, shards: int) -> Any:
    parts = x.reshape(*x.shape[:-1], shards, -1)
    largest = jnp.maximum(jnp.abs(parts).max(axis=-1, keepdims=True), 1e-30)
    return (jnp.round(parts * (127 / largest)) * (largest / 127)).reshape(x.shape)


if __name__ == "__main__":
    main()
