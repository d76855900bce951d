"""attention_error: the error itself where all rows are compared, and intervals that hold what they promise."""

from __future__ import annotations

import math
import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

import cudistr
from cudistr.measure import Estimate, estimate, probabilities
from tests.cpu.fakes import library
from tests.strategies import (
    Case,
    cases,
    expanded,
    kept_pairs,
    naive_attention,
    naive_scores,
    random,
    seen_pairs,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

TRIALS = 2000
COVERED = (0.93, 0.97)  # of intervals of 95%; 2000 trials have a standard error of 0.5%
ROWS = 64


# Where all rows are compared


def energies(case: Case) -> dict[str, np.ndarray]:
    """Squared norms per row, (batch, heads, seqlen_q), from whole matrices."""
    options = {name: value for name, value in case.options.items() if name != "reduction"}
    reduction = case.options.get("reduction")
    scores = {key: value for key, value in options.items() if key in ("scale", "softcap")}
    scores.setdefault("scale", case.q.shape[3] ** -0.5)
    exact = naive_attention(*case.arrays, **options)[0]
    reduced = cudistr.attention(*case.arrays, **case.options).astype(np.float64)
    seen = seen_pairs(
        case.q.shape[2], case.k.shape[2], options.get("causal", False), options.get("window")
    ).astype(float)
    s = naive_scores(case.q, case.k, **scores)
    queries = case.q if reduction is None else expanded(case.q, reduction, case.k)
    e = s - naive_scores(queries, case.k, **scores)

    def centred(x: np.ndarray) -> np.ndarray:
        mean = (x * seen).sum(axis=3) / np.maximum(seen.sum(axis=1), 1)
        return (((x - mean[..., None]) * seen) ** 2).sum(axis=3)

    return {
        "errors": ((reduced - exact) ** 2).sum(axis=3),
        "sizes": (exact**2).sum(axis=3),
        "score errors": centred(e),
        "score sizes": centred(s),
        "norms": (reduced**2).sum(axis=3),
        "visible": seen.sum(axis=1),
    }


def ratio(errors: np.ndarray, sizes: np.ndarray) -> float:
    total, size = errors.sum(), sizes.sum()
    return math.sqrt(total / size) if size else math.inf if total else 0.0


@settings(max_examples=60)
@given(cases(max_seqlen=150))
def test_all_rows_give_the_error_itself(case):
    report = cudistr.attention_error(*case.arrays, **case.options, rows=10**6)
    assert report.rows == case.q.shape[0] * case.q.shape[2]
    energy = energies(case)
    # A row that sees one key has no scores but rounding once its mean is taken off.
    close = dict(rel=1e-6, abs=1e-7)
    for kind, found, per_head in (
        ("", report.output, report.output_heads),
        ("score ", report.scores, report.scores_heads),
    ):
        errors, sizes = energy[f"{kind}errors"], energy[f"{kind}sizes"]
        if sizes.sum() > 1e-12:
            assert found.value == pytest.approx(ratio(errors, sizes), **close)
        assert len(per_head) == case.q.shape[1]
        for h, one in enumerate(per_head):
            if sizes[:, h].sum() > 1e-12:
                assert one.value == pytest.approx(ratio(errors[:, h], sizes[:, h]), **close)
            assert one.low == one.value == one.high


def test_all_rows_where_columns_are_kept_by_energy():
    q, k, v = (random(seed, 2, 2, 90, 32) for seed in range(3))
    k[:, :, :9] *= 20 * random(4, 32)  # sinks, which do not decide which columns stay
    report = cudistr.attention_error(q, k, v, reduction=cudistr.Energy(16, near=5, sinks=9), rows=1000)
    left = expanded(q, cudistr.Energy(16, near=0, sinks=9), k)
    exact = naive_scores(q, k)
    shift = np.empty((2, 2, 90, 1))
    for b, h in np.ndindex(2, 2):
        far = k[b, h, 9:].astype(np.float64)
        shift[b, h] = cudistr.reference.restored(q[b, h].astype(np.float64), left[b, h], far, 32**-0.5)
    assert np.abs(shift).mean() > 0.01  # it does count
    error = exact - naive_scores(left, k, scale=32**-0.5) - shift
    error = np.where(kept_pairs(90, 90, 5, 9), 0.0, error)
    errors, sizes = (((x - x.mean(axis=3, keepdims=True)) ** 2).sum(axis=3) for x in (error, exact))
    assert report.scores.value == pytest.approx(ratio(errors, sizes), rel=1e-5)


def test_a_sample_estimates_the_error():
    # The interval of nearly every seed holds the error: 95% in the long run, and what is seen of it in 100.
    case = Case(
        *(random(seed, 2, 2, 90, 16) for seed in range(3)),
        {"causal": True, "reduction": cudistr.LSH(2)},
        ("contiguous",) * 3,
        "",
    )
    energy = energies(case)
    truth = ratio(energy["errors"], energy["sizes"])
    score_truth = ratio(energy["score errors"][:, 1], energy["score sizes"][:, 1])
    hits = np.zeros(2, int)
    for seed in range(100):
        report = cudistr.attention_error(*case.arrays, **case.options, rows=32, seed=seed)
        found = (report.output, truth), (report.scores_heads[1], score_truth)
        hits += [one.low <= true <= one.high for one, true in found]
    assert (hits >= 90).all()


def test_same_seed_same_report():
    q, k, v = (random(seed, 1, 2, 200, 16) for seed in range(3))
    one, same, other = (
        cudistr.attention_error(q, k, v, reduction=cudistr.LSH(2), seed=seed) for seed in (1, 1, 2)
    )
    assert one == same and one != other


# Coverage


def covered(errors: np.ndarray, sizes: np.ndarray, chances: np.ndarray) -> float:
    """Share of TRIALS samples whose interval holds the true ratio."""
    truth = ratio(errors, sizes)
    generator = np.random.RandomState(11)
    steps = np.cumsum(chances)
    hits = 0
    for _ in range(TRIALS):
        drawn = np.minimum(np.searchsorted(steps, generator.random_sample(ROWS)), len(errors) - 1)
        found = estimate(*(x[None, drawn] / chances[drawn] for x in (errors, sizes)))
        hits += found.low <= truth <= found.high
    return hits / TRIALS


def populations() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Squared errors and sizes of 4000 rows."""
    generator = np.random.RandomState(3)
    one, other = generator.standard_normal((2, 4000))
    return {
        "even": (0.01 * (1 + 0.2 * one) ** 2, (1 + 0.2 * other) ** 2),
        "skewed": (0.01 * np.exp(one), np.exp(0.5 * other)),
        "error follows size": (0.01 * np.exp(one), np.exp(0.7 * one + 0.3 * other)),
        "a fifth without error": (
            0.01 * np.exp(0.7 * one) * (generator.random_sample(4000) < 0.8),
            np.exp(0.3 * other),
        ),
    }


@pytest.mark.parametrize("name", populations())
def test_coverage_on_synthetic_errors(name):
    errors, sizes = populations()[name]
    share = covered(errors, sizes, probabilities(sizes[None], np.full(4000, 4000.0))[0])
    assert COVERED[0] <= share <= COVERED[1]


def test_coverage_on_causal_attention():
    # The first rows see few keys, are long and hold most of ||O||: uniform sampling covers 78% here.
    arrays = [random(seed, 1, 1, 700, 32) for seed in range(3)]
    case = Case(*arrays, {"causal": True, "reduction": cudistr.LSH(2)}, ("contiguous",) * 3, "")
    energy = {name: value.reshape(-1) for name, value in energies(case).items()}
    chances = probabilities(energy["norms"][None], energy["visible"])[0]
    share = covered(energy["errors"], energy["sizes"], chances)
    assert COVERED[0] <= share <= COVERED[1]


def test_two_heads_are_two_strata():
    # The sum over heads of very different error: each head brings its own variance, not their difference.
    generator = np.random.RandomState(5)
    errors = 0.01 * np.exp(0.5 * generator.standard_normal((2, 4000))) * np.array([[1.0], [100.0]])
    truth, hits, together = ratio(errors, np.ones((2, 4000))), 0, 0
    for _ in range(400):
        drawn = np.take_along_axis(errors, generator.randint(0, 4000, (2, ROWS)), 1)
        found = estimate(drawn, np.ones((2, ROWS)))
        hits += found.low <= truth <= found.high
        mixed = estimate(drawn.reshape(1, -1), np.ones((1, 2 * ROWS)))
        together += (mixed.high - mixed.low) > (found.high - found.low)
    assert 0.92 <= hits / 400 <= 0.98
    assert together > 390


def test_probabilities_are_positive_and_add_up():
    norms, visible = np.array([[0.0, 1.0, np.nan], [4.0, np.inf, 0.0]]), np.array([1.0, 2.0, 0.0])
    chances = probabilities(norms, visible)
    assert chances.sum() == pytest.approx(1) and (chances >= 1 / 18).all()
    np.testing.assert_allclose(probabilities(np.zeros((1, 4)), np.full(4, 7.0)), 0.25)


# What comes out in special cases


@pytest.mark.parametrize(
    ("errors", "sizes", "expected"),
    [
        ([0, 0, 0], [1, 2, 3], (0, 0, 0)),
        ([0, 0], [0, 0], (0, 0, 0)),
        ([1, 0], [0, 0], (math.inf,) * 3),
        ([np.nan, 1], [1, 1], (math.nan,) * 3),
        ([4, 4, 4], [1, 1, 1], (2, 2, 2)),
        ([4], [1], (2, 0, math.inf)),
    ],
    ids=str,
)
def test_special_estimates(errors, sizes, expected):
    found = estimate(np.array([errors], float), np.array([sizes], float))
    np.testing.assert_allclose((found.value, found.low, found.high), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_axes(shape):
    batch, heads, seqlen_q, seqlen_k = shape
    q, k = np.ones((batch, heads, seqlen_q, 16), "f4"), np.ones((batch, heads, seqlen_k, 16), "f4")
    report = cudistr.attention_error(q, k, k, reduction=cudistr.LSH(2))
    assert report.output == Estimate(0, 0, 0) and len(report.scores_heads) == heads


def test_rounding_alone():
    q, k, v = (random(seed, 1, 2, 100, 16, dtype=np.float16) for seed in range(3))
    report = cudistr.attention_error(q, k, v)
    assert 1e-5 < report.output.value < 2**-11 and report.scores == Estimate(0, 0, 0)


def test_nan_is_seen():
    q, k, v = (random(seed, 1, 1, 20, 16) for seed in range(3))
    v[0, 0, 3, 5] = np.nan
    assert math.isnan(cudistr.attention_error(q, k, v, reduction=cudistr.LSH(2)).output.value)


def test_arrays_of_other_libraries(monkeypatch):
    array = library(monkeypatch, "fakelib")
    sys.modules["fakelib"].from_dlpack = lambda x: array(np.from_dlpack(x))
    arrays = [random(seed, 1, 2, 70, 16) for seed in range(3)]
    expected = cudistr.attention_error(*arrays, reduction=cudistr.LSH(2))
    assert cudistr.attention_error(*map(array, arrays), reduction=cudistr.LSH(2)) == expected


def test_report_prints_as_a_table():
    report = cudistr.attention_error(*(random(s, 1, 2, 9, 16) for s in range(3)), reduction=cudistr.LSH(2))
    lines = str(report).splitlines()
    assert lines[0] == "relative errors from 9 rows of each head (95% interval)"
    assert [line.split()[0] for line in lines[1:]] == ["output", "all", "head", "head"]
    assert str(Estimate(0.12345, 0.1, 0.2)) == "0.123 (0.1 to 0.2)" and str(Estimate(0.5, 0.5, 0.5)) == "0.5"


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"rows": 0},
            ValueError,
            "rows must be at least 1, got 0. Pass 64, for example; as many as there are takes all.",
        ),
        ({"rows": -3}, ValueError, "rows must be at least 1, got -3"),
        (
            {"rows": 2.5},
            TypeError,
            "rows must be an integer, got float 2.5. Pass how many query rows of each head to sample, 64",
        ),
        ({"rows": True}, TypeError, "rows must be an integer, got bool True"),
        ({"rows": None}, TypeError, "rows must be an integer, got NoneType None"),
        ({"seed": -1}, ValueError, "seed must be from 0 to 2**32 - 1, got -1"),
        (
            {"seed": "a"},
            TypeError,
            "seed must be an integer, got str 'a'. Pass an integer from 0 to 2**32 - 1",
        ),
        ({"causal": 1}, TypeError, "causal must be True or False, got int 1"),
        (
            {"reduction": 2},
            TypeError,
            "reduction must be None (exact), a cudistr.LSH, a cudistr.Energy, a cudistr.LowRank or a cudistr.Projection, got",
        ),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str):
    x = np.ones((1, 1, 4, 16), np.float32)
    with pytest.raises(error, match=re.escape(text)):
        cudistr.attention_error(x, x, x, **options)


def test_arrays_are_checked_as_for_attention():
    x = np.ones((1, 1, 4, 16), np.float32)
    with pytest.raises(TypeError, match="k must be an array"):
        cudistr.attention_error(x, None, x)
    with pytest.raises(ValueError, match="k: head_dim must be that of q, 16, got 8"):
        cudistr.attention_error(x, x[..., :8], x)
