"""A tolerance on the error of a projected call: every head keeps to it, or is exact."""

from __future__ import annotations

import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cudistr
from cudistr import Projection, compose, launch, normalize, reference
from cudistr.normalize import MAX_SEQLEN
from cudistr.plan import Device
from cudistr.tuned import Kept
from tests.strategies import random


def errors(found, exact):
    """Relative error of each head of each batch entry."""
    return np.linalg.norm(found - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))


def low_rank(seed, rank, noise, *, seqlen=300, heads=3, head_dim=32):
    """q and k of the given rank with some noise, and v."""
    basis = random(seed, heads, rank, head_dim)
    q, k = (random(seed + i, 1, heads, seqlen, rank) @ basis / rank**0.5 for i in (1, 2))
    q, k = (x + noise * random(seed + i, *x.shape) for i, x in ((3, q), (4, k)))
    return q, k, random(seed + 5, 1, heads, seqlen, head_dim)


@settings(max_examples=25)
@given(
    st.integers(0, 2**16),
    st.integers(1, 24),
    st.sampled_from([0.0, 0.003, 0.03, 0.1, 1.0]),
    st.sampled_from([0.005, 0.02, 0.2]),
    st.booleans(),
    st.sampled_from(["plain", "sink", "query", "key"]),
    st.sampled_from([(0, 0), (40, 0), (1, 3), (300, 0)]),
)
def test_every_head_keeps_to_it(seed, rank, noise, tolerance, causal, kind, kept):
    q, k, v = low_rank(seed, rank, noise)
    # On what comes before something unusual happens.
    projection = Projection.fit(q, k, rank=16).with_near(kept[0], sinks=kept[1])
    if kind == "sink":
        k[:, :, :2] += 4 * random(seed + 6, 1, 3, 1, 32)
    elif kind == "query":
        q[:, :, 170] = 8 * random(seed + 6, 1, 3, 32)
    elif kind == "key":
        k[:, :, 20] = 8 * random(seed + 6, 1, 3, 32)
    exact = reference.attention(q, k, v, causal=causal)
    found = reference.attention(q, k, v, causal=causal, reduction=projection, tolerance=tolerance)
    assert errors(found, exact).max() <= tolerance


def test_ranks_go_down_where_data_is_low_rank():
    q, k, v = low_rank(1, 12, 0.001)
    q[:, 1], k[:, 1] = random(7, 300, 32), random(8, 300, 32)  # as good as nothing is left of it
    projection = Projection.fit(q, k, rank=16)
    report = cudistr.attention_error(q, k, v, causal=True, reduction=projection, tolerance=0.02, rows=300)
    assert report.ranks == ((16, 32, 16),)
    assert 0 < report.output_heads[0].value <= 0.02 and report.output_heads[1].value < 1e-6
    assert "ranks of the heads: 16, 32, 16" in str(report)
    exact = cudistr.attention(q, k, v, causal=True)
    found = cudistr.attention(q, k, v, causal=True, reduction=projection, tolerance=0.02)
    np.testing.assert_array_equal(found[:, 1], exact[:, 1])


def test_exact_keys_make_room_for_ranks():
    # Every query attends to its own position, which the projection has not seen.
    q, k, v = low_rank(1, 12, 0.001)
    projection = Projection.fit(q, k, rank=16)
    near = random(7, 1, 3, 300, 32)
    q, k = q + near, k + near
    options = dict(causal=True, tolerance=0.5, rows=300)
    for kept, ranks in ((0, (32, 32, 32)), (40, (16, 16, 16))):
        report = cudistr.attention_error(q, k, v, reduction=projection.with_near(kept), **options)
        assert report.ranks == (ranks,) and report.output.value <= 0.5


def test_nan_is_exact():
    q, k, v = low_rank(2, 8, 0.0)
    projection = Projection.fit(q, k, rank=16)
    k[0, 0, 5] = np.nan
    found = cudistr.attention(q, k, v, reduction=projection, tolerance=0.5)
    np.testing.assert_array_equal(found, cudistr.attention(q, k, v, reduction=projection, tolerance=0.5))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(cudistr.attention(q, k, v)))


def test_rows_are_drawn_where_the_error_is():
    q, k, v = low_rank(3, 8, 0.0)
    projection = Projection.fit(q, k, rank=16)
    q[:, :, 170] = random(9, 1, 3, 32)
    problem = cudistr.normalize.problem(q, k, v, reduction=projection)
    missed = ((q[0, 0] @ projection.sketch()[0]) ** 2).sum(axis=1)
    rows, factors = reference.draw(missed, problem)
    assert 170 in rows and (np.diff(rows) >= 0).all()
    # The factors count rows: their sum estimates how many there are.
    assert 0.5 < factors.mean() / 300 < 2


lengths = st.one_of(st.integers(1, 300), st.integers(MAX_SEQLEN - 300, MAX_SEQLEN))
shifts = st.one_of(st.integers(-400, 400), st.integers(-(2**33), 2**33), st.sampled_from([-(2**40), 2**40]))


@settings(max_examples=300)
@given(lengths, lengths, st.tuples(shifts, shifts, shifts, shifts), st.integers(0, 2**31), st.booleans())
def test_bounds_of_keys_fit_32_bits(seqlen_q, seqlen_k, shifts, row, near_the_end):
    row = max(0, seqlen_q - 1 - row % 600) if near_the_end else row % seqlen_q
    names = ("band_low", "band_high", "near_start", "near_stop")
    found = launch._row_bounds(seqlen_k, dict(zip(names, shifts, strict=True)))
    assert all(abs(x) < 2**31 for x in found.values())
    for name, shift, after in zip(
        ("first", "end", "near_first", "near_end"), shifts, (0, 1, 0, 0), strict=True
    ):
        least, most = (found[f"{name}_{end}"] for end in ("least", "most"))
        cut = min(max(row, least), most)
        assert cut - least == min(max(row + shift + after, 0), seqlen_k)


def rare(seed, seqlen=2000, head_dim=128, pairs=24):
    """q, k, v of rank 8 but for pairs of a query and a key: the query attends to it by what a projection leaves out.

    All queries have as much of that, so that nothing in q by itself tells which they are. Returns the queries' places.
    """
    generator = np.random.default_rng(seed)
    q, k, v = generator.standard_normal((3, 1, 1, seqlen, head_dim))
    missed = q[0, 0, :, 8:]  # the columns that no other key has
    missed /= np.linalg.norm(missed, axis=1, keepdims=True)
    rows, keys = generator.choice(seqlen, (2, pairs), replace=False)
    q[..., :8] *= 2
    k[..., :8] *= 2
    k[..., 8:] = 0
    k[0, 0, keys, 8:] = 100 * missed[rows]
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32), rows


def test_rows_that_no_sample_sees_are_known_from_calibration():
    q, k, v, rows = rare(24)
    *calibration, _ = rare(25)
    exact = reference.attention(q, k, v)
    for known in (False, True):
        # Without weights its columns are those of most keys, and without values it knows of no error.
        options = {} if known else {"scale": 0.0}
        projection = Projection.fit(*calibration[: 2 + known], rank=16, rows=128, **options)
        problem = cudistr.normalize.problem(q, k, v, reduction=projection)
        missed = ((q[0, 0] @ projection.sketch()[0]) ** 2).sum(axis=1)
        assert not np.isin(rows, reference.draw(missed, problem)[0]).any()
        found = reference.attention(q, k, v, reduction=projection, tolerance=0.3)
        assert (errors(found, exact).max() <= 0.3) == known


@settings(max_examples=25)
@given(
    st.integers(0, 2**16), st.lists(st.sampled_from([0.0, 0.01, 0.02, 0.03, np.nan]), min_size=2, max_size=2)
)
def test_heads_that_the_fit_knows_to_be_worse_are_not_looked_at(seed, known):
    q, k, v = low_rank(seed, 12, 0.001, heads=4)
    k, v = k[:, ::2], v[:, ::2]
    projection = Projection.fit(q, k, rank=16)
    table = np.array(known)[:, None] * np.ones((2, 3))
    projection = dataclasses.replace(projection, output_errors=table, row_errors=table)
    ranks = tuple(16 if error <= 0.02 else 32 for error in known)
    narrowed = projection.narrowed(0.02)
    assert narrowed.ranks == ranks
    assert narrowed is projection.narrowed(0.02) and (narrowed is projection) == (ranks == (16, 16))
    near = projection.with_near(40, sinks=9).narrowed(0.02)
    assert (near.ranks, near.near, near.sinks) == (ranks, 40, 9) and (narrowed.near, narrowed.sinks) == (0, 0)
    problem = normalize.problem(q, k, v, reduction=projection)
    found = [reference.decide(q, k, v, problem, x, 0.02)[0] for x in (projection, narrowed)]
    np.testing.assert_array_equal(*found)  # it decides nothing that is not decided so in the call
    with mock.patch.object(reference, "decide", wraps=reference.decide) as decide:
        cudistr.attention(q, k, v, reduction=projection, tolerance=0.02)
    assert decide.call_args.args[4] is narrowed


def test_without_a_reduction_a_call_keeps_to_it_by_being_exact():
    q, k, v = low_rank(4, 4, 0.1, seqlen=10, head_dim=24)
    np.testing.assert_array_equal(cudistr.attention(q, k, v, tolerance=0.02), cudistr.attention(q, k, v))
    report = cudistr.attention_error(q, k, v, tolerance=0.02)
    assert report.ranks == ((24, 24, 24),) and report.output.value < 1e-6


HOPPER, AMPERE = Device(90, 227 * 1024), Device(80, 163 * 1024)
STRIDES = ("q_strides", "k_strides", "v_strides")


def asked(n, head_dim=64, dtype=np.float16, **options):
    """A problem on a device, without arrays."""
    shape = (1, 1, n, head_dim)
    q = np.lib.stride_tricks.as_strided(np.zeros(8, dtype), shape, (0, 0, 0, np.dtype(dtype).itemsize))
    found = normalize.problem(q, q, q, **options)
    return dataclasses.replace(found, aligned=True, device=0, **dict.fromkeys(STRIDES, (0, 0, head_dim)))


@pytest.fixture
def devices(monkeypatch):
    """Says which device there is, and what was measured on it."""

    def there(device, keys=None):
        every = [("lowrank half", *more) for more in itertools.product((False, True), repeat=2)]
        kinds = [] if keys is None else every
        families = ("hopper", "portable", "float32")
        found = [(kind, (family, d), keys) for kind in kinds for family in families for d in (64, 128)]
        monkeypatch.setattr(launch, "device_properties", lambda index: device)
        monkeypatch.setattr(launch, "break_even", lambda index: Kept(tuple(found)))

    return there


@pytest.mark.parametrize("device", [HOPPER, AMPERE])
@pytest.mark.parametrize(
    ("head_dim", "rank"), [(32, 16), (48, 16), (64, 32), (80, 32), (96, 48), (128, 64), (256, 128)]
)
def test_a_tolerance_alone_picks_half_of_the_columns(devices, device, head_dim, rank):
    devices(device, 1000.0)
    found = compose.settle(asked(4000, head_dim), None, 0.1, None)
    assert found.reduction == cudistr.LowRank(rank) and found.tolerance == 0.1
    assert found.problem == asked(4000, head_dim, reduction=cudistr.LowRank(rank))
    causal = compose.settle(asked(4000, head_dim, causal=True), None, 0.1, None)
    beside = cudistr.LowRank(rank, near=256, sinks=64)
    assert causal.reduction == beside
    assert causal.problem == asked(4000, head_dim, causal=True, reduction=beside)
    # Exact keys of few, and of many.
    for n in (400, 5000):
        kept = compose.settle(asked(n, head_dim, causal=True), None, 0.99, False)
        assert kept.problem == asked(n, head_dim, causal=True, reduction=beside)


@pytest.mark.parametrize(
    ("n", "tolerance", "options", "because"),
    [
        (4000, 0.06, {}, "takes 5000 queries"),
        (1799, 0.1, {}, "takes 1800 queries"),
        (4000, 0.1, {"softcap": 3.0}, "softcap"),
        (4000, 0.1, {"head_dim": 24}, "a head_dim of 24 leaves no rank"),
        (4000, 0.1, {"head_dim": 16}, "a head_dim of 16 leaves no rank"),
        (0, 0.1, {}, "nothing to compute"),
        (256, 0.9, {"causal": True}, "stay exact"),
    ],
)
def test_a_tolerance_alone_is_exact_where_nothing_can_be_picked(devices, n, tolerance, options, because):
    devices(HOPPER, 10.0)
    problem = asked(n, **options)
    for exact_if_faster in (None, True, False):
        found = compose.settle(problem, None, tolerance, exact_if_faster)
        assert found[:3] == (problem, None, None) and because in found.exact_because


def test_a_tolerance_alone_is_exact_where_that_may_be_faster(devices):
    devices(HOPPER, 4000.0)
    few, enough = (compose.settle(asked(n), None, 0.1, None) for n in (5999, 6000))
    assert few.reduction is None and "LowRank(rank=32, near=0, sinks=0)" in few.exact_because
    assert few.worth.least == 4000 and not few.worth.exact_is_faster  # but only if every head keeps to it
    assert enough.reduction == cudistr.LowRank(32)
    assert compose.settle(asked(5999), None, 0.1, True).reduction is None
    assert compose.settle(asked(5999), None, 0.1, False).reduction == cudistr.LowRank(32)
    # A query sees half of them.
    assert compose.settle(asked(11900, causal=True), None, 0.1, None).reduction is None
    assert compose.settle(asked(12100, causal=True), None, 0.1, None).reduction is not None
    devices(HOPPER)
    assert compose.settle(asked(10000), None, 0.1, None).reduction is None
    assert compose.settle(asked(60000), None, 0.1, None).reduction == cudistr.LowRank(32)
    # What was not measured is not taken for faster.
    assert compose.settle(asked(60000, dtype=np.float32), None, 0.1, None).worth.least is None
    assert compose.settle(asked(60000, dtype=np.float32), None, 0.1, None).reduction is None


@pytest.mark.parametrize(
    ("tolerance", "change", "error", "text"),
    [
        (0, {}, ValueError, "tolerance must be between 0 and 1, got 0.0"),
        (1.0, {}, ValueError, "tolerance must be between 0 and 1, got 1.0"),
        ("small", {}, TypeError, "tolerance must be a number .* got str"),
        (2, {"reduction": None}, ValueError, "tolerance must be between 0 and 1, got 2"),
        (0.02, {"reduction": cudistr.LSH(2)}, TypeError, "a cudistr.Projection, got reduction cudistr.*LSH"),
        (0.02, {"head_dim": 24}, ValueError, "multiple of 16, got 24"),
    ],
)
def test_bad_tolerances(tolerance, change, error, text):
    q, k, v = low_rank(4, 4, 0.1, seqlen=10, head_dim=change.pop("head_dim", 32))
    projection = Projection.fit(q, k, rank=16)
    for call in (cudistr.attention, reference.attention, cudistr.attention_error):
        with pytest.raises(error, match=text):
            call(q, k, v, **{"reduction": projection, **change}, tolerance=tolerance)
