"""Inputs of paged attention, and what it must give: of the reference and of the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import reference


@dataclass(frozen=True)
class Case:
    """Heads, KV heads, head_dim, page size, and each row's length; `tokens` queries end each row."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    lengths: tuple[int, ...]
    tokens: int = 1


CASES = {
    "grouped": Case(6, 2, 10, 4, (1, 3, 17, 40)),
    "one_kv_head": Case(5, 1, 6, 8, (9, 33)),
    "as_many_kv_heads": Case(3, 3, 14, 4, (7, 2, 21)),
    "chunk": Case(4, 2, 10, 4, (23, 9), tokens=9),
    "page_of_one": Case(4, 2, 6, 1, (5, 12)),
    "odd_page": Case(4, 2, 6, 7, (5, 300)),
    # Beyond any block in which an implementation may walk the pages.
    "long": Case(2, 1, 8, 16, (1100, 1, 256, 257, 512), tokens=1),
    "long_chunk": Case(2, 1, 8, 16, (700,), tokens=130),
}


@dataclass(frozen=True)
class Inputs:
    q: np.ndarray
    pool: np.ndarray
    table: np.ndarray
    positions: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]
    scales: np.ndarray | None = None


def make_inputs(case: Case, *, rounded: bool = False) -> Inputs:
    """Every row's pages lie scattered in a pool whose other slots hold large numbers. `rounded`: to bfloat16."""
    rng = np.random.default_rng(0)
    to = jnp.bfloat16 if rounded else np.float32
    width = max(-(-length // case.page_size) for length in case.lengths) + 2
    num_pages = 2 + sum(-(-length // case.page_size) for length in case.lengths)
    pool = rng.standard_normal((num_pages, case.page_size, 2 * case.kv_heads, case.head_dim)) * 50
    free = list(rng.permutation(np.arange(1, num_pages)))
    table = np.zeros((len(case.lengths), width), np.int32)
    ks, vs = [], []
    for row, length in enumerate(case.lengths):
        k, v = rng.standard_normal((2, length, case.kv_heads, case.head_dim)).astype(to).astype(np.float64)
        for position in range(length):
            index, slot = divmod(position, case.page_size)
            if slot == 0:
                table[row, index] = free.pop()
            pool[table[row, index], slot, 0::2] = k[position]
            pool[table[row, index], slot, 1::2] = v[position]
        ks.append(k)
        vs.append(v)
    q = rng.standard_normal((len(case.lengths), case.tokens, case.heads, case.head_dim)) * 2
    positions = np.array([np.arange(length - case.tokens, length) for length in case.lengths], np.int32)
    return Inputs(q.astype(to).astype(np.float32), pool.astype(np.float32), table, positions, ks, vs)


def exact(case: Case, x: Inputs, window: int | None = None) -> np.ndarray:
    """Float64 softmax attention, one head of one query at a time; over the last `window` keys."""
    out = np.zeros(x.q.shape)
    for row, token, head in np.ndindex(*x.q.shape[:3]):
        end = x.positions[row, token] + 1
        start = 0 if window is None else max(end - window, 0)
        kv_head = head // (case.heads // case.kv_heads)
        scores = x.k[row][start:end, kv_head] @ x.q[row, token, head].astype(np.float64) / math.sqrt(case.head_dim)
        out[row, token, head] = reference.softmax(scores) @ x.v[row][start:end, kv_head]
    return out


def poisoned(case: Case, x: Inputs, poison: float) -> np.ndarray:
    """The pool with `poison` in every slot that no row's token has."""
    pool = np.full_like(x.pool, poison)
    for row, length in enumerate(case.lengths):
        for position in range(length):
            page, slot = x.table[row, position // case.page_size], position % case.page_size
            pool[page, slot] = x.pool[page, slot]
    return pool
