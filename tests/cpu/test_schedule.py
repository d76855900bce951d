"""Who holds, sends and computes what: the schedules of several ranks, pair by pair."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cudistr
from cudistr import normalize, reference
from cudistr.distributed import Layout, schedule, solve
from tests.strategies import kept_pairs, seen_pairs

sizes = st.integers(1, 16)


@st.composite
def layouts(draw, size, block=1, max_seqlen=70):
    """Any layout: ranges of any lengths, of any rank, in any order; ranks without rows too."""
    seqlen = draw(st.integers(0, max_seqlen))
    cuts = draw(st.lists(st.integers(0, seqlen), max_size=6))
    ends = sorted({0, seqlen, *(cut // block * block for cut in cuts)})
    pieces = [[] for _ in range(size)]
    for piece in draw(st.permutations(list(zip(ends, ends[1:], strict=False)))):
        pieces[draw(st.integers(0, size - 1))].append(piece)
    return Layout(pieces)


@given(st.data())
def test_layout_has_every_row_once(data):
    layout = data.draw(sizes.flatmap(layouts))
    rows = np.concatenate([layout.positions(r) for r in range(layout.size)])
    assert sorted(rows) == list(range(layout.seqlen))
    assert layout.lengths == tuple(len(layout.positions(r)) for r in range(layout.size))


@given(st.integers(0, 3000), sizes, st.booleans(), st.sampled_from([1, 2, 64, 128]))
def test_split_is_even_and_aligned(seqlen, size, zigzag, block):
    layout = Layout.split(seqlen, size, zigzag=zigzag, block=block)
    assert (layout.seqlen, layout.size) == (seqlen, size)
    assert all(start % block == 0 for pieces in layout.pieces for start, _ in pieces)
    assert max(layout.lengths) - min(layout.lengths) <= block * (2 if zigzag else 1)


def test_zigzag_gives_the_chunks_from_both_ends():
    assert Layout.split(12, 3, zigzag=True).pieces == (((0, 2), (10, 12)), ((2, 4), (8, 10)), ((4, 8),))
    assert Layout.split(10, 1, zigzag=True).pieces == (((0, 10),),)
    assert Layout.contiguous([3, 0, 2]).pieces == (((0, 3),), (), ((3, 5),))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([[(0, 2)], [(3, 5)]], "every row must be held by one rank, but rows 2 to 3 are missing"),
        ([[(0, 3)], [(2, 5)]], "every row must be held by one rank, but row 2 is there twice"),
        ([[(2, 0)]], "a range must have 0 <= start <= stop, got (2, 0)"),
        ([], "pieces must have an entry for each rank, got none"),
    ],
)
def test_layout_refuses(pieces, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout(pieces)


def test_layout_refuses_what_is_no_range():
    with pytest.raises(TypeError, match="pieces must be pairs of integers for each rank"):
        Layout([[(0.5, 2)]])
    for wrong, name in ((dict(seqlen=-1, size=2), "seqlen"), (dict(seqlen=3, size=0), "size")):
        with pytest.raises(ValueError, match=f"Layout.split: {name} must be at least"):
            Layout.split(**wrong)


@given(st.data())
def test_ring_brings_each_shard_as_far_as_it_goes(data):
    reach = data.draw(sizes.flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    size, steps = len(reach), schedule.ring(tuple(reach))
    assert len(steps) == max(reach)
    held = [{r} for r in range(size)]
    for s, step in enumerate(steps, 1):
        for r, move in enumerate(step):
            # Both ends of a message are of one step, so neither waits for a step that the other has not begun.
            assert move.sends == step[(r + 1) % size].receives
            assert move.sends is None or move.sends in held[r]
        for r, move in enumerate(step):
            if move.receives is not None:
                assert move.receives == (r - s) % size  # what step s computes with
                assert move.receives not in held[r]
                held[r].add(move.receives)
    for r in range(size):
        assert held[r] == {shard for shard in range(size) if (r - shard) % size <= reach[shard]}


def problem_of(seqlens, options, reduction):
    q, k = (np.zeros((1, 1, n, 16), np.float32) for n in seqlens)
    return normalize.problem(q, k, k, reduction=reduction, **options)


def pairs(call, problem):
    """Which pair of the slices a call sees."""
    rows, keys = call.rows[1] - call.rows[0], call.keys[1] - call.keys[0]
    own = dataclasses.replace(problem, seqlen_q=rows, seqlen_k=keys, left=call.left, right=call.right)
    return reference.visible(np.arange(rows), own)


bounds = st.none() | st.integers(0, 30)


@settings(max_examples=150)
@given(st.data())
def test_calls_see_every_visible_pair_once(data):
    size = data.draw(sizes)
    block = data.draw(st.sampled_from([1, 8]))
    queries = data.draw(layouts(size, block))
    keys = data.draw(st.just(queries) | layouts(size))
    mask = data.draw(st.fixed_dictionaries({"causal": st.booleans(), "window": st.tuples(bounds, bounds)}))
    near, sinks = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
    reduction = data.draw(st.sampled_from([None, cudistr.LSH(2, near=near, sinks=sinks)]))
    seqlens = queries.seqlen, keys.seqlen
    problem = problem_of(seqlens, mask, reduction)
    found = np.zeros((2, *seqlens), int)
    for rank in range(size):
        for source in range(size):
            for call in schedule.calls(queries, keys, rank, source, solve.bands_of(problem), block):
                rows = queries.positions(rank)[slice(*call.rows)]
                assert all(row % block == 0 for row in rows[::block])  # blocks are those of the sequence
                assert rows.size
                columns = keys.positions(source)[slice(*call.keys)]
                found[int(call.exact)][np.ix_(rows, columns)] += pairs(call, problem)
    seen = seen_pairs(*seqlens, **mask)
    np.testing.assert_array_equal(found.sum(axis=0), seen)
    if reduction is not None and found[0].any():
        np.testing.assert_array_equal(found[1], seen & kept_pairs(*seqlens, near, sinks))


@given(sizes, st.integers(1, 4))
def test_zigzag_balances_a_causal_mask(size, chunk):
    layout = Layout.split(2 * size * chunk, size, zigzag=True)
    problem = problem_of((layout.seqlen,) * 2, {"causal": True}, None)
    work = np.array([
        [
            sum(pairs(call, problem).sum() for call in schedule.calls(layout, layout, r, (r - s) % size, solve.bands_of(problem)))
            for r in range(size)
        ]
        for s in range(size)
    ])  # fmt: skip
    assert (work == work[:, :1]).all()  # in every step all ranks have the same work, so nobody waits


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_full_step_of_a_zigzag_is_one_call(size):
    layout = Layout.split(2 * size, size, zigzag=True)
    problem = problem_of((layout.seqlen,) * 2, {"causal": True}, None)
    for rank in range(size):
        for source in range(size):
            if source != rank:
                (call,) = schedule.calls(layout, layout, rank, source, solve.bands_of(problem))
                assert (call.left, call.right) == (None, None)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_own_keys_are_one_call(size):
    """A causal mask of both chunks is one of the rank's arrays, if blocks of rows stay those of the sequence."""
    layout = Layout.split(40 * size, size, zigzag=True, block=4)
    bands = solve.bands_of(problem_of((layout.seqlen,) * 2, {"causal": True}, None))
    for rank in range(size):
        (call,) = schedule.calls(layout, layout, rank, rank, bands, block=4)
        assert call[1:] == ((0, 40), (0, 40), None, 0)
    assert len(schedule.calls(layout, layout, 0, 0, bands, block=3)) > 1


def test_shards_that_nobody_sees_do_not_travel():
    layout = Layout.split(800, 8)
    bands = solve.bands_of(problem_of((800, 800), {"causal": True, "window": (100, None)}, None))
    moves, calls = solve.plan(layout, layout, bands, 1, 3)
    assert moves == (schedule.Move(sends=3, receives=2),)
    assert [bool(x) for x in calls] == [False, False, True, True, False, False, False, False]
    bands = solve.bands_of(problem_of((800, 800), {"causal": True}, None))
    assert [m.sends is not None for m in solve.plan(layout, layout, bands, 1, 7)[0]] == [False] * 7


@given(st.integers(1, 16), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_heads_are_shared(size, own, shared, few):
    heads_kv = own if few and size % own == 0 else own * size
    heads = heads_kv * shared * (size if few else 1)
    if heads % size:
        heads *= size
    shares = [schedule.head_share(heads, heads_kv, size, r) for r in range(size)]
    assert [h for share in shares for h in range(*share.queries)] == list(range(heads))
    for share in shares:
        first, keys = share.queries[0], share.keys[1] - share.keys[0]
        local = (share.queries[1] - first) // keys
        for h in range(*share.queries):  # a local call reads the KV head that the whole call reads
            assert share.keys[0] + (h - first) // local == h // (heads // heads_kv)


def test_no_heads_are_shared_too():
    assert schedule.head_share(0, 0, 3, 1) == schedule.head_share(0, 6, 3, 2) == ((0, 0), (0, 0))


def test_heads_refuse_what_cannot_be_shared():
    with pytest.raises(ValueError, match="must divide the heads of q, got 3 ranks and 8 heads"):
        schedule.head_share(8, 8, 3, 0)
    with pytest.raises(ValueError, match="or be a multiple of them, got 4 ranks and 6 heads"):
        schedule.head_share(12, 6, 4, 0)


def test_ranks_are_listed():
    assert [schedule.of_ranks(x) for x in ([3], [1, 2], [0, 4, 7])] == [
        "rank 3",
        "ranks 1 and 2",
        "ranks 0, 4 and 7",
    ]
