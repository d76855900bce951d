"""Exact keys: the definition against an independent account, and calls that see every key once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cudistr
from cudistr import compose, normalize, reference
from cudistr import plan as planner
from tests.strategies import (
    cases,
    expanded,
    kept_pairs,
    masks,
    naive_attention,
    naive_scores,
    naive_softmax,
    random,
    seen_pairs,
    with_exact_keys,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

CLOSE = dict(rtol=1e-10, atol=1e-11)
lengths = st.integers(1, 12) | st.integers(1, 60)
counts = st.integers(0, 6) | st.integers(0, 70) | st.just(10**6)


def composed(case_problem, q, k, v):
    """The parts of a problem by the float64 reference, and merged by it."""
    solved = [
        reference.solve(q, k[:, :, part.first : part.last], v[:, :, part.first : part.last], part.problem)
        for part in compose.parts(case_problem)
    ]
    return reference.solve_merge(*zip(*solved, strict=True))


def seen_by(part: compose.Part, problem: normalize.Problem) -> np.ndarray:
    """Which keys of the whole sequence a part sees."""
    seen = np.zeros((problem.seqlen_q, problem.seqlen_k), bool)
    own = part.problem
    for i, j in np.ndindex(own.seqlen_q, own.seqlen_k):
        ahead = j - (i + own.seqlen_k - own.seqlen_q)
        seen[i, part.first + j] = -own.left <= ahead <= own.right
    return seen


@given(lengths, lengths, masks, counts, counts)
def test_parts_see_every_visible_key_once(seqlen_q, seqlen_k, mask, near, sinks):
    q, k = np.zeros((1, 1, seqlen_q, 16), "f4"), np.zeros((1, 1, seqlen_k, 16), "f4")
    reduction = cudistr.LSH(2, near=near, sinks=sinks)
    problem = normalize.problem(q, k, k, reduction=reduction, **mask)
    if not (near or sinks):
        return
    seen = seen_pairs(seqlen_q, seqlen_k, mask.get("causal", False), mask.get("window"))
    kept = kept_pairs(seqlen_q, seqlen_k, near, sinks)
    parts = compose.parts(problem)
    if not (seen & ~kept).any():
        assert parts == (
            compose.Part(dataclasses.replace(problem, reduction=None, near=0, sinks=0), 0, seqlen_k),
        )
        return
    total = np.zeros((2, seqlen_q, seqlen_k), int)
    for part in parts:
        own = seen_by(part, problem)
        assert own.any() and part.problem.near == part.problem.sinks == 0
        total[int(part.problem.reduction is not None)] += own
    np.testing.assert_array_equal(total[0], seen & kept)
    np.testing.assert_array_equal(total[1], seen & ~kept)
    assert len(parts) <= (3 if mask.get("causal") else 5)


blocks = st.sampled_from([(1, 1), (4, 4), (4, 6), (12, 4), (128, 192)])


def in_blocks(seqlen_q, seqlen_k, mask, near, sinks, block):
    """A problem of which whole blocks stay exact."""
    q, k = np.zeros((1, 1, seqlen_q, 16), "f4"), np.zeros((1, 1, seqlen_k, 16), "f4")
    problem = normalize.problem(q, k, k, reduction=cudistr.LSH(2, near=near, sinks=sinks), **mask)
    return dataclasses.replace(problem, exact_block=block)


def seen_in_pass(one: planner.Pass, problem: normalize.Problem) -> np.ndarray:
    """Which keys queries see in a pass."""
    seen = np.zeros((problem.seqlen_q, problem.seqlen_k), bool)
    rows = problem.exact_block[0]
    near = kept_pairs(problem.seqlen_q, problem.seqlen_k, problem.near, 0, problem.exact_block)
    for i, j in np.ndindex(seen.shape):
        middle = i // rows * rows + rows // 2 + problem.seqlen_k - problem.seqlen_q
        side = planner.NEAR if near[i, j] else planner.BEFORE if j < middle else planner.AFTER
        ahead = j - (i + problem.seqlen_k - problem.seqlen_q)
        seen[i, j] = one.first <= j < one.last and one.low <= ahead <= one.high and one.part in (0, side)
    return seen


@given(lengths, lengths, masks, counts, counts, blocks)
def test_passes_see_every_visible_key_once(seqlen_q, seqlen_k, mask, near, sinks, block):
    problem = in_blocks(seqlen_q, seqlen_k, mask, near, sinks, block)
    seen = seen_pairs(seqlen_q, seqlen_k, mask.get("causal", False), mask.get("window"))
    kept = kept_pairs(seqlen_q, seqlen_k, near, sinks, block)
    total = np.zeros((2, seqlen_q, seqlen_k), int)
    found = planner.passes(problem)
    for one in found:
        own = seen_in_pass(one, problem)
        assert own.any()
        total[int(one.reduced)] += own
    np.testing.assert_array_equal(total[0], seen & kept)
    np.testing.assert_array_equal(total[1], seen & ~kept)
    assert len(found) <= (3 if mask.get("causal") else planner.MAX_PASSES)


@given(lengths, lengths, masks, counts, counts, blocks)
def test_blocks_stay_exact_as_a_whole(seqlen_q, seqlen_k, mask, near, sinks, block):
    problem = in_blocks(seqlen_q, seqlen_k, mask, near, sinks, block)
    found = reference.kept(np.arange(seqlen_q), problem)
    np.testing.assert_array_equal(found, kept_pairs(seqlen_q, seqlen_k, near, sinks, block))
    assert (found | ~kept_pairs(seqlen_q, seqlen_k, near, sinks)).all()


@given(lengths, lengths, masks, counts, counts, blocks)
def test_reduced_keys_are_counted(seqlen_q, seqlen_k, mask, near, sinks, block):
    problem = in_blocks(seqlen_q, seqlen_k, mask, near, sinks, block)
    rows = np.arange(seqlen_q)
    seen = reference.visible(rows, problem) & ~reference.kept(rows, problem)
    np.testing.assert_array_equal(reference.reduced_count(problem), seen.sum(axis=1))


def missing_weight(q: np.ndarray, copied: np.ndarray, far: np.ndarray, scale: float) -> np.ndarray:
    """What reduced scores of a head lack for their weight, row by row: (rows, 1)."""
    rows = np.zeros((len(q), 1))
    if len(far) == 0:
        return rows
    most = 2 * np.log(len(far))
    mean, variance = far.mean(axis=0), ((far - far.mean(axis=0)) ** 2).mean(axis=0)
    for row, one, other in zip(rows, q, copied, strict=True):
        row[0] = scale * (one * mean).sum() - scale * (other * mean).sum()
        for sign, x in ((1, one), (-1, other)):
            spread = (variance * (scale * x) ** 2).sum()
            row[0] += sign * (spread / 2 if spread < most else np.sqrt(most * spread) - most / 2)
    return rows


@given(cases(methods=with_exact_keys(), head_dims=(32, 64)))
def test_reference_is_one_softmax_over_exact_and_reduced_scores(case):
    reduction = case.options["reduction"]
    scaled = {name: case.options[name] for name in ("scale", "softcap") if name in case.options}
    scaled.setdefault("scale", case.q.shape[3] ** -0.5)
    seqlens = case.q.shape[2], case.k.shape[2]
    exact = naive_scores(case.q, case.k, **scaled)
    copied = expanded(case.q, reduction, case.k)
    reduced = naive_scores(copied, case.k, **scaled)
    if reduction.by_keys and "softcap" not in case.options:
        shared = case.q.shape[1] // case.k.shape[1]
        for b, h in np.ndindex(*case.q.shape[:2]):
            far = case.k[b, h // shared, reduction.sinks :].astype(np.float64)
            q = case.q[b, h].astype(np.float64)
            reduced[b, h] += missing_weight(q, copied[b, h], far, scaled["scale"])
    scores = np.where(kept_pairs(*seqlens, reduction.near, reduction.sinks), exact, reduced)
    seen = seen_pairs(*seqlens, case.options.get("causal", False), case.options.get("window"))
    expected_out, expected_lse = naive_softmax(scores, case.v, seen)
    out, lse = reference.attention(*case.arrays, **case.options, return_lse=True)
    np.testing.assert_allclose(out, expected_out, **CLOSE)
    np.testing.assert_allclose(lse, expected_lse, **CLOSE)


@given(cases(methods=with_exact_keys(), head_dims=(32, 64)))
def test_merged_parts_are_the_reference(case):
    expected = reference.attention(*case.arrays, **case.options, return_lse=True)
    problem = normalize.problem(*case.arrays, reference=True, **case.options)
    for one, other in zip(composed(problem, *case.arrays), expected, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize(
    ("lengths", "options", "near", "sinks", "rows"),
    [
        ((4, 6), {"causal": True}, 2, 0, [".xx...", "..xx..", "...xx.", "....xx"]),
        ((4, 6), {"causal": True}, 1, 2, ["xxx...", "xx.x..", "xx..x.", "xx...x"]),
        ((3, 5), {}, 2, 1, ["xxxx.", "x.xxx", "x..xx"]),
        ((3, 5), {}, 0, 2, ["xx...", "xx...", "xx..."]),
        ((5, 3), {}, 1, 0, ["...", "...", "x..", ".x.", "..x"]),
    ],
    ids=str,
)
def test_kept_keys_drawn_by_hand(lengths, options, near, sinks, rows):
    problem = normalize.problem(
        np.zeros((1, 1, lengths[0], 16), "f4"),
        *[np.zeros((1, 1, lengths[1], 16), "f4")] * 2,
        reduction=cudistr.LSH(2, near=near, sinks=sinks),
        **options,
    )
    positions = np.arange(lengths[0])
    kept = reference.kept(positions, problem) & reference.visible(positions, problem)
    np.testing.assert_array_equal(kept, [[c == "x" for c in row] for row in rows])


def test_near_beyond_the_sequence_is_exact():
    q, k, v = (random(seed, 1, 2, 40, 32) for seed in range(3))
    expected = cudistr.attention(q, k, v, causal=True)
    for reduction in (cudistr.LSH(2, near=40), cudistr.LSH(2, near=10**9), cudistr.LSH(2, sinks=40)):
        np.testing.assert_array_equal(cudistr.attention(q, k, v, causal=True, reduction=reduction), expected)
    assert (cudistr.attention(q, k, v, causal=True, reduction=cudistr.LSH(2, near=39)) != expected).any()


def test_a_key_that_is_needed_is_worth_keeping():
    # The point of near: with keys that matter nearby, the error falls; measured as users measure it.
    q, k, v = (random(seed, 1, 2, 300, 32) for seed in range(3))
    k[0] = 0.9 * q[0] + 0.4 * k[0]  # a query attends to its own position
    errors = [
        cudistr.attention_error(q, k, v, causal=True, reduction=reduction, rows=300).output.value
        for reduction in (cudistr.LSH(2), cudistr.LSH(2, near=16), cudistr.LSH(2, near=150, sinks=20))
    ]
    assert errors[0] > 2 * errors[1] and errors[1] > 1.2 * errors[2] > 0


def test_group_does_not_depend_on_exact_keys():
    q = random(0, 1, 2, 100, 32)
    np.testing.assert_array_equal(
        cudistr.group(q, cudistr.LSH(2)), cudistr.group(q, cudistr.LSH(2, near=9, sinks=3))
    )


def test_lse_of_the_parts_needs_no_key_in_each():
    # Row 0 of a causal mask has neither sinks nor far keys: its parts merge without a NaN.
    q, k, v = (random(seed, 1, 1, 9, 16) for seed in range(3))
    out, lse = cudistr.attention(
        q, k, v, causal=True, return_lse=True, reduction=cudistr.LSH(2, near=2, sinks=1)
    )
    expected, expected_lse = naive_attention(q, k, v, causal=True)
    np.testing.assert_allclose(out[:, :, :3], expected[:, :, :3], rtol=1e-6)
    np.testing.assert_allclose(lse[:, :, :3], expected_lse[:, :, :3], rtol=1e-6)
