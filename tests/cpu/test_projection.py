"""Projection: the Frobenius identity, the reference by an independent account, files, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cudistr
from cudistr import projection as projection_module
from cudistr import reference
from tests.cpu.fakes import library
from tests.strategies import (
    BFLOAT16,
    cases,
    kept_pairs,
    naive_attention,
    naive_scores,
    naive_softmax,
    random,
    seen_pairs,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

Projection = cudistr.Projection


def decaying(seed: int, *shape: int, base: float = 0.9, dtype=np.float32) -> np.ndarray:
    """Rows whose covariance has a spectrum that decays, in directions of its own, around a mean that is not zero."""
    generator = np.random.RandomState(seed)
    turned, _ = np.linalg.qr(generator.standard_normal((shape[-1], shape[-1])))
    values = generator.standard_normal(shape) * base ** np.arange(shape[-1]) @ turned
    return (values + 0.3 * generator.standard_normal(shape[-1])).astype(dtype)


def centred_scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Q (K - mean of all K)^T of each KV head, the queries of its group and of all batch entries stacked."""
    heads_kv = k.shape[1]
    rows = np.concatenate(q.astype(np.float64), axis=1)  # (heads, batch * seqlen_q, head_dim)
    rows = rows.reshape(heads_kv, -1, q.shape[3])
    keys = np.concatenate(k.astype(np.float64), axis=1)
    return rows @ (keys - keys.mean(axis=1, keepdims=True)).swapaxes(1, 2)


def projected_scores(q: np.ndarray, k: np.ndarray, projection: Projection) -> np.ndarray:
    shared = q.shape[1] // k.shape[1]
    mean = projection.mean.astype(np.float64)
    qhat = q.astype(np.float64) @ np.repeat(projection.queries.astype(np.float64), shared, axis=0)
    khat = (k.astype(np.float64) - mean[:, None]) @ projection.keys.astype(np.float64)
    shift = np.einsum("bhnd,hd->bhn", q.astype(np.float64), np.repeat(mean, shared, axis=0))
    return qhat @ np.repeat(khat, shared, axis=1).swapaxes(2, 3) + shift[..., None]


# The factors


@settings(max_examples=40)
@given(
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.integers(1, 2),
    st.integers(2, 90),
    st.integers(2, 90),
    st.sampled_from([0, 16, 32, 48, 64]),
)
def test_frobenius_identity(heads, batch, seqlen_q, seqlen_k, rank):
    # The squared error of the scores is exactly the sum of the squared singular values that were cut off.
    q, k = decaying(1, batch, heads[0], seqlen_q, 64), decaying(2, batch, heads[1], seqlen_k, 64)
    if batch > 1:
        # Softmax does not see how the means of batch entries differ, and weighted sums do not either.
        k -= k.mean(axis=2, keepdims=True)
    projection = Projection.fit(q, k, rank=rank, scale=0.0)  # all keys count alike
    scores = centred_scores(q, k)
    rows = np.concatenate(q.astype(np.float64), axis=1).reshape(heads[1], -1, 64)
    keys = np.concatenate(k.astype(np.float64), axis=1) - projection.mean[:, None]
    reduced = (rows @ projection.queries) @ (keys @ projection.keys).swapaxes(1, 2)
    norm = np.linalg.norm(scores, axis=(1, 2))
    error = np.linalg.norm(scores - reduced, axis=(1, 2)) / norm
    np.testing.assert_allclose(np.linalg.norm(projection.singular_values, axis=1), norm, rtol=1e-6)
    np.testing.assert_allclose(error, projection.score_error, rtol=1e-4, atol=2e-6)  # float32 factors
    best = np.linalg.svd(scores, compute_uv=False)[:, rank:]
    np.testing.assert_allclose(
        projection.score_error, np.linalg.norm(best, axis=1) / norm, rtol=1e-4, atol=2e-7
    )


def test_the_measured_score_error_is_the_predicted_one():
    q, k, v = decaying(3, 1, 4, 200, 64), decaying(4, 1, 2, 150, 64), random(5, 1, 2, 150, 32)
    projection = Projection.fit(q, k, rank=32, scale=0.0)  # all keys count alike
    report = cudistr.attention_error(q, k, v, reduction=projection, rows=200)
    for h in range(4):
        assert report.scores_heads[h].value == pytest.approx(projection.score_error[h // 2], rel=0.2)
    scale = np.linalg.norm(projection.singular_values, axis=1)
    expected = np.linalg.norm(projection.score_error * scale) / np.linalg.norm(scale)
    assert report.scores.value == pytest.approx(expected, rel=1e-3)


def test_rank_head_dim_is_exact():
    q, k, v = decaying(6, 2, 4, 70, 32), decaying(7, 2, 2, 90, 32), random(8, 2, 2, 90, 16)
    projection = Projection.fit(q, k, rank=32)
    assert (projection.score_error == 0).all()
    exact = reference.attention(q, k, v, causal=True, return_lse=True)
    found = reference.attention(q, k, v, causal=True, return_lse=True, reduction=projection)
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # float32 factors


def test_tolerance_gives_each_head_the_smallest_rank():
    q = np.concatenate([decaying(9, 1, 1, 200, 64, base=base) for base in (0.6, 0.85, 0.99)], axis=1)
    k = np.concatenate([decaying(10, 1, 1, 200, 64, base=base) for base in (0.6, 0.85, 0.99)], axis=1)
    projection = Projection.fit(q, k, tolerance=0.01)
    assert projection.ranks == tuple(sorted(projection.ranks)) and projection.ranks[0] < projection.ranks[2]
    assert projection.rank == projection.ranks[2] and (projection.score_error <= 0.01).all()
    for h, rank in enumerate(projection.ranks):
        alone = Projection.fit(q[:, [h]], k[:, [h]], rank=rank)
        np.testing.assert_allclose(projection.queries[h, :, :rank], alone.queries[0], atol=1e-6)
        assert not projection.queries[h, :, rank:].any() and not projection.keys[h, :, rank:].any()
        if rank > 0:
            assert Projection.fit(q[:, [h]], k[:, [h]], rank=rank - 16).score_error[0] > 0.01


def test_several_batches_count_as_one():
    q, k = decaying(11, 3, 2, 80, 32), decaying(12, 3, 2, 80, 32)
    whole = Projection.fit(q, k, rank=16)
    parts = Projection.fit([q[:1], q[1:]], [k[:1], k[1:]], rank=16)
    np.testing.assert_allclose(parts.singular_values, whole.singular_values, rtol=1e-10)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-6)


def test_any_dtype_serves_any_dtype():
    q, k, v = decaying(13, 1, 2, 80, 32), decaying(14, 1, 2, 80, 32), random(15, 1, 2, 80, 32)
    projection = Projection.fit(q.astype(np.float16), k.astype(np.float16), rank=16)
    expected = cudistr.attention(q, k, v, reduction=projection)
    for dtype in (np.float16, BFLOAT16):
        found = cudistr.attention(*(x.astype(dtype) for x in (q, k, v)), reduction=projection)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.05)


@pytest.mark.parametrize("options", [{"near": 5}, {"near": 0, "sinks": 3}], ids=str)
def test_a_mean_beyond_float16_is_refused_where_it_counts(options):
    q, k, v = (random(i, 1, 2, 40, 32) for i in range(3))
    projection = Projection.fit(q, k + np.float32(1e5), rank=16)
    halves = [x.astype(np.float16) for x in (q, k, v)]
    for kept, more in ((projection.with_near(**options), {}), (projection, {"return_lse": True})):
        with pytest.raises(
            ValueError, match=r"mean .* reaches 1000\d\d\S*, beyond float16 \(65504\).*bfloat16 or float32"
        ):
            cudistr.attention(*halves, reduction=kept, **more)
    cudistr.attention(q, k + np.float32(1e5), v, reduction=projection.with_near(**options))


def test_rows_fewer_than_columns():
    q, k, v = decaying(16, 1, 1, 5, 64), decaying(17, 1, 1, 9, 64), random(18, 1, 1, 9, 16)
    projection = Projection.fit(q, k, rank=16)
    assert (projection.score_error < 1e-6).all() and np.isfinite(projection.queries).all()
    np.testing.assert_allclose(
        cudistr.attention(q, k, v, reduction=projection), cudistr.attention(q, k, v), atol=1e-4
    )


def test_roots_of_full_and_of_lower_rank():
    rows = decaying(3, 3, 40, 24, dtype=np.float64)
    rows[1, :, 5] = rows[1, :, 6]  # linearly dependent
    rows[2] = 0
    squares = rows.swapaxes(1, 2) @ rows
    found = projection_module._root(squares)
    error = np.linalg.norm(found.swapaxes(1, 2) @ found - squares, axis=(1, 2))
    assert (error <= 1e-13 * np.linalg.norm(squares, axis=(1, 2))).all()
    np.testing.assert_array_equal(projection_module._root(squares[:1]), found[:1])  # whatever other heads are


def test_zeros():
    zeros = np.zeros((1, 2, 8, 16), np.float32)
    projection = Projection.fit(zeros, zeros, rank=16)
    assert (projection.score_error == 0).all() and not projection.queries.any()
    assert Projection.fit(zeros, zeros, tolerance=0.5).ranks == (0, 0)


@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_rank_0_is_the_mean_of_the_values(head_dim):
    q, k, v = random(1, 1, 4, 30, head_dim), decaying(2, 1, 2, 50, head_dim), random(3, 1, 2, 50, 8)
    projection = Projection.fit(q, k, rank=0)
    assert projection.rank == 0 and (projection.score_error == 1).all()
    out, lse = reference.attention(q, k, v, reduction=projection, return_lse=True)
    np.testing.assert_allclose(
        out, np.broadcast_to(v.mean(axis=2).repeat(2, 1)[:, :, None], out.shape), atol=1e-6
    )
    shift = np.einsum("bhnd,bhd->bhn", q, k.mean(axis=2).repeat(2, 1)) / np.sqrt(head_dim)
    np.testing.assert_allclose(lse, shift + np.log(50), rtol=1e-5)


# The reference


@settings(max_examples=60)
@given(
    cases(reduced=False, head_dims=(32, 64)),
    st.integers(0, 70),
    st.integers(0, 20),
    st.sampled_from([0, 16, 32]),
)
def test_reference_is_one_softmax_over_exact_and_projected_scores(case, near, sinks, rank):
    options = {name: value for name, value in case.options.items() if name not in ("softcap", "reduction")}
    projection = Projection.fit(case.q, case.k, rank=rank).with_near(near, sinks=sinks)
    scale = options.get("scale", case.q.shape[3] ** -0.5)
    exact = rank == case.q.shape[3]
    reduced = (
        naive_scores(case.q, case.k, scale) if exact else scale * projected_scores(case.q, case.k, projection)
    )
    seqlens = case.q.shape[2], case.k.shape[2]
    scores = np.where(kept_pairs(*seqlens, near, sinks), naive_scores(case.q, case.k, scale), reduced)
    seen = seen_pairs(*seqlens, options.get("causal", False), options.get("window"))
    expected_out, expected_lse = naive_softmax(scores, case.v, seen)
    out, lse = reference.attention(*case.arrays, **options, reduction=projection, return_lse=True)
    np.testing.assert_allclose(out, expected_out, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-8, atol=1e-9)


def test_near_beyond_the_sequence_is_exact():
    q, k, v = (random(seed, 1, 2, 40, 32) for seed in range(3))
    projection = Projection.fit(q, k, rank=16)
    out, lse = cudistr.attention(q, k, v, causal=True, reduction=projection.with_near(10**9), return_lse=True)
    expected, expected_lse = naive_attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


# The object


def test_it_prints_and_is_frozen():
    projection = Projection.fit(random(0, 1, 4, 30, 32), random(1, 1, 2, 30, 32), rank=16)
    assert repr(projection) == "Projection(heads=4, heads_kv=2, head_dim=32, ranks=(16, 16), near=0, sinks=0)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        projection.near = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        projection.queries[0] = 0
    assert projection.with_near(5).queries is projection.queries


@pytest.mark.parametrize("size", [{"tolerance": 0.05}, {"rank": 0}], ids=str)
def test_save_and_load(tmp_path, size):
    q, k, v = decaying(20, 1, 4, 80, 32), decaying(21, 1, 2, 80, 32), random(22, 1, 2, 80, 32)
    projection = Projection.fit(q, k, **size).with_near(7, sinks=2)
    path = tmp_path / "layer"
    projection.save(path)
    assert os.listdir(tmp_path) == ["layer"]
    loaded = Projection.load(str(path))
    assert repr(loaded) == repr(projection)
    np.testing.assert_array_equal(loaded.score_error, projection.score_error)
    np.testing.assert_array_equal(
        cudistr.attention(q, k, v, reduction=loaded), cudistr.attention(q, k, v, reduction=projection)
    )


def test_files_that_are_none(tmp_path):
    path = tmp_path / "other.npz"
    text = f"path: {str(path)!r} was not written by Projection.save. Fit and save one first."
    for write in (
        lambda: np.savez(path, a=np.ones(3)),
        lambda: path.write_text("text"),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"PK\x03\x04 and no more"),
    ):
        write()
        with pytest.raises(ValueError, match=re.escape(text)):
            Projection.load(path)
    with pytest.raises(FileNotFoundError):
        Projection.load(tmp_path / "missing.npz")


def test_arrays_of_other_libraries(monkeypatch):
    array = library(monkeypatch, "fakelib")
    sys.modules["fakelib"].from_dlpack = lambda x: array(np.from_dlpack(x))
    q, k = random(0, 1, 4, 30, 32), random(1, 1, 2, 30, 32)
    found = Projection.fit(array(q), array(k), rank=16)
    np.testing.assert_array_equal(found.queries, Projection.fit(q, k, rank=16).queries)
    assert type(cudistr.attention(array(q), array(k), array(k), reduction=found)) is array


# What is refused

Q, K = np.ones((1, 4, 6, 48), np.float32), np.ones((1, 2, 7, 48), np.float32)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {},
            ValueError,
            "Projection.fit: pass either rank or tolerance, got neither. Pass rank=32, for example",
        ),
        ({"rank": 16, "tolerance": 0.1}, ValueError, "pass either rank or tolerance, got both"),
        (
            {"rank": 40},
            ValueError,
            "rank must be a multiple of 16 below head_dim, or head_dim, got 40. Allowed here: 0, 16, 32, 48.",
        ),
        ({"rank": 64}, ValueError, "got 64. Allowed here: 0, 16, 32, 48."),
        ({"rank": -16}, ValueError, "got -16. Allowed here"),
        (
            {"rank": 32.0},
            TypeError,
            "Projection.fit: rank must be an integer, got float 32.0. Pass a multiple of 16",
        ),
        ({"rank": True}, TypeError, "Projection.fit: rank must be an integer, got bool True"),
        (
            {"tolerance": 0},
            ValueError,
            "tolerance must be between 0 and 1, got 0. Pass a relative error such as 0.01",
        ),
        ({"tolerance": 1.0}, ValueError, "tolerance must be between 0 and 1, got 1.0"),
        ({"tolerance": -0.1}, ValueError, "tolerance must be between 0 and 1, got -0.1"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be between 0 and 1, got nan"),
        ({"tolerance": "1%"}, TypeError, "tolerance must be a number, got str '1%'. Pass a relative error"),
        ({"tolerance": True}, TypeError, "tolerance must be a number, got bool True"),
    ],
    ids=str,
)
def test_bad_options_of_fit(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Projection.fit(Q, K, **options)


@pytest.mark.parametrize(
    ("q", "k", "error", "text"),
    [
        (None, K, TypeError, "q must be an array"),
        (Q, K[..., :16], ValueError, "k: head_dim must be that of q, 48, got 16"),
        (
            Q.astype(np.float64),
            K.astype(np.float64),
            TypeError,
            "q must be float16, bfloat16, float32, got float64",
        ),
        ([Q], K, TypeError, "q and k must be all arrays or all lists of arrays, got list and ndarray"),
        (
            [Q],
            [K, K],
            ValueError,
            "q and k must be lists of one length, at least 1, got 1 and 2. Pass the keys of each",
        ),
        ([], [], ValueError, "lists of one length, at least 1, got 0 and 0"),
        (
            [Q, Q[:, :2]],
            [K, K],
            ValueError,
            "every batch must have the heads of the first, 4, got 2. Fit one projection",
        ),
        ([Q, Q], [K, K[:, :1]], ValueError, "every batch must have the heads_kv of the first, 2, got 1"),
        ([Q, Q[..., :16]], [K, K[..., :16]], ValueError, "the head_dim of the first, 48, got 16"),
        (Q[:, :, :0], K, ValueError, "there must be at least one query and one key, got arrays without"),
        (Q, K[:, :, :0], ValueError, "there must be at least one query and one key"),
        (
            Q * np.float32(np.inf),
            K,
            ValueError,
            "q, k and v must be finite, got NaN or infinity. Leave such rows away",
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_calibration_data(q, k, error, text):
    with pytest.raises(error, match=re.escape(text)):
        Projection.fit(q, k, rank=16)


@pytest.mark.parametrize(
    ("near", "sinks", "error", "text"),
    [
        (
            -1,
            0,
            ValueError,
            "Projection.with_near: near must not be negative, got -1. Pass how many keys back",
        ),
        (
            5,
            -2,
            ValueError,
            "Projection.with_near: sinks must not be negative, got -2. Pass how many of the first",
        ),
        (2.5, 0, TypeError, "Projection.with_near: near must be an integer, got float 2.5"),
    ],
)
def test_bad_exact_keys(near, sinks, error, text):
    projection = Projection.fit(random(0, 1, 2, 9, 16), random(1, 1, 2, 9, 16), rank=16)
    with pytest.raises(error, match=re.escape(text)):
        projection.with_near(near, sinks=sinks)


@pytest.mark.parametrize(
    ("heads", "head_dim", "got"),
    [
        ((2, 2), 32, "2 heads over 2 of head_dim 32"),
        ((4, 4), 32, "4 heads over 4"),
        ((4, 2), 16, "of head_dim 16"),
    ],
    ids=str,
)
def test_projection_of_another_layer(heads, head_dim, got):
    projection = Projection.fit(random(0, 1, 4, 9, 32), random(1, 1, 2, 9, 32), rank=16)
    q, k = (np.ones((1, h, 5, head_dim), np.float32) for h in heads)
    with pytest.raises(
        ValueError, match="reduction: the projection was fitted for 4 heads over 2 of head_dim 32,"
    ) as e:
        cudistr.attention(q, k, k, reduction=projection)
    assert got in str(e.value) and "Fit one on q and k of this layer" in str(e.value)
    with pytest.raises(ValueError, match="the projection was fitted for"):
        cudistr.attention_error(q, k, k, reduction=projection)


def test_softcap_with_a_projection():
    projection = Projection.fit(Q, K, rank=16)
    with pytest.raises(
        ValueError, match=r"softcap cannot be used with a cudistr.Projection, got 3.0: .*Use cudistr.LSH"
    ):
        cudistr.attention(Q, K, K, softcap=3.0, reduction=projection)


def test_group_takes_no_projection():
    with pytest.raises(
        TypeError, match="a cudistr.LSH or a cudistr.Energy, got cudistr.projection.Projection"
    ):
        cudistr.group(Q, Projection.fit(Q, K, rank=16))


# Weighted by the output, and ranks shared out


def head_errors(
    projection: Projection, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool
) -> np.ndarray:
    """Relative output error over the query heads of each KV head."""
    exact = cudistr.attention(q, k, v, causal=causal).astype(np.float64)
    out = cudistr.attention(q, k, v, causal=causal, reduction=projection).astype(np.float64)
    shape = (projection.heads_kv, -1)
    squares = [(x[0] ** 2).reshape(shape).sum(axis=1) for x in (out - exact, exact)]
    return np.sqrt(squares[0] / squares[1])


@pytest.mark.parametrize(
    ("causal", "near", "sinks"), [(False, 0, 0), (True, 0, 0), (True, 20, 4), (False, 9, 3)]
)
def test_output_errors_are_those_of_attention(causal, near, sinks):
    q, k, v = 3 * decaying(3, 1, 4, 90, 48), 3 * decaying(4, 1, 2, 90, 48), random(5, 1, 2, 90, 32)
    options = dict(causal=causal, near=near, sinks=sinks, rows=90)
    for i, rank in enumerate((0, 16, 32, 48)):
        projection = Projection.fit(q, k, v, rank=rank, **options)
        assert (projection.near, projection.sinks) == (near, sinks)
        found = head_errors(projection, q, k, v, causal)
        if not (near or sinks):
            np.testing.assert_allclose(projection.output_errors[:, i], found, rtol=2e-3, atol=2e-6)
        elif (
            rank < 48
        ):  # rows that see exact keys alone are not drawn: they add to the output, but not to the error
            assert (found <= projection.output_errors[:, i] * 1.002).all()
            assert (found > 0).all()


@pytest.mark.parametrize(("causal", "near"), [(False, 0), (True, 0), (True, 20), (False, 9)])
def test_row_errors_are_those_of_the_worst_row(causal, near):
    batches = [
        (3 * decaying(s, 2, 4, 90, 48), 3 * decaying(s + 1, 2, 2, 90, 48), random(s + 2, 2, 2, 90, 32))
        for s in (3, 7)
    ]
    # Of how many keys a query reduces goes a part of its chance to be drawn; see `reference.draw`.
    position, keys = np.arange(90), np.arange(90)
    reduced = np.abs(position[:, None] - keys) >= near
    if causal:
        reduced &= keys <= position[:, None]
    count = reduced.sum(axis=1)
    by_keys = np.where(count > 0, 1 / np.maximum(count, 1), 0.0)
    chances = 1 / 90 + by_keys / by_keys.sum()
    missed = 1 - np.minimum(1, 64 * chances / chances.sum())
    for i, rank in enumerate((0, 16, 32)):
        projection = Projection.fit(*zip(*batches, strict=True), rank=rank, causal=causal, near=near, rows=90)
        worst = np.zeros(2)
        for q, k, v in batches:
            exact = cudistr.attention(q, k, v, causal=causal).astype(np.float64)
            out = cudistr.attention(q, k, v, causal=causal, reduction=projection).astype(np.float64)
            errors, sizes = (((x**2).sum(axis=3)) for x in (out - exact, exact))
            relative = (errors * missed * (count > 0)).max(axis=2) / sizes[..., count > 0].mean(axis=2)
            worst = np.maximum(worst, relative.reshape(2, 2, 2).max(axis=(0, 2)))
        np.testing.assert_allclose(projection.row_errors[:, i] ** 2, worst, rtol=5e-3)
        known = projection.known()
        np.testing.assert_allclose(
            known[:, 1], np.repeat(9 * worst, 2), rtol=5e-3
        )  # of a row three times as bad
        np.testing.assert_allclose(known[:, 0], np.repeat(projection.output_errors[:, i] ** 2, 2), rtol=1e-6)


def unattended(seed):
    """The keys that hold most of K's energy, and so the score's, have scores that are low for every query."""
    q, k, v = (random(seed + i, 1, 2, 200, 32) for i in range(3))
    q[..., 0] = 4
    k[:, :, ::2] *= np.float32(3)
    k[:, :, ::2, :16] *= np.float32(3)
    k[:, :, ::2, 0] = -60
    return q, k, v


def test_keys_count_by_the_attention_they_get():
    q, k, v = unattended(6)
    plain, weighted = (Projection.fit(q, k, rank=16, **options) for options in ({"scale": 0.0}, {}))
    assert (head_errors(weighted, q, k, v, False) < 0.8 * head_errors(plain, q, k, v, False)).all()


def test_keys_that_stay_exact_do_not_count():
    # The first keys are attended to most, and differ in columns of their own.
    q, k, v = random(6, 1, 1, 200, 32), random(7, 1, 1, 200, 32), random(8, 1, 1, 200, 32)
    q[..., 0] = 3
    k[:, :, :40, 0], k[:, :, 40:, 0] = 3, -1
    k[:, :, :40, 1:16] *= np.float32(0.1)
    k[:, :, :40, 16:] *= np.float32(3)
    k[:, :, 40:, 16:] *= np.float32(0.3)
    every, others = (Projection.fit(q, k, rank=16, sinks=sinks).with_near(0, sinks=40) for sinks in (0, 40))
    found = [head_errors(x, q, k, v, False)[0] for x in (every, others)]
    assert found[1] < 0.5 * found[0]


def test_values_make_the_output_error_smaller():
    # Of keys that are attended to alike, one half has the same values, so that it does not matter which of them it is.
    q, k, v = random(6, 1, 2, 200, 32), random(7, 1, 2, 200, 32), random(8, 1, 2, 200, 32)
    k[:, :, ::2, :16] = 0
    k[:, :, 1::2, 16:] = 0
    k[:, :, ::2] *= np.float32(1.5)
    v[:, :, ::2] = v[:, :, :1]
    keys = Projection.fit(q, k, rank=16)
    values = Projection.fit(q, k, v, rank=16)
    assert (head_errors(values, q, k, v, False) < 0.8 * head_errors(keys, q, k, v, False)).all()


@pytest.mark.parametrize(
    ("seqlen", "drawn", "held"), [(1, 1, 1), (90, 45, 45), (1000, 500, 500), (3000, 512, 2048)]
)
def test_rows_are_left_for_the_errors(seqlen, drawn, held):
    seen = []

    def felt(*arguments):
        seen.append(arguments[4](arguments[3]))
        return np.ones((2, 16, 16))

    def felt_ranks(*arguments):
        seen.append(arguments[6])
        return np.zeros((2, len(arguments[6]))), 1.0

    with (
        mock.patch.object(projection_module, "_felt", felt),
        mock.patch.object(projection_module, "_felt_ranks", felt_ranks),
    ):
        Projection.fit(*random(9, 3, 1, 1, seqlen, 16), rank=0)
    weights, errors = seen
    assert (len(weights), len(errors)) == (drawn, held)
    assert seqlen == 1 or not np.intersect1d(weights, errors).size


def test_tolerance_with_values_is_of_the_output():
    q, k, v = 3 * decaying(3, 1, 4, 90, 64), 3 * decaying(4, 1, 4, 90, 64), random(5, 1, 4, 90, 32)
    projection = Projection.fit(q, k, v, tolerance=0.05, rows=90)
    assert (head_errors(projection, q, k, v, False) <= 0.0501).all()
    index = np.array(projection.ranks) // 16
    lower = projection.output_errors[np.arange(4), np.maximum(index - 1, 0)]
    assert (lower[index > 0] > 0.05).all()


@pytest.mark.parametrize("mean", [32, 16, 7, 0])
def test_share_is_the_best_choice(mean):
    layers = []
    for i in range(2):
        q, k = (i + 1) * decaying(2 * i, 1, 4, 80, 48), (i + 1) * decaying(2 * i + 1, 1, 2, 80, 48)
        k[:, 0] *= np.float32(3)
        layers.append(Projection.fit(q, k, random(9 + i, 1, 2, 80, 16), rank=48, near=4))
    errors = np.concatenate([layer.output_errors for layer in layers]) ** 2
    choices = [c for c in itertools.product(range(4), repeat=4) if 16 * sum(c) <= mean * 4]
    best = min(errors[range(4), c].sum() for c in choices)
    shared = Projection.share(layers, mean)
    ranks = [rank for layer in shared for rank in layer.ranks]
    assert sum(ranks) <= mean * 4
    assert errors[range(4), [rank // 16 for rank in ranks]].sum() == pytest.approx(best)
    for full, layer in zip(layers, shared, strict=True):
        assert layer.near == 4
        assert layer.rank == max(layer.ranks)
        for h, rank in enumerate(layer.ranks):
            np.testing.assert_array_equal(layer.queries[h, :, :rank], full.queries[h, :, :rank])
            assert not layer.queries[h, :, rank:].any()
            assert not layer.keys[h, :, rank:].any()


def test_share_gives_nothing_to_a_head_that_the_mean_serves():
    q, k, v = 3 * decaying(1, 1, 2, 90, 48), 3 * decaying(2, 1, 2, 90, 48), random(3, 1, 2, 90, 16)
    q[:, 0] *= np.float32(1e-3)  # all keys have nearly one weight
    (shared,) = Projection.share([Projection.fit(q, k, v, rank=48)], 16)
    assert shared.ranks == (0, 32)
    assert (
        head_errors(shared, q, k, v, False) < head_errors(Projection.fit(q, k, v, rank=16), q, k, v, False)[1]
    ).all()
    assert Projection.fit(q, k, v, tolerance=0.01).ranks[0] == 0


def test_share_refuses_what_it_cannot_cut():
    q, k = Q[..., :48], K[..., :48]
    whole = Projection.fit(q, k, k, rank=48)
    without_zero = dataclasses.replace(
        whole, output_errors=whole.output_errors[:, 1:]
    )  # an older file has that
    for projection in (Projection.fit(q, k, rank=48), Projection.fit(q, k, k, rank=32), without_zero):
        with pytest.raises(
            ValueError, match=r"must be fitted with v and rank=head_dim.*fit\(q, k, v, rank=48\)"
        ):
            Projection.share([projection], 32)
    with pytest.raises(
        ValueError, match="rank must not be negative, got -8. Pass a mean rank, 32 for example"
    ):
        Projection.share([Projection.fit(q, k, k, rank=48)], -8)
    with pytest.raises(TypeError, match=r"must be cudistr\.Projection, got int"):
        Projection.share([3], 32)


@pytest.mark.parametrize("name", ["output_errors", "row_errors"])
def test_errors_are_saved(tmp_path, name):
    projection = Projection.fit(Q, K, random(1, 1, 2, 7, 16), rank=16)
    projection.save(tmp_path / "new")
    np.testing.assert_array_equal(getattr(Projection.load(tmp_path / "new"), name), getattr(projection, name))
    with np.load(tmp_path / "new") as file:
        content = {other: file[other] for other in file if other != name}
    with open(tmp_path / "old", "wb") as file:
        np.savez(file, **content)
    assert getattr(Projection.load(tmp_path / "old"), name).shape == (2, 0)
