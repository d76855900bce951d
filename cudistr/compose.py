"""A call made of several steps: projected queries and keys, and exact keys and far ones merged by lse."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from cudistr import launch, reference
from cudistr.normalize import Problem, Ranked, row_strides, rows_aligned
from cudistr.projection import Projection
from cudistr.reductions import Reduction

__all__ = ["Part", "attention", "parts"]


@dataclass(frozen=True)
class Part:
    """Attention over the keys from ``first`` up to but not including ``last``, as a problem of its own.

    Its bounds may be negative: ``right=-256`` sees the keys that lie at least 256 before a query's own position.
    """

    problem: Problem
    first: int
    last: int

    @property
    def reduced(self) -> bool:
        """Whether its scores are not exact."""
        return self.problem.reduction is not None or self.problem.rank is not None


@functools.lru_cache(maxsize=1024)
def parts(problem: Problem) -> tuple[Part, ...]:
    """Split a problem with exact keys into calls that have none, and that together see every visible key once.

    With the position p of a query and a key j, the calls are, as far as any query sees a key in them::

        exact    |j - p| < near
        exact    j < sinks,   j <= p - near     and the same for j >= p + near
        reduced  j >= sinks,  j <= p - near     and the same for j >= p + near

    Where no reduced call is left, the problem is one exact call. At most five remain: three under a causal mask.
    """
    keys, near, sinks = problem.seqlen_k, problem.near, problem.sinks
    whole = dataclasses.replace(problem, near=0, sinks=0)
    # All that j - p can be, cut to what the mask lets through.
    low = max(1 - keys, -keys if problem.left is None else -problem.left)
    high = min(problem.seqlen_q - 1, keys + problem.seqlen_q if problem.right is None else problem.right)
    exact = dataclasses.replace(whole, reduction=None, rank=None)
    sides = ((low, -near), (near, high)) if near else ((low, high),)
    wanted = [(exact, 0, keys, max(low, 1 - near), min(high, near - 1))]
    for side in sides:
        wanted += [(exact, 0, sinks, *side), (whole, sinks, keys, *side)]
    found = [_part(*part) for part in wanted if _sees(problem, *part[1:])]
    if not any(part.reduced for part in found):
        return (Part(exact, 0, keys),)
    return tuple(found)


def _sees(problem: Problem, first: int, last: int, low: int, high: int) -> bool:
    """Whether any query of the problem sees a key from ``first`` to ``last - 1`` with ``low <= j - p <= high``."""
    position = problem.seqlen_k - problem.seqlen_q  # of the first query; the last one sits at the last key
    return first < last and max(low, first - problem.seqlen_k + 1) <= min(high, last - 1 - position)


def _part(problem: Problem, first: int, last: int, low: int, high: int) -> Part:
    """The keys ``first`` to ``last - 1`` within ``low <= j - p <= high``: positions count from the end of the slice."""
    cut = problem.seqlen_k - last
    own = dataclasses.replace(problem, seqlen_k=last - first, left=-low - cut, right=high + cut)
    return Part(own, first, last)


def attention(
    problem: Problem,
    reduction: Reduction | None,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    return_lse: bool,
    stream: Any,
    tolerance: float | None = None,
) -> tuple[Any, Any]:
    """Run a checked problem. Returns (out, lse); lse is None unless asked for."""
    projection = reduction if isinstance(reduction, Projection) else None
    if tolerance is not None and problem.rank is not None and not problem.empty:
        assert projection is not None
        return within(problem, projection, q, k, v, out, return_lse, stream, tolerance)[:2]
    exact_keys = problem.near or problem.sinks
    if problem.device is None or problem.empty or not (exact_keys or projection):
        return launch.attention(problem, q, k, v, out, return_lse, stream, projection)
    chosen = parts(problem) if exact_keys else (Part(problem, 0, problem.seqlen_k),)
    with launch.placed(problem.device, stream):
        if len(chosen) == 1:
            return _run(chosen, projection, q, k, v, out, return_lse)[0]
        results = _run(chosen, projection, q, k, v, None, True)
        launch.hold(results)
        outs, lses = zip(*results, strict=True)
        merged, lse = launch.merge(outs, lses, return_lse, None)
        if out is None:
            return merged, lse
        out[...] = merged
        return out, lse


def within(
    problem: Problem,
    projection: Projection,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    return_lse: bool,
    stream: Any,
    tolerance: float,
) -> tuple[Any, Any, Any, Any]:
    """Run a projected problem in which every head keeps to the tolerance, or is exact.

    Returns out, lse, and what :func:`cudistr.reference.decide` returns.
    """
    if problem.device is None:
        ranks, errors = reference.decide(q, k, v, problem, projection, tolerance)
        reduced = launch.Reduced(None, None, ranks)
        result, lse = launch.attention(problem, q, k, v, out, return_lse, None, projection, reduced)
        return result, lse, ranks, errors
    with launch.placed(problem.device, stream):
        projected = launch.project(
            problem, q, k, projection.factors(q.dtype, problem.device), return_lse, sketched=True
        )
        wanted = projection.head_ranks(problem.batch, problem.device)
        ranks, errors = launch.decide(problem, q, k, v, projected, wanted, tolerance, reference.SPREAD)
        reduced = launch.Reduced(projected.queries, projected.keys, ranks)
        own = _of_rank(problem, q, k, v, reduced)
        result, lse = launch.attention(own, q, k, v, out, return_lse, None, None, reduced)
        if lse is not None:
            shift = projected.shift
            some = (ranks < problem.head_dim)[:, :, None]
            launch.hold(some)
            shift *= some
            lse += shift
        return result, lse, ranks, errors


def _run(
    chosen: tuple[Part, ...],
    projection: Projection | None,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    return_lse: bool,
) -> list[tuple[Any, Any]]:
    """out and lse of each part, on the current device and stream."""
    projected = None
    results = []
    for part in chosen:
        problem, queries, keys, shift, reduced = part.problem, q, k, None, None
        if problem.rank is not None:
            assert projection is not None
            assert problem.device is not None
            if projected is None:
                whole = dataclasses.replace(problem, seqlen_k=k.shape[2])
                factors = projection.factors(q.dtype, problem.device)
                projected = launch.project(whole, q, k, factors, return_lse)
            qhat, khat, shift, _ = projected
            if projection.mixed:
                khat = khat[:, :, part.first : part.last]
                reduced = launch.Reduced(qhat, khat, projection.head_ranks(problem.batch, problem.device))
            if not projection.mixed or projection.rank < projection.head_dim:
                queries, keys = qhat, projected.keys
            problem = _of_rank(problem, queries, keys, v, reduced)
        keys, values = (x[:, :, part.first : part.last] for x in (keys, v))
        result, lse = launch.attention(problem, queries, keys, values, out, return_lse, None, None, reduced)
        if lse is not None and shift is not None:
            lse += shift
        results.append((result, lse))
    return results


def _of_rank(problem: Problem, queries: Any, keys: Any, v: Any, reduced: launch.Reduced | None) -> Problem:
    """The exact problem of queries and keys, which are Qhat and Khat unless some heads have q and k themselves.

    ``keys`` are all, of which the problem may see a slice.
    """
    q_strides, k_strides = (row_strides(x.shape, x.strides, x.itemsize) for x in (queries, keys))
    return dataclasses.replace(
        problem,
        head_dim=queries.shape[3],
        rank=None,
        ranked=None if reduced is None else _ranked(reduced),
        q_strides=q_strides,
        k_strides=k_strides,
        aligned=all(
            rows_aligned(x.data.ptr, strides, x.itemsize)
            for x, strides in ((queries, q_strides), (keys, k_strides), (v, problem.v_strides))
        ),
    )


def _ranked(reduced: launch.Reduced) -> Ranked:
    strides = [row_strides(x.shape, x.strides, x.itemsize) for x in reduced[:2]]
    return Ranked(reduced.queries.shape[3], *strides)
