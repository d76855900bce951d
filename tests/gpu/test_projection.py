"""Projected calls on the device against the float64 reference, and factors found there."""

from __future__ import annotations

import numpy as np
import pytest

import cudistr
from cudistr import normalize, reference
from tests.gpu.util import check_kernel, cp, inputs, of_ranks, on_device, rising, same_bits, splits
from tests.strategies import DTYPES, LAYOUTS

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def fitted(q, k, rank=32):
    return cudistr.Projection.fit(q, k, rank=rank)


def shifted(q, k, v):
    """Keys with a mean that is not zero, so that taking it off shows in lse."""
    return q, (k.astype(np.float32) + 0.5).astype(k.dtype), v


@each_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (120, 90), "scale": -0.2}], ids=str)
@pytest.mark.parametrize("exact", [(0, 0), (40, 30)], ids=str)
@pytest.mark.parametrize("lengths", [(130, 260), (260, 130)], ids=str)
def test_projected(dtype, options, exact, lengths):
    q, k, v = shifted(*inputs(51, dtype, batch=1, heads_kv=2, lengths=lengths))
    check_kernel(q, k, v, reduction=fitted(q, k).with_near(exact[0], sinks=exact[1]), **options)


@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "rank", "head_dim_v"),
    [(64, 16, 64), (128, 64, 128), (24, 24, 40), (96, 48, 8), (64, 0, 64), (40, 0, 24), (8, 0, 8)],
)
def test_ranks(dtype, head_dim, rank, head_dim_v):
    q, k, v = shifted(
        *inputs(rank, dtype, batch=1, lengths=(90, 100), head_dim=head_dim, head_dim_v=head_dim_v)
    )
    check_kernel(q, k, v, reduction=fitted(q, k, rank), causal=True)


@each_dtype
def test_columns_that_are_no_whole_steps(dtype):
    q, k, v = inputs(63, dtype, batch=1, heads=2, lengths=(90, 100), head_dim=40, head_dim_v=24)
    check_kernel(q, k, v, reduction=fitted(q, k, 32).with_near(20, sinks=3), causal=True)


@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_few_queries_whose_keys_are_shared(seqlen_q):
    q, k, v = shifted(*inputs(64, np.float16, batch=1, heads=4, heads_kv=2, lengths=(seqlen_q, 900)))
    with splits(3):
        check_kernel(q, k, v, reduction=of_ranks(q, k, 16, 64).with_near(200, sinks=70), causal=True)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    q, k, v = inputs(52, dtype, batch=2, heads=4, heads_kv=2, lengths=(70, 80))
    check_kernel(q, k, v, reduction=fitted(q, k).with_near(9, sinks=3), layouts=(layout,) * 3, causal=True)


@each_dtype
@pytest.mark.parametrize(("options", "rtol"), [({"scale": 0.0}, 1e-8), ({}, 1e-6)])  # weights are float32
def test_factors_found_on_the_device(dtype, options, rtol):
    q, k, _ = shifted(*inputs(53, dtype, heads_kv=2, lengths=(150, 170)))
    found, expected = (
        cudistr.Projection.fit(*arrays, rank=32, **options)
        for arrays in ((on_device(q), on_device(k)), (q, k))
    )
    np.testing.assert_allclose(found.singular_values, expected.singular_values, rtol=rtol)
    products = [
        x.queries @ x.keys.swapaxes(1, 2) for x in (found, expected)
    ]  # a pair of columns may change its sign
    np.testing.assert_allclose(*products, atol=1e-4)


def test_heads_of_different_ranks():
    q, k, v = inputs(54, np.float16, heads=2, lengths=(150, 170))
    q[:, 0, :, 16:] = 0
    projection = cudistr.Projection.fit(q, k, tolerance=0.01)
    assert projection.ranks[0] == 16 < projection.ranks[1]
    check_kernel(q, k, v, reduction=projection)


@pytest.mark.parametrize(
    ("dtype", "family", "head_dim", "ranks", "near", "options"),
    [
        ("float16", "portable", 64, (16, 48, 64, 32), 0, {}),  # one head is exact, on q and k themselves
        ("bfloat16", "portable", 128, (16, 96), 40, {"causal": True}),
        ("float32", "portable", 96, (96, 16), 0, {"window": (120, 90), "scale": -0.2}),
        ("float16", "portable", 72, (16, 72), 0, {}),
        # Heads of which reduced keys multiply nothing.
        ("float16", "portable", 64, (0, 16, 64), 0, {"causal": True}),
        ("bfloat16", "portable", 128, (48, 0), 40, {"causal": True}),
        ("float32", "portable", 40, (0, 40), 40, {"window": (120, 90), "scale": -0.2}),
        ("float16", "portable", 64, (0, 0), 40, {}),
        ("float16", "portable", 64, (32, 32), 40, {}),  # one rank, which the Hopper kernel has as a constant
        ("float16", "hopper", 64, (16, 48, 64, 32), 0, {}),
        ("bfloat16", "hopper", 128, (96, 16), 40, {"causal": True}),
        ("float16", "hopper", 96, (96, 16), 0, {"window": (120, 90), "scale": -0.2}),
        ("float16", "hopper", 64, (0, 16, 64), 0, {"causal": True}),
        ("bfloat16", "hopper", 64, (32, 0), 40, {"causal": True}),  # three consumers
        ("bfloat16", "hopper", 128, (48, 0), 40, {"causal": True}),
        ("float16", "hopper", 96, (0, 96), 40, {"window": (120, 90), "scale": -0.2}),
        ("bfloat16", "hopper", 128, (0, 0), 40, {}),
        ("bfloat16", "hopper", 128, (64, 64), 40, {"causal": True}),
        ("float16", "hopper", 64, (48, 48), 40, {"window": (120, 90), "scale": -0.2}),
        ("float16", "hopper", 64, (64, 64), 40, {}),
    ],
    ids=str,
)
def test_ranks_of_heads(dtype, family, head_dim, ranks, near, options, monkeypatch):
    monkeypatch.setenv("CUDISTR_KERNEL", family)
    heads_kv = len(ranks)
    q, k, v = shifted(
        *inputs(
            61,
            DTYPES[dtype],
            batch=1,
            heads=2 * heads_kv,
            heads_kv=heads_kv,
            lengths=(130, 230),
            head_dim=head_dim,
        )
    )
    check_kernel(q, k, v, reduction=of_ranks(q, k, *ranks).with_near(near, sinks=near // 4), **options)


@pytest.mark.parametrize(
    ("dtype", "family", "dims", "ranks", "lengths"),
    [
        ("float16", "portable", (64, 64), (32, 32), (500, 1100)),
        ("bfloat16", "portable", (128, 128), (16, 128), (300, 900)),
        ("float32", "portable", (40, 40), (0, 16), (450, 700)),
        ("float16", "portable", (64, 256), (16, 48), (300, 600)),
        ("float16", "hopper", (64, 64), (32, 32), (500, 1100)),
        ("bfloat16", "hopper", (64, 64), (16, 64), (900, 900)),
        ("bfloat16", "hopper", (128, 128), (64, 64), (300, 900)),
        ("float16", "hopper", (128, 96), (0, 128), (400, 700)),
        ("bfloat16", "hopper", (128, 256), (64, 64), (300, 700)),
        ("float16", "hopper", (128, 128), (16, 48), (700, 300)),  # rows before the first key
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (330, 190)}], ids=str)
@pytest.mark.parametrize(("near", "sinks"), [(90, 70), (1, 0), (0, 9)], ids=str)
def test_whole_blocks_of_exact_keys(
    dtype, family, dims, ranks, lengths, options, near, sinks, monkeypatch, whole_blocks
):
    monkeypatch.setenv("CUDISTR_KERNEL", family)
    shape = {"batch": 1, "heads": 2, "heads_kv": 2, "lengths": lengths}
    q, k, v = shifted(*inputs(62, DTYPES[dtype], **shape, head_dim=dims[0], head_dim_v=dims[1]))
    projection = of_ranks(q, k, *ranks).with_near(near, sinks=sinks)
    assert normalize.problem(q, k, v, reduction=projection, **options).exact_block != (1, 1)
    out = cp.asnumpy(check_kernel(q, k, v, reduction=projection, **options)).astype(np.float64)
    # A yardstick without these blocks would have errors too, and allow them.
    expected = reference.attention(q, k, v, reduction=projection, **options)
    assert np.linalg.norm(out - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("dtype", "family"),
    [(x, "portable") for x in DTYPES] + [("float16", "hopper"), ("bfloat16", "hopper")],
    ids=str,
)
@pytest.mark.parametrize("ranks", [(16, 0), (32, 64)], ids=str)
@pytest.mark.parametrize("near", [(0, 0), (40, 30)], ids=str)
def test_scores_that_rise(dtype, family, ranks, near, monkeypatch):
    # Some tiles of queries are done twice, and come from exact keys to reduced ones both times.
    monkeypatch.setenv("CUDISTR_KERNEL", family)
    q, k, v = inputs(35, DTYPES[dtype], batch=1, heads=4, heads_kv=2, lengths=(300, 500))
    projection = of_ranks(q, k, *ranks).with_near(near[0], sinks=near[1])
    rising(q, k, 300)
    for options in ({}, {"causal": True}):
        check_kernel(q, k, v, reduction=projection, **options)


def test_factors_weighted_by_the_output_found_on_the_device():
    q, k, v = inputs(61, np.float16, lengths=(90, 110))
    options = dict(rank=32, causal=True, near=20, sinks=4, rows=40)
    found = cudistr.Projection.fit(*map(on_device, (q, k, v)), **options)
    wanted = cudistr.Projection.fit(q, k, v, **options)
    # With all columns the error is that of rounding alone.
    np.testing.assert_allclose(found.output_errors, wanted.output_errors, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.singular_values, wanted.singular_values, rtol=1e-3)


def test_measured_error_is_that_of_the_host():
    arrays = shifted(*inputs(55, np.float32, heads_kv=2, lengths=(150, 170)))
    projection = fitted(*arrays[:2]).with_near(30, sinks=4)
    found = cudistr.attention_error(*map(on_device, arrays), causal=True, reduction=projection)
    expected = cudistr.attention_error(*arrays, causal=True, reduction=projection)
    for one, other in ((found.output, expected.output), (found.scores, expected.scores)):
        np.testing.assert_allclose(
            (one.value, one.low, one.high), (other.value, other.low, other.high), rtol=1e-3
        )


def test_near_beyond_the_sequence_is_exact_to_the_bit():
    arrays = [on_device(x) for x in inputs(56, np.float16)]
    projection = fitted(*arrays[:2]).with_near(10**9)
    same_bits(cudistr.attention(*arrays, reduction=projection), cudistr.attention(*arrays))


def test_out_is_written_and_returned():
    q, k, v = inputs(57, np.float16, lengths=(70, 90))
    out = on_device(np.zeros((*q.shape[:3], v.shape[3]), np.float16), "transposed")
    check_kernel(q, k, v, out=out, reduction=fitted(q, k))


def test_without_keys_and_rows():
    q, k, v = inputs(58, np.float16, lengths=(5, 7))
    projection = fitted(q, k)
    q, k, v = map(on_device, (q, k, v))
    out, lse = cudistr.attention(q, k[:, :, :0], v[:, :, :0], reduction=projection, return_lse=True)
    assert not out.any() and bool((lse == -np.inf).all())
    assert cudistr.attention(q[:, :, :0], k, v, reduction=projection).shape == (2, 4, 0, 64)


@pytest.mark.small
def test_small():
    q, k, v = inputs(60, np.float16, batch=1, heads=2, heads_kv=1, lengths=(161, 173))
    check_kernel(q, k, v, on_host=True, causal=True, reduction=fitted(q, k).with_near(40, sinks=9))


@pytest.mark.hardware
def test_a_captured_call():
    q, k, v = (on_device(x) for x in inputs(59, np.float16, lengths=(130, 130)))
    projection = of_ranks(*(cp.asnumpy(x) for x in (q, k)), 16, 64, 32, 64).with_near(40, sinks=8)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        expected = cudistr.attention(q, k, v, causal=True, reduction=projection, return_lse=True)
        stream.begin_capture()
        found = cudistr.attention(q, k, v, causal=True, reduction=projection, return_lse=True)
        graph = stream.end_capture()
        other = [
            cp.full((1 << 20,), 7, np.float16) for _ in range(8)
        ]  # takes what the captured call gave back
        graph.launch()
        stream.synchronize()
        assert all(bool((x == 7).all()) for x in other)
        for one, like in zip(found, expected, strict=True):
            same_bits(one, like)
