"""From how many keys on a reduction is worth it: the table is that of the records, and is read as it says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import cudistr
from cudistr import normalize
from cudistr.plan import Device
from cudistr.tuned import Kept
from cudistr.worth import BREAK_EVEN, COLUMNS, METHODS, Worth, faster_from, kind_of, rounded, worth
from tests.cpu.test_records import make_tables

HOPPER, AMPERE = Device(90, 227 * 1024), Device(86, 99 * 1024)


def problem(n, dtype=np.float16, head_dim=128, reduction=None, **options):
    keys = options.pop("keys", n)
    shapes = ((1, 1, x, head_dim) for x in (n, keys, keys))
    q, k, v = (np.lib.stride_tricks.as_strided(np.zeros(8, dtype), x, (0, 0, 0, 2)) for x in shapes)
    strides = ((n * head_dim, n * head_dim, head_dim),) * 3
    found = normalize.problem(q, k, v, reduction=reduction or cudistr.LSH(2), **options)
    names = ("q_strides", "k_strides", "v_strides")
    return dataclasses.replace(found, aligned=True, device=0, **dict(zip(names, strides, strict=True)))


def test_the_table_is_that_of_the_records():
    assert make_tables.break_even() == BREAK_EVEN


@pytest.mark.parametrize(
    ("exact", "reduced", "keys"),
    [((1.0, 4.0), (1.5, 3.5), 10.0), ((1.0, 4.0), (1.5, 4.6), math.inf), ((1.0, 4.0), (0.5, 2.0), 0.0)],
)
def test_where_two_lines_meet(exact, reduced, keys):
    times = [dict(zip((4, 16), x, strict=True)) for x in (exact, reduced)]
    assert faster_from(*times, causal=False) == pytest.approx(keys)
    assert faster_from(*times, causal=True) == pytest.approx(keys / 2)


def test_keys_that_a_query_sees():
    assert worth(problem(1000), HOPPER, 0, False).keys == 1000
    assert worth(problem(1001, causal=True), HOPPER, 0, False).keys == 501
    assert worth(problem(5000, window=(9, 0)), HOPPER, 0, False).keys == pytest.approx(10, abs=0.1)
    assert worth(problem(4, keys=2, causal=True), HOPPER, 0, False).keys == 0.75  # the first two see none
    # More rows than are looked at.
    assert worth(problem(20001, causal=True), HOPPER, 0, False).keys == pytest.approx(10001, rel=1e-3)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "column"),
    [
        (HOPPER, np.float16, 64, ("hopper", 64)),
        (HOPPER, np.float16, 128, ("hopper", 128)),
        (HOPPER, np.float16, 40, ("portable", 64)),
        (AMPERE, np.float16, 256, ("portable", 128)),
        (HOPPER, np.float32, 32, ("float32", 64)),
    ],
)
def test_the_kernel_of_exact_attention_decides(device, dtype, head_dim, column):
    least = BREAK_EVEN["lsh4", False, False][COLUMNS.index(column)]
    reduction = cudistr.LSH(5 if head_dim == 40 else 4)
    found = worth(problem(3000, dtype, head_dim, reduction), device, 0, False)
    assert found == Worth(3000, least) and found.exact_is_faster == (least > 3000)


def test_the_portable_kernel_is_never_faster_than_exact_attention_on_hopper():
    blocks = cudistr.LSH(4, block_q=64)  # which the Hopper kernel does not have
    assert worth(problem(50000, reduction=blocks), HOPPER, 0, False).least == math.inf
    kept = cudistr.LSH(2, block_q=64, near=256, sinks=64)
    assert worth(problem(50000, reduction=kept), HOPPER, 0, False).least == math.inf
    assert worth(problem(50000, reduction=blocks), AMPERE, 0, False).least < 50000


def test_few_queries_pay_more():
    many, few = (worth(problem(n, keys=16384), HOPPER, 0, False) for n in (16384, 1024))
    assert few.least == 16 * many.least and few.keys == many.keys


def test_columns_of_a_projection():
    rank = dataclasses.replace(problem(9000, reduction=None), reduction=None, rank=64)
    half, quarter, most, all_of_them = (worth(rank, HOPPER, x, False).least for x in (64, 32, 96, 128))
    assert half == BREAK_EVEN["half", False, False][1] and quarter == BREAK_EVEN["quarter", False, False][1]
    assert most == 2 * half and all_of_them == math.inf
    assert worth(rank, HOPPER, 48, False).least == half


def test_what_was_not_measured_is_not_refused():
    # A bound is known: from how many keys on groups of four are faster without exact keys.
    kept, column = cudistr.LSH(4, near=1), COLUMNS.index(("float32", 64))
    bound = int(BREAK_EVEN["lsh4", False, False][column])
    assert BREAK_EVEN["lsh4", True, False][column] is None and bound > 1
    few, many = (problem(n, np.float32, head_dim=64, reduction=kept) for n in (bound - 1, 9000))
    assert worth(few, HOPPER, 0, False).exact_is_faster
    unknown = worth(many, HOPPER, 0, False)
    assert unknown.least is None and not unknown.exact_is_faster and "was not measured" in str(unknown)


def test_a_sentence():
    assert str(Worth(100.0, 4700.0)).endswith(
        "100 keys on average; it is faster than exact attention from about 4700 on (measured on an NVIDIA H200)"
    )
    assert str(Worth(100.0, math.inf, True)).endswith(
        "not faster than exact attention for any number of them (measured on this GPU)"
    )
    assert str(Worth(100.0, 0.0, True)).endswith(
        "is faster than exact attention for any number of them (measured on this GPU)"
    )


def test_what_was_measured_here_takes_the_place_of_the_table():
    kept = cudistr.LSH(2, near=256, sinks=64)
    column = ("hopper", 128)
    measured = Kept(
        (
            (("lsh2", False, False), column, 50.0),
            (("lsh2", False, False), ("portable", 128), 70.0),
            (("lsh4", False, False), column, math.inf),
        )
    )
    assert worth(problem(3000), HOPPER, 0, False, measured) == Worth(3000, 50.0, True)
    assert worth(problem(3000), AMPERE, 0, False, measured) == Worth(3000, 70.0, True)
    assert worth(problem(3000, reduction=cudistr.LSH(4)), HOPPER, 0, False, measured).least == math.inf
    # What was not measured here is that of the table, and so is what comes on top of it.
    table = BREAK_EVEN["lsh2", True, False][COLUMNS.index(column)]
    assert worth(problem(30000, reduction=kept), HOPPER, 0, False, measured) == Worth(30000, table, True)
    other = cudistr.LSH(2, representative="rank1")
    assert worth(problem(3000, reduction=other), HOPPER, 0, False, measured).here is False


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_kind_has_a_method(head_dim):
    kinds = [kind_of(x.format(half=head_dim // 2, quarter=head_dim // 4), head_dim) for x in METHODS]
    assert kinds == list(BREAK_EVEN)
    assert (
        kind_of("exact", head_dim) is kind_of("lsh8", head_dim) is kind_of("projection:48", head_dim) is None
    )


@pytest.mark.parametrize(
    ("keys", "found"), [(0.0, 0.0), (7.2, 8.0), (123.0, 130.0), (6543.0, 6600.0), (math.inf, math.inf)]
)
def test_two_digits(keys, found):
    assert rounded(keys) == found


def test_plans_of_numpy_arrays():
    q = np.zeros((1, 2, 64, 32), np.float32)
    plan = cudistr.attention_plan(q, q, q, reduction=cudistr.LSH(2), exact_if_faster=True)
    assert plan.reduction == cudistr.LSH(2) and "NumPy" in plan.reason and plan.kernels == ()
    found = cudistr.attention(q, q, q, reduction=cudistr.LSH(2), exact_if_faster=True)
    np.testing.assert_array_equal(found, cudistr.attention(q, q, q, reduction=cudistr.LSH(2)))
