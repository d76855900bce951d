"""The measured error on the device: the same rows and, up to rounding, the same numbers as on the host."""

from __future__ import annotations

import numpy as np
import pytest

import cudistr
from tests.gpu.util import inputs, on_device
from tests.strategies import DTYPES

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(arrays, **options):
    found = cudistr.attention_error(*map(on_device, arrays), **options)
    expected = cudistr.attention_error(*arrays, **options)
    for one, other in (
        (found.output, expected.output),
        (found.scores, expected.scores),
        *zip(found.output_heads, expected.output_heads, strict=True),
        *zip(found.scores_heads, expected.scores_heads, strict=True),
    ):
        np.testing.assert_allclose(
            (one.value, one.low, one.high), (other.value, other.low, other.high), rtol=0.01
        )


@each_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 5), "softcap": 3.0}], ids=str)
def test_sampled_rows(dtype, options):
    arrays = inputs(31, dtype, heads_kv=2, lengths=(150, 170))
    check(arrays, reduction=cudistr.LSH(2, representative="mean"), **options)


@each_dtype
def test_all_rows(dtype):
    check(inputs(32, dtype, lengths=(40, 50)), reduction=cudistr.LSH(4), rows=1000)


@pytest.mark.parametrize(
    "reduction", [cudistr.LSH(2, representative="rank1"), cudistr.Energy(32, near=20, sinks=10)], ids=str
)
def test_weights_and_energy(reduction):
    check(inputs(34, np.float16, heads_kv=2, lengths=(150, 170)), causal=True, reduction=reduction)


def test_rounding_alone():
    report = cudistr.attention_error(*map(on_device, inputs(33, np.float16)))
    assert report.output.low > 1e-5 and report.output.high < 2**-10 and report.scores.value == 0
