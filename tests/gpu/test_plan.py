"""What a call says that it does, beside what it does; and exact attention where a reduction is slower."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cudistr
from cudistr import LSH, Energy, LowRank, Projection, compiler, launch
from tests.gpu.util import cp, inputs, on_device, same_bits
from tests.strategies import random

pytestmark = pytest.mark.gpu

REDUCTIONS = {
    "exact": None,
    "LSH": LSH(2),
    "mean of four": LSH(4, representative="mean"),
    "near": LSH(2, near=70, sinks=8),
    "all near": LSH(2, near=500),
    "rank1": LSH(2, representative="rank1"),
    "rank1, near": LSH(2, representative="rank1", near=70, sinks=8),
    "Energy": Energy(16, near=0, sinks=0),
    "Energy, near": Energy(16, near=70, sinks=8),
    "low rank": LowRank(16),
    "low rank, near": LowRank(16, near=70, sinks=8),
    "projection": "rank 16",
    "projection, near": "rank 16, near",
    "projection, all near": "rank 16, all near",
    "tolerance": "near, tolerance",
}


def arguments(kind, dtype, lengths=(150, 170)):
    """Arrays on the device, and what is asked for."""
    host = inputs(3, dtype, lengths=lengths, head_dim=32)
    given = [on_device(x) for x in host]
    reduction = REDUCTIONS[kind]
    if not isinstance(reduction, str):
        return given, {"reduction": reduction, "causal": True}
    projection = Projection.fit(*host[:2], rank=16)
    if "near" in reduction:
        projection = projection.with_near(500 if "all" in reduction else 70, sinks=8)
    options = {"reduction": projection, "causal": True}
    return given, options | ({"tolerance": 0.99} if "tolerance" in reduction else {})


def test_blocks_of_exact_keys_are_told(whole_blocks):
    given, options = arguments("projection, near", np.float16)
    assert "whole blocks of 384 queries and 128 keys" in str(cudistr.attention_plan(*given, **options))
    given, options = arguments("projection", np.float16)
    assert "blocks of" not in str(cudistr.attention_plan(*given, **options)).splitlines()[0]


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("family", ["portable", "hopper"])
def test_kernels_are_those_that_run(kind, family, monkeypatch):
    monkeypatch.setenv("CUDISTR_KERNEL", family)
    given, options = arguments(kind, np.float16)
    plan = cudistr.attention_plan(*given, **options, exact_if_faster=False)
    ran = []
    launched = launch._Launch.__call__

    def told(self, *addresses):
        ran.append(next(k.name for (k, _), f in compiler._functions.items() if f.ptr == self.function.ptr))
        launched(self, *addresses)

    monkeypatch.setattr(launch._Launch, "__call__", told)
    cudistr.attention(*given, **options, exact_if_faster=False)
    assert tuple(ran) == plan.kernels
    assert len(plan.tiles) == sum("flash_fwd" in name for name in ran)
    assert plan.reduction == options["reduction"]


@pytest.mark.parametrize("kind", ["LSH", "near", "rank1", "Energy", "projection", "tolerance"])
def test_exact_if_faster(kind):
    # So few keys are too few for any reduction of 16-bit numbers. On normal data each loses far more than rounding does.
    rounding = 2e-3  # above float16's 2^-11
    given, options = arguments(kind, np.float16)
    exact = cudistr.attention(*given, causal=True, return_lse=True)
    found = cudistr.attention(*given, **options, exact_if_faster=True, return_lse=True)
    for one, like in zip(found, exact, strict=True):
        same_bits(one, like)
    plan = cudistr.attention_plan(*given, **options, exact_if_faster=True)
    assert plan.reduction is None and "because it is faster" in plan.reason
    report = cudistr.attention_error(*given, **options, exact_if_faster=True)
    assert report.output.value < rounding
    asked = cudistr.attention_plan(*given, **options, exact_if_faster=False)
    assert asked.reduction == options["reduction"] and "exact_if_faster=True takes it" in asked.reason
    report = cudistr.attention_error(*given, **options, exact_if_faster=False)
    assert report.output.value > 10 * rounding
    # Left open, it is allowed with a tolerance alone.
    left = cudistr.attention_plan(*given, **options)
    assert (left.reduction is None) == ("tolerance" in options)
    found = cudistr.attention(*given, **options)
    assert (cp.asnumpy(found) == cp.asnumpy(exact[0])).all() == ("tolerance" in options)


def test_a_tolerance_that_is_exact_says_so():
    given, options = arguments("tolerance", np.float16)
    report = cudistr.attention_error(*given, **options)
    assert {r for entry in report.ranks for r in entry} == {32}


def test_a_plan_has_the_heads_that_the_fit_knows_to_be_worse():
    given, options = arguments("tolerance", np.float16)
    known = np.linspace(0.0, 2.0, options["reduction"].heads_kv)[:, None] * np.ones(3)
    options["reduction"] = dataclasses.replace(options["reduction"], output_errors=known, row_errors=known)
    plan = cudistr.attention_plan(*given, **options, exact_if_faster=False)
    assert plan.reduction.ranks == tuple(16 if error <= 0.99 else 32 for error in known[:, 0])
    assert set(plan.reduction.ranks) == {16, 32}


def test_enough_keys_are_reduced():
    # float32 products take longest.
    given, options = arguments("LSH", np.float32, lengths=(1200, 1200))
    plan = cudistr.attention_plan(*given, **options, exact_if_faster=True)
    assert plan.reduction == LSH(2) and "as asked for: a query sees" in plan.reason
    found = cudistr.attention(*given, **options, exact_if_faster=True)
    same_bits(found, cudistr.attention(*given, **options))


@pytest.mark.parametrize("family", ["portable", "hopper"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_tolerance_alone(family, causal, monkeypatch):
    monkeypatch.setenv("CUDISTR_KERNEL", family)
    given = [on_device(x) for x in inputs(3, np.float16, lengths=(400, 400), head_dim=32)]
    options = {"causal": causal, "tolerance": 0.99}
    picked = LowRank(16, near=256, sinks=64) if causal else LowRank(16)
    plan = cudistr.attention_plan(*given, **options, exact_if_faster=False)
    assert plan.reduction == picked and "picked for the tolerance: a query sees" in plan.reason
    assert (
        plan.kernels
        == cudistr.attention_plan(*given, **options, reduction=picked, exact_if_faster=False).kernels
    )
    found, asked = (
        cudistr.attention(*given, **options, reduction=x, exact_if_faster=False, return_lse=True)
        for x in (None, picked)
    )
    for one, like in zip(found, asked, strict=True):
        same_bits(one, like)
    report = cudistr.attention_error(*given, **options, exact_if_faster=False)
    rounding = 2e-3  # above float16's 2^-11
    assert 16 in {r for entry in report.ranks for r in entry} and report.output.value > 5 * rounding
    # So few keys are too few.
    plan = cudistr.attention_plan(*given, **options)
    assert plan.reduction is None and "would not be sure to save time: a query sees" in plan.reason
    same_bits(cudistr.attention(*given, **options), cudistr.attention(*given, causal=causal))
    report = cudistr.attention_error(*given, **options)
    assert {r for entry in report.ranks for r in entry} == {32} and report.output.value < rounding


def test_plan_of_nothing():
    q = on_device(random(0, 1, 2, 0, 32))
    k = on_device(random(0, 1, 2, 8, 32))
    plan = cudistr.attention_plan(q, k, k, reduction=LSH(2))
    assert plan.kernels == plan.tiles == () and "nothing to compute" in str(plan)


def test_plan_refuses_what_a_call_refuses():
    given, options = arguments("LSH", np.float16)
    for call in (cudistr.attention, cudistr.attention_plan, cudistr.attention_error):
        with pytest.raises(TypeError, match="exact_if_faster must be True, False or None, got int 1"):
            call(*given, **options, exact_if_faster=1)
        with pytest.raises(TypeError, match="tolerance is for a reduction that is a cudistr.LowRank or"):
            call(*given, **options, tolerance=0.5)
