"""The float64 reference against an independent account, the laws of the method, and both certificates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cudistr
from cudistr import reference
from cudistr.reductions import projections
from tests.strategies import (
    DTYPES,
    HEAD_DIMS,
    Case,
    cases,
    expanded,
    kept,
    laid_out,
    layouts,
    naive_attention,
    naive_scores,
    near_ties,
    random,
    reductions,
    seeds,
    seen_pairs,
)

# Rows without keys, infinities and the like are regular input: no NumPy warning may reach the user.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

# Rounding of float64 sums of a few hundred terms of order one. The largest scores are of order 100.
CLOSE = dict(rtol=1e-10, atol=1e-11)


def solve(case: Case, **changes) -> tuple[np.ndarray, np.ndarray]:
    return reference.attention(*case.arrays, **(case.options | changes), return_lse=True)


def without_reduction(case: Case) -> dict:
    return {name: value for name, value in case.options.items() if name != "reduction"}


def mask_of(case: Case) -> np.ndarray:
    options = case.options
    return seen_pairs(case.q.shape[2], case.k.shape[2], options.get("causal", False), options.get("window"))


# Against an independent account


@given(cases(reduced=False))
def test_exact_attention_is_the_whole_matrix_formula(case):
    out, lse = solve(case)
    expected_out, expected_lse = naive_attention(*case.arrays, **case.options)
    np.testing.assert_allclose(out, expected_out, **CLOSE)
    np.testing.assert_allclose(lse, expected_lse, **CLOSE)


def by_queries(case: Case) -> bool:
    """Whether what is done with columns goes by Q alone."""
    return not getattr(case.options.get("reduction"), "by_keys", False)


# By groups, or by energy.
reduced_cases = cases(reduced=True) | cases(head_dims=(32, 48, 64), methods=kept)


@given(reduced_cases)
def test_reduced_attention_is_exact_attention_of_the_expanded_queries(case):
    out, lse = solve(case)
    copied = expanded(case.q, case.options["reduction"], case.k)
    options = without_reduction(case)
    options.setdefault("scale", case.q.shape[3] ** -0.5)
    expected_out, expected_lse = naive_attention(copied, case.k, case.v, **options)
    # Means over a block are float32 numbers; scores are of order 100 at most.
    close = dict(rtol=1e-4, atol=1e-4) if isinstance(case.options["reduction"], cudistr.Energy) else CLOSE
    np.testing.assert_allclose(out, expected_out, **close)
    np.testing.assert_allclose(lse, expected_lse, **close)


@pytest.mark.parametrize(
    ("lengths", "options", "rows"),
    [
        ((2, 4), {"causal": True}, ["1110", "1111"]),
        ((4, 2), {"causal": True}, ["00", "00", "10", "11"]),
        ((4, 4), {"window": (1, 0)}, ["1000", "1100", "0110", "0011"]),
        ((4, 4), {"window": (None, 1)}, ["1100", "1110", "1111", "1111"]),
        ((4, 4), {"window": (0, None)}, ["1111", "0111", "0011", "0001"]),
        ((3, 5), {"window": (1, 1)}, ["01110", "00111", "00011"]),
        ((3, 3), {"window": (1, 2), "causal": True}, ["100", "110", "011"]),
        ((5, 3), {"window": (0, 0)}, ["000", "000", "100", "010", "001"]),
    ],
)
def test_masks_drawn_by_hand(lengths, options, rows):
    # Keys are alike, so a row's output is the mean over its visible keys of the identity: it shows the mask.
    seqlen_q, seqlen_k = lengths
    q, k = np.ones((1, 1, seqlen_q, 8)), np.ones((1, 1, seqlen_k, 8))
    v = np.zeros((1, 1, seqlen_k, 8))
    v[0, 0, :, :seqlen_k] = np.eye(seqlen_k)
    out = reference.attention(q, k, v, **options)[0, 0, :, :seqlen_k]
    drawn = np.array([[int(x) for x in row] for row in rows])
    np.testing.assert_array_equal(out > 0, drawn)
    np.testing.assert_allclose(out.sum(axis=1), drawn.any(axis=1), rtol=1e-15)


# Hash, rank, order


def gray_sequence(bits: int) -> list[int]:
    """The binary-reflected Gray sequence by reflection: the list, then the list backwards with the next bit set."""
    sequence = [0]
    for bit in range(bits):
        sequence += [code | 1 << bit for code in reversed(sequence)]
    return sequence


def test_rank_is_the_position_in_the_reflected_gray_sequence():
    sequence = np.array(gray_sequence(16), np.uint32)
    assert len(set(sequence.tolist())) == 2**16
    np.testing.assert_array_equal(reference.rank(sequence), np.arange(2**16))


@given(st.integers(0, 2**16 - 2))
def test_neighbours_in_rank_differ_in_one_bit(position):
    codes = np.arange(2**16, dtype=np.uint32)
    by_rank = np.argsort(reference.rank(codes))
    assert int(by_rank[position] ^ by_rank[position + 1]).bit_count() == 1


@given(seeds, st.sampled_from([1, 63, 64, 100, 128]), reductions())
def test_hash_bits_are_signs_of_projections(seed, rows, reduction):
    rows = min(rows, reduction.block_q)
    block = random(seed, rows, 32, dtype=np.float16)
    vectors = projections(reduction.n_proj, reduction.block_q, reduction.seed)
    sums = vectors[:, :rows].astype(np.float64) @ block.astype(np.float64)
    # float32 sums of up to 192 terms: bits are certain where the exact sum is clear of rounding.
    magnitude = np.abs(vectors[:, :rows]).astype(np.float64) @ np.abs(block).astype(np.float64)
    clear = np.abs(sums) > (rows + 1) * 2.0**-24 * magnitude
    assert clear.mean() > 0.5
    codes = reference.hash_codes(block, reduction)
    assert codes.dtype == np.uint32 and codes.max(initial=0) < 2**reduction.n_proj
    bits = codes[None, :] >> np.arange(reduction.n_proj)[:, None] & 1
    np.testing.assert_array_equal(bits[clear], (sums > 0)[clear])


def test_hash_sums_in_row_order_in_float32_without_fused_multiply_add():
    reduction = cudistr.LSH(1, block_q=64)
    block = near_ties(5, 64, 96, reduction)
    vectors = projections(16, 64, 0)
    codes, wide_codes = np.zeros(96, np.uint32), np.zeros(96, np.uint32)
    for c in range(96):
        for b in range(16):
            total = np.float32(0)
            for r in range(64):
                product = np.float32(vectors[b, r] * block[r, c])
                total = np.float32(total + product)
            codes[c] |= np.uint32(total > 0) << np.uint32(b)
            wide = vectors[b].astype(np.float64) @ block[:, c].astype(np.float64)
            wide_codes[c] |= np.uint32(wide > 0) << np.uint32(b)
    assert (codes != wide_codes).sum() > 10  # the input does tell the two apart
    np.testing.assert_array_equal(reference.hash_codes(block, reduction), codes)


def test_hash_settles_ties_and_nan_with_bit_zero():
    reduction = cudistr.LSH(1, block_q=64)
    block = random(0, 64, 8)
    block[:, 0] = 0.0
    block[:, 1] = -0.0
    block[3, 2] = np.nan
    block[:2, 3] = np.inf, -np.inf
    codes = reference.hash_codes(block, reduction)
    assert codes[0] == codes[1] == codes[2] == 0
    # inf and -inf meet as inf - inf = nan exactly where both projections have one sign.
    vectors = projections(16, 64, 0)
    bits = codes[3] >> np.arange(16) & 1
    np.testing.assert_array_equal(bits, (vectors[:, 0] > 0) & (vectors[:, 1] < 0))


def test_short_block_uses_the_first_projection_rows():
    reduction = cudistr.LSH(2, block_q=128)
    block = random(1, 50, 32)
    padded = np.concatenate([block, np.zeros((78, 32), np.float32)])
    np.testing.assert_array_equal(
        reference.hash_codes(block, reduction), reference.hash_codes(padded, reduction)
    )


@given(seeds, reductions(), st.sampled_from([1, 64, 65, 130, 200]), st.sampled_from(sorted(DTYPES)), layouts)
def test_groups_are_stable_sorts_by_rank_per_block(seed, reduction, seqlen_q, dtype, layout):
    q = random(seed, 2, 2, seqlen_q, 64, dtype=DTYPES[dtype])
    k = random(seed, 2, 2, 9, 64, dtype=DTYPES[dtype]) if reduction.by_keys else None
    result = reference.group(laid_out(q, layout), reduction, k)
    block_q = reduction.block_q
    assert result.dtype == np.uint8 and result.shape == (2, 2, -(-seqlen_q // block_q), 64)
    for b, h, n in np.ndindex(*result.shape[:3]):
        permutation = result[b, h, n]
        codes = reference.hash_codes(q[b, h, n * block_q : (n + 1) * block_q], reduction)
        if reduction.representative == "rank1":  # a column and its negative are alike; weights reorder groups
            codes = np.minimum(codes, 2**reduction.n_proj - 1 - codes)
            permutation = reference.order(q[b, h, n * block_q : (n + 1) * block_q], reduction)
        ranks = reference.rank(codes)
        keys = [(int(ranks[c]), int(c)) for c in permutation]
        assert keys == sorted((int(rank), c) for c, rank in enumerate(ranks))


def test_sample_takes_the_first_and_mean_the_mean():
    block = random(2, 5, 16, dtype=np.float64)
    permutation = np.random.default_rng(0).permutation(16)
    first, second = permutation[0::2], permutation[1::2]
    sampled = reference.sample(block, permutation, cudistr.LSH(2))
    np.testing.assert_array_equal(sampled, block[:, first])
    mean = reference.sample(block, permutation, cudistr.LSH(2, representative="mean"))
    np.testing.assert_allclose(mean, (block[:, first] + block[:, second]) / 2, rtol=1e-15)
    fused = reference.fuse(block, permutation, 2)
    np.testing.assert_allclose(fused, block[:, first] + block[:, second], rtol=1e-15)


@given(seeds, st.sampled_from([(16, 2), (48, 3), (64, 4), (64, 8)]), st.integers(1, 128), st.booleans())
def test_rank_one_leaves_least(seed, sizes, rows, alike):
    head_dim, group_size = sizes
    reduction = cudistr.LSH(group_size, representative="rank1")
    block = random(seed, rows, head_dim, dtype=np.float64)
    if alike:
        block = block[:, :1] * random(seed + 1, head_dim) + 0.1 * block
    block = block.astype(np.float32).astype(np.float64)
    # One group order for all: that of the signed hash.
    order = reference.order(block, reduction)
    left = best = mean = sampled = 0.0
    energies = np.exp2(np.random.default_rng(seed).integers(-2, 3, head_dim)).astype(np.float32)
    for group in order.reshape(-1, group_size):
        # What columns add to the scores goes by the spread of K's columns too.
        columns = block[:, group] * energies[group]
        left += residual_of(block[:, group], energies[group])
        values = np.linalg.svd(columns, compute_uv=False)
        best += (values[1:] ** 2).sum()
        mean += (
            ((block[:, group] - block[:, group].mean(axis=1, keepdims=True)) * energies[group]) ** 2
        ).sum()
        sampled += (((block[:, group] - block[:, group[:1]]) * energies[group]) ** 2).sum()
    # Weights have eight bits, and ten squarings leave a little of a second eigenvalue next to the first.
    slack = 2.0**-11 * ((block * energies) ** 2).sum()
    assert best - slack <= left <= best + slack
    assert left <= mean + slack and left <= sampled + slack


def residual_of(columns: np.ndarray, energies: np.ndarray) -> float:
    """What the method's weights leave of a group's part in the scores, times so much as K's columns vary."""
    size = len(energies)
    reduction = cudistr.LSH(size, representative="rank1")
    permutation, numbers = reference.balance(columns, np.arange(size), reduction, energies)
    weights, shares = numbers.astype(np.float64)
    assert weights[0] == 1 and (numbers[0].view(np.uint32) % 2**16 == 0).all()  # eight bits
    ordered, spread = columns[:, permutation], energies[permutation].astype(np.float64)
    qhat = reference.sample(columns, permutation, reduction, numbers)[:, 0]
    np.testing.assert_allclose(qhat, ordered @ shares / (weights @ shares), rtol=1e-12, atol=1e-12)
    # No other shares leave less.
    best = np.linalg.lstsq((spread * weights)[:, None], (ordered * spread).T, rcond=None)[0][0]
    np.testing.assert_allclose(qhat, best, rtol=1e-5, atol=1e-5 * np.abs(best).max())
    return float((((ordered - np.outer(qhat, weights)) * spread) ** 2).sum())


@given(seeds, st.sampled_from([2, 4]), st.integers(1, 150))
def test_columns_that_differ_in_sign_are_exact_with_rank_one(seed, group_size, seqlen_q):
    reduction = cudistr.LSH(group_size, representative="rank1")
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], 32).astype(np.float32)
    q = np.repeat(random(seed, 1, 2, seqlen_q, 32 // group_size), group_size, axis=3) * signs
    k, v = random(seed + 1, 1, 2, 40, 32), random(seed + 2, 1, 2, 40, 8)
    found = reference.attention(q, k, v, reduction=reduction)
    np.testing.assert_allclose(found, reference.attention(q, k, v), **CLOSE)


def test_weights_of_groups_that_have_none():
    reduction = cudistr.LSH(2, representative="rank1")
    block = np.zeros((5, 16))
    block[:, 3] = np.nan
    block[:, 4:6] = np.inf
    block[:, 9] = 1.0
    permutation, numbers = reference.balance(block, np.arange(16), reduction, np.ones(16, np.float32))
    np.testing.assert_array_equal(permutation, [0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 10, 11, 12, 13, 14, 15])
    np.testing.assert_array_equal(numbers, [[1, 0] * 8] * 2)


def test_weights_by_columns_of_keys_that_do_not_vary():
    # Columns of Q are alike up to a factor of two. Of K, one in each group varies 64 times less, or not at all, or
    # is not a number; or none varies. The weight is that of Q whatever K does, the shares are not.
    reduction = cudistr.LSH(2, representative="rank1")
    block = np.repeat(random(3, 7, 5), 2, axis=1) * np.tile([2, 1], 5)
    energies = np.array([1, 1, 64, 1, 1, 0, 1, np.nan, 0, 0], np.float32)
    permutation, numbers = reference.balance(block, np.arange(10), reduction, energies)
    np.testing.assert_array_equal(permutation, np.arange(10))
    np.testing.assert_array_equal(numbers[0], [1, 0.5] * 5)
    part = 0.5 / 64**2
    np.testing.assert_array_equal(numbers[1], [1, 0.5, 1, part, 1, part, 1, part, 1, 0.5])


@given(seeds, st.sampled_from([2, 4]), st.sampled_from([64, 700]), st.floats(0.1, 1.5))
def test_lse_of_reduced_keys_is_restored(seed, group_size, seqlen_k, spread):
    """With exact keys beside them, what weights leave out comes back: means exactly, the rest for normal numbers."""
    reduction = cudistr.LSH(group_size, representative="rank1", sinks=8)
    q = random(seed, 1, 1, 96, 32) * np.float32(spread)
    k, v = random(seed + 1, 1, 1, seqlen_k, 32), random(seed + 2, 1, 1, seqlen_k, 8)
    k[0, 0, 8:] -= k[0, 0, 8:].mean(axis=0)
    shifted = k + 5 * random(seed + 3, 32)
    q, k, shifted, v = (x.astype(np.float64) for x in (q, k, shifted, v))

    def far(keys, **options):
        scale = 32**-0.5
        lse = reference.attention(q, keys, v, return_lse=True, **options)[1]
        sunk = reference.attention(q, keys[:, :, :8], v[:, :, :8], return_lse=True)[1]
        return lse + np.log(-np.expm1(sunk - lse)) - scale * (q @ keys[0, 0, 8:].mean(axis=0))

    exact = far(k)
    # A mean of the keys, which weights would get wrong, changes nothing.
    restored = far(k, reduction=reduction)
    np.testing.assert_allclose(far(shifted, reduction=reduction), restored, rtol=1e-4, atol=1e-4)
    plain = cudistr.LSH(group_size, representative="rank1")
    lost = reference.attention(q, k[:, :, 8:], v[:, :, 8:], return_lse=True, reduction=plain)[1]
    assert np.abs(restored - exact).mean() < np.abs(lost - exact).mean()


@given(seeds, st.integers(1, 700))
def test_key_energies_are_norms_of_deviations(seed, seqlen_k):
    k = random(seed, seqlen_k, 24) + 30 * random(seed + 1, 24)
    wide = k.astype(np.float64)
    expected = np.linalg.norm(wide - wide.mean(axis=0), axis=0)
    # float32 sums of squares of deviations from the first key, of which the mean deviation is taken off again.
    slack = 700 * 2.0**-24 * ((wide - wide[0]) ** 2).sum(axis=0)
    assert (np.abs(reference.key_energies(k).astype(np.float64) ** 2 - expected**2) <= slack).all()


@given(seeds, st.integers(2, 128))
def test_columns_by_energy(seed, rows):
    random_numbers = np.random.default_rng(seed)
    q_spread, k_spread = 4.0 ** random_numbers.permutation(16), random_numbers.uniform(1, 1.5, 16)
    q = (random(seed, rows, 16) * q_spread + 7).astype(np.float32)
    permutation, means = reference.energy_order(q, k_spread.astype(np.float32))
    wide = q.astype(np.float64)
    energy = np.linalg.norm(wide - wide.mean(axis=0), axis=0) * k_spread
    np.testing.assert_allclose(energy[permutation], np.sort(energy)[::-1], rtol=1e-4)
    np.testing.assert_allclose(means, wide.mean(axis=0)[permutation], rtol=1e-4, atol=1e-4 * q_spread.max())


def test_columns_of_equal_energy_stay_in_order_and_nan_comes_first():
    q = np.ones((4, 16), np.float32)
    q[0, 5] = np.nan
    q[0, 9] = 2.0
    permutation, means = reference.energy_order(q, np.ones(16, np.float32))
    np.testing.assert_array_equal(permutation[:3], [5, 9, 0])
    np.testing.assert_array_equal(permutation[3:], [x for x in range(1, 16) if x not in (5, 9)])
    assert np.isnan(means[0]) and means[1] == 1.25


@given(seeds, st.sampled_from([1, 64, 150]), st.booleans())
def test_energy_is_exact_where_the_rest_does_not_vary(seed, seqlen_q, of_keys):
    q, k, v = random(seed, 1, 2, seqlen_q, 32), random(seed + 1, 1, 1, 60, 32), random(seed + 2, 1, 1, 60, 8)
    constant = np.random.default_rng(seed).permutation(32)[:16]
    (k if of_keys else q)[..., constant] = random(seed + 3, 16)
    out = reference.attention(q, k, v, reduction=cudistr.Energy(16, near=0, sinks=0))
    # Softmax does not see what is constant over the keys; of Q, a mean is rounded to float32.
    np.testing.assert_allclose(out, reference.attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_energy_of_every_column_is_exact_to_the_bit():
    q, k, v = (random(seed, 1, 2, 70, 32) for seed in range(3))
    exact = reference.attention(q, k, v, return_lse=True)
    found = reference.attention(q, k, v, return_lse=True, reduction=cudistr.Energy(32))
    for one, other in zip(exact, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_energy_of_keys_is_that_of_the_reduced_ones():
    q, k = random(0, 1, 1, 64, 32), random(1, 1, 1, 50, 32)
    k[:, :, :3] *= 100.0 * random(2, 32)  # sinks that would decide which columns stay
    with_sinks = reference.group(q, cudistr.Energy(16, near=0, sinks=3), k)
    np.testing.assert_array_equal(
        with_sinks, reference.group(q, cudistr.Energy(16, near=0, sinks=0), k[:, :, 3:])
    )
    assert (with_sinks != reference.group(q, cudistr.Energy(16, near=0, sinks=0), k)).any()


def test_projections_are_the_same_on_every_machine():
    # Values of NumPy's frozen RandomState stream: a change of generator would change everybody's groups.
    vectors = projections(16, 128, 0)
    assert vectors.dtype == np.float32 and vectors.shape == (16, 128) and not vectors.flags.writeable
    np.testing.assert_array_equal(vectors[0, :3], np.float32([225, 51, 125]) / 128)


# Laws


@given(
    cases(reduced=False),
    st.sampled_from([None, 64, 192]),
    st.sampled_from(["sample", "mean", "rank1"]),
    seeds,
)
def test_group_size_one_is_exact(case, block_q, representative, seed):
    reduction = cudistr.LSH(1, block_q=block_q, seed=seed, representative=representative)
    for one, other in zip(solve(case), solve(case, reduction=reduction), strict=True):
        np.testing.assert_array_equal(one, other)


@given(cases(reduced=True), seeds)
def test_repeated_columns_make_any_group_size_exact(case, seed):
    reduction = case.options["reduction"]
    head_dim, runs = case.q.shape[3], case.q.shape[3] // reduction.group_size
    q = np.repeat(case.q[..., :runs], reduction.group_size, axis=3)
    # Alike columns need not stand side by side, unless different ones share a code and so mix in the sort.
    mixed = q[..., np.random.default_rng(seed).permutation(head_dim)]
    blocks = [
        mixed[b, h, start : start + reduction.block_q]
        for b, h in np.ndindex(*q.shape[:2])
        for start in range(0, q.shape[2], reduction.block_q)
    ]
    bits = 2**reduction.n_proj - 1 if reduction.representative == "rank1" else 0
    codes = [reference.hash_codes(block, reduction) for block in blocks]
    if all(len(set(np.minimum(x, x ^ np.uint32(bits)).tolist())) == runs for x in codes) or (
        not bits and all(len(set(x.tolist())) == runs for x in codes)
    ):
        q = mixed
    exact = reference.attention(q, case.k, case.v, return_lse=True, **without_reduction(case))
    reduced = reference.attention(q, case.k, case.v, return_lse=True, **case.options)
    for one, other in zip(exact, reduced, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@given(seeds, st.sampled_from([(16, 2), (48, 3), (64, 4), (64, 8)]), st.integers(1, 150))
def test_columns_in_runs_of_one_value_are_exact_whatever_the_codes(seed, sizes, seqlen_q):
    # With the stable sort, runs of the group size stay together even where different runs share a code.
    head_dim, group_size = sizes
    reduction = cudistr.LSH(group_size, n_proj=2, seed=seed % 5)
    q = np.repeat(random(seed, 1, 2, seqlen_q, head_dim // group_size), group_size, axis=3)
    k, v = random(seed + 1, 1, 2, 40, head_dim), random(seed + 2, 1, 2, 40, 8)
    exact = reference.attention(q, k, v)
    np.testing.assert_allclose(reference.attention(q, k, v, reduction=reduction), exact, **CLOSE)


@given(reduced_cases)
def test_score_certificate(case):
    options = case.options
    cap = options.get("softcap")
    scale = options.get("scale", case.q.shape[3] ** -0.5)
    copied = expanded(case.q, options["reduction"], case.k)
    exact = naive_scores(case.q, case.k, scale, cap)
    error = exact - naive_scores(copied, case.k, scale, cap)
    rows = np.linalg.norm(case.q.astype(np.float64) - copied, axis=3)
    keys = np.linalg.norm(case.k.astype(np.float64), axis=3)
    keys = np.repeat(keys, case.q.shape[1] // case.k.shape[1], axis=1)
    # The cap has slope at most one, so it does not loosen the bound.
    bound = abs(scale) * rows[..., :, None] * keys[..., None, :]
    slack = 1e-12 * (1 + np.abs(exact).max())
    assert (np.abs(error) <= bound + slack).all()
    assert (np.linalg.norm(error, axis=(2, 3)) <= np.linalg.norm(bound, axis=(2, 3)) + 100 * slack).all()


def output_bound(case: Case) -> np.ndarray:
    """tanh(eps_i / 2) times the range of V over the keys that row i sees, (batch, heads, seqlen_q, head_dim_v)."""
    options = {name: case.options[name] for name in ("scale", "softcap") if name in case.options}
    options.setdefault("scale", case.q.shape[3] ** -0.5)
    copied = expanded(case.q, case.options["reduction"], case.k)
    error = naive_scores(case.q, case.k, **options) - naive_scores(copied, case.k, **options)
    v = np.repeat(case.v.astype(np.float64), case.q.shape[1] // case.v.shape[1], axis=1)
    bound = np.zeros((*case.q.shape[:3], case.v.shape[3]))
    for i, keys in enumerate(mask_of(case)):
        if keys.any():
            epsilon = (error[:, :, i, keys].max(axis=-1) - error[:, :, i, keys].min(axis=-1)) / 2
            bound[:, :, i] = np.tanh(epsilon / 2)[..., None] * np.ptp(v[:, :, keys], axis=2)
    return bound


@given(reduced_cases)
def test_output_certificate(case):
    reduced, _ = solve(case)
    exact = reference.attention(*case.arrays, **without_reduction(case))
    # Means over a block are float32 numbers.
    slack = 1e-4 if isinstance(case.options["reduction"], cudistr.Energy) else 1e-10
    slack *= 1 + np.abs(case.v.astype(np.float64)).max()
    assert (np.abs(reduced - exact) <= output_bound(case) + slack).all()


def test_output_certificate_is_tight_for_two_keys():
    # Two keys, scores 0 against +-eps: the softmax moves by tanh(eps/2) exactly when it straddles the middle.
    q = np.zeros((1, 1, 1, 16))
    q[..., :] = np.linspace(-1, 1, 16)
    reduction = cudistr.LSH(2, seed=1)
    gap = (q - expanded(q, reduction))[0, 0, 0]
    k = np.stack([gap, -gap])[None, None]
    # Shift the scores to the symmetric point: add what makes exact and reduced scores opposite.
    direction = q[0, 0, 0] + expanded(q, reduction)[0, 0, 0]
    k -= (k @ direction)[..., None] * direction / (direction @ direction)
    v = np.stack([np.ones(8), np.zeros(8)])[None, None]
    case = Case(q, k, v, {"reduction": reduction}, ("contiguous",) * 3, "")
    moved = np.abs(solve(case)[0] - reference.attention(q, k, v))
    assert moved.min() > 1e-3
    np.testing.assert_allclose(moved, output_bound(case), rtol=1e-9)


@given(cases())
def test_output_lies_within_the_values_seen(case):
    out, lse = solve(case)
    v = np.repeat(case.v.astype(np.float64), case.q.shape[1] // case.v.shape[1], axis=1)
    slack = 1e-12 * (1 + np.abs(v).max())
    for i, keys in enumerate(mask_of(case)):
        if keys.any():
            assert (out[:, :, i] <= v[:, :, keys].max(axis=2) + slack).all()
            assert (out[:, :, i] >= v[:, :, keys].min(axis=2) - slack).all()
            assert np.isfinite(lse[:, :, i]).all()
        else:
            assert (out[:, :, i] == 0).all() and (lse[:, :, i] == -np.inf).all()


@given(cases())
def test_values_of_one_give_one(case):
    out = reference.attention(case.q, case.k, np.ones_like(case.v), **case.options)
    expected = np.broadcast_to(mask_of(case).any(axis=1)[:, None].astype(float), out.shape)
    np.testing.assert_allclose(out, expected, rtol=1e-13)


@given(cases(masked=False).filter(by_queries), seeds)
def test_permuting_keys_with_their_values_changes_nothing(case, seed):
    mixed = np.random.default_rng(seed).permutation(case.k.shape[2])
    expected = solve(case)
    result = reference.attention(
        case.q, case.k[:, :, mixed], case.v[:, :, mixed], return_lse=True, **case.options
    )
    for one, other in zip(result, expected, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@given(cases(), st.data())
def test_heads_and_batch_entries_never_mix(case, data):
    b = data.draw(st.integers(0, case.q.shape[0] - 1), label="batch")
    h = data.draw(st.integers(0, case.q.shape[1] - 1), label="head")
    before = solve(case)
    q = case.q.copy()
    q[b, h] = np.nan
    after = reference.attention(q, case.k, case.v, return_lse=True, **case.options)
    others = np.ones(case.q.shape[:2], bool)
    others[b, h] = False
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[others], other[others])


@given(cases(), st.data())
def test_a_kv_head_reaches_only_its_query_heads(case, data):
    b = data.draw(st.integers(0, case.k.shape[0] - 1), label="batch")
    h = data.draw(st.integers(0, case.k.shape[1] - 1), label="head")
    before = solve(case)
    k, v = case.k.copy(), case.v.copy()
    k[b, h], v[b, h] = np.nan, np.nan
    after = reference.attention(case.q, k, v, return_lse=True, **case.options)
    shared = case.q.shape[1] // case.k.shape[1]
    others = np.ones(case.q.shape[:2], bool)
    others[b, h * shared : (h + 1) * shared] = False
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[others], other[others])
    reached = mask_of(case).any(axis=1)
    assert np.isnan(after[0][~others][:, reached]).all()


@given(cases(reduced=False, scaled=False), seeds)
def test_a_constant_added_to_every_key_changes_nothing(case, seed):
    constant = random(seed, case.k.shape[3], dtype=np.float64)
    expected, lse = solve(case)
    q, v = case.q.astype(np.float64), case.v.astype(np.float64)
    out, shifted = reference.attention(
        q, case.k.astype(np.float64) + constant, v, return_lse=True, **case.options
    )
    np.testing.assert_allclose(out, expected, **CLOSE)
    np.testing.assert_allclose(shifted, lse + q @ constant * q.shape[3] ** -0.5, rtol=1e-9, atol=1e-9)


@given(cases(masked=False).filter(by_queries), st.lists(st.integers(0, 150), max_size=4))
def test_shards_of_the_keys_merge_into_the_whole(case, cuts):
    seqlen_k = case.k.shape[2]
    edges = [0, *sorted(min(cut, seqlen_k) for cut in cuts), seqlen_k]  # equal cuts make empty shards
    shards = [
        reference.attention(case.q, case.k[:, :, a:b], case.v[:, :, a:b], return_lse=True, **case.options)
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    merged = reference.merge([out for out, _ in shards], [lse for _, lse in shards], return_lse=True)
    for one, other in zip(merged, solve(case), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@given(cases())
def test_same_input_same_bits(case):
    first, second = solve(case), solve(case)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@given(cases())
def test_layout_of_the_memory_does_not_matter(case):
    plain = [np.ascontiguousarray(x) for x in case.arrays]
    for one, other in zip(
        reference.attention(*plain, return_lse=True, **case.options), solve(case), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_zero_strides_are_read_as_copies():
    row = random(0, 1, 1, 1, 16)
    q, k = np.broadcast_to(row, (2, 4, 70, 16)), np.broadcast_to(row, (2, 2, 30, 16))
    for reduction in (None, cudistr.LSH(2)):
        np.testing.assert_array_equal(
            reference.attention(q, k, k, reduction=reduction),
            reference.attention(q.copy(), k.copy(), k.copy(), reduction=reduction),
        )


# Merge


def test_merge_of_shards_without_keys():
    out, lse = np.zeros((1, 1, 2, 8)), np.full((1, 1, 2), -np.inf)
    merged, total = reference.merge([out, out], [lse, lse], return_lse=True)
    assert (merged == 0).all() and (total == -np.inf).all()
    some, weight = random(0, 1, 1, 2, 8, dtype=np.float64), np.array([[[3.0, -900.0]]])
    merged, total = reference.merge([out, some], [lse, weight], return_lse=True)
    np.testing.assert_array_equal(merged, some)
    np.testing.assert_array_equal(total, weight)


def test_merge_weighs_by_the_exponential_of_lse():
    outs = [np.full((1, 1, 1, 8), x) for x in (1.0, 5.0)]
    lses = [np.full((1, 1, 1), np.log(x)) for x in (3.0, 1.0)]
    merged, lse = reference.merge(outs, lses, return_lse=True)
    np.testing.assert_allclose(merged, np.full((1, 1, 1, 8), 2.0), rtol=1e-14)
    np.testing.assert_allclose(lse, np.full((1, 1, 1), np.log(4.0)), rtol=1e-14)
    assert isinstance(reference.merge(outs, lses), np.ndarray)


@given(cases(), st.floats(-700, 700))
def test_merge_is_free_of_overflow(case, shift):
    out, lse = solve(case)
    merged, total = reference.merge([out, out], [lse + shift, lse + shift], return_lse=True)
    np.testing.assert_allclose(merged, out, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(total, lse + shift + np.log(2), rtol=1e-12, atol=1e-12)


# Rows without keys, empty axes, NaN and infinity


@pytest.mark.parametrize("reduction", [None, cudistr.LSH(2)])
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 0, 0, 0)], ids=str
)
def test_empty_axes(shape, reduction):
    batch, heads, seqlen_q, seqlen_k = shape
    q = random(0, batch, heads, seqlen_q, 16)
    k, v = random(1, batch, heads, seqlen_k, 16), random(2, batch, heads, seqlen_k, 24)
    out, lse = reference.attention(q, k, v, reduction=reduction, return_lse=True)
    assert out.shape == (batch, heads, seqlen_q, 24) and (out == 0).all()
    assert lse.shape == (batch, heads, seqlen_q) and (lse == -np.inf).all()
    blocks = -(-seqlen_q // 128)
    assert reference.group(q, cudistr.LSH(2)).shape == (batch, heads, blocks, 16)


def test_scores_of_minus_infinity_count_as_hidden():
    q = np.ones((1, 1, 1, 8))
    k = np.zeros((1, 1, 2, 8))
    k[0, 0, 0, 0] = -np.inf
    v = random(0, 1, 1, 2, 8, dtype=np.float64)
    out, lse = reference.attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(out[0, 0, 0], v[0, 0, 1])
    assert lse[0, 0, 0] == 0
    k[0, 0, 1, 0] = -np.inf
    out, lse = reference.attention(q, k, v, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_query_row_stays_in_its_row(bad):
    q, k, v = (random(seed, 1, 2, 20, 16) for seed in range(3))
    expected = reference.attention(q, k, v, causal=True)
    q[0, 1, 7, 3] = bad
    # One sign for this column of K keeps inf - inf apart: all scores are inf, or all are -inf.
    out, lse = reference.attention(q, np.abs(k), v, causal=True, return_lse=True)
    hidden = bad == -np.inf  # every score is -inf: a row without keys
    assert (out[0, 1, 7] == 0).all() if hidden else np.isnan(out[0, 1, 7]).all()
    assert lse[0, 1, 7] == -np.inf if hidden else np.isnan(lse[0, 1, 7])
    out = reference.attention(q, k, v, causal=True)
    others = np.ones((1, 2, 20), bool)
    others[0, 1, 7] = False
    np.testing.assert_array_equal(out[others], expected[others])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_key_reaches_the_rows_that_see_it(bad):
    q, k, v = (random(seed, 1, 1, 20, 16) for seed in range(3))
    expected = reference.attention(q, k, v, causal=True)
    k[0, 0, 7, 3] = bad
    out = reference.attention(q, k, v, causal=True)
    np.testing.assert_array_equal(out[0, 0, :7], expected[0, 0, :7])
    weightless = bad * q[0, 0, :, 3] == -np.inf  # the score is -inf: the key drops out
    np.testing.assert_array_equal(np.isnan(out[0, 0, 7:]).any(axis=1), ~weightless[7:])
    assert np.isfinite(out[0, 0, 7:][weightless[7:]]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_stays_in_its_column(bad):
    q, k, v = (random(seed, 1, 1, 20, 16) for seed in range(3))
    expected = reference.attention(q, k, v)
    v[0, 0, 7, 3] = bad
    out = reference.attention(q, k, v)
    assert (np.isnan(out[..., 3]) if np.isnan(bad) else out[..., 3] == bad).all()
    columns = np.arange(16) != 3
    np.testing.assert_array_equal(out[..., columns], expected[..., columns])


def test_a_nan_in_a_column_that_is_not_sampled_is_not_seen():
    reduction = cudistr.LSH(2)
    q, k, v = (random(seed, 1, 1, 20, 16) for seed in range(3))
    q[0, 0, 4, 5] = np.nan  # the column hashes to code 0, so it stands first or second in the first group
    sampled = 5 in reference.group(q, reduction)[0, 0, 0, ::2]
    out = reference.attention(q, k, v, reduction=reduction)
    assert np.isnan(out[0, 0, 4]).any() == sampled
    assert np.isfinite(np.delete(out[0, 0], 4, axis=0)).all()


def test_head_dims_cover_every_kind_of_group():
    # What the strategies draw from is legal, so that no case above is refused instead of run.
    for head_dim, group_sizes in HEAD_DIMS.items():
        assert all(head_dim % g == 0 and head_dim // g % 8 == 0 for g in group_sizes)
