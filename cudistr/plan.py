"""Problem and device in, a frozen, printable :class:`Plan` out: pure functions of values, tested without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cudistr.errors import UnsupportedDeviceError
from cudistr.normalize import SMALL_SEQLEN_Q, Problem, exact, near_keys
from cudistr.reductions import BLOCK_Q_DEFAULT, LSH, Energy

__all__ = [
    "Device",
    "Kernel",
    "LowRankSteps",
    "Pass",
    "Plan",
    "Prepare",
    "Split",
    "Step",
    "Tile",
    "TileKey",
    "attention_kernel",
    "candidate_tiles",
    "copied_queries",
    "copied_rows",
    "copies_queries",
    "decide_kernel",
    "draw_kernel",
    "draw_shares",
    "energy_order",
    "half_limit",
    "hopper_kernel",
    "keeps_keys",
    "key_energy",
    "key_spans",
    "lowrank_columns",
    "lowrank_factors_kernel",
    "lowrank_keys",
    "lowrank_rows_kernel",
    "lowrank_steps",
    "lowrank_sums_kernel",
    "merge_kernel",
    "merge_rows",
    "merge_shard_kernel",
    "merge_splits_kernel",
    "passes",
    "plan",
    "portable_kernel",
    "prepare",
    "prepare_kernel",
    "probe_kernel",
    "probe_splits",
    "project_kernel",
    "project_rows",
    "step_clocks",
    "tile_clocks",
    "tile_kernel",
    "tile_key",
    "weights",
]

MIN_CAPABILITY = 80  # mma.sync of bfloat16, cp.async and 99 KB of shared memory begin here
MAX_BLOCKS = 2**31 - 1  # thread blocks along grid.x
MAX_BLOCKS_YZ = 2**16 - 1  # along the other axes
DTYPE_NUMBER = {"float16": 0, "bfloat16": 1, "float32": 2}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
PREPARE_THREADS = 128  # of a thread block of smxx_lsh_prepare.cu
TRANSPOSE_TILE = 64  # keys and columns of the tiles that they transpose
PREPARE_BLOCKS = 512  # thread blocks that keep a large GPU busy, before one transposes more than a tile
PREPARE_TILES = 8  # that a thread block transposes at most, if others are as many
AGAIN_BLOCKS = 4  # for each multiprocessor, of what transposes once more if it must
KEY_COLUMNS_MULTIPLE = 8  # rows of the transposed K are whole 16-byte chunks for 16-bit types
WEIGHTS_WARPS = 4  # of smxx_lsh_weights.cu, or as many as a block of queries takes
WEIGHTS_PRODUCTS = 36  # that one of its threads may have in registers
ENERGY_KEYS = 256  # keys that a thread of smxx_key_energy.cu sums
KEY_ENERGY_THREADS = 128
COPIED_THREADS = 256  # of smxx_copied_queries.cu
COPIED_ROWS = 4  # of one of its threads
PROJECT_THREADS = 256  # of smxx_project.cu
PROJECT_GROUP = 32  # columns that it makes at once
PROJECT_BYTES = 96 * 1024  # of shared memory that one of its thread blocks may have
PROJECT_TILES = 16  # of rows that one of them makes one after another, at most
PROJECT_BLOCKS = 2  # of them that a multiprocessor has registers for
PROJECT_START = 0.25  # of the time of a tile, that one of them takes before its first
MERGE_WARPS = 8  # of a thread block of smxx_merge.cu, smxx_merge_splits.cu and smxx_merge_shard.cu


@dataclass(frozen=True)
class Tile:
    """A thread block's share of the work.

    Attributes
    ----------
    block_m : int
        Queries per thread block.
    tile_k : int
        Keys per step of the loop.
    row_tiles : int
        16-row tiles per warp. With 2, every operand read from shared memory feeds two matrix instructions; with 1,
        shared memory is as busy as the tensor cores. Warpgroup products read it once for four warps, and have 1.
    """

    block_m: int
    tile_k: int
    row_tiles: int


@dataclass(frozen=True)
class TileKey:
    """The problems that share a measured tile; ``group_size`` is 0 for exact attention, ``small`` few queries.

    Columns that are kept by energy are groups of one, whose ``representative`` is "energy" and their number.
    """

    dtype: str
    tf32: bool
    head_dim: int
    head_dim_v: int
    group_size: int
    representative: str
    small: bool


@dataclass(frozen=True)
class Device:
    """What the plan needs to know of a GPU.

    Attributes
    ----------
    capability : int
        Compute capability times ten: 80, 86, 89, 90, ...
    shared_bytes : int
        Shared memory that one thread block may have, after opting in.
    multiprocessors : int
        How many of them there are.
    tiles : tuple of (TileKey, Tile)
        Tiles that ``cudistr tune`` found fastest there, instead of the planner's own.
    """

    capability: int
    shared_bytes: int
    multiprocessors: int = 132  # of an H100
    tiles: tuple[tuple[TileKey, Tile], ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A kernel by name and compile-time constants, with the launch values that follow from them."""

    name: str
    constants: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int = 0
    options: tuple[str, ...] = ()  # of the compiler
    specific: bool = False  # whether it is for one architecture alone, with an "a" behind its name


@dataclass(frozen=True)
class Prepare:
    """How the thread blocks of smxx_lsh_prepare.cu share its two tasks.

    Attributes
    ----------
    group_blocks : int
        Blocks of queries with one column order each, per head.
    order_units, order_blocks : int
        Blocks of queries in all whose columns are ordered by hash, and the thread blocks that order them.
    key_columns, key_blocks : int
        Row length of the transposed K, and tiles along it; 0 if K is not transposed.
    tiles : int
        Tiles of K to transpose, shared out evenly over the thread blocks.
    blocks : int
        Thread blocks in all. The first order columns.
    """

    group_blocks: int
    order_units: int
    order_blocks: int
    key_columns: int
    key_blocks: int
    tiles: int
    blocks: int


@dataclass(frozen=True)
class Step:
    """A kernel and its thread blocks."""

    kernel: Kernel
    blocks: int


@dataclass(frozen=True)
class Split:
    """How several thread blocks share the keys of a tile of queries, and why.

    Attributes
    ----------
    kernel : Kernel
        The kernel that merges what they found.
    splits : int
        Thread blocks that share a tile.
    row_warps, merge_blocks : int
        Warps of the merge that share a row, and its thread blocks.
    clocks, whole_clocks : int
        What :func:`split_clocks` estimates for the call with these splits, and without.
    """

    kernel: Kernel
    splits: int
    row_warps: int
    merge_blocks: int
    clocks: int
    whole_clocks: int


@dataclass(frozen=True)
class Plan:
    """What will run.

    Attributes
    ----------
    attention : Kernel
        The attention kernel.
    tile : Tile
        Its tile.
    row_blocks, blocks : int
        Tiles of queries per head, and thread blocks in all.
    section : int
        Heads, over all batches, whose tiles are taken in turn.
    dynamic : bool
        Whether thread blocks of the Hopper kernel take tiles from a counter, whoever is free first.
    turns : int
        Of the Hopper kernel, tiles that each of them begins with one consumer after another, where they may.
    prepare_kernel : Kernel or None
        What runs before it when the score product is grouped: the column order, and K transposed.
    prepare : Prepare or None
        Its thread blocks.
    key_energy : Step or None
        What follows where columns are kept by energy: sums over K's columns.
    again : Step or None
        Where K is transposed in float16: what transposes it as it is, if it turns out to have numbers beyond float16.
    columns : Step or None
        What comes last before attention: the weights of a group's columns, or the order of columns by energy.
    shared_first, shared_tiles, works : int
        Of the Hopper kernel: from which tile on how many are shared out, each consumer's part to a thread block; and
        what thread blocks take in all, whole tiles and such parts.
    packed : int
        Query heads whose rows, one head after another, share tiles, because they share keys and have few rows each.
    split : Split or None
        How thread blocks share keys, if one per tile of queries would leave the GPU idle.
    """

    attention: Kernel
    tile: Tile
    row_blocks: int
    blocks: int
    section: int
    dynamic: bool = False
    turns: int = 0
    shared_first: int = 0
    shared_tiles: int = 0
    works: int = 0
    prepare_kernel: Kernel | None = None
    prepare: Prepare | None = None
    again: Step | None = None
    key_energy: Step | None = None
    columns: Step | None = None
    packed: int = 1
    split: Split | None = None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Thread blocks along the axes of the launch: of the portable kernel, tiles of a section, sections, splits."""
        if self.attention.specific:
            return self.blocks, 1, 1
        splits = 1 if self.split is None else self.split.splits
        tiles = self.section * self.row_blocks
        return tiles, self.blocks // (tiles * splits), splits


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


MAX_PASSES = 5  # that a head makes: Passes in kernels_cu/tile/mask.cuh
ALL, BEFORE, NEAR, AFTER = range(4)  # parts of the keys: Passes::Part there


@dataclass(frozen=True)
class Pass:
    """Keys ``first`` to ``last - 1``, seen where ``low <= key - position of the query <= high``.

    ``reduced`` says whether their scores are. ``part`` is which of them: all, or those before, in, or after the blocks
    of keys near a query's block, see :func:`cudistr.normalize.near_keys`.
    """

    reduced: bool
    first: int
    last: int
    low: int
    high: int
    part: int = ALL


@functools.lru_cache(maxsize=1024)
def passes(problem: Problem) -> tuple[Pass, ...]:
    """Split a reduced problem into passes over its keys, such that a query sees every visible key in one of them.

    With the position p of a query and a key j, the passes are, as far as any query sees a key in them::

        exact    j < sinks,   j <= p - near     and the same for j >= p + near
        exact    |j - p| < near
        reduced  j >= sinks,  j <= p - near     and the same for j >= p + near

    Without exact keys there is one. At most five remain, exact ones first; three under a causal mask. Sinks come before
    near keys: the Hopper kernel begins with tiles of few keys. Where whole blocks stay exact, parts of the keys are
    in the place of bounds by ``near``.
    """
    keys, near, sinks = problem.seqlen_k, problem.near, problem.sinks
    # All that j - p can be, cut to what the mask lets through.
    low = max(1 - keys, -keys if problem.left is None else -problem.left)
    high = min(problem.seqlen_q - 1, keys + problem.seqlen_q if problem.right is None else problem.right)
    sides = ((low, -near), (near, high)) if near else ((low, high),)
    wanted = [Pass(False, 0, sinks, *side) for side in sides]
    wanted += [Pass(False, 0, keys, max(low, 1 - near), min(high, near - 1))] if near else []
    wanted += [Pass(True, sinks, keys, *side) for side in sides]
    position = keys - problem.seqlen_q  # of the first query; the last one sits at the last key
    if problem.exact_block != (1, 1):
        sinks = near_keys(problem).sinks
        parts = (BEFORE, AFTER) if near else (ALL,)
        wanted = [Pass(False, 0, sinks, low, high, part) for part in parts]
        wanted += [Pass(False, 0, keys, low, high, NEAR)] if near else []
        wanted += [Pass(True, sinks, keys, low, high, part) for part in parts]
        return tuple(x for x in wanted if _any_block_sees(problem, x, position))
    return tuple(
        x
        for x in wanted
        if x.first < x.last and max(x.low, x.first - keys + 1) <= min(x.high, x.last - 1 - position)
    )


def _any_block_sees(problem: Problem, own: Pass, position: int) -> bool:
    """Whether a query sees a key in a pass over a part of the keys."""
    near = near_keys(problem)
    rows = problem.seqlen_q if own.part == ALL else near.rows
    row = np.arange(0, problem.seqlen_q, rows)
    last_row = np.minimum(row + rows, problem.seqlen_q) - 1
    start = (row + near.start) // near.keys * near.keys
    stop = -(-(row + near.stop) // near.keys) * near.keys
    first = np.maximum(own.first, {NEAR: start, AFTER: stop}.get(own.part, 0))
    end = np.minimum(own.last, {BEFORE: start, NEAR: stop}.get(own.part, own.last))
    # Rows of a block from which on its last key is seen, and up to which its first one is.
    sees = np.maximum(row, first - own.high - position) <= np.minimum(last_row, end - 1 - own.low - position)
    return bool(((first < end) & sees).any())


def _group(problem: Problem) -> int:
    """Columns per group, 0 for exact attention. Kept columns are groups of one."""
    reduction = problem.reduction
    if reduction is None:
        return 0
    return reduction.group_size if isinstance(reduction, LSH) else 1


def _keep(problem: Problem) -> int:
    """Columns that are kept by energy, 0 if that is not how it is done."""
    return problem.reduction.keep if isinstance(problem.reduction, Energy) else 0


def _mean(problem: Problem) -> bool:
    """Whether the mean of a group's columns of Q stands for it."""
    return isinstance(problem.reduction, LSH) and problem.reduction.representative == "mean"


def _weighted(problem: Problem) -> bool:
    """Whether the columns of a group have weights."""
    return isinstance(problem.reduction, LSH) and problem.reduction.representative == "rank1"


def keeps_keys(problem: Problem) -> bool:
    """Whether a problem with groups, or with columns kept by energy, leaves some keys exact in passes of its kernel.

    Beside weights, and columns kept by energy, the Hopper kernel takes other queries for that, see
    :func:`copies_queries`.
    """
    return problem.reduction is not None and bool(problem.near or problem.sinks)


def _exact_keys(problem: Problem, tile: Tile) -> int:
    """Keys per step of the portable kernel of those that stay exact beside groups; 0 if none do.

    Few, since ptxas has to fit two loops, and this is the short one; a part of a block that stays exact.
    """
    if not keeps_keys(problem):
        return 0
    return min(tile.tile_k, 64 if problem.head_dim_v <= 64 else 32)


def _depth(head_dim: int, group: int, keep: int) -> int:
    """Terms of the score product, padded to whole matrix instructions."""
    return keep or _round_up(head_dim // max(group, 1), 16)


def _half(problem: Problem) -> bool:
    """Whether the columns of a group are summed in float16.

    Two bfloat16 are summed as they are, with one rounding; more would round more often, or be converted one by one.
    Parts of the time that this took with groups of four of 128 columns (one H100, 16k tokens, N = 8k): 0.86 on the
    Hopper kernel, 0.94 on the portable one.
    """
    more = isinstance(problem.reduction, LSH) and problem.reduction.group_size > 2
    return problem.dtype == "bfloat16" and more and not _weighted(problem)


def half_limit(problem: Problem) -> float:
    """What numbers of Q and K may be at most where the columns of a group are summed in float16.

    Sums then have its range. And what numbers lack that it cannot hold, 2**-25 each, changes no score by more than
    2 * 2**-25 * limit * head_dim * scale, which is 2**-10 at most: less than the rounding of such numbers does.
    """
    most = 2.0**15 / _group(problem)
    spread = abs(problem.scale) * problem.head_dim
    return min(most, 2.0**14 / spread) if spread else most


def fuses_in_shared(problem: Problem, device: Device) -> bool:
    """Whether the columns of a group are summed within shared memory, rather than on the way from there to the product.

    This is for what cannot be summed ahead. On the way, nothing waits for Khat, but every warp makes the sums anew, and
    an operand takes group_size reads. On an H100 (bfloat16, 16k tokens, hidden size 2048; N = 4k / 16k), in shared
    memory and on the way: LSH(2), 128 columns, 1.875 / 6.42 and 1.725 / 5.94 ms; 64 columns 2.00 / 6.76 and 1.86 / 6.43
    ms; LSH(4), 64 columns, 1.71 / 5.89 and 1.75 / 6.16 ms.
    """
    reduction = problem.reduction
    if not isinstance(reduction, LSH):
        return False
    # float32 has no matrix load that transposes. The others are those for which ptxas has no registers left.
    crowded = reduction.representative != "sample" or (problem.head_dim_v == 64 and device.capability < 90)
    return problem.dtype == "float32" or reduction.group_size > 2 or crowded


def fuses_ahead(problem: Problem, device: Device, tile: Tile) -> bool:
    """Whether Khat of a tile of keys is made beside the product of the tile before, in two tiles of shared memory.

    Each sum is made once, nothing waits for it, and there is one barrier a step. Parts of the time on the way or within
    shared memory, of whole calls (one H200, 8k tokens, full): bfloat16 LSH(2), 128 columns 0.87, 64 columns 0.97;
    LSH(4) 0.89 and 0.93; float16 0.85, 0.93, 0.86 and 0.99. Larger groups, weights and, from sm_120 on, bfloat16 have
    no registers for it.
    """
    columns, wide = problem.head_dim_v, problem.dtype == "bfloat16"
    if not 2 <= _group(problem) <= 4 or _weighted(problem) or ITEMSIZE[problem.dtype] != 2:
        return False
    return (
        problem.aligned and tile.block_m >= 128 and columns <= 128 and not (wide and device.capability >= 120)
    )


def fusion(problem: Problem, device: Device, tile: Tile) -> int:
    """Where the columns of a group are summed: FUSE_IN_SHARED of the portable kernel."""
    return 2 if fuses_ahead(problem, device, tile) else int(fuses_in_shared(problem, device))


def value_stages(problem: Problem, device: Device, tile: Tile) -> int:
    """Tiles of V in shared memory.

    With two, the values of the next step are copied while those of this one are multiplied, instead of while its keys
    are, which takes less time than a copy. Parts of the time with one (one H100, bfloat16, N = 4k / 16k, full): exact,
    64 columns 0.94 / 0.93, 128 columns 0.98 / 0.99; LSH(2), 64 columns 0.96 / 0.96; LSH(4), 128 columns 0.96 / 0.97,
    but 64 columns 1.04 / 1.04; exact, N = 4k, 192 columns 1.07, 256 columns 1.02; 64 columns where heads differ in rank
    1.01 to 1.05 (one H200). Exact with 128 columns spills before sm_90, and LSH(2) summed on the way. As many thread
    blocks have to fit as with one. Two tiles of K too were slower.
    """
    columns = problem.head_dim_v
    if ITEMSIZE[problem.dtype] != 2 or tile.block_m < 128 or columns > 128:
        return 1
    if _keep(problem) or not problem.aligned or (problem.ranked is not None and columns <= 64):
        return 1
    wide = columns > 64
    if (
        _group(problem)
        and not fuses_ahead(problem, device, tile)
        and wide != fuses_in_shared(problem, device)
    ):
        return 1
    if not _group(problem) and wide and device.capability < 90:
        return 1

    # Registers leave room for no more than two thread blocks.
    one, two = (min(2, _fitting(device, _shared_bytes(problem, device, tile, n))) for n in (1, 2))
    return 2 if two >= max(1, one) else 1


def _fitting(device: Device, smem: int) -> int:
    """Thread blocks with so much shared memory that a multiprocessor has room for; the driver takes a KB of each."""
    return (device.shared_bytes + 1024) // (smem + 1024)


def shared_bytes(problem: Problem, device: Device, tile: Tile) -> int:
    """Shared memory of the attention kernel; a ``static_assert`` in the kernel compares it with its own."""
    return _shared_bytes(problem, device, tile, value_stages(problem, device, tile))


def _shared_bytes(problem: Problem, device: Device, tile: Tile, stages: int) -> int:
    itemsize, head_dim, group, keep = (
        ITEMSIZE[problem.dtype],
        problem.head_dim,
        _group(problem),
        _keep(problem),
    )
    pad = 16 // itemsize
    members = max(group, 1)
    depth = _depth(head_dim, group, keep)
    columns_v = _round_up(problem.head_dim_v, 16)
    queries = tile.block_m * (depth + pad) * itemsize
    if keep:
        keys = head_dim * (tile.tile_k + 8) * itemsize
        table = head_dim * 8 + (head_dim - keep + tile.tile_k) * 4
    elif group:
        keys = (members + fusion(problem, device, tile)) * depth * (tile.tile_k + 8) * itemsize
        place = 4 if fuses_ahead(problem, device, tile) else 8
        table = members * depth * (place + _weighted(problem) * itemsize)
    else:
        keys = tile.tile_k * (depth + pad) * itemsize
        table = 0
    values = stages * tile.tile_k * (columns_v + pad) * itemsize
    loop = queries + keys + values + table
    if keeps_keys(problem):  # the loop over these takes turns with it, and has all columns of Q and K
        own_keys, columns = _exact_keys(problem, tile), _round_up(head_dim, 16)
        elements = (tile.block_m + own_keys) * (columns + pad) + stages * own_keys * (columns_v + pad)
        loop = max(loop, elements * itemsize)
    out = tile.block_m * (columns_v + pad) * itemsize
    return max(_round_up(loop, 16), out)


def _longest_keys(problem: Problem, device: Device, group: int) -> int:
    """Keys per step that a 128-row tile of a 16-bit type can have without spilling.

    A thread holds row_tiles * (columns_v / 2 + tile_k / 2) accumulators of its 255 registers; what ptxas makes of
    the rest differs between architectures, and CI compiles every variant for all of them and refuses a spill.
    Longer is faster: against FlashAttention-2 in one run on one H200 (bfloat16, 16k tokens, hidden size 2048),
    N = 4k / 16k, 64 columns: 128 keys 1.11 / 1.07, 96 keys 1.10 / 1.06, 64 keys 1.00 / 0.98; 128 columns: 64 keys
    1.06 / 1.02, 48 keys 1.04 / 1.01. Where heads differ in rank, parts of the time (one H200, bfloat16, 8k tokens, full
    / causal), 64 columns: 96 keys 0.93 / 0.96 of 64 keys, but 1.03 / 1.04 where whole blocks of keys stay exact.
    """
    columns, wide = problem.head_dim_v, problem.dtype == "bfloat16"  # bfloat16: see _crowded
    square = problem.head_dim == columns
    narrow = problem.head_dim <= columns and problem.head_dim % 16 == 0  # others spill
    plain = problem.aligned and problem.softcap is None and problem.scale > 0
    if problem.ranked is not None and problem.aligned:
        if columns <= 32:
            return 128
        # No pass ends within a tile of 64 where whole blocks of keys stay exact.
        if columns == 64 and problem.exact_block == (1, 1) and (wide or square):
            return 96
        spills = not wide and 96 < columns <= 128 and square and device.capability < 90
        return 48 if spills else 64
    # From sm_100 on ptxas keeps more beside them; grouped kernels suffer from it on sm_100 and its kin only.
    crowded = device.capability >= 100 and not (group and device.capability >= 120)
    if columns <= 64:
        if columns <= 32 and problem.aligned and (square or not group):
            return 128
        if columns == 64 and square and plain and not crowded:
            capability = device.capability
            if keeps_keys(problem) and _weighted(problem):
                fewer = capability >= 120
            elif _keep(problem):  # sums of the rest take registers
                fewer = capability < 90 or (wide and capability >= 120)
            else:
                fewer = wide and group == 2 and (capability == 90 or capability >= 120)
            return 96 if fewer else 128
        return 64 if group or not plain else 96
    if columns <= 128:
        if not problem.aligned or (group and not (plain and square)):
            return 32
        if group:
            return 64 if columns <= 96 or not crowded else 32
        return 64 if (square or narrow) and plain and not crowded else 48
    # O takes up to 128 registers of a 16-row warp. On one H100 (N = 8k) 128 keys took 0.92 of the time of 64 at 192
    # columns, and 96 keys 0.97 at 256.
    if group or not (square and plain) or crowded:
        return 64
    return 128 if columns <= 192 else 96


def _longest_shared_keys(columns: int, group: int, keys: int) -> int:
    """The same where thread blocks may share keys, which takes a few registers of those that are full.

    With 64 columns and two tiles of values, 128 keys spill.
    """
    if group and columns <= 128:
        return min(keys, 64 if columns <= 64 else 32)
    if columns > 128:
        return min(keys, 64)
    if columns == 64:
        return min(keys, 96)
    return keys - 16 if columns > 64 and keys > 32 else keys


def has_rows(problem: Problem, device: Device, rows: int) -> bool:
    """Whether there are queries for float32 tiles of so many, instead of half as many.

    They save a twelfth of the time, see `_float32_tiles`, which the busiest multiprocessor must not lose again, and
    two at least have to be on each. With a mask times of tiles differ: of 128 columns, causal, 16 for each took 1.03
    of the time (one H200).
    """
    blocks = problem.batch * problem.heads * -(-problem.seqlen_q // rows)
    if problem.left is not None or problem.right is not None:
        return blocks >= 20 * device.multiprocessors
    most, most_of_half = (-(-n * blocks // device.multiprocessors) for n in (1, 2))
    return most > 1 and 2 * most <= 1.09 * most_of_half


def _float32_tiles(problem: Problem, device: Device) -> list[Tile]:
    """Tiles of float32 in order of preference.

    Operands of products are split into two in registers, those of K and V in every warp: half as often with 32 rows in
    each as with 16. Parts of the time of these (one H200, N = 4k, full): exact, 64 columns 0.92, 128 columns 0.96;
    LSH(2) 0.90 and 0.92. It takes registers that 128 columns of V just leave, and shared memory for two thread blocks.
    """
    large = Tile(128, 32, 2)
    wide = problem.head_dim_v > (96 if problem.ranked is not None else 128)  # ptxas would spill
    two = not wide and _fitting(device, shared_bytes(problem, device, large)) > 1
    return [
        *([large] if two and has_rows(problem, device, large.block_m) else []),
        *(Tile(64, keys, 1) for keys in (32, 16) if keys == 16 or problem.head_dim_v <= 128),
        Tile(32, 16, 1),  # for nearly all of 256 columns in the 99 KB of sm_86, 89 and 120
    ]


def _tiles(problem: Problem, device: Device, group: int, share_keys: bool) -> list[Tile]:
    """Tiles in order of preference."""
    if problem.dtype == "float32":
        return _float32_tiles(problem, device)
    keys = _longest_keys(problem, device, group)
    large = _longest_shared_keys(problem.head_dim_v, group, keys) if share_keys else keys
    # Two row tiles per warp halve the reads of shared memory: with one (and 64 rows), 128 columns ran at 0.78 / 0.73
    # of FlashAttention-2. Beyond 128 columns O alone would take every register.
    row_tiles = 2 if problem.head_dim_v <= 128 else 1
    return [
        *(Tile(128, n, row_tiles) for n in (large, 96, 64, 48, 32) if n <= large),
        *(Tile(64, n, 1) for n in (64, 32, 16) if n <= keys),
    ]


def _possible(problem: Problem, device: Device, tile: Tile) -> bool:
    """Whether the device has the shared memory for a tile, and its rows lie inside one block of the reduction."""
    block_q = problem.reduction.rows_per_block if problem.reduction is not None else BLOCK_Q_DEFAULT
    if block_q % tile.block_m or (problem.seqlen_q <= SMALL_SEQLEN_Q and tile.block_m > SMALL_SEQLEN_Q):
        return False
    return shared_bytes(problem, device, tile) <= device.shared_bytes


def tile_key(problem: Problem) -> TileKey | None:
    """What a measured tile of this problem is kept under.

    None for rows that are not aligned, for scores with a softcap or a scale that is not positive, and for passes over
    the keys: these kernels have other registers, and the planner's own tiles.
    """
    if not problem.aligned or problem.softcap is not None or problem.scale <= 0:
        return None
    if problem.ranked is not None or keeps_keys(problem):
        return None
    reduction, keep = problem.reduction, _keep(problem)
    return TileKey(
        problem.dtype,
        problem.tf32,
        problem.head_dim,
        problem.head_dim_v,
        _group(problem),
        reduction.representative if isinstance(reduction, LSH) else f"energy{keep}" if keep else "sample",
        problem.seqlen_q <= SMALL_SEQLEN_Q,
    )


# A multiprocessor's work in a clock, for tile_clocks, on an H100. What mma.sync reaches of the 2048 multiplications of
# warpgroup products follows from the share of time that its tensor cores were seen at work, see docs/time.md; float32
# takes three TF32 products at half the rate.
MMA_PER_CLOCK = {"float16": 1355, "bfloat16": 1355, "float32": 226}
SHARED_BYTES_PER_CLOCK, L2_BYTES_PER_CLOCK, EXPONENTIALS_PER_CLOCK, INSTRUCTIONS_PER_CLOCK = 128, 28, 16, 4
SOFTMAX_INSTRUCTIONS = (
    7  # per score: scale, maximum, exponential, sum, conversion, and their share of the rest
)
MMA_MULTIPLICATIONS, LOAD_BYTES = 2048, 512  # of one instruction of a warp: m16n8k16, ldmatrix.x4
MAX_ACCUMULATORS = 200  # of a thread: about as many as leave 255 registers enough for everything else
CANDIDATE_KEYS = (16, 32, 48, 64, 80, 96, 112, 128)


def step_clocks(problem: Problem, device: Device, tile: Tile) -> dict[str, float]:
    """Clocks that a thread block's step of keys takes each unit of a multiprocessor, with nothing beside it."""
    itemsize, keep = ITEMSIZE[problem.dtype], _keep(problem)
    terms = _depth(problem.head_dim, _group(problem), keep)
    pairs = tile.block_m * tile.tile_k
    products = pairs * (terms + problem.head_dim_v)
    bytes_in = tile.tile_k * (problem.head_dim + problem.head_dim_v) * itemsize
    warps = tile.block_m // (16 * tile.row_tiles)
    bytes_loaded = tile.block_m * terms * itemsize  # by warps, for products
    bytes_fused = 0
    if fusion(problem, device, tile):
        fused = tile.tile_k * terms * itemsize
        bytes_fused = tile.tile_k * problem.head_dim * itemsize + fused
        bytes_loaded += warps * (fused + tile.tile_k * problem.head_dim_v * itemsize)
    elif keep:
        bytes_fused = tile.tile_k * (problem.head_dim - keep) * itemsize  # summed to a number for each key
        bytes_loaded += warps * (bytes_in - bytes_fused)
    else:
        bytes_loaded += warps * bytes_in
    instructions = (
        SOFTMAX_INSTRUCTIONS * pairs / 32
        + products / MMA_MULTIPLICATIONS
        + (bytes_loaded + bytes_fused) / LOAD_BYTES
    )
    return {
        "tensor cores": products / MMA_PER_CLOCK[problem.dtype],
        "shared memory": (bytes_in + bytes_loaded + bytes_fused) / SHARED_BYTES_PER_CLOCK,
        "L2": bytes_in / L2_BYTES_PER_CLOCK,
        "exponentials": pairs / EXPONENTIALS_PER_CLOCK,
        "instructions": instructions / INSTRUCTIONS_PER_CLOCK,
    }


def tile_clocks(problem: Problem, device: Device, tile: Tile) -> float:
    """Estimate a multiprocessor's clocks per million pairs of a query and a key: the selection of block sizes.

    After the paper (arXiv 2507.17245), which chooses block sizes by shared memory and by the time of memory and
    products. The thread blocks that a multiprocessor holds overlap, so the busiest unit bounds them all; a single one
    waits for each of its own parts in turn.
    """
    parts = step_clocks(problem, device, tile).values()
    resident = resident_blocks(tile, tile_kernel(problem, device, tile), device, problem.head_dim_v)
    step = max(resident * max(parts), sum(parts) + WAIT_CLOCKS)
    return 1e6 * step / (resident * tile.block_m * tile.tile_k)


def candidate_tiles(problem: Problem, device: Device) -> list[Tile]:
    """Tiles that may compute a problem, by :func:`tile_clocks`; ptxas has the last word on their registers."""
    shapes = ((64, 1), (128, 1), (128, 2))
    columns = _round_up(problem.head_dim_v, 16)
    found = [
        tile
        for tile in (Tile(rows, keys, row_tiles) for rows, row_tiles in shapes for keys in CANDIDATE_KEYS)
        if tile.row_tiles * (columns + tile.tile_k) // 2 <= MAX_ACCUMULATORS
        and _possible(problem, device, tile)
    ]
    return sorted(found, key=lambda tile: tile_clocks(problem, device, tile))


def _choose_tile(problem: Problem, device: Device, group: int, share_keys: bool) -> Tile:
    """The tile that was measured to be fastest on this device, or the first that is possible.

    Sharing keys takes registers that a large tile may not have: it has its own list.
    """
    if device.tiles:
        tuned = dict(device.tiles).get(tile_key(problem))  # type: ignore[arg-type]
        small = tuned is not None and tuned.block_m <= SMALL_SEQLEN_Q
        if tuned is not None and (small or not share_keys) and tuned in candidate_tiles(problem, device):
            return tuned
    for tile in _tiles(problem, device, group, share_keys):
        if _possible(problem, device, tile):
            return tile
    raise AssertionError(f"no tile for {problem} on {device}")  # the last tiles fit the smallest device


def attention_kernel(problem: Problem, device: Device) -> tuple[Kernel, Tile]:
    """The attention kernel of a problem, and its tile."""
    return hopper_kernel(problem, device) or portable_kernel(problem, device)


def _crowded(problem: Problem, device: Device, tile: Tile, share_keys: bool) -> bool:
    """Whether ptxas at its own level hoists so many loads that a kernel spills; at level 1 it does not.

    On one H200 (8k tokens) level 1 gains 5% with 128 exact columns of bfloat16, and 4% with LSH(4) of 64; it costs 4 to
    9% with up to 96 exact columns, 4 to 5% with groups of 128, and 12% where heads differ in rank.
    """
    columns, capability, group = problem.head_dim_v, device.capability, _group(problem)
    softcap, ranked = problem.softcap is not None, problem.ranked is not None
    if keeps_keys(problem):  # a second loop, and the pass, take registers too
        if problem.dtype == "float32":
            return (
                tile.row_tiles == 2
                or columns > 192
                or capability >= 120
                or (capability >= 100 and columns > 96)
            )
        if columns <= 64:
            return tile.tile_k == 128
        return 96 < columns <= 128 and (
            capability < 100 if problem.dtype == "bfloat16" else group > 4 and capability == 90
        )
    if problem.dtype == "float32":
        if tile.row_tiles == 2 or ranked or columns > 192:
            return True
        return columns > 32 and (capability >= 120 or (capability == 100 and (softcap or columns > 160)))
    wide = problem.dtype == "bfloat16"  # whose kernels may do a tile of queries twice
    if fuses_ahead(problem, device, tile):
        if columns > 96:
            return wide and capability == 80 and group == 2
        return columns > 32 and tile.tile_k == 128
    if columns > 128:
        return wide and capability == 90 and not problem.aligned
    if ranked:
        if not problem.aligned or problem.scale <= 0 or problem.head_dim > columns:
            return True
        if columns > 96:
            return share_keys or columns < 128 or (not wide and problem.head_dim < columns)
        return columns <= 32 and not wide
    latest = capability >= 120
    if group == 2:
        return latest and not wide if columns <= 64 else wide and (latest or capability == 90)
    if group == 4 and columns == 128 and latest and _half(problem):
        return True
    if group:
        return wide and columns <= 64 and capability not in (90, 100)
    if columns <= 96 or _keep(problem):
        return False
    return softcap or (wide and (capability == 90 or (capability in (86, 89) and columns < 128)))


def _score_steps(problem: Problem, tile: Tile) -> int:
    """Steps of a float32 score that tensor cores add up before the sum is added to the others; 0 for other products.

    Two take half the additions of one, and round less in all. Where the output takes most registers ptxas would spill.
    """
    if problem.dtype != "float32" or problem.tf32:
        return 0
    return 1 if tile.row_tiles == 2 and problem.head_dim_v > 96 else 2


def portable_kernel(problem: Problem, device: Device, share_keys: bool = False) -> tuple[Kernel, Tile]:
    """The kernel that runs everywhere, and its tile; with ``share_keys`` one whose thread blocks may share keys."""
    tile = _choose_tile(problem, device, _group(problem), share_keys)
    return tile_kernel(problem, device, tile, share_keys), tile


def tile_kernel(problem: Problem, device: Device, tile: Tile, share_keys: bool = False) -> Kernel:
    """The portable kernel of a problem with a given tile."""
    smem = shared_bytes(problem, device, tile)
    constants = {
        "DTYPE": DTYPE_NUMBER[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "GROUP": _group(problem),
        "FUSE_IN_SHARED": fusion(problem, device, tile),
        "MEAN": int(_mean(problem)),
        "WEIGHTED": int(_weighted(problem)),
        "HALF": int(_half(problem)),
        "KEEP": _keep(problem),
        "BLOCK_M": tile.block_m,
        "TILE_K": tile.tile_k,
        "ROW_TILES": tile.row_tiles,
        "ALIGNED": int(problem.aligned),
        "SCORE": int(problem.softcap is not None or problem.scale <= 0),
        "RANKED": int(problem.ranked is not None),
        "KEPT": int(keeps_keys(problem)),
        "EXACT_TILE_K": _exact_keys(problem, tile),
        "SPLIT": _score_steps(problem, tile),
        "VALUE_STAGES": value_stages(problem, device, tile),
        "SHARE_KEYS": int(share_keys or tile.block_m <= SMALL_SEQLEN_Q),
        "SHARED_BYTES": smem,
    }
    options = ("-Xptxas=-O1",) if _crowded(problem, device, tile, share_keys) else ()
    threads = tile.block_m // tile.row_tiles * 2
    return Kernel("sm80_flash_fwd", tuple(constants.items()), threads, smem, options)


HOPPER_CAPABILITY = 90  # warpgroup products of sm_90a exist there and nowhere else
HOPPER_STAGES = 2  # tiles of K, and of V, in shared memory: one is read while the next is copied
HOPPER_GROUP_ROWS = 64  # queries of a consumer
# Full and empty, of the queries of up to three consumers and of the stages of K, V and the number of the next tile, and
# one barrier for what is done; that number, and what the rows of a tile of queries lost; and what is known of four
# tiles of queries and of up to eight tiles of keys, and of what is under way.
HOPPER_BARRIER_BYTES = 8 * (2 * 3 + 7 * HOPPER_STAGES) + (4 + 4 + 12 + 96) * HOPPER_STAGES + (9 + 10 * 2) * 16
HOPPER_ALIGNMENT = 1024  # of tiles in shared memory: where the swizzle begins anew
MAX_STRIDE_BYTES = 2**40 - 1  # of a tensor map
# Keys per step, by columns of V: what to choose from. A consumer's thread holds, per row of 64, scores (keys / 2),
# weights (keys / 4) and output (columns / 2); more keys mean fewer barriers and rescalings per key. Parts of the time
# that the choice before took (one H100, bfloat16, N = 8k, at its limit of power; full, or causal where it says so):
HOPPER_KEYS = (
    (64, (128,)),  # 64 + 32 + 32 of the 160 registers that three consumers have
    (96, (128, 192)),  # 96 + 48 + 48 of 240, as for all below; causal 0.95 of 128
    (128, (128, 192)),  # 96 + 48 + 64; 0.96 of 176; causal 0.97 of 128, with 64 columns of Q and K 0.92
    (160, (128, 144)),  # 72 + 36 + 80
    (192, (96,)),  # 48 + 24 + 96; 0.99 of 112, the most for which shared memory has room
    (224, (112,)),  # 56 + 28 + 112
    (256, (64,)),  # 32 + 16 + 128; 0.98 of 80
)
# What a step costs beside its keys, in keys: one of 192 takes 1.44 times as long as one of 128.
HOPPER_STEP_KEYS = 18
HOPPER_GROUPED_ACCUMULATORS = 184  # scores, weights, output and queries, of a consumer's 208 or 216 registers
HOPPER_KEPT_COLUMNS = 128  # of a grouping with exact keys: beyond, ptxas spills some of its variants
HOPPER_RAW_BYTES = 1 << 16  # of a tile of the transposed K: offsets in it are kept in 16 bits
HOPPER_SECTION_BYTES = 32 << 20  # K and V of the heads in progress, so that they stay in an L2 of 50 MB
# From so many keys on tiles are taken from a counter without a mask too: a thread block may start late, because a copy
# from another GPU or another stream holds its multiprocessor, and the counter costs nothing then.
HOPPER_LONG_KEYS = 8192
# A consumer's part of a tile, if it is alone with it, in the tile's time, by how many consumers it has (one H200, 2k to
# 8k keys); and what a tile takes beside its steps, and a call whose tiles are taken from a counter, which is set first,
# in steps.
HOPPER_PART = {2: 0.77, 3: 0.6}
HOPPER_START_STEPS = 1.5
HOPPER_COUNTER_STEPS = 1.5
HOPPER_SHARED_ROUNDS = (
    4  # tiles under a mask for a multiprocessor, from which on sharing some out gains little
)
HOPPER_SHARED_GAIN = 0.95  # of the time, that it must promise


PANEL_COLUMNS = 64  # of the widest


def panel_columns(columns: int) -> int:
    """Columns of a panel of a tile in shared memory: 128, 64 or 32 bytes, the widest that divides a row."""
    return next(width for width in (64, 32, 16) if columns % width == 0)


def hopper_shared_bytes(
    tile: Tile, head_dim: int, head_dim_v: int, group: int, weighted: bool = False
) -> int:
    """Shared memory of the Hopper kernel; a ``static_assert`` in the kernel compares it with its own."""
    widths = (head_dim, head_dim_v, head_dim // group) if group else (head_dim, head_dim_v)
    sizes = [tile.block_m * head_dim] + [tile.tile_k * x for x in widths] * HOPPER_STAGES
    tiles = sum(_round_up(2 * size, HOPPER_ALIGNMENT) for size in sizes)
    # Of a column: its place in the order; its share of Qhat, and two weights for every panel of keys.
    per_column = 1 + weighted * (4 + 2 * 2 * tile.tile_k // PANEL_COLUMNS)
    order = _round_up(16 * HOPPER_STAGES + per_column * head_dim, HOPPER_ALIGNMENT) if group else 0
    return _round_up(tiles + order + HOPPER_BARRIER_BYTES, HOPPER_ALIGNMENT)


def _hopper_tile(problem: Problem, device: Device) -> Tile | None:
    """The tile of the Hopper kernel, None if shared memory is too small for any."""
    group, head_dim, head_dim_v = _group(problem), problem.head_dim, problem.head_dim_v
    # Three consumers share the tiles of K and V where their accumulators fit 160 registers each, two otherwise.
    block_m = 192 if head_dim_v <= 64 and not group else 128

    def needed(tile: Tile) -> int:
        return hopper_shared_bytes(tile, head_dim, head_dim_v, group, _weighted(problem))

    def tiles(sizes: Iterable[int]) -> list[Tile]:
        every = (Tile(block_m, tile_k, 1) for tile_k in sizes)
        most = device.shared_bytes
        return [tile for tile in every if needed(tile) <= most]

    def cost(tile: Tile) -> int:
        counts = key_tiles(problem, tile, -(-problem.seqlen_q // block_m), 1)
        return sum(counts) * (tile.tile_k + HOPPER_STEP_KEYS)

    if group:
        # Rows of a panel of the transposed K are 64 keys. Registers: scores, weights, output, and Qhat.
        beside = head_dim_v // 2 + head_dim // group // 4
        if keeps_keys(problem) and max(head_dim, head_dim_v) > HOPPER_KEPT_COLUMNS:
            return None
        # Builders that also learn which tiles are exact have no registers for many columns of long ones.
        longest = (192,) if head_dim <= 64 or not keeps_keys(problem) else ()
        sizes = (*longest, 128, 64)
        if problem.exact_block != (1, 1):
            sizes = problem.exact_block[1:]  # then no pass ends within a tile
        for tile in tiles(sizes):
            raw_bytes = 2 * tile.tile_k * head_dim
            if raw_bytes <= HOPPER_RAW_BYTES and tile.tile_k * 3 // 4 + beside <= HOPPER_GROUPED_ACCUMULATORS:
                return tile
        return None
    keys = next(sizes for columns, sizes in HOPPER_KEYS if head_dim_v <= columns)
    if problem.exact_block[1] in keys:
        keys = problem.exact_block[1:]  # then no pass ends within a tile
    smaller = tiles(range(keys[0] - 16, 0, -16))[:1]
    return min(tiles(keys) or smaller, key=cost, default=None)


def _rank(problem: Problem) -> int:
    """The columns of Qhat and Khat, if the Hopper kernel knows them beforehand; 0 if it reads them, or there are none.

    With heads of one rank its exact tiles and its reduced ones have loops of their own, with a chain of products each
    instead of one for every rank: 4% faster causal and 6% full (one H100, 8k and 16k tokens).
    """
    return problem.ranked.columns if problem.ranked is not None and problem.ranked.alike else 0


def _hopper_groups(problem: Problem) -> bool:
    """Whether the Hopper kernel can sum the groups of a problem: a tile of queries has one order, products 16 terms.

    Columns kept by energy, and weights beside exact keys, are the portable kernel's alone.
    """
    reduction = problem.reduction
    if reduction is None:
        return True
    if isinstance(reduction, Energy) or (reduction.by_keys and keeps_keys(problem)):
        return False
    return reduction.rows_per_block % 128 == 0 and problem.head_dim // reduction.group_size % 16 == 0


def _hopper_covers(problem: Problem, device: Device) -> bool:
    """Whether the Hopper kernel can, and may, compute a problem."""
    strides = [*problem.q_strides, *problem.k_strides, *problem.v_strides]
    if problem.ranked is not None:
        strides += [*problem.ranked.q_strides, *problem.ranked.k_strides]
    return (
        device.capability == HOPPER_CAPABILITY
        and problem.family != "portable"
        and _hopper_groups(problem)
        and ITEMSIZE[problem.dtype] == 2
        and problem.aligned
        # Products take 16 terms at a time, and panels are at least 16 columns wide.
        and problem.head_dim % 16 == 0
        and problem.head_dim_v % 16 == 0
        and all(0 <= 2 * stride <= MAX_STRIDE_BYTES for stride in strides)
        # With few queries most of a tile would be empty.
        and (problem.seqlen_q > SMALL_SEQLEN_Q or problem.family == "hopper")
    )


def hopper_kernel(problem: Problem, device: Device) -> tuple[Kernel, Tile] | None:
    """The Hopper kernel of a problem, and its tile; None if the portable kernel has to compute it."""
    tile = _hopper_tile(problem, device) if _hopper_covers(problem, device) else None
    if tile is None:
        return None
    group, weighted, rank = _group(problem), _weighted(problem), _rank(problem)
    constants = {
        "DTYPE": DTYPE_NUMBER[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "GROUP": group,
        "MEAN": int(_mean(problem)),
        "WEIGHTED": int(weighted),
        "BLOCK_M": tile.block_m,
        "TILE_K": tile.tile_k,
        "SCORE": int(problem.softcap is not None or problem.scale <= 0),
        "RANKED": int(problem.ranked is not None),
        "RANK": rank,
        "NEAR": int(rank > 0 and any(not x.reduced for x in passes(problem))),
        "COPIED": int(problem.ranked is not None and problem.ranked.copied),
        "KEPT": int(keeps_keys(problem)),
        "HALF": int(_half(problem)),
        "SHARED_BYTES": hopper_shared_bytes(tile, problem.head_dim, problem.head_dim_v, group, weighted),
    }
    kernel = Kernel(
        "sm90_flash_fwd",
        tuple(constants.items()),
        threads=128 + 2 * tile.block_m,
        shared_bytes=constants["SHARED_BYTES"],
        specific=True,
    )
    return kernel, tile


def _hopper_section(problem: Problem) -> int:
    """Heads, over all batches, whose tiles the Hopper kernel takes in turn.

    As many as L2 holds, but such that the last section, which begins with long tiles again when little else is left, is
    as large as it can be: ten heads, of which L2 holds seven, are taken as five and five.
    """
    if problem.left is None and problem.right is None:
        return 1  # tiles take equally long, so their order does not matter
    bytes_per_head = 2 * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    heads_kv, shared = problem.batch * problem.heads_kv, problem.heads // problem.heads_kv
    most = max(1, min(HOPPER_SECTION_BYTES // bytes_per_head, heads_kv))
    return shared * max(range(1, most + 1), key=lambda n: ((heads_kv - 1) % n + 1, n))


def _makespan(works: Iterable[float], blocks: int) -> float:
    """When the last of so many thread blocks ends that take works in this order, whoever is free."""
    ends = [0.0] * blocks
    for work in works:
        heapq.heapreplace(ends, ends[0] + work)
    return max(ends)


def _hopper_shares(problem: Problem, device: Device, tile: Tile, row_blocks: int) -> tuple[int, int]:
    """The first tile that the Hopper kernel shares out, and how many.

    The parts of a tile, one for each consumer, take more than their share of its time, but less than all of it. Without
    a mask those in the last round are shared out, if there are multiprocessors for all parts. With one the longest are,
    which come first, as far as that ends earlier.
    """
    consumers, grid = tile.block_m // HOPPER_GROUP_ROWS, device.multiprocessors
    heads = problem.batch * problem.heads
    tiles = row_blocks * heads
    if _group(problem):
        return 0, 0
    if problem.left is None and problem.right is None:
        rest = tiles % grid
        return (tiles - rest, rest) if rest * consumers <= grid else (0, 0)
    if tiles > HOPPER_SHARED_ROUNDS * grid or _hopper_section(problem) < heads:
        return 0, 0
    steps = [n for n in reversed(key_tiles(problem, tile, row_blocks, 1, row_blocks)) for _ in range(heads)]
    whole = [HOPPER_START_STEPS + n for n in steps]
    parts = [HOPPER_START_STEPS + HOPPER_PART[consumers] * n for n in steps for _ in range(consumers)]

    def ends(shared: int) -> float:
        works = parts[: shared * consumers] + whole[shared:]
        return _makespan(works, min(grid, len(works))) + HOPPER_COUNTER_STEPS * (len(works) > grid)

    choices = range(0, tiles + 1, max(1, tiles // 32))
    best = min(choices, key=ends)
    return 0, best if ends(best) < HOPPER_SHARED_GAIN * ends(0) else 0


def prepare_kernel(dtype: str, head_dim: int, aligned: bool, signed: bool = False, half: int = 0) -> Kernel:
    """The kernel that orders the columns of every block of queries, and transposes K.

    ``signed`` takes a column and its negative for alike. ``half`` 1 writes K of bfloat16 in float16; 2 writes it
    as it is afterwards, if the first has told that it must.
    """
    constants = (
        ("DTYPE", DTYPE_NUMBER[dtype]), ("HEAD_DIM", head_dim), ("ALIGNED", int(aligned)), ("SIGNED", int(signed)),
        ("HALF", half),
    )  # fmt: skip
    return Kernel("smxx_lsh_prepare", constants, PREPARE_THREADS)


def prepare(
    batch: int,
    heads: int,
    seqlen_q: int,
    head_dim: int,
    block_q: int,
    keys: tuple[int, int] | None,
    hashed: bool = True,
) -> Prepare:
    """Plan the preparation of grouped attention; keys is (heads_kv, seqlen_k), None for the order alone.

    Columns that are not ordered by hash are ordered elsewhere.

    Raises
    ------
    ValueError
        If one launch cannot hold it.
    """
    group_blocks = -(-seqlen_q // block_q)
    order_units = batch * heads * group_blocks if hashed else 0
    order_blocks = -(-order_units // (PREPARE_THREADS // _round_up(head_dim // 2, 32)))
    key_columns = key_blocks = tiles = 0
    if keys is not None:
        key_columns = _round_up(keys[1], KEY_COLUMNS_MULTIPLE)
        key_blocks = -(-key_columns // TRANSPOSE_TILE)
        tiles = key_blocks * -(-head_dim // TRANSPOSE_TILE) * batch * keys[0]
    check_blocks(max(order_units, tiles))
    share = max(1, min(PREPARE_TILES, tiles // PREPARE_BLOCKS))
    blocks = max(order_blocks, -(-tiles // share))
    return Prepare(group_blocks, order_units, order_blocks, key_columns, key_blocks, tiles, blocks)


def weights(dtype: str, head_dim: int, group_size: int, heads: int, group_blocks: int) -> Step:
    """What finds the weights and shares of the columns of each group.

    For so many heads over all batches, and blocks of queries of a head.
    """
    lanes = next(
        n for n in range(1, group_size + 1) if group_size**2 <= n * WEIGHTS_PRODUCTS and group_size % n == 0
    )
    warps = -(-(head_dim // group_size) // (32 // lanes))  # for a block of queries
    units = max(1, WEIGHTS_WARPS // warps)
    constants = (
        ("DTYPE", DTYPE_NUMBER[dtype]), ("HEAD_DIM", head_dim), ("GROUP", group_size), ("LANES", lanes),
    )  # fmt: skip
    blocks = check_blocks(heads * -(-group_blocks // units))
    return Step(Kernel("smxx_lsh_weights", constants, units * warps * 32), blocks)


def key_spans(seqlen_k: int) -> int:
    """Parts of a head's keys that are summed by themselves."""
    return -(-seqlen_k // ENERGY_KEYS)


def key_energy(dtype: str, head_dim: int, heads: int, seqlen_k: int) -> Step:
    """What sums over K's columns, for so many KV heads over all batches."""
    constants = (("DTYPE", DTYPE_NUMBER[dtype]), ("HEAD_DIM", head_dim))
    spans = KEY_ENERGY_THREADS // (head_dim // 2)  # of a thread block
    blocks = check_blocks(-(-heads * key_spans(seqlen_k) // spans))
    return Step(Kernel("smxx_key_energy", constants, KEY_ENERGY_THREADS), blocks)


def energy_order(dtype: str, head_dim: int, aligned: bool, units: int) -> Step:
    """What orders the columns of so many blocks of queries by energy."""
    constants = (("DTYPE", DTYPE_NUMBER[dtype]), ("HEAD_DIM", head_dim), ("ALIGNED", int(aligned)))
    return Step(Kernel("smxx_energy_order", constants, _round_up(head_dim // 2, 32)), check_blocks(units))


@functools.lru_cache(maxsize=1024)
def copies_queries(problem: Problem, device: Device) -> bool:
    """Whether a reduced problem is solved with all columns of K, and queries that stand for its own.

    The scores of a reduction are those of K and of queries whose columns have been replaced. Where columns are kept by
    energy, and for groups with weights beside exact keys, the exact Hopper kernel multiplies these faster than the
    portable one does with fewer columns.
    """
    reduction = problem.reduction
    if reduction is None or not reduction.by_keys:
        return False
    if isinstance(reduction, LSH) and not (problem.near or problem.sinks):
        return False
    return hopper_kernel(exact(problem), device) is not None


def copied_rows(problem: Problem) -> int:
    """Rows of a thread block of what makes those queries: its threads have 16 bytes of several rows each."""
    return COPIED_ROWS * (COPIED_THREADS * 16 // (problem.head_dim * ITEMSIZE[problem.dtype]))


def copied_queries(problem: Problem) -> tuple[Step, int]:
    """What makes those queries, and its thread blocks for each block of queries."""
    reduction = problem.reduction
    assert reduction is not None
    group = reduction.group_size if isinstance(reduction, LSH) else 1
    constants = {
        "DTYPE": DTYPE_NUMBER[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "GROUP": group,
        "KEEP": _keep(problem),
    }
    units = problem.batch * problem.heads * -(-problem.seqlen_q // reduction.rows_per_block)
    parts = -(-min(reduction.rows_per_block, problem.seqlen_q) // copied_rows(problem))
    kernel = Kernel("smxx_copied_queries", tuple(constants.items()), COPIED_THREADS)
    return Step(kernel, check_blocks(units * parts)), parts


def merge_kernel(dtype: str, head_dim_v: int) -> Kernel:
    """The kernel that merges shards of the keys."""
    return Kernel(
        "smxx_merge", (("DTYPE", DTYPE_NUMBER[dtype]), ("HEAD_DIM_V", head_dim_v)), MERGE_WARPS * 32
    )


def merge_shard_kernel(dtype: str, found: str, out: str, head_dim_v: int) -> Kernel:
    """The kernel that takes a shard of the keys into what was found so far."""
    constants = (
        ("DTYPE", DTYPE_NUMBER[dtype]),
        ("FOUND", DTYPE_NUMBER[found]),
        ("OUT", DTYPE_NUMBER[out]),
        ("HEAD_DIM_V", head_dim_v),
    )
    return Kernel("smxx_merge_shard", constants, MERGE_WARPS * 32)


def merge_rows(head_dim_v: int, elements: int) -> int:
    """Rows of a thread block that merges: as many lanes share one as it has vectors of so many elements, or of one."""
    vectors = head_dim_v // (elements if head_dim_v % elements == 0 else 1)
    lanes = min(32, max(2, 1 << (vectors - 1).bit_length()))
    return MERGE_WARPS * 32 // lanes


def project_kernel(problem: Problem, columns: int) -> Kernel:
    """The kernel that makes so many columns of Qhat and Khat."""
    itemsize = ITEMSIZE[problem.dtype]
    parts = 2 if itemsize == 2 else 1  # of a factor: the rounded number and the rest
    segments = -(-problem.head_dim * itemsize // 64)  # of a row
    tile = parts * segments * 1024  # bytes of 16 columns of the factors
    more = tile + tile // 8  # of the sketch and of the mean
    groups = -(-columns // PROJECT_GROUP)
    most = (PROJECT_BYTES - more) // (2 * tile + 4 * PROJECT_GROUP)
    columns = -(-groups // -(-groups // most)) * PROJECT_GROUP
    # Of a warp: as many as there are registers for.
    rows = (32 if segments <= 2 else 24, 16) if itemsize == 2 else (16, 8)
    constants = {
        "DTYPE": DTYPE_NUMBER[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "COLUMNS": columns,
        "WARP_ROWS": rows[segments > 4],
        "ALIGNED": int(problem.aligned),
        "SPLIT": int(problem.dtype == "float32" and not problem.tf32),
        "SHARED_BYTES": columns // 16 * tile + more + 4 * columns,
    }
    # As for the portable kernel: at its own level, ptxas hoists so many loads of float32 that it spills.
    options = ("-Xptxas=-O1",) if problem.dtype == "float32" else ()
    return Kernel(
        "smxx_project", tuple(constants.items()), PROJECT_THREADS, constants["SHARED_BYTES"], options
    )


def project_rows(problem: Problem, kernel: Kernel, slices: int, device: Device) -> int:
    """Rows of a thread block of this kernel.

    Several tiles, so that it copies the factors once for all of them, but such that the last round of thread blocks is
    not nearly empty: eleven tiles of 192 rows in one round, instead of three in each of four, are 11% faster (one H200,
    16k tokens).
    """
    rows = kernel.threads // 32 * dict(kernel.constants)["WARP_ROWS"]
    at_once = device.multiprocessors * max(1, min(PROJECT_BLOCKS, _fitting(device, kernel.shared_bytes)))

    def time(tiles: int) -> float:
        of_q, of_k = (-(-seqlen // (rows * tiles)) for seqlen in (problem.seqlen_q, problem.seqlen_k))
        blocks = problem.batch * slices * (problem.heads * of_q + problem.heads_kv * of_k)
        return -(-blocks // at_once) * (tiles + PROJECT_START)

    return rows * min(range(1, PROJECT_TILES + 1), key=time)


LOWRANK_ROWS = 64  # that smxx_lowrank_rows.cu and smxx_lowrank_sums.cu draw of a KV head
LOWRANK_QUERIES = 512  # of which the latter sums products
LOWRANK_KEYS = 2048  # that they look at, at most
FACTORS_THREADS = 512  # of smxx_lowrank_factors.cu


def lowrank_columns(head_dim: int) -> int:
    """Columns of the sums that low-rank factors are found of: head_dim filled up to whole tiles, beyond 128 to two."""
    return _round_up(head_dim, 32 if head_dim <= 128 else 64)


def lowrank_keys(head_dim: int) -> int:
    """Keys of a tile that is sampled."""
    return 64 if head_dim <= 128 else 32


def _lowrank_kernel(name: str, dtype: str, head_dim: int, aligned: bool, tiles: int, more: int) -> Kernel:
    columns, keys = lowrank_columns(head_dim), lowrank_keys(head_dim)
    shared_bytes = 2 * (LOWRANK_ROWS + tiles * keys) * (columns + 8) + 4 * columns + more
    constants = {
        "DTYPE": DTYPE_NUMBER[dtype],
        "HEAD_DIM": head_dim,
        "ALIGNED": int(aligned),
        "SHARED_BYTES": shared_bytes,
    }
    return Kernel(name, tuple(constants.items()), 8 * keys, shared_bytes)


def lowrank_rows_kernel(dtype: str, head_dim: int, aligned: bool) -> Kernel:
    """The kernel that finds what the softmax of each drawn row adds up to."""
    return _lowrank_kernel(
        "smxx_lowrank_rows", dtype, head_dim, aligned, 1, 4 * 8 * 8 * lowrank_keys(head_dim)
    )


def lowrank_sums_kernel(dtype: str, head_dim: int, aligned: bool) -> Kernel:
    """The kernel that sums products of columns, weighted by the attention that keys get."""
    more = 4 * 2 * LOWRANK_ROWS + (4 * 2 * LOWRANK_ROWS // 16 + 2) * lowrank_keys(head_dim)
    return _lowrank_kernel("smxx_lowrank_sums", dtype, head_dim, aligned, 2, more)


def lowrank_factors_kernel(dtype: str, head_dim: int, rank: int, device: Device) -> Kernel:
    """The kernel that makes factors of these sums."""
    columns, pitch = lowrank_columns(head_dim), rank + 2
    # The square, and rows of its elimination, 2 or 4 at once, two times.
    panel = _round_up(rank * pitch, 4) + (2 * (2 if rank > 96 else 4) + 2) * rank
    least = 4 * (panel + columns + FACTORS_THREADS // 32)
    matrices = 2 * 4 * columns * pitch
    fits = least + matrices <= device.shared_bytes
    constants = {
        "DTYPE": DTYPE_NUMBER[dtype],
        "HEAD_DIM": head_dim,
        "RANK": rank,
        "IN_SHARED": int(fits),
        "SHARED_BYTES": least + fits * matrices,
    }
    return Kernel(
        "smxx_lowrank_factors", tuple(constants.items()), FACTORS_THREADS, constants["SHARED_BYTES"]
    )


class LowRankSteps(NamedTuple):
    """The kernels that find the low-rank factors of a call, one after another, and how the work of two is split.

    A unit is a KV head of a batch entry. Its keys are split for the rows, and its keys and its queries for the sums.
    """

    rows: Step
    sums: Step
    factors: Step
    row_splits: int
    splits: int
    query_splits: int


def lowrank_steps(problem: Problem, rank: int, device: Device) -> LowRankSteps:
    """What finds factors of so many columns.

    The sums of every part are written, and read again by one thread block: so there is a part for each multiprocessor.
    """
    dtype, head_dim, units = problem.dtype, problem.head_dim, problem.batch * problem.heads_kv
    keys = min(problem.seqlen_k, LOWRANK_KEYS), LOWRANK_QUERIES
    tiles, query_tiles = (-(-n // lowrank_keys(head_dim)) for n in keys)
    squares = 1 if head_dim <= 128 else 4  # of a part's sums, each by a thread block
    share = device.multiprocessors // (squares * units)
    query_splits = max(1, min(round(share * query_tiles / (tiles + query_tiles)), query_tiles))
    splits = max(1, min(share - query_splits, tiles))
    row_splits = max(1, min(2 * device.multiprocessors // units, tiles))
    return LowRankSteps(
        Step(lowrank_rows_kernel(dtype, head_dim, problem.aligned), check_blocks(units * row_splits)),
        Step(
            lowrank_sums_kernel(dtype, head_dim, problem.aligned),
            check_blocks(squares * units * (splits + query_splits)),
        ),
        Step(lowrank_factors_kernel(dtype, head_dim, rank, device), check_blocks(units)),
        row_splits,
        splits,
        query_splits,
    )


PROBE_ROWS = 64  # sampled rows of each head
PROBE_PARTS = 32  # of each, exact and reduced, at most: smxx_decide.cu has one for each lane of a warp
DRAW_THREADS = 1024  # of smxx_draw.cu
DECIDE_ROWS = 8  # of a thread block of smxx_decide.cu, which has a warp for each
THIRD_BYTES = 75 * 1024  # of shared memory: a third of what a multiprocessor of Hopper has
LEAST_SHARED_BYTES = 99 * 1024  # that a thread block may have on every GPU that is supported


def draw_kernel(problem: Problem) -> Kernel:
    """The kernel that draws rows of each head."""
    return Kernel("smxx_draw", (("KEPT", int(bool(problem.near or problem.sinks))),), DRAW_THREADS)


def draw_shares(problem: Problem, device: Device) -> int:
    """Thread blocks of a head that draw its rows: two, of which each finds half, if all have a multiprocessor."""
    return 2 if 2 * problem.batch * problem.heads <= device.multiprocessors else 1


def probe_kernel(problem: Problem) -> Kernel:
    """The kernel that computes them, exact and reduced."""
    itemsize = ITEMSIZE[problem.dtype]
    pad = 16 // itemsize
    parts = 2 if problem.head_dim_v > 128 else 1  # of the columns of V, each with warps of its own
    columns_v = _round_up(problem.head_dim_v, 16 * parts)
    wide = max(problem.head_dim, columns_v)
    tile_k = (64, 32, 16)[(wide > 64) + (wide > 128)] if itemsize == 2 else 32 if wide <= 64 else 16
    row_bytes = (problem.head_dim + pad) * itemsize
    stage = tile_k * (2 * row_bytes + (columns_v + pad) * itemsize)
    kept = bool(problem.near or problem.sinks)
    per_row = (
        2 * row_bytes + 8 + 8 * kept
    )  # of queries, with the spans of keys that they see, and that stay exact
    # Three thread blocks of a multiprocessor with two tiles each on their way, or fewer, or of fewer rows.
    choices = [
        (rows, stages, rows * per_row + stages * stage)
        for most, stages in ((THIRD_BYTES, 3), (LEAST_SHARED_BYTES, 2), (LEAST_SHARED_BYTES, 1))
        for rows in (64, 32, 16)
        if rows * per_row + stages * stage <= most and (rows == 64 or stages < 3)
    ]
    rows, stages, shared_bytes = choices[0]
    constants = {
        "DTYPE": DTYPE_NUMBER[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "ROWS": rows,
        "TILE_K": tile_k,
        "STAGES": stages,
        "BLOCKS": 2,
        "KEPT": int(kept),
        "ALIGNED": int(problem.aligned),
        "SPLIT": int(problem.dtype == "float32" and not problem.tf32),
        "SHARED_BYTES": shared_bytes,
    }
    # As for the portable kernel: at its own level, ptxas hoists so many loads of float32 that it spills.
    options = ("-Xptxas=-O1",) if problem.dtype == "float32" else ()
    return Kernel("smxx_probe", tuple(constants.items()), rows * 2 * parts, shared_bytes, options)


def probe_splits(problem: Problem, device: Device) -> int:
    """Into how many parts the keys are split: as many as the GPU holds thread blocks for at once."""
    kernel = probe_kernel(problem)
    constants = dict(kernel.constants)
    by_shared = _fitting(device, kernel.shared_bytes)
    at_once = device.multiprocessors * max(1, min(constants["BLOCKS"], by_shared))
    tiles = -(-problem.seqlen_k // constants["TILE_K"])
    blocks = PROBE_ROWS // constants["ROWS"] * problem.batch * problem.heads
    return max(1, min(at_once // blocks, tiles, PROBE_PARTS // 2))


def decide_kernel(head_dim: int, head_dim_v: int) -> Kernel:
    """The kernel that compares them."""
    return Kernel("smxx_decide", (("HEAD_DIM", head_dim), ("HEAD_DIM_V", head_dim_v)), DECIDE_ROWS * 32)


def check_device(device: Device, index: int) -> None:
    """Refuse a GPU that the kernels do not run on.

    Raises
    ------
    UnsupportedDeviceError
    """
    if device.capability < MIN_CAPABILITY:
        raise UnsupportedDeviceError(
            f"GPU {index} has compute capability {device.capability / 10:.1f}; cudistr's kernels need 8.0 (Ampere) or "
            "newer. Use another GPU, or NumPy arrays, which run on the CPU."
        )


def check_blocks(blocks: int) -> int:
    """Refuse more thread blocks than one launch can have.

    Raises
    ------
    ValueError
    """
    if blocks > MAX_BLOCKS:
        raise ValueError(
            f"the problem needs {blocks} thread blocks, more than the {MAX_BLOCKS} of one launch. "
            "Split the batch into several calls."
        )
    return blocks


def merge_splits_kernel(dtype: str, head_dim_v: int) -> Kernel:
    """The kernel that merges what splits found."""
    constants = (("DTYPE", DTYPE_NUMBER[dtype]), ("HEAD_DIM_V", head_dim_v))
    return Kernel("smxx_merge_splits", constants, MERGE_WARPS * 32)


def packed_heads(problem: Problem) -> int:
    """Query heads whose rows share tiles of the portable kernel, so that their keys are read once: all that have one.

    Where a head has few rows, at least two heads fit a tile, and the rows of all heads lie a constant apart.
    Permutations and ranks are a head's own, so neither grouped products nor reduced ones are packed.
    """
    apart = problem.seqlen_q == 1 or problem.q_strides[1] == problem.seqlen_q * problem.q_strides[2]
    own = problem.reduction is not None or problem.ranked is not None
    if own or 2 * problem.seqlen_q > SMALL_SEQLEN_Q or not apart:
        return 1
    return problem.heads // problem.heads_kv


# The cost of a call in clocks of a multiprocessor, for the number of splits. What decides is how thread blocks fall on
# multiprocessors; the constants only have to tell a step of keys from a second launch. Rates are those of an H100:
# products of scores and of output together, as docs/benchmarks has them for the portable kernel at 128 columns
# (bfloat16, N = 4k: 0.76 of 1024 multiplications; float16, which looks at all scores for their maxima, less; float32 by
# three TF32 products: 110).
PRODUCTS_PER_CLOCK = {"float16": 760, "bfloat16": 775, "float32": 110}
BYTES_PER_CLOCK = 16  # from memory and L2: between 13, which is all of memory's, and the 28 of L2
WAIT_CLOCKS = 2000  # in a step of keys a thread block waits for memory twice, while others may work
START_CLOCKS = 4000  # a thread block until its first product and from its last
MERGE_CLOCKS = 8000  # the second launch, and a thread block of it
MAX_SPLITS = 256
SPLIT_GAIN = 0.9  # of the time without splits is what splits must promise, to be worth their second launch
REGISTERS = 64 * 1024  # of a multiprocessor


def resident_blocks(tile: Tile, kernel: Kernel, device: Device, head_dim_v: int) -> int:
    """Thread blocks of the portable kernel that a multiprocessor holds at once, by registers and shared memory."""
    # Accumulators and about a hundred others, see docs/resources.csv. Float32 keeps halves of operands too, where ptxas
    # is not held back.
    halves = dict(kernel.constants)["SPLIT"] and head_dim_v > 16 and not kernel.options
    registers = tile.row_tiles * (_round_up(head_dim_v, 16) + tile.tile_k) // 2 + (128 if halves else 96)
    registers = min(256, registers)
    by_registers = REGISTERS // (kernel.threads * registers)
    by_shared = _fitting(device, kernel.shared_bytes)
    return max(1, min(by_registers, by_shared))


def key_tiles(problem: Problem, tile: Tile, row_blocks: int, packed: int, most: int = 64) -> list[int]:
    """Tiles of keys that tiles of queries see, for at most so many of them, evenly spaced."""
    offset = problem.seqlen_k - problem.seqlen_q
    counts = []
    for row_block in range(0, row_blocks, -(-row_blocks // most)):
        first, last = row_block * tile.block_m, min((row_block + 1) * tile.block_m, problem.seqlen_q) - 1
        if packed > 1:
            first, last = 0, problem.seqlen_q - 1
        low = 0 if problem.left is None else max(0, first + offset - problem.left)
        high = problem.seqlen_k - 1
        if problem.right is not None:
            high = min(high, last + offset + problem.right)
        counts.append(high // tile.tile_k - low // tile.tile_k + 1 if high >= low else 0)
    return counts


@dataclass(frozen=True)
class _Work:
    """The portable kernel's thread blocks, one per tile of queries, and what their time depends on.

    Attributes
    ----------
    row_blocks, blocks : int
        Tiles of queries per head, or per matrix of packed heads, and in all.
    rows : int
        Rows of a tile that take part in products.
    tiles, most_tiles : int
        Tiles of keys that a tile of queries sees, on average and at most.
    resident : int
        Thread blocks that a multiprocessor holds.
    """

    kernel: Kernel
    tile: Tile
    row_blocks: int
    blocks: int
    rows: int
    tiles: int
    most_tiles: int
    resident: int


def _work(problem: Problem, device: Device, packed: int, share_keys: bool) -> _Work:
    kernel, tile = portable_kernel(problem, device, share_keys)
    row_blocks = -(-problem.seqlen_q * packed // tile.block_m)
    counts = key_tiles(problem, tile, row_blocks, packed)
    return _Work(
        kernel,
        tile,
        row_blocks,
        check_blocks(row_blocks * problem.batch * (problem.heads // packed)),
        min(tile.block_m, _round_up(problem.seqlen_q * packed, 16)),
        -(-sum(counts) // len(counts)),
        max(counts),
        resident_blocks(tile, kernel, device, problem.head_dim_v),
    )


def split_clocks(problem: Problem, device: Device, work: _Work, splits: int) -> int:
    """Estimate the clocks that a call takes, the preparation of a grouped one aside."""
    # Of a grouped product too: what it saves, fusion takes.
    numbers = work.tile.tile_k * (problem.head_dim + problem.head_dim_v)
    products, key_bytes = work.rows * numbers, ITEMSIZE[problem.dtype] * numbers
    busy = max(products // PRODUCTS_PER_CLOCK[problem.dtype], key_bytes // BYTES_PER_CLOCK)

    def wave(beside: int) -> int:
        """So many thread blocks on every multiprocessor, from start to end: each waits, or all are at work."""
        return START_CLOCKS + -(-work.tiles // splits) * max(WAIT_CLOCKS + busy, beside * busy)

    waves, rest = divmod(work.blocks * splits, work.resident * device.multiprocessors)
    clocks = waves * wave(work.resident)
    if rest:
        clocks += wave(-(-rest // device.multiprocessors))
    if splits > 1:
        partial_bytes = splits * problem.batch * problem.heads * problem.seqlen_q * problem.head_dim_v * 4
        clocks += MERGE_CLOCKS + 2 * partial_bytes // (BYTES_PER_CLOCK * device.multiprocessors)
    return clocks


def choose_splits(problem: Problem, device: Device, work: _Work) -> tuple[int, int]:
    """The number of splits that is estimated to be fastest, and the estimate.

    float32 is not split: the lse of each part is rounded to float32, and results would show it.
    """
    if problem.dtype == "float32":
        return 1, split_clocks(problem, device, work, 1)
    most = max(1, min(work.most_tiles, MAX_SPLITS))
    # Every count that gives all multiprocessors equally many thread blocks, up to eight times what they hold at once:
    # more are not shared out better, and their results take memory.
    layers = range(1, 8 * work.resident + 1)
    counts = {1, *(min(most, max(1, n * device.multiprocessors // work.blocks)) for n in layers)}
    clocks = {n: split_clocks(problem, device, work, n) for n in sorted(counts)}
    best = min(clocks, key=clocks.__getitem__)
    return best, clocks[best]


SECTION_READERS = 4  # thread blocks in progress with the keys of a head


def _section(problem: Problem, device: Device, work: _Work, packed: int) -> int:
    """Heads, over all batches, whose tiles the portable kernel takes in turn, the longest first: a divisor of all.

    Under a mask tiles differ in length. If heads came one after another, the last of them would begin with its longest
    tiles when little else is left, and most multiprocessors would wait for these: for 10% of the time of a causal call
    of 128 columns, and 4 to 7% with 64, of 2k to 16k keys (one H200, 16k tokens), and for 15 to 20% with 10 heads of 4k
    or 8k. So heads are taken together; but not so many that every thread block reads keys of its own, which would ask
    more of memory than of the tensor cores. Sections of unequal size would have a small one at the end: half of the
    gain was lost by one.

    Projections of up to 64 columns of 16 bits beside exact keys stay apart: in bfloat16 the records before and after
    have them 2 to 10% slower together, and projections without exact keys 3% faster. Why has not been measured.
    """
    heads = problem.batch * problem.heads // packed
    short = ITEMSIZE[problem.dtype] == 2 and problem.head_dim_v <= 64
    apart = short and problem.ranked is not None and (problem.near or problem.sinks)
    if (problem.left is None and problem.right is None) or apart:
        return 1 if heads <= MAX_BLOCKS_YZ else heads  # without a mask tiles take equally long
    resident = work.resident * device.multiprocessors
    most = max(resident // SECTION_READERS, 2 * resident // work.row_blocks, 1)
    fewest = -(-heads // most)
    numbers = range(fewest, min(2 * fewest, MAX_BLOCKS_YZ) + 1)
    return next((heads // n for n in numbers if heads % n == 0), heads)


def _portable_plan(problem: Problem, device: Device) -> Plan:
    """The plan of the portable kernel, without what comes before it."""
    packed = packed_heads(problem)
    whole = _work(problem, device, packed, share_keys=False)
    shared = _work(problem, device, packed, share_keys=True)
    whole_clocks = split_clocks(problem, device, whole, 1)
    splits, clocks = choose_splits(problem, device, shared)
    work, split = whole, None
    if splits > 1 and clocks <= SPLIT_GAIN * whole_clocks:
        rows = problem.batch * problem.heads * problem.seqlen_q
        # All warps of a thread block on one row where rows alone would not fill the GPU.
        row_warps = MERGE_WARPS if rows < MERGE_WARPS * device.multiprocessors else 1
        work = shared
        split = Split(
            merge_splits_kernel(problem.dtype, problem.head_dim_v),
            splits,
            row_warps,
            check_blocks(-(-rows * row_warps // MERGE_WARPS)),
            clocks,
            whole_clocks,
        )
    section = _section(problem, device, work, packed)
    blocks = check_blocks(work.blocks * (1 if split is None else splits))
    return Plan(work.kernel, work.tile, work.row_blocks, blocks, section, packed=packed, split=split)


@functools.lru_cache(maxsize=1024)
def plan(problem: Problem, device: Device) -> Plan:
    """Plan a problem that is not empty.

    Raises
    ------
    ValueError
        If one launch cannot hold it.
    """
    hopper = hopper_kernel(problem, device)
    if hopper is not None:
        kernel, tile = hopper
        row_blocks = -(-problem.seqlen_q // tile.block_m)
        shared_first, shared = _hopper_shares(problem, device, tile, row_blocks)
        consumers = tile.block_m // HOPPER_GROUP_ROWS
        works = check_blocks(row_blocks * problem.batch * problem.heads + shared * (consumers - 1))
        # As many thread blocks as the GPU has room for: the copies for a tile start while the one before is finished.
        grid = min(works, device.multiprocessors)
        masked = problem.left is not None or problem.right is not None
        # Consumers that began in turn stay apart, as long as tiles take equally long. Where they do not, turns at every
        # tile cost 4%, and a turn at the first costs 13% if tiles are few (one H100, 128 columns, N = 4k, causal).
        turns = int(not masked)
        # A tile with rows for fewer consumers takes less time; dealt out in turn all may fall to the same blocks.
        uneven = masked or 0 < problem.seqlen_q % tile.block_m <= tile.block_m - HOPPER_GROUP_ROWS
        dynamic = (uneven or problem.seqlen_k >= HOPPER_LONG_KEYS) and grid < works
        section = _hopper_section(problem)
        chosen = Plan(kernel, tile, row_blocks, grid, section, dynamic, turns, shared_first, shared, works)
    else:
        chosen = _portable_plan(problem, device)
    reduction = problem.reduction
    if reduction is None:
        return chosen
    dtype, head_dim = problem.dtype, problem.head_dim
    heads, group_blocks = problem.batch * problem.heads, -(-problem.seqlen_q // reduction.rows_per_block)
    again, energy, columns = None, None, None
    if reduction.by_keys:
        far = problem.seqlen_k - problem.sinks  # keys that the columns go by
        energy = key_energy(dtype, head_dim, problem.batch * problem.heads_kv, far)
    if isinstance(reduction, Energy):
        columns = energy_order(dtype, head_dim, problem.aligned, heads * group_blocks)
    elif reduction.by_keys:
        columns = weights(dtype, head_dim, reduction.group_size, heads, group_blocks)
    half = _half(problem)
    first = prepare(
        problem.batch,
        problem.heads,
        problem.seqlen_q,
        head_dim,
        reduction.rows_per_block,
        (problem.heads_kv, problem.seqlen_k),
        hashed=isinstance(reduction, LSH),
    )
    if half:
        # Blocks that mostly find nothing to do: few of them.
        blocks = min(first.tiles, AGAIN_BLOCKS * device.multiprocessors)
        again = Step(prepare_kernel(dtype, head_dim, problem.aligned, half=2), blocks)
    return dataclasses.replace(
        chosen,
        prepare_kernel=prepare_kernel(dtype, head_dim, problem.aligned, _weighted(problem), int(half)),
        prepare=first,
        again=again,
        key_energy=energy,
        columns=columns,
    )
