"""Low-rank factors found on the device, against those of the host; and calls with them, against the same factors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cudistr
from cudistr import LowRank, compose, launch, lowrank, normalize, reference
from cudistr.plan import LOWRANK_ROWS, PROJECT_GROUP
from cudistr.projection import in_lanes, in_parts, mean_columns
from tests.gpu.util import baseline, compare, compare_lse, cp, on_device, same_bits
from tests.strategies import BFLOAT16, DTYPES, LAYOUTS

pytestmark = pytest.mark.gpu

ROUNDING = 2.0**-8  # of rows to bfloat16, before their products are summed

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def arrays(seed, dtype, *, batch=2, heads=4, heads_kv=2, lengths=(150, 200), head_dim=64, slope=None):
    """q, k and v whose columns, mixed, have less and less energy; k has a mean that is not zero."""
    random = np.random.default_rng(seed)
    slope = head_dim / 6 if slope is None else slope
    mixed = random.standard_normal((head_dim,) * 2) * np.exp(-np.arange(head_dim) / slope)[:, None]
    mixed *= np.sqrt(head_dim / (mixed**2).sum())
    q = random.standard_normal((batch, heads, lengths[0], head_dim)) @ mixed
    k = random.standard_normal((batch, heads_kv, lengths[1], head_dim)) @ mixed + random.standard_normal(
        head_dim
    )
    v = random.standard_normal((batch, heads_kv, lengths[1], head_dim))
    return tuple(x.astype(dtype) for x in (q, k, v))


def scores_of(q, k, found):
    """Of each KV head of each entry the scores, and those of its factors."""
    shared = q.shape[1] // k.shape[1]
    for unit, (b, h) in enumerate(np.ndindex(k.shape[:2])):
        queries = q[b, h * shared : (h + 1) * shared].reshape(-1, q.shape[3]).astype(np.float64)
        keys = k[b, h].astype(np.float64) - found.mean[unit]
        yield queries @ keys.T, (queries @ found.queries[unit]) @ (keys @ found.keys[unit]).T


def score_errors(q, k, found):
    """Of each KV head of each entry: the part of the scores that factors leave out."""
    pairs = scores_of(q, k, found)
    return np.array([np.linalg.norm(scores - reduced) / np.linalg.norm(scores) for scores, reduced in pairs])


def check_found(
    dtype,
    head_dim,
    rank,
    *,
    lengths=(150, 200),
    layout="contiguous",
    slope=None,
    rounding=ROUNDING,
    batch=2,
):
    """Hold the factors of a call to those of the host, and what smxx_project.cu reads to the factors."""
    q, k, v = arrays(rank, dtype, batch=batch, lengths=lengths, head_dim=head_dim, slope=slope)
    given = normalize.adopt(
        **{name: on_device(x, layout) for name, x in zip("qkv", (q, k, v), strict=True)}
    ).arrays
    reduction = LowRank(rank, near=20, sinks=5)
    problem = normalize.problem(*given, reduction=reduction, causal=True)
    factors, _ = launch.find(problem, *given[:2], rank, sketched=True)
    found = compose.projection_of(problem, reduction, *given[:2])
    host = normalize.problem(q, k, v, reduction=reduction, causal=True)
    expected = lowrank.find(q, k, host, rank)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-5)
    # Another rounding of the sums finds other vectors of nearly the same space.
    errors, wanted = (score_errors(q, k, x) for x in (found, expected))
    assert (errors <= 1.2 * wanted + rounding).all()
    # Orthonormal in the metric of the sums, but for columns of which nothing but rounding is left: these are shorter, and
    # overlap a little.
    values = np.linalg.eigvals(found.keys.swapaxes(1, 2).astype(np.float64) @ found.queries)
    assert values.real.min() > -0.02 and values.real.max() < 1.05

    own = np.dtype(dtype)
    like = [in_lanes(in_parts(x.swapaxes(1, 2), own), PROJECT_GROUP) for x in (found.queries, found.keys)]
    like.append(in_lanes(mean_columns(found.mean, own), lowrank.SKETCH)[..., :4, :])
    for one, other in zip((factors.queries, factors.keys, factors.mean), like, strict=True):
        np.testing.assert_array_equal(cp.asnumpy(one), other)
    bias = np.einsum("ud,udr->ur", found.mean.astype(np.float64), found.keys)
    np.testing.assert_allclose(cp.asnumpy(factors.bias), bias, atol=1e-5 * np.abs(found.keys).max())
    sketch = in_lanes(in_parts(found.sketch().astype(np.float32).swapaxes(1, 2), own), lowrank.SKETCH)
    parts = [
        cp.asnumpy(x).view(own).astype(np.float64).sum(axis=2) for x in (factors.sketch, on_device(sketch))
    ]
    np.testing.assert_allclose(*parts, atol=1e-3)
    return found


def entry(found, problem, b):
    """The projection of one entry."""
    own = slice(b * problem.heads_kv, (b + 1) * problem.heads_kv)
    names = ("queries", "keys", "mean", "singular_values", "output_errors", "row_errors")
    return dataclasses.replace(
        found,
        heads=problem.heads,
        heads_kv=problem.heads_kv,
        ranks=found.ranks[own],
        _copies={},
        **{name: getattr(found, name)[own] for name in names},
    )


def check_call(q, k, v, reduction, **options):
    """Hold a call to the float64 reference with the factors that it has found."""
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=reduction, **options)
    found = compose.projection_of(problem, reduction, *given[:2])
    out, lse = cudistr.attention(*given, reduction=reduction, return_lse=True, **options)
    for b in range(len(q)):
        own = [x[b : b + 1] for x in (q, k, v)]
        projection = entry(found, problem, b)
        like = reference.attention(
            *(x.astype(np.float64) for x in own), reduction=projection, return_lse=True, **options
        )
        base, base_lse = baseline(*own, np, reduction=projection, **options)
        compare(out[b : b + 1], like[0], base)
        compare_lse(lse[b : b + 1], like[1], base_lse)
    return out


@each_dtype
@pytest.mark.parametrize(("head_dim", "rank"), [(24, 16), (64, 48), (128, 64), (192, 80), (256, 128)])
def test_factors_are_those_of_the_host(dtype, head_dim, rank):
    check_found(dtype, head_dim, rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check_found(np.float16, 64, 32, layout=layout)


@each_dtype
def test_columns_of_which_only_rounding_is_left(dtype):
    found = check_found(dtype, 128, 64, slope=5.0)
    assert np.isfinite(found.queries).all() and np.isfinite(found.keys).all()


@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 5000), (2, 90), (5000, 1), (3000, 2047), (3000, 2048), (700, 2049)]
)
def test_lengths(lengths):
    q, k, v = arrays(3, np.float16, batch=1, lengths=lengths, head_dim=32)
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=LowRank(16))
    found = compose.projection_of(problem, LowRank(16), *given[:2])
    expected = lowrank.find(q, k, normalize.problem(q, k, v, reduction=LowRank(16)), 16)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-5)
    if lengths[1] > 1:
        assert (score_errors(q, k, found) <= 1.2 * score_errors(q, k, expected) + ROUNDING).all()
    assert np.isfinite(cp.asnumpy(cudistr.attention(*given, reduction=LowRank(16))).astype(np.float32)).all()


@each_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (120, 90), "scale": -0.2}], ids=str)
@pytest.mark.parametrize("reduction", [LowRank(16), LowRank(32, near=40, sinks=30)], ids=str)
def test_calls(dtype, options, reduction):
    check_call(*arrays(5, dtype, lengths=(130, 260)), reduction, **options)


@pytest.mark.parametrize("family", ["portable", "hopper"])
def test_families(family, monkeypatch):
    monkeypatch.setenv("CUDISTR_KERNEL", family)
    check_call(*arrays(6, BFLOAT16, lengths=(260, 300), head_dim=128), LowRank(64), causal=True)


def check_attended(dtype, lengths=(300, 420)):
    """Keys that are attended to differ in 12 columns: these are kept, though others have more energy in the rest.

    Some of the others are attended to as well, but stay exact.
    """
    random = np.random.default_rng(12)
    q, k, v = (random.standard_normal((1, 1, n, 64)) for n in (*lengths, lengths[1]))
    q[..., 0] = 12
    k *= 2
    k[..., ::3, :] /= 2
    k[..., ::3, 12:] = 0
    k[..., 0] = -9
    k[..., ::3, 0] = 9
    k[..., :40, 12:] = 2 * random.standard_normal((40, 52))
    k[..., :40, 0] = 10
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    given = [on_device(x) for x in (q, k, v)]
    reduction = LowRank(32, sinks=40)
    found = compose.projection_of(normalize.problem(*given, reduction=reduction), reduction, *given[:2])
    # The first column is the same in all queries, and nothing to softmax. Of the others two rounds leave a tenth out, of the
    # fewest keys here 0.23; with all keys alike, or with those that stay exact, it would be 0.6 and more.
    products = (found.queries[0] @ found.keys[0].T)[1:12, 1:12]
    np.testing.assert_allclose(products, np.eye(11), atol=0.25)


@each_dtype
def test_keys_count_by_the_attention_they_get(dtype):
    check_attended(dtype)


def test_equal_arrays_give_equal_bits():
    given = [on_device(x) for x in arrays(7, np.float16)]
    one, other = (cudistr.attention(*given, reduction=LowRank(32), causal=True) for _ in range(2))
    same_bits(one, other)


@each_dtype
def test_what_is_not_finite_stays_where_it_is(dtype):
    q, k, v = arrays(8, dtype, batch=1)
    queries = q.copy()
    problem = normalize.problem(q, k, v, reduction=LowRank(32))
    head, row = lowrank.drawn(problem, LOWRANK_ROWS)[3]
    queries[0, head, row, 5], queries[0, head, row, 6] = np.nan, np.inf
    out = cudistr.attention(*(on_device(x) for x in (queries, k, v)), reduction=LowRank(32))
    found = cp.asnumpy(out).astype(np.float32)
    assert np.isnan(found[0, head, row]).all()
    assert np.isfinite(np.delete(found[0, head], row, axis=0)).all()
    assert np.isfinite(np.delete(found[0], head, axis=0)).all()


@pytest.mark.parametrize("kept", [(0, 0), (20, 9)], ids=str)
def test_decisions_are_those_of_the_host(kept):
    # The first KV head has 12 columns' worth of scores, the second all of them.
    random = np.random.default_rng(9)
    q, k, v = random.standard_normal((3, 2, 2, 220, 64))
    for x in (q, k):
        x[:, 0, :, 12:] = 0
    q, k, v = (x.astype(np.float16) for x in (q, k, v))
    reduction = LowRank(16, near=kept[0], sinks=kept[1])
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=reduction, causal=True)
    out, _, ranks, errors = compose.within(problem, reduction, *given, None, False, None, 0.3)
    found = compose.projection_of(problem, reduction, *given[:2])
    host = normalize.problem(q, k, v, reduction=reduction, causal=True)
    expected, wanted = reference.decide(q, k, v, host, found, 0.3)
    np.testing.assert_array_equal(cp.asnumpy(ranks), expected)
    assert expected.tolist() == [[16, 64]] * 2
    # Rounding of Qhat, Khat and the weights comes on top of the reduction's error.
    np.testing.assert_allclose(cp.asnumpy(errors)[..., 0], wanted[..., 0], rtol=0.05, atol=2e-3)
    same_bits(out[:, 1], cudistr.attention(*given, causal=True)[:, 1])
    report = cudistr.attention_error(
        *given, causal=True, reduction=reduction, tolerance=0.3, exact_if_faster=False
    )
    assert report.ranks == ((16, 64),) * 2


def test_a_measured_error_is_that_of_the_call():
    q, k, v = arrays(10, np.float16, slope=30.0)
    given = [on_device(x) for x in (q, k, v)]
    report = cudistr.attention_error(*given, reduction=LowRank(16), rows=10**6)
    out = cp.asnumpy(cudistr.attention(*given, reduction=LowRank(16))).astype(np.float64)
    exact = reference.attention(*(x.astype(np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(
        report.output.value, np.linalg.norm(out - exact) / np.linalg.norm(exact), rtol=1e-3
    )
    problem = normalize.problem(*given, reduction=LowRank(16))
    found = compose.projection_of(problem, LowRank(16), *given[:2])
    sums = np.zeros(2)  # of each row less its mean, which softmax does not see
    for scores, reduced in scores_of(q, k, found):
        sums += [((x - x.mean(axis=1, keepdims=True)) ** 2).sum() for x in (scores - reduced, scores)]
    assert report.scores.value == pytest.approx(np.sqrt(sums[0] / sums[1]), rel=1e-6)


@pytest.mark.small
def test_small():
    q, k, v = arrays(11, np.float16, batch=1, heads=2, heads_kv=1, lengths=(161, 173), head_dim=40)
    check_call(q, k, v, LowRank(16, near=40, sinks=9), causal=True)
