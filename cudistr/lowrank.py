"""Low-rank factors of a call's own scores: what is drawn for them, and the NumPy twin of the kernels that find them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cudistr.normalize import Problem
from cudistr.plan import LOWRANK_KEYS, LOWRANK_QUERIES, LOWRANK_ROWS
from cudistr.reductions import MAX_RANK
from cudistr.reference import kept, reduced_count, visible

__all__ = ["SKETCH", "UNSEEN_ROW", "Found", "drawn", "find", "sampled", "sketch_vectors", "start"]

# Twins of constants in tile/drawn.cuh, smxx_lowrank_sums.cu and smxx_lowrank_factors.cu.
CENTER_KEYS = 128  # of those that are looked at, that the mean is taken of
PLAIN_PART = 0.1  # of all weights, that the keys have alike
RIDGE = 1e-7  # of the trace of the sums of keys, on their diagonal
DAMPED = 2e-6  # of a column's square, added to what is left of it: less than that is rounding
# With a tolerance, a row that is not drawn may be off by so many times the root mean square of an output: once.
UNSEEN_ROW = 3.0
SKETCH = 16  # random vectors that say how much of a query is missed; columns of one matrix instruction

Float = NDArray[np.float64]


class Found(NamedTuple):
    """Factors of every KV head of every batch entry, float32."""

    queries: NDArray[np.float32]  # A, (batch * heads_kv, head_dim, rank)
    keys: NDArray[np.float32]  # B, the same
    mean: NDArray[np.float32]  # (batch * heads_kv, head_dim)


def drawn(problem: Problem, count: int) -> NDArray[np.int32]:
    """So many queries of a KV head, (count, 2): which of its query heads, and which row.

    One of each of ``count`` equal parts of the rows that see keys which are not exact, of the query heads in turn.
    """
    seeing = np.flatnonzero(reduced_count(problem) > 0)
    if not len(seeing):
        seeing = np.zeros(1, np.intp)
    places = (np.arange(count) + np.random.RandomState(count).random_sample(count)) * (len(seeing) / count)
    rows = seeing[np.minimum(places.astype(np.intp), len(seeing) - 1)]
    heads = np.arange(count) % max(1, problem.heads // max(1, problem.heads_kv))
    return np.stack([heads, rows], axis=1).astype(np.int32)


def sampled(seqlen_k: int) -> NDArray[np.intp]:
    """The keys that are looked at: all, or one of each of 2048 equal parts of the sequence."""
    samples = np.arange(min(seqlen_k, LOWRANK_KEYS), dtype=np.int64)
    if seqlen_k < LOWRANK_KEYS:
        return samples
    places = (samples << 16) + (
        (samples * 2654435769 & 0xFFFFFFFF) >> 16
    )  # within a part by the golden ratio
    return places * seqlen_k >> 27


@functools.lru_cache(maxsize=64)
def start(head_dim: int, rank: int) -> NDArray[np.float32]:
    """The random vectors that the iteration begins with, (head_dim, rank)."""
    vectors = np.random.RandomState(1).standard_normal((head_dim, MAX_RANK))[:, :rank].astype(np.float32)
    vectors.setflags(write=False)
    return vectors


@functools.lru_cache(maxsize=64)
def sketch_vectors(head_dim: int) -> Float:
    """The random vectors whose products with a query say how much of it is missed, (head_dim, 16)."""
    vectors = np.random.RandomState(0).standard_normal((head_dim, SKETCH))
    vectors.setflags(write=False)
    return vectors


def find(q: NDArray[Any], k: NDArray[Any], problem: Problem, rank: int) -> Found:
    """Factors for checked NumPy arrays, see :class:`cudistr.LowRank`."""
    rows, queries = drawn(problem, LOWRANK_ROWS), drawn(problem, LOWRANK_QUERIES)
    shared = problem.heads // problem.heads_kv
    found = [
        _factors(q[b, h * shared : (h + 1) * shared], k[b, h], rows, queries, problem, rank)
        for b, h in np.ndindex(problem.batch, problem.heads_kv)
    ]
    return Found(*(np.stack(x).astype(np.float32) for x in zip(*found, strict=True)))


def _finite(array: NDArray[Any]) -> Float:
    """In float64, with 0 for what is not a finite number."""
    wide = array.astype(np.float64)
    return np.where(np.isfinite(wide), wide, 0.0)


def _factors(
    q: NDArray[Any],
    k: NDArray[Any],
    rows: NDArray[np.int32],
    queries: NDArray[np.int32],
    problem: Problem,
    rank: int,
) -> tuple[Float, Float, Float]:
    """A, B and the mean of one KV head: q (query heads of it, seqlen_q, head_dim), k (seqlen_k, head_dim)."""
    chosen = sampled(problem.seqlen_k)
    keys, count = _finite(k[chosen]), len(chosen)
    mean = keys[(2 * np.arange(CENTER_KEYS) + 1) * count // (2 * CENTER_KEYS)].mean(axis=0)
    keys = keys - mean
    position = rows[:, 1].astype(np.intp)
    scores = problem.scale * (_finite(q[rows[:, 0], position]) @ keys.T)
    seen = visible(position, problem)[:, chosen]
    top = np.max(scores, axis=1, initial=-np.inf, where=seen, keepdims=True)
    weights = np.where(seen, np.exp(np.where(seen, scores - np.where(np.isfinite(top), top, 0.0), 0.0)), 0.0)
    total = weights.sum(axis=1, keepdims=True)
    weights /= np.where(total > 0, total, 1.0)
    received = np.where(kept(position, problem)[:, chosen], 0.0, weights).sum(axis=0)
    every = received.sum()
    received = received / every + PLAIN_PART / count if every > 0 else np.full(count, 1.0 / count)
    of_keys = _scaled(keys.T @ (received[:, None] * keys), RIDGE)
    some = _finite(q[queries[:, 0], queries[:, 1].astype(np.intp)])
    of_queries = _scaled(some.T @ some, 0.0)
    a = of_keys @ start(k.shape[1], rank).astype(np.float64)
    b = of_queries @ a
    own = _orthonormal(b.T @ (of_keys @ b))
    a = of_keys @ b @ own
    b = of_queries @ a
    b = b @ _orthonormal(a.T @ b)
    a = of_keys @ b
    own = _orthonormal(b.T @ a)
    return a @ own, b @ own, mean


def _scaled(square: Float, ridge: float) -> Float:
    """With a trace of 1, and a ridge on the diagonal."""
    trace = np.trace(square)
    scaled = square / trace if np.isfinite(trace) and trace > 0 else np.zeros_like(square)
    return scaled + ridge * np.eye(len(square))


def _orthonormal(square: Float) -> Float:
    """C with C^T square C = 1, by columns one after another; one of which only rounding is left becomes small."""
    left, found = square.copy(), np.eye(len(square))
    scales = np.zeros(len(square))
    for j in range(len(square)):
        pivot = max(left[j, j], 0.0) + DAMPED * square[j, j]
        if not pivot > 0:
            continue
        scales[j] = 1 / np.sqrt(pivot)
        if left[j, j] <= 0:
            continue
        times = left[j, j + 1 :] / pivot
        left[:, j + 1 :] -= left[:, j, None] * times
        found[:, j + 1 :] -= found[:, j, None] * times
    return found * scales
