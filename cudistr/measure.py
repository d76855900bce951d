"""The error of a reduced score product, measured: sampled query rows are computed exactly and compared."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cudistr import compose, launch, reference
from cudistr.normalize import Problem
from cudistr.projection import Projection, wide
from cudistr.reductions import Energy, LowRank, Reduction

__all__ = ["ErrorReport", "Estimate", "measure"]

Float = NDArray[np.float64]

RESAMPLES = 1000
# Squared errors are skewed: what a sample misses makes the true error larger more often than smaller. With 1.5% at
# the upper end the interval covers 94-97% on the populations of tests/cpu/test_measure.py, with 2.5% some 93-96%.
LOW_TAIL, HIGH_TAIL = 0.025, 0.015
MAX_SCORES = 2**22  # of rows that are computed at once: 32 MiB in float64
MAX_RESAMPLED = 2**20  # draws at once, for the same reason


@dataclass(frozen=True)
class Estimate:
    """A relative error from a sample, with its 95% interval.

    Attributes
    ----------
    value, low, high : float
        The estimate and the ends of the interval; all three are the error itself where every row was computed.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = "" if self.low == self.high else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.value:.3g}{interval}"


@dataclass(frozen=True)
class ErrorReport:
    """What :func:`cudistr.attention_error` found; ``print`` shows it as a table.

    Attributes
    ----------
    rows : int
        Query rows of each head that were compared, drawn from all batch entries.
    output : Estimate
        ``||O - Ohat|| / ||O||`` over all heads.
    scores : Estimate
        The same of the scores as the softmax sees them: over visible keys, each row less its mean.
    output_heads, scores_heads : tuple of Estimate
        The same for each head.
    ranks : tuple of tuple of int, or None
        Only with a tolerance: columns that each head of each batch entry uses; head_dim is exact.
    """

    rows: int
    output: Estimate
    scores: Estimate
    output_heads: tuple[Estimate, ...]
    scores_heads: tuple[Estimate, ...]
    ranks: tuple[tuple[int, ...], ...] | None = None

    def __str__(self) -> str:
        lines = [
            f"relative errors from {self.rows} rows of each head (95% interval)",
            f"{'':<8}{'output':<34}scores",
            f"{'all':<8}{self.output!s:<34}{self.scores}",
        ]
        heads = zip(self.output_heads, self.scores_heads, strict=True)
        lines += [f"{f'head {h}':<8}{output!s:<34}{scores}" for h, (output, scores) in enumerate(heads)]
        if self.ranks is not None:
            lines += [f"ranks of the heads: {', '.join(map(str, ranks))}" for ranks in self.ranks]
        return "\n".join(line.rstrip() for line in lines)


class _Sample(NamedTuple):
    """Rows of one head: batch entries, positions, and the factor that makes a sum over the draws one over all rows."""

    entries: NDArray[np.intp]
    positions: NDArray[np.intp]
    factors: Float


def probabilities(norms: Float, visible: Float) -> Float:
    """With which probability a row is drawn; shape of ``norms``, sums to 1.

    A third each uniformly, by the squared norm of the reduced output, and by one over the number of visible keys.
    Where a few rows hold most of ``||O||`` or most of the error, as the first rows of a causal mask do, a uniform
    sample would miss them; a row that neither rule favours is still drawn with a third of the uniform probability.

    Parameters
    ----------
    norms : array (batch, seqlen_q)
        Squared norms of the reduced output's rows.
    visible : array (seqlen_q,)
        Visible keys of each row.
    """
    uniform = np.full(norms.shape, 1.0 / norms.size)
    parts = [uniform]
    for weights in (norms, np.broadcast_to(1.0 / np.maximum(visible, 1.0), norms.shape)):
        weights = np.where(np.isfinite(weights), weights, 0.0)
        total = weights.sum()
        parts.append(weights / total if total > 0 else uniform)
    return sum(parts) / len(parts)  # type: ignore[return-value]


def estimate(errors: Float, sizes: Float) -> Estimate:
    """Relative error and 95% interval from draws of squared errors and squared sizes, each divided by its probability.

    The ratio estimator ``sqrt(sum errors / sum sizes)``: both sums are unbiased (Hansen and Hurwitz, *Annals of
    Mathematical Statistics* 14, 1943), the bias of their ratio is of order 1 / draws. The interval is the studentised
    bootstrap (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, section 12.5) of the logarithm of the
    ratio; each head is a stratum that is resampled by itself.

    Parameters
    ----------
    errors, sizes : arrays (heads, draws)
        At least two draws, or the interval is not defined and comes back as (0, inf).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, spread = _log_ratio(errors, sizes)
        value = math.sqrt(np.exp(ratio))
        if math.isnan(value):  # 0 / 0, or a NaN in the data
            value = math.nan if np.isnan(errors).any() or np.isnan(sizes).any() else 0.0
        if value == 0 or not math.isfinite(value):
            return Estimate(value, value, value)
        if errors.shape[1] < 2:
            return Estimate(value, 0.0, math.inf)
        pivots = _pivots(errors, sizes, ratio)
    finite = pivots[np.isfinite(pivots)]
    if not finite.size:  # all draws are alike
        return Estimate(value, value, value)
    below, above = np.quantile(finite, (HIGH_TAIL, 1 - LOW_TAIL))
    # Where draws hardly differ, rounding decides on which side of the estimate an end falls.
    low = min(value, math.exp((ratio - above * spread) / 2))
    high = max(value, math.exp((ratio - below * spread) / 2))
    return Estimate(value, low, high)


def _pivots(errors: Float, sizes: Float, ratio: float) -> Float:
    """Studentised log ratios of resamples: (other - ratio) / its standard error."""
    heads, draws = errors.shape
    random = np.random.RandomState(0)
    at_once = max(1, MAX_RESAMPLED // errors.size)
    starts = draws * np.arange(heads)[:, None]
    parts = []
    for first in range(0, RESAMPLES, at_once):
        chosen = starts + random.randint(0, draws, (min(at_once, RESAMPLES - first), heads, draws))
        other, spread = _log_ratio(errors.take(chosen), sizes.take(chosen))
        parts.append((other - ratio) / spread)
    return np.concatenate(parts)


def _log_ratio(errors: Float, sizes: Float) -> tuple[Any, Any]:
    """Logarithm of the ratio of sums over strata, and its standard error by linearisation; axes (..., heads, draws)."""
    draws = errors.shape[-1]
    total, size = (x.sum(axis=(-2, -1), keepdims=True) for x in (errors, sizes))
    influence = errors / total - sizes / size
    influence = influence - influence.mean(axis=-1, keepdims=True)
    variance = (influence**2).sum(axis=(-2, -1)) * draws / max(draws - 1, 1)
    return np.log(total / size)[..., 0, 0], np.sqrt(variance)


def measure(
    problem: Problem,
    reduction: Reduction | None,
    q: Any,
    k: Any,
    v: Any,
    rows: int,
    seed: int,
    stream: Any,
    tolerance: float | None = None,
    exact_if_faster: bool | None = None,
) -> ErrorReport:
    """Compare sampled rows of a checked problem with the exact ones. Waits for the device."""
    every = problem.batch * problem.seqlen_q
    rows = min(rows, every)
    if problem.empty:
        nothing = Estimate(0.0, 0.0, 0.0)
        return ErrorReport(rows, nothing, nothing, (nothing,) * problem.heads, (nothing,) * problem.heads)
    xp = np if problem.device is None else importlib.import_module("cupy")
    with launch.placed(problem.device, stream):
        ranks: NDArray[np.int32] | None = None
        within = tolerance is not None
        problem, reduction, tolerance, *_ = compose.settle(problem, reduction, tolerance, exact_if_faster)
        if within:
            ranks = np.full((problem.batch, problem.heads), problem.head_dim, np.int32)
            if problem.rank is not None:
                assert isinstance(reduction, Projection | LowRank) and tolerance is not None
                out, _, chosen, _ = compose.within(
                    problem, reduction, q, k, v, None, False, stream, tolerance
                )
                ranks = _host(chosen).astype(np.int32)
        if ranks is None or problem.rank is None:
            out, _ = compose.attention(
                problem, reduction, q, k, v, None, False, stream, exact_if_faster=False
            )
        energies, factors = _energies(problem, reduction, q, k, v, out, ranks, rows, seed, stream, xp)
    output, scores = (
        (energies[..., i] * factors, energies[..., i + 1] * factors) for i in (0, 2)
    )  # each (heads, rows)
    found = _exactly if rows == every else estimate
    return ErrorReport(
        rows,
        found(*output),
        found(*scores),
        _of_heads(found, output),
        _of_heads(found, scores),
        None if ranks is None else tuple(tuple(int(r) for r in entry) for entry in ranks),
    )


def _of_heads(found: Callable[[Float, Float], Estimate], pair: tuple[Float, Float]) -> tuple[Estimate, ...]:
    return tuple(found(errors[None], sizes[None]) for errors, sizes in zip(*pair, strict=True))


def _exactly(errors: Float, sizes: Float) -> Estimate:
    """The error where all rows are known."""
    total, size = float(errors.sum()), float(sizes.sum())
    value = math.sqrt(total / size) if size else math.inf if total else 0.0
    return Estimate(value, value, value)


def _energies(
    problem: Problem,
    reduction: Reduction | None,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    ranks: NDArray[np.int32] | None,
    rows: int,
    seed: int,
    stream: Any,
    xp: Any,
) -> tuple[Float, Float]:
    """Squared errors and sizes (heads, rows, 4) of the drawn rows: output, its error, scores, theirs; and factors."""
    norms = np.stack([_host((wide(x, xp) ** 2).sum(axis=2)) for x in out])
    samples = list(_samples(norms, problem, rows, seed))
    orders = numbers = None
    if problem.reduction is not None:
        # The energy of K's columns is that of the keys that are reduced.
        chosen = dataclasses.replace(problem.reduction, sinks=problem.sinks)
        orders, numbers = launch.columns(q, k if chosen.by_keys else None, chosen, stream)
    projection = None
    if isinstance(reduction, Projection | LowRank) and problem.rank is not None:
        projection = compose.projection_of(problem, reduction, q, k)
    energies = np.zeros((problem.heads, rows, 4))
    shared = problem.heads // problem.heads_kv
    step = max(1, MAX_SCORES // problem.seqlen_k)
    for b, group in np.ndindex(problem.batch, problem.heads_kv):
        keys, values = wide(k[b, group], xp), wide(v[b, group], xp)
        for h in range(group * shared, (group + 1) * shared):
            drawn = np.flatnonzero(samples[h].entries == b)
            for first in range(0, len(drawn), step):
                some = drawn[first : first + step]
                positions = xp.asarray(samples[h].positions[some])
                queries = wide(q[b, h][positions], xp)
                scores = reduced = _scores(queries, keys, problem, xp)
                if projection is not None and (ranks is None or ranks[b, h] < problem.head_dim):
                    own = reference.unit(projection, problem, b, h)
                    reduced = _projected(queries, keys, projection, own, problem, xp)
                elif orders is not None:
                    of_head = None if numbers is None else numbers[..., b, h, :, :]
                    copied = _expanded(queries, orders[b, h], of_head, positions, problem, xp)
                    reduced = _scores(copied, keys, problem, xp)
                    if problem.restore:
                        far = keys[problem.sinks :]
                        reduced += reference.restored(queries, copied, far, problem.scale, xp)
                reduced = xp.where(reference.kept(positions, problem, xp), scores, reduced)
                found = _compare(
                    scores,
                    reduced,
                    reference.visible(positions, problem, xp),
                    values,
                    wide(out[b, h][positions], xp),
                    xp,
                )
                energies[h, some] = _host(found)
    return energies, np.stack([sample.factors for sample in samples])


def _samples(norms: Float, problem: Problem, rows: int, seed: int) -> Iterator[_Sample]:
    """The rows of each head: all of them once, or draws with replacement."""
    every = np.arange(problem.batch * problem.seqlen_q)
    visible = reference.visible_count(problem).astype(np.float64)
    uniform = np.random.RandomState(seed).random_sample((problem.heads, rows))
    for h in range(problem.heads):
        chosen, factors = every, np.ones(rows)
        if rows < len(every):
            chances = probabilities(norms[:, h], visible).reshape(-1)
            chosen = np.minimum(np.searchsorted(np.cumsum(chances), uniform[h]), every[-1])
            factors = 1.0 / chances[chosen]
        yield _Sample(chosen // problem.seqlen_q, chosen % problem.seqlen_q, factors)


def _expanded(queries: Any, orders: Any, numbers: Any, positions: Any, problem: Problem, xp: Any) -> Any:
    """What stands for each column of Q: the reduced scores are its products with K."""
    reduction = problem.reduction
    assert reduction is not None
    blocks = positions // reduction.rows_per_block
    order = orders[blocks].astype(np.int64)
    sorted_queries = xp.take_along_axis(queries, order, 1)
    if numbers is not None:
        numbers = numbers[..., blocks, :].astype(np.float64)
    if isinstance(reduction, Energy):
        kept = xp.arange(queries.shape[1])[None] < reduction.keep
        copies = xp.where(kept, sorted_queries, numbers)
    else:
        grouped = sorted_queries.reshape(len(queries), -1, reduction.group_size)
        if numbers is not None:
            weights, shares = numbers.reshape(2, *grouped.shape)
            common = (shares * grouped).sum(axis=2, keepdims=True) / (shares * weights).sum(
                axis=2, keepdims=True
            )
            copies = weights * common
        elif reduction.representative == "sample":
            copies = xp.broadcast_to(grouped[..., :1], grouped.shape)
        else:
            copies = xp.broadcast_to(grouped.mean(axis=2, keepdims=True), grouped.shape)
        copies = copies.reshape(queries.shape)
    return xp.take_along_axis(copies, xp.argsort(order, axis=1), 1)


def _projected(queries: Any, keys: Any, projection: Projection, group: int, problem: Problem, xp: Any) -> Any:
    if projection.ranks[group] == problem.head_dim:
        return _scores(queries, keys, problem, xp)
    a, b, mean = (
        xp.asarray(x[group]).astype(np.float64)
        for x in (projection.queries, projection.keys, projection.mean)
    )
    return problem.scale * (queries @ a @ ((keys - mean) @ b).T + (queries @ mean)[:, None])


def _scores(queries: Any, keys: Any, problem: Problem, xp: Any) -> Any:
    scores = problem.scale * (queries @ keys.T)
    return scores if problem.softcap is None else problem.softcap * xp.tanh(scores / problem.softcap)


def _compare(scores: Any, reduced: Any, seen: Any, values: Any, out: Any, xp: Any) -> Any:
    """Of each row the squared norms of output error, output, score error and scores, (rows, 4)."""
    masked = xp.where(seen, scores, -np.inf)
    some = seen.any(axis=1, keepdims=True)
    top = xp.where(some, masked.max(axis=1, keepdims=True), 0.0)
    weights = xp.exp(masked - top)
    total = weights.sum(axis=1, keepdims=True)
    exact = weights @ values / xp.where(some, total, 1.0)
    centred = [_centred(x, seen, xp) for x in (scores - reduced, scores)]
    return xp.stack([(x**2).sum(axis=1) for x in (out - exact, exact, *centred)], axis=1)


def _centred(scores: Any, seen: Any, xp: Any) -> Any:
    """Each row less its mean over the visible keys, which softmax does not see; 0 elsewhere."""
    count = xp.maximum(seen.sum(axis=1, keepdims=True), 1)
    mean = xp.where(seen, scores, 0.0).sum(axis=1, keepdims=True) / count
    return xp.where(seen, scores - mean, 0.0)


def _host(array: Any) -> Float:
    """The array as a NumPy array."""
    return array if type(array) is np.ndarray else array.get()
