"""Problem and device in, a frozen, printable :class:`Plan` out: pure functions of values, tested without a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cudistr.errors import UnsupportedDeviceError
from cudistr.normalize import Problem
from cudistr.reductions import BLOCK_Q_DEFAULT

__all__ = [
    "Device",
    "Kernel",
    "Plan",
    "Prepare",
    "Tile",
    "attention_kernel",
    "merge_kernel",
    "plan",
    "prepare",
    "prepare_kernel",
]

MIN_CAPABILITY = 80  # mma.sync of bfloat16, cp.async and 99 KB of shared memory begin here
MAX_BLOCKS = 2**31 - 1  # thread blocks along grid.x
DTYPE_NUMBER = {"float16": 0, "bfloat16": 1, "float32": 2}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
PREPARE_THREADS = 256  # of a thread block of smxx_lsh_prepare.cu
TRANSPOSE_TILE = 64  # keys and columns that one of them transposes
KEY_COLUMNS_MULTIPLE = 8  # rows of the transposed K are whole 16-byte chunks for 16-bit types
MERGE_ROWS = 8  # rows of a thread block of smxx_merge.cu


@dataclass(frozen=True)
class Device:
    """What the plan needs to know of a GPU.

    Attributes
    ----------
    capability : int
        Compute capability times ten: 80, 86, 89, 90, ...
    shared_bytes : int
        Shared memory that one thread block may have, after opting in.
    """

    capability: int
    shared_bytes: int


@dataclass(frozen=True)
class Kernel:
    """A kernel by name and compile-time constants, with the launch values that follow from them."""

    name: str
    constants: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int = 0
    options: tuple[str, ...] = ()  # of the compiler


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
        shared memory is as busy as the tensor cores.
    """

    block_m: int
    tile_k: int
    row_tiles: int


@dataclass(frozen=True)
class Prepare:
    """How the thread blocks of smxx_lsh_prepare.cu share its two tasks.

    Attributes
    ----------
    group_blocks : int
        Blocks of queries with one column order each, per head.
    order_units, order_blocks : int
        Blocks of queries in all, and the thread blocks that order their columns.
    key_columns, key_blocks : int
        Row length of the transposed K, and thread blocks along it; 0 if K is not transposed.
    spacing : int
        Every spacing-th thread block orders, until all have come.
    blocks : int
        Thread blocks in all.
    """

    group_blocks: int
    order_units: int
    order_blocks: int
    key_columns: int
    key_blocks: int
    spacing: int
    blocks: int


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
    prepare_kernel : Kernel or None
        What runs before it when the score product is grouped: the column order, and K transposed.
    prepare : Prepare or None
        Its thread blocks.
    """

    attention: Kernel
    tile: Tile
    row_blocks: int
    blocks: int
    prepare_kernel: Kernel | None = None
    prepare: Prepare | None = None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


SMALL_SEQLEN_Q = 64  # up to here a 128-row tile would be half empty


def _depth(head_dim: int, group: int) -> int:
    """Terms of the score product, padded to whole matrix instructions."""
    return _round_up(head_dim // max(group, 1), 16)


def fuses_in_shared(problem: Problem, device: Device) -> bool:
    """Whether the columns of a group are summed within shared memory, rather than on the way from there to the product.

    On the way, nothing waits for Khat, but every warp makes the sums anew, and an operand takes group_size reads. On an
    H100 (bfloat16, 16k tokens, hidden size 2048; N = 4k / 16k), in shared memory and on the way: LSH(2), 128 columns,
    1.875 / 6.42 and 1.725 / 5.94 ms; 64 columns 2.00 / 6.76 and 1.86 / 6.43 ms; LSH(4), 64 columns, 1.71 / 5.89 and
    1.75 / 6.16 ms.
    """
    reduction = problem.reduction
    if reduction is None:
        return False
    # float32 has no matrix load that transposes. The others are those for which ptxas has no registers left.
    crowded = reduction.representative == "mean" or (problem.head_dim_v == 64 and device.capability < 90)
    return problem.dtype == "float32" or reduction.group_size > 2 or crowded


def shared_bytes(
    tile: Tile, itemsize: int, head_dim: int, head_dim_v: int, group: int, fuse_in_shared: bool
) -> int:
    """Shared memory of the attention kernel; a ``static_assert`` in the kernel compares it with its own."""
    pad = 16 // itemsize
    members = max(group, 1)
    depth = _depth(head_dim, group)
    columns_v = _round_up(head_dim_v, 16)
    queries = tile.block_m * (depth + pad) * itemsize
    if group:
        keys = (members + fuse_in_shared) * depth * (tile.tile_k + 8) * itemsize
        table = members * depth * 8
    else:
        keys = tile.tile_k * (depth + pad) * itemsize
        table = 0
    values = tile.tile_k * (columns_v + pad) * itemsize
    out = tile.block_m * (columns_v + pad) * itemsize
    return max(_round_up(queries + keys + values + table, 16), out)


def _longest_keys(problem: Problem, device: Device, group: int) -> int:
    """Keys per step that a 128-row tile of a 16-bit type can have without spilling.

    A thread holds row_tiles * (columns_v / 2 + tile_k / 2) accumulators of its 255 registers; what ptxas makes of
    the rest differs between architectures, and CI compiles every variant for all of them and refuses a spill.
    Longer is faster: against FlashAttention-2 in one run on one H200 (bfloat16, 16k tokens, hidden size 2048),
    N = 4k / 16k, 64 columns: 128 keys 1.11 / 1.07, 96 keys 1.10 / 1.06, 64 keys 1.00 / 0.98; 128 columns: 64 keys
    1.06 / 1.02, 48 keys 1.04 / 1.01.
    """
    columns = problem.head_dim_v
    square = problem.head_dim == columns
    plain = problem.aligned and problem.softcap is None and problem.scale > 0
    # From sm_100 on ptxas keeps more beside them; grouped kernels suffer from it on sm_100 and its kin only.
    crowded = device.capability >= 100 and not (group and device.capability >= 120)
    if columns <= 64:
        if columns <= 32 and problem.aligned and (square or not group):
            return 128
        if columns == 64 and square and plain and not crowded:
            return 128
        return 64 if group or not plain else 96
    if columns <= 128:
        if not problem.aligned or (group and not (plain and square)):
            return 32
        if group:
            return 64 if columns <= 96 or not crowded else 32
        return 64 if square and plain and not crowded else 48
    # O takes 128 registers of a 16-row warp; 64 keys 0.87 / 0.83 at 256 columns, 32 keys 0.80 / 0.77.
    return 64


def _tiles(problem: Problem, device: Device, group: int) -> list[Tile]:
    """Tiles in order of preference."""
    if problem.dtype == "float32":
        # Every operand is split into two in registers, so one 16-row tile per warp is what fits.
        return [Tile(64, keys, 1) for keys in (32, 16) if keys == 16 or problem.head_dim_v <= 128]
    keys = _longest_keys(problem, device, group)
    # Two row tiles per warp halve the reads of shared memory: with one (and 64 rows), 128 columns ran at 0.78 / 0.73
    # of FlashAttention-2. Beyond 128 columns O alone would take every register.
    row_tiles = 2 if problem.head_dim_v <= 128 else 1
    return [
        *(Tile(128, n, row_tiles) for n in (keys, 64, 48, 32) if n <= keys),
        *(Tile(64, n, 1) for n in (64, 32, 16) if n <= keys),
    ]


def _choose_tile(problem: Problem, device: Device, group: int) -> Tile:
    """The first tile whose shared memory the device has, and whose rows lie inside one block of the reduction."""
    itemsize = ITEMSIZE[problem.dtype]
    block_q = problem.reduction.rows_per_block if problem.reduction is not None else BLOCK_Q_DEFAULT
    fused = fuses_in_shared(problem, device)
    for tile in _tiles(problem, device, group):
        if block_q % tile.block_m or (problem.seqlen_q <= SMALL_SEQLEN_Q and tile.block_m > SMALL_SEQLEN_Q):
            continue
        needed = shared_bytes(tile, itemsize, problem.head_dim, problem.head_dim_v, group, fused)
        if needed <= device.shared_bytes:
            return tile
    raise AssertionError(f"no tile for {problem} on {device}")  # the last tiles fit the smallest device


def attention_kernel(problem: Problem, device: Device) -> tuple[Kernel, Tile]:
    """The attention kernel of a problem, and its tile."""
    reduction = problem.reduction
    group = 0 if reduction is None else reduction.group_size
    tile = _choose_tile(problem, device, group)
    itemsize = ITEMSIZE[problem.dtype]
    fused = fuses_in_shared(problem, device)
    smem = shared_bytes(tile, itemsize, problem.head_dim, problem.head_dim_v, group, fused)
    constants = {
        "DTYPE": DTYPE_NUMBER[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "GROUP": group,
        "FUSE_IN_SHARED": int(fused),
        "MEAN": int(reduction is not None and reduction.representative == "mean"),
        "BLOCK_M": tile.block_m,
        "TILE_K": tile.tile_k,
        "ROW_TILES": tile.row_tiles,
        "ALIGNED": int(problem.aligned),
        "SCORE": int(problem.softcap is not None or problem.scale <= 0),
        "SPLIT": int(problem.dtype == "float32" and not problem.tf32),
        "SHARED_BYTES": smem,
    }
    # For these, ptxas hoists so many loads at its own level that it spills; at level 1 it does not.
    crowded = problem.dtype == "float32" and problem.head_dim_v > 32 and device.capability >= 120
    options = ("-Xptxas=-O1",) if crowded else ()
    threads = tile.block_m // tile.row_tiles * 2
    return Kernel("sm80_flash_fwd", tuple(constants.items()), threads, smem, options), tile


def prepare_kernel(dtype: str, head_dim: int, aligned: bool) -> Kernel:
    """The kernel that orders the columns of every block of queries, and transposes K."""
    constants = (("DTYPE", DTYPE_NUMBER[dtype]), ("HEAD_DIM", head_dim), ("ALIGNED", int(aligned)))
    return Kernel("smxx_lsh_prepare", constants, PREPARE_THREADS)


def prepare(
    batch: int, heads: int, seqlen_q: int, head_dim: int, block_q: int, keys: tuple[int, int] | None
) -> Prepare:
    """Plan the preparation of grouped attention; keys is (heads_kv, seqlen_k), None for the order alone.

    Raises
    ------
    ValueError
        If one launch cannot hold it.
    """
    group_blocks = -(-seqlen_q // block_q)
    order_units = batch * heads * group_blocks
    order_blocks = -(-order_units // (PREPARE_THREADS // _round_up(head_dim // 2, 32)))
    key_columns = key_blocks = transpose_blocks = 0
    if keys is not None:
        key_columns = _round_up(keys[1], KEY_COLUMNS_MULTIPLE)
        key_blocks = -(-key_columns // TRANSPOSE_TILE)
        transpose_blocks = key_blocks * -(-head_dim // TRANSPOSE_TILE) * batch * keys[0]
    # Among the first blocks one in five orders: enough of them to keep the arithmetic busy from the start.
    spacing = 1 + min(4, transpose_blocks // max(order_blocks, 1))
    blocks = check_blocks(order_blocks + transpose_blocks)
    return Prepare(group_blocks, order_units, order_blocks, key_columns, key_blocks, spacing, blocks)


def merge_kernel(dtype: str, head_dim_v: int) -> Kernel:
    """The kernel that merges shards of the keys."""
    return Kernel("smxx_merge", (("DTYPE", DTYPE_NUMBER[dtype]), ("HEAD_DIM_V", head_dim_v)), MERGE_ROWS * 32)


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


@functools.lru_cache(maxsize=1024)
def plan(problem: Problem, device: Device) -> Plan:
    """Plan a problem that is not empty.

    Raises
    ------
    ValueError
        If one launch cannot hold it.
    """
    kernel, tile = attention_kernel(problem, device)
    row_blocks = -(-problem.seqlen_q // tile.block_m)
    blocks = check_blocks(row_blocks * problem.batch * problem.heads)
    if problem.reduction is None:
        return Plan(kernel, tile, row_blocks, blocks)
    return Plan(
        kernel,
        tile,
        row_blocks,
        blocks,
        prepare_kernel=prepare_kernel(problem.dtype, problem.head_dim, problem.aligned),
        prepare=prepare(
            problem.batch,
            problem.heads,
            problem.seqlen_q,
            problem.head_dim,
            problem.reduction.rows_per_block,
            (problem.heads_kv, problem.seqlen_k),
        ),
    )
