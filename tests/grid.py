"""Every kernel variant of a stated grid, compiled for every architecture: registers, spills, shared memory, warnings.

``python -m tests.grid --write`` renews the committed table, ``docs/resources.csv``.

NVRTC writes PTX first, and then machine code. The PTX of a kernel is the same for
several architectures, so where ptxas is installed (PyPI's nvidia-cuda-nvcc, of NVRTC's own version) it is written once
for them and ptxas does the rest. A test compares the machine code with NVRTC's, and ``--write`` asks NVRTC alone.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import ml_dtypes
import numpy as np

from cudistr import LSH, Energy, compiler, normalize
from cudistr import plan as planner
from cudistr.plan import Device, Kernel

TABLE = Path(__file__).parent.parent / "docs" / "resources.csv"
DEVICES = {
    80: Device(80, 163 * 1024),
    86: Device(86, 99 * 1024),
    89: Device(89, 99 * 1024),
    90: Device(90, 227 * 1024),
    100: Device(100, 227 * 1024),
    120: Device(120, 99 * 1024),
}
SAME_CODE = {89: 86}  # ptxas writes the same instructions for both: they are compiled once
SAME_PTX = {80: 80, 86: 80, 90: 80, 100: 100, 120: 100}  # for which architecture NVRTC writes the PTX
# Of a multiprocessor: threads and thread blocks (CUDA C++ Programming Guide, technical specifications).
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
HEAD_DIMS = (8, 16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256)
HEAD_DIM_PAIRS = ((64, 128), (128, 64), (192, 128), (256, 64), (64, 256), (256, 8), (8, 256))
HOPPER_PAIRS = ((32, 64), (32, 128), (64, 128), (128, 64), (16, 256), (256, 16), (192, 128), (48, 80))
HOPPER_GROUPS = (
    ("float16", 128, 128, 2), ("bfloat16", 128, 128, 2), ("float16", 128, 128, 4), ("bfloat16", 128, 128, 4),
    ("bfloat16", 64, 64, 2), ("float16", 64, 64, 4), ("float16", 96, 96, 3), ("bfloat16", 128, 128, 8),
    ("bfloat16", 192, 192, 2), ("float16", 48, 64, 3), ("float16", 64, 128, 4), ("bfloat16", 256, 64, 4),
    ("float16", 256, 128, 16),
)  # fmt: skip
HOPPER_RANK1 = (
    ("float16", 128, 128, 2), ("bfloat16", 128, 128, 2), ("bfloat16", 128, 128, 4), ("bfloat16", 64, 64, 2),
    ("float16", 96, 96, 3), ("bfloat16", 128, 128, 8), ("bfloat16", 192, 192, 2), ("bfloat16", 256, 64, 4),
    ("float16", 256, 128, 16), ("bfloat16", 64, 128, 2),
)  # fmt: skip
GROUPS = (
    (32, (2, 4)), (40, (5,)), (64, (2, 4, 8)), (72, (3, 9)), (96, (2, 3, 4)), (128, (2, 4, 8, 16)), (192, (2, 6)),
    (256, (2, 4, 8, 32)),
)  # fmt: skip
RANK1 = {64: 2, 96: 3, 128: 2, 256: 2}  # group size for a head_dim
KEPT = {24: 16, 64: 32, 128: 64, 256: 128}  # columns kept by energy
NEAR_GROUPS = ((40, 5), (64, 2), (64, 4), (96, 3), (128, 2), (128, 4), (256, 4))  # beside exact keys
NEAR = {"near": 40, "sinks": 9}
# Heads of different ranks: Qhat and Khat of 32 columns. Their strides are no constants of a kernel.
RANKED = normalize.Ranked(32, (32 * 256,) * 2 + (32,), (32 * 256,) * 2 + (32,))
COPIED = RANKED._replace(copied=True)  # what stands for the queries, of all columns
HOPPER_RANKS = ((64, 32), (128, 64), (96, 80), (256, 16))  # head_dim, and the rank that all heads have
EDGE_HEAD_DIMS = (64, 128, 256)  # where the other constants are varied
UNALIGNED = (64, 72)  # where kernels that copy rows and little else are compiled for rows off 16 bytes too


def _problem(
    dtype: str, head_dim: int, head_dim_v: int, seqlen_q: int = 256, **options: object
) -> normalize.Problem:
    empty = np.zeros(1, DTYPES[dtype])
    q = np.broadcast_to(empty, (1, 1, seqlen_q, head_dim))
    k = np.broadcast_to(empty, (1, 1, 256, head_dim))
    v = np.broadcast_to(empty, (1, 1, 256, head_dim_v))
    return normalize.problem(q, k, v, **options)  # type: ignore[arg-type]


def _replace(problem: normalize.Problem, **changes: object) -> normalize.Problem:
    import dataclasses

    return dataclasses.replace(problem, **changes)  # type: ignore[arg-type]


def _group_sizes(dtype: str, sizes: tuple[int, ...]) -> list[int]:
    """Those of GROUPS that a dtype has: float32 is fused in one way only, which ends at the least and the most."""
    return [g for g in sizes if dtype != "float32" or g in (sizes[0], sizes[-1])]


def _few(dtype: str, head_dims: Iterable[int]) -> list[int]:
    """Head dims of kernels that come in few variants, or of which little depends on the dtype."""
    return [d for d in head_dims if dtype == "float16" or d == 64 or (dtype == "float32" and d == 256)]


def problems() -> Iterator[tuple[str, normalize.Problem]]:
    """The grid: a name and a problem for every combination of constants that it covers.

    Of kernels that come in few variants, or of which little depends on the dtype, a part is compiled.
    """
    for dtype in DTYPES:
        for d in HEAD_DIMS:
            yield f"{dtype} {d}", _problem(dtype, d, d)
        for d, dv in HEAD_DIM_PAIRS:
            yield f"{dtype} {d} v{dv}", _problem(dtype, d, dv)
        for d, sizes in GROUPS:
            for g in _group_sizes(dtype, sizes):
                yield f"{dtype} {d} lsh{g}", _problem(dtype, d, d, reduction=LSH(g))
        for d in _few(dtype, RANK1) if dtype == "float32" else RANK1:
            rank1 = LSH(RANK1[d], representative="rank1")
            yield f"{dtype} {d} lsh{RANK1[d]} rank1", _problem(dtype, d, d, reduction=rank1)
        for d in _few(dtype, KEPT) if dtype == "float32" else KEPT:
            energy = Energy(KEPT[d], near=0, sinks=0)
            yield f"{dtype} {d} keep{KEPT[d]}", _problem(dtype, d, d, reduction=energy)
        for d, g in NEAR_GROUPS:
            if dtype != "float32" or (g == 2 and d == 64) or d == 256:
                yield f"{dtype} {d} lsh{g} near", _problem(dtype, d, d, reduction=LSH(g, **NEAR))
        for d in _few(dtype, (64, 128)):
            rank1, energy = LSH(2, representative="rank1", **NEAR), Energy(32, **NEAR)
            yield f"{dtype} {d} lsh2 rank1 near", _problem(dtype, d, d, reduction=rank1)
            yield f"{dtype} {d} keep32 near", _problem(dtype, d, d, reduction=energy)
        if dtype != "float32":
            mean = LSH(2, representative="mean", **NEAR)
            yield (
                f"{dtype} 128 lsh2 mean softcap near",
                _problem(dtype, 128, 128, reduction=mean, softcap=30.0),
            )
            few = _problem(dtype, 64, 64, seqlen_q=17, reduction=LSH(2, **NEAR))
            yield f"{dtype} 64 lsh2 small near", few
            unaligned = _replace(_problem(dtype, 128, 128, reduction=LSH(4, **NEAR)), aligned=False)
            yield f"{dtype} 128 lsh4 unaligned near", unaligned
            for d, dv in ((48, 64), (96, 128), (128, 64), (32, 32), (104, 104)):
                yield f"{dtype} {d} v{dv} ranked", _replace(_problem(dtype, d, dv), ranked=RANKED)
            blocks = _replace(_problem(dtype, 64, 64), ranked=RANKED, exact_block=(384, 128))
            yield f"{dtype} 64 ranked blocks", blocks
            yield f"{dtype} 32 v128", _problem(dtype, 32, 128)
        if dtype == "float32":  # for which 64 rows are too many where shared memory is small
            energy = Energy(224, near=0, sinks=0)
            yield f"{dtype} 256 keep224", _problem(dtype, 256, 256, reduction=energy)
            yield f"{dtype} 256 keep224 near", _problem(dtype, 256, 256, reduction=Energy(224, **NEAR))
        for d in EDGE_HEAD_DIMS:
            yield f"{dtype} {d} small", _problem(dtype, d, d, seqlen_q=17)
            yield f"{dtype} {d} softcap", _problem(dtype, d, d, softcap=30.0)
            yield f"{dtype} {d} ranked", _replace(_problem(dtype, d, d), ranked=RANKED)
            yield f"{dtype} {d} unaligned", _replace(_problem(dtype, d, d), aligned=False)
            yield f"{dtype} {d} lsh2 block64", _problem(dtype, d, d, reduction=LSH(2, block_q=64))
            yield f"{dtype} {d} lsh2 mean", _problem(dtype, d, d, reduction=LSH(2, representative="mean"))
            yield f"{dtype} {d} lsh4 softcap", _problem(dtype, d, d, reduction=LSH(4), softcap=30.0)
            yield (
                f"{dtype} {d} lsh2 unaligned",
                _replace(_problem(dtype, d, d, reduction=LSH(2)), aligned=False),
            )
            if dtype == "float32":
                yield f"{dtype} {d} tf32", _replace(_problem(dtype, d, d), tf32=True)
                yield f"{dtype} {d} lsh2 tf32", _replace(_problem(dtype, d, d, reduction=LSH(2)), tf32=True)
    for name, problem in _large_float32_problems():
        yield f"float32 {name} large", _replace(problem, batch=4096)


def _large_float32_problems() -> Iterator[tuple[str, normalize.Problem]]:
    """The grid of float32 tiles that are there for many queries."""
    dtype = "float32"
    for d in HEAD_DIMS:
        if d <= 128:
            yield f"{d}", _problem(dtype, d, d)
    for d, dv in ((64, 128), (128, 64), (256, 8)):
        yield f"{d} v{dv}", _problem(dtype, d, dv)
    for d, sizes in GROUPS:
        for g in _group_sizes(dtype, sizes):
            if d <= 128:
                yield f"{d} lsh{g}", _problem(dtype, d, d, reduction=LSH(g))
    for d in (64, 128):
        rank1, mean = (LSH(2, representative=name) for name in ("rank1", "mean"))
        yield f"{d} lsh2 rank1", _problem(dtype, d, d, reduction=rank1)
        yield f"{d} lsh2 mean", _problem(dtype, d, d, reduction=mean)
        yield f"{d} keep{KEPT[d]}", _problem(dtype, d, d, reduction=Energy(KEPT[d], near=0, sinks=0))
        yield f"{d} lsh2 near", _problem(dtype, d, d, reduction=LSH(2, **NEAR))
        yield f"{d} softcap", _problem(dtype, d, d, softcap=30.0)
        yield f"{d} unaligned", _replace(_problem(dtype, d, d), aligned=False)
        yield f"{d} lsh4 unaligned", _replace(_problem(dtype, d, d, reduction=LSH(4)), aligned=False)
        yield f"{d} tf32", _replace(_problem(dtype, d, d), tf32=True)
        yield f"{d} lsh2 tf32", _replace(_problem(dtype, d, d, reduction=LSH(2)), tf32=True)
    for d in (48, 64, 96):
        yield f"{d} ranked", _replace(_problem(dtype, d, d), ranked=RANKED)
    yield "64 lsh2 rank1 near", _problem(dtype, 64, 64, reduction=LSH(2, representative="rank1", **NEAR))
    yield "64 keep32 near", _problem(dtype, 64, 64, reduction=Energy(32, **NEAR))


def split_problems() -> Iterator[tuple[str, normalize.Problem]]:
    """The grid of large tiles whose thread blocks share keys; small tiles always may."""
    for d in EDGE_HEAD_DIMS:
        yield f"bfloat16 {d} split", _problem("bfloat16", d, d)
        yield f"bfloat16 {d} lsh2 split", _problem("bfloat16", d, d, reduction=LSH(2))
        yield f"bfloat16 {d} ranked split", _replace(_problem("bfloat16", d, d), ranked=RANKED)
    for d in (64, 128):
        yield f"bfloat16 {d} lsh2 near split", _problem("bfloat16", d, d, reduction=LSH(2, **NEAR))
    yield "float16 64 lsh4 split", _problem("float16", 64, 64, reduction=LSH(4))
    yield "float16 64 v128 split", _problem("float16", 64, 128)


def hopper_problems() -> Iterator[tuple[str, normalize.Problem]]:
    """The grid of the Hopper kernel: everything that its registers depend on.

    With so many keys that unmasked problems take the larger of two tiles, and causal ones the smaller.
    """
    for name, problem in _hopper_problems():
        yield name, _replace(problem, seqlen_q=528, seqlen_k=528)


def _hopper_problems() -> Iterator[tuple[str, normalize.Problem]]:
    for dtype in ("float16", "bfloat16"):
        pairs = [(d, d) for d in HEAD_DIMS if d % 16 == 0] + list(HOPPER_PAIRS)
        for d, dv in pairs:
            for mask, options in (("", {}), (" causal", {"causal": True})):
                yield f"{dtype} {d} v{dv}{mask}", _problem(dtype, d, dv, **options)
        for d in EDGE_HEAD_DIMS:
            yield f"{dtype} {d} softcap", _problem(dtype, d, d, softcap=30.0)
            yield f"{dtype} {d} softcap causal", _problem(dtype, d, d, softcap=30.0, causal=True)
            for mask, options in (("", {}), (" causal", {"causal": True})):
                yield f"{dtype} {d} ranked{mask}", _replace(_problem(dtype, d, d, **options), ranked=RANKED)
                yield f"{dtype} {d} copied{mask}", _replace(_problem(dtype, d, d, **options), ranked=COPIED)
        for d, rank in HOPPER_RANKS:
            ranked = RANKED._replace(columns=rank, alike=True)
            for mask, options in (("", {}), (" causal", {"causal": True})):
                problem = _replace(_problem(dtype, d, d, **options), ranked=ranked)
                yield f"{dtype} {d} rank{rank}{mask}", problem
                yield f"{dtype} {d} rank{rank} near{mask}", _replace(problem, **NEAR)
    for dtype, d, dv, g in HOPPER_GROUPS:
        yield f"{dtype} {d} v{dv} lsh{g}", _problem(dtype, d, dv, reduction=LSH(g))
    for dtype, d, dv, g in HOPPER_RANK1:
        rank1 = LSH(g, representative="rank1")
        yield f"{dtype} {d} v{dv} lsh{g} rank1", _problem(dtype, d, dv, reduction=rank1)
    for dtype, d, dv, g in HOPPER_GROUPS:
        if max(d, dv) <= planner.HOPPER_KEPT_COLUMNS:
            yield f"{dtype} {d} v{dv} lsh{g} kept", _problem(dtype, d, dv, reduction=LSH(g, **NEAR))
    mean = LSH(2, representative="mean")
    yield (
        "float16 128 lsh2 mean softcap kept",
        _problem(
            "float16",
            128,
            128,
            reduction=LSH(2, representative="mean", **NEAR),
            softcap=30.0,
            causal=True,
        ),
    )
    yield (
        "float16 128 lsh2 mean softcap",
        _problem("float16", 128, 128, reduction=mean, softcap=30.0, causal=True),
    )


LOWRANK = {24: (16,), 64: (32, 48), 128: (64, 32, 96), 192: (80,), 256: (128,)}  # head_dim to ranks


def kernels(capability: int) -> dict[str, Kernel]:
    """Variant name to kernel, for one architecture."""
    found: dict[str, Kernel] = {}
    for name, problem in problems():
        kernel, _ = planner.portable_kernel(problem, DEVICES[capability])
        found[f"sm80_flash_fwd {name}"] = kernel
    for name, problem in split_problems():
        kernel, _ = planner.portable_kernel(problem, DEVICES[capability], share_keys=True)
        found[f"sm80_flash_fwd {name}"] = kernel
    for name, problem in hopper_problems():
        of_hopper = planner.hopper_kernel(problem, DEVICES[capability])
        if of_hopper is not None:
            found[f"sm90_flash_fwd {name}"] = of_hopper[0]
    found["smxx_lsh_prepare float16 64 signed"] = planner.prepare_kernel("float16", 64, True, signed=True)
    for dtype in DTYPES:
        for d in HEAD_DIMS if dtype == "float16" else (64, 72, 192, 256):
            for aligned in (True, False) if d in UNALIGNED else (True,):
                suffix = "" if aligned else " unaligned"
                found[f"smxx_lsh_prepare {dtype} {d}{suffix}"] = planner.prepare_kernel(dtype, d, aligned)
        if dtype == "bfloat16":
            for d, aligned in ((64, True), (64, False), (192, True)):
                for half, name in ((1, "half"), (2, "again")):
                    name = f"smxx_lsh_prepare {dtype} {d} {name}" + ("" if aligned else " unaligned")
                    found[name] = planner.prepare_kernel(dtype, d, aligned, half=half)
        for d in _few(dtype, RANK1):
            found[f"smxx_lsh_weights {dtype} {d} lsh{RANK1[d]}"] = planner.weights(
                dtype, d, RANK1[d], 1, 1
            ).kernel
        for d in _few(dtype, KEPT):
            found[f"smxx_key_energy {dtype} {d}"] = planner.key_energy(dtype, d, 1, 1).kernel
            for aligned in (True, False) if d in UNALIGNED else (True,):
                name = f"smxx_energy_order {dtype} {d}" + ("" if aligned else " unaligned")
                found[name] = planner.energy_order(dtype, d, aligned, 1).kernel
        if dtype != "float32":
            for d, reduction in ((128, LSH(2, representative="rank1")), (256, Energy(128))):
                kernel = planner.copied_queries(_problem(dtype, d, d, reduction=reduction))[0].kernel
                found[f"smxx_copied_queries {dtype} {d}"] = kernel
        for d in (64,) if dtype == "bfloat16" else EDGE_HEAD_DIMS:
            for aligned in (True, False) if d in UNALIGNED else (True,):
                suffix = "" if aligned else " unaligned"
                problem = _replace(_problem(dtype, d, d), aligned=aligned)
                found[f"smxx_project {dtype} {d}{suffix}"] = planner.project_kernel(problem, 48)
                found[f"smxx_probe {dtype} {d}{suffix}"] = planner.probe_kernel(problem)
                if aligned:
                    kept = _replace(problem, near=1)
                    found[f"smxx_probe {dtype} {d} kept"] = planner.probe_kernel(kept)
                    found["smxx_draw"] = planner.draw_kernel(problem)
                    found["smxx_draw kept"] = planner.draw_kernel(kept)
            found[f"smxx_decide {d}"] = planner.decide_kernel(d, d)
        for d in LOWRANK:
            for aligned in (True, False) if d in UNALIGNED else (True,):
                name = f"{dtype} {d}" + ("" if aligned else " unaligned")
                found[f"smxx_lowrank_rows {name}"] = planner.lowrank_rows_kernel(dtype, d, aligned)
                found[f"smxx_lowrank_sums {name}"] = planner.lowrank_sums_kernel(dtype, d, aligned)
            for rank in LOWRANK[d] if dtype == "bfloat16" else LOWRANK[d][:1]:
                kernel = planner.lowrank_factors_kernel(dtype, d, rank, DEVICES[capability])
                found[f"smxx_lowrank_factors {dtype} {d} rank{rank}"] = kernel
        found[f"smxx_merge {dtype} 64"] = planner.merge_kernel(dtype, 64)
        for before, after in ((dtype, dtype), (dtype, "float32"), ("float32", "float32"), ("float32", dtype)):
            name = f"smxx_merge_shard {dtype} {before} {after} 64"
            found[name] = planner.merge_shard_kernel(dtype, before, after, 64)
        for d in (40, 256):
            found[f"smxx_merge_splits {dtype} {d}"] = planner.merge_splits_kernel(dtype, d)
    return found


def occupancy(capability: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Thread blocks that a multiprocessor holds at once.

    It has 65536 registers, which warps take in units of 256, and the shared memory that one block may have and 1 KB
    more; the driver takes 1 KB for every block.
    """
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // per_warp // (threads // 32)
    by_shared = (DEVICES[capability].shared_bytes + 1024) // (-(-shared_bytes // 128) * 128 + 1024)
    return min(by_registers, by_shared, THREADS[capability] // threads, BLOCKS[capability])


@functools.cache
def ptxas() -> Path | None:
    """The ptxas that NVRTC has inside, as a program; None where it is not installed."""
    try:
        nvcc, nvrtc = (metadata.distribution(f"nvidia-cuda-{name}") for name in ("nvcc", "nvrtc"))
    except metadata.PackageNotFoundError:
        return None
    files = [file for file in nvcc.files or () if file.stem == "ptxas"]
    return Path(str(files[0].locate())) if files and nvcc.version == nvrtc.version else None


def _assemble(ptx: bytes, capability: int, options: Iterable[str]) -> tuple[bytes, str]:
    """Machine code and log of ptxas."""
    program = ptxas()
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="cudistr-ptxas-") as temporary:
        source, cubin = (Path(temporary) / name for name in ("kernel.ptx", "kernel.cubin"))
        target = f".target sm_{capability}".encode()
        ptx, count = re.subn(rb"^\.target sm_\d+$", target, ptx.rstrip(b"\0"), flags=re.MULTILINE)
        assert count == 1
        source.write_bytes(ptx)
        command = [program, f"-arch=sm_{capability}", "-v", *options, "-o", cubin, source]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return cubin.read_bytes(), run.stdout + run.stderr


def cubins(kernel: Kernel, capabilities: Iterable[int], nvrtc_alone: bool = False) -> list[tuple[bytes, str]]:
    """Machine code, and the compiler's log, of a kernel for architectures of which SAME_PTX names the same one."""
    capabilities = list(capabilities)
    if nvrtc_alone or kernel.specific or ptxas() is None:
        targets = [compiler.target(capability, kernel.specific) for capability in capabilities]
        return [compiler.compile_cubin(kernel, target, report=True) for target in targets]
    options = [option.removeprefix("-Xptxas=") for option in kernel.options]
    ptx, log = compiler.compile_cubin(kernel, f"compute_{SAME_PTX[capabilities[0]]}")
    assembled = [_assemble(ptx, capability, options) for capability in capabilities]
    return [(code, log + own) for code, own in assembled]


def numbers(kernel: Kernel, log: str) -> tuple[dict[str, int], list[str]]:
    """What a log says of a kernel, and what the compiler complained about."""
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame", log)
    assert spill and used and stack, log
    static = re.search(r"(\d+) bytes smem", log)
    found = {
        "registers": int(used[1]),
        "shared_bytes": kernel.shared_bytes + (int(static[1]) if static else 0),
        "spilled": int(spill[1]) + int(spill[2]) + int(stack[1]),
    }
    complaints = [line for line in log.splitlines() if re.search(r"warning|C75\d\d", line)]
    return found, complaints


def _compile(job: tuple[Kernel, tuple[int, ...], bool]) -> list[tuple[dict[str, int], list[str]]]:
    kernel, capabilities, nvrtc_alone = job
    return [numbers(kernel, log) for _, log in cubins(kernel, capabilities, nvrtc_alone)]


def build(nvrtc_alone: bool = False) -> tuple[dict[str, dict[int, dict[str, int]]], list[str]]:
    """Compile the grid; returns {variant: {architecture: numbers}} and what the compiler complained about."""
    table: dict[str, dict[int, dict[str, int]]] = {}
    variants: dict[tuple[Kernel, int], list[tuple[str, int]]] = {}  # what has the same machine code
    together: dict[tuple[Kernel, int], list[int]] = {}  # architectures, by kernel and PTX
    for capability in DEVICES:
        for name, kernel in kernels(capability).items():
            table.setdefault(name, {})
            like = SAME_CODE.get(capability, capability)
            variants.setdefault((kernel, like), []).append((name, capability))
            of_kernel = together.setdefault((kernel, SAME_PTX[like]), [])
            if like not in of_kernel:
                of_kernel.append(like)
    complaints: list[str] = []
    jobs = [(kernel, tuple(capabilities), nvrtc_alone) for (kernel, _), capabilities in together.items()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (kernel, capabilities, _), results in zip(jobs, pool.map(_compile, jobs), strict=True):
            for like, (found, lines) in zip(capabilities, results, strict=True):
                # Warpgroups of the Hopper kernel trade registers among themselves, of as many as it is launched with.
                own = (found["registers"], found["shared_bytes"])
                for name, capability in variants[kernel, like]:
                    table[name][capability] = found | {"blocks": occupancy(capability, kernel.threads, *own)}
                    complaints += [f"{name} sm_{capability}: {line}" for line in lines]
    # In the order of the architectures, not of the compilations.
    return {name: {c: of[c] for c in DEVICES if c in of} for name, of in table.items()}, complaints


def rows(table: dict[str, dict[int, dict[str, int]]]) -> list[list[str]]:
    """The table as text: a header, a row a variant, with registers / shared bytes / blocks for each architecture.

    A cell is empty where the variant does not exist.
    """
    header = ["variant", *(f"sm_{c}" for c in DEVICES)]
    body = [
        [name, *(" / ".join(str(of[c][x]) for x in CELL) if c in of else "" for c in DEVICES)]
        for name, of in table.items()
    ]
    return [header, *body]


CELL = ("registers", "shared_bytes", "blocks")


def read() -> tuple[str, list[list[str]]]:
    """The committed table: the NVRTC version that made it, and its rows."""
    with TABLE.open(newline="") as file:
        first, *rest = list(csv.reader(file))
    return first[0], rest


def write(table: dict[str, dict[int, dict[str, int]]]) -> None:
    """Renew the committed table."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([version()])
        writer.writerows(rows(table))


def version() -> str:
    """Name of the compiler, as the table states it."""
    return (
        "NVRTC {}.{}: registers per thread / bytes of shared memory / thread blocks per multiprocessor; no spills"
    ).format(*compiler.nvrtc_version())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    built, said = build(nvrtc_alone=options.write)
    for row in rows(built):
        print("  ".join(f"{cell:<16}" for cell in row))
    spilled = [f"{n} sm_{c}: {x}" for n, of in built.items() for c, x in of.items() if x["spilled"]]
    print(*spilled, *said, sep="\n")
    print(len(built), "variants,", len(spilled), "spill")
    if options.write:
        write(built)
