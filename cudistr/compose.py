"""A call made of several: keys that a reduction leaves exact, and the far ones, merged by lse."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from cudistr import launch
from cudistr.normalize import Problem

__all__ = ["Part", "attention", "parts"]


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
    exact = dataclasses.replace(whole, reduction=None)
    sides = ((low, -near), (near, high)) if near else ((low, high),)
    wanted = [(exact, 0, keys, max(low, 1 - near), min(high, near - 1))]
    for side in sides:
        wanted += [(exact, 0, sinks, *side), (whole, sinks, keys, *side)]
    found = [_part(*part) for part in wanted if _sees(problem, *part[1:])]
    if all(part.problem.reduction is None for part in found):
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
    problem: Problem, q: Any, k: Any, v: Any, out: Any, return_lse: bool, stream: Any
) -> tuple[Any, Any]:
    """Run a checked problem. Returns (out, lse); lse is None unless asked for."""
    if problem.device is None or not (problem.near or problem.sinks):
        return launch.attention(problem, q, k, v, out, return_lse, stream)
    chosen = parts(problem)
    if len(chosen) == 1:
        (part,) = chosen
        k, v = (x[:, :, part.first : part.last] for x in (k, v))
        return launch.attention(part.problem, q, k, v, out, return_lse, stream)
    with launch.placed(problem.device, stream):
        results = []
        for part in chosen:
            keys, values = (x[:, :, part.first : part.last] for x in (k, v))
            results.append(launch.attention(part.problem, q, keys, values, None, True, None))
        outs, lses = zip(*results, strict=True)
        launch.hold(results)
        merged, lse = launch.merge(outs, lses, return_lse, None)
        if out is None:
            return merged, lse
        out[...] = merged
        return out, lse
