"""Low-rank factors of a call's own scores: what they keep, what they are found of, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cudistr
from cudistr import LowRank, Projection, compose, lowrank, normalize, reference
from cudistr.plan import LOWRANK_KEYS, LOWRANK_QUERIES, LOWRANK_ROWS
from cudistr.worth import kind_of
from tests.cpu.test_tolerance import errors, low_rank
from tests.strategies import random


def decaying(seed, *, batch=1, heads=2, heads_kv=2, lengths=(200, 200), head_dim=32, slope=6.0):
    """q, k, v whose columns, mixed, have less and less energy."""
    mixed = random(seed, head_dim, head_dim) * np.exp(-np.arange(head_dim) / slope)[:, None].astype(
        np.float32
    )
    q = random(seed + 1, batch, heads, lengths[0], head_dim) @ mixed
    k = random(seed + 2, batch, heads_kv, lengths[1], head_dim) @ mixed
    return q, k, random(seed + 3, batch, heads_kv, lengths[1], head_dim)


def problem(q, k, v, reduction, **options):
    return normalize.problem(q, k, v, reduction=reduction, **options)


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.integers(1, 12), st.booleans(), st.sampled_from([(0, 0), (30, 5)]))
def test_scores_of_a_lower_rank_are_kept_whole(seed, rank, causal, kept):
    q, k, v = low_rank(seed, rank, 0.0, seqlen=120)
    reduction = LowRank(16, near=kept[0], sinks=kept[1])
    exact = reference.attention(q, k, v, causal=causal)
    found = reference.attention(q, k, v, causal=causal, reduction=reduction)
    assert errors(found, exact).max() <= 2e-3


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from([3.0, 6.0, 20.0]), st.sampled_from([16, 32]))
def test_they_are_nearly_the_best_of_their_rank(seed, slope, rank):
    # Without a scale all keys count alike.
    q, k, v = decaying(
        seed, head_dim=48, slope=slope, lengths=(LOWRANK_QUERIES // 2, 200), heads=2, heads_kv=1
    )
    best = Projection.fit(q, k, rank=rank, scale=0.0).score_error[0]
    found = compose.projection_of(problem(q, k, v, LowRank(rank), scale=0.0), LowRank(rank), q, k)
    queries, keys = q.reshape(-1, 48).astype(np.float64), k[0, 0].astype(np.float64)
    keys -= keys.mean(axis=0)
    scores = queries @ keys.T
    reduced = (queries @ found.queries[0]) @ (keys @ found.keys[0]).T
    error = np.linalg.norm(scores - reduced) / np.linalg.norm(scores)
    # Two rounds from random vectors leave something out: of 900 such cases 17% at most, once, and 13% otherwise.
    assert best - 1e-4 <= error <= 1.25 * best + 2e-3


def test_keys_count_by_the_attention_they_get():
    # Keys that are attended to differ in 12 columns; others have more energy, in other columns, and a low score.
    q, k, v = random(1, 1, 1, 300, 64), random(2, 1, 1, 300, 64), random(3, 1, 1, 300, 64)
    q[..., 0] = 8
    k[..., :100, 12:] = 0
    k[..., :100, 0], k[..., 100:, 0] = 8, -8
    exact = reference.attention(q, k, v)
    anew, plain = (
        errors(reference.attention(q, k, v, reduction=x), exact)[0, 0]
        for x in (LowRank(16), Projection.fit(q, k, rank=16, scale=0.0))
    )
    assert anew < 0.2 * plain


@given(st.integers(0, 2**16), st.floats(-100, 100))
@settings(max_examples=15)
def test_a_constant_added_to_the_keys_changes_nothing(seed, size):
    q, k, v = (x.astype(np.float64) for x in decaying(seed, lengths=(80, 90)))
    one, other = (
        reference.attention(q, x, v, reduction=LowRank(16)) for x in (k, k + size * random(seed, 32))
    )
    np.testing.assert_allclose(one, other, atol=1e-4)


@given(st.integers(1, 10**6))
@settings(max_examples=50)
def test_sampled_keys(seqlen):
    keys = lowrank.sampled(seqlen)
    if seqlen <= LOWRANK_KEYS:
        np.testing.assert_array_equal(keys, np.arange(seqlen))
        return
    assert len(keys) == LOWRANK_KEYS
    # One of each part.
    bounds = np.arange(LOWRANK_KEYS + 1) * seqlen // LOWRANK_KEYS
    assert (keys >= bounds[:-1]).all() and (keys <= bounds[1:]).all() and keys[-1] < seqlen


def test_drawn_rows_are_those_that_see_reduced_keys():
    q, k, v = decaying(4, heads=6, heads_kv=2, lengths=(400, 400))
    one = problem(q, k, v, LowRank(16, near=100, sinks=20), causal=True)
    rows = lowrank.drawn(one, LOWRANK_ROWS)
    assert rows.shape == (64, 2) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, 0], np.arange(64) % 3)
    assert (rows[:, 1] >= 120).all() and (np.diff(rows[:, 1]) >= 0).all() and rows[-1, 1] < 400
    assert np.diff(rows[:, 1]).max() <= 2 * 280 / 64 + 1


def test_batch_entries_have_their_own():
    q, k, v = decaying(5, batch=3, heads=4, heads_kv=2)
    together = reference.attention(q, k, v, reduction=LowRank(16), causal=True)
    alone = [
        reference.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], reduction=LowRank(16), causal=True)
        for b in range(3)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-12)


def test_what_is_not_finite_stays_where_it_is():
    q, k, v = decaying(6)
    q[0, 0, 7, 3] = np.nan
    found = cudistr.attention(q, k, v, reduction=LowRank(16))
    assert np.isnan(found[0, 0, 7]).all()
    assert np.isfinite(np.delete(found[0, 0], 7, axis=0)).all() and np.isfinite(found[0, 1]).all()


def test_nothing_to_go_by():
    q, k, v = (np.zeros((1, 1, n, 32), np.float32) for n in (5, 9, 9))
    v[:] = random(7, *v.shape)
    np.testing.assert_allclose(
        cudistr.attention(q, k, v, reduction=LowRank(16))[0, 0],
        np.tile(v[0, 0].mean(axis=0), (5, 1)),
        atol=1e-6,
    )
    assert cudistr.attention(q[:, :, :0], k, v, reduction=LowRank(16)).shape == (1, 1, 0, 32)
    assert not cudistr.attention(q, k[:, :, :0], v[:, :, :0], reduction=LowRank(16)).any()


def test_all_columns_and_all_near_are_exact():
    q, k, v = decaying(8)
    exact = cudistr.attention(q, k, v, causal=True)
    for reduction in (LowRank(32), LowRank(16, near=10**9)):
        np.testing.assert_array_equal(cudistr.attention(q, k, v, causal=True, reduction=reduction), exact)


@settings(max_examples=15)
@given(
    st.integers(0, 2**16),
    st.integers(1, 24),
    st.sampled_from([0.003, 0.1, 1.0]),
    st.sampled_from([0.05, 0.2, 0.4]),
)
def test_heads_keep_to_a_tolerance(seed, rank, noise, tolerance):
    q, k, v = low_rank(seed, rank, noise)
    exact = reference.attention(q, k, v, causal=True)
    found = reference.attention(
        q, k, v, causal=True, reduction=LowRank(16, near=20, sinks=2), tolerance=tolerance
    )
    assert errors(found, exact).max() <= tolerance


def test_a_tolerance_leaves_what_is_of_low_rank():
    q, k, v = low_rank(9, 12, 0.001)
    q[:, 1], k[:, 1] = random(10, 300, 32), random(11, 300, 32)
    report = cudistr.attention_error(q, k, v, reduction=LowRank(16), tolerance=0.25)
    assert report.ranks == ((16, 32, 16),)
    assert report.output.value <= 0.25
    # One row of 300 may be off by three times the length of an output, whatever the sample says.
    report = cudistr.attention_error(q, k, v, reduction=LowRank(16), tolerance=0.17)
    assert report.ranks == ((32, 32, 32),)


def test_a_measured_error_is_that_of_the_call():
    q, k, v = decaying(12, batch=2, slope=20.0)
    report = cudistr.attention_error(q, k, v, reduction=LowRank(16), rows=10**6)
    exact, found = (reference.attention(q, k, v, reduction=x) for x in (None, LowRank(16)))
    assert report.output.value == pytest.approx(
        np.linalg.norm(found - exact) / np.linalg.norm(exact), rel=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "LowRank: rank must be a positive multiple of 16 .*, got 0. Pass 16."),
        ({"rank": 20}, "LowRank: rank must be a positive multiple of 16 .*, got 20. Pass 16."),
        ({"rank": 16, "near": -1}, "LowRank: near must not be negative, got -1"),
        ({"rank": 16, "sinks": -2}, "LowRank: sinks must not be negative, got -2"),
    ],
)
def test_values_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowRank(**arguments)


@pytest.mark.parametrize("rank", [16.0, True, "16", None])
def test_kinds_that_are_refused(rank):
    with pytest.raises(TypeError, match="LowRank: rank must be an integer"):
        LowRank(rank)


@pytest.mark.parametrize(("rank", "head_dim"), [(48, 40), (24, 40), (144, 256), (24, 64)])
def test_ranks_that_a_call_refuses(rank, head_dim):
    q, k, v = decaying(13, head_dim=head_dim)
    with pytest.raises(
        ValueError,
        match=f"rank must be a multiple of 16 up to 128 and below head_dim {head_dim}, .*got {rank}",
    ):
        cudistr.attention(q, k, v, reduction=LowRank(rank))


def test_softcap_is_refused():
    q, k, v = decaying(14)
    with pytest.raises(ValueError, match=r"softcap cannot be used with a cudistr.LowRank, got 3.0"):
        cudistr.attention(q, k, v, reduction=LowRank(16), softcap=3.0)


def test_it_is_a_value():
    assert LowRank(16, 3, 4) == LowRank(np.int64(16), near=3, sinks=4) != LowRank(16)
    assert hash(LowRank(16)) == hash(LowRank(16)) and str(LowRank()) == "LowRank(rank=32, near=0, sinks=0)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        LowRank(16).rank = 32  # type: ignore[misc]


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("lowrank:64", ("lowrank half", False, False)),
        ("lowrank:32,near=256,sinks=64", ("lowrank quarter", True, False)),
        ("lowrank:32,tolerance=0.99", ("lowrank quarter", False, True)),
        ("lowrank:48", None),
    ],
)
def test_kinds_of_methods(method, kind):
    assert kind_of(method, 128) == kind
