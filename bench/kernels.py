"""The CPU's kernels beside XLA's products and the reference attention, in turns in one process. Prints two tables.

    python bench/kernels.py [--repeats 30]

Products are of the default model's matrices, bfloat16; a program multiplies by several, so that they come from memory.
Attention is one layer's of as many as one program takes in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllama.model import native
from jaxllama.model.attention.reference import paged_attention
from jaxllama.model.cache import KVPool
from jaxllama.model.platforms.cpu import PLAIN

MATRICES = ((1536, 576, 30), (576, 1536, 30), (576, 576, 60), (49152, 576, 1))
ROWS = (1, 2, 4, 16, 32, 128, 512)
NUM_WEIGHTS = 134e6
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS = 9, 3, 64, 16, 8
ATTENTION = ((1, 512, 0), (1, 512, 2048), (2, 1, 256), (2, 1, 4000), (16, 1, 32), (16, 1, 256), (16, 1, 1000))
bfloat16 = jnp.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    if not native.is_available():
        raise SystemExit("this CPU has no kernels of ours")
    rng = np.random.default_rng(0)
    print(f"products, ms a {NUM_WEIGHTS / 1e6:.0f} M weights: XLA, ours")
    for outputs, inputs, count in MATRICES:
        for rows in ROWS:
            xla, ours = products(rng, rows, outputs, inputs, count, repeats)
            print(f"{outputs:6} x {inputs:<5} {rows:4} rows {xla:8.1f} {ours:8.1f}", flush=True)
    print("attention, ms a layer: reference, ours")
    for rows, tokens, start in ATTENTION:
        reference, ours = attention(rng, rows, tokens, start, repeats)
        print(f"{rows:3} x {tokens:<4} from {start:5} {reference:8.3f} {ours:8.3f}", flush=True)


def products(
    rng: np.random.Generator, rows: int, outputs: int, inputs: int, count: int, repeats: int
) -> tuple[float, float]:
    """Milliseconds for as many weights as the default model has."""
    weights = [random(rng, outputs, inputs) for _ in range(count)]
    packed = [native.pack(weight) for weight in weights]

    def xla(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum("ri,oi->ro", x, weight, preferred_element_type=jnp.float32)

    def chain(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
            y = jnp.zeros((rows, outputs), jnp.float32)
            for weight in weights:
                one = product(x, weight)
                # The next product waits for this one.
                x, y = x + (one[:, :1] * 1e-9).astype(x.dtype), y + one
            return y

        return run

    x = random(rng, rows, inputs)
    theirs = compiled(chain(xla), x, weights)
    mine = compiled(chain(lambda x, weight: native.multiply(x, weight)[0]), x, packed)
    share = NUM_WEIGHTS / (count * outputs * inputs)
    first, second = in_turns([lambda: theirs(x, weights), lambda: mine(x, packed)], repeats)
    return share * first, share * second


def attention(rng: np.random.Generator, rows: int, tokens: int, start: int, repeats: int) -> tuple[float, float]:
    """Milliseconds a layer."""
    width = -(-(start + tokens) // PAGE_SIZE)
    pools = [random(rng, rows * width + 1, PAGE_SIZE, 2 * KV_HEADS, HEAD_DIM) for _ in range(LAYERS)]
    table = jnp.asarray(np.arange(rows * width).reshape(rows, width) + 1, jnp.int32)
    positions = jnp.broadcast_to(start + jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
    q = random(rng, rows, tokens, HEADS, HEAD_DIM)

    def chain(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def run(q: jax.Array, pools: list[jax.Array], table: jax.Array, positions: jax.Array) -> jax.Array:
            for pages in pools:
                q = attend(q, pages, table, positions)
            return q

        return run

    args = (q, pools, table, positions)
    theirs = compiled(chain(lambda q, pages, *rest: paged_attention(q, KVPool(pages, None), *rest)), *args)
    mine = compiled(chain(lambda q, pages, *rest: native.attend(q, KVPool(pages, None), *rest)), *args)
    first, second = in_turns([lambda: theirs(*args), lambda: mine(*args)], repeats)
    return first / LAYERS, second / LAYERS


def random(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), bfloat16)


def compiled(function: Callable[..., jax.Array], *args: Any) -> Callable[..., jax.Array]:
    options = dict(PLAIN.compiler_options)
    program: Callable[..., jax.Array] = jax.jit(function, compiler_options=options).lower(*args).compile()
    return program


def in_turns(runs: list[Callable[[], jax.Array]], repeats: int) -> list[float]:
    """The best of each, in milliseconds."""
    best = [float("inf")] * len(runs)
    for _ in range(2 + repeats):
        for i, run in enumerate(runs):
            began = time.perf_counter()
            run().block_until_ready()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
