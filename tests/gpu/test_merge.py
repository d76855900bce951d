"""The merge kernel against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

import cudistr
from cudistr import launch, reference
from tests.gpu.util import compare, compare_lse, cp, on_device, same_bits
from tests.strategies import DTYPES, LAYOUTS, random

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def shards(count, dtype, shape=(2, 3, 50, 40), spread=3.0):
    outs = [random(seed, *shape, dtype=dtype) for seed in range(count)]
    lses = [random(100 + seed, *shape[:3], spread=spread) for seed in range(count)]
    return outs, lses


def baseline(outs, lses):
    """The formula in float32, rounded to the dtype: ``sum_s exp(lse_s - lse) out_s``."""
    logs = np.stack(lses)
    top = logs.max(axis=0)
    top = np.where(top == -np.inf, np.float32(0), top)
    weights = np.exp(logs - top)
    total = weights.sum(axis=0)
    safe = np.where(total > 0, total, np.float32(1))
    out = (weights[..., None] * np.stack([x.astype(np.float32) for x in outs])).sum(axis=0) / safe[..., None]
    lse = np.where(total > 0, top + np.log(safe), np.float32(-np.inf))
    return out.astype(outs[0].dtype).astype(np.float64), lse


def check(outs, lses, layout="contiguous"):
    # lse has three axes; the layouts are for four
    device_lses = [on_device(x[..., None], layout)[..., 0] for x in lses]
    out, lse = cudistr.merge([on_device(x, layout) for x in outs], device_lses, return_lse=True)
    assert type(out) is cp.ndarray and out.dtype == outs[0].dtype and out.shape == outs[0].shape
    exact, exact_lse = reference.merge(outs, lses, return_lse=True)
    base, base_lse = baseline(outs, lses)
    compare(out, exact, base)
    compare_lse(lse, exact_lse, base_lse)
    same_bits(out, cudistr.merge([on_device(x) for x in outs], [on_device(x) for x in lses]))
    return out, lse


@each_dtype
@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
def test_counts(dtype, count):
    check(*shards(count, dtype))


@each_dtype
@pytest.mark.parametrize("head_dim_v", [8, 24, 64, 72, 128, 256])
def test_head_dims(dtype, head_dim_v):
    check(*shards(3, dtype, shape=(1, 2, 33, head_dim_v)))


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    check(*shards(3, dtype), layout)


def test_one_shard_is_itself():
    outs, lses = shards(1, np.float32)
    out, lse = check(outs, lses)
    same_bits(out, outs[0])
    same_bits(lse, lses[0])


@each_dtype
def test_shards_without_keys(dtype):
    outs, lses = shards(3, dtype)
    for out, lse, rows in zip(outs, lses, (slice(0, 30), slice(10, 40), slice(20, 50)), strict=True):
        out[:, :, rows], lse[:, :, rows] = 0, -np.inf
    out, lse = check(outs, lses)  # rows 20 to 29 have no key anywhere
    assert (cp.asnumpy(out)[:, :, 20:30].astype(np.float32) == 0).all()
    assert bool((lse[:, :, 20:30] == -np.inf).all()) and bool(cp.isfinite(lse[:, :, :20]).all())


@each_dtype
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_lse_does_not_overflow(dtype, shift):
    outs, lses = shards(3, dtype)
    check(outs, [x + np.float32(shift) for x in lses])


def test_nan_stays_in_its_row():
    outs, lses = shards(3, np.float32)
    clean = cp.asnumpy(check(outs, lses)[0])
    lses[1][0, 1, 7] = np.nan
    out = cp.asnumpy(cudistr.merge([on_device(x) for x in outs], [cp.asarray(x) for x in lses]))
    assert np.isnan(out[0, 1, 7]).all()
    out[0, 1, 7] = clean[0, 1, 7]
    same_bits(out, clean)


def check_merge_shard(dtype, found, out, shape, rows):
    """Some queries' part, taken into what was found so far, in place if dtypes let it."""
    part_shape = (*shape[:2], rows[1] - rows[0], shape[3])
    before, part = random(1, *shape, dtype=found), random(2, *part_shape, dtype=dtype)
    lses = [random(3, *shape[:3], spread=3.0), random(4, *part_shape[:3], spread=3.0)]
    lses[0][:, :, :5] = lses[1][:, :, :1] = -np.inf  # no keys so far, and none in the part
    before[:, :, :5], part[:, :, :1] = 0, 0
    array, lse = on_device(before), cp.asarray(lses[0])
    given = on_device(part), cp.asarray(lses[1])
    result = launch.merge_shard(array, lse, rows, *given, out)
    assert result.dtype == out and (result is array) == (found == out)

    widened, widened_lse = np.zeros(shape, dtype), np.full(shape[:3], -np.inf, np.float32)
    widened[:, :, slice(*rows)], widened_lse[:, :, slice(*rows)] = part, lses[1]
    exact, exact_lse = reference.solve_merge([before, widened], [lses[0], widened_lse])
    base, base_lse = baseline([before.astype(np.float32), widened.astype(np.float32)], [lses[0], widened_lse])
    compare(result, exact, base.astype(out).astype(np.float64))
    compare_lse(lse, exact_lse, base_lse)
    away = [i for i in range(shape[2]) if not rows[0] <= i < rows[1]]
    same_bits(cp.asnumpy(result)[:, :, away], before[:, :, away].astype(out))
    same_bits(cp.asnumpy(lse)[:, :, away], lses[0][:, :, away])


@each_dtype
@pytest.mark.parametrize("steps", ["first", "middle", "last", "only"])
@pytest.mark.parametrize("rows", [(0, 50), (17, 43), (49, 50)])
def test_a_shard_of_some_queries(dtype, steps, rows):
    found = np.float32 if steps in ("middle", "last") else dtype
    out = np.float32 if steps in ("first", "middle") else dtype
    check_merge_shard(np.dtype(dtype), np.dtype(found), np.dtype(out), (2, 3, 50, 40), rows)


@pytest.mark.parametrize("head_dim_v", [1, 6, 8, 16, 30, 64, 72, 128, 256])
def test_head_dims_of_a_shard(head_dim_v):
    half, full = np.dtype(np.float16), np.dtype(np.float32)
    check_merge_shard(half, half, full, (1, 2, 33, head_dim_v), (3, 30))


@pytest.mark.small
@each_dtype
def test_small(dtype):
    check(*shards(3, dtype, shape=(1, 2, 33, 40)))
    check_merge_shard(np.dtype(dtype), np.dtype(dtype), np.dtype(np.float32), (1, 2, 33, 40), (3, 30))
