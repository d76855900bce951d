"""Plan and arrays in, results out: allocate, take the stream, launch. No synchronisation, no host read of device data.

What a call needs beyond its pointers depends on the :class:`Problem` alone and is prepared once, as a recipe: a warm
call copies a parameter block, fills in addresses and launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cudistr import compiler, lowrank, reference, tuned
from cudistr.errors import CudaUnavailableError
from cudistr.normalize import MAX_SHARDS, Problem, near_keys, row_strides, rows_aligned
from cudistr.plan import (
    DECIDE_ROWS,
    DTYPE_NUMBER,
    HOPPER_GROUP_ROWS,
    ITEMSIZE,
    LOWRANK_KEYS,
    LOWRANK_QUERIES,
    LOWRANK_ROWS,
    MAX_PASSES,
    PROBE_ROWS,
    PROJECT_GROUP,
    Device,
    Kernel,
    Pass,
    Plan,
    Prepare,
    Split,
    Step,
    Tile,
    TileKey,
    check_blocks,
    check_device,
    copied_queries,
    decide_kernel,
    draw_kernel,
    draw_shares,
    energy_order,
    half_limit,
    keeps_keys,
    key_energy,
    key_spans,
    lowrank_columns,
    lowrank_keys,
    lowrank_steps,
    merge_kernel,
    merge_rows,
    merge_shard_kernel,
    panel_columns,
    passes,
    plan,
    prepare,
    prepare_kernel,
    probe_kernel,
    probe_splits,
    project_kernel,
    project_rows,
    weights,
)
from cudistr.reductions import LSH, MAX_PROJ, Energy, projections
from cudistr.tensormap import MAP_BYTES, Layout, encode

LOG2_E = math.log2(math.e)
UNBOUNDED = 2**40  # further than any key, near enough that sums with positions stay in 64 bits


def _parameters(*fields: tuple[str, str], multiple: int = 1) -> np.dtype[Any]:
    """The layout of a kernel's parameter struct: pointers and 64-bit integers first, so that nothing is padded.

    The size is made a multiple of ``multiple``, as the alignment of the struct asks for.
    """
    plain = np.dtype([(name, kind) for names, kind in fields for name in names.split()], align=True)
    size = -(-plain.itemsize // multiple) * multiple
    names = plain.names or ()
    kinds = [plain[name] for name in names]
    offsets = [plain.fields[name][1] for name in names] if plain.fields else []
    return np.dtype({"names": names, "formats": kinds, "offsets": offsets, "itemsize": size})


# Twins of the structs at the head of each kernel.
_EVERY_ATTENTION = (
    ("q_batch q_head q_row k_batch k_head k_row v_batch v_head v_row out_batch out_head out_row", "i8"),
    ("band_low band_high split_rows", "i8"),
    ("heads heads_per_kv seqlen_q seqlen_k packed queries splits", "i4"),
    ("row_blocks section group_blocks tiles_per_block key_columns out_aligned", "i4"),
    ("scale softcap score_scale", "f4"),
)
_ATTENTION = _parameters(("q k v out lse partial permutation", "u8"), *_EVERY_ATTENTION)
_WEIGHTED = _parameters(("q k v out lse partial permutation weights shares", "u8"), *_EVERY_ATTENTION)
_HALF = _parameters(("q k v out lse partial permutation wide", "u8"), *_EVERY_ATTENTION)
_BY_ENERGY = _parameters(("q k v out lse partial permutation weights", "u8"), *_EVERY_ATTENTION)
_PASSES = range(MAX_PASSES + 1)
_BANDS = (" ".join(f"pass_{bound}{i}" for bound in ("low", "high") for i in _PASSES), "i8")
_NEAR = (("near_start near_stop", "i8"), ("exact_rows exact_keys", "i4"))
_ENDS = (" ".join(f"pass_{bound}{i}" for bound in ("first", "end", "part") for i in _PASSES), "i4")
_EVERY_PASSES = (
    ("q_batch q_head q_row k_batch k_head k_row v_batch v_head v_row out_batch out_head out_row", "i8"),
    _BANDS,
    *_NEAR,
    _ENDS,
    ("exact_passes passes", "i4"),
    ("split_rows", "i8"),
    ("heads heads_per_kv seqlen_q seqlen_k packed queries splits", "i4"),
    ("row_blocks section group_blocks tiles_per_block key_columns out_aligned", "i4"),
    ("scale softcap score_scale", "f4"),
)
_RANKED = _parameters(
    ("q k v out lse partial permutation qhat khat ranks shift", "u8"),
    ("qhat_batch qhat_head qhat_row khat_batch khat_head khat_row", "i8"),
    *_EVERY_PASSES,
)


@functools.cache
def _beside_exact_keys(plain: np.dtype[Any]) -> np.dtype[Any]:
    """The parameters of a kernel of groups, or of columns kept by energy, where some keys stay exact."""
    names = plain.names or ()
    pointers = " ".join((*names[: names.index("q_batch")], "exact_k", "shift"))
    return _parameters((pointers, "u8"), ("exact_k_batch exact_k_head exact_k_row", "i8"), *_EVERY_PASSES)


_HOPPER_END = (
    (
        "heads heads_per_kv seqlen_q seqlen_k row_blocks tiles turns all_heads section shared_first shared_tiles "
        "group_blocks tiles_per_block out_aligned",
        "i4",
    ),
    ("scale softcap score_scale", "f4"),
)
_HOPPER_BAND = (("out_batch out_head out_row band_low band_high", "i8"), *_HOPPER_END)
_HOPPER_PASSES = (
    ("out_batch out_head out_row", "i8"),
    _BANDS,
    *_NEAR,
    _ENDS,
    ("exact_passes passes", "i4"),
    *_HOPPER_END,
)
_HOPPER = _parameters(
    ("q k v", f"V{MAP_BYTES}"), ("out lse permutation counter", "u8"), *_HOPPER_BAND, multiple=64
)
_HOPPER_HALF = _parameters(
    ("q k v", f"V{MAP_BYTES}"), ("out lse permutation counter wide", "u8"), *_HOPPER_BAND, multiple=64
)
_HOPPER_WEIGHTED = _parameters(
    ("q k v", f"V{MAP_BYTES}"),
    ("out lse permutation counter weights shares", "u8"),
    *_HOPPER_BAND,
    multiple=64,
)
_HOPPER_RANKED = _parameters(
    ("q k v qhat khat", f"V{MAP_BYTES}"),
    ("ranks shift out lse permutation counter", "u8"),
    *_HOPPER_PASSES,
    multiple=64,
)
_HOPPER_COPIED = _parameters(
    ("q k v qhat", f"V{MAP_BYTES}"),
    ("shift out lse permutation counter", "u8"),
    *_HOPPER_PASSES,
    multiple=64,
)
_HOPPER_KEPT = _parameters(
    ("q k v", f"V{MAP_BYTES}"),
    ("shift out lse permutation counter", "u8"),
    *_HOPPER_PASSES,
    multiple=64,
)
_HOPPER_KEPT_HALF = _parameters(
    ("q k v", f"V{MAP_BYTES}"),
    ("shift out lse permutation counter wide", "u8"),
    *_HOPPER_PASSES,
    multiple=64,
)
_PROJECT = _parameters(
    ("q k qhat khat q_factors k_factors bias mean widths sketch residual shift", "u8"),
    ("q_batch q_head q_row k_batch k_head k_row", "i8"),
    (
        "slices block_rows q_blocks k_blocks q_units heads heads_per_kv seqlen_q seqlen_k columns unit_batch",
        "i4",
    ),
    ("scale", "f4"),
)
_BOUNDS = ("first", "end", "near_first", "near_end")
_DRAW = _parameters(
    ("residual ranks rows factors counts", "u8"),
    (" ".join(f"{bound}_{end}" for bound in _BOUNDS for end in ("least", "most")), "i4"),
    ("exact_rows exact_keys sinks seqlen_q head_dim heads shares", "i4"),
)
_PROBE = _parameters(
    ("q k v qhat khat shift ranks rows outputs sums", "u8"),
    ("q_batch q_head q_row k_batch k_head k_row v_batch v_head v_row", "i8"),
    ("band_low band_high", "i8"),
    *_NEAR,
    ("sinks heads heads_per_kv seqlen_q seqlen_k columns splits", "i4"),
    ("scale", "f4"),
)
_DECIDE = _parameters(
    ("factors outputs sums wanted known counts compared ranks errors", "u8"),
    ("splits", "i4"),
    ("limit spread share", "f4"),
)
_DRAWN = (
    ("q_batch q_head q_row k_batch k_head k_row", "i8"),
    ("heads_kv heads_per_kv seqlen_k samples", "i4"),
    ("band_low band_high", "i8"),
    *_NEAR,
)
_LOWRANK_ROWS = _parameters(
    ("q k drawn sums center", "u8"), *_DRAWN, ("sinks splits", "i4"), ("scale", "f4"), multiple=8
)
_LOWRANK_SUMS = _parameters(
    ("q k drawn queries sums center of_keys of_queries", "u8"),
    *_DRAWN,
    ("sinks row_splits splits query_splits", "i4"),
    ("scale", "f4"),
    multiple=8,
)
_LOWRANK_FACTORS = _parameters(
    ("of_keys of_queries start vectors center scratch", "u8"),
    ("factors mean q_lanes k_lanes bias mean_lanes sketch_lanes", "u8"),
    ("splits query_splits", "i4"),
    multiple=8,
)
_PREPARE_END = (
    ("q_batch q_head q_row k_batch k_head k_row", "i8"),
    (
        "order_units order_blocks heads seqlen_q block_q group_blocks heads_kv seqlen_k key_columns key_blocks",
        "i4",
    ),
    ("code_bits", "u4"),
    ("tiles", "i4"),
    ("limit", "f4"),
)
_PREPARE = _parameters(("q projections permutation k transposed", "u8"), *_PREPARE_END, multiple=8)
_PREPARE_HALF = _parameters(("q projections permutation k transposed wide", "u8"), *_PREPARE_END, multiple=8)
_WEIGHTS = _parameters(
    ("q k sums permutation weights shares shift", "u8"),
    ("q_batch q_head q_row k_batch k_head", "i8"),
    ("heads heads_per_kv seqlen_q seqlen_k block_q group_blocks spans rounded", "i4"),
    ("scale", "f4"),
    multiple=8,
)
_KEY_ENERGY = _parameters(
    ("k sums", "u8"),
    ("k_batch k_head k_row units", "i8"),
    ("heads_kv seqlen_k spans", "i4"),
    multiple=8,
)
_ENERGY_ORDER = _parameters(
    ("q k sums permutation means shift", "u8"),
    ("q_batch q_head q_row k_batch k_head", "i8"),
    ("heads heads_per_kv seqlen_q seqlen_k block_q group_blocks spans keep rounded", "i4"),
    ("scale", "f4"),
    multiple=8,
)
_COPIED = _parameters(
    ("q permutation numbers copied", "u8"),
    ("q_batch q_head q_row shares", "i8"),
    ("heads seqlen_q block_q group_blocks parts", "i4"),
    multiple=8,
)
_MERGE = _parameters(
    (" ".join(f"out{s}" for s in range(MAX_SHARDS)), "u8"),
    (" ".join(f"lse{s}" for s in range(MAX_SHARDS)), "u8"),
    ("out lse", "u8"),
    ("rows shards", "i8"),
)
_MERGE_SHARD = _parameters(
    ("found found_lse part part_lse out lse", "u8"),
    ("rows", "i8"),
    ("seqlen start span first last", "i4"),
)
_MERGE_SPLITS = _parameters(
    ("partial lses out lse", "u8"),
    ("out_batch out_head out_row rows", "i8"),
    ("heads seqlen_q splits row_warps", "i4"),
)


_Pointers = ctypes.c_char_p * 1


class _Launch(NamedTuple):
    """A kernel ready to go: call it with the tensor maps and addresses that its parameters begin with."""

    function: Any
    launch: Any  # cupy.cuda.driver.launchKernel
    current_stream: Any  # cupy.cuda.get_current_stream
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    addresses: struct.Struct
    rest: bytes  # the parameters behind the addresses

    def __call__(self, *addresses: int | bytes) -> None:
        # The driver takes an array of pointers to parameters, and there is one: the struct. Calling CuPy's function
        # object with a NumPy array as a struct does the same, and costs two microseconds more.
        parameters = _Pointers(self.addresses.pack(*addresses) + self.rest)
        self.launch(
            self.function.ptr, *self.grid, self.threads, 1, 1, self.shared_bytes, self.current_stream().ptr,
            ctypes.addressof(parameters), 0,
        )  # fmt: skip


def _launch(
    kernel: Kernel,
    grid: int | tuple[int, int, int],
    device: Device,
    index: int,
    layout: np.dtype[Any],
    values: dict[str, Any],
) -> _Launch:
    record = np.zeros(1, layout)
    for name, value in values.items():
        record[name] = value
    kinds = [layout[name] for name in layout.names or ()]
    maps = sum(kind.kind == "V" for kind in kinds)
    addresses = struct.Struct(f"{MAP_BYTES}s" * maps + "Q" * kinds.count(np.dtype(np.uint64)))
    import cupy

    return _Launch(
        compiler.function(kernel, device.capability, index),
        cupy.cuda.driver.launchKernel,
        cupy.cuda.get_current_stream,
        grid if isinstance(grid, tuple) else (grid, 1, 1),
        kernel.threads,
        kernel.shared_bytes,
        addresses,
        record.tobytes()[addresses.size :],
    )


class _Columns(NamedTuple):
    """What finds the columns of every block: their order, and weights and shares, or means, for them."""

    # By hash; for attention it transposes K too, and where columns go by energy nothing else.
    order: _Launch | None
    again: _Launch | None  # transposes K as it is, if it was not good enough in float16
    vectors: Any  # of the hash
    key_energy: _Launch | None
    weights: _Launch | None  # or the order by energy, and means
    permutation_bytes: int
    number_bytes: tuple[int, ...]  # of weights and of shares, or of means
    sums_bytes: int

    @property
    def more_bytes(self) -> int:
        """Of what follows the permutation."""
        return sum(self.number_bytes) + self.sums_bytes

    def numbers(self, more: int) -> list[int]:
        """Addresses of weights and shares, or of means, that begin at ``more``."""
        return [more + sum(self.number_bytes[:i]) for i in range(len(self.number_bytes))]

    def __call__(
        self,
        q: int,
        k: int,
        far: int,
        transposed: int,
        permutation: int,
        more: int,
        shift: int = 0,
        wide: int = 0,
    ) -> None:
        """Run on addresses; ``more`` is where numbers, and sums over K behind them, have their place.

        ``far`` is where the keys begin that columns go by: behind those that stay exact. ``shift``, if not 0, is where
        goes what the reduction leaves out of the lse; ``wide``, where K comes in float16, is where it is told that it
        cannot.
        """
        if self.order is not None:
            vectors = 0 if self.vectors is None else self.vectors.data.ptr
            given = (q, vectors, permutation, k, transposed)
            if self.again is None:
                self.order(*given)
            else:
                self.order(*given, wide)
                self.again(*given, wide)
        if self.weights is None or self.key_energy is None:
            return
        sums = more + sum(self.number_bytes)
        if self.key_energy.grid[0]:  # none without keys
            self.key_energy(far, sums)
        self.weights(q, far, sums, permutation, *self.numbers(more), shift)


class _Recipe(NamedTuple):
    attention: _Launch
    columns: _Columns | None
    transposed_bytes: int
    permutation_bytes: int  # of the column orders; their weights follow
    more_bytes: int  # of what goes with them, and of the sums that it comes from
    counter_bytes: int  # of the numbers below, which are zero at first; behind all of these
    counts: bool  # whether the Hopper kernel counts tiles, in the first of them
    tells: bool  # whether it is told, in the second, that K is not float16
    maps: tuple[Layout, ...] | None  # of q, k and v, and of Qhat and Khat, for the Hopper kernel
    merge: _Launch | None  # of what splits find
    partial_bytes: int  # of the outputs of all splits; their lses follow
    split_bytes: int  # of both


class Reduced(NamedTuple):
    """Qhat and Khat beside q and k, and how many of their columns each head uses."""

    queries: Any  # (batch, heads, seqlen_q, columns)
    keys: Any  # (batch, heads_kv, seqlen_k, columns)
    # int32 (batch, heads): multiples of 16, 0 included; head_dim stands for q and k themselves. None where Qhat has all
    # columns, and k is Khat.
    ranks: Any
    shift: Any = None  # float32 (batch, heads, seqlen_q): what scores of Qhat and Khat lack; None for nothing


class Factors(NamedTuple):
    """What makes Qhat and Khat, on a device. A unit is a KV head, of every batch entry or of all together."""

    queries: (
        Any  # A as lanes of matrix instructions have it, uint32 (units, columns / 16, parts, steps, 32, 4)
    )
    keys: Any  # B, the same
    bias: Any  # mean B, float32 (units, columns)
    mean: Any  # of K, as lanes 0 to 3 have it, uint32 (units, 1, parts, steps, 4, 4)
    widths: Any  # int32 (units,): columns to make, -1 for heads that have those of q and k themselves
    sketch: Any  # random vectors less what A and B keep of them, uint32 (units, 1, parts, steps, 32, 4)


@functools.cache
def device_properties(index: int) -> Device:
    """What the plan needs to know of a GPU.

    Raises
    ------
    CudaUnavailableError
        If the driver does not answer.
    """
    import cupy

    runtime = cupy.cuda.runtime
    try:
        shared = runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index)
        count = runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, index)
        device = Device(int(cupy.cuda.Device(index).compute_capability), int(shared), int(count))
    except runtime.CUDARuntimeError as error:
        raise _no_answer(index, error) from error
    found = _tiles.get(index)
    return dataclasses.replace(
        device, tiles=tuned.load_tiles(device, device_name(index)) if found is None else found
    )


@functools.cache
def break_even(index: int) -> tuned.Kept:
    """From how many keys on ``cudistr tune`` has measured reductions to be faster on a device."""
    return tuned.Kept(tuned.load_break_even(device_properties(index), device_name(index)))


_tiles: dict[int, tuple[tuple[TileKey, Tile], ...]] = {}  # in place of those that are kept


def use_tiles(index: int, tiles: tuple[tuple[TileKey, Tile], ...] | None) -> None:
    """Plan calls on a device with these tiles from now on; with None, with those that ``cudistr tune`` has kept."""
    _tiles.pop(index, None)
    if tiles is not None:
        _tiles[index] = tiles
    device_properties.cache_clear()
    break_even.cache_clear()
    _recipe.cache_clear()


def device_name(index: int) -> str:
    """What the driver calls a GPU."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(index)["name"]
    return name.decode() if isinstance(name, bytes) else str(name)


def _no_answer(index: int, error: Exception) -> CudaUnavailableError:
    return CudaUnavailableError(
        f"the CUDA driver does not answer for device {index} ({error}). Run `python -m cudistr doctor`."
    )


_HERE = contextlib.nullcontext()


def placed(index: int | None, stream: Any) -> Any:
    """A context in which the current device and stream are those of the call; None is the host."""
    if index is None:
        return _HERE
    import cupy

    runtime = cupy.cuda.runtime
    try:
        other = runtime.getDevice() != index
    except runtime.CUDARuntimeError as error:  # in a forked process, for example
        raise _no_answer(index, error) from error
    if stream is None:
        return cupy.cuda.Device(index) if other else _HERE
    stack = contextlib.ExitStack()
    if other:
        stack.enter_context(cupy.cuda.Device(index))
    stack.enter_context(stream)
    return stack


def _extent(problem: Problem) -> dict[str, int]:
    """Heads, lengths, and which keys queries see, as the parameters of attention kernels name them."""
    offset = problem.seqlen_k - problem.seqlen_q
    return {
        "band_low": -UNBOUNDED if problem.left is None else offset - problem.left,
        "band_high": UNBOUNDED if problem.right is None else offset + problem.right,
        "heads": problem.heads,
        "heads_per_kv": problem.heads // problem.heads_kv,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
    }


def _near(problem: Problem) -> dict[str, int]:
    """The keys near a query that stay exact, as the parameters of kernels name them."""
    near = near_keys(problem)
    return {
        "near_start": near.start,
        "near_stop": near.stop,
        "exact_rows": near.rows,
        "exact_keys": near.keys,
    }


def _passes(problem: Problem) -> dict[str, int]:
    """The passes over the keys of a reduced problem, as the parameters of attention kernels name them."""
    position = problem.seqlen_k - problem.seqlen_q  # of the first query
    chosen = passes(problem)
    whole = Pass(
        False,
        0,
        problem.seqlen_k,
        -UNBOUNDED if problem.left is None else -problem.left,
        UNBOUNDED if problem.right is None else problem.right,
    )
    values = {"exact_passes": sum(not x.reduced for x in chosen), "passes": len(chosen)}
    values |= _near(problem)
    for i, one in (*enumerate(chosen), (MAX_PASSES, whole)):
        values |= {f"pass_first{i}": one.first, f"pass_end{i}": one.last, f"pass_part{i}": one.part}
        values |= {f"pass_low{i}": position + one.low, f"pass_high{i}": position + one.high}
    return values


@functools.lru_cache(maxsize=1024)
def _recipe(problem: Problem, out_strides: tuple[int, ...], out_aligned: bool) -> _Recipe:
    """Compile and prepare a problem. ``out_strides`` are in elements."""
    assert problem.device is not None
    device = device_properties(problem.device)
    check_device(device, problem.device)
    chosen = plan(problem, device)
    reduction = problem.reduction
    seen = dict(zip(("q_batch", "q_head", "q_row"), problem.q_strides, strict=True))
    seen |= dict(zip(("v_batch", "v_head", "v_row"), problem.v_strides, strict=True))
    keys = dict(zip(("k_batch", "k_head", "k_row"), problem.k_strides, strict=True))
    plain = problem.softcap is None and problem.scale > 0
    values: dict[str, Any] = {
        **seen,
        **keys,
        **dict(zip(("out_batch", "out_head", "out_row"), out_strides, strict=True)),
        **_extent(problem),
        "packed": 1,
        "queries": problem.seqlen_q,
        "splits": 1,
        "row_blocks": chosen.row_blocks,
        "section": chosen.section,
        "out_aligned": out_aligned,
        "scale": problem.scale,
        "softcap": problem.softcap or 0.0,
        "score_scale": problem.scale * LOG2_E if plain else LOG2_E,
    }
    if chosen.packed > 1:
        values |= {
            "heads": problem.heads // chosen.packed,
            "heads_per_kv": problem.heads // chosen.packed // problem.heads_kv,
            "seqlen_q": problem.seqlen_q * chosen.packed,
            "packed": chosen.packed,
            "q_head": problem.q_strides[1] * chosen.packed,
            "q_row": problem.q_strides[1 if problem.seqlen_q == 1 else 2],
        }
    merge, partial_bytes, split_bytes = None, 0, 0
    if chosen.split is not None:
        rows = problem.batch * problem.heads * problem.seqlen_q
        values |= {"splits": chosen.split.splits, "split_rows": rows}
        merge = _merge_splits_launch(problem, chosen.split, device, out_strides)
        partial_bytes = chosen.split.splits * rows * problem.head_dim_v * 4
        split_bytes = partial_bytes + chosen.split.splits * rows * 4
    columns = None
    transposed_bytes = permutation_bytes = more_bytes = 0
    if reduction is not None:
        assert chosen.prepare_kernel is not None and chosen.prepare is not None
        key_columns = chosen.prepare.key_columns
        per_head = problem.head_dim * key_columns
        transposed_bytes = problem.batch * problem.heads_kv * per_head * ITEMSIZE[problem.dtype]
        values |= {
            "k_batch": problem.heads_kv * per_head,
            "k_head": per_head,
            "k_row": key_columns,
            "group_blocks": chosen.prepare.group_blocks,
            "tiles_per_block": reduction.rows_per_block // chosen.tile.block_m,
            "key_columns": key_columns,
        }
        own = {
            **keys,
            "heads_kv": problem.heads_kv,
            "seqlen_k": problem.seqlen_k,
            "limit": half_limit(problem),
        }
        order, again, vectors = _prepare_launch(
            chosen.prepare_kernel,
            chosen.prepare,
            (problem.heads, problem.seqlen_q),
            problem.q_strides,
            reduction,
            problem.device,
            own,
            chosen.again,
        )
        columns = _columns(
            (order, again),
            vectors,
            (chosen.key_energy, chosen.columns),
            (problem.batch, problem.heads, problem.seqlen_q, problem.head_dim),
            problem.q_strides,
            reduction,
            problem.device,
            own
            | {
                "heads_per_kv": problem.heads // problem.heads_kv,
                "seqlen_k": problem.seqlen_k - problem.sinks,
                "scale": problem.scale,
            },
        )
        permutation_bytes, more_bytes = columns.permutation_bytes, columns.more_bytes
    ranked, kept = problem.ranked, keeps_keys(problem)
    if ranked is not None or kept:
        values |= _passes(problem)
    if ranked is not None:
        for name, strides in (("qhat", ranked.q_strides), ("khat", ranked.k_strides)):
            values |= dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), strides, strict=True))
    parameters, maps = _ATTENTION if ranked is None else _RANKED, None
    if reduction is not None and reduction.by_keys:
        parameters = _BY_ENERGY if isinstance(reduction, Energy) else _WEIGHTED
    if chosen.again is not None:
        parameters = _HALF
    if kept and not chosen.attention.specific:
        parameters = _beside_exact_keys(parameters)
        values |= {f"exact_{name}": stride for name, stride in keys.items()}
    if chosen.attention.specific:
        maps = _maps(problem, chosen)
        parameters = _HOPPER_WEIGHTED if parameters is _WEIGHTED else _HOPPER_KEPT if kept else _HOPPER
        if chosen.again is not None:
            parameters = _HOPPER_KEPT_HALF if kept else _HOPPER_HALF
        if ranked is not None:
            parameters = _HOPPER_COPIED if ranked.copied else _HOPPER_RANKED
        values |= {
            "tiles": chosen.works,
            "turns": chosen.turns,
            "all_heads": problem.batch * problem.heads,
            "shared_first": chosen.shared_first,
            "shared_tiles": chosen.shared_tiles,
        }
    values = {name: x for name, x in values.items() if name in (parameters.names or ())}
    return _Recipe(
        _launch(chosen.attention, chosen.grid, device, problem.device, parameters, values),
        columns,
        transposed_bytes,
        permutation_bytes,
        more_bytes,
        8 if chosen.dynamic or chosen.again else 0,
        chosen.dynamic,
        chosen.again is not None,
        maps,
        merge,
        partial_bytes,
        split_bytes,
    )


def _columns(
    order: tuple[_Launch | None, _Launch | None],
    vectors: Any,
    steps: tuple[Step | None, Step | None],
    shape: tuple[int, ...],
    strides: tuple[int, int, int],
    reduction: LSH | Energy,
    index: int,
    more: dict[str, Any],
) -> _Columns:
    """The steps that find columns, behind the order by hash; ``more`` is what K has to say."""
    device = device_properties(index)
    batch, heads, seqlen_q, head_dim = shape
    blocks = -(-seqlen_q // reduction.rows_per_block)
    units = batch * heads * blocks
    size = units * head_dim
    queries = {
        **dict(zip(("q_batch", "q_head", "q_row"), strides, strict=True)),
        "heads": heads,
        "seqlen_q": seqlen_q,
        "block_q": reduction.rows_per_block,
        "group_blocks": blocks,
    }
    sums, last = steps
    if sums is None or last is None:
        return _Columns(*order, vectors, None, None, size, (), 0)
    spans = key_spans(more["seqlen_k"])
    all_spans = batch * more["heads_kv"] * spans
    keys = {name: x for name, x in more.items() if name in (_KEY_ENERGY.names or ())}
    keys |= {"units": all_spans, "spans": spans}
    layout, count = (_ENERGY_ORDER, 1) if isinstance(reduction, Energy) else (_WEIGHTS, 2)
    queries |= {"units": units, "spans": spans, "keep": getattr(reduction, "keep", 0)} | more
    queries = {name: x for name, x in queries.items() if name in (layout.names or ())}
    return _Columns(
        *order,
        vectors,
        _launch(sums.kernel, sums.blocks, device, index, _KEY_ENERGY, keys),
        _launch(last.kernel, last.blocks, device, index, layout, queries),
        size,
        (4 * size,) * count,
        8 * all_spans * head_dim,
    )


def _merge_splits_launch(
    problem: Problem, chosen: Split, device: Device, out_strides: tuple[int, ...]
) -> _Launch:
    """The kernel that merges what splits find."""
    assert problem.device is not None
    values = {
        **dict(zip(("out_batch", "out_head", "out_row"), out_strides, strict=True)),
        "rows": problem.batch * problem.heads * problem.seqlen_q,
        "heads": problem.heads,
        "seqlen_q": problem.seqlen_q,
        "splits": chosen.splits,
        "row_warps": chosen.row_warps,
    }
    return _launch(chosen.kernel, chosen.merge_blocks, device, problem.device, _MERGE_SPLITS, values)


def _maps(problem: Problem, chosen: Plan) -> tuple[Layout, ...]:
    """How the Hopper kernel copies q, k (transposed for a reduction) and v, and Qhat and Khat if there are."""
    tile, batch, heads_kv = chosen.tile, problem.batch, problem.heads_kv
    # Consumers of a ranked problem change their queries one by one, so these come in as many copies.
    rows = tile.block_m if problem.ranked is None else HOPPER_GROUP_ROWS
    panel, panel_v = panel_columns(problem.head_dim), panel_columns(problem.head_dim_v)

    def queries(columns: int, strides: tuple[int, int, int]) -> Layout:
        lengths = (batch, problem.heads, problem.seqlen_q, columns)
        return Layout(problem.dtype, lengths, strides, rows, panel)

    def keys(columns: int, strides: tuple[int, int, int], box: int) -> Layout:
        return Layout(problem.dtype, (batch, heads_kv, problem.seqlen_k, columns), strides, tile.tile_k, box)

    if chosen.prepare is None:
        k = keys(problem.head_dim, problem.k_strides, panel)
    else:
        columns = chosen.prepare.key_columns
        per_head = problem.head_dim * columns
        k = Layout(
            problem.dtype,
            (batch, heads_kv, problem.head_dim, columns),
            (heads_kv * per_head, per_head, columns),
            problem.head_dim,
            panel_columns(tile.tile_k),
        )
    maps = (
        queries(problem.head_dim, problem.q_strides),
        k,
        keys(problem.head_dim_v, problem.v_strides, panel_v),
    )
    if problem.ranked is None:
        return maps
    ranked = problem.ranked
    qhat = queries(ranked.columns, ranked.q_strides)
    return (*maps, qhat) if ranked.copied else (*maps, qhat, keys(ranked.columns, ranked.k_strides, panel))


def _prepare_launch(
    kernel: Kernel,
    chosen: Prepare,
    lengths: tuple[int, int],
    strides: tuple[int, int, int],
    reduction: LSH | Energy,
    index: int,
    more: dict[str, Any],
    again: Step | None = None,
) -> tuple[_Launch, _Launch | None, Any]:
    """The kernel that orders columns by hash, what may transpose once more, and the projections that they read.

    ``more`` is what transposing needs.
    """
    values = {
        **dict(zip(("q_batch", "q_head", "q_row"), strides, strict=True)),
        "order_units": chosen.order_units,
        "order_blocks": chosen.order_blocks,
        "heads": lengths[0],
        "seqlen_q": lengths[1],
        "block_q": reduction.rows_per_block,
        "group_blocks": chosen.group_blocks,
        "key_columns": chosen.key_columns,
        "key_blocks": chosen.key_blocks,
        "tiles": chosen.tiles,
        **more,
    }
    device = device_properties(index)
    if isinstance(reduction, Energy):
        return _launch(kernel, chosen.blocks, device, index, _PREPARE, values), None, None
    values["code_bits"] = 2**reduction.n_proj - 1
    layout = _PREPARE if again is None else _PREPARE_HALF
    launch = _launch(kernel, chosen.blocks, device, index, layout, values)
    second = None if again is None else _launch(again.kernel, again.blocks, device, index, layout, values)
    dtype = list(DTYPE_NUMBER)[dict(kernel.constants)["DTYPE"]]
    vectors = _device_projections(reduction.n_proj, reduction.rows_per_block, reduction.seed, dtype, index)
    return launch, second, vectors


@functools.lru_cache(maxsize=256)
def _group_recipe(
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, int, int],
    aligned: bool,
    reduction: LSH | Energy,
    index: int,
    keys: tuple[int, int, tuple[int, int, int]] | None,
    scale: float | None = None,
) -> _Columns:
    """Compile and prepare the order of columns alone; ``keys`` is heads_kv, seqlen_k and strides of K.

    ``scale`` is that of the scores of what stands for q, for what they lack.
    """
    check_device(device_properties(index), index)
    batch, heads, seqlen_q, head_dim = shape
    blocks = -(-seqlen_q // reduction.rows_per_block)
    steps: tuple[Step | None, Step | None] = (None, None)
    more: dict[str, Any] = {}
    if keys is not None:
        heads_kv, seqlen_k, k_strides = keys
        last = (
            energy_order(dtype, head_dim, aligned, batch * heads * blocks)
            if isinstance(reduction, Energy)
            else weights(dtype, head_dim, reduction.group_size, batch * heads, blocks)
        )
        steps = (key_energy(dtype, head_dim, batch * heads_kv, seqlen_k), last)
        more = {
            **dict(zip(("k_batch", "k_head", "k_row"), k_strides, strict=True)),
            "heads_kv": heads_kv,
            "heads_per_kv": heads // heads_kv,
            "seqlen_k": seqlen_k,
            "scale": scale or 0.0,
            "rounded": scale is not None,
        }
    order = again = vectors = None
    if isinstance(reduction, LSH):
        chosen = prepare(batch, heads, seqlen_q, head_dim, reduction.rows_per_block, None)
        kernel = prepare_kernel(dtype, head_dim, aligned, reduction.by_keys)
        order, again, vectors = _prepare_launch(
            kernel, chosen, (heads, seqlen_q), strides, reduction, index, {}
        )
    return _columns((order, again), vectors, steps, shape, strides, reduction, index, more)


def _projection_parts(padded: NDArray[np.float32], bfloat: bool) -> NDArray[np.uint32]:
    """Projections, (rows, 16), as operands of mma.m16n8k16: (rows / 16, parts, 32 lanes, 4 words of two numbers).

    Word ``2 * i + j`` of lane ``l`` has rows ``8 * j + 2 * (l % 4)`` and the next, of projection ``8 * i + l // 4``.
    float16 holds them as they are; of bfloat16 there are two, whose sum they are.
    """
    high = padded.astype(np.float16).view(np.uint16)
    parts = [high]
    if bfloat:
        bits = (padded.view(np.uint32) + 0x8000) & 0xFFFF0000
        low = padded - bits.view(np.float32)
        parts = [(x >> 16).astype(np.uint16) for x in (bits, low.view(np.uint32))]
    # (turn, j, l % 4, of a pair, i, l // 4, part) to (turn, part, l // 4, l % 4, i, j, of a pair)
    split = np.stack(parts, axis=-1).reshape(-1, 2, 4, 2, 2, 8, len(parts)).transpose(0, 6, 5, 2, 4, 1, 3)
    return np.ascontiguousarray(split).view(np.uint32).reshape(-1, len(parts), 32, 4)


@functools.lru_cache(maxsize=64)
def _device_projections(n_proj: int, block_q: int, seed: int, dtype: str, index: int) -> Any:
    """The projections on the current device as (block_q, 16), padded with zero vectors, whose bits are zero.

    There are rows of zeros up to a multiple of 16; behind them, for types of 16 bits, are ``_projection_parts``.
    """
    import cupy

    padded = np.zeros((-(-block_q // 16) * 16, MAX_PROJ), np.float32)
    padded[:block_q, :n_proj] = projections(n_proj, block_q, seed).T
    parts = []
    if dtype != "float32":
        parts = [_projection_parts(padded, dtype == "bfloat16").view(np.float32)]
    vectors = cupy.asarray(np.concatenate([x.ravel() for x in (padded, *parts)]))
    cupy.cuda.get_current_stream().synchronize()  # once: later calls may come on any stream
    return vectors


def attention(
    problem: Problem,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    return_lse: bool,
    stream: Any,
    projection: Any = None,
    reduced: Reduced | None = None,
) -> tuple[Any, Any]:
    """Run a checked problem. Returns (out, lse); lse is None unless asked for.

    The projection is for the host, ``reduced`` for a problem that is ranked; the host needs its ranks alone.
    """
    if problem.device is None:
        result, lse = reference.solve(
            q, k, v, problem, projection, None if reduced is None else reduced.ranks
        )
        if out is None:
            out = np.empty(problem.out_shape, q.dtype)
        with np.errstate(over="ignore"):
            out[...] = result
        return out, lse.astype(np.float32) if return_lse else None
    with placed(problem.device, stream):
        return _attention(problem, q, k, v, out, return_lse, reduced)


_of_graphs: list[Any] = []


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    import cupy

    stream = cupy.cuda.get_current_stream().ptr
    return bool(stream) and bool(
        cupy.cuda.runtime.streamIsCapturing(stream)
    )  # the null stream cannot be captured


def hold(*memory: Any) -> None:
    """Keep what a captured call leaves behind: its graph writes there whenever it runs, and nobody says when it dies.

    Without a capture, memory goes back to CuPy's pool, which hands it out again in the order of the stream.
    """
    if memory and capturing():
        _of_graphs.extend(memory)


def _attention(
    problem: Problem, q: Any, k: Any, v: Any, out: Any, return_lse: bool, reduced: Reduced | None
) -> tuple[Any, Any]:
    import cupy

    _, heads, seqlen_q, head_dim_v = problem.out_shape
    if out is None:
        out = cupy.ndarray(problem.out_shape, q.dtype)
        strides = (heads * seqlen_q * head_dim_v, seqlen_q * head_dim_v, head_dim_v)
        aligned = True
    else:
        strides = row_strides(out.shape, out.strides, out.itemsize)
        aligned = rows_aligned(out.data.ptr, strides, out.itemsize)
    lse = cupy.ndarray(problem.out_shape[:3], np.float32) if return_lse else None
    kept = keeps_keys(problem)
    shift = (
        cupy.ndarray(problem.out_shape[:3], np.float32) if problem.restore and (return_lse or kept) else None
    )
    if problem.empty:
        check_device(device_properties(problem.device or 0), problem.device or 0)
        out.fill(0)
        if lse is not None:
            lse.fill(-np.inf)
        return out, lse

    recipe = _recipe(problem, strides, aligned)
    lse_address = 0 if lse is None else lse.data.ptr
    keys, permutation, counter, wide = k.data.ptr, 0, 0, 0
    numbers: list[int] = []  # addresses of weights and shares, or of means
    # Addresses behind that of the permutation.
    more = [] if reduced is None else [0 if x is None else x.data.ptr for x in reduced]
    scratch_bytes = (
        recipe.transposed_bytes + recipe.permutation_bytes + recipe.more_bytes + recipe.counter_bytes
    )
    if scratch_bytes:
        scratch = cupy.cuda.alloc(scratch_bytes)
        hold(scratch)
        if recipe.counter_bytes:
            place = scratch + (scratch_bytes - recipe.counter_bytes)
            place.memset_async(0, recipe.counter_bytes)
            counter, wide = place.ptr if recipe.counts else 0, place.ptr + 4
        if recipe.columns is not None:
            keys, permutation = scratch.ptr, scratch.ptr + recipe.transposed_bytes
            behind = permutation + recipe.permutation_bytes
            shift_address = 0 if shift is None else shift.data.ptr
            far = k[:, :, problem.sinks :].data.ptr if kept else k.data.ptr
            recipe.columns(q.data.ptr, k.data.ptr, far, keys, permutation, behind, shift_address, wide)
            numbers = recipe.columns.numbers(behind)
            if recipe.tells:
                numbers = [wide]
    if kept and recipe.maps is None:
        numbers += [k.data.ptr, 0 if shift is None else shift.data.ptr]
    addresses = (q.data.ptr, keys, v.data.ptr)
    if recipe.maps is not None:
        pointers, others = list(addresses), [0] if kept else []  # no shift
        if reduced is not None:
            pointers.append(reduced.queries.data.ptr)
            others = [0 if reduced.shift is None else reduced.shift.data.ptr]
            if reduced.ranks is not None:
                pointers.append(reduced.keys.data.ptr)
                others.insert(0, reduced.ranks.data.ptr)
        maps = map(encode, recipe.maps, pointers)
        recipe.attention(*maps, *others, out.data.ptr, lse_address, permutation, counter, *numbers)
    elif recipe.merge is None:
        recipe.attention(*addresses, out.data.ptr, lse_address, 0, permutation, *more, *numbers)
    else:
        found = cupy.cuda.alloc(recipe.split_bytes)
        hold(found)
        lses = found.ptr + recipe.partial_bytes
        recipe.attention(*addresses, out.data.ptr, lses, found.ptr, permutation, *more, *numbers)
        recipe.merge(found.ptr, lses, out.data.ptr, lse_address)
    if shift is not None:
        hold(shift)
        if not kept:  # else the kernel adds it
            lse += shift
    return out, lse


@functools.lru_cache(maxsize=256)
def _project_recipe(problem: Problem, columns: int, unit_batch: int) -> _Launch:
    """Compile and prepare what makes Qhat and Khat of a problem."""
    assert problem.device is not None
    device = device_properties(problem.device)
    check_device(device, problem.device)
    kernel = project_kernel(problem, columns)
    slices = -(-columns // dict(kernel.constants)["COLUMNS"])
    rows = project_rows(problem, kernel, slices, device)
    q_blocks, k_blocks = -(-problem.seqlen_q // rows), -(-problem.seqlen_k // rows)
    q_units = problem.batch * problem.heads * q_blocks
    values = {
        **dict(zip(("q_batch", "q_head", "q_row"), problem.q_strides, strict=True)),
        **dict(zip(("k_batch", "k_head", "k_row"), problem.k_strides, strict=True)),
        "slices": slices,
        "block_rows": rows,
        "q_blocks": q_blocks,
        "k_blocks": k_blocks,
        "q_units": q_units,
        "heads": problem.heads,
        "heads_per_kv": problem.heads // problem.heads_kv,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "columns": columns,
        "unit_batch": unit_batch,
        "scale": problem.scale,
    }
    blocks = check_blocks(slices * (q_units + problem.batch * problem.heads_kv * k_blocks))
    return _launch(kernel, blocks, device, problem.device, _PROJECT, values)


class Projected(NamedTuple):
    """What :func:`project` makes; None is what was not asked for."""

    queries: Any  # Qhat, (batch, heads, seqlen_q, columns)
    keys: Any  # Khat, (batch, heads_kv, seqlen_k, columns)
    shift: (
        Any  # float32 (batch, heads, seqlen_q): what taking the mean off the keys takes off each row's scores
    )
    residual: Any  # float32 (batch, heads, seqlen_q): the energy of each query that Qhat misses, as sketched


def project(
    problem: Problem, q: Any, k: Any, factors: Factors, shifted: bool, sketched: bool = False
) -> Projected:
    """Make Qhat and Khat.

    On the current device and stream, for a problem that is not empty; the results are held if this is captured.
    """
    import cupy

    units, columns = factors.bias.shape
    qhat = cupy.ndarray((*q.shape[:3], columns), q.dtype)
    khat = cupy.ndarray((*k.shape[:3], columns), k.dtype)
    shift, residual = (
        cupy.ndarray(q.shape[:3], np.float32) if wanted else None for wanted in (shifted, sketched)
    )
    hold(*(x for x in (qhat, khat, shift, residual) if x is not None))
    per_entry = problem.heads_kv if units == problem.batch * problem.heads_kv else 0
    launch = _project_recipe(problem, columns, per_entry)
    launch(
        q.data.ptr, k.data.ptr, qhat.data.ptr, khat.data.ptr, *(x.data.ptr for x in factors),
        *(0 if x is None else x.data.ptr for x in (residual, shift)),
    )  # fmt: skip
    return Projected(qhat, khat, shift, residual)


@functools.lru_cache(maxsize=64)
def constant(shape: tuple[int, ...], values: tuple[float, ...], dtype: str, index: int) -> Any:
    """An array of some numbers along a last axis, on a device, which must be the current one; made once."""
    import cupy

    made = cupy.asarray(np.broadcast_to(np.array(values, dtype), (*shape, len(values))).copy())
    cupy.cuda.get_current_stream().synchronize()  # later calls may come on any stream
    return made


class _Find(NamedTuple):
    """The kernels that find a call's own low-rank factors, and what they share."""

    rows: _Launch
    sums: _Launch
    factors: _Launch
    drawn: Any  # int32 (64, 2) and (512, 2): query heads of a KV head, and rows
    queries: Any
    start: Any  # float32 (columns, rank)
    vectors: Any  # float32 (columns, 16)
    widths: Any  # int32 (units,)
    lengths: tuple[int, ...]  # of what they leave for each other, in words
    lanes: tuple[tuple[int, ...], ...]  # shapes of what smxx_project.cu reads: factors, mean, sketch


@functools.lru_cache(maxsize=64)
def _find_recipe(problem: Problem, rank: int) -> _Find:
    """Compile and prepare what finds the factors of a problem."""
    import cupy

    index = problem.device
    assert index is not None
    device = device_properties(index)
    check_device(device, index)
    steps = lowrank_steps(problem, rank, device)
    extent = _extent(problem)
    values: dict[str, Any] = {
        **dict(zip(("q_batch", "q_head", "q_row"), problem.q_strides, strict=True)),
        **dict(zip(("k_batch", "k_head", "k_row"), problem.k_strides, strict=True)),
        **{name: extent[name] for name in ("heads_per_kv", "seqlen_k", "band_low", "band_high")},
        **_near(problem),
        "heads_kv": problem.heads_kv,
        "samples": min(problem.seqlen_k, LOWRANK_KEYS),
        "sinks": near_keys(problem).sinks,
        "scale": problem.scale * LOG2_E,
    }
    splits = {name: getattr(steps, name) for name in ("row_splits", "splits", "query_splits")}
    of_factors = {name: splits[name] for name in ("splits", "query_splits")}

    def prepared(step: Step, layout: np.dtype[Any], given: dict[str, Any]) -> _Launch:
        return _launch(step.kernel, step.blocks, device, index, layout, given)

    rows = prepared(steps.rows, _LOWRANK_ROWS, values | {"splits": steps.row_splits})
    sums = prepared(steps.sums, _LOWRANK_SUMS, values | splits)
    factors = prepared(steps.factors, _LOWRANK_FACTORS, of_factors)
    head_dim, units = problem.head_dim, problem.batch * problem.heads_kv
    columns = lowrank_columns(head_dim)
    arrays = (
        lowrank.drawn(problem, LOWRANK_ROWS),
        lowrank.drawn(problem, LOWRANK_QUERIES),
        *(
            np.pad(x, ((0, columns - head_dim), (0, 0))).astype(np.float32)
            for x in (lowrank.start(head_dim, rank), lowrank.sketch_vectors(head_dim))
        ),
        np.full(units, rank, np.int32),
    )
    drawn, queries, begin, vectors, widths = map(cupy.asarray, arrays)
    cupy.cuda.get_current_stream().synchronize()  # once: later calls may come on any stream
    itemsize = ITEMSIZE[problem.dtype]
    of_lanes = 4 // itemsize, 2 * -(-head_dim * itemsize // 64), 32, 4
    lanes = (
        (units, -(-rank // PROJECT_GROUP) * 2, *of_lanes),
        (units, 1, *of_lanes[:2], 4, 4),
        (units, 1, *of_lanes),
    )
    in_shared = dict(steps.factors.kernel.constants)["IN_SHARED"]
    key_parts = lowrank_keys(head_dim) // 16  # of a tile, each of a warp
    lengths = (
        units * steps.row_splits * key_parts * LOWRANK_ROWS * 3,
        units * columns,
        units * steps.splits * columns**2,
        units * steps.query_splits * columns**2,
        0 if in_shared else units * 2 * columns * (rank + 2),
    )
    return _Find(rows, sums, factors, drawn, queries, begin, vectors, widths, lengths, lanes)


def find(problem: Problem, q: Any, k: Any, rank: int, sketched: bool = False) -> tuple[Factors, Any]:
    """Find the low-rank factors of a call.

    On the current device and stream, for a problem that is not empty; the results are held if this is captured. Returns
    them as :func:`project` takes them, with the sketch if wanted, and in float32: A and B of each unit, (units, 2,
    head_dim, rank), and then each unit's mean, (units, head_dim), in one array.
    """
    import cupy

    own = _find_recipe(problem, rank)
    units, head_dim = len(own.widths), problem.head_dim
    *starts, end = itertools.accumulate(own.lengths, initial=0)
    scratch = cupy.cuda.alloc(4 * end)
    sums, center, of_keys, of_queries, matrices = (scratch.ptr + 4 * first for first in starts)
    of_factors, of_mean, of_sketch = own.lanes
    made = cupy.ndarray(units * head_dim * (2 * rank + 1), np.float32)
    mean = made.data.ptr + 4 * units * head_dim * 2 * rank
    lanes = [cupy.ndarray(shape, np.uint32) for shape in (of_factors, of_factors, of_mean)]
    bias = cupy.ndarray((units, rank), np.float32)
    sketch = cupy.ndarray(of_sketch, np.uint32) if sketched else None
    hold(scratch, made, bias, *lanes, *([] if sketch is None else [sketch]), own)
    drawn, queries = own.drawn.data.ptr, own.queries.data.ptr
    own.rows(q.data.ptr, k.data.ptr, drawn, sums, center)
    own.sums(q.data.ptr, k.data.ptr, drawn, queries, sums, center, of_keys, of_queries)
    own.factors(
        of_keys, of_queries, own.start.data.ptr, own.vectors.data.ptr, center, matrices, made.data.ptr, mean,
        lanes[0].data.ptr, lanes[1].data.ptr, bias.data.ptr, lanes[2].data.ptr,
        0 if sketch is None else sketch.data.ptr,
    )  # fmt: skip
    # Without a sketch nothing reads it; the array that stands for it is one that is there.
    return Factors(
        lanes[0], lanes[1], bias, lanes[2], own.widths, lanes[2] if sketch is None else sketch
    ), made


def _row_bounds(seqlen_k: int, values: dict[str, int]) -> dict[str, int]:
    """The bounds of keys as smxx_draw.cu has them: rows beyond which they do not move, in 32 bits."""
    furthest = 2**31 - 1  # from any row to any key
    shifts = (values["band_low"], values["band_high"] + 1, values["near_start"], values["near_stop"])
    found: dict[str, int] = {}
    for name, shift in zip(_BOUNDS, shifts, strict=True):
        least = max(-furthest, min(furthest, -shift))
        found |= {f"{name}_least": least, f"{name}_most": min(furthest, least + seqlen_k)}
    return found


@functools.lru_cache(maxsize=256)
def _decide_recipe(
    problem: Problem, columns: int, limit: float, spread: float
) -> tuple[_Launch, _Launch, _Launch, int]:
    """Compile and prepare what decides on the ranks of a problem; and the parts of a sampled row, exact and reduced."""
    assert problem.device is not None
    device = device_properties(problem.device)
    splits, kernel = probe_splits(problem, device), probe_kernel(problem)
    values: dict[str, Any] = {**_extent(problem), **_near(problem), "sinks": near_keys(problem).sinks}
    units = problem.batch * problem.heads
    of_rows = {name: values[name] for name in ("exact_rows", "exact_keys", "sinks", "seqlen_q")}
    of_rows |= _row_bounds(problem.seqlen_k, values)
    of_rows["head_dim"] = problem.head_dim
    shares = draw_shares(problem, device)
    of_rows |= {"heads": units, "shares": shares}
    draw = _launch(draw_kernel(problem), shares * units, device, problem.device, _DRAW, of_rows)
    values |= {
        "columns": columns,
        "splits": splits,
        "scale": problem.scale,
    }
    for name, strides in (("q", problem.q_strides), ("k", problem.k_strides), ("v", problem.v_strides)):
        values |= dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), strides, strict=True))
    blocks = check_blocks(PROBE_ROWS // dict(kernel.constants)["ROWS"] * splits * units)
    probe = _launch(kernel, blocks, device, problem.device, _PROBE, values)
    choice: dict[str, Any] = {"splits": splits, "limit": limit, "spread": spread}
    choice["share"] = 1 / problem.seqlen_q
    kernel = decide_kernel(problem.head_dim, problem.head_dim_v)
    blocks = check_blocks(PROBE_ROWS // DECIDE_ROWS * units)
    choose = _launch(kernel, blocks, device, problem.device, _DECIDE, choice)
    return draw, probe, choose, 2 * splits


def decide(
    problem: Problem,
    q: Any,
    k: Any,
    v: Any,
    projected: Projected,
    wanted: Any,
    known: Any,
    tolerance: float,
    spread: float,
) -> tuple[Any, Any]:
    """Which heads may use the ranks ``wanted``, int32 (batch, heads): the others are given head_dim.

    ``known``, float32 (batch, heads, 2), is as :meth:`cudistr.Projection.known` has it.
    Returns the ranks, and the relative output error of each head as estimated from sampled rows, with its upper bound,
    float32 (batch, heads, 2). On the current device and stream; held if this is captured.
    """
    import cupy

    draw, probe, choose, count = _decide_recipe(problem, projected.queries.shape[3], tolerance**2, spread)
    ranks = cupy.ndarray(wanted.shape, np.int32)
    errors = cupy.ndarray((*wanted.shape, 2), np.float32)
    # What the kernels leave for each other, words of 4 bytes, in one piece: every array of its own takes the host time.
    of_rows = problem.batch * problem.heads * PROBE_ROWS
    lengths = (of_rows, of_rows, 2 * of_rows, count * of_rows * problem.head_dim_v, 2 * count * of_rows)
    *starts, end = itertools.accumulate(lengths, initial=0)
    scratch = cupy.cuda.alloc(4 * (end + problem.batch * problem.heads))
    hold(ranks, errors, scratch)
    rows, factors, compared, outputs, sums = (scratch.ptr + 4 * start for start in starts)
    counts = scratch.ptr + 4 * end  # of what is compared
    draw(projected.residual.data.ptr, wanted.data.ptr, rows, factors, counts)
    shift = 0 if projected.shift is None else projected.shift.data.ptr
    made = (projected.queries.data.ptr, projected.keys.data.ptr, shift)
    probe(q.data.ptr, k.data.ptr, v.data.ptr, *made, wanted.data.ptr, rows, outputs, sums)
    decided = (ranks.data.ptr, errors.data.ptr)
    choose(factors, outputs, sums, wanted.data.ptr, known.data.ptr, counts, compared, *decided)
    return ranks, errors


def columns(q: Any, k: Any, reduction: LSH | Energy, stream: Any) -> tuple[Any, Any]:
    """Column order of every block of checked queries, and the numbers of the columns, see `reference.solve_columns`.

    k is None where columns do not go by it.
    """
    if type(q) is np.ndarray:
        return reference.solve_columns(q, reduction, k)
    import cupy

    index = q.device.id
    with placed(index, stream):
        strides = row_strides(q.shape, q.strides, q.itemsize)
        aligned = rows_aligned(q.data.ptr, strides, q.itemsize)
        blocks = -(-q.shape[2] // reduction.rows_per_block)
        permutation = cupy.ndarray((*q.shape[:2], blocks, q.shape[3]), np.uint8)
        keys, address = None, 0
        if reduction.by_keys:
            k = k[:, :, reduction.sinks :]
            keys = (k.shape[1], k.shape[2], row_strides(k.shape, k.strides, k.itemsize))
            address = k.data.ptr
        shape = permutation.shape if isinstance(reduction, Energy) else (2, *permutation.shape)
        if not permutation.size:
            return permutation, None
        run = _group_recipe(_dtype_name(q), q.shape, strides, aligned, reduction, index, keys)
        if not run.more_bytes:
            run(q.data.ptr, 0, address, 0, permutation.data.ptr, 0)
            return permutation, None
        scratch = cupy.cuda.alloc(run.more_bytes)
        hold(scratch)
        run(q.data.ptr, 0, address, 0, permutation.data.ptr, scratch.ptr)
        return permutation, cupy.ndarray(shape, np.float32, scratch)


@functools.lru_cache(maxsize=256)
def _copied_recipe(problem: Problem) -> tuple[_Columns, _Launch]:
    """Compile and prepare what makes the queries that stand for those of a problem."""
    assert problem.device is not None and problem.reduction is not None
    device, reduction = device_properties(problem.device), problem.reduction
    shape = (problem.batch, problem.heads, problem.seqlen_q, problem.head_dim)
    keys = (problem.heads_kv, problem.seqlen_k - problem.sinks, problem.k_strides)
    found = _group_recipe(
        problem.dtype,
        shape,
        problem.q_strides,
        problem.aligned,
        reduction,
        problem.device,
        keys,
        problem.scale,
    )
    step, parts = copied_queries(problem)
    values = {
        **dict(zip(("q_batch", "q_head", "q_row"), problem.q_strides, strict=True)),
        "shares": found.permutation_bytes,  # one number for each of their bytes
        "heads": problem.heads,
        "seqlen_q": problem.seqlen_q,
        "block_q": reduction.rows_per_block,
        "group_blocks": -(-problem.seqlen_q // reduction.rows_per_block),
        "parts": parts,
    }
    return found, _launch(step.kernel, step.blocks, device, problem.device, _COPIED, values)


def copied(problem: Problem, q: Any, k: Any) -> tuple[Any, Any]:
    """Make what stands for the queries of a problem in the product with k, and what its scores lack.

    The first is (batch, heads, seqlen_q, head_dim); the second float32 (batch, heads, seqlen_q), None for nothing. On
    the current device and stream; held if this is captured.
    """
    import cupy

    find, make = _copied_recipe(problem)
    made = cupy.ndarray(q.shape, q.dtype)
    shift = cupy.ndarray(q.shape[:3], np.float32) if problem.restore else None
    scratch = cupy.cuda.alloc(find.permutation_bytes + find.more_bytes)
    hold(*(x for x in (made, shift, scratch) if x is not None))
    permutation, more = scratch.ptr, scratch.ptr + find.permutation_bytes
    far = k[:, :, problem.sinks :].data.ptr
    find(q.data.ptr, 0, far, 0, permutation, more, 0 if shift is None else shift.data.ptr)
    make(q.data.ptr, permutation, more, made.data.ptr)
    return made, shift


def _dtype_name(array: Any) -> str:
    return next(name for name in DTYPE_NUMBER if name == array.dtype.name)


def merge(outs: Sequence[Any], lses: Sequence[Any], return_lse: bool, stream: Any) -> tuple[Any, Any]:
    """Merge checked shards. Returns (out, lse); lse is None unless asked for."""
    first = outs[0]
    if type(first) is np.ndarray:
        result, lse = reference.solve_merge(outs, lses)
        return result.astype(first.dtype), lse.astype(np.float32) if return_lse else None
    import cupy

    index = first.device.id
    with placed(index, stream):
        device = device_properties(index)
        check_device(device, index)
        out = cupy.ndarray(first.shape, first.dtype)
        merged = cupy.ndarray(first.shape[:3], np.float32) if return_lse else None
        rows = math.prod(first.shape[:3])
        if rows:
            given = {id(x) for x in (*outs, *lses)}
            outs = [cupy.ascontiguousarray(x) for x in outs]
            outs = [x.copy() if x.data.ptr % 16 else x for x in outs]
            lses = [cupy.ascontiguousarray(x) for x in lses]
            hold(*(x for x in (*outs, *lses) if id(x) not in given))
            unused = [0] * (MAX_SHARDS - len(outs))
            addresses = [x.data.ptr for x in outs] + unused + [x.data.ptr for x in lses] + unused
            kernel = merge_kernel(_dtype_name(first), first.shape[3])
            blocks = check_blocks(-(-rows // merge_rows(first.shape[3], 16 // first.itemsize)))
            launch = _launch(kernel, blocks, device, index, _MERGE, {"rows": rows, "shards": len(outs)})
            launch(*addresses, out.data.ptr, 0 if merged is None else merged.data.ptr)
        return out, merged


def merge_shard(
    found: Any, found_lse: Any, rows: tuple[int, int], part: Any, part_lse: Any, dtype: Any
) -> Any:
    """Take what a shard of the keys adds to some queries into what was found so far, on the current device and stream.

    Parameters
    ----------
    found : CuPy array (batch, heads, seqlen, head_dim_v)
        Of the dtype of ``part``, or float32; contiguous. Overwritten if ``dtype`` is its own.
    found_lse : float32 CuPy array (batch, heads, seqlen)
        Contiguous, overwritten.
    rows : (int, int)
        The queries that the shard adds to: first, and one behind the last.
    part : CuPy array (batch, heads, rows[1] - rows[0], head_dim_v)
    part_lse : float32 CuPy array (batch, heads, rows[1] - rows[0])
    dtype : dtype
        Of the result: that of ``part``, or float32.

    Returns
    -------
    CuPy array (batch, heads, seqlen, head_dim_v)
    """
    import cupy

    index = found.device.id
    device = device_properties(index)
    batch, heads, seqlen, head_dim_v = found.shape
    in_place = found.dtype == dtype
    out = found if in_place else cupy.ndarray(found.shape, dtype)
    start, span = (rows[0], rows[1] - rows[0]) if in_place else (0, seqlen)
    count = batch * heads * span
    if count:
        part, part_lse = cupy.ascontiguousarray(part), cupy.ascontiguousarray(part_lse)
        values = {"rows": count, "seqlen": seqlen, "start": start, "span": span}
        values |= {"first": rows[0], "last": rows[1]}
        kernel = merge_shard_kernel(_dtype_name(part), _dtype_name(found), _dtype_name(out), head_dim_v)
        blocks = check_blocks(-(-count // merge_rows(head_dim_v, 4)))
        launch = _launch(kernel, blocks, device, index, _MERGE_SHARD, values)
        launch(*(x.data.ptr for x in (found, found_lse, part, part_lse, out, found_lse)))
    return out
