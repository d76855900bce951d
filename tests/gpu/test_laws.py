"""The laws and the output certificate of the method, on the kernels. Few kernels, many inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cudistr
from cudistr import reference
from tests.gpu.util import (
    ROUNDOFF,
    allowed,
    baseline,
    check_kernel,
    compare,
    compare_lse,
    cp,
    mask,
    on_device,
    same_bits,
)
from tests.strategies import Case, cases, expanded, naive_scores, random, seeds

pytestmark = pytest.mark.gpu

# One shape of head and two reductions bound the number of kernels; every example is the same in every run.
laws = settings(max_examples=40, derandomize=True)
methods = st.sampled_from([None, cudistr.LSH(2), cudistr.LSH(2, block_q=64, seed=1)])
reduced = st.sampled_from(
    [cudistr.LSH(2), cudistr.LSH(4, block_q=64, seed=1), cudistr.LSH(2, representative="rank1")]
)


def drawn(**changes) -> st.SearchStrategy[Case]:
    """Cases for the kernels, up to some three tiles in each direction."""
    given = dict(head_dims=(64,), head_dims_v=(64,), methods=methods, max_seqlen=300, min_rows=128)
    return cases(**(given | changes))


def run(case: Case, **changes):
    """out and lse on the host; out in float64."""
    arrays = [on_device(x) for x in case.arrays]
    out, lse = cudistr.attention(*arrays, return_lse=True, **(case.options | changes))
    return cp.asnumpy(out).astype(np.float64), cp.asnumpy(lse)


def wide(case: Case) -> list[np.ndarray]:
    return [x.astype(np.float64) for x in case.arrays]


def mask_of(case: Case) -> np.ndarray:
    options = case.options
    return mask(case.q.shape[2], case.k.shape[2], options.get("causal", False), options.get("window"))


def weights_slack(case: Case) -> float:
    """How far the weights of a row may be from adding up to one, relative to the largest value.

    P is rounded to the dtype before the second product, the result after it, and float32 sums have a rounding per key.
    """
    return 2 * ROUNDOFF[case.q.dtype] + case.k.shape[2] * 2.0**-23


@settings(laws, max_examples=150)
@given(drawn())
def test_kernel_is_the_reference(case):
    check_kernel(*case.arrays, layouts=case.layouts, **case.options)


@laws
@given(drawn(methods=st.none()), st.sampled_from([None, 64]))
def test_group_size_one_is_exact_to_the_bit(case, block_q):
    for one, other in zip(run(case), run(case, reduction=cudistr.LSH(1, block_q=block_q)), strict=True):
        same_bits(one, other)


@laws
@given(drawn(methods=reduced))
def test_repeated_columns_are_exact(case):
    group_size = case.options["reduction"].group_size
    q = np.repeat(case.q[..., : 64 // group_size], group_size, axis=3)
    exact = {name: value for name, value in case.options.items() if name != "reduction"}
    wide_arrays = (x.astype(np.float64) for x in (q, case.k, case.v))
    like = reference.attention(*wide_arrays, return_lse=True, **exact)
    check_kernel(q, case.k, case.v, like=like, **case.options)


@laws
@given(drawn(methods=reduced, scaled=False))
def test_output_certificate(case):
    # |kernel - exact| is at most the certificate of the method and the rounding that the kernel is allowed.
    reduction = case.options["reduction"]
    exact_options = {name: value for name, value in case.options.items() if name != "reduction"}
    exact = reference.attention(*wide(case), **exact_options)
    error = naive_scores(case.q, case.k) - naive_scores(
        expanded(case.q, reduction, case.k), case.k, scale=1 / 8
    )
    v = np.repeat(case.v.astype(np.float64), case.q.shape[1] // case.v.shape[1], axis=1)
    bound = np.zeros_like(exact)
    for i, keys in enumerate(mask_of(case)):
        if keys.any():
            epsilon = np.ptp(error[:, :, i, keys], axis=-1) / 2
            bound[:, :, i] = np.tanh(epsilon / 2)[..., None] * np.ptp(v[:, :, keys], axis=2)
    same_method = reference.attention(*wide(case), **case.options)
    rounding = allowed(baseline(*case.arrays, cp, **case.options)[0], same_method, ROUNDOFF[case.q.dtype])
    assert (np.abs(run(case)[0] - exact) <= bound + rounding.largest).all()


@laws
@given(drawn())
def test_output_lies_within_the_values_seen(case):
    out, _ = run(case)
    v = np.repeat(case.v.astype(np.float64), case.q.shape[1] // case.v.shape[1], axis=1)
    slack = weights_slack(case) * np.abs(v).max()
    for i, keys in enumerate(mask_of(case)):
        if keys.any():
            assert (out[:, :, i] <= v[:, :, keys].max(axis=2) + slack).all()
            assert (out[:, :, i] >= v[:, :, keys].min(axis=2) - slack).all()
        else:
            assert (out[:, :, i] == 0).all()


@laws
@given(drawn())
def test_values_of_one_give_one(case):
    ones = Case(case.q, case.k, np.ones_like(case.v), case.options, case.layouts, case.shapes)
    expected = mask_of(case).any(axis=1)[:, None].astype(float)
    assert (np.abs(run(ones)[0] - expected) <= weights_slack(case)).all()


@laws
@given(drawn(masked=False), seeds)
def test_permuting_keys_with_their_values_changes_nothing(case, seed):
    mixed = np.random.default_rng(seed).permutation(case.k.shape[2])
    like = reference.attention(*wide(case), return_lse=True, **case.options)
    check_kernel(case.q, case.k[:, :, mixed], case.v[:, :, mixed], like=like, **case.options)


@laws
@given(drawn(), st.data())
def test_heads_and_batch_entries_never_mix(case, data):
    b = data.draw(st.integers(0, case.q.shape[0] - 1), label="batch")
    h = data.draw(st.integers(0, case.k.shape[1] - 1), label="kv head")
    shared = case.q.shape[1] // case.k.shape[1]
    own = slice(h * shared, (h + 1) * shared)
    others = np.ones(case.q.shape[:2], bool)
    others[b, own] = False
    changed = [np.array(x) for x in case.arrays]
    changed[0][b, own] = np.nan
    changed[1][b, h] = np.inf
    changed[2][b, h] = np.nan
    after = Case(*changed, case.options, case.layouts, case.shapes)
    for one, other in zip(run(case), run(after), strict=True):
        same_bits(one[others], other[others])


@laws
@given(drawn(methods=st.none(), dtypes=("float32",), scaled=False), seeds)
def test_a_constant_added_to_every_key_changes_nothing(case, seed):
    # Keys are multiples of 1/64 below 16 and the constants are integers, so that the addition is exact.
    k = np.round(case.k * 64) / 64
    constant = np.random.default_rng(seed).integers(-3, 4, 64).astype(np.float32)
    shifted = k + constant
    assert (shifted - constant == k).all()
    q, _, v = wide(case)
    out, lse = reference.attention(q, k.astype(np.float64), v, return_lse=True, **case.options)
    check_kernel(case.q, shifted, case.v, like=(out, lse + q @ constant / 8), **case.options)


@laws
@given(drawn(masked=False), st.lists(st.integers(0, 300), max_size=3))
def test_shards_of_the_keys_merge_into_the_whole(case, cuts):
    seqlen_k = case.k.shape[2]
    edges = [0, *sorted(min(cut, seqlen_k) for cut in cuts), seqlen_k]
    outs, lses, base_outs, base_lses = [], [], [], []
    for first, last in zip(edges, edges[1:], strict=False):  # equal cuts make empty shards
        shard = case.q, case.k[:, :, first:last], case.v[:, :, first:last]
        out, lse = cudistr.attention(*map(on_device, shard), return_lse=True, **case.options)
        outs.append(out)
        lses.append(lse)
        if last > first:
            base, base_lse = baseline(*shard, cp, **case.options)
            base_outs.append(base.astype(np.float64))
            base_lses.append(base_lse.astype(np.float64))
    merged, total = cudistr.merge(outs, lses, return_lse=True)
    exact, exact_lse = reference.attention(*wide(case), return_lse=True, **case.options)
    base, base_lse = reference.merge(base_outs, base_lses, return_lse=True)
    compare(merged, exact, base.astype(case.q.dtype).astype(np.float64))
    compare_lse(total, exact_lse, base_lse)


@laws
@given(drawn())
def test_same_input_same_bits(case):
    first = run(case)
    for _ in range(3):
        for one, other in zip(first, run(case), strict=True):
            same_bits(one, other)


@laws
@given(drawn(methods=st.none()), reduced)
def test_groups_are_those_of_the_reference(case, reduction):
    queries, keys = (on_device(np.ascontiguousarray(x), case.layouts[0]) for x in case.arrays[:2])
    found = cudistr.group(queries, reduction, keys if reduction.by_keys else None)
    same_bits(found, reference.group(case.q, reduction, case.k if reduction.by_keys else None))


@pytest.mark.hardware
def test_same_bits_with_every_multiprocessor_busy():
    # Enough thread blocks that their order differs from run to run.
    arrays = [on_device(random(seed, 4, 16, 1000, 64, dtype=np.float16)) for seed in range(3)]
    for reduction in (None, cudistr.LSH(2)):
        first, lse = cudistr.attention(*arrays, causal=True, reduction=reduction, return_lse=True)
        for _ in range(20):
            again, lse_again = cudistr.attention(*arrays, causal=True, reduction=reduction, return_lse=True)
            same_bits(again, first)
            same_bits(lse_again, lse)
