"""Kernels against the float64 reference of the same method, judged by what plain CuPy in the same dtype achieves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

import cudistr
from cudistr import launch, normalize, reference
from cudistr import plan as planner
from cudistr.projection import ROW_MARGIN
from tests.strategies import BFLOAT16, LAYOUTS, kept_pairs

try:
    import cupy as cp
except ImportError:  # the marker gpu skips every test that would touch it
    cp = None

# The largest relative error of rounding a number to the dtype. float32 values reach the tensor cores as two TF32 halves
# of 11 bits, so that 23 of their 24 bits are sure to arrive, and weights as exactly as an exponential is one: a value
# that is only passed through, with a weight next to one, may come back 2**-22 off.
ROUNDOFF = {np.dtype(np.float16): 2.0**-11, BFLOAT16: 2.0**-8, np.dtype(np.float32): 2.0**-22}

# A number of Q and one of K, 0 for none, too large for the float16 sums of groups of more than two bfloat16 columns.
BEYOND_FLOAT16 = {"keys": (0.0, 1e5), "queries": (1e5, 0.0), "both": (3e4, 3e4)}


@contextmanager
def replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Calls in here are planned with another function of the planner."""
    own = getattr(planner, name)

    def forget() -> None:
        planner.plan.cache_clear()
        launch._recipe.cache_clear()

    setattr(planner, name, function)
    forget()
    try:
        yield
    finally:
        setattr(planner, name, own)
        forget()


def splits(count: int) -> AbstractContextManager[None]:
    """Calls in here share the keys of a tile of the portable kernel among so many thread blocks."""
    return replaced("choose_splits", lambda problem, device, work: (count, 0))


def sections(heads: int) -> AbstractContextManager[None]:
    """Calls in here have tiles of so many heads taken in turn by the portable kernel, if there is a mask."""
    return replaced("_section", lambda problem, device, work, packed: heads)


def large_float32_tiles() -> AbstractContextManager[None]:
    """Calls in here have the tiles that float32 has for many queries."""
    return replaced("has_rows", lambda problem, device, rows: True)


def on_device(x: np.ndarray, layout: str = "contiguous") -> Any:
    """A CuPy array with the values of ``x`` and one of the layouts of :mod:`tests.strategies`."""
    buffer, view = LAYOUTS[layout](x)
    return view(cp.asarray(buffer))


def same_bits(one: Any, other: Any) -> None:
    """Assert that two arrays, on either side, are equal to the bit; NaN equals NaN, 0 does not equal -0."""
    one, other = (np.ascontiguousarray(cp.asnumpy(x)) for x in (one, other))
    assert one.dtype == other.dtype and one.shape == other.shape
    np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def mask(seqlen_q: int, seqlen_k: int, causal: bool = False, window: Any = None) -> np.ndarray:
    """Which query sees which key, (seqlen_q, seqlen_k)."""
    left, right = window if window is not None else (None, None)
    ahead = np.arange(seqlen_k)[None, :] - (np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q)
    seen = ahead <= 0 if causal else np.ones((seqlen_q, seqlen_k), bool)
    if left is not None:
        seen = seen & (ahead >= -left)
    if right is not None:
        seen = seen & (ahead <= right)
    return seen


def rising(q: np.ndarray, k: np.ndarray, rise: float) -> None:
    """Make the scores of each head rise from the last keys, which kernels see first, to the first ones, in two steps.

    The rise goes from 0 for the first query to ``rise`` for the last.
    """
    size = np.sqrt(q.shape[-1])
    q[..., 0] = np.linspace(0, size, q.shape[2]).astype(q.dtype)
    k[..., 0] = np.repeat([rise / 2, 0, -rise / 2], -(-k.shape[2] // 3))[: k.shape[2]].astype(k.dtype)


def rounded(x: Any, dtype: np.dtype, xp: Any) -> Any:
    """float32 values rounded to ``dtype``, still float32."""
    if dtype == np.float32:
        return x
    if dtype == np.float16:
        return x.astype(xp.float16).astype(xp.float32)
    # bfloat16 is the upper half of float32; round to nearest, ties to even.
    bits = xp.ascontiguousarray(x).view(xp.uint32)
    bits = bits + xp.uint32(0x7FFF) + ((bits >> xp.uint32(16)) & xp.uint32(1))
    return (bits & xp.uint32(0xFFFF0000)).view(xp.float32)


def lost(q: Any, copied: Any, keys: Any, head_dim: int, scale: float | None, xp: Any) -> Any:
    """What groups with weights leave out of the weight of reduced keys, before the scale: (batch, heads, rows, 1)."""
    if keys.shape[2] == 0:
        return xp.float32(0)
    scale = head_dim**-0.5 if scale is None else scale
    mean, variance = keys.mean(axis=2, keepdims=True), keys.var(axis=2, keepdims=True)
    limit = float(np.log(keys.shape[2]))
    result = ((q - copied) * mean).sum(axis=(3, 4))
    for sign, x in ((1, q), (-1, copied)):
        spread = scale**2 * (x**2 * variance).sum(axis=(3, 4))
        growth = xp.where(spread < 2 * limit, spread / 2, xp.sqrt(2 * limit * spread) - limit)
        result += xp.float32(sign / scale) * growth
    return result[..., None]


def baseline(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    xp: Any,
    *,
    reduction: cudistr.LSH | cudistr.Energy | cudistr.Projection | None = None,
    causal: bool = False,
    window: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    copied: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention as plain array code of the same precision would do it: out and lse, float32 on the host.

    The yardstick for a kernel. Products take inputs of the dtype and accumulate in float32, as a matrix unit does;
    what stands between two products has to be rounded to the dtype before the second one: the unnormalised P, and
    for the reduced product Qhat and Khat, whose columns are added in float32 and rounded once. Any flash kernel
    rounds there too, so an error well above this one is the kernel's own. The inputs have been rounded by the
    caller. float32 rounds nowhere but in its own arithmetic. copied: whether the product is one of k and of what stands
    for q, which is then what is rounded: means of columns too, and no Khat.
    """
    dtype = q.dtype
    shared = q.shape[1] // k.shape[1]
    block = normalize.problem(q, k, v, reduction=reduction).exact_block
    queries = xp.asarray(q.astype(np.float32))
    keys, values = (xp.repeat(xp.asarray(x.astype(np.float32)), shared, axis=1) for x in (k, v))
    if isinstance(reduction, cudistr.Projection):
        a, b, mean = (
            xp.asarray(np.repeat(x, q.shape[1] // len(x), axis=0))
            for x in (reduction.queries, reduction.keys, reduction.mean)
        )
        qhat = rounded(xp.matmul(queries, a), dtype, xp)
        khat = rounded(xp.matmul(keys - mean[:, None], b), dtype, xp)
        shift = xp.matmul(queries, mean[:, :, None])
        kept = xp.asarray(kept_pairs(q.shape[2], k.shape[2], reduction.near, reduction.sinks, block))
        exact = xp.matmul(queries, keys.swapaxes(2, 3))
        scores = xp.where(kept, exact, xp.matmul(qhat, khat.swapaxes(2, 3)) + shift)
    elif reduction is None or getattr(reduction, "group_size", 0) == 1:
        scores = xp.matmul(queries, keys.swapaxes(2, 3))
    elif isinstance(reduction, cudistr.Energy):
        permutations, means = map(xp.asarray, reference.solve_columns(q, reduction, k))
        means = rounded(means, dtype, xp) if copied else means
        scores = xp.zeros((*q.shape[:3], k.shape[2]), xp.float32)
        kept = xp.asarray(kept_pairs(q.shape[2], k.shape[2], reduction.near, reduction.sinks, block))
        for n in range(permutations.shape[2]):
            rows = slice(n * reduction.block_q, (n + 1) * reduction.block_q)
            columns = permutations[:, :, n, None, :].astype(np.int64)
            few, all_keys = (xp.take_along_axis(x, columns, axis=3) for x in (queries[:, :, rows], keys))
            few = few[..., : reduction.keep]
            rest = xp.matmul(all_keys[..., reduction.keep :], means[:, :, n, reduction.keep :, None])
            reduced = xp.matmul(few, all_keys[..., : reduction.keep].swapaxes(2, 3)) + rest.swapaxes(2, 3)
            if (reduction.near or reduction.sinks) and softcap is None:
                sizes = (*q.shape[:2], 1, -1, 1)
                own = xp.take_along_axis(queries[:, :, rows], columns, axis=3)[..., None]
                stands = xp.broadcast_to(means[:, :, n].reshape(sizes), own.shape).copy()
                stands[..., : reduction.keep, :] = own[..., : reduction.keep, :]
                far = all_keys[:, :, reduction.sinks :, :, None]
                reduced += lost(own, stands, far, q.shape[3], scale, xp)
            exact = xp.matmul(queries[:, :, rows], keys.swapaxes(2, 3))
            scores[:, :, rows] = xp.where(kept[rows], exact, reduced)
    else:
        permutations, numbers = reference.solve_columns(q, reduction, k if reduction.by_keys else None)
        permutations = xp.asarray(permutations.astype(np.int64))
        scores = xp.zeros((*q.shape[:3], k.shape[2]), xp.float32)
        kept = kept_pairs(q.shape[2], k.shape[2], reduction.near, reduction.sinks, block)
        for n in range(permutations.shape[2]):
            rows = slice(n * reduction.block_q, (n + 1) * reduction.block_q)
            columns = permutations[:, :, n, None, :]
            grouped, summed = (
                xp.take_along_axis(x, columns, axis=3).reshape(*x.shape[:3], -1, reduction.group_size)
                for x in (queries[:, :, rows], keys)
            )
            qhat = grouped[..., 0] if reduction.representative == "sample" else grouped.mean(axis=4)
            lacking = xp.float32(0)
            if numbers is not None:
                sizes = (2, *q.shape[:2], 1, -1, reduction.group_size)
                weights, shares = xp.asarray(numbers[:, :, :, n]).reshape(sizes)
                qhat = (grouped * shares).sum(axis=4) / (weights * shares).sum(axis=4)
                if (reduction.near or reduction.sinks) and softcap is None:
                    stands = weights * qhat[..., None]
                    stands = rounded(stands, dtype, xp) if copied else stands
                    lacking = lost(grouped, stands, summed[:, :, reduction.sinks :], q.shape[3], scale, xp)
                if copied:
                    qhat = rounded(weights * qhat[..., None], dtype, xp).reshape(*qhat.shape[:3], -1)
                    summed = summed.reshape(*summed.shape[:3], -1, 1)
                else:
                    summed = summed * weights
            qhat, khat = rounded(qhat, dtype, xp), rounded(summed.sum(axis=4), dtype, xp)
            exact = xp.matmul(queries[:, :, rows], keys.swapaxes(2, 3))
            reduced = xp.matmul(qhat, khat.swapaxes(2, 3)) + lacking
            scores[:, :, rows] = xp.where(xp.asarray(kept[rows]), exact, reduced)
    scores *= xp.float32(q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = xp.float32(softcap) * xp.tanh(scores / xp.float32(softcap))
    seen = xp.asarray(mask(q.shape[2], k.shape[2], causal, window))
    scores = xp.where(seen, scores, xp.float32(-np.inf))
    top = scores.max(axis=3, keepdims=True)
    top = xp.where(top == -np.inf, xp.float32(0), top)
    weights = xp.exp(scores - top)
    total = weights.sum(axis=3, keepdims=True)
    some = total > 0
    safe = xp.where(some, total, xp.float32(1))
    out = rounded(
        xp.where(some, xp.matmul(rounded(weights, dtype, xp), values) / safe, xp.float32(0)), dtype, xp
    )
    lse = xp.where(some, top + xp.log(safe), xp.float32(-np.inf))[..., 0]
    return (out, lse) if xp is np else (cp.asnumpy(out), cp.asnumpy(lse))


@dataclass(frozen=True)
class Allowed:
    """Largest error and relative Frobenius error that a kernel may have."""

    largest: float
    relative: float


def allowed(base: np.ndarray, exact: np.ndarray, roundoff: float) -> Allowed:
    """Twice the baseline's error, and one rounding of the result, which the baseline's luck may have hidden."""
    error = np.abs(base - exact)
    norm = np.linalg.norm(exact)
    return Allowed(
        2 * error.max() + roundoff * np.abs(exact).max(),
        2 * float(np.linalg.norm(error) / norm) + roundoff if norm else 0.0,
    )


def compare(out: Any, exact: np.ndarray, base: np.ndarray, what: str = "out") -> None:
    """Assert that a kernel's result is about as close to the float64 one as the baseline is."""
    limit = allowed(base, exact, ROUNDOFF[np.dtype(out.dtype)])
    error = cp.asnumpy(out).astype(np.float64) - exact
    largest, norm = np.abs(error).max(), np.linalg.norm(exact)  # NaN fails the comparisons below
    relative = np.linalg.norm(error) / norm if norm else 0.0
    assert largest <= limit.largest, f"{what}: largest error {largest:.3g}, allowed {limit.largest:.3g}"
    assert relative <= limit.relative, f"{what}: relative error {relative:.3g}, allowed {limit.relative:.3g}"


def compare_lse(lse: Any, exact: np.ndarray, base: np.ndarray) -> None:
    """The same for lse: absolute, since lse passes through zero.

    The extra term is four roundings of numbers of lse's size: the scaled score, the maximum, the logarithm, the sum.
    """
    lse = cp.asnumpy(lse)
    assert lse.dtype == np.float32
    some = exact > -np.inf
    np.testing.assert_array_equal(lse[~some], -np.inf)
    if some.any():
        error, base_error = (np.abs(x[some].astype(np.float64) - exact[some]).max() for x in (lse, base))
        limit = 2 * base_error + 4 * 2.0**-24 * max(1.0, np.abs(exact[some]).max())
        assert error <= limit, f"lse: largest error {error:.3g}, allowed {limit:.3g}"


def check_kernel(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    layouts: tuple[str, str, str] = ("contiguous",) * 3,
    out: Any = None,
    on_host: bool = False,
    like: tuple[np.ndarray, np.ndarray] | None = None,
    copied: bool = False,
    **options: Any,
) -> Any:
    """Run the kernel on NumPy inputs of one dtype sent to the GPU, and hold out and lse against the reference.

    Parameters
    ----------
    out : CuPy array, optional
        Passed on; it must come back.
    on_host : bool
        Compute the baseline with NumPy, so that under a sanitizer nothing runs but our kernels.
    like : (out, lse), optional
        What the result must be, float64, if not the reference of the same call.
    copied : bool
        Of the baseline.

    Returns
    -------
    CuPy array
        The kernel's output.
    """
    arrays = [on_device(x, layout) for x, layout in zip((q, k, v), layouts, strict=True)]
    result, lse = cudistr.attention(*arrays, out=out, return_lse=True, **options)
    assert type(result) is cp.ndarray and type(lse) is cp.ndarray
    assert result.dtype == q.dtype and result.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3]
    assert out is None or result is out
    if like is None:
        like = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), return_lse=True, **options)
    base, base_lse = baseline(q, k, v, np if on_host else cp, copied=copied, **options)
    compare(result, like[0], base)
    compare_lse(lse, like[1], base_lse)
    hidden = ~mask(q.shape[2], k.shape[2], options.get("causal", False), options.get("window")).any(axis=1)
    np.testing.assert_array_equal(cp.asnumpy(result)[:, :, hidden].astype(np.float32), 0.0)
    return result


def check_tf32(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, layout: str = "contiguous", **options: Any
) -> float:
    """Hold the float32 kernel to TF32's error, with ``CUPY_TF32=1`` set. Returns its largest error.

    The yardstick is the same call on keys and values rounded to 11 significant bits, which is what TF32 operands are;
    P is rounded too, so one rounding of the output's size comes on top.
    """

    def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
        exponent = np.frexp(x)[1] - 1
        return np.round(x * 2.0 ** (10 - exponent)) * 2.0 ** (exponent - 10.0)

    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact = reference.attention(*wide, **options)
    like = np.abs(reference.attention(wide[0], *map(rounded_to_tf32, wide[1:]), **options) - exact).max()
    error = np.abs(
        cp.asnumpy(cudistr.attention(*(on_device(x, layout) for x in (q, k, v)), **options)) - exact
    )
    largest = float(error.max())
    assert largest <= 2 * like + 2.0**-11 * np.abs(exact).max()
    return largest


def inputs(
    seed: int,
    dtype: Any,
    *,
    batch: int = 2,
    heads: int = 4,
    heads_kv: int | None = None,
    lengths: tuple[int, int] = (113, 203),
    head_dim: int = 64,
    head_dim_v: int | None = None,
    spread: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal q, k, v on the host, rounded to ``dtype``."""
    random = np.random.default_rng(seed)
    kv = (batch, heads if heads_kv is None else heads_kv, lengths[1])
    q = spread * random.standard_normal((batch, heads, lengths[0], head_dim))
    k = random.standard_normal((*kv, head_dim))
    v = random.standard_normal((*kv, head_dim if head_dim_v is None else head_dim_v))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def of_ranks(q: np.ndarray, k: np.ndarray, *ranks: int) -> cudistr.Projection:
    """A projection whose KV heads have these ranks."""
    projection = cudistr.Projection.fit(q, k, rank=max(ranks))
    own = np.arange(projection.queries.shape[2]) < np.array(ranks)[:, None, None]
    return dataclasses.replace(
        projection, ranks=ranks, queries=projection.queries * own, keys=projection.keys * own
    )


def check_decided(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, projection: cudistr.Projection, *ranks: int, **options: Any
) -> tuple[Any, Any]:
    """Hold a call whose tolerance leaves these ranks to the KV heads against heads that have them anyway.

    Returns out and lse.
    """
    like = of_ranks(q, k, *ranks).with_near(projection.near, sinks=projection.sinks)
    heads = np.repeat(np.array([ranks] * q.shape[0], np.int32), q.shape[1] // k.shape[1], axis=1)
    with mock.patch.object(launch, "decide", return_value=(on_device(heads), None)):
        out, lse = cudistr.attention(
            *map(on_device, (q, k, v)),
            reduction=projection,
            tolerance=0.9,
            exact_if_faster=False,
            return_lse=True,
            **options,
        )
    exact = reference.attention(
        *(x.astype(np.float64) for x in (q, k, v)), reduction=like, return_lse=True, **options
    )
    base = baseline(q, k, v, np, reduction=like, **options)
    compare(out, exact[0], base[0])
    compare_lse(lse, exact[1], base[1])
    return out, lse


def with_errors(projection: cudistr.Projection) -> cudistr.Projection:
    """The same, with errors of its own for every KV head and rank, as a fit with v knows them.

    The first KV head has larger errors than any sample finds.
    """
    allowed = len(range(0, projection.head_dim, 16)) + 1
    errors = np.arange(1.0, projection.heads_kv * allowed + 1).reshape(-1, allowed) / 100
    errors[0] += 8.0
    return dataclasses.replace(projection, output_errors=errors, row_errors=(9 - errors) / ROW_MARGIN)
