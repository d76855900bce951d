"""The Hopper kernel against the float64 reference; what it does not cover runs in test_attention.py."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest

import cudistr
from cudistr import launch, normalize, reference
from cudistr import plan as planner
from cudistr.plan import copies_queries, plan
from tests.gpu.util import (
    BEYOND_FLOAT16,
    ROUNDOFF,
    check_decided,
    check_kernel,
    compare,
    cp,
    inputs,
    of_ranks,
    on_device,
    rising,
    same_bits,
)
from tests.strategies import BFLOAT16, LAYOUTS

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
# Columns of q and of v: every width of a panel, two and three consumers, every row of the table of tiles.
HEAD_DIMS = [
    (64, 64), (128, 128), (64, 128), (32, 128), (32, 64), (96, 96), (192, 192), (256, 256), (192, 128), (16, 16),
    (32, 32), (48, 112), (80, 80), (112, 112), (144, 144), (160, 160), (224, 224), (16, 256), (256, 16), (240, 64),
]  # fmt: skip
USUAL = [(64, 64), (128, 128), (32, 128)]
each_usual = pytest.mark.parametrize("head_dims", USUAL, ids=str)
LENGTHS = [
    (1, 1),
    (1, 300),
    (65, 63),
    (64, 128),
    (113, 203),
    (128, 176),
    (192, 177),
    (193, 129),
    (300, 517),
    (517, 300),
]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries too, which the planner would leave to the portable kernel."""
    if launch.device_properties(0).capability != 90:
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("CUDISTR_KERNEL", "hopper")


def check(q, k, v, **options):
    """check_kernel, after making sure of the kernel."""
    asked = {name: x for name, x in options.items() if name not in ("layouts", "out", "on_host", "like")}
    problem = normalize.problem(*map(on_device, (q, k, v)), **asked)
    assert plan(problem, launch.device_properties(0)).attention.name == "sm90_flash_fwd"
    return check_kernel(q, k, v, **options)


def check_copied(q, k, v, **options):
    """The same for what runs with queries that stand for its own."""
    asked = {name: x for name, x in options.items() if name not in ("layouts", "out", "on_host", "like")}
    problem = normalize.problem(*map(on_device, (q, k, v)), **asked)
    assert copies_queries(problem, launch.device_properties(0))
    return check_kernel(q, k, v, copied=True, **options)


def check_of_one_rank(q, k, v, **options):
    """The same for a projection whose only rank, beside exact keys, is a constant of the kernel."""
    with mock.patch.object(launch, "attention", wraps=launch.attention) as attend:
        result = check_kernel(q, k, v, **options)
    assert rank_of(attend) == options["reduction"].rank
    return result


def rank_of(attend):
    """RANK of the kernel of a call."""
    own = attend.call_args.args[0]
    return dict(plan(own, launch.device_properties(0)).attention.constants)["RANK"]


@each_dtype
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_head_dims(dtype, head_dims):
    q, k, v = inputs(1, dtype, heads_kv=2, lengths=(333, 415), head_dim=head_dims[0], head_dim_v=head_dims[1])
    check(q, k, v)
    check(q, k, v, causal=True)


# Head dims, and the size of a group: every number of members that is summed in its own way, of one to three panels.
GROUPS = [(128, 128, 2), (128, 128, 4), (64, 64, 2), (64, 64, 4), (96, 96, 3), (128, 64, 8), (48, 64, 3), (192, 192, 2), (192, 16, 12), (256, 64, 4)]  # fmt: skip


@each_dtype
@pytest.mark.parametrize("dims", GROUPS, ids=str)
def test_groups(dtype, dims):
    head_dim, head_dim_v, group_size = dims
    q, k, v = inputs(15, dtype, heads_kv=2, lengths=(333, 415), head_dim=head_dim, head_dim_v=head_dim_v)
    reduction = cudistr.LSH(group_size)
    check(q, k, v, reduction=reduction)
    check(q, k, v, reduction=reduction, causal=True)


@pytest.mark.parametrize("group_size", [4, 8])
@pytest.mark.parametrize("large", BEYOND_FLOAT16.values(), ids=BEYOND_FLOAT16)
def test_groups_of_numbers_beyond_float16(large, group_size):
    q, k, v = inputs(18, BFLOAT16, heads_kv=2, lengths=(333, 415), head_dim=128)
    for x, value in zip((q, k), large, strict=True):
        if value:
            x[0, 1, 17, 3] = value
    check(q, k, v, reduction=cudistr.LSH(group_size))
    check(q, k, v, reduction=cudistr.LSH(group_size, representative="mean"), causal=True)
    check(q, k, v, reduction=cudistr.LSH(group_size, representative="mean", near=40, sinks=9))


@pytest.mark.small
def test_groups_are_summed_in_float16_up_to_a_limit():
    # A large number in one head, and what it does to the precision of the other.
    q, k, v = inputs(19, BFLOAT16, batch=1, heads=2, lengths=(150, 200), head_dim=128)
    reduction = cudistr.LSH(4)
    exact = cudistr.attention(*(x.astype(np.float32) for x in (q, k, v)), reduction=reduction)
    limit = 2.0**14 / 128**0.5

    def error(value: float) -> float:
        k[0, 0, 0, 0] = value
        found = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v)), reduction=reduction))
        return float(np.abs(found[0, 1].astype(np.float32) - exact[0, 1]).mean())

    # Three quarters: weights and output are rounded to eight bits on both sides of the limit.
    assert error(0.99 * limit) < 0.9 * error(1.01 * limit)


@each_dtype
@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 300), (65, 63), (129, 128), (257, 200), (300, 517), (517, 300)], ids=str
)
@pytest.mark.parametrize("representative", ["sample", "mean", "rank1"])
def test_lengths_of_groups(dtype, lengths, representative):
    q, k, v = inputs(16, dtype, batch=1, heads=2, lengths=lengths)
    reduction = cudistr.LSH(2, representative=representative)
    check(q, k, v, reduction=reduction)
    check(q, k, v, reduction=reduction, causal=True, softcap=20.0)
    check(q, k, v, reduction=reduction, window=(100, 20))


@each_dtype
@pytest.mark.parametrize("block_q", [128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
def test_blocks_of_groups(dtype, block_q, heads):
    q, k, v = inputs(17, dtype, batch=1, heads=heads[0], heads_kv=heads[1], lengths=(700, 150))
    check(q, k, v, reduction=cudistr.LSH(4, block_q=block_q), causal=True)


def in_proportion(q: np.ndarray, group_size: int) -> np.ndarray:
    """Columns of a group such that the first times a power of two, either sign, is each of the others."""
    factors = 2.0 ** -np.arange(group_size) * (-1.0) ** np.arange(group_size)
    return (q[..., ::group_size, None] * factors.astype(q.dtype)).reshape(q.shape)


# Every number of members whose weighted sums are made in their own way, and tiles of one to three panels of keys.
WEIGHTED_GROUPS = [
    (128, 128, 2),
    (64, 64, 2),
    (128, 128, 4),
    (64, 64, 4),
    (96, 96, 3),
    (128, 64, 8),
    (192, 16, 12),
]


@each_dtype
@pytest.mark.parametrize("dims", WEIGHTED_GROUPS, ids=str)
def test_weighted_groups(dtype, dims):
    head_dim, head_dim_v, group_size = dims
    q, k, v = inputs(
        21, dtype, batch=1, heads_kv=2, lengths=(333, 415), head_dim=head_dim, head_dim_v=head_dim_v
    )
    reduction = cudistr.LSH(group_size, representative="rank1")
    q[:, 1] = in_proportion(q[:, 1], group_size)
    q[:, 2] *= np.linspace(1, 3, head_dim).astype(dtype)
    check(q, k, v, reduction=reduction)
    check(q, k, v, reduction=reduction, causal=True)


@each_dtype
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("group_size", [2, 4])
def test_blocks_of_weighted_groups(dtype, heads, group_size):
    # Every thread block has several tiles of queries, and every tile has other weights.
    q, k, v = inputs(22, dtype, batch=1, heads=heads[0], heads_kv=heads[1], lengths=(700, 150))
    q *= np.repeat(np.linspace(0.5, 2, 700), 64).reshape(700, 64).astype(dtype)
    q[..., ::3] *= np.array(-2, dtype)
    check(q, k, v, reduction=cudistr.LSH(group_size, representative="rank1"))
    check(q, k, v, reduction=cudistr.LSH(group_size, block_q=256, representative="rank1"), causal=True)


@each_dtype
def test_groups_of_columns_in_proportion_are_exact(dtype):
    q, k, v = inputs(23, dtype, lengths=(300, 400), head_dim=64)
    q = in_proportion(q, 2)
    arrays = [on_device(x) for x in (q, k, v)]
    exact = cp.asnumpy(cudistr.attention(*arrays)).astype(np.float32)
    reduction = cudistr.LSH(2, representative="rank1")
    grouped = cp.asnumpy(cudistr.attention(*arrays, reduction=reduction)).astype(np.float32)
    # Sums of two columns of K are rounded once more.
    assert np.linalg.norm(grouped - exact) <= 4 * ROUNDOFF[np.dtype(dtype)] * np.linalg.norm(exact)


@each_dtype
def test_nan_in_weighted_groups_goes_where_the_reference_has_it(dtype):
    q, k, v = inputs(24, dtype, batch=1, lengths=(300, 300))
    q[0, 0, 3, 4] = q[0, 1, 140, 9] = np.nan
    options = {"causal": True, "reduction": cudistr.LSH(2, representative="rank1")}
    out, lse = cudistr.attention(*map(on_device, (q, k, v)), return_lse=True, **options)
    wide = (x.astype(np.float64) for x in (q, k, v))
    exact, exact_lse = cudistr.reference.attention(*wide, return_lse=True, **options)
    assert np.isnan(exact).any() and not np.isnan(exact).all()
    np.testing.assert_array_equal(np.isnan(cp.asnumpy(out).astype(np.float32)), np.isnan(exact))
    np.testing.assert_array_equal(np.isnan(cp.asnumpy(lse)), np.isnan(exact_lse))


# Which columns of the queries are replaced, and where: everywhere, or beside exact keys.
COPIED = [
    cudistr.Energy(32, near=0, sinks=0),
    cudistr.Energy(16, near=40, sinks=30, block_q=64),
    cudistr.Energy(48, near=0, sinks=9),
    cudistr.LSH(2, representative="rank1", near=40, sinks=30),
    cudistr.LSH(8, representative="rank1", near=100, block_q=64),
]
each_copied = pytest.mark.parametrize("reduction", COPIED, ids=str)


@each_dtype
@each_copied
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (64, 128), (192, 32)], ids=str)
def test_copied_queries(dtype, reduction, head_dims):
    q, k, v = inputs(
        51, dtype, heads_kv=2, lengths=(333, 415), head_dim=head_dims[0], head_dim_v=head_dims[1]
    )
    # Columns that differ in their energy, and whose means matter.
    q = (q * np.linspace(0.3, 1.5, head_dims[0]) + np.linspace(-0.5, 0.5, head_dims[0])).astype(dtype)
    k[:, :, :9] *= 4
    check_copied(q, k, v, reduction=reduction)
    check_copied(q, k, v, reduction=reduction, causal=True)


@each_dtype
@each_copied
@pytest.mark.parametrize(
    "options",
    [{"window": (150, 90)}, {"softcap": 3.0, "causal": True}, {"scale": -0.2}, {"window": (30, 0)}],
    ids=str,
)
def test_scores_of_copied_queries(dtype, reduction, options):
    q, k, v = inputs(52, dtype, batch=1, heads=2, lengths=(260, 390))
    check_copied(q, k, v, reduction=reduction, **options)


@each_dtype
@each_copied
@pytest.mark.parametrize("lengths", [(65, 700), (300, 130), (129, 129)], ids=str)
def test_lengths_of_copied_queries(dtype, reduction, lengths):
    q, k, v = inputs(53, dtype, batch=1, heads=3, heads_kv=1, lengths=lengths)
    check_copied(q, k, v, reduction=reduction, causal=True)


@each_dtype
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x not in ("shifted", "ragged", "reversed")])
def test_layouts_of_copied_queries(dtype, layout):
    q, k, v = inputs(54, dtype, heads_kv=2, lengths=(170, 290))
    for reduction in COPIED[1], COPIED[3]:
        expected = check_copied(q, k, v, reduction=reduction)
        same_bits(check_copied(q, k, v, reduction=reduction, layouts=(layout,) * 3), expected)


@each_dtype
@each_copied
def test_scores_of_copied_queries_that_rise(dtype, reduction):
    q, k, v = inputs(55, dtype, batch=1, heads=3, lengths=(300, 900))
    rising(q[:, 1:], k[:, 1:], 250)
    # With a softcap nothing is put back, of which float32 would know too little here.
    check_copied(q, k, v, reduction=reduction, softcap=1000.0)


@pytest.mark.small
@pytest.mark.parametrize("reduction", [COPIED[1], COPIED[3]], ids=str)
def test_small_copied_queries(reduction):
    q, k, v = inputs(56, BFLOAT16, batch=1, heads=2, heads_kv=1, lengths=(161, 173))
    check_copied(q, k, v, reduction=reduction, causal=True)


# Columns of q, of Qhat, and of v: as many panels of each as there are, and one less; two and three consumers.
ONE_RANK = [
    (64, 32, 64), (64, 16, 64), (128, 64, 128), (128, 16, 128), (128, 112, 128), (256, 128, 256), (96, 80, 96),
    (80, 32, 48), (64, 48, 128), (32, 16, 64),
]  # fmt: skip


def of_one_rank(seed, dtype, head_dim, rank, head_dim_v, near, sinks, **shape):
    """Inputs whose keys have a mean, and a projection of two heads of one rank."""
    shape = {"heads_kv": 2, "lengths": (333, 415), **shape}
    q, k, v = inputs(seed, dtype, head_dim=head_dim, head_dim_v=head_dim_v, **shape)
    k += k.dtype.type(0.5)
    projection = cudistr.Projection.fit(q, k, rank=rank)
    return (q, k, v), projection.with_near(near, sinks=sinks)


@each_dtype
@pytest.mark.parametrize("dims", ONE_RANK, ids=str)
def test_one_rank_beside_exact_keys(dtype, dims):
    arrays, projection = of_one_rank(71, dtype, *dims, near=40, sinks=9)
    check_of_one_rank(*arrays, reduction=projection)
    check_of_one_rank(*arrays, reduction=projection, causal=True)


@each_dtype
@pytest.mark.parametrize(("near", "sinks"), [(40, 0), (0, 30), (130, 200)], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": 1.0, "causal": True}, {"scale": -0.2}], ids=str)
def test_scores_of_one_rank(dtype, near, sinks, options):
    arrays, projection = of_one_rank(72, dtype, 64, 32, 64, near, sinks, batch=1)
    check_of_one_rank(*arrays, reduction=projection, **options)


@each_dtype
@pytest.mark.parametrize("window", [(150, 90), (30, 0), (300, 0)], ids=str)
def test_windows_of_one_rank(dtype, window):
    arrays, projection = of_one_rank(73, dtype, 128, 48, 128, 20, 9, batch=1)
    check_of_one_rank(*arrays, reduction=projection, window=window)


@each_dtype
@pytest.mark.parametrize(
    "lengths", [(1, 300), (65, 700), (129, 129), (300, 517), (517, 300), (300, 60)], ids=str
)
@pytest.mark.parametrize(("near", "sinks"), [(40, 9), (40, 0)], ids=str)
def test_lengths_of_one_rank(dtype, lengths, near, sinks):
    # With more queries than keys, and no sinks, some tiles of queries have no exact key.
    arrays, projection = of_one_rank(
        74, dtype, 128, 64, 64, near, sinks, batch=1, heads=2, heads_kv=1, lengths=lengths
    )
    check_of_one_rank(*arrays, reduction=projection)
    check_of_one_rank(*arrays, reduction=projection, causal=True)


@each_dtype
@pytest.mark.parametrize("rise", [30, 300])
def test_scores_of_one_rank_that_rise(dtype, rise):
    # Some tiles of queries are done twice, and come from exact keys to reduced ones both times.
    (q, k, v), projection = of_one_rank(75, dtype, 64, 32, 64, 40, 30, batch=1, lengths=(300, 900))
    rising(q, k, rise)
    check_of_one_rank(q, k, v, reduction=projection)
    check_of_one_rank(q, k, v, reduction=projection, causal=True)


@each_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_one_rank_has_the_bits_of_ranks_that_are_read(dtype, causal):
    arrays, projection = of_one_rank(76, dtype, 128, 64, 128, 40, 9)
    arrays = map(on_device, arrays)
    with mock.patch.object(launch, "attention", wraps=launch.attention) as attend:
        found = cudistr.attention(*arrays, reduction=projection, causal=causal, return_lse=True)
        assert rank_of(attend) == 64
        own, *others = attend.call_args.args
        read = dataclasses.replace(own, ranked=own.ranked._replace(alike=False))
        expected = launch.attention(read, *others)
        assert rank_of(attend) == 0
    for one, other in zip(found, expected, strict=True):
        same_bits(one, other)


@each_dtype
def test_rows_whose_keys_are_all_exact_beside_one_rank(dtype):
    (q, k, v), projection = of_one_rank(77, dtype, 64, 16, 64, 150, 0, batch=1, lengths=(300, 300))
    out = check_of_one_rank(q, k, v, reduction=projection, causal=True)
    wide = (x.astype(np.float64) for x in (q, k, v))
    exact = reference.attention(*wide, causal=True)
    compare(out[:, :, :150], exact[:, :, :150], exact[:, :, :150].astype(dtype).astype(np.float64))
    assert np.abs(cp.asnumpy(out).astype(np.float64) - exact)[:, :, 200:].max() > 0.05


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        ((32, 48), {}),
        ((0, 64), {}),
        ((64, 64), {}),
        ((32, 48), {"tolerance": 0.9}),
        ((0, 0), {"tolerance": 0.9}),
    ],
    ids=str,
)
def test_ranks_that_are_read(ranks, options):
    q, k, v = inputs(78, np.float16, heads_kv=2, lengths=(130, 260))
    projection = of_ranks(q, k, *ranks).with_near(40, sinks=9)
    with mock.patch.object(launch, "attention", wraps=launch.attention) as attend:
        cudistr.attention(*map(on_device, (q, k, v)), reduction=projection, **options)
    assert rank_of(attend) == 0


def check_exact_head(q, k, v, rank, near, sinks, **options):
    """A head of one rank and an exact one, which a tolerance has told apart: the bits of ranks that are read."""
    k += k.dtype.type(0.5)
    whole = q.shape[3]
    projection, mixed = (of_ranks(q, k, rank, x).with_near(near, sinks=sinks) for x in (rank, whole))
    with mock.patch.object(launch, "attention", wraps=launch.attention) as attend:
        found = check_decided(q, k, v, projection, rank, whole, **options)
        assert rank_of(attend) == rank
    given = [on_device(x) for x in (q, k, v)]
    with mock.patch.object(launch, "attention", wraps=launch.attention) as attend:
        known = cudistr.attention(*given, reduction=mixed, **options, return_lse=True)
        assert rank_of(attend) == rank
        own, *others = attend.call_args.args
        read = launch.attention(dataclasses.replace(own, ranked=own.ranked._replace(alike=False)), *others)
        assert rank_of(attend) == 0
    for one, like, other in zip(found, known, read, strict=True):
        same_bits(one, like)
        same_bits(one, other)
    same_bits(found[0][:, 1], cudistr.attention(*given, **options)[:, 1])


@each_dtype
@pytest.mark.parametrize("dims", [(64, 32, 64), (128, 64, 128), (256, 128, 256), (32, 16, 64)], ids=str)
@pytest.mark.parametrize(("near", "sinks"), [(0, 0), (40, 9), (0, 9)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 20)}], ids=str)
def test_exact_heads_beside_one_rank(dtype, dims, near, sinks, options):
    head_dim, rank, head_dim_v = dims
    shape = {"heads": 2, "heads_kv": 2, "lengths": (333, 415), "head_dim": head_dim, "head_dim_v": head_dim_v}
    check_exact_head(*inputs(81, dtype, **shape), rank, near, sinks, **options)


@pytest.mark.small
@each_dtype
@pytest.mark.parametrize(("near", "sinks"), [(0, 0), (40, 9)], ids=str)
def test_small_exact_heads_beside_one_rank(dtype, near, sinks):
    arrays = inputs(82, dtype, batch=1, heads=2, heads_kv=2, lengths=(161, 173), head_dim=64, head_dim_v=64)
    check_exact_head(*arrays, 32, near, sinks, causal=True)


@pytest.mark.small
@each_dtype
def test_small_one_rank(dtype):
    arrays, projection = of_one_rank(
        79, dtype, 128, 64, 128, 40, 9, batch=1, heads=2, heads_kv=1, lengths=(161, 173)
    )
    check_of_one_rank(*arrays, reduction=projection, causal=True, on_host=True)


@each_dtype
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x not in ("shifted", "ragged", "reversed")])
def test_layouts_of_groups(dtype, layout):
    q, k, v = inputs(18, dtype, heads_kv=2, lengths=(170, 290))
    expected = check(q, k, v, reduction=cudistr.LSH(2))
    same_bits(check_kernel(q, k, v, reduction=cudistr.LSH(2), layouts=(layout,) * 3), expected)


@each_dtype
def test_groups_of_equal_columns_are_exact(dtype):
    q, k, v = inputs(19, dtype, lengths=(300, 400), head_dim=64)
    q = np.repeat(q[..., ::2], 2, axis=-1)
    arrays = [on_device(x) for x in (q, k, v)]
    exact = cp.asnumpy(cudistr.attention(*arrays)).astype(np.float32)
    grouped = cp.asnumpy(cudistr.attention(*arrays, reduction=cudistr.LSH(2))).astype(np.float32)
    # Sums of two columns of K are rounded once more.
    assert np.linalg.norm(grouped - exact) <= 4 * ROUNDOFF[np.dtype(dtype)] * np.linalg.norm(exact)


# Exact keys beside groups: each number of members, one to three panels of keys.
KEPT_GROUPS = [(128, 128, 2), (64, 64, 2), (64, 64, 4), (96, 96, 3), (128, 64, 8), (32, 128, 2)]


@each_dtype
@pytest.mark.parametrize("dims", KEPT_GROUPS, ids=str)
@pytest.mark.parametrize(("near", "sinks"), [(40, 9), (0, 130), (130, 0)], ids=str)
def test_exact_keys_beside_groups(dtype, dims, near, sinks):
    head_dim, head_dim_v, group_size = dims
    q, k, v = inputs(
        63, dtype, batch=1, heads_kv=2, lengths=(333, 415), head_dim=head_dim, head_dim_v=head_dim_v
    )
    reduction = cudistr.LSH(group_size, near=near, sinks=sinks)
    check(q, k, v, reduction=reduction)
    check(q, k, v, reduction=reduction, causal=True)


@each_dtype
@pytest.mark.parametrize("lengths", [(1, 300), (65, 63), (300, 517), (517, 300)], ids=str)
def test_lengths_of_groups_with_exact_keys(dtype, lengths):
    q, k, v = inputs(64, dtype, batch=1, heads=4, heads_kv=2, lengths=lengths)
    reduction = cudistr.LSH(2, block_q=256, representative="mean", near=20, sinks=5)
    check(q, k, v, reduction=reduction)
    check(q, k, v, reduction=reduction, causal=True, softcap=20.0)
    check(q, k, v, reduction=reduction, window=(100, 30))
    check(q, k, v, reduction=cudistr.LSH(2, sinks=5), window=(30, 0))  # most queries see no sink


# Where the last keys of a tile of queries end in a tile of keys: of every consumer's queries and of their neighbours, 64
# keys of it, more, and none; and a tile of keys that is the only one.
SHORT = [(300, 1100), (333, 1017), (500, 500), (200, 1344), (40, 60)]


@each_dtype
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 128), (96, 96), (192, 192)], ids=str)
@pytest.mark.parametrize("lengths", SHORT, ids=str)
def test_short_tiles(dtype, head_dims, lengths):
    head_dim, head_dim_v = head_dims
    q, k, v = inputs(
        82, dtype, batch=1, heads=2, heads_kv=1, lengths=lengths, head_dim=head_dim, head_dim_v=head_dim_v
    )
    for options in ({}, {"causal": True}, {"window": (400, 30)}):
        check(q, k, v, **options)
        if head_dim == 64:
            check(q, k, v, reduction=cudistr.LSH(2), **options)


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("near", [None, 40], ids=["exact", "near"])
def test_tiles_that_are_shared_out_have_the_same_bits(dtype, head_dim, causal, near):
    q, k, v = inputs(
        84, dtype, batch=1, heads=3, heads_kv=1, lengths=(500, 700), head_dim=head_dim, head_dim_v=head_dim
    )
    arrays = [on_device(x) for x in (q, k, v)]
    reduction = None if near is None else cudistr.Projection.fit(q, k, rank=16).with_near(near, sinks=9)

    def with_shares(first, count):
        planner.plan.cache_clear()
        launch._recipe.cache_clear()
        with mock.patch.object(planner, "_hopper_shares", return_value=(first, count)):
            return cudistr.attention(*arrays, causal=causal, reduction=reduction, return_lse=True)

    try:
        expected = with_shares(0, 0)
        tiles = 9 if head_dim == 64 else 12
        for shares in ((0, 1), (2, 3), (tiles - 2, 2), (0, tiles)):
            for one, other in zip(with_shares(*shares), expected, strict=True):
                same_bits(one, other)
    finally:
        planner.plan.cache_clear()
        launch._recipe.cache_clear()


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [(333, 1017), (500, 500)], ids=str)
def test_exact_heads_have_the_bits_of_an_exact_call(dtype, head_dim, lengths):
    q, k, v = inputs(83, dtype, batch=1, heads_kv=2, lengths=lengths, head_dim=head_dim, head_dim_v=head_dim)
    arrays = [on_device(x) for x in (q, k, v)]
    refused = cudistr.Projection.fit(q, k, rank=16).with_near(40, sinks=9)
    options = {"causal": True, "return_lse": True}
    found = cudistr.attention(*arrays, reduction=refused, tolerance=1e-6, exact_if_faster=False, **options)
    for one, other in zip(found, cudistr.attention(*arrays, **options), strict=True):
        same_bits(one, other)


@each_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_short_tiles_of_exact_keys(dtype, causal):
    # Of tiles of sinks, and of the last near keys, consumers see at most 64 keys, or none, and some of them more.
    shape = {"batch": 1, "heads": 2, "heads_kv": 1, "lengths": (300, 1100)}
    q, k, v = inputs(80, dtype, head_dim=64, **shape)
    check(q, k, v, reduction=cudistr.LSH(4, near=256, sinks=64), causal=causal)
    arrays, projection = of_one_rank(81, dtype, 128, 64, 128, 256, 64, **shape)
    check_of_one_rank(*arrays, reduction=projection, causal=causal)


@pytest.mark.hardware
@each_dtype
def test_many_tiles_of_groups(dtype):
    q, k, v = inputs(20, dtype, batch=1, heads=20, heads_kv=4, lengths=(2000, 2100))
    expected = check(q, k, v, reduction=cudistr.LSH(2), causal=True)
    for _ in range(50):
        same_bits(
            cudistr.attention(*map(on_device, (q, k, v)), reduction=cudistr.LSH(2), causal=True), expected
        )
    reduction = cudistr.LSH(4, representative="mean", near=200, sinks=50)
    expected = check(q, k, v, reduction=reduction, causal=True)
    for _ in range(20):
        same_bits(cudistr.attention(*map(on_device, (q, k, v)), reduction=reduction, causal=True), expected)


@each_dtype
@each_usual
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(dtype, head_dims, lengths):
    q, k, v = inputs(
        2, dtype, batch=1, heads=2, lengths=lengths, head_dim=head_dims[0], head_dim_v=head_dims[1]
    )
    check(q, k, v)
    check(q, k, v, causal=True)


@each_dtype
@each_usual
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
def test_windows(dtype, head_dims, options, lengths):
    q, k, v = inputs(
        3, dtype, batch=1, heads=2, lengths=lengths, head_dim=head_dims[0], head_dim_v=head_dims[1]
    )
    check(q, k, v, **options)


@each_dtype
@each_usual
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"scale": -0.2},
        {"scale": 0.0},
        {"softcap": 3.0},
        {"softcap": 50.0, "causal": True},
        {"softcap": 0.5, "scale": -0.4},
    ],
    ids=str,
)
def test_scores(dtype, head_dims, options):
    q, k, v = inputs(4, dtype, batch=1, lengths=(200, 290), head_dim=head_dims[0], head_dim_v=head_dims[1])
    check(q, k, v, **options)


@each_dtype
@pytest.mark.parametrize("scale", [4.0, -4.0])
def test_scores_far_from_zero(dtype, scale):
    q, k, v = inputs(5, dtype, batch=1, lengths=(150, 350))
    check(np.abs(q), np.abs(k), v, scale=scale)


@each_dtype
def test_maxima_that_rise_with_every_tile(dtype):
    # Keys are taken from the last to the first, so here every tile raises the maximum, and everything is rescaled.
    q, k, v = inputs(6, dtype, batch=1, heads=2, lengths=(150, 900))
    k[..., 0] = np.linspace(8, -8, 900)
    q[..., 0] = 4
    check(q, k, v)
    check(q, k[:, :, ::-1].copy(), v)


@each_dtype
@each_usual
@pytest.mark.parametrize("rise", [30, 250, 2000])
def test_scores_that_rise(dtype, head_dims, rise):
    # The maxima of the first tiles stay as long as they may: weights grow by 2**43, and beyond all numbers in some rows.
    q, k, v = inputs(
        31, dtype, batch=1, heads=3, lengths=(300, 900), head_dim=head_dims[0], head_dim_v=head_dims[1]
    )
    rising(q[:, 1:], k[:, 1:], rise)
    check(q, k, v)
    check(q, k, v, causal=True, softcap=200.0)


RISING_GROUPS = [
    cudistr.LSH(2),
    cudistr.LSH(4, representative="mean"),
    cudistr.LSH(2, representative="rank1"),
    cudistr.LSH(2, near=40, sinks=9),
]


@each_dtype
@pytest.mark.parametrize("reduction", RISING_GROUPS, ids=["G2", "G4-mean", "G2-rank1", "G2-near"])
@pytest.mark.parametrize("rise", [30, 250, 2000])
def test_scores_of_groups_that_rise(dtype, reduction, rise):
    q, k, v = inputs(33, dtype, batch=1, heads=3, lengths=(300, 900))
    rising(q[:, 1:], k[:, 1:], rise)
    check(q, k, v, reduction=reduction)


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_rows_whose_scores_rise_leave_the_others_as_they_are(dtype, head_dim, causal):
    q, k, v = inputs(32, dtype, batch=2, heads=4, lengths=(300, 900), head_dim=head_dim)
    rising(q, k, 250)
    wild = np.arange(300) % 97 == 90
    q[:, :, ~wild, 0] = 0.5
    q[:, 0, :, 0] = 0.5  # tiles of queries that are done once, between others that are done twice
    out = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v)), causal=causal))
    q[:, :, wild, 0] = 0.5
    calm = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v)), causal=causal))
    same_bits(out[:, :, ~wild], calm[:, :, ~wild])
    same_bits(out[:, 0], calm[:, 0])
    assert (out[:, 1:, wild] != calm[:, 1:, wild]).any(axis=-1).all()


@each_dtype
@each_usual
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1), (6, 3)], ids=str)
def test_grouped_query_attention(dtype, head_dims, heads):
    q, k, v = inputs(
        7,
        dtype,
        heads=heads[0],
        heads_kv=heads[1],
        lengths=(200, 250),
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
    )
    check(q, k, v, causal=True)


@pytest.mark.hardware
@each_dtype
def test_many_tiles(dtype):
    # More tiles than a GPU has multiprocessors, of different lengths: they are taken from a counter.
    q, k, v = inputs(8, dtype, batch=1, heads=20, heads_kv=4, lengths=(2000, 2100))
    check(q, k, v, causal=True)
    check(q[:, :, :700], k, v, window=(100, 40))
    check(q[:, :, :1500], k, v)


@each_dtype
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x not in ("shifted", "ragged", "reversed")])
def test_layouts(dtype, layout):
    q, k, v = inputs(9, dtype, heads_kv=2, lengths=(170, 290), head_dim=64, head_dim_v=48)
    expected = check(q, k, v)
    for layouts in (
        (layout,) * 3,
        (layout, "contiguous", "transposed"),
        ("contiguous", layout, "contiguous"),
    ):
        same_bits(check_kernel(q, k, v, layouts=layouts), expected)


@each_dtype
def test_zero_strides(dtype):
    host = inputs(10, dtype, batch=1, heads=1, lengths=(170, 290))
    q, k, v = (cp.broadcast_to(on_device(x), (2, 4, *x.shape[2:])) for x in host)
    whole = cudistr.attention(q, k, v)
    same_bits(whole, cudistr.attention(*(x.copy() for x in (q, k, v))))
    one_key = cp.broadcast_to(k[:, :, :1], k.shape)
    same_bits(cudistr.attention(q, one_key, v), cudistr.attention(q, one_key.copy(), v))


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "shifted", "ragged", "reversed"])
@pytest.mark.parametrize("head_dim_v", [48, 64])
def test_out(dtype, layout, head_dim_v):
    q, k, v = inputs(11, dtype, lengths=(170, 90), head_dim_v=head_dim_v)
    buffer, view = LAYOUTS[layout](np.zeros((2, 4, 170, head_dim_v), dtype))
    target = cp.asarray(buffer)
    out = view(target)
    check(q, k, v, out=out)
    # What lies between the rows of out is not touched.
    view(buffer)[...] = cp.asnumpy(out)
    same_bits(target, buffer)


@each_dtype
@each_usual
def test_rows_without_keys(dtype, head_dims):
    q, k, v = inputs(12, dtype, lengths=(600, 100), head_dim=head_dims[0], head_dim_v=head_dims[1])
    out = on_device(np.full((*q.shape[:3], v.shape[3]), np.nan, dtype))
    _, lse = cudistr.attention(*map(on_device, (q, k, v)), causal=True, out=out, return_lse=True)
    assert (cp.asnumpy(out)[:, :, :500].astype(np.float32) == 0).all()
    assert bool((lse[:, :, :500] == -np.inf).all()) and bool(cp.isfinite(lse[:, :, 500:]).all())
    check(q, k, v, causal=True)


@pytest.mark.small
@each_dtype
@each_usual
def test_heads_do_not_reach_into_each_other(dtype, head_dims):
    # What lies behind the last row of a head is the next head: tiles that stick out must not read it. Those without
    # numbers are done twice, between others.
    q, k, v = inputs(13, dtype, heads=4, lengths=(130, 140), head_dim=head_dims[0], head_dim_v=head_dims[1])
    clean = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
    for array in (q, k, v):
        array[:, 1::2] = np.nan
    out = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
    same_bits(out[:, ::2], clean[:, ::2])
    assert np.isnan(out[:, 1::2].astype(np.float32)).all()


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_go_where_arithmetic_sends_them(dtype, bad):
    q, k, v = inputs(14, dtype, lengths=(250, 250))
    k = np.abs(k)  # one sign, so that all scores of the row are inf, or all -inf
    clean = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v)), causal=True))
    spoilt = q.copy()
    spoilt[1, 2, 70, 5] = bad
    out, lse = (
        cp.asnumpy(x)
        for x in cudistr.attention(*map(on_device, (spoilt, k, v)), causal=True, return_lse=True)
    )
    row = out[1, 2, 70].astype(np.float32)
    if bad == -np.inf:
        assert (row == 0).all() and lse[1, 2, 70] == -np.inf
    else:
        assert np.isnan(row).all() and np.isnan(lse[1, 2, 70])
    others = np.ones(q.shape[:3], bool)
    others[1, 2, 70] = False
    same_bits(out[others], clean[others])

    spoilt = k.copy()
    spoilt[0, 0, 70, 5] = bad
    out = cp.asnumpy(cudistr.attention(*map(on_device, (q, spoilt, v)), causal=True))
    same_bits(out[0, 0, :70], clean[0, 0, :70])
    weightless = bad * q[0, 0, 70:, 5].astype(np.float32) == -np.inf
    np.testing.assert_array_equal(np.isnan(out[0, 0, 70:].astype(np.float32)).all(axis=1), ~weightless)

    if bad != -np.inf:
        whole = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
        spoilt = v.copy()
        spoilt[1, 2, 70, 5] = bad
        out = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, spoilt))))
        column = out[1, 2, :, 5].astype(np.float32)
        assert (np.isnan(column) if np.isnan(bad) else column == bad).all()
        out[1, 2, :, 5] = whole[1, 2, :, 5]
        same_bits(out, whole)


@each_dtype
def test_one_key_gives_its_value(dtype):
    q, k, v = inputs(15, dtype, lengths=(120, 200))
    same_bits(check(q, k, v, window=(0, 0)), v[:, :, 80:])


@each_dtype
def test_the_portable_kernel_gives_nearly_the_same(dtype, monkeypatch):
    arrays = [on_device(x) for x in inputs(16, dtype, lengths=(300, 400))]
    ours = cp.asnumpy(cudistr.attention(*arrays, causal=True)).astype(np.float32)
    monkeypatch.setenv("CUDISTR_KERNEL", "portable")
    other = cp.asnumpy(cudistr.attention(*arrays, causal=True)).astype(np.float32)
    assert np.abs(ours - other).max() <= 4 * ROUNDOFF[np.dtype(dtype)] * np.abs(other).max()


@pytest.mark.hardware
@each_dtype
@each_usual
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_same_bits_from_run_to_run(dtype, head_dims, causal):
    host = inputs(17, dtype, heads=16, lengths=(1900, 2000), head_dim=head_dims[0], head_dim_v=head_dims[1])
    arrays = [on_device(x) for x in host]
    first = cudistr.attention(*arrays, causal=causal).view(np.uint16)
    for _ in range(200):
        assert bool((cudistr.attention(*arrays, causal=causal).view(np.uint16) == first).all())


@pytest.mark.hardware
def test_a_captured_graph_keeps_its_counter():
    host = inputs(18, np.float16, heads=16, lengths=(1500, 1500))
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        q, k, v = (on_device(x) for x in host)
        expected = cp.asnumpy(cudistr.attention(q, k, v, causal=True))
        stream.begin_capture()
        result = cudistr.attention(q, k, v, causal=True)
        graph = stream.end_capture()
        others = []
        for _ in range(3):
            # What a pool hands out in between must not be the counter of the graph.
            others.append(cp.full(128, 7, np.int32))
            result.fill(0)
            graph.launch(stream)
        stream.synchronize()
        same_bits(result, expected)
        assert all(bool((x == 7).all()) for x in others)


# The sweep that runs under compute-sanitizer


@pytest.mark.small
@each_dtype
@each_usual
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (100, None)}], ids=["full", "masked"])
def test_small(dtype, head_dims, options):
    q, k, v = inputs(
        19,
        dtype,
        batch=1,
        heads=2,
        heads_kv=1,
        lengths=(201, 273),
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
    )
    check(q, k, v, on_host=True, **options)


@pytest.mark.small
@each_dtype
@pytest.mark.parametrize("reduction", [None, cudistr.LSH(2)], ids=["exact", "G2"])
def test_small_scores_that_rise(dtype, reduction):
    # Some tiles of queries are done twice.
    q, k, v = inputs(34, dtype, batch=1, heads=2, lengths=(201, 400))
    rising(q[:, 1:], k[:, 1:], 300)
    check(q, k, v, reduction=reduction)


def test_an_exact_head_beside_reduced_ones_has_the_bits_of_an_exact_call():
    # Here ranks do not change the tile; that of the portable kernel they do.
    q, k, v = inputs(62, np.float16, heads=4, heads_kv=2, lengths=(200, 230))
    projection = of_ranks(q, k, 16, 64)
    q, k, v = map(on_device, (q, k, v))
    found = cudistr.attention(q, k, v, causal=True, reduction=projection)
    same_bits(found[:, 2:], cudistr.attention(q, k, v, causal=True)[:, 2:])
