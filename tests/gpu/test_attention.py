"""The portable attention kernel against the float64 reference of the same method; test_hopper.py has the other."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

import cudistr
from cudistr import reference
from tests.gpu.util import (
    BEYOND_FLOAT16,
    ROUNDOFF,
    check_kernel,
    check_tf32,
    cp,
    inputs,
    large_float32_tiles,
    on_device,
    rising,
    same_bits,
)
from tests.strategies import BFLOAT16, DTYPES, LAYOUTS, expanded

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_method = pytest.mark.parametrize("reduction", [None, cudistr.LSH(2)], ids=["exact", "G2"])


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    """On Hopper too."""
    monkeypatch.setenv("CUDISTR_KERNEL", "portable")


HEAD_DIMS = [8, 16, 24, 40, 64, 72, 80, 96, 128, 160, 192, 256]
LENGTHS = [
    (1, 1), (1, 300), (63, 65), (64, 64), (113, 203), (128, 128), (129, 127), (300, 517), (517, 300)
]  # fmt: skip
# (head_dim, group size): every depth of the reduced product from 8 to 128, powers of two and odd sizes
GROUPS = [
    (16, 2), (24, 3), (32, 4), (40, 5), (48, 6), (64, 2), (64, 4), (64, 8), (80, 5), (96, 2), (96, 3), (96, 4), (96, 6),
    (112, 2), (128, 2), (128, 4), (128, 8), (144, 6), (160, 5), (192, 3), (256, 2), (256, 4), (256, 8),
]  # fmt: skip


LARGE = {
    "exact": {},
    "causal": {"causal": True},
    "window": {"window": (90, 9), "scale": -0.2},
    "softcap": {"softcap": 3.0, "causal": True},
    "G2": {"reduction": cudistr.LSH(2)},
    "G4 causal": {"reduction": cudistr.LSH(4), "causal": True},
    "G2 near": {"reduction": cudistr.LSH(2, near=40, sinks=9), "causal": True},
    "mean": {"reduction": cudistr.LSH(2, representative="mean")},
    "rank1": {"reduction": cudistr.LSH(2, representative="rank1"), "causal": True},
    "energy": {"reduction": cudistr.Energy(16, near=40, sinks=9)},
}


@pytest.mark.parametrize("options", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize(("head_dim", "layout"), [(32, "ragged"), (64, "contiguous"), (128, "transposed")])
def test_float32_of_many_queries(head_dim, layout, options):
    q, k, v = inputs(31, np.float32, heads_kv=2, lengths=(300, 290), head_dim=head_dim)
    with large_float32_tiles():
        check_kernel(q, k, v, layouts=(layout,) * 3, **options)


@pytest.mark.parametrize("large", [False, True], ids=["", "large"])
def test_float32_values_pass_through(large):
    # With one key for each query, and no scores, weights are one: what is left is how V is split.
    q, k, v = inputs(32, np.float32, lengths=(290, 290))
    with large_float32_tiles() if large else nullcontext():
        out = cp.asnumpy(cudistr.attention(*map(on_device, (q, k * 0, v)), window=(0, 0)))
    assert (np.abs(out.astype(np.float64) - v) <= 2.0**-23 * np.abs(v)).all()


@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(dtype, head_dim):
    # Each head_dim meets another head_dim_v, from 8 to 256.
    head_dim_v = HEAD_DIMS[(HEAD_DIMS.index(head_dim) + 5) % len(HEAD_DIMS)]
    check_kernel(*inputs(head_dim, dtype, heads_kv=2, head_dim=head_dim, head_dim_v=head_dim_v))


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims_that_people_have(dtype, head_dim):
    check_kernel(*inputs(head_dim, dtype, head_dim=head_dim), causal=True)


@each_dtype
@pytest.mark.parametrize(("head_dim", "group_size"), GROUPS)
def test_group_sizes(dtype, head_dim, group_size):
    q, k, v = inputs(
        head_dim + group_size, dtype, heads_kv=2, lengths=(200, 150), head_dim=head_dim, head_dim_v=64
    )
    check_kernel(q, k, v, reduction=cudistr.LSH(group_size))


@each_dtype
@pytest.mark.parametrize(("head_dim", "group_size"), [(64, 2), (64, 4), (96, 3), (128, 8)])
def test_representative_mean(dtype, head_dim, group_size):
    q, k, v = inputs(3, dtype, head_dim=head_dim, head_dim_v=64)
    check_kernel(q, k, v, reduction=cudistr.LSH(group_size, representative="mean"))


@pytest.mark.parametrize("large", BEYOND_FLOAT16.values(), ids=BEYOND_FLOAT16)
@pytest.mark.parametrize("lengths", [(200, 150), (3, 700)], ids=str)
def test_groups_of_numbers_beyond_float16(large, lengths):
    q, k, v = inputs(21, BFLOAT16, heads_kv=2, lengths=lengths, head_dim=128, head_dim_v=64)
    for x, value in zip((q, k), large, strict=True):
        if value:
            x[0, 1, 2, 3] = value
    check_kernel(q, k, v, reduction=cudistr.LSH(4))
    check_kernel(q, k, v, reduction=cudistr.LSH(8, representative="mean"), causal=True)


@pytest.mark.parametrize("layout", ["contiguous", "ragged"])
def test_groups_of_small_numbers_that_count(layout):
    # What float16 cannot hold of them changes no score that matters, however large the scale.
    q, k, v = inputs(22, BFLOAT16, heads_kv=2, lengths=(200, 150), head_dim=64)
    q, k = ((x * np.float32(2.0**-8)).astype(BFLOAT16) for x in (q, k))
    check_kernel(q, k, v, reduction=cudistr.LSH(4), scale=2.0**13, layouts=(layout,) * 3)


RANK1 = cudistr.LSH(2, representative="rank1")
ENERGY = cudistr.Energy(32, near=0, sinks=0)
each_other = pytest.mark.parametrize("reduction", [RANK1, ENERGY], ids=["rank1", "energy"])


@each_dtype
@pytest.mark.parametrize(("head_dim", "group_size"), [(64, 4), (96, 3), (128, 8)])
def test_representative_rank1(dtype, head_dim, group_size):
    q, k, v = inputs(3, dtype, lengths=(200, 150), head_dim=head_dim, head_dim_v=64)
    check_kernel(q, k, v, reduction=cudistr.LSH(group_size, representative="rank1"))


@each_dtype
@pytest.mark.parametrize(("head_dim", "keep"), [(24, 16), (64, 48), (128, 64), (256, 240)])
def test_columns_kept(dtype, head_dim, keep):
    q, k, v = inputs(keep, dtype, heads_kv=2, lengths=(200, 150), head_dim=head_dim, head_dim_v=64)
    check_kernel(q, k + 2, v, reduction=cudistr.Energy(keep, near=0, sinks=0))


@each_dtype
@each_other
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("contiguous", {"causal": True}),
        ("ragged", {"window": (40, 9), "scale": -0.2}),
        ("reversed", {"softcap": 3.0}),
    ],
    ids=str,
)
def test_weights_and_energy(dtype, reduction, layout, options):
    q, k, v = inputs(27, dtype, heads_kv=2, lengths=(150, 290), head_dim_v=40)
    check_kernel(q, k, v, reduction=reduction, layouts=(layout,) * 3, **options)


@each_dtype
@each_other
def test_weights_and_energy_of_what_is_not_a_number(dtype, reduction):
    q, k, v = inputs(28, dtype, batch=1, lengths=(150, 150))
    q[0, 0, 3, 4] = q[0, 1, 140, 9] = np.nan
    options = {"causal": True, "reduction": reduction}
    out, lse = cudistr.attention(*map(on_device, (q, k, v)), return_lse=True, **options)
    wide = (x.astype(np.float64) for x in (q, k, v))
    exact, exact_lse = reference.attention(*wide, return_lse=True, **options)
    assert np.isnan(exact).any() and not np.isnan(exact).all()
    np.testing.assert_array_equal(np.isnan(cp.asnumpy(out).astype(np.float32)), np.isnan(exact))
    np.testing.assert_array_equal(np.isnan(cp.asnumpy(lse)), np.isnan(exact_lse))


@each_dtype
@pytest.mark.parametrize(
    "options", [{"block_q": 64}, {"block_q": 192}, {"block_q": 1024}, {"n_proj": 3}, {"seed": 7}], ids=str
)
def test_options_of_the_reduction(dtype, options):
    q, k, v = inputs(4, dtype, lengths=(400, 130))
    check_kernel(q, k, v, reduction=cudistr.LSH(2, **options))


@each_dtype
@each_method
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(dtype, reduction, lengths):
    q, k, v = inputs(5, dtype, lengths=lengths)
    check_kernel(q, k, v, reduction=reduction)
    check_kernel(q, k, v, reduction=reduction, causal=True)


@each_dtype
@each_method
def test_many_keys(dtype, reduction):
    check_kernel(*inputs(6, dtype, batch=1, heads=2, lengths=(70, 5000)), reduction=reduction)


@each_dtype
@each_method
@pytest.mark.parametrize(
    "options",
    [
        {"window": (0, 0)},
        {"window": (30, 0)},
        {"window": (0, 30)},
        {"window": (100, 20)},
        {"window": (None, 10)},
        {"window": (10, None)},
        {"window": (64, 64), "causal": True},
        {"window": (None, 400)},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(300, 300), (130, 500), (400, 150)], ids=str)
def test_windows(dtype, reduction, options, lengths):
    check_kernel(*inputs(7, dtype, batch=1, heads=2, lengths=lengths), reduction=reduction, **options)


@each_dtype
@each_method
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"scale": -0.2},
        {"scale": 0.0},
        {"scale": -0.0},
        {"softcap": 3.0},
        {"softcap": 50.0, "causal": True},
        {"softcap": 0.5, "scale": -0.4},
        {"softcap": 2.0, "scale": 0.0, "window": (40, 5)},
    ],
    ids=str,
)
def test_scores(dtype, reduction, options):
    check_kernel(*inputs(8, dtype), reduction=reduction, **options)


@each_dtype
@each_method
@pytest.mark.parametrize("scale", [4.0, -4.0])
def test_scores_far_from_zero(dtype, reduction, scale):
    # Scores of more than a hundred: a softmax that forgets the maximum overflows, one key takes nearly all.
    q, k, v = inputs(9, dtype, lengths=(150, 150))
    q, k = np.abs(q), np.abs(k)
    check_kernel(q, k, v, reduction=reduction, scale=scale)


@each_dtype
@pytest.mark.parametrize(
    "reduction", [None, cudistr.LSH(2), RANK1, ENERGY], ids=["exact", "G2", "rank1", "energy"]
)
@pytest.mark.parametrize("rise", [30, 250, 2000])
def test_scores_that_rise(dtype, reduction, rise):
    # The maxima of the first tiles stay as long as they may: weights grow by 2**43, and beyond all numbers in some rows.
    q, k, v = inputs(31, dtype, batch=1, heads=2, lengths=(150, 700))
    rising(q, k, rise)
    check_kernel(q, k, v, reduction=reduction)
    check_kernel(q, k, v, reduction=reduction, causal=True, softcap=200.0)


@each_dtype
@pytest.mark.parametrize("reduction", [None, cudistr.LSH(2), cudistr.LSH(4)], ids=["exact", "G2", "G4"])
@pytest.mark.parametrize("rise", [30, 250, 2000])
def test_scores_of_many_columns_that_rise(dtype, reduction, rise):
    # With more than 64 columns the portable kernel asks in float16 whether any maximum moves.
    q, k, v = inputs(33, dtype, batch=1, heads=2, lengths=(150, 700), head_dim=128)
    rising(q, k, rise)
    check_kernel(q, k, v, reduction=reduction)
    check_kernel(q, k, v, reduction=reduction, causal=True, softcap=200.0)


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_whose_scores_rise_leave_the_others_as_they_are(dtype, head_dim):
    q, k, v = inputs(32, dtype, batch=1, heads=2, lengths=(150, 700), head_dim=head_dim)
    rising(q, k, 250)
    wild = np.arange(150) % 7 == 3
    wild[:15] = False  # whose scores hardly rise
    q[:, :, ~wild, 0] = 0.5
    out = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
    q[:, :, wild, 0] = 0.5
    calm = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
    same_bits(out[:, :, ~wild], calm[:, :, ~wild])
    assert (out[:, :, wild] != calm[:, :, wild]).any(axis=-1).all()


@each_dtype
@each_method
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1), (6, 3)], ids=str)
def test_grouped_query_attention(dtype, reduction, heads):
    check_kernel(*inputs(10, dtype, heads=heads[0], heads_kv=heads[1]), reduction=reduction, causal=True)


@each_dtype
@each_method
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, reduction, layout):
    q, k, v = inputs(11, dtype, heads_kv=2, lengths=(70, 90), head_dim=64, head_dim_v=40)
    expected = check_kernel(q, k, v, reduction=reduction)
    for layouts in ((layout,) * 3, (layout, "contiguous", "shifted"), ("contiguous", layout, "transposed")):
        out = check_kernel(q, k, v, layouts=layouts, reduction=reduction)
        if set(layouts) <= {"contiguous", "transposed"}:
            # The order of sums does not depend on where the data lies, as long as rows start on 16 bytes; those that
            # do not are read by another variant of the kernel, with another tile.
            same_bits(out, expected)


@each_dtype
@each_method
def test_zero_strides(dtype, reduction):
    host = inputs(12, dtype, batch=1, heads=1, lengths=(70, 90))
    q, k, v = (cp.broadcast_to(on_device(x), (2, 4, *x.shape[2:])) for x in host)
    whole = cudistr.attention(q, k, v, reduction=reduction)
    same_bits(whole, cudistr.attention(*(x.copy() for x in (q, k, v)), reduction=reduction))
    same_bits(whole, cp.broadcast_to(whole[:1, :1], whole.shape))
    keys = cp.broadcast_to(k[:, :, :1], k.shape)  # one key, many times: softmax is uniform
    uniform = cp.asnumpy(cudistr.attention(q, keys, v, reduction=reduction)).astype(np.float64)
    values = host[2].astype(np.float64)
    error = np.abs(uniform - values.mean(axis=2, keepdims=True))
    assert error.max() <= 2 * ROUNDOFF[np.dtype(dtype)] * np.abs(values).max()


@each_dtype
@each_method
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "shifted", "ragged", "reversed"])
def test_out(dtype, reduction, layout):
    q, k, v = inputs(13, dtype, lengths=(70, 90), head_dim_v=40)
    buffer, view = LAYOUTS[layout](np.zeros((2, 4, 70, 40), dtype))
    target = cp.asarray(buffer)
    out = view(target)
    check_kernel(q, k, v, out=out, reduction=reduction)
    # What lies between the rows of out is not touched.
    view(buffer)[...] = cp.asnumpy(out)
    same_bits(target, buffer)


@each_dtype
@each_method
def test_rows_without_keys(dtype, reduction):
    q, k, v = inputs(14, dtype, lengths=(300, 100))
    arrays = [on_device(x) for x in (q, k, v)]
    out, lse = cudistr.attention(*arrays, causal=True, reduction=reduction, return_lse=True)
    assert (cp.asnumpy(out)[:, :, :200].astype(np.float32) == 0).all()
    assert bool((lse[:, :, :200] == -np.inf).all()) and bool(cp.isfinite(lse[:, :, 200:]).all())
    # Zeros replace what was in out, NaN included, and so they do without any key at all.
    for keys in (slice(None), slice(0)):
        out = on_device(np.full(q.shape, np.nan, dtype))
        arrays = [on_device(x) for x in (q, k[:, :, keys], v[:, :, keys])]
        _, lse = cudistr.attention(*arrays, causal=True, reduction=reduction, out=out, return_lse=True)
        rows = slice(200) if keys == slice(None) else slice(None)
        assert (cp.asnumpy(out)[:, :, rows].astype(np.float32) == 0).all()
        assert bool((lse[:, :, rows] == -np.inf).all())


@each_dtype
@each_method
def test_one_key_gives_its_value(dtype, reduction):
    q, k, v = inputs(26, dtype, lengths=(20, 100))
    out = check_kernel(
        q, k, v, window=(0, 0), reduction=reduction
    )  # offset 80: query i sees key 80 + i alone
    if dtype != np.float32:  # float32 values are split in two for the tensor cores, and come back rounded
        same_bits(out, v[:, :, 80:])


@each_dtype
@each_method
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 0, 0, 0)], ids=str
)
def test_empty_axes(dtype, reduction, shape):
    batch, heads, seqlen_q, seqlen_k = shape
    q = cp.asarray(np.ones((batch, heads, seqlen_q, 16), dtype))
    k, v = (cp.asarray(np.ones((batch, heads, seqlen_k, d), dtype)) for d in (16, 24))
    out, lse = cudistr.attention(q, k, v, reduction=reduction, return_lse=True)
    assert out.shape == (batch, heads, seqlen_q, 24) and out.dtype == dtype
    assert (cp.asnumpy(out).astype(np.float32) == 0).all()
    assert lse.shape == (batch, heads, seqlen_q) and lse.dtype == np.float32
    assert bool((lse == -np.inf).all())
    assert cudistr.group(q, cudistr.LSH(2)).shape == (batch, heads, -(-seqlen_q // 128), 16)
    merged, total = cudistr.merge([out, out], [lse, lse], return_lse=True)
    assert merged.shape == out.shape and bool((total == -np.inf).all())


# NaN and infinity


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_query_row_stays_in_its_row(dtype, bad):
    q, k, v = inputs(15, dtype, lengths=(150, 150))
    k = np.abs(k)  # one sign, so that all scores of the row are inf, or all -inf
    clean, clean_lse = cudistr.attention(*map(on_device, (q, k, v)), causal=True, return_lse=True)
    q[1, 2, 70, 5] = bad
    out, lse = (
        cp.asnumpy(x) for x in cudistr.attention(*map(on_device, (q, k, v)), causal=True, return_lse=True)
    )
    row = out[1, 2, 70].astype(np.float32)
    if bad == -np.inf:
        assert (row == 0).all() and lse[1, 2, 70] == -np.inf
    else:
        assert np.isnan(row).all() and np.isnan(lse[1, 2, 70])
    others = np.ones(q.shape[:3], bool)
    others[1, 2, 70] = False
    same_bits(out[others], cp.asnumpy(clean)[others])
    same_bits(lse[others], cp.asnumpy(clean_lse)[others])


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_key_reaches_the_rows_that_see_it(dtype, bad):
    q, k, v = inputs(16, dtype, batch=1, heads=1, lengths=(150, 150))
    clean = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v)), causal=True))[0, 0]
    k[0, 0, 70, 5] = bad
    out = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v)), causal=True))[0, 0]
    same_bits(out[:70], clean[:70])
    seeing = out[70:].astype(np.float32)
    weightless = bad * q[0, 0, 70:, 5].astype(np.float32) == -np.inf  # score -inf: the key drops out
    np.testing.assert_array_equal(np.isnan(seeing).all(axis=1), ~weightless)
    assert weightless.any() == (bad == bad) and np.isfinite(seeing[weightless]).all()


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_stays_in_its_column(dtype, bad):
    q, k, v = inputs(17, dtype, lengths=(150, 150))
    clean = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
    v[1, 2, 70, 5] = bad
    out = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
    column = out[1, 2, :, 5].astype(np.float32)
    assert (np.isnan(column) if np.isnan(bad) else column == bad).all()
    out[1, 2, :, 5] = clean[1, 2, :, 5]
    same_bits(out, clean)


@each_dtype
@pytest.mark.parametrize("representative", ["sample", "mean"])
def test_nan_in_grouped_attention_goes_where_the_reference_has_it(dtype, representative):
    reduction = cudistr.LSH(2, representative=representative)
    q, k, v = inputs(18, dtype, batch=1, lengths=(300, 150))
    q[0, 0, 3, 4] = q[0, 1, 140, 9] = k[0, 2, 20, 1] = np.nan
    options = {"causal": True, "reduction": reduction}
    out, lse = cudistr.attention(*map(on_device, (q, k, v)), return_lse=True, **options)
    wide = (x.astype(np.float64) for x in (q, k, v))
    exact, exact_lse = reference.attention(*wide, return_lse=True, **options)
    nans = np.isnan(exact)
    assert nans.any() and not nans.all()
    np.testing.assert_array_equal(np.isnan(cp.asnumpy(out).astype(np.float32)), nans)
    np.testing.assert_array_equal(np.isnan(cp.asnumpy(lse)), np.isnan(exact_lse))
    assert np.isfinite(cp.asnumpy(out).astype(np.float32)[~nans]).all()


@each_dtype
@each_method
def test_scores_that_are_all_minus_infinity(dtype, reduction):
    q, k, v = inputs(19, dtype, lengths=(70, 90))
    q, k = np.abs(q), np.full_like(k, -np.inf)
    out, lse = cudistr.attention(*map(on_device, (q, k, v)), reduction=reduction, return_lse=True)
    assert (cp.asnumpy(out).astype(np.float32) == 0).all() and bool((lse == -np.inf).all())


# Sizes


@pytest.mark.hardware
@each_dtype
@each_method
def test_more_heads_than_a_grid_axis_holds(dtype, reduction):
    q, k, v = inputs(20, dtype, batch=1, heads=7, lengths=(3, 5), head_dim=16)
    expected, lse = cudistr.attention(*map(on_device, (q, k, v)), reduction=reduction, return_lse=True)
    check_kernel(q, k, v, reduction=reduction)
    many = [on_device(np.tile(x, (10, 1000, 1, 1))) for x in (q, k, v)]  # 70000 heads
    out, many_lse = cudistr.attention(*many, reduction=reduction, return_lse=True)
    same_bits(
        out.reshape(10000, *expected.shape[1:]), cp.broadcast_to(expected, (10000, *expected.shape[1:]))
    )
    same_bits(many_lse.reshape(10000, 7, 3), cp.broadcast_to(lse, (10000, 7, 3)))


@pytest.fixture
def empty_pool():
    """The next tests need some 10 GB each: give back what other tests left, and what they leave."""
    cp.get_default_memory_pool().free_all_blocks()
    yield
    cp.get_default_memory_pool().free_all_blocks()


@pytest.mark.hardware
@pytest.mark.usefixtures("empty_pool")
@each_method
def test_strides_beyond_32_bits(reduction):
    # Rows 2**23 + 8 elements apart: the last ones lie more than 2**31 elements in. 5.2 GB for q, k, v; as much for out.
    n, pitch = 300, 2**23 + 8
    host = inputs(21, np.float16, batch=1, heads=1, lengths=(n, n))
    size = n * pitch * 2
    inside, outside = (cp.cuda.alloc(size) for _ in range(2))

    def view(memory, offset):
        strides = (size, size, 2 * pitch, 2)
        return cp.ndarray((1, 1, n, 64), np.float16, memory + 2 * offset, strides)

    q, k, v = (view(inside, 64 * i) for i in range(3))
    out = view(outside, 64)
    for array, values in zip((q, k, v), host, strict=True):
        array[...] = cp.asarray(values)
    cudistr.attention(q, k, v, causal=True, reduction=reduction, out=out)
    same_bits(out, cudistr.attention(*map(on_device, host), causal=True, reduction=reduction))


@pytest.mark.hardware
@pytest.mark.usefixtures("empty_pool")
def test_more_elements_than_32_bits_count():
    # 2**31 + 8 * 1000 elements in q and in out: 4.3 GB each. Rows do not depend on each other.
    n = 2**28 + 1000
    _, k, v = (on_device(x) for x in inputs(22, np.float16, batch=1, heads=1, lengths=(1, 40), head_dim=8))
    q = cp.zeros((1, 1, n, 8), np.float16)
    q[:, :, -300:] = cp.asarray(inputs(23, np.float16, batch=1, heads=1, lengths=(300, 1), head_dim=8)[0])
    q[:, :, :300] = q[:, :, -300:]
    out, lse = cudistr.attention(q, k, v, return_lse=True)
    expected, expected_lse = cudistr.attention(q[:, :, -300:].copy(), k, v, return_lse=True)
    for rows in (slice(0, 300), slice(n - 300, n)):
        same_bits(out[:, :, rows], expected)
        same_bits(lse[:, :, rows], expected_lse)


@each_method
@pytest.mark.parametrize("head_dim", [64, 256])
def test_tf32_when_cupy_is_asked_for_it(monkeypatch, reduction, head_dim):
    q, k, v = inputs(25, np.float32, lengths=(113, 203), head_dim=head_dim)
    monkeypatch.setenv("CUPY_TF32", "1")
    error = check_tf32(q, k, v, reduction=reduction)
    monkeypatch.delenv("CUPY_TF32")
    exact = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), reduction=reduction)
    split = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v)), reduction=reduction)) - exact
    assert np.abs(split).max() < error / 30  # the default is float32-grade: TF32 drops 13 of 24 bits


# Method against method


@each_dtype
@pytest.mark.parametrize("representative", ["sample", "mean"])
def test_grouped_is_exact_attention_of_the_expanded_queries(dtype, representative):
    # The oracle that needs no grouped kernel: both kernels against one float64 result.
    reduction = cudistr.LSH(4, representative=representative)
    q, k, v = inputs(24, dtype, lengths=(200, 150))
    copied = expanded(q, reduction)
    wide = (copied, k.astype(np.float64), v.astype(np.float64))
    like = reference.attention(*wide, return_lse=True)
    check_kernel(q, k, v, reduction=reduction, like=like)
    if representative == "sample":  # a mean is not a number of the dtype, so it cannot be fed back
        check_kernel(copied.astype(dtype), k, v, like=like)


# The sweep that runs under compute-sanitizer: every attention kernel family, at two tiles in each direction


def small(dtype, reduction=None, head_dim=64, layouts=("contiguous",) * 3, **options):
    q, k, v = inputs(25, dtype, batch=1, heads=2, heads_kv=1, lengths=(161, 173), head_dim=head_dim)
    check_kernel(q, k, v, layouts=layouts, reduction=reduction, on_host=True, **options)


@pytest.mark.small
@each_dtype
@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (100, None)}], ids=["full", "masked"])
def test_small_masks(dtype, group_size, options):
    small(dtype, cudistr.LSH(group_size), **options)


@pytest.mark.small
@each_dtype
@pytest.mark.parametrize(("head_dim", "group_size"), [(8, 1), (24, 3), (128, 2), (256, 1)])
def test_small_head_dims(dtype, head_dim, group_size):
    small(dtype, cudistr.LSH(group_size), head_dim=head_dim)


@pytest.mark.small
@pytest.mark.parametrize("layout", ["shifted", "strided_last"])
@each_method
def test_small_layouts(layout, reduction):
    small(np.float16, reduction, layouts=(layout,) * 3)


@pytest.mark.small
@each_dtype
@each_other
def test_small_weights_and_energy(dtype, reduction):
    small(dtype, reduction, causal=True)


@pytest.mark.small
def test_small_softcap_and_mean():
    small(np.float16, cudistr.LSH(2, representative="mean"), softcap=5.0, scale=-0.2)


@pytest.mark.small
@each_dtype
@each_method
def test_small_scores_that_rise(dtype, reduction):
    # Some rows are done twice.
    q, k, v = inputs(34, dtype, batch=1, heads=2, lengths=(75, 290))
    rising(q[:, 1:], k[:, 1:], 300)
    check_kernel(q, k, v, reduction=reduction)
