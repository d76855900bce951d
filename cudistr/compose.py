"""A call made of several steps: queries and keys projected, or exact keys and far ones merged by lse."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cudistr import launch, lowrank, reference
from cudistr.normalize import Problem, Ranked, exact, row_strides, rows_aligned, with_rank
from cudistr.plan import ITEMSIZE, Device, Pass, copies_queries, hopper_kernel, passes
from cudistr.projection import ROW_MARGIN, Projection, ranks_allowed
from cudistr.reductions import MAX_RANK, RANK_MULTIPLE, LowRank, Reduction
from cudistr.worth import Worth, worth

__all__ = [
    "Part",
    "Settled",
    "attention",
    "copied_problem",
    "in_one_kernel",
    "parts",
    "projected_problem",
    "projection_of",
    "settle",
    "within",
]


@dataclass(frozen=True)
class Part:
    """Attention over the keys from ``first`` up to but not including ``last``, as a problem of its own.

    Its bounds may be negative: ``right=-256`` sees the keys that lie at least 256 before a query's own position.
    """

    problem: Problem
    first: int
    last: int


@functools.lru_cache(maxsize=1024)
def parts(problem: Problem) -> tuple[Part, ...]:
    """Split a problem with exact keys into calls that have none, and that together see every visible key once.

    They are the passes of :func:`cudistr.plan.passes`; where none of these is reduced, one exact call is left.
    """
    whole = dataclasses.replace(problem, near=0, sinks=0)
    chosen = passes(problem)
    if not any(x.reduced for x in chosen):
        return (Part(exact(problem), 0, problem.seqlen_k),)
    assert problem.exact_block == (1, 1), problem  # such calls see keys by how far they are from a query
    return tuple(_part(whole if x.reduced else exact(problem), x) for x in chosen)


def _part(problem: Problem, own: Pass) -> Part:
    """A pass as a problem of its own: positions count from the end of the slice."""
    cut = problem.seqlen_k - own.last
    part = dataclasses.replace(
        problem, seqlen_k=own.last - own.first, left=-own.low - cut, right=own.high + cut
    )
    return Part(part, own.first, own.last)


@functools.lru_cache(maxsize=1024)
def in_one_kernel(problem: Problem, device: Device) -> bool:
    """Whether exact keys beside a grouping are passes of one kernel.

    Of more than 128 columns the Hopper kernel has no such passes, but several of its calls are faster than the portable
    kernel's one.
    """
    alone = dataclasses.replace(problem, near=0, sinks=0, exact_block=(1, 1))
    return hopper_kernel(problem, device) is not None or hopper_kernel(alone, device) is None


class Settled(NamedTuple):
    """What is done of what was asked for, and what decided whether it is the reduction."""

    problem: Problem
    reduction: Reduction | None
    tolerance: float | None
    worth: Worth | None  # None where nothing is reduced, and on the host, whose reference is never about time
    exact_because: str | None = None  # where a tolerance alone was asked for, and no reduction is taken


# Of a reduction that is taken for a tolerance alone: its part of head_dim, what stays exact beside a causal mask, and
# how many times the keys there are, from which on it is faster: as if two heads of three kept to the tolerance, since
# the others take time and save none.
PICKED_PART = 2
PICKED_NEAR, PICKED_SINKS = 256, 64
PICKED_KEYS = 1.5
# Of the squared tolerance, what is left to the rows of a sample when the one that it may miss is counted.
PICKED_ROOM = 0.5


def _may_be_exact(tolerance: float | None, exact_if_faster: bool | None) -> bool:
    """Whether exact attention may stand for a slower reduction: None allows it where it keeps to a tolerance."""
    return tolerance is not None if exact_if_faster is None else exact_if_faster


def settle(
    problem: Problem,
    reduction: Reduction | None,
    tolerance: float | None,
    exact_if_faster: bool | None,
) -> Settled:
    """Take exact attention for heads known to miss the tolerance, and in place of a reduction that is slower."""
    if tolerance is not None and reduction is None:
        return _picked(problem, tolerance, exact_if_faster is not False)
    if tolerance is not None and isinstance(reduction, Projection):
        reduction = reduction.narrowed(tolerance)
    if not problem.reduced or problem.device is None or problem.empty:
        return Settled(problem, reduction, tolerance, None)
    columns, anew = 0.0, isinstance(reduction, LowRank)
    if isinstance(reduction, LowRank):
        columns = reduction.rank
    elif isinstance(reduction, Projection):
        columns = sum(reduction.ranks) / len(reduction.ranks)
    found = _worth(problem, columns, tolerance is not None, anew)
    if found.exact_is_faster and _may_be_exact(tolerance, exact_if_faster):
        return Settled(exact(problem), None, None, found)
    return Settled(problem, reduction, tolerance, found)


def _worth(problem: Problem, columns: float, within: bool, anew: bool) -> Worth:
    assert problem.device is not None
    device, measured = launch.device_properties(problem.device), launch.break_even(problem.device)
    return worth(problem, device, columns, within, measured, anew)


def _picked(problem: Problem, tolerance: float, may_be_exact: bool) -> Settled:
    """For a tolerance alone: low-rank factors of the call, or exact attention where these may not be faster."""

    def remains(because: str, found: Worth | None = None) -> Settled:
        return Settled(problem, None, None, found, because)

    rank = min(problem.head_dim // PICKED_PART, MAX_RANK) // RANK_MULTIPLE * RANK_MULTIPLE
    if problem.empty:
        return remains("there is nothing to compute")
    if problem.device is None:
        return remains("NumPy arrays are computed by the float64 reference")
    if rank == 0 or problem.head_dim % RANK_MULTIPLE:
        return remains(f"a head_dim of {problem.head_dim} leaves no rank to reduce it to")
    if problem.softcap is not None:
        return remains("with a softcap there is no LowRank")
    rows = math.ceil(lowrank.UNSEEN_ROW**2 / (PICKED_ROOM * tolerance**2))
    if problem.seqlen_q < rows:
        return remains(
            f"by a sample of rows, a tolerance of {tolerance:g} takes {rows} queries to say that a head keeps to it"
        )
    kept = (PICKED_NEAR, PICKED_SINKS) if problem.right == 0 else (0, 0)
    reduction = LowRank(rank, *kept)
    reduced = with_rank(problem, reduction)
    if kept != (0, 0) and not any(x.reduced for x in passes(reduced)):
        return remains("all of these keys would stay exact")
    found = _worth(reduced, rank, True, True)
    if not may_be_exact:
        return Settled(reduced, reduction, tolerance, found)
    if found.least is None or found.keys < PICKED_KEYS * found.least:
        return remains(f"{reduction} would not be sure to save time", found)
    return Settled(reduced, reduction, tolerance, found)


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
    exact_if_faster: bool | None = None,
) -> tuple[Any, Any]:
    """Run a checked problem. Returns (out, lse); lse is None unless asked for."""
    if tolerance is not None or exact_if_faster:
        problem, reduction, tolerance, *_ = settle(problem, reduction, tolerance, exact_if_faster)
    projection = reduction if isinstance(reduction, Projection) else None
    if projection is not None and problem.rank is not None and (return_lse or problem.near or problem.sinks):
        projection.check_mean(problem.dtype)  # the mean is multiplied with q there
    if problem.rank is not None and not problem.empty:
        assert isinstance(reduction, Projection | LowRank)
        if tolerance is not None:
            return within(problem, reduction, q, k, v, out, return_lse, stream, tolerance)[:2]
        if problem.device is not None:
            return _projected(problem, reduction, q, k, v, out, return_lse, stream, None)[:2]
        projection = projection_of(problem, reduction, q, k)
    if problem.device is None or problem.empty:
        return launch.attention(problem, q, k, v, out, return_lse, stream, projection)
    kept = bool(problem.near or problem.sinks)
    if kept and not any(x.reduced for x in passes(problem)):
        (whole,) = parts(problem)
        return launch.attention(whole.problem, q, k, v, out, return_lse, stream)
    if copies_queries(problem, launch.device_properties(problem.device)):
        return _copied(problem, q, k, v, out, return_lse, stream)
    if not kept or in_one_kernel(problem, launch.device_properties(problem.device)):
        return launch.attention(problem, q, k, v, out, return_lse, stream)
    chosen = parts(problem)
    if len(chosen) == 1:
        keys, values = (x[:, :, chosen[0].first : chosen[0].last] for x in (k, v))
        return launch.attention(chosen[0].problem, q, keys, values, out, return_lse, stream)
    with launch.placed(problem.device, stream):
        results = []
        for part in chosen:
            keys, values = (x[:, :, part.first : part.last] for x in (k, v))
            results.append(launch.attention(part.problem, q, keys, values, None, True, None))
        launch.hold(results)
        outs, lses = zip(*results, strict=True)
        merged, lse = launch.merge(outs, lses, return_lse, None)
        if out is None:
            return merged, lse
        out[...] = merged
        return out, lse


def _copied(
    problem: Problem, q: Any, k: Any, v: Any, out: Any, return_lse: bool, stream: Any
) -> tuple[Any, Any]:
    """Run a problem on a device with queries that stand for its own, and all columns of k."""
    assert problem.device is not None
    with launch.placed(problem.device, stream):
        queries, shift = launch.copied(problem, q, k)
        own, reduced = copied_problem(problem, k, v), None
        if own.ranked is not None:
            reduced = launch.Reduced(queries, k, None, shift)
        else:
            q = queries
        return launch.attention(own, q, k, v, out, return_lse, None, None, reduced)


def copied_problem(problem: Problem, k: Any, v: Any) -> Problem:
    """What is launched with queries that stand for others: in their place, or beside them where keys stay exact."""
    kept = bool(problem.near or problem.sinks)
    aligned = problem.aligned or _aligned((k, problem.k_strides), (v, problem.v_strides))
    return _behind(problem, problem.head_dim, ranked=kept, copied=True, replaced=not kept, aligned=aligned)


def projection_of(problem: Problem, reduction: Projection | LowRank, q: Any, k: Any) -> Projection:
    """The projection of a call; of low-rank factors, that of every head of every batch entry, one after another."""
    if isinstance(reduction, Projection):
        return reduction
    if problem.device is None:
        return _of_arrays(problem, reduction, lowrank.find(q, k, problem, reduction.rank))
    with launch.placed(problem.device, None):
        _, made = launch.find(problem, q, k, reduction.rank)
        host = made.get()
    units, head_dim = problem.batch * problem.heads_kv, problem.head_dim
    factors, mean = np.split(host, [2 * units * head_dim * reduction.rank])
    a, b = factors.reshape(units, 2, head_dim, -1).swapaxes(0, 1)
    return _of_arrays(problem, reduction, lowrank.Found(a, b, mean.reshape(units, head_dim)))


def _of_arrays(problem: Problem, reduction: LowRank, arrays: lowrank.Found) -> Projection:
    """Low-rank factors as a projection of as many heads as all batch entries have together."""
    units, nothing = problem.batch * problem.heads_kv, np.zeros((problem.batch * problem.heads_kv, 0))
    unseen = np.zeros((units, len(ranks_allowed(problem.head_dim))))
    return Projection(
        problem.batch * problem.heads,
        units,
        problem.head_dim,
        (reduction.rank,) * units,
        reduction.near,
        reduction.sinks,
        queries=arrays.queries,
        keys=arrays.keys,
        mean=arrays.mean,
        singular_values=nothing,
        output_errors=unseen,
        row_errors=unseen + lowrank.UNSEEN_ROW / ROW_MARGIN,  # no data tells
    )


def within(
    problem: Problem,
    projection: Projection | LowRank,
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
        own = projection_of(problem, projection, q, k)
        ranks, errors = reference.decide(q, k, v, problem, own, tolerance)
        reduced = launch.Reduced(None, None, ranks)
        result, lse = launch.attention(problem, q, k, v, out, return_lse, None, own, reduced)
        return result, lse, ranks, errors
    return _projected(problem, projection, q, k, v, out, return_lse, stream, tolerance)


def _projected(
    problem: Problem,
    projection: Projection | LowRank,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    return_lse: bool,
    stream: Any,
    tolerance: float | None,
) -> tuple[Any, Any, Any, Any]:
    """The same on a device; without a tolerance every head is projected, and there are no errors."""
    assert problem.device is not None
    with launch.placed(problem.device, stream):
        ranks, errors = _head_ranks(problem, projection), None
        kept = bool(problem.near or problem.sinks)
        if kept and tolerance is None and not any(x.reduced for x in passes(problem)):
            return *launch.attention(exact(problem), q, k, v, out, return_lse, None), ranks, errors
        if isinstance(projection, LowRank):
            factors, _ = launch.find(problem, q, k, projection.rank, sketched=tolerance is not None)
        else:
            factors = projection.factors(q.dtype, problem.device)
        made = launch.project(problem, q, k, factors, return_lse or kept, sketched=tolerance is not None)
        if tolerance is not None:
            known = _head_errors(problem, projection)
            ranks, errors = launch.decide(problem, q, k, v, made, ranks, known, tolerance, reference.SPREAD)
        own, replaced = projected_problem(problem, projection, v, tolerance)
        reduced = None
        if own.ranked is not None:
            reduced = launch.Reduced(made.queries, made.keys, ranks, None if replaced else made.shift)
        queries, keys = (made.queries, made.keys) if replaced else (q, k)
        result, lse = launch.attention(own, queries, keys, v, out, return_lse, None, None, reduced)
        if lse is not None and replaced and made.shift is not None:
            lse += made.shift
        return result, lse, ranks, errors


def _head_ranks(problem: Problem, projection: Projection | LowRank) -> Any:
    assert problem.device is not None
    if isinstance(projection, Projection):
        return projection.head_ranks(problem.batch, problem.device)
    ranks = launch.constant((problem.batch, problem.heads), (projection.rank,), "int32", problem.device)
    launch.hold(ranks)
    return ranks[..., 0]


def _head_errors(problem: Problem, projection: Projection | LowRank) -> Any:
    assert problem.device is not None
    if isinstance(projection, Projection):
        return projection.head_errors(problem.batch, problem.device)
    unseen = (0.0, lowrank.UNSEEN_ROW**2)
    known = launch.constant((problem.batch, problem.heads), unseen, "float32", problem.device)
    launch.hold(known)
    return known


def projected_problem(
    problem: Problem, projection: Projection | LowRank, v: Any, tolerance: float | None
) -> tuple[Problem, bool]:
    """What is launched behind a projection, and whether Qhat and Khat take the place of q and k in it."""
    kept = bool(problem.near or problem.sinks)
    ranked = projection.mixed or kept or tolerance is not None
    fewer = projection.rank < problem.head_dim and tolerance is None  # of every head
    # Where no head needs q and k themselves: all heads lack the shift then.
    replaced = not ranked or (fewer and not kept)
    aligned = problem.aligned or _aligned((v, problem.v_strides))
    own = _behind(
        problem, projection.columns, ranked=ranked, alike=projection.alike, replaced=replaced, aligned=aligned
    )
    return own, replaced


def _aligned(*arrays: tuple[Any, tuple[int, int, int]]) -> bool:
    return all(rows_aligned(x.data.ptr, strides, x.itemsize) for x, strides in arrays)


@functools.lru_cache(maxsize=1024)
def _behind(
    problem: Problem,
    columns: int,
    *,
    ranked: bool,
    replaced: bool,
    aligned: bool,
    copied: bool = False,
    alike: bool = False,
) -> Problem:
    """The problem that is left when Qhat and Khat are there, contiguous and of so many columns.

    ``ranked``: heads, or keys, may need q and k beside them. ``replaced``: they stand in the place of q and k.
    ``copied``: there is Qhat alone, and k is Khat. ``aligned``: whether all other arrays are.
    """
    q_strides = _contiguous(problem, problem.heads, problem.seqlen_q, columns)
    k_strides = (
        problem.k_strides if copied else _contiguous(problem, problem.heads_kv, problem.seqlen_k, columns)
    )
    changes: dict[str, Any] = {"reduction": None, "rank": None, "restore": False}
    if ranked:
        changes["ranked"] = Ranked(columns, q_strides, k_strides, copied, alike)
    if replaced:
        made = (q_strides,) if copied else (q_strides, k_strides)
        changes |= {"head_dim": columns, "q_strides": q_strides, "k_strides": k_strides}
        changes["aligned"] = aligned and all(rows_aligned(0, x, ITEMSIZE[problem.dtype]) for x in made)
    return dataclasses.replace(problem, **changes)


def _contiguous(problem: Problem, heads: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Strides of a contiguous array as the problem's own are given."""
    return row_strides((problem.batch, heads, rows), (heads * rows * columns, rows * columns, columns), 1)
