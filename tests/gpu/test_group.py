"""The grouping kernel gives the same bits as the NumPy reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cudistr
from cudistr import launch, reference
from tests.gpu.util import cp, on_device, same_bits
from tests.strategies import BFLOAT16, DTYPES, LAYOUTS, lost_sums, near_ties, random

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(q, reduction, layout="contiguous"):
    result = cudistr.group(on_device(q, layout), reduction)
    assert type(result) is cp.ndarray
    same_bits(result, reference.group(q, reduction))


@each_dtype
@pytest.mark.parametrize("head_dim", [8, 16, 40, 64, 72, 96, 128, 160, 256])
def test_head_dims(dtype, head_dim):
    check(random(head_dim, 2, 3, 300, head_dim, dtype=dtype), cudistr.LSH(1))


@each_dtype
@pytest.mark.parametrize("seqlen_q", [1, 2, 31, 63, 64, 65, 127, 128, 129, 192, 500])
@pytest.mark.parametrize("block_q", [64, 128, 192, 1024])
def test_short_last_blocks(dtype, seqlen_q, block_q):
    check(random(seqlen_q, 1, 2, seqlen_q, 64, dtype=dtype), cudistr.LSH(2, block_q=block_q))


@each_dtype
@pytest.mark.parametrize("n_proj", range(1, 17))
def test_number_of_projections(dtype, n_proj):
    check(random(n_proj, 1, 2, 200, 64, dtype=dtype), cudistr.LSH(2, n_proj=n_proj, seed=n_proj))


@pytest.mark.parametrize("seed", range(20))
def test_seeds(seed):
    check(random(seed, 2, 4, 256, 64, spread=10.0**seed / 1e10), cudistr.LSH(2, seed=seed))


@pytest.mark.parametrize(("rows", "block_q"), [(64, 64), (50, 64), (128, 128), (113, 128), (256, 256)])
@pytest.mark.parametrize("n_proj", [16, 5])
def test_sums_that_nearly_cancel(rows, block_q, n_proj):
    # One order of summation, and no fused multiply-add: anything else shows here.
    reduction = cudistr.LSH(2, block_q=block_q, n_proj=n_proj)
    q = np.stack([near_ties(seed, rows, 128, reduction) for seed in range(4)])[None]
    check(q, reduction)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize(("rows", "block_q"), [(64, 64), (50, 64), (128, 128), (333, 384)])
@pytest.mark.parametrize("n_proj", [16, 5])
@pytest.mark.parametrize("head_dim", [24, 128])
def test_sums_that_float32_loses(dtype, rows, block_q, n_proj, head_dim):
    # Matrix instructions may find these positive.
    reduction = cudistr.LSH(1, block_q=block_q, n_proj=n_proj)
    lost = np.stack([lost_sums(seed, rows, head_dim, reduction, dtype) for seed in range(3)])
    q = random(rows, 1, 4, rows, head_dim, dtype=dtype)
    q[0, :3] = lost
    q[0, 3, :, ::3] = lost[0, :, ::3]
    check(q, reduction)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
def test_the_smallest_and_largest_numbers(dtype):
    numbers = ml_dtypes.finfo(dtype)
    q = random(1, 1, 4, 130, 64)
    q[0, 0] = np.sign(q[0, 0]) * float(numbers.smallest_subnormal)
    q[0, 1] *= float(numbers.smallest_normal)
    q[0, 2] = np.clip(q[0, 2] / 3, -1, 1) * float(numbers.max)  # products overflow, and sums
    q[0, 3] *= 2.0 ** np.linspace(-120, 120, 64)
    with np.errstate(over="ignore"):
        q = q.astype(dtype)
        check(q, cudistr.LSH(2))


@each_dtype
def test_zeros_ties_and_what_is_not_a_number(dtype):
    q = random(1, 1, 8, 130, 64, dtype=dtype)
    q[0, 0] = 0
    q[0, 1, :, ::2] = 0
    q[0, 2, :, 1::2] *= -0.0
    q[0, 3, 5, 7] = q[0, 3, 129, 9] = np.nan
    q[0, 4, 5, 7] = np.inf
    q[0, 4, 6, 7] = -np.inf
    q[0, 5, :, :] = q[0, 5, :, :1]  # all columns alike
    q[0, 6] = np.repeat(q[0, 6, :, :16], 4, axis=1)  # runs of alike columns
    q[0, 7, :64] = -np.inf
    check(q, cudistr.LSH(2))
    permutations = cp.asnumpy(cudistr.group(on_device(q), cudistr.LSH(2)))
    for head in (0, 5):  # nothing to tell columns apart by: the stable sort leaves them as they are
        np.testing.assert_array_equal(permutations[0, head, 0], np.arange(64))


@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "group_size", "options"),
    [(64, 2, {"n_proj": 5}), (96, 3, {"block_q": 64}), (56, 7, {}), (128, 8, {"block_q": 64}), (256, 32, {})],
    ids=str,
)
def test_weights(dtype, head_dim, group_size, options):
    reduction = cudistr.LSH(group_size, representative="rank1", sinks=7, **options)
    q = random(head_dim, 1, 3, 200, head_dim, dtype=dtype)
    q[0, 1] = np.repeat(q[0, 1, :, :1], head_dim, axis=1) * (random(1, head_dim) > 0)  # multiples, and zeros
    q[0, 2, 5, 7] = np.nan
    k = random(head_dim + 1, 1, 1, 300, head_dim, dtype=dtype)
    k = (k.astype(np.float32) * np.exp2(np.arange(head_dim) % 9)).astype(dtype)
    k[0, 0, 7:, :3] = k[0, 0, :1, :3]  # does not vary
    k[0, 0, 100, 40] = np.inf
    arrays = on_device(q), on_device(k)
    found = launch.columns(*arrays, reduction, None)
    for one, other in zip(found, reference.solve_columns(q, reduction, k), strict=True):
        same_bits(one, other)
    same_bits(cudistr.group(arrays[0], reduction, arrays[1]), found[0])


@each_dtype
@pytest.mark.parametrize(
    ("head_dim", "seqlen_q", "seqlen_k"), [(16, 1, 1), (40, 200, 256), (64, 130, 700), (256, 70, 300)]
)
def test_energy(dtype, head_dim, seqlen_q, seqlen_k):
    reduction = cudistr.Energy(16, sinks=40, block_q=64)
    q = random(1, 2, 4, seqlen_q, head_dim, dtype=dtype)
    k = random(2, 2, 2, seqlen_k, head_dim, dtype=dtype, spread=3.0)
    k[1, 0, -1, 3] = np.nan
    k[1, 1] = k[1, 1, :, :1]
    arrays = on_device(q, "transposed"), on_device(k, "ragged")
    found = launch.columns(*arrays, reduction, None)
    for one, other in zip(found, reference.solve_columns(q, reduction, k), strict=True):
        same_bits(one, other)
    same_bits(cudistr.group(arrays[0], reduction, arrays[1]), found[0])


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    check(random(2, 2, 3, 150, 64, dtype=dtype), cudistr.LSH(4), layout)


@pytest.mark.hardware
def test_more_blocks_than_a_grid_axis_holds():
    q = random(3, 1, 5, 65, 16, dtype=np.float16)
    reduction = cudistr.LSH(2, block_q=64)
    many = cudistr.group(on_device(np.tile(q, (20, 1000, 1, 1))), reduction)
    expected = np.broadcast_to(reference.group(q, reduction), (20000, 5, 2, 16))
    same_bits(many.reshape(20000, 5, 2, 16), expected)


@pytest.mark.small
@each_dtype
def test_small(dtype):
    check(random(4, 1, 2, 261, 64, dtype=dtype), cudistr.LSH(2))
    check(random(4, 1, 2, 70, 8, dtype=dtype), cudistr.LSH(1), "ragged")
