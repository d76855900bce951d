"""NumPy truth: every step of the method in float64, short enough to check by eye.

The public functions are twins of those in :mod:`cudistr`: same arguments, results in float64. They are
what runs when the arrays are NumPy arrays, and what the kernels are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cudistr import normalize
from cudistr.normalize import Problem, near_keys
from cudistr.plan import PROBE_ROWS
from cudistr.reductions import LSH, Energy, Reduction, projections

if TYPE_CHECKING:  # it stands above the launch room, which computes NumPy arrays by this module
    from cudistr.projection import Projection

__all__ = [
    "attention",
    "balance",
    "energy_order",
    "fuse",
    "group",
    "hash_codes",
    "key_energies",
    "merge",
    "order",
    "rank",
    "sample",
]

Float = NDArray[np.float64]
Single = NDArray[np.float32]

# Twins of constants in smxx_lsh_weights.cu and smxx_key_energy.cu.
SQUARINGS = 10  # of a group's products: the largest eigenvalue's share grows to its 1024th power
LEAST_SPREAD = np.float32(1 / 64)  # of a column of K, as a part of the largest in its group
LEAST_WEIGHT = np.float32(2.0**-14)  # smaller ones are 0; the others every dtype has exactly
ENERGY_KEYS = 256  # keys whose deviations are summed one after another

# Standard errors of the logarithm of a squared error that are added to it before it is held against a tolerance. Errors
# are skewed: what a sample misses makes the true one larger.
SPREAD = 4.0


def hash_codes(q_block: NDArray[Any], reduction: LSH) -> NDArray[np.uint32]:
    """Angular hash of every column of a block of queries (arXiv 2507.17245, section 3.2).

    Bit b of column c is ``sum_r R[b, r] q_block[r, c] > 0``. The sum runs over the rows in order, in
    float32 with the product and the sum rounded separately, so that the kernel gives the same bits; a product of
    float16 or bfloat16 is exact, unless it overflows. A sum of exactly zero, and a NaN, give bit 0.

    Parameters
    ----------
    q_block : array (rows, head_dim)
        At most ``block_q`` rows; a short last block uses the first of the projections' entries.

    Returns
    -------
    uint32 array (head_dim,)
    """
    vectors = projections(reduction.n_proj, reduction.rows_per_block, reduction.seed)
    columns = q_block.astype(np.float32)
    sums = np.zeros((reduction.n_proj, columns.shape[1]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for r, row in enumerate(columns):
            sums += vectors[:, r, None] * row
    bits = (sums > 0).astype(np.uint32)
    places = np.arange(reduction.n_proj, dtype=np.uint32)[:, None]
    codes: NDArray[np.uint32] = np.bitwise_or.reduce(bits << places, axis=0)
    return codes


def rank(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Position of each code (below 2**16) in the binary-reflected Gray sequence: ``c ^ c>>1 ^ c>>2 ^ ...``."""
    ranks = codes.copy()
    for shift in (1, 2, 4, 8):
        ranks ^= ranks >> np.uint32(shift)
    return ranks


def order(q_block: NDArray[Any], reduction: LSH) -> NDArray[np.intp]:
    """Column order of one block of queries: columns sorted by (rank, column index). Shape (head_dim,).

    Where a group has weights, a column and its negative are alike: of a code and its complement the smaller counts.
    """
    codes = hash_codes(q_block, reduction)
    if reduction.representative == "rank1":
        codes = np.minimum(codes, codes ^ np.uint32(2**reduction.n_proj - 1))
    return np.argsort(rank(codes), kind="stable")


def balance(
    q_block: NDArray[Any], permutation: NDArray[np.intp], reduction: LSH, energies: Single
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Weights of the columns of each group: the best approximation of rank one of what they add to the scores.

    A group adds ``sum_c q_c k_c^T``, of which ``q_c = y_c qhat`` keeps the most where y is the eigenvector of the
    largest eigenvalue of the products ``e_a e_b q_a . q_b``, with the spread e of the columns of K (their energies,
    over the largest of the group, and at least 1/64; all 1 where that is zero or not finite). It is found by squaring
    the matrix until nothing else is left of it. The column of its largest entry comes first. With ``r_c = e_c / e_1``
    and ``y_1 = 1``, columns of K have the weights ``w_c = y_c / r_c``, rounded to eight significant bits, which every
    dtype has, and columns of Q the shares ``r_c**2 w_c``, see :func:`sample`: the best for the rounded weights. Where
    there is no largest (zeros, NaN) the first column stands for the group, and the others' weights are 0. All in
    float32, in one order, so that the kernel gives the same bits.

    Returns
    -------
    permutation (head_dim,), numbers (2, head_dim)
        The order with each group's first column moved to its place; weights and shares in this order.
    """
    size = reduction.group_size
    order = permutation.reshape(-1, size)
    groups = np.arange(len(order))
    with np.errstate(all="ignore"):
        spread = energies[order]
        largest = np.fmax.reduce(spread, axis=1, initial=np.float32(0))[:, None]
        relative = spread / largest
        relative = np.where(relative >= LEAST_SPREAD, relative, LEAST_SPREAD)  # NaN too
        spread = np.where((largest > 0) & (largest < np.inf), relative, np.float32(1))
        columns = q_block.astype(np.float32)[:, order] * spread
        products = np.zeros((len(order), size, size), np.float32)
        for row in columns:
            products += row[:, :, None] * row[:, None, :]
        for _ in range(SQUARINGS):
            products = _squared(_over_trace(products))
        diagonal = products[:, np.arange(size), np.arange(size)]
        # A strict comparison, as the kernel's: NaN is never the largest.
        lead, most = np.zeros(len(order), np.intp), diagonal[:, 0]
        for member in range(1, size):
            larger = diagonal[:, member] > most
            lead = np.where(larger, member, lead)
            most = np.where(larger, diagonal[:, member], most)
        ratio = spread / spread[groups, lead][:, None]
        weights = _eight_bits(products[groups, lead] / most[:, None] / ratio)
        usual = (np.abs(weights) >= LEAST_WEIGHT) & (np.abs(weights) <= 2 / LEAST_SPREAD)
        weights = np.where(usual, weights, np.float32(0))
        weights[groups, lead] = 1
        numbers = np.stack([weights, ratio * (ratio * weights)])
    order = order.copy()
    for array in (order, *numbers):
        array[groups, lead], array[:, 0] = array[:, 0].copy(), array[groups, lead].copy()
    return order.reshape(-1), numbers.reshape(2, -1)


def _eight_bits(x: Single) -> Single:
    """The nearest numbers of eight significant bits, ties to even: bfloat16."""
    bits = x.view(np.uint32)
    rounded: Single = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded


def _over_trace(products: Single) -> Single:
    trace = np.zeros(len(products), np.float32)
    for member in range(products.shape[1]):
        trace += products[:, member, member]
    return products / trace[:, None, None]


def _squared(products: Single) -> Single:
    square = np.zeros_like(products)
    for member in range(products.shape[1]):
        square += products[:, :, member, None] * products[:, None, member, :]
    return square


def sample(
    q_block: NDArray[Any], permutation: NDArray[Any], reduction: LSH, numbers: Single | None = None
) -> NDArray[Any]:
    """Qhat (rows, head_dim / group_size): the first column of each group, the mean of the group, or its weighted mean.

    The last is ``sum_c s_c q_c / sum_c s_c w_c`` with the weights w and shares s of :func:`balance`.
    """
    grouped = q_block[:, permutation].reshape(len(q_block), -1, reduction.group_size)
    if numbers is not None:
        weights, shares = numbers.astype(np.float64).reshape(2, -1, reduction.group_size)
        return (grouped * shares).sum(axis=2) / (shares * weights).sum(axis=1)  # type: ignore[no-any-return]
    return grouped[:, :, 0] if reduction.representative == "sample" else grouped.mean(axis=2)


def restored(q: Any, copied: Any, keys: Any, scale: float, xp: Any = np) -> Any:
    """What is left out of the weight of reduced keys beside exact ones, to be added to each row's scores: (rows, 1).

    ``copied`` stands for q in the products with the reduced ``keys`` (seqlen, head_dim). The part of the mean of the
    keys is known exactly; for the rest the columns of K are taken to be independent and normal, so that the logarithm
    of the mean of exp(score) grows by :func:`_growth` of the variance of a row's scores.
    """
    if len(keys) == 0:
        return xp.zeros((len(q), 1))
    mean, variance, limit = keys.mean(axis=0), keys.var(axis=0), math.log(len(keys))
    parts = [_growth(scale**2 * (x**2 @ variance), limit, xp) for x in (q, copied)]
    shift = scale * ((q - copied) @ mean) + parts[0] - parts[1]
    return xp.where(xp.isfinite(shift), shift, 0.0)[:, None]


def _growth(variance: Any, limit: float, xp: Any) -> Any:
    """Logarithm of the mean of exp(x) over ``exp(limit)`` normal numbers x of mean 0.

    Half the variance, until the largest number decides (Derrida, *Random-energy model*, Phys. Rev. B 24, 2613, 1981).
    """
    return xp.where(variance < 2 * limit, variance / 2, xp.sqrt(2 * limit * variance) - limit)


def fuse(
    k: NDArray[Any], permutation: NDArray[Any], group_size: int, weights: Single | None = None
) -> NDArray[Any]:
    """Khat (seqlen_k, head_dim / group_size): the sum of each group's columns of K, with their weights if given."""
    columns = k[:, permutation] if weights is None else k[:, permutation] * weights
    khat: NDArray[Any] = columns.reshape(len(k), -1, group_size).sum(axis=2)
    return khat


def key_energies(k: NDArray[Any]) -> Single:
    """``||k_c - mean(k_c)||`` of each column of one head's K (seqlen_k, head_dim), float32, shape (head_dim,).

    From sums of the deviations from the first key and of their squares, over 256 keys one after another and then over
    these sums, so that the kernel gives the same bits.
    """
    columns = k.astype(np.float32)
    head_dim = columns.shape[1]
    padded = -(-len(columns) // ENERGY_KEYS) * ENERGY_KEYS
    with np.errstate(all="ignore"):
        deviations = np.zeros((padded, head_dim), np.float32)
        deviations[: len(columns)] = columns - columns[:1]
        parts = np.zeros((2, padded // ENERGY_KEYS, head_dim), np.float32)
        for key in deviations.reshape(-1, ENERGY_KEYS, head_dim).swapaxes(0, 1)[: len(columns)]:
            parts[0] += key
            parts[1] += key * key
        sums = np.zeros((2, head_dim), np.float32)
        for part in parts.swapaxes(0, 1):
            sums += part
        squares = sums[1] - sums[0] * (sums[0] / np.float32(len(columns)))
        energies: Single = np.sqrt(np.where(squares < 0, np.float32(0), squares))
    return energies


def energy_order(q_block: NDArray[Any], energies: Single) -> tuple[NDArray[np.intp], Single]:
    """Columns of one block of queries by energy, the largest first, and the mean of each column.

    The energy of a column is its norm in the block, less its mean, times that of its column of K; NaN counts as the
    largest. Columns of equal energy stay in order. float32 in one order, so that the kernel gives the same bits.

    Returns
    -------
    permutation (head_dim,), means (head_dim,)
        The means are in the order of the permutation.
    """
    columns = q_block.astype(np.float32)
    with np.errstate(all="ignore"):
        means = np.zeros(columns.shape[1], np.float32)
        for row in columns:
            means += row
        means /= np.float32(len(columns))
        squares = np.zeros_like(means)
        for row in columns:
            squares += (row - means) * (row - means)
        own = np.sqrt(squares) * energies
    bits = np.where(
        np.isnan(own), np.uint32(0x7FFFFFFF), own.view(np.uint32)
    )  # of numbers >= 0: as they are ordered
    permutation = np.argsort(~bits, kind="stable")
    return permutation, means[permutation]


def visible(rows: Any, problem: Problem, xp: Any = np) -> Any:
    """Which keys the query rows see, bool (len(rows), seqlen_k).

    Query i sees key j when ``i + off - left <= j <= i + off + right`` with ``off = seqlen_k - seqlen_q``
    (bottom-right alignment); causal is right = 0. ``xp`` is the array module of ``rows``.
    """
    position = rows[:, None] + (problem.seqlen_k - problem.seqlen_q)
    keys = xp.arange(problem.seqlen_k)[None, :]
    seen = xp.ones((len(rows), problem.seqlen_k), bool)
    if problem.left is not None:
        seen &= keys >= position - problem.left
    if problem.right is not None:
        seen &= keys <= position + problem.right
    return seen


def visible_count(problem: Problem) -> NDArray[np.intp]:
    """How many keys each query row sees, (seqlen_q,)."""
    position = np.arange(problem.seqlen_q) + (problem.seqlen_k - problem.seqlen_q)
    first = 0 if problem.left is None else np.maximum(position - problem.left, 0)
    last = (
        problem.seqlen_k - 1
        if problem.right is None
        else np.minimum(position + problem.right, problem.seqlen_k - 1)
    )
    return np.broadcast_to(np.maximum(last - first + 1, 0), problem.seqlen_q)


def reduced_count(problem: Problem) -> NDArray[np.intp]:
    """How many keys each query row sees that are not left exact, (seqlen_q,)."""
    position = np.arange(problem.seqlen_q) + (problem.seqlen_k - problem.seqlen_q)
    low = 0 if problem.left is None else position - problem.left
    high = problem.seqlen_k - 1 if problem.right is None else position + problem.right
    first, last = np.maximum(low, near_keys(problem).sinks), np.minimum(high, problem.seqlen_k - 1)
    start, stop = _near(np.arange(problem.seqlen_q), problem)
    near = np.minimum(last, stop - 1) - np.maximum(first, start) + 1
    count: NDArray[np.intp] = np.maximum(last - first + 1, 0) - np.maximum(near, 0)
    return np.broadcast_to(count, problem.seqlen_q)


def _near(rows: Any, problem: Problem) -> tuple[Any, Any]:
    """The first key near each query row that stays exact, and the first one beyond; there may be no such keys."""
    near = near_keys(problem)
    first = rows // near.rows * near.rows
    return (first + near.start) // near.keys * near.keys, -(-(first + near.stop) // near.keys) * near.keys


def kept(rows: Any, problem: Problem, xp: Any = np) -> Any:
    """Which keys the reduction leaves exact for the query rows, bool (len(rows), seqlen_k); seen or not."""
    start, stop = _near(rows[:, None], problem)
    keys = xp.arange(problem.seqlen_k)[None, :]
    return ((keys >= start) & (keys < stop)) | (keys < near_keys(problem).sinks)


def _scores(q: Float, k: Float, problem: Problem) -> Float:
    """Scores before the mask, (rows, seqlen_k)."""
    scores = problem.scale * (q @ k.T)
    if problem.softcap is not None:
        scores = problem.softcap * np.tanh(scores / problem.softcap)
    return scores


def columns_of(
    q_block: NDArray[Any], reduction: LSH, energies: Single | None
) -> tuple[NDArray[np.intp], Single | None]:
    """Order of the columns of one block of queries, and their weights and shares; None where all are 1."""
    permutation = order(q_block, reduction)
    return (permutation, None) if energies is None else balance(q_block, permutation, reduction, energies)


def _grouped_scores(
    q: Float, k: Float, rows: NDArray[Any], energies: Single | None, reduction: LSH, problem: Problem
) -> Float:
    """Scores of Qhat and Khat of a block; ``rows`` are its queries as they came."""
    permutation, numbers = columns_of(rows, reduction, energies)
    qhat = sample(q, permutation, reduction, numbers)
    if numbers is None:
        return _scores(qhat, fuse(k, permutation, reduction.group_size), problem)
    # sum_t qhat_t khat_t = sum_c (qhat_t w_c) k_c
    copied = np.empty_like(q)
    copied[:, permutation] = np.repeat(qhat, reduction.group_size, axis=1) * numbers[0]
    return _scores_of(copied, q, k, problem)


def _kept_scores(q: Float, k: Float, energies: Single, reduction: Energy, problem: Problem) -> Float:
    """Scores of the columns with the most energy, and of the means of the others."""
    permutation, means = energy_order(q, energies)
    copied = q.copy()
    copied[:, permutation[reduction.keep :]] = means[reduction.keep :]
    return _scores_of(copied, q, k, problem)


def _scores_of(copied: Float, q: Float, k: Float, problem: Problem) -> Float:
    """Scores of what stands for q, and what :func:`restored` gives them back."""
    scores = _scores(copied, k, problem)
    if problem.restore:
        scores += restored(q, copied, k[problem.sinks :], problem.scale)
    return scores


def _projected_scores(q: Float, k: Float, projection: Projection, head: int, problem: Problem) -> Float:
    """Scores of Qhat and Khat, and what taking the mean off the keys has taken off each row."""
    if projection.ranks[head] == problem.head_dim:
        return _scores(q, k, problem)
    mean = projection.mean[head].astype(np.float64)
    qhat, khat = q @ projection.queries[head], (k - mean) @ projection.keys[head]
    scores: Float = problem.scale * (qhat @ khat.T + (q @ mean)[:, None])
    return scores


def unit(projection: Projection, problem: Problem, entry: int, head: int) -> int:
    """Which of a projection's KV heads a head of a batch entry has: of low-rank factors, every entry has its own."""
    own = head // (problem.heads // problem.heads_kv)
    return own + entry * problem.heads_kv if projection.heads_kv > problem.heads_kv else own


def _attend(scores: Float, v: Float, seen: NDArray[np.bool_]) -> tuple[Float, Float]:
    """Softmax attention of one block of one head: out (rows, head_dim_v) and lse (rows,)."""
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=1, initial=-np.inf)
    top = np.where(top == -np.inf, 0.0, top)  # a row without any key: exp(-inf - 0) = 0, not exp(nan)
    weights = np.exp(scores - top[:, None])
    total = weights.sum(axis=1)
    empty = total == 0
    out = (weights @ v) / np.where(empty, 1.0, total)[:, None]
    out[empty] = 0.0
    return out, np.where(empty, -np.inf, top + np.log(np.where(empty, 1.0, total)))


def draw(residual: Float, problem: Problem) -> tuple[NDArray[np.intp], Float]:
    """Query rows of a head that stand for all, and one over the chance of each.

    A row's chance is a quarter each of: uniform, and by one over the number of keys that it sees and that are not
    exact; and half by its residual, the energy that the reduction misses, if there are such keys. Points a constant
    apart are laid along the sum of all chances, so that a row which takes more than its share is drawn for certain.
    """
    found = chances(residual, problem)
    ends = np.cumsum(found)
    points = (np.arange(PROBE_ROWS) + 0.5) / PROBE_ROWS * ends[-1]
    rows = np.minimum(np.searchsorted(ends, points), len(residual) - 1)
    return rows, ends[-1] / found[rows]


def chances(residual: Float, problem: Problem) -> Float:
    """Of each row, to be drawn: a sum that may stay below 1."""
    count = reduced_count(problem)
    keys = np.where(count > 0, 1.0 / np.maximum(count, 1), 0.0)
    missed = np.where(np.isfinite(residual) & (residual > 0) & (count > 0), residual, 0.0)
    found = np.full(len(residual), 0.25 / len(residual))
    for share, weights in ((0.25, keys), (0.5, missed)):
        if weights.sum() > 0:
            found += share * weights / weights.sum()
    return found


def error_bound(errors: Float, sizes: Float, least: float = 0.0, missed: float = 0.0) -> tuple[float, float]:
    """Relative error from draws of squared errors and sizes, each times one over its chance; and its upper bound.

    The ratio of both sums, and SPREAD standard errors of its logarithm by linearisation. Not a number is no bound.
    ``least`` and ``missed`` are squared relative errors: what the bound is at least, and what rows that were not drawn
    may add.
    """
    if not errors.any():
        return 0.0, 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = errors.sum() / sizes.sum()
        influence = errors / errors.sum() - sizes / sizes.sum()
        deviation = np.sqrt((influence**2).sum() * len(errors) / (len(errors) - 1))
        bound = ratio * np.exp(SPREAD * deviation) + missed
        return float(np.sqrt(ratio)), float(np.sqrt(np.maximum(bound, least)))


def decide(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    problem: Problem,
    projection: Projection,
    tolerance: float,
) -> tuple[NDArray[np.int32], Float]:
    """Columns that each head uses: those of the projection where the output error keeps to the tolerance, or head_dim.

    Returns ranks (batch, heads), and (batch, heads, 2): the relative error as estimated from sampled rows, and its
    upper bound, which decides. Heads that are exact anyway have 0.
    """
    shared = problem.heads // problem.heads_kv
    sketch = projection.sketch()
    known = projection.known() / (1, problem.seqlen_q)  # one row of a head
    ranks = np.full((problem.batch, problem.heads), problem.head_dim, np.int32)
    found = np.zeros((problem.batch, problem.heads, 2))
    for b, h in np.ndindex(*ranks.shape):
        group = unit(projection, problem, b, h)
        if projection.ranks[group] == problem.head_dim:
            continue
        of_keys = b, h // shared
        queries, keys, values = (x.astype(np.float64) for x in (q[b, h], k[of_keys], v[of_keys]))
        with np.errstate(invalid="ignore", over="ignore"):
            rows, factors = draw(((queries @ sketch[group]) ** 2).sum(axis=1), problem)
            seen = visible(rows, problem)
            scores = _scores(queries[rows], keys, problem)
            exact, _ = _attend(scores, values, seen)
            projected = _projected_scores(queries[rows], keys, projection, group, problem)
            reduced, _ = _attend(np.where(kept(rows, problem), scores, projected), values, seen)
            squares = [((x**2).sum(axis=1)) * factors for x in (reduced - exact, exact)]
        found[b, h] = error_bound(squares[0], squares[1], *known[h])
        if found[b, h, 1] <= tolerance:
            ranks[b, h] = projection.ranks[group]
    return ranks, found


def solve(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    problem: Problem,
    projection: Projection | None = None,
    ranks: NDArray[np.int32] | None = None,
) -> tuple[Float, Float]:
    """Attention for checked arguments: out (batch, heads, seqlen_q, head_dim_v), lse (batch, heads, seqlen_q).

    Where ``ranks`` (batch, heads) is head_dim, the projection is not used.
    """
    out = np.zeros((problem.batch, problem.heads, problem.seqlen_q, problem.head_dim_v))
    lse = np.full((problem.batch, problem.heads, problem.seqlen_q), -np.inf)
    if out.shape[0] == 0 or out.shape[1] == 0 or problem.seqlen_k == 0:
        return out, lse
    reduction = problem.reduction
    block_q = LSH(1).rows_per_block if reduction is None else reduction.rows_per_block
    shared = problem.heads // problem.heads_kv
    with np.errstate(invalid="ignore", over="ignore"):
        for b, h in np.ndindex(problem.batch, problem.heads):
            keys, values = (x[b, h // shared].astype(np.float64, order="C") for x in (k, v))
            energies = (
                key_energies(k[b, h // shared, problem.sinks :])
                if reduction is not None and reduction.by_keys
                else None
            )
            for start in range(0, problem.seqlen_q, block_q):
                rows = np.arange(start, min(start + block_q, problem.seqlen_q))
                q_block = q[b, h, rows].astype(np.float64, order="C")  # one layout, so one order of sums
                scores = exact = _scores(q_block, keys, problem)
                if projection is not None and (ranks is None or ranks[b, h] < problem.head_dim):
                    own = unit(projection, problem, b, h)
                    scores = _projected_scores(q_block, keys, projection, own, problem)
                elif isinstance(reduction, Energy):
                    assert energies is not None
                    scores = _kept_scores(q_block, keys, energies, reduction, problem)
                elif reduction is not None:
                    scores = _grouped_scores(q_block, keys, q[b, h, rows], energies, reduction, problem)
                if problem.near or problem.sinks:
                    scores = np.where(kept(rows, problem), exact, scores)
                out[b, h, rows], lse[b, h, rows] = _attend(scores, values, visible(rows, problem))
    return out, lse


def solve_columns(
    q: NDArray[Any], reduction: LSH | Energy, k: NDArray[Any] | None = None
) -> tuple[NDArray[np.uint8], Single | None]:
    """Permutations for checked arguments, see :func:`group`, and the numbers that go with them.

    These are means (as the permutations), or weights and shares (2, as the permutations), or None.
    """
    batch, heads, seqlen_q, head_dim = q.shape
    block_q = reduction.rows_per_block
    permutations = np.zeros((batch, heads, -(-seqlen_q // block_q), head_dim), np.uint8)
    kinds = () if isinstance(reduction, Energy) else (2,)
    numbers = np.ones((*kinds, *permutations.shape), np.float32)
    for b, h in np.ndindex(batch, heads):
        energies = None
        if reduction.by_keys:
            assert k is not None
            energies = key_energies(k[b, h // (heads // k.shape[1]), reduction.sinks :])
        for n in range(permutations.shape[2]):
            block = q[b, h, n * block_q : (n + 1) * block_q]
            if isinstance(reduction, Energy):
                assert energies is not None
                permutations[b, h, n], numbers[b, h, n] = energy_order(block, energies)
                continue
            permutations[b, h, n], found = columns_of(block, reduction, energies)
            if found is not None:
                numbers[:, b, h, n] = found
    return permutations, numbers if reduction.by_keys else None


def solve_merge(outs: Sequence[NDArray[Any]], lses: Sequence[NDArray[Any]]) -> tuple[Float, Float]:
    """Merge for checked arguments, see :func:`merge`."""
    shards = np.stack([x.astype(np.float64) for x in outs])
    logs = np.stack([x.astype(np.float64) for x in lses])
    with np.errstate(invalid="ignore"):
        top = logs.max(axis=0)
        top = np.where(top == -np.inf, 0.0, top)
        weights = np.exp(logs - top)
        total = weights.sum(axis=0)
        empty = total == 0
        safe = np.where(empty, 1.0, total)
        # A shard without any key has weight 0 and out 0, so it drops out of the sum.
        out = (weights[..., None] * shards).sum(axis=0) / safe[..., None]
    return out, np.where(empty, -np.inf, top + np.log(safe))


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    reduction: Reduction | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    tolerance: float | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """NumPy twin of :func:`cudistr.attention`: float64 results; ``out`` is a float64 array here."""
    options = dict(reduction=reduction, causal=causal, window=window, scale=scale, softcap=softcap)
    problem = normalize.problem(q, k, v, reference=True, **options)  # type: ignore[arg-type]
    projection: Any = None
    if problem.rank is not None and not problem.empty:
        from cudistr.compose import projection_of  # which imports this module

        projection = projection_of(problem, reduction, q, k)  # type: ignore[arg-type]
    ranks = None
    if tolerance is not None:
        tolerance = normalize.check_tolerance(tolerance, problem, reduction)
    if tolerance is not None and projection is not None and not problem.empty:
        ranks, _ = decide(q, k, v, problem, projection, tolerance)
    result, lse = solve(q, k, v, problem, projection, ranks)
    if out is not None:
        normalize.check_out(out, problem, (q, k, v), dtype="float64")
        out[...] = result
        result = out
    return (result, lse) if return_lse else result


def group(q: Any, reduction: LSH | Energy, k: Any = None) -> NDArray[np.uint8]:
    """NumPy twin of :func:`cudistr.group`."""
    normalize.check_group(q, reduction, k, reference=True)
    return solve_columns(q, reduction, k)[0]


def merge(outs: Sequence[Any], lses: Sequence[Any], *, return_lse: bool = False) -> Any:
    """NumPy twin of :func:`cudistr.merge`: float64 results."""
    normalize.check_merge(outs, lses, reference=True)
    out, lse = solve_merge(outs, lses)
    return (out, lse) if return_lse else out
