"""Faults planted in the kernels, each of which the emulated device finds, and says what it found.

A fault is a change of one line in a copy of ``kernels_cu``. Those of synchronisation are found whatever the order in
which threads run, and most of them would rarely or never show on a GPU.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cudistr
from cudistr import compiler, compose, launch, normalize
from tests.emulation.fake_cupy import EmulationError, Settings
from tests.gpu import util
from tests.gpu.test_lowrank import check_attended, check_found
from tests.strategies import BFLOAT16, lost_sums, near_ties, random

FLASH = "kernels/sm80_flash_fwd.cu"
HOPPER = "kernels/sm90_flash_fwd.cu"
PANELS = "tile/panels.cuh"
SOFTMAX = "tile/softmax.cuh"
PREPARE = "kernels/smxx_lsh_prepare.cu"
WEIGHTS = "kernels/smxx_lsh_weights.cu"
KEY_ENERGY = "kernels/smxx_key_energy.cu"
ENERGY_ORDER = "kernels/smxx_energy_order.cu"
COPIED_QUERIES = "kernels/smxx_copied_queries.cu"
MERGE = "kernels/smxx_merge.cu"
MERGE_SHARD = "kernels/smxx_merge_shard.cu"
MERGE_SPLITS = "kernels/smxx_merge_splits.cu"
PROJECT = "kernels/smxx_project.cu"
DRAWN = "tile/drawn.cuh"
LOWRANK_ROWS = "kernels/smxx_lowrank_rows.cu"
LOWRANK_SUMS = "kernels/smxx_lowrank_sums.cu"
LOWRANK_FACTORS = "kernels/smxx_lowrank_factors.cu"
DRAW = "kernels/smxx_draw.cu"
PROBE = "kernels/smxx_probe.cu"
DECIDE = "kernels/smxx_decide.cu"
# On the portable kernel summed ahead, or in tiles of 64 queries on the way; ahead too, of bfloat16 in float16; and in
# shared memory before the product.
GROUPED, HALVES, FUSED = ({"reduction": cudistr.LSH(size)} for size in (2, 4, 8))
RANK1 = {"reduction": cudistr.LSH(2, representative="rank1")}
RANK1_OF_FOUR = {"reduction": cudistr.LSH(4, representative="rank1")}
RESTORED = {"reduction": cudistr.LSH(2, representative="rank1", sinks=40)}
RESTORED_OF_EIGHT = {"reduction": cudistr.LSH(8, representative="rank1", sinks=40)}
ENERGY = {"reduction": cudistr.Energy(32, near=0, sinks=0)}
RESTORED_ENERGY = {"reduction": cudistr.Energy(32, near=0, sinks=40)}
COPIED_ENERGY = {"reduction": cudistr.Energy(32, near=40, sinks=9), "copied": True}
COPIED_RANK1 = {"reduction": cudistr.LSH(2, representative="rank1", near=40, sinks=9), "copied": True}
WRONG = "largest error|relative error|not equal"  # what a comparison with the reference says
RACE = "of shared memory .*(that no barrier puts before it|that nothing wrote|has not landed)"
BARRIER = "__syncthreads();"


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``file``; the call of ``options`` must then end with ``found``."""

    file: str
    old: str
    new: str
    found: str
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"
    dtype: Any = np.float16
    head_dim_v: int = 64
    merge: str = ""
    family: str = "portable"
    lengths: tuple[int, int] = (161, 173)
    splits: int = 1


FAULTS = {
    # Barriers
    "no barrier before a tile of keys is used": Fault(
        FLASH, f"{BARRIER}  // the keys have landed", "// the keys have landed", f"ldmatrix {RACE}"
    ),
    "no barrier before the next keys overwrite": Fault(
        FLASH,
        f"{BARRIER}  // the values have landed, and every warp is done with the keys and the queries",
        "",
        RACE,
    ),
    "the next values where these are read": Fault(
        FLASH, "run(shared.v[(tile - 1) % kValueStages], params.v_row, keys_left);\n                        value_copy.move(-kKeys * params.v_row);\n                    }\n                }\n                cp_async_commit();\n            }",
        "run(shared.v[tile % kValueStages], params.v_row, keys_left);\n                        value_copy.move(-kKeys * params.v_row);\n                    }\n                }\n                cp_async_commit();\n            }",
        RACE,
    ),
    "no barrier between sums ahead and their readers": Fault(
        FLASH, f"{BARRIER}  // the keys have landed", "// the keys have landed", RACE, GROUPED
    ),
    "rows of queries picked before they have landed": Fault(
        FLASH, f"cp_async_wait<1>();\n                    {BARRIER}  // the rows", f"{BARRIER}  // the rows", RACE, GROUPED
    ),
    "no barrier before queries are picked": Fault(FLASH, f"{BARRIER}  // the rows have landed", "", RACE, GROUPED),
    "no barrier before values take the place of queries": Fault(
        FLASH, f"{BARRIER}  // values may take their place", "", "that no barrier puts before it", GROUPED,
        lengths=(161, 100),
    ),
    "raw keys summed before they have landed": Fault(
        FLASH, "cp_async_wait<1>();\n            const int next", "const int next", "has not landed", GROUPED
    ),
    "Khat made where it is read": Fault(
        FLASH, "MakeKhat<false> beside(shared, ~tile & 1", "MakeKhat<false> beside(shared, tile & 1", RACE, GROUPED
    ),
    "Khat of another tile": Fault(
        FLASH, "next = key - 2 * kKeys;", "next = key - kKeys;", WRONG, GROUPED, lengths=(161, 500)
    ),
    "the last tile is not copied ahead": Fault(
        FLASH, "tile - 2 >= first_tile", "tile - 2 > first_tile", WRONG, GROUPED, lengths=(161, 500)
    ),
    "a member counted twice ahead": Fault(
        FLASH, "shared.key_chunk[group][member];", "shared.key_chunk[group][0];", WRONG, GROUPED
    ),
    "a slice that is not summed": Fault(
        FLASH, "step < kSlices)", "step < kSlices - 1)", f"nothing wrote|{WRONG}", GROUPED, lengths=(161, 500)
    ),
    "no barrier between fusion and its readers": Fault(
        FLASH, f"{BARRIER}  // Khat is complete", "// Khat is complete", RACE, FUSED
    ),
    "no barrier before Khat is overwritten": Fault(
        FLASH, f"{BARRIER}  // the values have landed, and every warp is done with Khat", "", RACE, FUSED
    ),
    "K as it is where float16 is read": Fault(
        PREPARE, "    if (*params.wide == 0) return;\n", "", WRONG, HALVES, dtype=BFLOAT16
    ),
    "K as it is where float16 is read, Hopper": Fault(
        PREPARE, "    if (*params.wide == 0) return;\n", "", WRONG, HALVES, dtype=BFLOAT16, family="hopper"
    ),
    "products of queries that others still turn into float16": Fault(
        HOPPER, "        named_barrier_sync(1 + kConsumers + group, kGroupThreads);\n", "", f"wgmma {RACE}",
        {"reduction": cudistr.LSH(4, near=40, sinks=9)}, dtype=BFLOAT16, family="hopper"
    ),
    "queries in float16 that products do not see": Fault(
        HOPPER, "        fence_proxy_async();\n        named_barrier_sync(1 + kConsumers + group", "        named_barrier_sync(1 + kConsumers + group",
        "fence", {"reduction": cudistr.LSH(4, near=40, sinks=9)}, dtype=BFLOAT16, family="hopper"
    ),
    "exponentials that nobody passes on": Fault(
        HOPPER, "pass_turn(scores[0][kTiles - 3][0] < least);", "(void)least;", "no thread of block .* can go on", GROUPED,
        family="hopper"
    ),
    "a sum in float16 that leaves out a column": Fault(
        "tile/fuse.cuh", "add_f16x2(sum.word[i], chunks[member].word[i])", "add_f16x2(sum.word[i], chunks[0].word[i])",
        WRONG, FUSED, dtype=BFLOAT16
    ),
    "queries that are not float16": Fault(
        FLASH, "if (!wide) value.bits = float_to_f16", "if (wide) value.bits = float_to_f16", WRONG, FUSED, dtype=BFLOAT16
    ),
    "no barrier after the permutation is read": Fault(
        FLASH,
        f"weights, thread);\n                {BARRIER}",
        "weights, thread);",
        RACE,
        GROUPED,
    ),
    "no barrier before the tiles become the output": Fault(
        FLASH, "__syncthreads_or(again) ?", "again ?", f"write {RACE}", head_dim_v=128
    ),
    "no barrier before the output is copied": Fault(
        FLASH, f"    {BARRIER}\n\n    constexpr int kOutChunks", "    constexpr int kOutChunks", RACE
    ),
    "no barrier before keys and queries are read that other threads copied": Fault(
        PREPARE, f"        cp_async_wait<0>();\n        {BARRIER}\n", "        cp_async_wait<0>();\n", RACE, GROUPED
    ),
    "keys and queries that are read before they have landed": Fault(
        PREPARE, f"        cp_async_wait<0>();\n        {BARRIER}\n", f"        {BARRIER}\n", "has not landed", GROUPED
    ),
    "no barrier before columns are compared": Fault(
        PREPARE, f"    {BARRIER}\n    sort_columns", "    sort_columns", RACE, GROUPED
    ),
    "a barrier that one warp does not reach": Fault(
        FLASH,
        "again = __syncthreads_or(again)",
        "if (thread_index() >= 32) again = __syncthreads_or(again)",
        "wait at different barriers",
    ),
    "a thread that returns before a barrier": Fault(
        PREPARE, "    Order order;\n", "    if (thread_index() == 5) return;\n    Order order;\n", "others have returned", GROUPED
    ),
    "an instruction of the warp that a lane skips": Fault(
        "tile/softmax.cuh",
        "top[mt][half] = fmaxf(top[mt][half], __shfl_xor_sync(kFullWarp, top[mt][half], distance));",
        "if (thread_index() % 32 < 31) top[mt][half] = __shfl_xor_sync(kFullWarp, top[mt][half], distance);",
        "has diverged: one lane waits for __shfl_xor_sync, lane 31 for",
    ),
    "no barrier before the sums of the rest are read": Fault(
        FLASH, f"{BARRIER}  // the sums are complete", "", RACE, ENERGY
    ),
    "no barrier before rows of a group are overwritten": Fault(
        WEIGHTS, f"{BARRIER}  // every thread is done with the rows before", "", RACE, RESTORED
    ),
    "no barrier before rows of products are read": Fault(
        WEIGHTS, f"{BARRIER}  // rows are there, and every thread is done with those before", "", RACE, RANK1
    ),
    "rows of products that are not waited for": Fault(
        WEIGHTS, f"cp_async_wait<0>();\n        {BARRIER}  // rows are there, and every",
        f"{BARRIER}  // rows are there, and every", "has not landed", RANK1
    ),
    "no barrier before weights of all groups are read": Fault(
        WEIGHTS, f"{BARRIER}  // rows are there, and all weights and shares", "", RACE, RESTORED
    ),
    "shares of a group that are not waited for": Fault(
        WEIGHTS, "__syncwarp();  // all of the group are there", "", RACE, RESTORED_OF_EIGHT
    ),
    "no barrier before energies of a group are read": Fault(
        WEIGHTS, f"{BARRIER}  // all energies are there", "", RACE, RANK1
    ),
    "no barrier before energies are compared": Fault(
        ENERGY_ORDER, f"{BARRIER}  // all energies are there", "", RACE, ENERGY
    ),
    "no barrier before rows of an energy are read": Fault(
        ENERGY_ORDER, f"{BARRIER}  // the first rows are there", "", RACE, ENERGY
    ),
    "no barrier before it is known what is kept": Fault(
        ENERGY_ORDER, f"{BARRIER}  // what columns are is there", "", RACE, RESTORED_ENERGY
    ),
    "no barrier before rows of an energy are overwritten": Fault(
        ENERGY_ORDER, f"{BARRIER}  // every thread is done with the rows before", "", RACE,
        {"reduction": cudistr.Energy(32, near=0, sinks=40, block_q=256)}, lengths=(300, 130)
    ),
    "no barrier before other rows of an energy are read": Fault(
        ENERGY_ORDER, f"{BARRIER}  // the next rows are there", "", RACE,
        {"reduction": cudistr.Energy(32, near=0, sinks=40, block_q=256)}, lengths=(300, 130)
    ),
    "a row of Q for what stands for it": Fault(
        ENERGY_ORDER, "columns.copied[j] = kept[i] ? 0.f : copied[i];", "columns.copied[j] = 0.f;", WRONG, RESTORED_ENERGY
    ),
    "a column that is kept for one that is not": Fault(
        ENERGY_ORDER, "columns.kept_energy[j] = kept[i] ?", "columns.kept_energy[j] = !kept[i] ?", WRONG, RESTORED_ENERGY
    ),
    "no barrier before factors of columns are read": Fault(
        ENERGY_ORDER, f"{BARRIER}  // what columns are is there", "", RACE, RESTORED_ENERGY, dtype=BFLOAT16
    ),
    "a product of columns that are kept": Fault(
        ENERGY_ORDER, "of_kept[i] = kept[i] ?", "of_kept[i] = !kept[i] ?", WRONG, RESTORED_ENERGY, dtype=BFLOAT16
    ),
    "sums of another row": Fault(
        ENERGY_ORDER, "const int row = first + lane % 4 * 8 + lane / 4;", "const int row = first + lane;", WRONG,
        RESTORED_ENERGY, dtype=BFLOAT16
    ),
    # Asynchronous copies
    "no wait for the keys": Fault(
        FLASH, "cp_async_wait<0>();\n            __syncthreads();  // the keys", "__syncthreads();  // the keys",
        "asynchronous copy of thread .* has not landed"
    ),
    "a wait that leaves one copy too many": Fault(
        FLASH,
        f"cp_async_wait<1>();\n                    {BARRIER}  // the values have landed, and every warp is done with Khat",
        f"cp_async_wait<2>();\n                    {BARRIER}",
        "asynchronous copy of thread .* has not landed",
        FUSED,
    ),
    "a copy that is never committed": Fault(
        FLASH,
        "                cp_async_commit();\n            }\n\n            if (idle)",
        "            }\n\n            if (idle)",
        "asynchronous copy of thread .* has not landed",
    ),
    "copies in flight when the block ends": Fault(
        FLASH,
        "    cp_async_wait<0>();\n}",
        "    cp_async_chunk(shared_address(&storage), params.q, false);\n    cp_async_commit();\n}",
        f"{RACE}|before its copies landed",
    ),
    # Indices
    "one row too many at the end of a sequence": Fault(
        "tile/shared.cuh", "row0 + row < rows &&", "row0 + row <= rows &&", "cp.async of 16 bytes outside"
    ),
    "one row too many where rows are not aligned": Fault(
        "tile/shared.cuh", "row0 + row < rows &&", "row0 + row <= rows &&", "read of 2 bytes outside", layout="ragged"
    ),
    "one key too few under a mask": Fault(
        "tile/mask.cuh", "offset > last", "offset >= last", WRONG, {"causal": True}
    ),
    "one key too many at the end of a sequence": Fault(
        "tile/mask.cuh", "return min(bound, seqlen_k - first_key - 1);", "return bound;", WRONG
    ),
    "the wrong key head": Fault(
        FLASH, "place.head / params.heads_per_kv;\n    const T* k", "place.head;\n    const T* k",
        "cp.async of (16 bytes outside|an array .* writes in this launch)",  # by what lies behind k
    ),
    "the rows of the output one too far": Fault(
        FLASH, "(first_row + row) * params.out_row;", "(first_row + row + 1) * params.out_row;", "(outside|wrote too)"
    ),
    "an output row of another thread block": Fault(
        FLASH, "rows = min(BLOCK_M, params.seqlen_q - first_row);", "rows = BLOCK_M;", "(outside|wrote too)"
    ),
    "lse stored by every lane of a row": Fault(
        FLASH, "params.lse && lane % 4 == 0 &&", "params.lse &&", r"wrote too in this launch"
    ),
    "a transposed permutation": Fault(
        FLASH,
        "permutation[group * kMembers + row / kDepth]",
        "permutation[row / kDepth * kGroups + group]",
        WRONG,
        FUSED,
    ),
    "the wrong member of a group": Fault(
        "tile/fuse.cuh", "member * FusedTile::kRows * FusedTile::kPitch;", "member * FusedTile::kPitch;", WRONG, FUSED
    ),
    "the wrong member on the way to the product": Fault(
        "tile/product.cuh", "address + kHalf * kStride);", "address);", WRONG, GROUPED, lengths=(60, 173)
    ),
    "the padding of transposed keys not written": Fault(
        PREPARE, "min(kTile, params.key_columns - key())", "min(kTile, params.seqlen_k / 8 * 8 - key())",
        "cp.async of an array .* which nothing wrote", GROUPED
    ),
    "rows of a merge beyond the last": Fault(MERGE, "if (row >= params.rows) return;", "", "read of 4 bytes outside", merge="shards"),
    "rows of a shard beyond the last": Fault(
        MERGE_SHARD, "if (!inside) return;", "", "read of 8 bytes outside", merge="shard"
    ),
    "an lse written before it is read": Fault(
        MERGE_SHARD, "__syncwarp();", "", "read of an array .* which thread .* writes in this launch", merge="shard"
    ),
    "queries that a shard does not have": Fault(
        MERGE_SHARD, "query < params.last;", "query <= params.last;", "read of 4 bytes outside", merge="shard"
    ),
    "a group without a column": Fault(
        FLASH, "group < kGroups ? permutation", "group < kGroups - 1 ? permutation", WRONG, GROUPED
    ),
    "the weights of another group": Fault(
        "tile/fuse.cuh", "weights + i / kAcross", "weights + i % kAcross", WRONG, RANK1
    ),
    "a weight that Qhat has and Khat has not": Fault(
        "tile/fuse.cuh", "Traits<T>::fma(chunks[1].word[i], pair, chunks[0].word[i])",
        "Traits<T>::add(chunks[1].word[i], chunks[0].word[i])", WRONG, RANK1
    ),
    "weights that Qhat has and Khat has not": Fault(
        "tile/fuse.cuh", "fmaf(factor, Traits<T>::to_float(value.element[i]), total[i])",
        "fmaf(1.f, Traits<T>::to_float(value.element[i]), total[i])", WRONG, RANK1_OF_FOUR
    ),
    "a column that is hashed with its sign": Fault(
        PREPARE, "if constexpr (SIGNED) rank", "if constexpr (false) rank", WRONG, RANK1
    ),
    "a group's columns in the old order": Fault(
        WEIGHTS, "permutation[block + place]", "permutation[block + first + member]", WRONG, RANK1
    ),
    "weights that go by the keys of another head": Fault(
        WEIGHTS, "head / params.heads_per_kv;", "head % (params.heads / params.heads_per_kv);", WRONG, RANK1
    ),
    "shares that are weights": Fault(
        WEIGHTS, "params.shares[block + place] = share;", "params.shares[block + place] = weight;", WRONG, RANK1
    ),
    "products of another group": Fault(WEIGHTS, "own, first_lane + a / kRows", "own, a / kRows", WRONG, RESTORED_OF_EIGHT),
    "a mean of the keys that is not restored": Fault(
        "tile/spread.cuh", "scale * mean + ", "", WRONG, RESTORED
    ),
    "a shift of the row before": Fault(
        WEIGHTS, "first_row + start + row] = find", "max(first_row + start + row - 1, 0)] = find",
        "wrote too|nothing wrote", RESTORED
    ),
    "the mean of another column": Fault(
        FLASH, "shared.mean[row - KEEP] = weights[row]", "shared.mean[row - KEEP] = weights[row - 1]", WRONG, ENERGY
    ),
    "a row of the rest left out": Fault(
        "tile/fuse.cuh", "for (int start = 0; start < kRows; start += kSlices)",
        "for (int start = kSlices; start < kRows; start += kSlices)", WRONG, ENERGY
    ),
    "the sums of other keys": Fault(
        FLASH, "sums[nt * 8 + thread % 4 * 2 + i]", "sums[nt * 8 + thread % 4 + i]", WRONG, ENERGY
    ),
    "columns ordered by the energy of Q alone": Fault(
        ENERGY_ORDER, "__fmul_rn(__fsqrt_rn(squares[i]), of_keys[i].energy)", "squares[i]", WRONG, ENERGY
    ),
    "the energy of another KV head": Fault(
        ENERGY_ORDER, "batch_head / static_cast<u32>(params.heads_per_kv);", "batch_head % params.heads_per_kv;", WRONG, ENERGY
    ),
    "one key too many in a span": Fault(
        KEY_ENERGY, "min(kSpanKeys, params.seqlen_k - first_key)", "kSpanKeys", "outside|" + WRONG, ENERGY
    ),
    # Matrix instructions and shared tiles
    "a wrong swizzle of the transposed operand": Fault(
        "tile/multiply.cuh", "&tile.at(lane % 16, lane / 16 * 8)", "&tile.at(lane % 16 ^ 1, lane / 16 * 8)", WRONG
    ),
    "rows of a matrix that do not start on 16 bytes": Fault(
        "tile/multiply.cuh", "&tile.at(lane % 16, lane / 16 * 8)", "&tile.at(lane % 16, lane / 16 * 8 + 4)",
        "ldmatrix.trans of a row at an address that is not a multiple of 16"
    ),
    "a tile larger than the plan reserves": Fault(
        "tile/shared.cuh", "kPitch = kColumns + kPad;", "kPitch = kColumns + 2 * kPad;", "plan and the kernel disagree"
    ),
    "a step of the sum too many": Fault(
        FLASH, "kSteps = kDepth / kStepColumns;", "kSteps = kDepth / kStepColumns + 1;", f"nothing wrote|outside|{WRONG}", FUSED
    ),
    "the wrong lanes of a row": Fault(
        "tile/softmax.cuh", "__shfl_xor_sync(kFullWarp, total, 2)", "__shfl_xor_sync(kFullWarp, total, 4)", WRONG
    ),
    "a float32 operand of the wrong row": Fault(
        "tile/product_float.cuh", "j % 2 * 4) * Tile::kPitch", "j % 2 * 2) * Tile::kPitch", WRONG, GROUPED, dtype=np.float32
    ),
    "a high part with bits that no product reads": Fault(
        "tile/multiply.cuh", "(x)) & 0xffffe000u;", "(x));", WRONG, dtype=np.float32
    ),
    "steps of a float32 sum that are added again": Fault(
        "tile/multiply.cuh", "            sum.high[i] = 0.f;\n", "", WRONG, dtype=np.float32
    ),
    "low parts of scores left out": Fault(
        "tile/product_float.cuh", "Mma::add_low(scores[mt][nt], sums[mt][nt]);", ";", WRONG, dtype=np.float32
    ),
    "low parts of outputs left out": Fault(
        "tile/product_float.cuh", "Mma::add_low(tile[mt], sums[mt]);", "", WRONG, dtype=np.float32
    ),
    # Numbers
    "minus infinity taken from itself": Fault(
        "tile/softmax.cuh", "maximum[mt][half] = kNone;", "maximum[mt][half] = -infinity();", WRONG, {"window": (0, None), "causal": True}
    ),
    "an output that is not rescaled": Fault("tile/softmax.cuh", "output[mt][nt][i] *= rescale[mt][i / 2];", "(void)rescale;", WRONG, {"scale": 3.0}),
    "weights beyond all numbers, and no second time": Fault(
        FLASH, "while (kWide && again);", "while (false);", WRONG, {"scale": 60.0}, dtype=BFLOAT16
    ),
    "a second time that finds no maxima": Fault(
        "tile/softmax.cuh", "known & kUnsettled ? kAllRows : known,", "known & kUnsettled ? kAllRows : 0,",
        WRONG, {"scale": 60.0}, dtype=BFLOAT16
    ),
    "a hash with products and sums rounded together": Fault(
        PREPARE, "__fadd_rn(sums[i][b], __fmul_rn(r, pair.element[i]))", "fmaf(r, pair.element[i], sums[i][b])",
        "Mismatched", {"near_ties": True}, dtype=np.float32
    ),
    "bits of a hash that are not certain": Fault(
        PREPARE, "(kParts == 2 ? 96.f : 64.f)", "0.f", "Mismatched", {"near_ties": True}
    ),
    "bits of a hash that are not certain, of two parts": Fault(
        PREPARE, "(kParts == 2 ? 96.f : 64.f)", "0.f", "Mismatched", {"near_ties": True}, dtype=BFLOAT16
    ),
    "the second part of projections left out": Fault(
        PREPARE, "part < kParts; ++part) {\n                    const u32", "part < 1; ++part) {\n                    const u32",
        WRONG, GROUPED, dtype=BFLOAT16
    ),
    "a sum made anew from the wrong row": Fault(
        PREPARE, "start + i * kWarpSize + Unit::lane()", "start + i * kWarpSize + 31 - Unit::lane()", "Mismatched", {"near_ties": True}
    ),
    "vector loads where rows are not aligned": Fault(
        PREPARE, "copy_chunk<ALIGNED>", "copy_chunk<true>", "not a multiple of 16", GROUPED, layout="shifted"
    ),
    "an index that overflows": Fault(
        FLASH, "place.out_row(params, row) + column", "place.out_row(params, row) + column * 0x7fffffff", "a product that overflows at .*sm80_flash_fwd.cu"
    ),
    "an index outside its array": Fault(
        "tile/softmax.cuh", "maximum[mt][half] = kNone;", "maximum[mt][half + 1] = kNone;", "an index outside its array at .*softmax"
    ),
}  # fmt: skip

# Thread blocks that share keys, and heads that share tiles
FEW = (5, 173)
SECTIONS = {"causal": True, "section": 2}
SHARED = {
    "a share of the keys that is forgotten": Fault(FLASH, "min(place.split, larger);", "place.split;", WRONG, splits=3, lengths=(161, 500)),
    "keys that two thread blocks take": Fault(
        FLASH, "first_tile + share - (place.split < larger ? 0 : 1)", "first_tile + share", WRONG, splits=2
    ),
    "results of one thread block where others have theirs": Fault(
        FLASH, "kShareKeys ? split * params.split_rows + result_row : result_row", "result_row", "wrote too", splits=3
    ),
    "results of rows beyond the last": Fault(
        FLASH, "if (row < place.rows && nt * 8", "if (nt * 8", "outside|wrote too", splits=2
    ),
    "results of columns beyond the last": Fault(
        FLASH, "if (row < place.rows && nt * 8 < HEAD_DIM_V)", "if (row < place.rows)", "outside|wrote too", splits=2, head_dim_v=40
    ),
    "a head that another thread block has": Fault(
        FLASH, "split = kShareKeys ? block_index_z() : 0", "split = kShareKeys ? block_index_y() : 0", "outside|wrote too", splits=2
    ),
    "a section of heads that is not the next": Fault(
        FLASH, "block_index_y() * params.section", "block_index_y()", "wrote too", SECTIONS
    ),
    "heads of a section that follow one another": Fault(
        FLASH, "tile % params.section;", "tile / params.row_blocks;", "wrote too", SECTIONS
    ),
    "a thread block that leaves nothing": Fault(
        FLASH, "    store_output(params,", "    if (__syncthreads_or(softmax.sum[0][0] > 0.f)) store_output(params,",
        "nothing wrote|before its copies landed", splits=5
    ),
    "a warp without queries that copies nothing": Fault(
        FLASH, "cp_async_wait<0>();\n            __syncthreads();  // the keys",
        "if (idle) continue;\n            cp_async_wait<0>();\n            __syncthreads();  // the keys",
        "different barriers|nothing wrote|others have returned", lengths=FEW
    ),
    "warps without work that have some": Fault(FLASH, "warp_row >= place.rows;", "warp_row + 16 >= place.rows;", WRONG, lengths=(50, 173)),
    "packed queries under the mask of their rows": Fault(
        "tile/mask.cuh", "return (row + below) % queries;", "return row + below;", WRONG, {"causal": True}, lengths=FEW
    ),
    "packed queries under the mask of the first": Fault(
        FLASH, "params.packed > 1 ? params.queries - 1", "params.packed > 1 ? 0", WRONG, {"causal": True}, lengths=(5, 66)
    ),
    "a packed row of the wrong head": Fault(
        FLASH, "(head * params.packed + in_head)", "(head + in_head)", "wrote too", lengths=FEW
    ),
    "a merge without its barrier": Fault(
        MERGE_SPLITS, f"        {BARRIER}\n", "", RACE, splits=3, lengths=(1, 173)
    ),
    "a merge of one split too few": Fault(
        MERGE_SPLITS, "s < params.splits; s += params.row_warps", "s < params.splits - 1; s += params.row_warps", WRONG, splits=2
    ),
    "a merge of rows beyond the last": Fault(
        MERGE_SPLITS, "const bool inside = row < params.rows;", "const bool inside = true;", "outside|wrote too", splits=2, lengths=(161, 173)
    ),
    "a merge of lanes that miss each other": Fault(
        MERGE_SPLITS, "total += __shfl_xor_sync(kFullWarp, total, lanes)", "total += __shfl_xor_sync(kFullWarp, total, 1)", WRONG, splits=3
    ),
    "a merge into the wrong row": Fault(
        MERGE_SPLITS, "batch_head % params.heads * params.out_head", "batch_head * params.out_row", "wrote too", splits=2
    ),
}  # fmt: skip
FAULTS |= {f"shared keys: {name}": fault for name, fault in SHARED.items()}
# Heads of different ranks, 16 and 64 of 64 columns, whose K has a mean.
RANKED = {"ranks": (16, 48)}
WITHIN = {"ranks": (16, 48), "tolerance": 0.9}
KEPT = {**RANKED, "kept": (40, 9), "causal": True}  # keys that stay exact
KEPT_WITHIN = {**WITHIN, "kept": (40, 9)}
FAULTS |= {
    "the columns of another head": Fault(
        FLASH, "columns = params.ranks[place.batch_head]", "columns = params.ranks[place.batch_head ^ 2]", f"nothing wrote|{WRONG}",
        KEPT,
    ),
    "a step of a head too few": Fault(FLASH, "columns / kStepColumns);", "columns / kStepColumns - 1);", WRONG, RANKED),
    "a chunk of a head too few": Fault(
        "tile/shared.cuh", "column0 + offset < columns);", "column0 + offset + kElements < columns);", f"{RACE}|{WRONG}", RANKED
    ),
    "no barrier before factors are read": Fault(PROJECT, f"{BARRIER}  // the factors have landed", "", f"read {RACE}", RANKED),
    "no wait for the factors": Fault(PROJECT, "cp_async_wait<0>();", "", "has not landed|before its copies landed", RANKED),
    "the mean left in the keys": Fault(
        PROJECT, "place.of_queries || i >= width ? 0.f : bias[i];", "0.f;", WRONG, RANKED
    ),
    "the factors of another head": Fault(
        PROJECT, "head / params.heads_per_kv : head);", "head % 2 : head);", WRONG, RANKED
    ),
    "a row of Qhat beyond the last": Fault(PROJECT, "if (tile * 8 + i >= rows) continue;", "", "outside|wrote too", RANKED),
    "no shift for a head without columns": Fault(
        PROJECT, "if (width == 0 && !shifted && !sketched) return;", "if (width == 0) return;", "which nothing wrote",
        {"ranks": (0, 32), "kept": (40, 9)}
    ),
    "a shift without the scale": Fault(PROJECT, "= sum * scale;", "= sum;", WRONG, RANKED),
    "a shift without the first parts of the mean": Fault(
        PROJECT, "float sum = product[tile][0][i] + product[tile][0][i + 2];", "float sum = product[tile][0][i + 2];", WRONG, RANKED
    ),
    "what Qhat misses by some of the sketch": Fault(PROJECT, "int distance = 4;", "int distance = 8;", "Not equal", WITHIN),
    "chances of rows from sums that are not there": Fault(
        DRAW, f"{BARRIER}  // the sums of all warps are there", "", f"read {RACE}", WITHIN
    ),
    "rows at the place of the next warp": Fault(
        DRAW, "from_lane(until, group - 1)", "from_lane(until, group)", "Not equal", WITHIN
    ),
    "rows at the place of the next lane": Fault(
        DRAW, "from_lane(sum, chosen - 1)", "from_lane(sum, chosen)", "Not equal", WITHIN
    ),
    "a chunk of rows too many": Fault(DRAW, "place -= of_chunk;", "", "Not equal", WITHIN, lengths=(4200, 150)),
    "a sample with another's chances": Fault(
        DRAW, "total * reciprocal_approx(drawn)", "total", "Not equal", WITHIN
    ),
    "points of both thread blocks by one": Fault(DRAW, "share * kWarps + warp;", "warp;", "wrote too in this launch", WITHIN),
    "a count of an earlier call": Fault(DRAW, "if (share == 0 && thread_index() == 0) params.counts[head] = 0;", "", "which nothing wrote", WITHIN),
    "no barrier before sampled keys are read": Fault(
        PROBE, f"{BARRIER}  // queries, keys, values and spans have landed", "//", RACE, WITHIN, lengths=(161, 1500)
    ),
    "sampled keys overwritten before the barrier": Fault(
        PROBE, "cp_async_wait<kStages == 1", "ring.advance(shared, next, stage_before);\n        cp_async_wait<kStages == 1", RACE, WITHIN,
        lengths=(161, 1500)
    ),
    "a sample of all keys that a row sees some of": Fault(
        PROBE, "span.last >= key + TILE_K - 1", "span.last >= key", "Not equal", WITHIN, lengths=(161, 97)
    ),
    "no wait for sampled keys": Fault(
        PROBE, "cp_async_wait<kStages == 1 ? 0 : kStages - 2>();", "", "has not landed", WITHIN
    ),
    "a wait for all sampled keys but those needed": Fault(
        PROBE, "kStages - 2>();", "kStages - 1>();", "has not landed", WITHIN, lengths=(161, 1500)
    ),
    "the sampled keys of another tile": Fault(PROBE, "shared.k[stage], lane", "shared.k[0], lane", f"{RACE}|Not equal", WITHIN, lengths=(161, 1500)),
    "the reduced keys of another tile": Fault(PROBE, "shared.khat[stage], lane", "shared.khat[0], lane", f"{RACE}|Not equal", WITHIN, lengths=(161, 1500)),
    "parts of the keys that are not merged": Fault(
        DECIDE, "if (own < params.splits)", "if (own < 1)", "[Nn]ot equal", WITHIN
    ),
    "sampled rows that are not compared yet": Fault(
        DECIDE, f"{BARRIER}  // the rows of the thread block are compared", "", "writes in this launch", WITHIN
    ),
    "a head that is decided before its last rows": Fault(DECIDE, "!= kGroups - 1", "!= kGroups - 2", "which nothing wrote", WITHIN),
    "a count that orders nothing": Fault(DECIDE, "atomic_add_in_order(", "atomic_add(", "writes in this launch", WITHIN),
    "lanes that do not know what the first has found": Fault(
        DECIDE, "__syncwarp();  // all lanes know", "// all lanes know", "writes in this launch", WITHIN
    ),
    "the worst row of another head": Fault(DECIDE, "params.known[head * 2 + 1]", "params.known[(head ^ 2) * 2 + 1]", "[Nn]ot equal", WITHIN),
    "no row is missed": Fault(DECIDE, "+ worst", "+ 0.f", "[Nn]ot equal", WITHIN),
    "a smaller error than was known": Fault(DECIDE, "? least :", "? sampled :", "[Nn]ot equal", WITHIN),
    "the rank of another head": Fault(DECIDE, "rank = params.wanted[head];", "rank = params.wanted[head ^ 2];", "Not equal|Arrays are not equal", WITHIN),
    "maxima of other scores": Fault(FLASH, "softmax.maximum[mt][half] -=", "softmax.maximum[mt][half] -= 0.f *", WRONG, KEPT),
    "a pass too few": Fault("tile/mask.cuh", "whole ? kWhole + 1 : count;", "whole ? kWhole + 1 : count - 1;", WRONG, KEPT),
    "keys of the pass before": Fault("tile/mask.cuh", "max(bound, first - first_key)", "bound", WRONG, KEPT),
    "a sample without keys that stay exact": Fault(PROBE, "if (kept) scores[1]", "if (false) scores[1]", "Not equal", KEPT_WITHIN),
    "a sample without what Khat lacks": Fault(PROBE, "+= shift[i / 2]", "+= 0.f", "Not equal", KEPT_WITHIN),
    "an exact sample for a reduced one": Fault(
        DECIDE, "lane >= params.splits", "lane >= 0", "Not equal|Arrays are not equal", KEPT_WITHIN
    ),
    "a sample without the first keys": Fault(PROBE, "key < params.sinks || ", "", "Not equal", KEPT_WITHIN),
}  # fmt: skip

# Whole blocks of keys that stay exact: of 384 queries and 128 keys.
MASK = "tile/mask.cuh"
BLOCKS = {**RANKED, "kept": (90, 9), "blocks": True}
BLOCKS_WITHIN = {**WITHIN, "kept": (90, 9), "blocks": True}
FAULTS |= {
    "exact keys that end within a block": Fault(
        MASK, "(to + keys - 1) / keys", "to / keys", WRONG, BLOCKS, lengths=(900, 900)
    ),
    "exact keys of each tile of queries": Fault(
        MASK, "query / rows * rows;", "query;", WRONG, BLOCKS, lengths=(900, 900)
    ),
    "keys behind the exact ones seen twice": Fault(
        MASK, "if (own == kAfter) band.first", "if (false) band.first", WRONG, BLOCKS, lengths=(900, 900)
    ),
    "exact keys that not all threads know yet": Fault(
        FLASH, f"params.seqlen_k);\n    {BARRIER}", "params.seqlen_k);", f"{RACE}|nothing wrote", BLOCKS, lengths=(900, 900)
    ),
    "a sample whose exact keys end within a block": Fault(
        PROBE, "near.end - 1};", "near.end - 50};", "Not equal", BLOCKS_WITHIN, lengths=(900, 900)
    ),
    "rows drawn by exact keys of their own": Fault(
        "kernels/smxx_draw.cu", "row / params.exact_rows * params.exact_rows;", "row;", "Not equal", BLOCKS_WITHIN,
        lengths=(900, 900),
    ),
}  # fmt: skip

# Maxima of float16 that move where a vote says so, exact and in groups.
RISING = {"head_dim": 128, "rise": 250, "causal": True}
FAULTS |= {
    f"{name}, {kind}": Fault(file, old, new, found, {**RISING, **options}, head_dim_v=128)
    for kind, options in (("exact", {}), ("groups", {"reduction": cudistr.LSH(4)}))
    for name, file, old, new, found in (
        ("a vote that no maximum moves", SOFTMAX, "return __any_sync(kFullWarp, any);", "return false;", WRONG),
        ("a maximum of which only its own lane knows that it moves", SOFTMAX, "return __any_sync(kFullWarp, any);", "return any;",
         "has diverged"),
        ("an output that does not follow its maxima", FLASH,
         "                    softmax.apply(rescale, output);\n                    softmax.rescale_sum", "softmax.rescale_sum",
         WRONG),
        ("a sum that does not follow its maxima", FLASH,
         "softmax.rescale_sum(rescale);\n                }\n                softmax.begin", "}\n                softmax.begin",
         WRONG),
    )
}  # fmt: skip

# Exact keys beside groups, and beside columns kept by energy, in the portable kernel.
NEAR = {"reduction": cudistr.LSH(2, near=40, sinks=9)}
NEAR_RANK1 = {"reduction": cudistr.LSH(2, representative="rank1", near=40, sinks=9)}
NEAR_ENERGY = {"reduction": cudistr.Energy(32, near=40, sinks=9)}
WAIT = "cp_async_wait<0>();"
FAULTS |= {
    "a pass that begins before the last one is read": Fault(
        FLASH, f"{WAIT}\n            {BARRIER}  // every warp is done with the last tile", WAIT, RACE, NEAR, lengths=(161, 400)
    ),
    "a pass that begins before its copies have landed": Fault(
        FLASH, f"{WAIT}\n            {BARRIER}  // every warp is done with the last tile", BARRIER, RACE, NEAR, lengths=(161, 400)
    ),
    "groups whose exact keys not all threads know yet": Fault(
        FLASH, f"params.seqlen_k);\n    {BARRIER}", "params.seqlen_k);", f"{RACE}|nothing wrote", {**NEAR, "blocks": True}, lengths=(900, 900)
    ),
    "queries of groups that only a pass with keys gathers": Fault(
        FLASH, "tile < first_tile && (!kOnce || pass > first_pass)", "tile < first_tile", f"{RACE}|nothing wrote|{WRONG}",
        {"reduction": cudistr.LSH(2, near=150)}, lengths=(300, 300),
    ),
    "queries of groups that a later pass gathers": Fault(
        FLASH, "pass == first_pass) {\n                if constexpr (kStaged) {\n                    const", "pass > first_pass) {\n                if constexpr (kStaged) {\n                    const", f"{RACE}|nothing wrote|{WRONG}", NEAR
    ),
    "rows of groups beyond the tile": Fault(FLASH, " || row < BLOCK_M) shared.q.at", " || true) shared.q.at", f"{RACE}|{WRONG}", NEAR, dtype=BFLOAT16),
    "groups that begin before queries of no exact keys have landed": Fault(
        FLASH, f"if (kOnce && kGrouped) {BARRIER}", "", RACE, {"reduction": cudistr.LSH(2, sinks=9), "window": (330, 190), "blocks": True},
        lengths=(450, 700),
    ),
    "groups of exact keys": Fault(FLASH, "kGrouped ? params.passes.exact : 0", "0", WRONG, NEAR),
    "exact keys that groups forget": Fault(FLASH, "(!KEPT || !kGrouped)", "(true)", WRONG, NEAR),
    "exact keys of another head": Fault(FLASH, "head_kv * params.exact_k_head", "0 * params.exact_k_head", WRONG, NEAR),
    "an edge of groups that is not cut": Fault(FLASH, "band = params.passes.band(anew(pass)", "band = params.passes.band(anew(0)", WRONG, NEAR),
    "a column of groups that another has": Fault(FLASH, "min(group, kGroups - 1) * kMembers", "min(group, kGroups - 2) * kMembers", WRONG, GROUPED, dtype=BFLOAT16),
    "a group that its neighbour has": Fault(FLASH, "group = thread_index() % kAcross * 2 + i;", "group = thread_index() % kAcross * 2;", WRONG, GROUPED),
    "maxima of exact scores beside weights": Fault(FLASH, "if (kLacks && kGrouped) subtract", "if (false) subtract", WRONG, NEAR_RANK1),
    "maxima of exact scores beside energy": Fault(FLASH, "if (kLacks && kGrouped) subtract", "if (false) subtract", WRONG, NEAR_ENERGY),
    "an lse of what weights leave": Fault(FLASH, "if (kLacks) log_sum +=", "if (false) log_sum +=", WRONG, NEAR_RANK1),
}  # fmt: skip

# Hopper: what works beside the threads, and what orders it.
LOW_RANK, ATTENDED = {"low_rank": True}, {"low_rank": True, "attended": True}
SOME = {**LOW_RANK, "head_dim": 24}  # columns to fill up
OTHERS = "Not equal to tolerance|assert np.False_"  # what a comparison of factors says
FAULTS |= {
    "sampled keys before the center is found": Fault(
        DRAWN,
        f"{BARRIER}\n        for (int column",
        "for (int column",
        f"read {RACE}",
        LOW_RANK,
    ),
    "a center of fewer keys": Fault(DRAWN, "sum / kCenterKeys", "sum / 64", OTHERS, LOW_RANK),
    "columns that are not filled up": Fault(
        DRAWN, "i < Tile::kRows * kRest;", "i < 0;", "which nothing wrote|nothing wrote", SOME
    ),
    "no barrier before a tile of samples is used": Fault(
        LOWRANK_ROWS, f"        {BARRIER}\n        const int next", "        const int next", RACE, LOW_RANK
    ),
    "no barrier before the next samples overwrite": Fault(
        LOWRANK_ROWS, f"{BARRIER}  // every warp is done with the tile", "", RACE, LOW_RANK
    ),
    "a softmax whose maximum never rises": Fault(
        LOWRANK_ROWS, "softmax[half].rise(top);", "", OTHERS, ATTENDED
    ),
    "exact keys that count": Fault(
        LOWRANK_SUMS, "rows.keeps(half, own.key[nt][i], sinks) ? 0.f : weight;", "weight;", OTHERS, ATTENDED
    ),
    "keys that count alike": Fault(LOWRANK_SUMS, "fmaf(weight, factor, plain)", "plain", OTHERS, ATTENDED),
    "the weight of another key": Fault(
        LOWRANK_SUMS, "lane % 4 * 2 + odd] = sum;", "lane % 4 * 2 + !odd] = sum;", OTHERS, ATTENDED
    ),
    "no barrier before weights are used": Fault(
        LOWRANK_SUMS,
        f"{BARRIER}  // the tile is there, and the weights of the one before",
        "",
        RACE,
        LOW_RANK,
    ),
    "no barrier before the tile after the next": Fault(
        LOWRANK_SUMS, f"{BARRIER}  // every warp is done with the tile before", "", RACE, LOW_RANK
    ),
    "queries that count for nothing": Fault(
        LOWRANK_SUMS, "plain = 1.f / kQueries;", "plain = 0.f;", OTHERS, LOW_RANK
    ),
    "no barrier before rows that are taken off": Fault(
        LOWRANK_FACTORS,
        f"warp, lane);\n        {BARRIER}\n    }}\n    if constexpr",
        "warp, lane);\n    }\n    if constexpr",
        RACE,
        LOW_RANK,
    ),
    "a product in the place of its rows before they are read": Fault(
        LOWRANK_FACTORS, f"if (kLeft == kByRows) {BARRIER}", "", RACE, LOW_RANK
    ),
    "columns that are not orthogonal": Fault(
        LOWRANK_FACTORS, "row < column ? own[m][c] : row == column", "row == column", OTHERS, LOW_RANK
    ),
    "sums over splits that are taken off": Fault(
        LOWRANK_FACTORS, "own[n].x[c] += more[n].x[c];", "own[n].x[c] -= more[n].x[c];", OTHERS, LOW_RANK
    ),
    "columns of factors at another's place": Fault(
        LOWRANK_FACTORS, "tile % (kOf / 16) * 2;", "tile % (kOf / 16);", "Not equal|not equal", LOW_RANK
    ),
    "the second part of a factor": Fault(
        LOWRANK_FACTORS, "x -= Traits<T>::to_float(part);", "", "Not equal|not equal", LOW_RANK
    ),
}

ON_HOPPER = {
    # Barriers
    "no barrier after barriers are initialised": Fault(
        HOPPER, f"    {BARRIER}\n    // The same for all lanes", "    // The same for all lanes",
        "mbarrier .*(never initialised|that no barrier puts before it)"
    ),
    "no fence after barriers are initialised": Fault(
        HOPPER, "fence_mbarrier_init();", "", "a bulk copy arrives at the mbarrier .* no fence.mbarrier_init"
    ),
    "no wait for the keys": Fault(
        HOPPER, "if (early || last[0] + last[1] < 0.f) shared.k_barriers.wait(step + 1);", "",
        f"(wgmma|bulk copy) {RACE}"
    ),
    "queries that nothing stands for": Fault(
        HOPPER, "if (COPIED ? !exact : columns", "if (COPIED ? false : columns", WRONG, COPIED_ENERGY
    ),
    "a number of another column": Fault(
        COPIED_QUERIES, "= weights[place];", "= weights[place ^ 1];", WRONG, COPIED_RANK1
    ),
    "a column that is not kept": Fault(COPIED_QUERIES, "place < KEEP ? 0xffff", "place < KEEP - 1 ? 0xffff", WRONG, COPIED_ENERGY),
    "no barrier before the columns of queries are read": Fault(
        COPIED_QUERIES, f"{BARRIER}  // what columns are is there", "", RACE, COPIED_ENERGY
    ),
    "no barrier before the queries of groups are read": Fault(
        COPIED_QUERIES, f"{BARRIER}  // the rows are there", "", RACE, COPIED_RANK1
    ),
    "no barrier before the queries of other groups are read": Fault(
        COPIED_QUERIES, f"{BARRIER}  // the queries of groups are there", "", RACE, COPIED_RANK1
    ),
    "no wait for the values": Fault(HOPPER, "shared.v_barriers.wait(step - 1);", "", f"wgmma {RACE}"),
    "no wait for the queries": Fault(
        HOPPER, "own_queries.wait(place_number);\n                if constexpr (kGrouped && !KEPT)", "if constexpr (kGrouped && !KEPT)", f"wgmma {RACE}"
    ),
    "keys given back before the product has read them": Fault(
        HOPPER,
        "wgmma_wait<1>();\n                    wgmma_pin(scores[0]);\n                    release(shared.k_barriers, step);",
        "release(shared.k_barriers, step);\n                    wgmma_wait<1>();\n                    wgmma_pin(scores[0]);",
        f"bulk copy {RACE}|wgmma {RACE}",
    ),
    "values given back one use too early": Fault(
        HOPPER, "release(shared.v_barriers, step - 1);", "", "no thread of block .* can go on"
    ),
    "an empty stage that is not waited for": Fault(
        PANELS, "        wait_empty(n);\n", "", f"bulk copy {RACE}|one arrival too many|no thread"
    ),
    "the wrong parity": Fault(
        PANELS, "parity(n) ^ 1); }", "parity(n)); }", "no thread of block .* can go on: thread .* waits for parity"
    ),
    "too few bytes announced": Fault(
        HOPPER, "barriers.open(step, KeyTile::bytes(columns))", "barriers.open(step, KeyTile::bytes(columns) / 2)",
        f"no thread of block .* can go on|{RACE}"
    ),
    "an arrival too few in a phase": Fault(
        HOPPER, "shared.k_barriers.init(kReaders,", "shared.k_barriers.init(kReaders + 1,", "no thread of block .* can go on"
    ),
    "an arrival too many in a phase": Fault(
        HOPPER, "shared.k_barriers.init(kReaders,", "shared.k_barriers.init(kReaders - 1,",
        f"{RACE}|one arrival too many"
    ),
    "a turn that nobody passes on": Fault(
        HOPPER, "if (group == kConsumers - 1) pass_turn();", "", "no thread of block .* can go on"
    ),
    "a turn that is awaited by too many": Fault(
        HOPPER, "named_barrier_sync(1 + group, 2 * kGroupThreads)", "named_barrier_sync(1 + group, 3 * kGroupThreads)",
        "which others come to as one of"
    ),
    # Products
    "no fence before a product": Fault(
        "tile/warpgroup.cuh", "shapes\");\n    wgmma_fence();", "shapes\");", "wgmma without a wgmma.fence"
    ),
    "no wait for the scores": Fault(
        HOPPER, "                    wgmma_wait<1>();\n", "", f"{RACE}|{WRONG}|accumulator was written"
    ),
    "no wait for the output": Fault(
        HOPPER, "                    wgmma_wait<0>();\n                    wgmma_pin(output[0]);\n                    wgmma_pin(scores[0]);",
        "                    wgmma_pin(output[0]);\n                    wgmma_pin(scores[0]);",
        f"accumulator was written|operand in registers changed|{RACE}|{WRONG}"
    ),
    "weights packed while a product reads the old ones": Fault(
        HOPPER,
        "const bool early",
        "pack_weights<T>(weights, scores[0]);\n                    const bool early",
        "operand in registers changed while a product read it",
    ),
    "shared memory written by a thread, and no fence for the product": Fault(
        HOPPER,
        "                own_queries.wait(place_number);\n                if constexpr (kGrouped && !KEPT)",
        "                own_queries.wait(place_number);\n                if (group == 0 && row() == 0 && lane() == 0) {\n"
        "                    volatile u16& x = *reinterpret_cast<volatile u16*>(shared.q.data);\n"
        "                    x = x;\n                }\n                __syncwarp();\n                if constexpr (kGrouped && !KEPT)",
        "wrote without a fence.proxy.async|that no barrier puts before it",
    ),
    # Places
    "another swizzle in the descriptor": Fault(
        PANELS, "kWidth == 128 ? 1 : kWidth == 64 ? 2 : 3", "kWidth == 128 ? 2 : kWidth == 64 ? 2 : 3", f"{WRONG}|outside|{RACE}"
    ),
    "the wrong distance of groups of rows": Fault(PANELS, "u64(8 * kWidth / 16) << 32", "u64(4 * kWidth / 16) << 32", WRONG),
    "the wrong step along the sum": Fault(
        PANELS, "return kUpper | (lower + step * kWidth);", "return kUpper | (lower + step * kWidth / 2);", WRONG
    ),
    "a copy of the row below": Fault(
        HOPPER, "load(&params.k, barrier, tile * kTileUnit,", "load(&params.k, barrier, tile * kTileUnit + 1,", WRONG
    ),
    "the wrong key head in a copy": Fault(
        HOPPER, "place.head / params.heads_per_kv", "place.head % params.heads_per_kv", WRONG
    ),
    "a tile beyond shared memory": Fault(
        HOPPER, "keys.k[step % kStages].load(&params.k,", "keys.k[step % kStages + 4].load(&params.k,",
        "outside shared memory"
    ),
    "an output row beyond the last": Fault(HOPPER, "own < params.seqlen_q;", "own <= params.seqlen_q;", "outside|wrote too"),
    # Order
    "queries never given back": Fault(
        HOPPER, "\n                    if (other_queries) release(own_queries, place_number);", "",
        "no thread of block .* can go on"
    ),
    "one warp that does not give back": Fault(
        HOPPER, "if (lane() == 0) ring.release(n);", "if (lane() == 0 && thread_index() >= 160) ring.release(n);",
        "no thread of block .* can go on"
    ),
    "a descriptor of the wrong stage": Fault(
        HOPPER, "values + (step - 1) % kStages * kValueStage", "values + step % kStages * kValueStage", f"{RACE}|{WRONG}"
    ),
    "panels that lie elsewhere": Fault(
        PANELS, "u32(kPanelBytes / 16) << 16", "u32(kPanelBytes / 16 + 8) << 16", f"outside|{RACE}|{WRONG}", head_dim_v=128
    ),
    "one key too many in a row": Fault(
        "tile/mask.cuh", "offset > last) scores[nt]", "offset > last + 1) scores[nt]", WRONG, {"causal": True}
    ),
    "a tile that goes without its mask": Fault(
        HOPPER, "(band.last_key(group_row) + 1) / TILE_K", "(band.last_key(group_row) + TILE_K) / TILE_K", WRONG, {"causal": True}
    ),
    "the rows of another consumer": Fault(HOPPER, "group * kGroupRows * QueryTile::kWidth", "0 * group", WRONG),
    "an output that is not rescaled": Fault(
        HOPPER, "softmax.apply(rescale, output);\n                            pack", "pack", WRONG, {"scale": 3.0}
    ),
    "weights beyond all numbers, and no second time": Fault(
        HOPPER, "if (lost) {\n                chosen", "if (false) {\n                chosen", WRONG, {"scale": 60.0}, dtype=BFLOAT16
    ),
    "a second time for the rows of another piece of work": Fault(
        HOPPER, "shared.again[(number + 1) % kStages] = slot;", "shared.again[(number + 1) % kStages] = slot ^ 1;",
        f"{WRONG}|{RACE}", {"scale": 60.0}, dtype=BFLOAT16
    ),
    "a second time in another place": Fault(
        HOPPER, "                shared.places[(number + 1) % kPlaces] = shared.places[judged % kPlaces];\n", "",
        f"{WRONG}|{RACE}", {"scale": 60.0}, dtype=BFLOAT16
    ),
    "the place of the next tile in that of the current one": Fault(
        HOPPER, "shared.places[(number + 1) % kPlaces] = find_place", "shared.places[number % kPlaces] = find_place",
        f"{WRONG}|{RACE}", {"causal": True}, lengths=(2100, 100)
    ),
    "first scores that nobody passes on": Fault(
        HOPPER, "if (in_turn) pass_turn();", "", "no thread of block .* can go on"
    ),
    "too many bytes announced for a rank": Fault(
        PANELS, "if (x[0] < columns) tma", "if (x[0] + kPanelColumns < columns) tma", "no thread of block .* can go on",
        {"ranks": (16, 96)}
    ),
    "a step of a head too few": Fault(
        "tile/warpgroup.cuh", "if (steps > kMiddle) {", "if (steps > kMiddle + 1) {", WRONG, {"ranks": (16, 96)}
    ),
    "q and k for a head that is reduced": Fault(
        HOPPER, ".load(&params.khat, barrier, tile", ".load(&params.k, barrier, tile", WRONG, {"ranks": (16, 128)}
    ),
    "a tile taken twice": Fault(
        HOPPER, "gridDim.x + (params", "gridDim.x - 1 + (params", "wrote too", {"causal": True}
    ),
    # Sums of groups
    "sums that no fence shows to products": Fault(
        HOPPER, "                fence_proxy_async();\n", "", "wrote without a fence.proxy.async", GROUPED
    ),
    "no wait for the raw keys": Fault(HOPPER, "keys.raw_barriers.wait(step);", "", RACE, GROUPED),
    "no wait until Khat may be overwritten": Fault(
        HOPPER, "                shared.k_barriers.wait_empty(step);\n", "",
        f"{RACE}|one arrival too many|no thread of block 0 can go on", GROUPED
    ),
    "raw keys given back before they are read": Fault(
        HOPPER, "                if (HALF && !wide && walk.reduced()) {\n",
        "                if (lane == 0) keys.raw_barriers.release(step);\n                __syncwarp();\n                if (false) {\n",
        f"bulk copy {RACE}|one arrival too many|no thread", GROUPED
    ),
    "an order that is overwritten while it is read": Fault(
        HOPPER, "shared.q_barriers[0].wait_empty(place_number);", "", f"{RACE}|one arrival too many",
        {**GROUPED, "causal": True}, lengths=(2100, 100)
    ),
    "queries given back by a thread that still reads them": Fault(
        HOPPER, "        queries.gather(shared.q, shared.keys, row(), lane());\n        shared.q_barriers[0].release(place_number);",
        "        shared.q_barriers[0].release(place_number);\n        queries.gather(shared.q, shared.keys, row(), lane());",
        RACE, {**GROUPED, "causal": True}, lengths=(2100, 100)
    ),
    "an order of another head": Fault(
        HOPPER, "place.batch_head) * params.group_blocks", "place.head / 2) * params.group_blocks", WRONG, GROUPED
    ),
    "a member counted twice": Fault(HOPPER, "kMembers + i % kMembers];", "kMembers];", WRONG, GROUPED),
    "the wrong swizzle of a sum": Fault(HOPPER, "(thread % kAcross ^ of % 8)", "(thread % kAcross)", WRONG, GROUPED),
    "the wrong swizzle of raw keys": Fault(HOPPER, "(thread % kAcross ^ column % 8)", "(thread % kAcross)", WRONG, GROUPED),
    # Weighted
    "weights read before all are written": Fault(
        HOPPER, "        named_barrier_sync(1 + kConsumers, kBuilderThreads);", "        //", RACE, RANK1
    ),
    "builders that wait for others": Fault(
        HOPPER, "named_barrier_sync(1 + kConsumers, kBuilderThreads);",
        "named_barrier_sync(1 + kConsumers, kBuilderThreads + 32);",
        "no thread of block .* can go on", RANK1
    ),
    "weights overwritten while another still sums": Fault(
        HOPPER, "T* to = keys.weights[place_number % 2];", "T* to = keys.weights[0];", RACE,
        {**RANK1, "causal": True}, lengths=(2100, 100)
    ),
    "the weights of another row": Fault(
        HOPPER, "weights[i * kDown * kMembers + member]", "weights[i * kMembers + member]", WRONG, RANK1_OF_FOUR
    ),
    "shares of another column": Fault(
        HOPPER, "storage.shares[group * kMembers + member]", "storage.shares[group * kMembers]", WRONG, RANK1
    ),
    "shares of more than a whole": Fault(
        HOPPER, "keys.shares[i] = shares[i] / square;", "keys.shares[i] = shares[i];", WRONG, RANK1
    ),
    "weights of another head": Fault(
        HOPPER, "tell_numbers(params.weights + block * HEAD_DIM", "tell_numbers(params.weights + (block ^ 1) * HEAD_DIM", WRONG, RANK1
    ),
    "a query of the wrong place": Fault(
        PANELS, "^ row / (128 / kWidth) % (kWidth / 16);", "^ row % 2;", WRONG, GROUPED
    ),
}  # fmt: skip
KEPT_GROUPS = {"reduction": cudistr.LSH(2, near=40, sinks=9), "causal": True}
ON_HOPPER |= {
    "exact keys overwritten while consumers read them": Fault(
        HOPPER,
        "if (exact_ones >> 1 & 1) shared.k_barriers.wait_empty(step);",
        "",
        RACE,
        KEPT_GROUPS,
        head_dim_v=128,
    ),
    "queries never given back where all keys are exact": Fault(
        HOPPER,
        "if (!walk.inside()) return shared.q_barriers[0].release(number);",
        "if (!walk.inside()) return;",
        "no thread of block .* can go on",
        {"reduction": cudistr.LSH(2, near=130), "causal": True},
        lengths=(262, 262),
    ),
    "keys before a pass that starts within a chunk": Fault(
        HOPPER, "rows[half].first = max(rows[half].first, tile.first);", "", WRONG, KEPT_GROUPS
    ),
}
ON_HOPPER |= {
    "queries of the band before": Fault(
        HOPPER, "own_queries.wait(++place_number);", "++place_number;", RACE, KEPT
    ),
    "maxima of other scores": Fault(
        HOPPER, "softmax.maximum[0][half] -=", "softmax.maximum[0][half] -= 0.f *", WRONG, KEPT
    ),
    "keys of a pass that go without its mask": Fault(
        HOPPER, "first_key > 0 || last_key < TILE_K - 1", "last_key < TILE_K - 1", WRONG, KEPT
    ),
    "a mask for the rows of another consumer": Fault(
        HOPPER,
        "const int query = row() + half * 8;\n                rows",
        "const int query = row() % 64 + half * 8;\n                rows",
        WRONG,
        KEPT,
    ),
    "tiles that begin before their pass": Fault(
        HOPPER,
        "int key = tiles.first_key +",
        "int key = tiles.first_key - 8 +",
        WRONG,
        KEPT,
    ),
    "keys of the next pass": Fault(
        HOPPER, "min(query + tile.high, tile.end - 1)", "query + tile.high", WRONG, KEPT
    ),
    "one key too few of a pair": Fault("tile/mask.cuh", "min(key % 8, 2)", "min(key % 8, 1)", WRONG, KEPT),
    "what is told of a tile, overwritten while it is looked at": Fault(
        HOPPER, "constexpr int kSteps = KEPT ? 8 : 4;", "constexpr int kSteps = 1;", f"{RACE}|{WRONG}", KEPT
    ),
    "the queries of another consumer": Fault(
        HOPPER,
        "const int row = part * kPartRows;",
        "const int row = (kQueryParts - 1 - part) * kPartRows;",
        f"{RACE}|{WRONG}",
        KEPT,
    ),
    "exact keys counted as reduced": Fault(
        HOPPER, "exact += params.passes.reduced(pass) ? 0 : tiles;", "", f"{RACE}|{WRONG}|no thread", KEPT
    ),
    "scores of no columns that are those of the tile before": Fault(
        HOPPER,
        "if (!kExactLoop && loop == 1) wgmma_clear(scores[0]);",
        "",
        WRONG,
        {"ranks": (0, 64), "kept": (40, 10)},
    ),
    "a product of no columns": Fault(
        HOPPER,
        "(loop == 1 || walk.in_first_loop())",
        "true",
        f"{RACE}|{WRONG}",
        {"ranks": (0, 64), "kept": (40, 10)},
    ),
    "an lse of other scores": Fault(HOPPER, "if (lacks) log_sum +=", "if (false) log_sum +=", WRONG, KEPT),
}
# Heads of one rank, 32 of 128 columns, a panel of two; and tiles of queries from which all exact keys are far away.
ONE_RANK = {"ranks": (32, 32), "kept": (40, 9), "head_dim": 128}
NO_EXACT_KEYS = {"ranks": (32, 128), "head_dim": 128}
NO_EXACT_TILE = {"ranks": (32, 32), "kept": (40, 0), "head_dim": 128}
NO_EXACT_TILE_OF_GROUPS = {"reduction": cudistr.LSH(2, near=40)}
ON_HOPPER |= {
    "exact keys in the columns of a rank": Fault(
        HOPPER, "if (exact) return queries.start_exact(scores, step);", "", WRONG, ONE_RANK
    ),
    "reduced tiles in the loop of exact ones": Fault(
        HOPPER, "return kExactLoop ? !reduced() :", "return kExactLoop ? true :", f"{RACE}|{WRONG}", ONE_RANK
    ),
    "a tile of no key that nobody counts": Fault(
        HOPPER,
        "own().count = count + none;",
        "own().count = count;",
        f"{RACE}|{WRONG}|no thread of block .* can go on",
        NO_EXACT_TILE_OF_GROUPS,
        lengths=(300, 60),
    ),
    "a first tile that is reduced taken for an exact one": Fault(
        HOPPER, "kFirstExact || !walk.reduced()", "true", f"{RACE}|{WRONG}", NO_EXACT_KEYS
    ),
    "a first tile of no exact key that has too few columns": Fault(
        HOPPER,
        "width = NEAR ? HEAD_DIM : columns;",
        "width = columns;",
        "nothing wrote",
        NO_EXACT_TILE,
        lengths=(300, 60),
    ),
    "an exact head that makes the passes of others": Fault(
        HOPPER,
        "return kRanks && shared.notes.columns == HEAD_DIM;",
        "return false;",
        f"{RACE}|{WRONG}",
        {"ranks": (32, 32), "kept": (0, 9), "decided": (32, 64)},
    ),
}
SHARED_OUT = {"multiprocessors": 6}  # the last two of eight tiles
ON_HOPPER |= {
    "a tile that is short for another consumer": Fault(
        HOPPER,
        "min(high + (group + 1) * kGroupRows, end) <= kShortKeys",
        "min(high + kGroupRows, end) <= kShortKeys",
        WRONG,
        {**RANKED, "kept": (200, 9), "causal": True},
    ),
    "turns at other tiles than another consumer's": Fault(
        HOPPER,
        "cut >> 4 != (1 << kConsumers) - 1) cut &= 15;",
        "false) cut &= 15;",
        "no thread of block .* can go on",
        {"ranks": (32, 32), "kept": (130, 200)},
        lengths=(333, 415),
    ),
    "the last exact tile taken for a short one": Fault(
        HOPPER,
        "walk.index + 1 < walk.exact && ",
        "",
        f"{RACE}|{WRONG}|no thread of block .* can go on",
        {"ranks": (32, 32), "kept": (0, 30)},
    ),
    "an output that goes by the maxima of a short tile": Fault(
        HOPPER,
        "if constexpr (kShortTiles) softmax.apply(rescale, output);",
        "",
        WRONG,
        {**KEPT_GROUPS, "scale": 1.0},
    ),
    "a tile that is not short": Fault(
        HOPPER,
        "keys.last_key < walk.tile * TILE_K + kShortKeys;",
        "keys.last_key < walk.tile * TILE_K + kShortKeys + 1;",
        WRONG,
        {"causal": True},
        lengths=(256, 641),
    ),
    "a tile of which one key is seen left out": Fault(
        HOPPER,
        "if (keys.last_key < walk.tile * TILE_K) return skip(step);",
        "if (keys.last_key <= walk.tile * TILE_K) return skip(step);",
        WRONG,
        {"causal": True},
        lengths=(257, 641),
    ),
    "a turn that is left out with a tile": Fault(
        HOPPER,
        "            wait_for_turn();\n            pass_turn();\n        }\n        shared.v_barriers",
        "        }\n        shared.v_barriers",
        "no thread of block .* can go on",
        {**GROUPED, "causal": True},
        lengths=(256, 256),
    ),
    "a part of a tile that nobody takes": Fault(
        HOPPER, "only = beyond % kConsumers;", "only = 0;", WRONG, SHARED_OUT
    ),
    "rows stored by who left them out": Fault(
        HOPPER, "left_out ? params.seqlen_q :", "false ? 0 :", WRONG, SHARED_OUT
    ),
    "turns among parts of tiles": Fault(
        HOPPER,
        "const bool in_turn = kBeginInTurn && work_number < params.turns && !apart;",
        "const bool in_turn = kBeginInTurn && work_number < params.turns;",
        "no thread of block .* can go on",
        {"multiprocessors": 24},  # all tiles
    ),
    "queries of a part that are not given back": Fault(
        HOPPER,
        "release(own_queries, place_number);\n                }\n                ++place_number;",
        "}\n                ++place_number;",
        "no thread of block .* can go on",
        lengths=(1200, 100),
    ),
    "exact keys of the first tile of queries": Fault(
        HOPPER, "near.of(first_row,", "near.of(0,", WRONG, BLOCKS, lengths=(900, 900)
    ),
    "a last product with values that is not waited for": Fault(
        HOPPER,
        "wgmma_wait<0>();\n        wgmma_pin(output[0]);\n    }",
        "    }",
        "changed while a product read it",
        KEPT_GROUPS,
    ),
}
for _name, _fault in ON_HOPPER.items():
    _lengths = (261, 661) if _fault.lengths == Fault.lengths else _fault.lengths  # tiles are larger
    FAULTS[f"Hopper: {_name}"] = dataclasses.replace(_fault, family="hopper", lengths=_lengths)


def run(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small call of the kind that the fault needs."""
    monkeypatch.setenv("CUDISTR_KERNEL", fault.family)
    if fault.merge:
        outs, lses = [random(1, 1, 3, 11, 40, dtype=fault.dtype)] * 2, [random(2, 1, 3, 11)] * 2
        outs, lses = [util.on_device(x) for x in outs], [util.cp.asarray(x) for x in lses]
        if fault.merge == "shard":
            part, part_lse = (util.cp.ascontiguousarray(x[:, :, 3:9]) for x in (outs[1], lses[1]))
            launch.merge_shard(outs[0], lses[0], (3, 9), part, part_lse, np.dtype(np.float32))
        else:
            cudistr.merge(outs, lses)
        return
    if "near_ties" in fault.options:
        reduction = cudistr.LSH(2)
        one_by_one = fault.dtype == np.float32
        q = near_ties(0, 128, 64, reduction) if one_by_one else lost_sums(0, 128, 64, reduction, fault.dtype)
        q = q[None, None]
        util.same_bits(cudistr.group(util.on_device(q), reduction), cudistr.reference.group(q, reduction))
        return
    options = dict(fault.options)
    if options.pop("low_rank", False):
        if options.pop("attended", False):
            check_attended(fault.dtype)
        else:
            check_found(
                fault.dtype,
                options.get("head_dim", 64),
                16 if "head_dim" in options else 32,
                lengths=fault.lengths,
                rounding=2e-3,  # without a fault less is left,
            )
        return
    monkeypatch.setattr(Settings, "multiprocessors", options.pop("multiprocessors", Settings.multiprocessors))
    section = options.pop("section", 0)
    ranks, kept = options.pop("ranks", None), options.pop("kept", (0, 0))
    if options.pop("blocks", False):
        monkeypatch.setattr(normalize, "EXACT_BLOCK_SEQLEN_K", 1)  # no other call here has these lengths
    q, k, v = util.inputs(
        1, fault.dtype, batch=1, heads=4, heads_kv=2, lengths=fault.lengths, head_dim_v=fault.head_dim_v,
        head_dim=options.pop("head_dim", 128 if ranks and max(ranks) > 64 else 64),
    )  # fmt: skip
    if "rise" in options:
        util.rising(q, k, options.pop("rise"))
    if ranks:
        k += k.dtype.type(0.5)
        options["reduction"] = projection = util.of_ranks(q, k, *ranks).with_near(kept[0], sinks=kept[1])
    if "tolerance" in options:
        projection = util.with_errors(projection)
        # Keys are split between several thread blocks, and two draw the rows of a head.
        monkeypatch.setattr(Settings, "multiprocessors", 8)
        arrays = [util.on_device(x) for x in (q, k, v)]
        problem = normalize.problem(*arrays, reduction=projection)
        *_, chosen, errors = compose.within(
            problem, projection, *arrays, None, False, None, options["tolerance"]
        )
        expected, like = cudistr.reference.decide(q, k, v, problem, projection, options["tolerance"])
        np.testing.assert_array_equal(util.cp.asnumpy(chosen), expected)
        np.testing.assert_allclose(util.cp.asnumpy(errors), like, rtol=0.02)
        return
    if "decided" in options:
        util.check_decided(q, k, v, projection, *options["decided"])
        return
    shared = util.splits(fault.splits) if fault.splits > 1 else nullcontext()
    with shared, util.sections(section) if section else nullcontext():
        util.check_kernel(q, k, v, layouts=(fault.layout,) * 3, on_host=True, **options)


def plant(fault: Fault, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Put a fault into a copy of the sources that is compiled in this test; returns the changed file."""
    sources = folder / "kernels_cu"
    shutil.copytree(compiler.SOURCES, sources)
    path = sources / fault.file
    text = path.read_text()
    assert fault.old in text, f"{fault.file} has changed: plant this fault anew"
    path.write_text(text.replace(fault.old, fault.new, 1))
    monkeypatch.setattr(compiler, "SOURCES", sources)
    compiler._digest.cache_clear()
    return path


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_fault_is_found(
    fault: Fault, seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(fault, monkeypatch, tmp_path)
    Settings.seed = seed
    with pytest.raises((EmulationError, cudistr.CompileError, AssertionError)) as found:
        run(fault, monkeypatch)
    assert re.search(fault.found, str(found.value)), str(found.value)


def calls() -> dict[str, Fault]:
    """The calls of the faults, each once."""
    different = {
        (
            str(f.options),
            f.layout,
            str(np.dtype(f.dtype)),
            f.head_dim_v,
            f.merge,
            f.family,
            f.lengths,
            f.splits,
        ): f
        for f in FAULTS.values()
    }
    return {" ".join(map(str, key)): fault for key, fault in different.items()}


@pytest.mark.parametrize("fault", calls().values(), ids=calls())
def test_without_a_fault_nothing_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fault, monkeypatch)


def test_a_report_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fault = FAULTS["one row too many at the end of a sequence"]
    path = plant(fault, monkeypatch, tmp_path)
    with pytest.raises(EmulationError) as found:
        run(fault, monkeypatch)
    text = str(found.value)
    line = next(
        n for n, text in enumerate(path.read_text().splitlines(), 1) if "copy_chunk<kVector>(to" in text
    )
    assert re.match(
        r"sm80_flash_fwd: cp.async of 16 bytes outside .* of an array \(1, 2, 173, 64\) of float16", text
    )
    assert "by thread " in text and f"tile/shared.cuh:{line} in " in text and "sm80_flash_fwd.cu:" in text
