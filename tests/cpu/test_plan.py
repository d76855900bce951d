"""Laws of the plan, over problems and devices that no machine at hand has to have."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cudistr import LSH, Energy, UnsupportedDeviceError, compiler, compose, explain, launch, normalize
from cudistr import plan as planner
from cudistr.errors import CompileError
from cudistr.normalize import Problem, Ranked
from cudistr.plan import Device, Kernel, Plan, Prepare, Split, Step, Tile, plan
from tests.grid import DEVICES

AMPERE, HOPPER = DEVICES[80], DEVICES[90]
DTYPES = ("float16", "bfloat16", "float32")


def group_sizes(head_dim: int) -> list[int]:
    """What LSH and normalize let through for a head_dim, without 1, which normalize makes exact."""
    return [g for g in range(2, head_dim // 8 + 1) if head_dim % g == 0 and head_dim // g % 8 == 0]


def problem(**changes: object) -> Problem:
    """A small problem as normalize would make it."""
    plain = Problem(
        batch=1,
        heads=2,
        heads_kv=1,
        seqlen_q=256,
        seqlen_k=300,
        head_dim=64,
        head_dim_v=64,
        dtype="float16",
        scale=0.125,
        softcap=None,
        left=None,
        right=None,
        reduction=None,
        q_strides=(0, 256 * 64, 64),
        k_strides=(0, 0, 64),
        v_strides=(0, 0, 64),
        aligned=True,
        tf32=False,
        device=0,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


devices = st.sampled_from(list(DEVICES.values()))
hoppers = st.builds(
    Device, st.just(90), st.just(HOPPER.shared_bytes), st.sampled_from([1, 2, 114, 132]) | st.integers(1, 200)
)
head_dims = st.sampled_from([8, 32, 64, 128, 256]) | st.integers(1, 32).map(lambda n: 8 * n)
seqlens = st.integers(1, 300) | st.sampled_from([1, 64, 65, 128, 4096]) | st.integers(1, normalize.MAX_SEQLEN)
bounds = st.none() | st.integers(0, 500)


@st.composite
def problems(draw: st.DrawFn, *, reduced: bool | None = None, hopper: bool = False) -> Problem:
    """Every problem that normalize can hand over.

    ``reduced`` asks for, or rules out, a reduction; ``hopper`` asks for what the Hopper kernel covers.
    """
    if hopper:
        reduced = False
    head_dim = draw(head_dims.filter(group_sizes) if reduced else head_dims)
    reduction: LSH | Energy | None = None
    if reduced or (reduced is None and group_sizes(head_dim) and draw(st.booleans())):
        block_q = draw(st.sampled_from([None, 64, 128, 192, 320, 1024]))
        reduction = LSH(
            draw(st.sampled_from(group_sizes(head_dim))),
            block_q=block_q,
            n_proj=draw(st.integers(1, 16)),
            representative=draw(st.sampled_from(["sample", "mean", "rank1"])),
        )
        if head_dim > 16 and draw(st.integers(0, 3)) == 0:
            reduction = Energy(16 * draw(st.integers(1, (head_dim - 1) // 16)), 0, 0, block_q)
    dtype = draw(st.sampled_from(DTYPES[:2] if hopper else DTYPES))
    heads_kv = draw(st.integers(1, 3))
    head_dim_v = draw(head_dims)
    if hopper:
        head_dim, head_dim_v = -(-head_dim // 16) * 16, -(-head_dim_v // 16) * 16
    return problem(
        batch=draw(st.integers(1, 4)),
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        seqlen_q=draw(seqlens),
        seqlen_k=draw(seqlens),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        scale=draw(st.sampled_from([head_dim**-0.5, 1.0, 0.0, -0.5])),
        softcap=draw(st.sampled_from([None, None, 30.0])),
        left=draw(bounds),
        right=draw(bounds),
        reduction=reduction,
        aligned=hopper or draw(st.booleans()),
        tf32=dtype == "float32" and draw(st.booleans()),
    )


def small_enough(one: Problem) -> bool:
    """Whether one launch holds it whatever the tile is."""
    rows, keys = math.ceil(one.seqlen_q / 16), math.ceil(one.seqlen_k / 16) * 4
    return (rows + keys) * one.batch * one.heads <= planner.MAX_BLOCKS


# The tile


@given(problems(reduced=False) | problems(hopper=True), devices)
def test_blocks_of_exact_keys_have_whole_tiles_of_queries(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    strides = (0, 0, 16)
    one = normalize.keeping(dataclasses.replace(one, ranked=Ranked(16, strides, strides)), 40, 9)
    check_blocks(one, device, few=one.seqlen_q <= 64 or one.seqlen_k < 4096)


@given(problems(), devices)
def test_blocks_of_exact_keys_beside_groups(one: Problem, device: Device) -> None:
    assume(small_enough(one) and one.reduction is not None)
    assert one.reduction is not None
    one = normalize.keeping(one, 40, 9)
    wide = max(one.head_dim, one.head_dim_v) > 128 and not one.reduction.by_keys
    check_blocks(one, device, few=wide or one.seqlen_q <= 64 or one.seqlen_k < 4096)
    # Where a kernel has no passes beside groups, it takes other queries, or exact keys are calls of their own, which know
    # no blocks.
    passes = compose.in_one_kernel(one, device) or planner.copies_queries(one, device)
    assert passes or one.exact_block == (1, 1)


def check_blocks(one: Problem, device: Device, few: bool) -> None:
    kernel, tile = planner.attention_kernel(one, device)
    rows, keys = one.exact_block
    assert (rows == 1) == few
    if rows > 1:
        assert rows % tile.block_m == 0
        assert plan(one, device).packed == 1
        if kernel.specific and max(one.head_dim, one.head_dim_v) <= 128:
            assert tile.tile_k == keys


@given(problems(), devices)
def test_a_tile_exists_and_fits(one: Problem, device: Device) -> None:
    for kernel, tile in (planner.attention_kernel(one, device), planner.portable_kernel(one, device)):
        assert kernel.shared_bytes <= device.shared_bytes
        assert (
            tile.row_tiles in (1, 2) and tile.block_m % (16 * tile.row_tiles) == 0 and tile.tile_k % 16 == 0
        )
        producer = 128 if kernel.specific else 0
        assert kernel.threads == producer + 32 * tile.block_m // (16 * tile.row_tiles)
        assert 32 <= kernel.threads <= 1024


@pytest.mark.parametrize("device", DEVICES.values(), ids=[f"sm_{c}" for c in DEVICES])
def test_a_tile_exists_for_every_shape(device: Device) -> None:
    """Not drawn: the choice has many corners, and all of them can be walked."""
    for head_dim in range(8, 257, 8):
        reductions = [LSH(g, block_q=b) for g in group_sizes(head_dim) for b in (64, 128)]
        for reduction in (None, *reductions):
            for head_dim_v in range(8, 257, 8):
                for dtype in ("float16", "float32"):
                    for aligned in (True, False):
                        one = problem(
                            head_dim=head_dim,
                            head_dim_v=head_dim_v,
                            dtype=dtype,
                            reduction=reduction,
                            aligned=aligned,
                        )
                        kernel, _ = planner.attention_kernel(one, device)
                        assert kernel.shared_bytes <= device.shared_bytes


@given(problems(reduced=True), devices)
def test_a_tile_lies_inside_one_block_of_the_reduction(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    chosen = plan(one, device)
    assert one.reduction is not None and chosen.prepare is not None
    block_q, block_m, group_blocks = (
        one.reduction.rows_per_block,
        chosen.tile.block_m,
        chosen.prepare.group_blocks,
    )
    assert block_q % block_m == 0
    assert (group_blocks - 1) * block_q < one.seqlen_q <= group_blocks * block_q
    # The kernel finds the order of its last tile by this division; it must not lie past the orders.
    assert (chosen.row_blocks - 1) // (block_q // block_m) == group_blocks - 1


@given(problems(), devices, st.integers(1, 64))
def test_few_queries_get_a_small_tile(one: Problem, device: Device, seqlen_q: int) -> None:
    _, tile = planner.attention_kernel(dataclasses.replace(one, seqlen_q=seqlen_q), device)
    assert tile.block_m <= 64


@given(problems(), devices)
def test_blocks_cover_the_queries(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    chosen = plan(one, device)
    rows = one.seqlen_q * chosen.packed
    assert (chosen.row_blocks - 1) * chosen.tile.block_m < rows <= chosen.row_blocks * chosen.tile.block_m
    tiles = chosen.row_blocks * one.batch * one.heads // chosen.packed
    assert tiles <= planner.MAX_BLOCKS
    if chosen.attention.specific:
        assert chosen.blocks == min(chosen.works, device.multiprocessors)
    else:
        assert chosen.blocks == tiles * (1 if chosen.split is None else chosen.split.splits)


@given(problems(), devices, st.integers(1, 64))
def test_the_grid_of_the_portable_kernel(one: Problem, device: Device, batch: int) -> None:
    one = dataclasses.replace(one, batch=batch * one.batch, family="portable")
    assume(small_enough(one))
    chosen = plan(one, device)
    tiles, sections, splits = chosen.grid
    assert tiles * sections * splits == chosen.blocks
    assert 0 < sections <= planner.MAX_BLOCKS_YZ and 0 < splits <= planner.MAX_BLOCKS_YZ
    assert tiles == chosen.section * chosen.row_blocks
    assert sections * chosen.section == one.batch * one.heads // chosen.packed


@pytest.mark.parametrize("right", [None, 0])
def test_more_heads_than_an_axis_of_a_launch(right: int | None) -> None:
    one = problem(batch=2**13, heads=9, heads_kv=9, seqlen_q=200, seqlen_k=200, right=right)
    tiles, sections, splits = plan(one, AMPERE).grid
    assert sections <= 2**16 - 1 and tiles * sections * splits == 2 * 9 * 2**13


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("reduction", [None, LSH(2), LSH(4)], ids=["exact", "G2", "G4"])
@pytest.mark.parametrize("seqlen", [4096, 8192, 16384])
@pytest.mark.parametrize("heads", [32, 33, 37, 64, 80])
def test_no_long_tiles_are_left_to_the_end(
    heads: int, seqlen: int, reduction: LSH | None, head_dim: int
) -> None:
    """A list of what every thread block of a causal call takes: the last ends 5% after the mean at most."""
    size = dict(seqlen_q=seqlen, seqlen_k=seqlen, head_dim=head_dim, head_dim_v=head_dim, right=0)
    one = problem(heads=heads, heads_kv=heads, dtype="bfloat16", reduction=reduction, **size)
    chosen = plan(one, AMPERE)
    kernel, tile = chosen.attention, chosen.tile
    blocks = planner.resident_blocks(tile, kernel, AMPERE, head_dim) * AMPERE.multiprocessors
    steps = [-(-(row + 1) * tile.block_m // tile.tile_k) for row in range(chosen.row_blocks)]

    def excess(section: int) -> float:
        works = [
            3.0 + steps[row]
            for first in range(0, heads, section)
            for row in reversed(range(chosen.row_blocks))
            for _ in range(min(section, heads - first))
        ]
        return planner._makespan(works, blocks) / (sum(works) / blocks)

    assert excess(chosen.section) < 1.05
    assert excess(chosen.section) < excess(1)


def test_projections_of_few_columns_beside_exact_keys_stay_apart() -> None:
    one = problem(head_dim=64, head_dim_v=64, right=0, ranked=RANKS, near=1, family="portable")
    assert plan(one, AMPERE).section == 1
    for change in ({"near": 0}, {"dtype": "float32"}):
        assert plan(dataclasses.replace(one, **change), AMPERE).section == one.batch * one.heads


def test_many_heads_are_taken_in_several_sections() -> None:
    """Thread blocks that are in progress at once share keys."""
    one = problem(batch=64, heads=16, heads_kv=16, seqlen_q=2048, seqlen_k=2048, right=0)
    chosen = plan(one, AMPERE)
    resident = planner.resident_blocks(chosen.tile, chosen.attention, AMPERE, 64) * AMPERE.multiprocessors
    assert 1 < chosen.section <= resident / planner.SECTION_READERS


# Thread blocks that share keys, heads that share tiles

gpus = st.builds(
    Device, st.sampled_from([80, 86, 90, 120]), st.just(99 * 1024), st.sampled_from([1, 2, 16, 84, 132, 170])
)


def portable_problems(**options: bool) -> st.SearchStrategy[Problem]:
    return problems(**options).map(lambda one: dataclasses.replace(one, family="portable"))


@given(portable_problems(), gpus)
def test_splits_are_possible_and_promise_something(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    chosen = plan(one, device)
    if chosen.split is None:
        return
    assert 1 < chosen.split.splits <= min(planner.MAX_SPLITS, math.ceil(one.seqlen_k / chosen.tile.tile_k))
    assert chosen.split.clocks <= planner.SPLIT_GAIN * chosen.split.whole_clocks
    assert dict(chosen.attention.constants)["SHARE_KEYS"] == 1
    rows = one.batch * one.heads * one.seqlen_q
    per_block = planner.MERGE_WARPS // chosen.split.row_warps
    assert planner.MERGE_WARPS % chosen.split.row_warps == 0
    assert (chosen.split.merge_blocks - 1) * per_block < rows <= chosen.split.merge_blocks * per_block
    assert dict(chosen.split.kernel.constants) == {
        "DTYPE": DTYPES.index(one.dtype), "HEAD_DIM_V": one.head_dim_v
    }  # fmt: skip
    # What they leave behind is bounded by what the GPU runs at once, not by the problem.
    tiles = chosen.blocks // chosen.split.splits
    assert chosen.blocks <= max(tiles, 8 * 16 * device.multiprocessors)


@given(portable_problems(), gpus)
def test_a_full_gpu_needs_no_splits(one: Problem, device: Device) -> None:
    one = dataclasses.replace(one, batch=64 * device.multiprocessors, heads=2, heads_kv=2, seqlen_q=256)
    assume(small_enough(one))
    assert plan(one, device).split is None


@pytest.mark.parametrize("capability", [80, 86, 89, 120])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_query_against_many_keys_fills_the_gpu(capability: int, dtype: str) -> None:
    device = dataclasses.replace(DEVICES[capability], multiprocessors=100)
    one = problem(seqlen_q=1, seqlen_k=100_000, heads=32, heads_kv=8, dtype=dtype)
    chosen = plan(one, device)
    assert chosen.packed == 4 and chosen.tile.block_m == 64
    assert chosen.split is not None and 100 <= chosen.blocks <= 800
    # Few keys are not worth a second launch, and float32 results would show the rounding of the parts' lse.
    assert plan(dataclasses.replace(one, seqlen_k=100), device).split is None
    assert plan(dataclasses.replace(one, dtype="float32"), device).split is None


@given(portable_problems(), gpus, st.integers(1, 70), st.booleans())
def test_heads_are_packed_where_rows_lie_a_constant_apart(
    one: Problem, device: Device, seqlen_q: int, apart: bool
) -> None:
    row = one.q_strides[2]
    head = seqlen_q * row if apart else row
    one = dataclasses.replace(one, seqlen_q=seqlen_q, q_strides=(0, head, row))
    assume(small_enough(one))
    possible = one.reduction is None and seqlen_q <= 32 and (apart or seqlen_q == 1)
    assert plan(one, device).packed == (one.heads // one.heads_kv if possible else 1)


@given(portable_problems(), st.integers(1, 400), st.integers(1, 400), devices)
def test_tiles_of_keys_are_counted(one: Problem, seqlen_q: int, seqlen_k: int, device: Device) -> None:
    one = dataclasses.replace(one, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    _, tile = planner.portable_kernel(one, device)
    row_blocks = math.ceil(seqlen_q / tile.block_m)
    counts = []
    for first in range(0, seqlen_q, tile.block_m):
        seen = set()
        for query in range(first, min(first + tile.block_m, seqlen_q)):
            place = query + seqlen_k - seqlen_q
            low = 0 if one.left is None else max(0, place - one.left)
            high = seqlen_k - 1 if one.right is None else min(seqlen_k - 1, place + one.right)
            if low <= high:
                seen |= {low // tile.tile_k, high // tile.tile_k}
        counts.append(max(seen) - min(seen) + 1 if seen else 0)
    assert planner.key_tiles(one, tile, row_blocks, 1) == counts


def test_multiprocessors_decide() -> None:
    one = problem(seqlen_q=1, seqlen_k=4000, heads=2, heads_kv=2)
    assert (
        plan(dataclasses.replace(one, batch=100), dataclasses.replace(AMPERE, multiprocessors=16)).split
        is None
    )
    assert (
        plan(dataclasses.replace(one, batch=100), dataclasses.replace(AMPERE, multiprocessors=800)).split
        is not None
    )


# What runs beside the attention kernel


@given(problems(reduced=False), devices)
def test_exact_attention_is_one_kernel(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    chosen = plan(one, device)
    assert chosen.prepare_kernel is None and chosen.prepare is None


@given(problems(reduced=True), devices)
def test_grouped_attention_is_prepared(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    chosen = plan(one, device)
    assert chosen.prepare_kernel is not None and chosen.prepare is not None
    constants = dict(chosen.prepare_kernel.constants)
    assert DTYPES[constants["DTYPE"]] == one.dtype
    assert (constants["HEAD_DIM"], constants["ALIGNED"]) == (one.head_dim, one.aligned)
    energy = isinstance(one.reduction, Energy)
    rank1 = isinstance(one.reduction, LSH) and one.reduction.representative == "rank1"
    assert constants["SIGNED"] == rank1
    assert (chosen.key_energy is not None, chosen.columns is not None) == (energy or rank1,) * 2
    assert (chosen.prepare.order_units == 0) == energy  # not by hash
    assert not (chosen.attention.specific and energy)
    assert {type(value) for value in constants.values()} == {int}
    assert chosen.prepare_kernel.shared_bytes == 0
    columns, key_blocks = chosen.prepare.key_columns, chosen.prepare.key_blocks
    assert columns % 8 == 0 and one.seqlen_k <= columns < one.seqlen_k + 8
    assert (key_blocks - 1) * planner.TRANSPOSE_TILE < columns <= key_blocks * planner.TRANSPOSE_TILE


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 2000),
    head_dims,
    st.sampled_from([64, 128, 256]),
    st.none() | st.tuples(st.integers(1, 4), st.integers(1, 3000)),
)
def test_every_task_of_the_preparation_has_one_thread_block(
    batch: int, heads: int, seqlen_q: int, head_dim: int, block_q: int, keys: tuple[int, int] | None
) -> None:
    chosen = planner.prepare(batch, heads, seqlen_q, head_dim, block_q, keys)
    assert chosen.blocks > 0 and chosen.order_blocks <= chosen.blocks
    shares = [
        len(range(block, chosen.tiles, chosen.blocks)) for block in range(chosen.blocks)
    ]  # as the kernel does
    tiles_per_head = chosen.key_blocks * math.ceil(head_dim / planner.TRANSPOSE_TILE)
    assert sum(shares) == chosen.tiles == (0 if keys is None else tiles_per_head * batch * keys[0])
    assert max(shares) <= planner.PREPARE_TILES
    # Few tiles have a thread block each, and none has neither.
    assert max(shares) <= 1 or chosen.tiles >= 2 * planner.PREPARE_BLOCKS
    assert chosen.blocks == chosen.order_blocks or min(shares) > 0
    # A warp has 64 columns of one block of queries.
    per_block = planner.PREPARE_THREADS // (32 * math.ceil(head_dim / 64))
    assert chosen.order_units == batch * heads * math.ceil(seqlen_q / block_q)
    assert chosen.order_blocks == math.ceil(chosen.order_units / per_block)


@given(problems(reduced=True), devices)
def test_the_sums_of_the_preparation_stay_in_32_bits(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    chosen = plan(one, device).prepare
    assert chosen is not None
    assert max(chosen.order_units, chosen.tiles, chosen.blocks) <= planner.MAX_BLOCKS


@given(problems(reduced=True), devices)
def test_columns_of_bfloat16_are_summed_in_float16_where_more_than_two_are(
    one: Problem, device: Device
) -> None:
    assume(small_enough(one))
    chosen = plan(one, device)
    assert chosen.prepare_kernel is not None and chosen.prepare is not None
    half = dict(chosen.prepare_kernel.constants)["HALF"]
    rank1 = isinstance(one.reduction, LSH) and one.reduction.representative == "rank1"
    group = one.reduction.group_size if isinstance(one.reduction, LSH) else 1
    assert half == (one.dtype == "bfloat16" and group > 2 and not rank1)
    assert dict(chosen.attention.constants)["HALF"] == half
    assert (chosen.again is not None) == half
    if chosen.again is not None:
        first = dict(chosen.prepare_kernel.constants)
        assert dict(chosen.again.kernel.constants) == first | {"HALF": 2}
        assert 0 < chosen.again.blocks <= chosen.prepare.tiles


@pytest.mark.parametrize("scale", [None, 0.0, -3.0, 1e-3, 1e6])
@pytest.mark.parametrize("group_size", [4, 8, 16])
def test_numbers_that_may_be_float16_give_scores_that_are_no_worse(
    scale: float | None, group_size: int
) -> None:
    one = problem(dtype="bfloat16", head_dim=128, reduction=LSH(group_size))
    one = dataclasses.replace(one, scale=128**-0.5 if scale is None else scale)
    limit = planner.half_limit(one)
    assert 0 < limit * group_size <= 65504 / 1.9  # what is added up, and rounding on the way
    assert 2 * 2.0**-25 * limit * 128 * abs(one.scale) <= 2.0**-10


# What decides on a tolerance


@given(problems(reduced=False), devices, st.booleans())
def test_sampled_rows_fit_every_gpu_and_their_splits_a_warp(one: Problem, device: Device, kept: bool) -> None:
    one = dataclasses.replace(one, head_dim=-(-one.head_dim // 16) * 16, near=5 * kept)
    kernel, splits = planner.probe_kernel(one), planner.probe_splits(one, device)
    constants = dict(kernel.constants)
    assert {type(value) for value in constants.values()} == {int}
    assert constants["KEPT"] == dict(planner.draw_kernel(one).constants)["KEPT"] == kept
    assert kernel.shared_bytes <= min(other.shared_bytes for other in DEVICES.values())
    assert 2 * splits <= 32 and (splits - 1) * constants["TILE_K"] < one.seqlen_k


@pytest.mark.parametrize(("near", "batch", "splits"), [(0, 2, 8), (1, 2, 8), (0, 1, 16), (0, 64, 1)])
def test_sampled_rows_fill_the_gpu_once(near: int, batch: int, splits: int) -> None:
    one = problem(batch=batch, heads=16, heads_kv=16, head_dim=128, head_dim_v=128, seqlen_k=8192, near=near)
    assert planner.probe_splits(one, HOPPER) == splits
    assert planner.draw_shares(one, HOPPER) == (1 if batch == 64 else 2)


# The constants


@given(problems(), devices)
def test_constants_say_what_was_asked_for(one: Problem, device: Device) -> None:
    kernel, tile = planner.portable_kernel(one, device)
    constants = dict(kernel.constants)
    assert len(constants) == len(kernel.constants)
    assert {type(value) for value in constants.values()} == {int}  # a bool would be "True" in C
    assert DTYPES[constants["DTYPE"]] == one.dtype
    assert (constants["HEAD_DIM"], constants["HEAD_DIM_V"]) == (one.head_dim, one.head_dim_v)
    assert constants["SCORE"] == (one.softcap is not None or one.scale <= 0)
    assert bool(constants["SPLIT"]) == (one.dtype == "float32" and not one.tf32)
    assert constants["ALIGNED"] == one.aligned
    energy = isinstance(one.reduction, Energy)
    representative = one.reduction.representative if isinstance(one.reduction, LSH) else None
    group = one.reduction.group_size if isinstance(one.reduction, LSH) else int(energy)
    assert (constants["GROUP"], constants["KEEP"]) == (group, one.reduction.keep if energy else 0)
    assert (constants["MEAN"], constants["WEIGHTED"]) == (representative == "mean", representative == "rank1")
    assert constants["SHARED_BYTES"] == kernel.shared_bytes
    assert Tile(constants["BLOCK_M"], constants["TILE_K"], constants["ROW_TILES"]) == tile


def test_the_hopper_tile_of_two_that_wastes_less() -> None:
    def tile_k(**options: object) -> int:
        found = planner.hopper_kernel(problem(head_dim=128, head_dim_v=128, **options), HOPPER)
        assert found is not None
        return found[1].tile_k

    assert tile_k(seqlen_q=8192, seqlen_k=8192) == tile_k(seqlen_q=8192, seqlen_k=8192, right=0) == 192
    assert tile_k(seqlen_q=1024, seqlen_k=1024) == tile_k(seqlen_q=1024, seqlen_k=1024, right=0) == 128
    assert tile_k(seqlen_q=8192, seqlen_k=8192, left=127, right=0) == 128


@pytest.mark.parametrize(
    ("heads", "heads_kv", "seqlen", "section"),
    [(10, 10, 8192, 5), (16, 16, 16384, 4), (32, 8, 16384, 16), (8, 2, 2**20, 4)],
)
def test_the_last_section_of_heads_is_not_a_small_one(
    heads: int, heads_kv: int, seqlen: int, section: int
) -> None:
    size = dict(seqlen_q=seqlen, seqlen_k=seqlen, head_dim=128, head_dim_v=128, right=0)
    assert plan(problem(heads=heads, heads_kv=heads_kv, **size), HOPPER).section == section


@given(problems(hopper=True), hoppers)
def test_constants_of_the_hopper_kernel_say_what_was_asked_for(one: Problem, device: Device) -> None:
    found = planner.hopper_kernel(one, device)
    assume(found)
    assert found is not None
    kernel, tile = found
    constants = dict(kernel.constants)
    assert len(constants) == len(kernel.constants)
    assert {type(value) for value in constants.values()} == {int}
    assert DTYPES[constants["DTYPE"]] == one.dtype
    assert (constants["HEAD_DIM"], constants["HEAD_DIM_V"]) == (one.head_dim, one.head_dim_v)
    assert constants["SCORE"] == (one.softcap is not None or one.scale <= 0)
    assert constants["SHARED_BYTES"] == kernel.shared_bytes <= device.shared_bytes
    assert Tile(constants["BLOCK_M"], constants["TILE_K"], 1) == tile


MANY = dict(dtype="float32", batch=4, heads=32, seqlen_q=4096, seqlen_k=4096, head_dim=64, head_dim_v=64)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 128),
        ({"right": 0}, 128),
        ({"head_dim": 128, "head_dim_v": 128, "heads": 16}, 128),
        ({"head_dim": 128, "head_dim_v": 128, "heads": 16, "right": 0}, 64),  # 16 tiles for a multiprocessor
        ({"head_dim": 192, "head_dim_v": 192}, 64),  # no registers
        ({"batch": 1, "heads": 8}, 128),  # 256 tiles for 132 multiprocessors
        ({"batch": 1, "heads": 6}, 64),  # 192: twice as many of half the size end earlier
        ({"batch": 1, "heads": 4}, 64),  # 128: one for each
        ({"batch": 1, "heads": 8, "right": 0}, 64),
        ({"reduction": LSH(2, block_q=64)}, 64),
        ({"seqlen_q": 64}, 64),
    ],
    ids=str,
)
def test_float32_has_large_tiles_for_many_queries(options: dict[str, object], rows: int) -> None:
    _, tile = planner.portable_kernel(problem(**MANY | options), HOPPER)
    assert tile == (Tile(128, 32, 2) if rows == 128 else Tile(64, tile.tile_k, 1))


def test_large_float32_tiles_need_room_for_two() -> None:
    small = Device(86, 99 * 1024)
    assert planner.portable_kernel(problem(**MANY), small)[1] == Tile(64, 32, 1)
    assert (
        planner.portable_kernel(problem(**MANY | {"head_dim": 32, "head_dim_v": 32}), small)[1].block_m == 128
    )


@given(problems(), problems(), devices)
def test_sizes_and_masks_do_not_ask_for_another_kernel(one: Problem, two: Problem, device: Device) -> None:
    """Compiling takes seconds: nothing that may change from call to call may be a constant.

    But for whether there is a mask at all, which the Hopper kernel's tile depends on, and whether there are many queries
    of float32, of which there are two tiles.
    """
    mixed = dataclasses.replace(
        one,
        batch=two.batch,
        heads=two.heads,
        heads_kv=two.heads_kv,
        seqlen_k=two.seqlen_k,
        left=two.left,
        right=two.right,
        scale=one.scale * 0.7,
        softcap=None if one.softcap is None else one.softcap * 0.7,
        seqlen_q=max(65, two.seqlen_q) if one.seqlen_q > 64 else min(64, two.seqlen_q),
    )
    few = dataclasses.replace(one, batch=1, heads=1, seqlen_q=min(65, one.seqlen_q), right=0)
    many = dataclasses.replace(few, batch=10**4)
    possible = [
        planner.portable_kernel(x, device) for x in ((few, many) if one.dtype == "float32" else (one,))
    ]
    assert planner.portable_kernel(mixed, device) in possible
    if one.dtype == "float32":  # which has no Hopper kernel
        return
    plain = dataclasses.replace(one, left=None, right=None)
    masked = (dataclasses.replace(plain, right=0), dataclasses.replace(plain, left=5, right=9))
    own = masked[0] if (mixed.left, mixed.right) != (None, None) else plain
    assert planner.attention_kernel(mixed, device) == planner.attention_kernel(own, device)
    assert planner.attention_kernel(masked[0], device) == planner.attention_kernel(masked[1], device)


# The Hopper kernel: what it covers, and the order of its tiles


def on_hopper(one: Problem, device: Device = HOPPER) -> bool:
    """Whether the plan takes the Hopper kernel."""
    return planner.attention_kernel(one, device)[0].name == "sm90_flash_fwd"


def test_what_the_hopper_kernel_covers() -> None:
    one = problem(head_dim=128, head_dim_v=128)
    assert on_hopper(one) and on_hopper(dataclasses.replace(one, dtype="bfloat16", softcap=5.0, scale=-1.0))
    assert on_hopper(dataclasses.replace(one, left=3, right=0, heads=6, heads_kv=3))
    for representative in ("mean", "rank1"):
        of_groups = LSH(2, block_q=256, representative=representative)
        assert on_hopper(dataclasses.replace(one, reduction=of_groups))
    # A raw tile of 192 keys would fit shared memory, but not the 16 bits in which its offsets are kept.
    wide = dataclasses.replace(one, head_dim=192, head_dim_v=16, reduction=LSH(12))
    assert plan(wide, HOPPER).tile.tile_k == 128
    for changes in (
        {"dtype": "float32"},
        {"aligned": False},
        {"head_dim": 72},
        {"head_dim_v": 8},
        {"seqlen_q": 64},
        {"reduction": LSH(2, block_q=64)},
        {"reduction": LSH(16)},
        {"reduction": LSH(16, representative="rank1")},
        {"reduction": Energy(32)},
        {"family": "portable"},
        {"q_strides": (0, -128, 128)},
        {"v_strides": (2**39, 0, 128)},
    ):
        assert not on_hopper(dataclasses.replace(one, **changes)), changes  # type: ignore[arg-type]
    assert on_hopper(dataclasses.replace(one, v_strides=(2**39 - 8, 0, 128)))
    assert on_hopper(dataclasses.replace(one, seqlen_q=1, family="hopper"))
    for capability, device in DEVICES.items():
        assert on_hopper(one, device) == (capability == 90)


def test_where_other_queries_stand_for_those_of_a_reduction() -> None:
    rank1 = LSH(2, representative="rank1")
    energy, beside_exact_keys = problem(reduction=Energy(32)), problem(reduction=rank1, near=40)
    for one in energy, dataclasses.replace(energy, near=40, sinks=9), beside_exact_keys:
        assert planner.copies_queries(one, HOPPER)
        assert planner.copies_queries(dataclasses.replace(one, head_dim_v=128, softcap=5.0, left=3), HOPPER)
        for changes in (
            {"dtype": "float32"},
            {"aligned": False},
            {"head_dim": 72},
            {"seqlen_q": 64},
            {"family": "portable"},
        ):
            assert not planner.copies_queries(dataclasses.replace(one, **changes), HOPPER), changes  # type: ignore[arg-type]
        for capability, device in DEVICES.items():
            assert planner.copies_queries(one, device) == (capability == 90)
    # The Hopper kernel makes fewer columns of these.
    for left in problem(), problem(reduction=LSH(2), near=40), problem(reduction=rank1):
        assert not planner.copies_queries(left, HOPPER)


def test_where_a_rank_is_a_constant() -> None:
    def rank(one: Problem) -> tuple[int, int]:
        constants = dict(planner.attention_kernel(one, HOPPER)[0].constants)
        return constants["RANK"], constants["NEAR"]

    strides = (0, 256 * 48, 48)
    ranked = Ranked(48, strides, strides)
    alike = problem(ranked=ranked._replace(alike=True), near=40)
    for changes in {}, {"sinks": 9, "left": 50, "right": 0}, {"near": 0, "sinks": 9, "left": 50}:
        assert rank(dataclasses.replace(alike, **changes)) == (48, 1)  # type: ignore[arg-type]
    assert rank(dataclasses.replace(alike, near=0)) == (48, 0)
    beyond = dataclasses.replace(alike, near=0, sinks=9, left=50, seqlen_q=70, seqlen_k=200, right=0)
    assert rank(beyond) == (48, 0)  # no query sees a sink
    for other in None, ranked, ranked._replace(copied=True):
        assert rank(dataclasses.replace(alike, ranked=other)) == (0, 0)
    # The portable kernel reads it.
    asked = [dataclasses.replace(alike, ranked=x, family="portable") for x in (ranked, alike.ranked)]
    assert planner.attention_kernel(asked[0], HOPPER) == planner.attention_kernel(asked[1], HOPPER)


def test_a_rank_that_is_a_constant_changes_nothing_else() -> None:
    strides = (0, 256 * 64, 64)
    for head_dim in range(32, 257, 16):
        one = problem(head_dim=head_dim, head_dim_v=head_dim, near=40, ranked=Ranked(16, strides, strides))
        read = plan(one, HOPPER)
        for rank in range(16, head_dim, 16):
            ranked = Ranked(rank, strides, strides, alike=True)
            found = plan(dataclasses.replace(one, ranked=ranked), HOPPER)
            constants = dict(read.attention.constants) | {"RANK": rank, "NEAR": 1}
            assert dict(found.attention.constants) == constants
            kernel = dataclasses.replace(read.attention, constants=found.attention.constants)
            assert found == dataclasses.replace(read, attention=kernel)


@pytest.mark.parametrize(
    ("head_dim", "block_q", "seqlen_q", "blocks"),
    [(64, 64, 130, 6), (128, 128, 130, 8), (256, 128, 70, 6), (256, 65536, 70, 6), (72, 128, 130, 8)],
)
def test_every_row_of_other_queries_has_a_thread_block(
    asserting: Callable[..., None], head_dim: int, block_q: int, seqlen_q: int, blocks: int
) -> None:
    one = problem(reduction=Energy(32, block_q=block_q), head_dim=head_dim, seqlen_q=seqlen_q)
    step, parts = planner.copied_queries(one)
    rows = planner.copied_rows(one)
    assert step.blocks == blocks == 2 * parts * -(-seqlen_q // block_q)
    assert (parts - 1) * rows < min(block_q, seqlen_q) <= parts * rows
    asserting(step.kernel, f"kThreads == {step.kernel.threads}", f"kRows == {rows}")


@given(problems(hopper=True), devices)
def test_asking_for_the_hopper_kernel_where_it_cannot_run_changes_nothing(
    one: Problem, device: Device
) -> None:
    asked = dataclasses.replace(one, family="hopper", seqlen_q=max(65, one.seqlen_q))
    left = dataclasses.replace(asked, family=None)
    assert planner.attention_kernel(asked, device) == planner.attention_kernel(left, device)


def test_every_even_shape_has_a_hopper_tile() -> None:
    for head_dim in range(16, 257, 16):
        for head_dim_v in range(16, 257, 16):
            for right in (None, 0):
                found = planner.hopper_kernel(
                    problem(head_dim=head_dim, head_dim_v=head_dim_v, right=right), HOPPER
                )
                assert found is not None
                kernel, tile = found
                assert kernel.shared_bytes <= HOPPER.shared_bytes and tile.tile_k >= 64
                # Registers of a thread for scores, weights and output, beside which it needs some thirty.
                held = tile.tile_k // 2 + tile.tile_k // 4 + head_dim_v // 2
                assert held <= {192: 128, 128: 208}[tile.block_m]


@given(problems(hopper=True), hoppers)
def test_the_order_of_the_hopper_kernel(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    chosen = plan(one, device)
    assume(chosen.attention.specific)
    heads = one.batch * one.heads
    tiles = chosen.row_blocks * heads
    assert 1 <= chosen.section <= heads
    consumers = chosen.tile.block_m // 64
    works = chosen.works
    assert works == tiles + chosen.shared_tiles * (consumers - 1)
    assert chosen.blocks == min(works, device.multiprocessors)
    uneven = (one.left, one.right) != (None, None) or one.seqlen_k >= planner.HOPPER_LONG_KEYS
    uneven |= 0 < one.seqlen_q % chosen.tile.block_m <= chosen.tile.block_m - 64
    assert chosen.dynamic == (uneven and works > device.multiprocessors)
    assert chosen.turns == ((one.left, one.right) == (None, None))
    assert 0 <= chosen.shared_first <= chosen.shared_first + chosen.shared_tiles <= tiles
    assert not chosen.shared_tiles or one.reduction is None
    if tiles > 10000:
        return
    # As the kernel does it: every consumer's part of every tile of every head once, and of a section the last rows first.
    seen = []
    for number in range(works):
        work, parts = number, range(consumers)
        beyond = number - chosen.shared_first
        if beyond >= chosen.shared_tiles * consumers:
            work -= chosen.shared_tiles * (consumers - 1)
        elif beyond >= 0:
            work, parts = chosen.shared_first + beyond // consumers, [beyond % consumers]
        of_section = chosen.section * chosen.row_blocks
        first_head = work // of_section * chosen.section
        here = min(chosen.section, tiles // chosen.row_blocks - first_head)
        place = (first_head + work % of_section % here, work % of_section // here)
        seen += [(*place, part) for part in parts]
    assert sorted(seen) == sorted(itertools.product(range(heads), range(chosen.row_blocks), range(consumers)))


@pytest.mark.parametrize(
    ("heads", "head_dim", "seqlen", "causal", "shared"),
    [
        (
            10,
            128,
            2048,
            False,
            (132, 28),
        ),  # the last 28 of 160 tiles would take a second round of all multiprocessors
        (10, 64, 8192, False, (396, 34)),
        (16, 128, 2048, False, (132, 0)),  # parts of the last 124 would take more than one round
        (16, 128, 1056 * 128, False, (16896, 0)),
        (10, 128, 512, False, (0, 40)),
        (10, 128, 1024, True, (0, 20)),  # the longest
        (32, 128, 4096, True, (0, 0)),
    ],
)
def test_tiles_that_consumers_share_out(
    heads: int, head_dim: int, seqlen: int, causal: bool, shared: tuple[int, int]
) -> None:
    size = dict(dtype="bfloat16", head_dim=head_dim, head_dim_v=head_dim, seqlen_q=seqlen, seqlen_k=seqlen)
    one = problem(batch=1, heads=heads, heads_kv=heads, right=0 if causal else None, **size)
    chosen = plan(one, HOPPER)
    assert (chosen.shared_first if chosen.shared_tiles else shared[0], chosen.shared_tiles) == shared
    assert (f"share each of {shared[1]} tiles" in explain._tiles(chosen)) == bool(shared[1])


# Values


@given(problems(), devices)
def test_a_plan_is_a_value(one: Problem, device: Device) -> None:
    assume(small_enough(one))
    chosen = plan(one, device)
    assert plan(dataclasses.replace(one), dataclasses.replace(device)) is chosen
    assert plan.__wrapped__(one, device) == chosen
    # Printable: what is printed says everything.
    assert eval(repr(chosen), {x.__name__: x for x in (Plan, Kernel, Prepare, Split, Step, Tile)}) == chosen


@pytest.mark.parametrize(
    "value", [plan(problem(), AMPERE), AMPERE, *planner.attention_kernel(problem(), AMPERE)]
)
def test_values_are_frozen(value: object) -> None:
    name = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 1)
    assert isinstance(hash(value), int)


# What is refused


@pytest.mark.parametrize("reduction", [None, LSH(2)], ids=["exact", "G2"])
def test_too_many_blocks(reduction: LSH | None) -> None:
    # One head more than a launch has blocks, with one row each.
    heads_kv = 2**15 if reduction is None else 1  # exact heads with the same keys would be packed
    one = problem(batch=2**16, heads=2**15, heads_kv=heads_kv, seqlen_q=1, reduction=reduction)
    text = (
        f"the problem needs {2**31} thread blocks, more than the {2**31 - 1} of one launch. "
        "Split the batch into several calls."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        plan(one, AMPERE)
    fits = dataclasses.replace(one, batch=2**16 - 1)
    assert plan(fits, AMPERE).blocks == (2**16 - 1) * 2**15


def test_too_many_blocks_of_the_preparation() -> None:
    """Long keys for few queries: it is the transpose that does not fit."""
    one = problem(batch=2**10, heads=2, heads_kv=2, seqlen_q=1, seqlen_k=2**27, reduction=LSH(2))
    assert plan(dataclasses.replace(one, reduction=None), AMPERE).blocks == 2**11
    with pytest.raises(
        ValueError, match=r"thread blocks, more than the 2147483647 of one launch\. Split the batch"
    ):
        plan(one, AMPERE)


@given(st.integers(10, 79), st.integers(0, 7))
def test_a_device_that_is_too_old(capability: int, index: int) -> None:
    text = (
        f"GPU {index} has compute capability {capability // 10}.{capability % 10}; cudistr's kernels need 8.0 "
        "(Ampere) or newer. Use another GPU, or NumPy arrays, which run on the CPU."
    )
    with pytest.raises(UnsupportedDeviceError, match=f"^{re.escape(text)}$"):
        planner.check_device(Device(capability, 48 * 1024), index)


@pytest.mark.parametrize("device", DEVICES.values(), ids=[f"sm_{c}" for c in DEVICES])
def test_devices_that_are_new_enough(device: Device) -> None:
    planner.check_device(device, 0)


# What Python and the kernels must agree on. The compiler is the judge; it needs no GPU.


@pytest.fixture
def nvrtc() -> None:
    pytest.importorskip("cupy", reason="NVRTC comes with the extra cuda12 or cuda13")


@pytest.fixture
def asserting(nvrtc: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """asserting(kernel, *conditions) compiles with a static_assert for each condition behind the kernel."""
    unit = compiler.unit

    def check(kernel: Kernel, *conditions: str) -> None:
        lines = "".join(f'static_assert({c}, "{c}");\n' for c in conditions)
        monkeypatch.setattr(compiler, "unit", lambda one: unit(one) + lines)
        compiler.compile_cubin(kernel, "sm_90a" if kernel.specific else "sm_80")

    return check


VARIANTS = {
    "float16": {},
    "bfloat16 v24": {"dtype": "bfloat16", "head_dim_v": 24},
    "float32 72 v256": {"dtype": "float32", "head_dim": 72, "head_dim_v": 256},
    "float16 256": {"head_dim": 256, "head_dim_v": 256},
    "float16 few queries": {"seqlen_q": 9, "head_dim_v": 256},
    "float16 G2": {"reduction": LSH(2)},
    "bfloat16 G5 padded": {"dtype": "bfloat16", "head_dim": 40, "reduction": LSH(5, block_q=64)},
    "float32 G8 mean": {"dtype": "float32", "reduction": LSH(8, representative="mean")},
    "bfloat16 G5 rank1": {"dtype": "bfloat16", "head_dim": 40, "reduction": LSH(5, representative="rank1")},
    "float32 keep 48 of 72": {"dtype": "float32", "head_dim": 72, "reduction": Energy(48)},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_shared_memory_and_threads_are_those_of_the_kernel(
    asserting: Callable[..., None], changes: dict[str, object]
) -> None:
    kernel, _ = planner.attention_kernel(problem(**changes), AMPERE)
    asserting(kernel, f"sizeof(SharedStorage) == {kernel.shared_bytes}", f"kThreads == {kernel.threads}")


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "right"),
    [(128, 128, None), (64, 64, 0), (48, 112, 0), (256, 256, None), (80, 16, None)],
)
def test_shared_memory_of_the_hopper_kernel(
    asserting: Callable[..., None], head_dim: int, head_dim_v: int, right: int | None
) -> None:
    found = planner.hopper_kernel(problem(head_dim=head_dim, head_dim_v=head_dim_v, right=right), HOPPER)
    assert found is not None
    kernel, tile = found
    asserting(
        kernel,
        f"sizeof(SharedStorage) == {kernel.shared_bytes}",
        f"kThreads == {kernel.threads}",
        # The boxes of the tensor maps.
        f"QueryTile::kPanelColumns == {planner.panel_columns(head_dim)}",
        f"KeyTile::kPanelColumns == {planner.panel_columns(head_dim)}",
        f"ValueTile::kPanelColumns == {planner.panel_columns(head_dim_v)}",
        f"QueryTile::kRows == {tile.block_m} && KeyTile::kRows == {tile.tile_k} && ValueTile::kRows == {tile.tile_k}",
    )


@pytest.mark.parametrize("difference", [-16, 16])
def test_a_wrong_number_of_bytes_does_not_compile(nvrtc: None, difference: int) -> None:
    kernel, _ = planner.attention_kernel(problem(), AMPERE)
    constants = dict(kernel.constants)
    constants["SHARED_BYTES"] += difference
    wrong = dataclasses.replace(kernel, constants=tuple(constants.items()))
    with pytest.raises(CompileError, match="the plan and the kernel disagree on shared memory") as caught:
        compiler.compile_cubin(wrong, "sm_80")
    assert f"SHARED_BYTES={kernel.shared_bytes + difference}" in str(caught.value)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 256])
def test_threads_and_tasks_of_the_preparation(asserting: Callable[..., None], head_dim: int) -> None:
    kernel = planner.prepare_kernel("float16", head_dim, True)
    units = planner.prepare(1, 1000, 1, head_dim, 64, None)
    per_block = math.ceil(units.order_units / units.order_blocks)
    asserting(
        kernel,
        f"kThreads == {kernel.threads}",
        f"kUnits == {per_block}",
        f"kTile == {planner.TRANSPOSE_TILE}",
        f"kProjections == {launch.MAX_PROJ}",
    )


@pytest.mark.parametrize("head_dim_v", [1, 6, 8, 12, 20, 32, 40, 64, 100, 128, 130, 256])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_threads_and_rows_of_merging(asserting: Callable[..., None], dtype: str, head_dim_v: int) -> None:
    merge = planner.merge_kernel(dtype, head_dim_v)
    asserting(
        merge,
        f"kWarps * kWarpSize == {merge.threads}",
        f"kRows == {planner.merge_rows(head_dim_v, 16 // planner.ITEMSIZE[dtype])}",
        f"kMaxShards == {normalize.MAX_SHARDS}",
    )
    shard = planner.merge_shard_kernel(dtype, dtype, "float32", head_dim_v)
    asserting(
        shard,
        f"kWarps * kWarpSize == {shard.threads}",
        f"kRows == {planner.merge_rows(head_dim_v, 4)}",
    )


@pytest.mark.parametrize("head_dim", [8, 64, 72, 256])
def test_threads_and_units_of_columns(asserting: Callable[..., None], head_dim: int) -> None:
    for group_size in (n for n in range(1, head_dim // 8 + 1) if head_dim % (8 * n) == 0):
        weights = planner.weights("float16", head_dim, group_size, 5, 7)
        asserting(
            weights.kernel,
            f"kThreads == {weights.kernel.threads}",
            f"5 * ((7 + kUnits - 1) / kUnits) == {weights.blocks}",
        )
    order = planner.energy_order("float16", head_dim, True, 7)
    asserting(order.kernel, f"kThreads == {order.kernel.threads}", f"{order.blocks} == 7")
    sums = planner.key_energy("float16", head_dim, 1000, 513)
    asserting(
        sums.kernel,
        f"kThreads == {sums.kernel.threads}",
        f"({1000 * planner.key_spans(513)} + kUnits - 1) / kUnits == {sums.blocks}",
        f"kSpanKeys == {planner.ENERGY_KEYS}",
    )


def test_threads_and_rows_of_projecting(asserting: Callable[..., None]) -> None:
    kernel = planner.project_kernel(problem(), 48)
    rows = planner.project_rows(problem(seqlen_q=1, seqlen_k=1), kernel, 1, HOPPER)
    asserting(
        kernel, f"kThreads == {kernel.threads}", f"kTileRows == {rows}", f"kGroup == {planner.PROJECT_GROUP}"
    )


def test_columns_of_a_projection_are_shared_out() -> None:
    smallest = min(device.shared_bytes for device in DEVICES.values())
    for dtype in DTYPES:
        for head_dim in range(8, 257, 8):
            one = problem(dtype=dtype, head_dim=head_dim)
            for columns in (*range(16, head_dim, 16), head_dim):
                kernel = planner.project_kernel(one, columns)
                made = dict(kernel.constants)["COLUMNS"]
                slices = -(-columns // made)
                assert kernel.shared_bytes <= smallest
                assert (
                    made < columns / slices + planner.PROJECT_GROUP
                )  # none has much more to do than another


@given(
    st.integers(1, 64), st.integers(1, 40000), st.integers(1, 40000), st.integers(1, 3), st.integers(1, 200)
)
def test_thread_blocks_that_project_end_at_the_same_time(
    batch: int, seqlen_q: int, seqlen_k: int, slices: int, multiprocessors: int
) -> None:
    one = problem(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    device = dataclasses.replace(HOPPER, multiprocessors=multiprocessors)
    kernel = planner.project_kernel(one, 48)
    rows = planner.project_rows(one, kernel, slices, device)
    tile = planner.project_rows(problem(seqlen_q=1, seqlen_k=1), kernel, 1, HOPPER)
    assert rows % tile == 0

    def rounds(rows: int) -> int:
        blocks = slices * batch * (one.heads * -(-seqlen_q // rows) + one.heads_kv * -(-seqlen_k // rows))
        return -(-blocks // (planner.PROJECT_BLOCKS * multiprocessors))

    # Tiles one after another: little more than if every thread block had one.
    assert rounds(rows) * (rows // tile) <= (1 + planner.PROJECT_START) * rounds(tile)


LAYOUTS = {
    "AttentionParams": (planner.attention_kernel(problem(), AMPERE)[0], launch._ATTENTION),
    "HopperParams": (planner.attention_kernel(problem(), HOPPER)[0], launch._HOPPER),
    "PrepareParams": (planner.prepare_kernel("float16", 64, True), launch._PREPARE),
    "WeightsParams": (planner.weights("float16", 64, 2, 1, 1).kernel, launch._WEIGHTS),
    "KeyEnergyParams": (planner.key_energy("float16", 64, 1, 1).kernel, launch._KEY_ENERGY),
    "EnergyOrderParams": (planner.energy_order("float16", 64, True, 1).kernel, launch._ENERGY_ORDER),
    "ProjectParams": (planner.project_kernel(problem(), 48), launch._PROJECT),
    "LowRankRowsParams": (planner.lowrank_rows_kernel("float16", 64, True), launch._LOWRANK_ROWS),
    "LowRankSumsParams": (planner.lowrank_sums_kernel("float16", 64, True), launch._LOWRANK_SUMS),
    "LowRankFactorsParams": (
        planner.lowrank_factors_kernel("float16", 64, 32, AMPERE),
        launch._LOWRANK_FACTORS,
    ),
    "MergeParams": (planner.merge_kernel("float16", 64), launch._MERGE),
    "MergeShardParams": (
        planner.merge_shard_kernel("float16", "float16", "float32", 64),
        launch._MERGE_SHARD,
    ),
    "MergeSplitsParams": (planner.merge_splits_kernel("float16", 64), launch._MERGE_SPLITS),
}


WEIGHTED = planner.attention_kernel(problem(reduction=LSH(2, representative="rank1")), AMPERE)[0]
RANKS = Ranked(16, (0, 0, 16), (0, 0, 16))
COPIED = RANKS._replace(columns=64, copied=True)
NEAR = [
    (problem(**{"near": 40, **options}), launch._beside_exact_keys(of))
    for options, of in (
        ({"reduction": LSH(2)}, launch._ATTENTION),
        ({"reduction": LSH(2, representative="rank1")}, launch._WEIGHTED),
        ({"reduction": LSH(4), "dtype": "bfloat16"}, launch._HALF),
        ({"reduction": Energy(32)}, launch._BY_ENERGY),
    )
]


def attention_of(one: Problem, device: Device = AMPERE) -> Kernel:
    return planner.attention_kernel(one, device)[0]


BY_ENERGY = planner.attention_kernel(problem(reduction=Energy(32)), AMPERE)[0]
FOURS = problem(dtype="bfloat16", reduction=LSH(4))


@pytest.mark.parametrize(
    ("struct", "kernel", "layout"),
    [
        *((struct, *of) for struct, of in LAYOUTS.items()),
        ("AttentionParams", WEIGHTED, launch._WEIGHTED),
        ("AttentionParams", BY_ENERGY, launch._BY_ENERGY),
        ("AttentionParams", planner.attention_kernel(FOURS, AMPERE)[0], launch._HALF),
        ("HopperParams", planner.attention_kernel(FOURS, HOPPER)[0], launch._HOPPER_HALF),
        ("PrepareParams", planner.prepare_kernel("bfloat16", 64, True, half=1), launch._PREPARE_HALF),
        *(("AttentionParams", attention_of(one), of) for one, of in NEAR),
        ("HopperParams", attention_of(NEAR[0][0], HOPPER), launch._HOPPER_KEPT),
        ("HopperParams", attention_of(NEAR[2][0], HOPPER), launch._HOPPER_KEPT_HALF),
        ("AttentionParams", attention_of(problem(ranked=RANKS)), launch._RANKED),
        ("HopperParams", attention_of(problem(ranked=RANKS), HOPPER), launch._HOPPER_RANKED),
        ("HopperParams", attention_of(problem(ranked=COPIED), HOPPER), launch._HOPPER_COPIED),
    ],
    ids=[
        *LAYOUTS,
        *("weighted", "by energy", "half", "half on Hopper", "prepare half"),
        *(
            "near",
            "near weights",
            "near halves",
            "near energy",
            "near on Hopper",
            "near halves on Hopper",
            "ranks",
            "ranks on Hopper",
            "copied",
        ),
    ],
)
def test_parameters_lie_where_the_kernel_reads_them(
    asserting: Callable[..., None], struct: str, kernel: Kernel, layout: np.dtype
) -> None:
    assert layout.names is not None and layout.fields is not None
    offsets = {}
    for name in layout.names:
        offsets[in_struct(name, struct)] = layout.fields[name][1]
    asserting(
        kernel,
        f"sizeof({struct}) == {layout.itemsize}",
        # offsetof, which NVRTC lacks
        *(f"(i64)__INTADDR__(&(({struct}*)0)->{name}) == {offset}" for name, offset in offsets.items()),
    )
    # A call packs tensor maps and addresses by themselves and puts the rest behind them.
    kinds = [layout[name] for name in layout.names]
    maps, addresses = kinds.count(np.dtype("V128")), kinds.count(np.dtype("u8"))
    assert kinds[:maps] == [np.dtype("V128")] * maps
    assert kinds[maps : maps + addresses] == [np.dtype("u8")] * addresses


# Of the structs LowRankRowsParams and LowRankSumsParams, within one of their own.
OF_CALL = (
    "q_batch",
    "q_head",
    "q_row",
    "k_batch",
    "k_head",
    "k_row",
    "heads_kv",
    "heads_per_kv",
    "seqlen_k",
    "samples",
)


def in_struct(name: str, struct: str) -> str:
    """A parameter as the kernel's struct names it: MergeParams has arrays of pointers, and passes are a struct."""
    if struct.startswith("LowRank"):
        return f"call.{name}" if name in OF_CALL else re.sub("^(near|exact)_", "near.", name)
    within = {
        r"(out|lse)(\d+)": r"\1s[\2]",
        r"pass_(\w+)(\d)": r"passes.\1[\2]",
        r"near_(start|stop)": r"passes.near.\1",
        r"exact_(rows|keys)": r"passes.near.\1",
        "exact_passes": "passes.exact",
        "passes": "passes.count",
    }
    for pattern, new in within.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    return name


def test_a_wrong_layout_would_be_noticed(asserting: Callable[..., None]) -> None:
    kernel, layout = LAYOUTS["MergeParams"]
    with pytest.raises(CompileError, match="static assertion"):
        asserting(kernel, f"sizeof(MergeParams) == {layout.itemsize + 8}")
