"""Other attentions on the same q, k and v, from their papers, for NumPy and CuPy arrays.

Exact attention of numbers rounded to eight bits, and HyperAttention, stand for softmax attention. Hydra and focused
linear attention are other functions, for which a model has to be trained: their error on weights that were trained for
softmax says how far away they are, no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["RIVALS", "TRAINED", "e4m3", "flatten", "fp8", "hydra", "hyper"]

HYPER_BITS, HYPER_BLOCK, HYPER_SAMPLES = 7, 256, 256  # of the authors' code
FOCUS = 3  # FLatten's power p
TRAINED = ("hydra", "flatten")  # need training
FP8_MOST, FP8_LEAST_EXPONENT, FP8_DIGITS = 448.0, -6, 3  # of e4m3 (arXiv 2209.05433, table 1)
FP8_WEIGHT = 256.0  # what the largest weight of a row is stored as
FP8_ROWS = 1024  # of queries at once


def _partial(q: Any, k: Any, v: Any, hidden: Any, xp: Any) -> tuple[Any, Any]:
    """Exact attention over some keys: out, and lse (rows, 1)."""
    scores = np.float32(q.shape[1] ** -0.5) * (q @ k.T)
    if hidden is not None:
        scores = xp.where(hidden, np.float32(-np.inf), scores)
    top = scores.max(axis=1, keepdims=True)
    top = xp.where(top == -np.inf, np.float32(0), top)
    weights = xp.exp(scores - top)
    total = weights.sum(axis=1, keepdims=True)
    some = xp.where(total == 0, np.float32(1), total)
    return weights @ v / some, xp.where(total == 0, np.float32(-np.inf), top + xp.log(some))


def hyper(q: Any, k: Any, v: Any, xp: Any) -> Any:
    """HyperAttention (Han et al., arXiv 2310.05869) without a mask, with the block and sample of its authors' code.

    Queries and keys are sorted by an angular hash of 7 bits; a query sees the keys of the block at its own place
    exactly, and 256 keys, drawn with replacement, for the rest. (1, heads, seqlen, head_dim).
    """
    random = np.random.RandomState(0)
    seqlen, head_dim = q.shape[2:]
    directions = xp.asarray(random.standard_normal((head_dim, HYPER_BITS)).astype(np.float32))
    places = xp.asarray(1 << np.arange(HYPER_BITS))
    sampled = xp.asarray(random.randint(0, seqlen, HYPER_SAMPLES))
    out = xp.empty((*q.shape[:3], v.shape[3]), np.float32)

    def order(rows: Any) -> Any:
        codes = ((rows @ directions > 0) * places).sum(axis=1)
        for shift in (1, 2, 4):
            codes ^= codes >> shift  # the rank in the Gray sequence
        return xp.argsort(codes * seqlen + xp.arange(seqlen))

    for h in range(q.shape[1]):
        queries, keys, values = (x[0, h].astype(np.float32) for x in (q, k, v))
        by_query, by_key = order(queries), order(keys)
        queries, keys, values = queries[by_query], keys[by_key], values[by_key]
        for start in range(0, seqlen, HYPER_BLOCK):
            own = slice(start, start + HYPER_BLOCK)
            near, near_lse = _partial(queries[own], keys[own], values[own], None, xp)
            inside = (sampled // HYPER_BLOCK == start // HYPER_BLOCK)[None, :]
            far, far_lse = _partial(queries[own], keys[sampled], values[sampled], inside, xp)
            far_lse = far_lse + np.float32(np.log(seqlen / HYPER_SAMPLES))
            share = 1 / (1 + xp.exp(far_lse - near_lse))
            out[0, h, by_query[own]] = share * near + (1 - share) * far
    return out


def e4m3(x: Any, xp: Any) -> Any:
    """The numbers of float8 e4m3 nearest to those of a float32 array, ties to even; beyond the largest, the largest."""
    exponent = xp.maximum(xp.frexp(x)[1] - 1, FP8_LEAST_EXPONENT)
    step = xp.ldexp(xp.ones_like(x), exponent - FP8_DIGITS)
    return xp.clip(xp.rint(x / step) * step, -np.float32(FP8_MOST), np.float32(FP8_MOST))


def fp8(q: Any, k: Any, v: Any, xp: Any, *, causal: bool = False, rotate: bool = False) -> Any:
    """Exact attention of float8 e4m3, as FlashAttention-3 takes it (Shah et al., arXiv 2407.08608, section 3.3).

    q, k and v are rounded, with one scale for each KV head, by its largest number. Weights are rounded too, the largest
    of a row being 256 as in the authors' code; sums are float32. With ``rotate`` q and k are multiplied by a random
    orthogonal matrix first, which spreads outliers over all columns and changes no score: the paper's incoherent
    processing, for which it takes a matrix that is faster to multiply. Its scales of blocks are left out.
    q (1, heads, seqlen, head_dim), k and v with heads_kv heads.
    """
    heads_kv, seqlen = k.shape[1:3]
    shared = q.shape[1] // heads_kv
    out = xp.empty((*q.shape[:3], v.shape[3]), np.float32)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    if rotate:
        turned = np.linalg.qr(np.random.RandomState(0).standard_normal((q.shape[3],) * 2))[0]
        turned = xp.asarray(turned.astype(np.float32))
        q, k = q @ turned, k @ turned

    def rounded(x: Any) -> Any:
        most = xp.abs(x).max()
        scale = xp.where(most == 0, np.float32(1), most / np.float32(FP8_MOST))
        return e4m3(x / scale, xp) * scale

    for kv in range(heads_kv):
        own = slice(kv * shared, (kv + 1) * shared)
        queries, keys, values = rounded(q[0, own]), rounded(k[0, kv]), rounded(v[0, kv])
        for h, start in np.ndindex(shared, -(-seqlen // FP8_ROWS)):
            rows = slice(start * FP8_ROWS, min((start + 1) * FP8_ROWS, seqlen))
            scores = np.float32(q.shape[3] ** -0.5) * (queries[h, rows] @ keys.T)
            if causal:
                later = xp.arange(seqlen) > xp.arange(rows.start, rows.stop)[:, None]
                scores = xp.where(later, np.float32(-np.inf), scores)
            weights = np.float32(FP8_WEIGHT) * xp.exp(scores - scores.max(axis=1, keepdims=True))
            out[0, kv * shared + h, rows] = e4m3(weights, xp) @ values / weights.sum(axis=1, keepdims=True)
    return out


def hydra(q: Any, k: Any, v: Any, xp: Any) -> Any:
    """Hydra attention (Bolya et al., arXiv 2209.07484): as many heads as columns, cosine similarity for softmax."""
    q, k, v = (x.astype(np.float32) for x in (q, k, v))

    def unit(x: Any) -> Any:
        return x / xp.sqrt((x * x).sum(axis=(1, 3), keepdims=True))

    return unit(q) * (unit(k) * v).sum(axis=2, keepdims=True)


def flatten(q: Any, k: Any, v: Any, xp: Any) -> Any:
    """Focused linear attention (Han et al., arXiv 2308.00442) before training: no scale, no convolution of v."""
    q, k, v = (x.astype(np.float32) for x in (q, k, v))

    def focused(x: Any) -> Any:
        x = xp.maximum(x, np.float32(0)) + np.float32(1e-6)
        norm = xp.sqrt((x * x).sum(axis=3, keepdims=True))
        powered = (x / norm) ** FOCUS  # scaled, so that no power overflows
        return norm * powered / xp.sqrt((powered * powered).sum(axis=3, keepdims=True))

    q, k = focused(q), focused(k)
    return q @ (k.swapaxes(2, 3) @ v) / (q @ k.sum(axis=2)[..., None])


# By name: functions of q, k, v and the module of arrays. What else one takes is by keyword: causal, for a mask, and
# switches that a method's name may turn on.
RIVALS: dict[str, Callable[..., Any]] = {"fp8": fp8, "hyper": hyper, "hydra": hydra, "flatten": flatten}
