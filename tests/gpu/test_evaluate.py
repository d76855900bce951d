"""The times of an evaluation on the device: from Python, and of the same calls as a graph."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import cudistr
from cudistr.demo.measure import choose_device
from cudistr.evaluate import measure
from tests.gpu.util import inputs, on_device

pytestmark = [pytest.mark.gpu, pytest.mark.hardware]


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
