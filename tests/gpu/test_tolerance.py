"""A tolerance on the device: the decisions of the host, made from the same rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cudistr
from cudistr import Projection, compose, launch, normalize, reference
from cudistr.plan import PROBE_ROWS
from tests.cpu.test_tolerance import low_rank
from tests.gpu.util import cp, on_device, same_bits
from tests.strategies import DTYPES

pytestmark = pytest.mark.gpu


def arrays(dtype, seqlen=200, rank=16):
    """The second head is isotropic, the third has an outlier among its queries that the projection knows nothing of."""
    q, k, v = low_rank(1, 12, 0.001, seqlen=seqlen)
    if rank == 0:
        q[:, 0] *= np.float32(0.01)  # all keys have nearly one weight
    generator = np.random.default_rng(7)
    q[:, 1], k[:, 1] = generator.standard_normal((2, seqlen, 32))
    projection = Projection.fit(q, k, rank=rank)
    q[:, 2, 150] = 8 * generator.standard_normal(32)
    return *(x.astype(dtype) for x in (q, k, v)), projection


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (60, 20), "scale": -0.2}], ids=str)
@pytest.mark.parametrize("kept", [(0, 0), (20, 9)], ids=str)
@pytest.mark.parametrize("rank", [16, 0])
def test_decisions_are_those_of_the_host(dtype, options, kept, rank):
    q, k, v, projection = arrays(dtype, rank=rank)
    projection = projection.with_near(kept[0], sinks=kept[1])
    # As a fit with v knows the third head, which a sample finds to be good enough.
    known = [[0.0], [0.0], [0.06]] * np.ones((3, 3))
    projection = dataclasses.replace(projection, output_errors=known, row_errors=known)
    problem = normalize.problem(q, k, v, reduction=projection, **options)
    expected, wanted = reference.decide(q, k, v, problem, projection, 0.05)
    assert expected.tolist() == [[rank, 32, 32]]
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=projection, **options)
    out, _, ranks, errors = compose.within(problem, projection, *given, None, False, None, 0.05)
    np.testing.assert_array_equal(cp.asnumpy(ranks), expected)
    # Rounding of Qhat, Khat and the weights comes on top of the reduction's error, in quadrature.
    rounding = {"float16": 0.002, "bfloat16": 0.02, "float32": 1e-4}[np.dtype(dtype).name]
    np.testing.assert_allclose(cp.asnumpy(errors)[..., 0], wanted[..., 0], rtol=0.03, atol=rounding)
    exact = cudistr.attention(*given, **options)
    same_bits(out[:, 1], exact[:, 1])


@pytest.mark.parametrize(
    "lengths", [(1, 9), (3, 40), (70, 70), (1025, 60), (2500, 90), (9000, 60), (33000, 30)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (30, 0)}], ids=str)
@pytest.mark.parametrize("kept", [(0, 0), (20, 9)], ids=str)
def test_rows_are_drawn_as_the_host_draws_them(lengths, options, kept, monkeypatch):
    generator = np.random.default_rng(8)
    q, k, v = (generator.standard_normal((1, 2, n, 32), np.float32) for n in (lengths[0], *lengths[1:] * 2))
    q *= generator.exponential(size=(1, 2, lengths[0], 1)).astype(np.float32)
    projection = Projection.fit(q, k, rank=16).with_near(kept[0], sinks=kept[1])
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=projection, **options)
    made = launch.project(problem, *given[:2], projection.factors(q.dtype, 0), True, sketched=True)
    rows, factors = drawn(problem, projection, given, made, monkeypatch)
    for head, residual in enumerate(cp.asnumpy(made.residual)[0]):
        expected, like = reference.draw(residual.astype(np.float64), problem)
        # A point on the border between two rows falls to either, as sums are rounded.
        same = rows[0, head] == expected
        assert same.mean() >= 0.95 and np.abs(rows[0, head] - expected).max() <= 1
        np.testing.assert_allclose(factors[0, head, same], like[same], rtol=1e-4)


@pytest.mark.parametrize("lengths", [(200, 600), (600, 600), (900, 700)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (330, 190)}], ids=str)
@pytest.mark.parametrize("kept", [(20, 9), (0, 9), (1, 0)], ids=str)
@pytest.mark.parametrize("head_dim_v", [32, 96])
def test_decisions_beside_whole_blocks(lengths, options, kept, head_dim_v, monkeypatch, whole_blocks):
    generator = np.random.default_rng(10)
    sizes = zip((lengths[0], *lengths[1:] * 2), (32, 32, head_dim_v), strict=True)
    q, k, v = (generator.standard_normal((1, 2, n, d), np.float32) for n, d in sizes)
    q *= generator.exponential(size=(1, 2, lengths[0], 1)).astype(np.float32)
    projection = Projection.fit(q, k, rank=16).with_near(kept[0], sinks=kept[1])
    problem = normalize.problem(q, k, v, reduction=projection, **options)
    assert problem.exact_block != (1, 1)
    _, wanted = reference.decide(q, k, v, problem, projection, 0.9)
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=projection, **options)
    _, _, _, errors = compose.within(problem, projection, *given, None, False, None, 0.9)
    np.testing.assert_allclose(cp.asnumpy(errors), wanted, rtol=0.03, atol=1e-4)
    made = launch.project(problem, *given[:2], projection.factors(q.dtype, 0), True, sketched=True)
    rows, _ = drawn(problem, projection, given, made, monkeypatch)
    for head, residual in enumerate(cp.asnumpy(made.residual)[0]):
        expected, _ = reference.draw(residual.astype(np.float64), problem)
        assert (rows[0, head] == expected).mean() >= 0.95


@pytest.mark.parametrize("worse", [(2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("kept", [(0, 0), (20, 9)], ids=str)
def test_heads_that_are_not_looked_at(worse, kept):
    q, k, v, projection = arrays(np.float16)
    known = np.array([[0.06 if head in worse else 0.0] * 3 for head in range(3)])
    projection = dataclasses.replace(projection, output_errors=known, row_errors=known).with_near(
        kept[0], sinks=kept[1]
    )
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=projection, causal=True)
    like = compose.within(problem, projection, *given, None, True, None, 0.05)
    options = {"causal": True, "tolerance": 0.05, "exact_if_faster": False, "return_lse": True}
    for one, other in zip(cudistr.attention(*given, reduction=projection, **options), like[:2], strict=True):
        same_bits(one, other)
    narrowed = projection.narrowed(0.05)
    assert cp.asnumpy(narrowed.factors(np.float16, 0).widths).tolist() == [
        -1 if h in worse else 16 for h in range(3)
    ]
    problem = normalize.problem(*given, reduction=narrowed, causal=True)
    _, _, ranks, errors = compose.within(problem, narrowed, *given, None, False, None, 0.05)
    np.testing.assert_array_equal(cp.asnumpy(ranks), cp.asnumpy(like[2]))
    assert not cp.asnumpy(errors)[:, list(worse)].any()


def drawn(problem, projection, given, made, monkeypatch):
    """The rows of each head that a call draws, and their factors."""
    held = []
    monkeypatch.setattr(launch, "hold", lambda *memory: held.extend(memory))
    known = [x(1, 0) for x in (projection.head_ranks, projection.head_errors)]
    launch.decide(problem, *given, made, *known, 0.05, reference.SPREAD)
    # What the kernels leave for each other begins with these.
    rows, factors = cp.asnumpy(cp.ndarray((2, 1, 2, PROBE_ROWS), np.int32, held[-1]))
    return rows, factors.view(np.float32)


@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38, np.inf, -np.inf, np.nan, -1.0])
@pytest.mark.parametrize("where", [slice(None), slice(700, 701)], ids=["all", "one"])
def test_every_point_has_a_row_whatever_is_missed(value, where, monkeypatch):
    q, k, v = (np.random.default_rng(9).standard_normal((1, 2, 900, 32), np.float32) for _ in range(3))
    projection = Projection.fit(q, k, rank=16)
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=projection, causal=True)
    made = launch.project(problem, *given[:2], projection.factors(q.dtype, 0), True, sketched=True)
    residual = np.ones((1, 2, 900), np.float32)
    residual[..., where] = value
    made = made._replace(residual=cp.asarray(residual))
    rows, factors = drawn(problem, projection, given, made, monkeypatch)
    assert (np.diff(rows) >= 0).all() and rows.min() >= 0 and rows.max() < 900
    assert (factors > 0).all() and np.isfinite(factors).all()
    # But for sums that float32 does not have, they are those of the host.
    if value != 1e-42 and (value != 3e38 or where != slice(None)):
        expected, _ = reference.draw(residual[0, 0].astype(np.float64), problem)
        assert np.abs(rows - expected).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_exact(value):
    q, k, v, projection = arrays(np.float32)
    v[0, 0, 3, 5] = value
    given = [on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*given, reduction=projection)
    _, _, ranks, errors = compose.within(problem, projection, *given, None, False, None, 0.9)
    assert cp.asnumpy(ranks)[0, 0] == 32 and np.isnan(cp.asnumpy(errors)[0, 0]).all()
    assert cp.asnumpy(ranks)[0, 2] == 16


@pytest.mark.parametrize("family", ["portable", "hopper"])
def test_lse_and_a_call_within_a_tolerance(family, monkeypatch):
    monkeypatch.setenv("CUDISTR_KERNEL", family)
    q, k, v, projection = arrays(np.float16)
    k += np.float16(
        0.5
    )  # a mean that the projection does not know does no harm, and one that it knows goes into lse
    projection = Projection.fit(q, k, rank=16)
    given = [on_device(x) for x in (q, k, v)]
    options = {"reduction": projection, "tolerance": 0.05, "exact_if_faster": False}
    out, lse = cudistr.attention(*given, causal=True, **options, return_lse=True)
    exact, exact_lse = reference.attention(
        *(x.astype(np.float64) for x in (q, k, v)), causal=True, return_lse=True
    )
    error = np.linalg.norm(cp.asnumpy(out) - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
    assert error.max() <= 0.05
    np.testing.assert_allclose(cp.asnumpy(lse)[:, :2], exact_lse[:, :2], atol=0.05)


@pytest.mark.hardware
def test_a_captured_call():
    q, k, v, projection = arrays(np.float16)
    given = [on_device(x) for x in (q, k, v)]
    stream = cp.cuda.Stream(non_blocking=True)
    options = {"causal": True, "reduction": projection, "return_lse": True}
    options |= {"tolerance": 0.05, "exact_if_faster": False}
    with stream:
        expected = cudistr.attention(*given, **options)
        stream.begin_capture()
        found = cudistr.attention(*given, **options)
        graph = stream.end_capture()
        graph.launch()
        stream.synchronize()
        for one, like in zip(found, expected, strict=True):
            same_bits(one, like)
