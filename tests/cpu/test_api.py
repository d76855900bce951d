"""The public functions on NumPy arrays: the reference, rounded to the input's dtype. Docstring examples run."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest
from hypothesis import given

import cudistr
from cudistr import reference
from tests.strategies import DTYPES, cases, random


@given(cases())
def test_attention_is_the_reference_rounded(case):
    out, lse = cudistr.attention(*case.arrays, **case.options, return_lse=True)
    exact, exact_lse = reference.attention(*case.arrays, **case.options, return_lse=True)
    assert type(out) is np.ndarray and out.dtype == case.q.dtype and lse.dtype == np.float32
    np.testing.assert_array_equal(out, exact.astype(case.q.dtype))
    np.testing.assert_array_equal(lse, exact_lse.astype(np.float32))
    np.testing.assert_array_equal(cudistr.attention(*case.arrays, **case.options), out)


@given(cases())
def test_inputs_are_left_alone(case):
    before = [x.copy() for x in case.arrays]
    cudistr.attention(*case.arrays, **case.options)
    for one, other in zip(case.arrays, before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_group_and_merge_are_the_reference(dtype):
    q, k, v = (random(seed, 2, 2, 150, 32, dtype=dtype) for seed in range(3))
    reduction = cudistr.LSH(2, block_q=64)
    np.testing.assert_array_equal(cudistr.group(q, reduction), reference.group(q, reduction))
    shards = [
        cudistr.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in ((0, 40), (40, 150))
    ]
    outs, lses = zip(*shards, strict=True)
    out, lse = cudistr.merge(outs, lses, return_lse=True)
    assert out.dtype == dtype and lse.dtype == np.float32
    exact, exact_lse = reference.merge(outs, lses, return_lse=True)
    np.testing.assert_array_equal(out, exact.astype(dtype))
    np.testing.assert_array_equal(lse, exact_lse.astype(np.float32))
    np.testing.assert_array_equal(cudistr.merge(outs, lses), out)


def test_out_is_written_and_returned():
    q, k, v = (random(seed, 1, 2, 9, 16) for seed in range(3))
    expected, expected_lse = cudistr.attention(q, k, v, return_lse=True)
    out = np.full_like(q, np.nan)
    result, lse = cudistr.attention(q, k, v, out=out, return_lse=True)
    assert result is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    wide = np.empty(q.shape)
    assert reference.attention(q, k, v, out=wide) is wide
    np.testing.assert_array_equal(wide, reference.attention(q, k, v))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 0, 0, 0)], ids=str
)
@pytest.mark.parametrize("reduction", [None, cudistr.LSH(2)])
def test_empty_axes(shape, reduction):
    batch, heads, seqlen_q, seqlen_k = shape
    q = np.ones((batch, heads, seqlen_q, 16), np.float16)
    k = np.ones((batch, heads, seqlen_k, 16), np.float16)
    out, lse = cudistr.attention(q, k, k, reduction=reduction, return_lse=True)
    assert out.shape == q.shape and out.dtype == np.float16 and (out == 0).all()
    assert lse.shape == q.shape[:3] and (lse == -np.inf).all()
    merged, total = cudistr.merge([out, out], [lse, lse], return_lse=True)
    assert merged.shape == q.shape and (merged == 0).all() and (total == -np.inf).all()


def test_options_are_keywords():
    x = np.ones((1, 1, 2, 8), np.float32)
    with pytest.raises(TypeError, match="positional argument"):
        cudistr.attention(x, x, x, None)


def test_public_names_exist_and_are_documented():
    for name in cudistr.__all__:
        assert hasattr(cudistr, name)
        if not name.startswith("__"):
            assert getattr(cudistr, name).__doc__


@pytest.mark.parametrize(
    "module", ["cudistr.api", "cudistr.projection", "cudistr.distributed.schedule", "cudistr.reductions"]
)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0 and result.failed == 0
