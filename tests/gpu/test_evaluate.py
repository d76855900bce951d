"""An evaluation on the device: the times of calls from Python and of a graph, and exact attention rounded to FP8."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import cudistr
from cudistr.demo.measure import choose_device
from cudistr.evaluate import measure, rivals
from tests.gpu.util import cp, inputs, on_device

pytestmark = pytest.mark.gpu


@pytest.mark.hardware
@pytest.mark.parametrize("reduction", [None, cudistr.LSH(2, near=40, sinks=8), cudistr.Energy(32)], ids=str)
def test_every_method_is_captured(reduction):
    layers = [tuple(on_device(x) for x in inputs(seed, np.float16)) for seed in (1, 2)]

    def attention(layer, q, k, v):
        return cudistr.attention(q, k, v, causal=True, reduction=reduction)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure._graph_milliseconds("x", layers, attention, choose_device("gpu"))
    assert found is not None
    assert found > 0


@pytest.mark.small
@pytest.mark.parametrize("causal", [False, True])
def test_fp8_is_that_of_numpy(causal):
    arrays = [x[:1] for x in inputs(3, np.float16, lengths=(113, 113))]
    found = rivals.fp8(*map(on_device, arrays), cp, causal=causal).get()
    wanted = rivals.fp8(*arrays, np, causal=causal)
    # A number next to a tie may be rounded the other way.
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)
