"""Attention over ranks that are threads against one call, and what ranks tell each other before it."""

from __future__ import annotations

import dataclasses
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cudistr
from cudistr import reference
from cudistr.distributed import Group, Layout, connect, solve
from cudistr.distributed.schedule import HeadShare
from tests.cpu.fakes import library
from tests.cpu.ranks import Network, Threads, run_groups
from tests.gpu.util import of_ranks
from tests.strategies import BFLOAT16, Case, cases, naive_attention, random, with_exact_keys


def arrays(
    seqlens=(150, 150), heads=4, heads_kv=2, dtype=np.float32, head_dim=16, head_dim_v=24, seed=0, batch=1
):
    q = random(seed, batch, heads, seqlens[0], head_dim, dtype=dtype)
    k = random(seed + 1, batch, heads_kv, seqlens[1], head_dim, dtype=dtype)
    v = random(seed + 2, batch, heads_kv, seqlens[1], head_dim_v, dtype=dtype)
    return q, k, v


def over_ranks(size, q, k, v, layout, **options):
    """out and lse of the whole sequence, as every rank gathers them; and what was sent."""
    pair = layout if isinstance(layout, tuple) else (layout, layout)

    def body(group):
        mine = [group.shard(x, own) for x, own in ((q, pair[0]), (k, pair[1]), (v, pair[1]))]
        out, lse = group.attention(*mine, layout=layout, return_lse=True, **options)
        assert out.dtype == q.dtype and lse.dtype == np.float32
        return group.gather(out, pair[0]), group.gather(lse, pair[0])

    found, network = run_groups(size, body)
    for other in found[1:]:
        for one, same in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(one, same)
    return *found[0], network


def check(size, q, k, v, layout, **options):
    options.setdefault("parallel", "context")
    out, lse, network = over_ranks(size, q, k, v, layout, **options)
    del options["parallel"]
    expected, expected_lse = cudistr.attention(q, k, v, return_lse=True, **options)
    for found, wanted in ((out, expected), (lse, expected_lse)):
        found, wanted = (x.astype(np.float64) for x in (found, wanted))
        # One rounding of float64 sums that were merged in another order.
        step = {2: 2.0**-8 if q.dtype == BFLOAT16 else 2.0**-10, 4: 2.0**-23}[
            q.dtype.itemsize if found is not lse else 4
        ]
        np.testing.assert_allclose(found, wanted, rtol=step, atol=1e-7)
    return network


@settings(max_examples=40)
@given(st.data())
def test_context_parallel_is_one_call(data):
    case: Case = data.draw(
        cases(
            head_dims=(16,),
            head_dims_v=(8,),
            max_seqlen=70,
            methods=st.none() | with_exact_keys((1, 2)).filter(lambda reduction: not reduction.by_keys),
        )
    )
    reduction = case.options["reduction"]
    if reduction is not None:
        case.options["reduction"] = reduction = dataclasses.replace(reduction, block_q=64)
    size = data.draw(st.integers(1, 5))

    def layout(seqlen, block):
        ends = sorted(
            {
                0,
                seqlen,
                *(c // block * block for c in data.draw(st.lists(st.integers(0, seqlen), max_size=5))),
            }
        )
        pieces = [[] for _ in range(size)]
        for piece in data.draw(st.permutations(list(zip(ends, ends[1:], strict=False)))):
            pieces[data.draw(st.integers(0, size - 1))].append(piece)
        return Layout(pieces)

    block = 64 if reduction is not None and reduction.group_size > 1 else 1
    check(size, *case.arrays, (layout(case.q.shape[2], block), layout(case.k.shape[2], 1)), **case.options)


@pytest.mark.parametrize("parallel", ["context", "heads"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (40, 3), "softcap": 5.0},
        {"reduction": cudistr.LSH(2, block_q=64), "causal": True},
        {"reduction": cudistr.LSH(2, block_q=64, near=20, sinks=3), "window": (100, None), "scale": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("zigzag", [False, True])
def test_both_ways_are_one_call(parallel, options, zigzag):
    q, k, v = arrays((260, 260))
    for size in (2, 4):
        check(size, q, k, v, Layout.split(260, size, zigzag=zigzag, block=64), parallel=parallel, **options)


@pytest.mark.parametrize("parallel", ["context", "heads"])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
def test_16_bit_types_travel(parallel, dtype):
    q, k, v = arrays((90, 130), dtype=dtype, batch=2)
    check(2, q, k, v, (Layout.split(90, 2), Layout.contiguous([100, 30])), parallel=parallel, causal=True)


def test_without_a_layout_shards_are_contiguous_and_of_any_length():
    q, k, v = arrays((50, 80), heads=6, heads_kv=2)
    cuts, key_cuts = [0, 7, 50, 50], [0, 30, 30, 80]

    def body(group):
        r = group.rank
        rows, keys = slice(cuts[r], cuts[r + 1]), slice(key_cuts[r], key_cuts[r + 1])
        return group.gather(group.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal=True))

    found, _ = run_groups(3, body)
    np.testing.assert_allclose(found[0], cudistr.attention(q, k, v, causal=True), rtol=3e-7, atol=1e-7)


def test_few_kv_heads_are_on_several_ranks():
    q, k, v = arrays(heads=8, heads_kv=2)
    check(4, q, k, v, Layout.split(150, 4), parallel="heads", causal=True)
    check(4, *arrays(heads=4, heads_kv=1), Layout.split(150, 4), parallel="heads")


@pytest.mark.parametrize("zigzag", [False, True])
def test_blocks_are_those_of_one_call(monkeypatch, zigzag):
    """Every block of queries that is hashed is one of the single call, whichever keys pass by: equal groups, bit by bit."""
    q, k, v = arrays((400, 400), heads=2)
    reduction = cudistr.LSH(2, block_q=64)
    hashed = []
    ordinary = reference.order
    monkeypatch.setattr(
        reference, "order", lambda block, method: hashed.append(block.tobytes()) or ordinary(block, method)
    )
    cudistr.attention(q, k, v, reduction=reduction, causal=True)
    single = set(hashed)
    hashed.clear()
    over_ranks(3, q, k, v, Layout.split(400, 3, zigzag=zigzag, block=64), reduction=reduction, causal=True)
    assert set(hashed) == single and len(hashed) > len(single)


def test_projection():
    q, k, v = arrays((120, 120), heads=4, heads_kv=4, head_dim=32)
    projection = cudistr.Projection.fit(q, k, rank=16).with_near(20, sinks=3)
    layout = Layout.split(120, 2, zigzag=True)
    for parallel in ("context", "heads"):
        check(2, q, k, v, layout, parallel=parallel, reduction=projection, causal=True)
    check(2, q, k, v, layout, parallel="heads", reduction=projection, causal=True, tolerance=0.9)


def test_exact_keys_of_a_ring_are_no_whole_blocks(request):
    q, k, v = arrays((400, 400), heads=2, heads_kv=2, head_dim=32)
    projection = cudistr.Projection.fit(q, k, rank=16).with_near(20, sinks=3)
    options = {"reduction": projection, "causal": True}
    expected = cudistr.attention(q, k, v, **options)
    request.getfixturevalue("whole_blocks")
    assert not np.allclose(cudistr.attention(q, k, v, **options), expected, rtol=1e-3)
    found, *_ = over_ranks(2, q, k, v, Layout.split(400, 2), **options)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("parallel", "reduction"),
    [
        ("context", cudistr.LSH(2, representative="mean", block_q=64, near=9)),
        ("heads", cudistr.LSH(2, representative="rank1")),
        ("heads", cudistr.Energy(16, near=9, sinks=2)),
        ("heads", cudistr.LowRank(16, near=9, sinks=2)),
    ],
    ids=str,
)
def test_weights_and_energy(parallel, reduction):
    q, k, v = arrays((200, 200), heads=4, heads_kv=4, head_dim=32)
    check(2, q, k, v, Layout.split(200, 2, block=64), parallel=parallel, reduction=reduction, causal=True)


def test_head_parallel_with_tolerance_decides_as_one_call():
    """Heads of which some fail the tolerance: every rank decides on its own as the single call does."""
    q, k, v = arrays((200, 200), heads=4, heads_kv=4, head_dim=32)
    k[:, 1::2, :, 16:] = 0  # two heads that 16 columns hold
    projection = cudistr.Projection.fit(q, k, rank=16)
    check(2, q, k, v, Layout.split(200, 2), parallel="heads", reduction=projection, tolerance=0.05)


@pytest.mark.parametrize("parallel", ["context", "heads"])
def test_a_tolerance_without_a_reduction_is_for_both_ways(parallel):
    q, k, v = arrays((200, 200), heads=4, heads_kv=4, head_dim=32)
    check(2, q, k, v, Layout.split(200, 2), parallel=parallel, tolerance=0.05)


def test_a_share_of_heads_that_use_no_columns_has_those_of_one_product():
    q, k, v = arrays((100, 100), heads=4, heads_kv=4, head_dim=32)
    whole = of_ranks(q, k, 0, 0, 32, 32)
    own = solve._of_heads(whole, HeadShare((0, 2), (0, 2)))
    assert own.ranks == (0, 0) and own.columns == 16 <= own.queries.shape[2] == own.keys.shape[2]
    check(2, q, k, v, Layout.split(100, 2), parallel="heads", reduction=whole)


def test_a_single_rank_gives_the_bits_of_one_call():
    q, k, v = arrays()
    out, _, network = over_ranks(1, q, k, v, Layout.split(150, 1, zigzag=True), causal=True)
    np.testing.assert_array_equal(out, cudistr.attention(q, k, v, causal=True))
    assert not any(to or source for _, _, to, source in network.started)


def test_empty_shards_and_sequences():
    q, k, v = arrays((0, 40))
    out, lse, _ = over_ranks(2, q, k, v, (Layout.split(0, 2), Layout.split(40, 2)))
    assert out.shape == (1, 4, 0, 24) and lse.shape == (1, 4, 0)
    q, k, v = arrays((40, 0))
    for parallel in ("context", "heads"):
        out, lse, _ = over_ranks(2, q, k, v, (Layout.split(40, 2), Layout.split(0, 2)), parallel=parallel)
        assert not out.any() and (lse == -np.inf).all()
    q, k, v = arrays((5, 5), batch=0)
    for parallel in ("context", "heads"):
        assert over_ranks(2, q, k, v, Layout.split(5, 2), parallel=parallel)[0].shape == (0, 4, 5, 24)
    q, k, v = arrays((3, 3))
    check(4, q, k, v, Layout.split(3, 4), causal=True)


def test_the_next_shard_is_on_its_way_before_a_shard_is_computed_with(monkeypatch):
    q, k, v = arrays((60, 60))
    events = []
    monkeypatch.setattr(reference, "solve", _noted(reference.solve, lambda: events.append("compute")))
    monkeypatch.setattr(Threads, "start", _noted(Threads.start, lambda: events.append("start")))

    def body(group):
        if group.rank == 0:
            events.clear()
        return group.attention(*(group.shard(x, Layout.split(60, 2)) for x in (q, k, v)))

    run_groups(2, body)
    # Each rank starts its one transfer before it computes for the first time, and needs it for the second time only.
    assert events.count("compute") == 4 and events.count("start") == 2
    assert events.index("start") < events.index("compute")


def _noted(function, note):
    def wrapped(*args, **options):
        note()
        return function(*args, **options)

    return wrapped


@pytest.mark.parametrize("size", [2, 8, 16])
def test_rounding_of_shards_keeps_to_the_contract(size):
    """What a GPU does in bfloat16, with float64 in place of its kernels: each shard rounded, merged in float32, rounded.

    The yardstick is the baseline of the kernels' tests: weights rounded to the dtype before the second product.
    """
    from tests.gpu.util import allowed, baseline

    for spread in (0.1, 1.0, 4.0):
        q, k, v = (
            random(i, 1, 4, 256, 32, dtype=BFLOAT16, spread=spread if i == 0 else 1.0) for i in range(3)
        )
        exact, _ = naive_attention(q, k, v)
        outs, lses = [], []
        for shard in np.split(np.arange(256), size):
            out, lse = naive_attention(q, k[:, :, shard], v[:, :, shard])
            outs.append(out.astype(BFLOAT16).astype(np.float32))
            lses.append(lse.astype(np.float32))
        out, lse = outs[0], lses[0]
        for more in range(1, size):
            out, lse = (
                x.astype(np.float32) for x in reference.solve_merge([out, outs[more]], [lse, lses[more]])
            )
        error = out.astype(BFLOAT16).astype(np.float64) - exact
        base, _ = baseline(q, k, v, np)
        limit = allowed(base, exact, 2.0**-8)
        assert np.abs(error).max() <= limit.largest
        assert np.linalg.norm(error) / np.linalg.norm(exact) <= limit.relative


def test_arrays_of_another_library_come_back_as_its_own(monkeypatch):
    array = library(monkeypatch, "fakelib")
    sys.modules["fakelib"].from_dlpack = lambda x: array(np.from_dlpack(x))
    given = arrays((40, 40))
    layout = Layout.split(40, 2)

    def body(group):
        mine = [group.shard(array(x), layout) for x in given]
        out, lse = group.attention(*mine, layout=layout, return_lse=True)
        whole = group.gather(out, layout)
        assert {type(x) for x in (*mine, out, lse, whole)} == {array}
        return np.from_dlpack(whole)

    found, _ = run_groups(2, body)
    np.testing.assert_allclose(found[0], cudistr.attention(*given), rtol=3e-7, atol=1e-7)


# What ranks agree on


def refused(size, change, kind=ValueError):
    """The message of the error that every rank raises when rank 1 passes something else."""
    q, k, v = arrays((40, 40))

    def body(group):
        given = dict(q=q, k=k, v=v, options={})
        if group.rank == 1:
            change(given)
        with pytest.raises(kind) as error:
            group.attention(given["q"], given["k"], given["v"], **given["options"])
        # The group is as good as before.
        assert group.attention(q, k, v).shape == (1, 4, 40, 24)
        return str(error.value)

    return run_groups(size, body)[0]


def test_ranks_that_disagree_all_say_so():
    def narrow(given):
        given["q"], given["k"] = given["q"][..., :8], given["k"][..., :8]

    found = refused(3, narrow)
    assert len(set(found)) == 1
    assert found[0] == (
        "head_dim must be the same on all ranks, got 16 on ranks 0 and 2, 8 on rank 1. Only the sequence lengths of "
        "shards may differ."
    )
    for options, name in (
        ({"causal": True}, "causal"),
        ({"scale": 0.5}, "scale"),
        ({"reduction": cudistr.LSH(2)}, "reduction"),
        ({"window": (3, 3)}, "window"),
        ({"parallel": "heads"}, "parallel"),
        ({"return_lse": True}, "return_lse"),
        ({"layout": Layout.split(80, 2)}, "layout"),
    ):
        found = refused(2, lambda given, options=options: given.update(options=options))
        assert len(set(found)) == 1 and found[0].startswith(f"{name} must be the same on all ranks, got "), (
            found
        )


def test_the_error_of_one_rank_is_that_of_all():
    def wrong(given):
        given["k"] = given["k"][..., :8]

    found = refused(3, wrong)
    assert found[1].startswith("k: head_dim must be that of q, 16, got 8")
    assert found[0] == found[2] == "rank 1: " + found[1]

    def no_array(given):
        given["q"] = "q"

    found = refused(2, no_array, TypeError)
    assert found[0] == "rank 1: " + found[1] and found[1].startswith("q must be an array")


def raises(size, body, kind, message):
    def each(group):
        with pytest.raises(kind, match=re.escape(message)):
            body(group)

    run_groups(size, each)


def test_what_cannot_be_computed_is_refused_on_all_ranks():
    q, k, v = arrays((100, 100), heads=6, heads_kv=6)
    layout = Layout.split(100, 2)
    mine = lambda group, own=layout: [group.shard(x, own) for x in (q, k, v)]  # noqa: E731
    reduction = cudistr.LSH(2, block_q=64)
    raises(
        2, lambda g: g.attention(*mine(g), layout=layout, reduction=reduction), ValueError,
        "ranges of q must begin at multiples of block_q = 64, got 50 on rank 1. Pass Layout.split(seqlen, size, block=64).",
    )  # fmt: skip
    raises(4, lambda g: g.attention(q, k, v, parallel="heads"), ValueError, "got 4 ranks and 6 heads")
    raises(
        2,
        lambda g: g.attention(q, k, v, layout=layout),
        ValueError,
        "q of rank 0 must have the 50 rows that the layout gives it, got 100",
    )
    raises(
        2,
        lambda g: g.attention(q, k, v, parallel="batch"),
        ValueError,
        "parallel must be one of 'context', 'heads', got 'batch'",
    )
    raises(
        2,
        lambda g: g.attention(q, k, v, layout=Layout.split(100, 3)),
        ValueError,
        "layout must have the group's 2 ranks, got 3",
    )
    raises(
        2,
        lambda g: g.attention(q, k, v, layout=[3]),
        TypeError,
        "layout must be a cudistr.distributed.Layout, or two",
    )
    projection = cudistr.Projection.fit(*arrays((100, 100), heads=6, heads_kv=6, head_dim=32)[:2], rank=16)
    wide = arrays((100, 100), heads=6, heads_kv=6, head_dim=32)
    raises(
        2,
        lambda g: g.attention(*wide, reduction=projection, tolerance=0.1),
        ValueError,
        "parallel='heads', or leave it away",
    )
    for by_keys in (cudistr.Energy(16), cudistr.LSH(2, representative="rank1"), cudistr.LowRank(16)):
        raises(
            2,
            lambda g, reduction=by_keys: g.attention(*wide, reduction=reduction),
            ValueError,
            "cannot be used with parallel='context'. Pass parallel='heads', or a cudistr.LSH",
        )


def test_shard_and_gather_refuse():
    x = np.zeros((1, 2, 10, 8), np.float32)
    raises(
        2,
        lambda g: g.shard(x, Layout.split(9, 2)),
        ValueError,
        "x must have the layout's 9 rows in axis 2, got shape (1, 2, 10, 8)",
    )
    raises(2, lambda g: g.shard(x, None), TypeError, "layout must be a cudistr.distributed.Layout, got None")
    raises(2, lambda g: g.gather(x[0, 0]), ValueError, "x must have rows in axis 2, got shape (10, 8)")
    raises(2, lambda g: g.gather(x, Layout.split(10, 2)), ValueError, "x of rank 0 must have the 5 rows")
    raises(
        2,
        lambda g: g.gather(x[:, : 1 + g.rank]),
        ValueError,
        "shape without rows must be the same on all ranks, got (1, 1, 8) on rank 0",
    )


def test_equal_windows_may_be_written_otherwise():
    q, k, v = arrays((40, 40))
    windows = [(3, None), [np.int64(3), None]]
    run_groups(2, lambda g: g.attention(q, k, v, window=windows[g.rank]))


def test_different_calls_are_refused():
    q, k, v = arrays((40, 40))
    raises(
        2,
        lambda g: g.attention(q, k, v) if g.rank else g.gather(q),
        ValueError,
        "call must be the same on all ranks, got gather on rank 0, attention on rank 1",
    )


def test_group_says_what_it_is():
    group = Group(Threads(1, 3, Network()))
    assert repr(group) == "Group(rank=1, size=3, host)"
    assert (group.rank, group.size, group.device) == (1, 3, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transport": "tcp"}, "transport must be 'nccl' or 'mpi', or None to choose, got 'tcp'"),
        ({"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        ({"timeout": True}, "timeout must be a positive number of seconds, got True"),
        ({"rank": 0}, "rank and size belong to unique_id"),
        ({"unique_id": b"", "transport": "mpi"}, "leave comm and transport='mpi' away"),
        ({"unique_id": b"", "rank": 2, "size": 2}, "rank must be from 0 to size - 1, got rank 2 of size 2"),
        ({"unique_id": b""}, "rank must be given with unique_id, or be in the environment variable RANK"),
    ],
)  # fmt: skip
def test_connect_refuses(monkeypatch, arguments, message):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        connect(**arguments)
