"""The instructions of ``kernels_cu/ptx`` one at a time, and what PTX says that they do, in NumPy.

The same checks run on the emulated device, where they test the twins, and on a GPU, where they test the tests: what
holds on both says that the twins are what the hardware is.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cudistr import compiler, launch
from cudistr.plan import Kernel

SOURCE = Path(__file__).parent / "emulation" / "probe.cu"
LANES = np.arange(32)
ROW, COLUMN = LANES // 4, LANES % 4  # of a lane in the fragments of a matrix instruction
LDMATRIX, LDMATRIX_TRANS, MMA_F16, MMA_BF16, MMA_TF32, CONVERT, CP_ASYNC, PLACE = range(8)

Run = Callable[..., np.ndarray]


def runner(cupy: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Run:
    """A function that runs a probe on 32-bit words and returns the words of each lane, (32 * thread blocks, words)."""
    sources = folder / "kernels_cu"
    shutil.copytree(compiler.SOURCES, sources)
    shutil.copy(SOURCE, sources / "kernels")
    monkeypatch.setattr(compiler, "SOURCES", sources)
    compiler._digest.cache_clear()

    def run(probe: int, words: np.ndarray, width: int, grid: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
        given = cupy.asarray(np.ascontiguousarray(words, np.uint32))
        out = cupy.ndarray((32 * math.prod(grid), width), np.uint32)
        kernel = Kernel("probe", (("PROBE", probe),), 32)
        device = launch.device_properties(0)
        ready = launch._launch(kernel, grid, device, 0, launch._parameters(("in out", "u8")), {})
        ready(given.data.ptr, out.data.ptr)
        return np.asarray(cupy.asnumpy(out))

    return run


def bits(x: np.ndarray) -> np.ndarray:
    """float32 as words."""
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def pairs(x: np.ndarray) -> np.ndarray:
    """16-bit numbers as words, neighbours along the last axis together, the first in the low half."""
    halves = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32)
    return halves[..., ::2] | halves[..., 1::2] << 16


def check_ldmatrix(run: Run, transposed: bool) -> None:
    """Four 8x8 matrices whose rows lie in any order."""
    random = np.random.default_rng(0)
    matrices = random.integers(0, 2**16, (4, 8, 8), np.uint16)
    rows = np.concatenate([pairs(matrices).reshape(32, 4), random.permutation(32)[:, None]], axis=1)
    found = run(LDMATRIX_TRANS if transposed else LDMATRIX, rows, 4)
    read = matrices.swapaxes(1, 2) if transposed else matrices
    expected = pairs(read)[:, ROW, COLUMN].T  # lane l: row l / 4, elements 2 * (l % 4) and the next
    np.testing.assert_array_equal(found, expected)


def check_mma(run: Run, probe: int) -> None:
    """D = A B + C for small integers, which no rounding touches, and for normal numbers."""
    depth = 8 if probe == MMA_TF32 else 16
    dtype = {MMA_F16: np.float16, MMA_BF16: ml_dtypes.bfloat16, MMA_TF32: np.float32}[probe]
    random = np.random.default_rng(1)
    for draw in (lambda *shape: random.integers(-8, 9, shape), lambda *shape: random.standard_normal(shape)):
        a, b = draw(16, depth).astype(dtype), draw(depth, 8).astype(dtype)
        c = draw(16, 8).astype(np.float32)
        if probe == MMA_TF32:
            word_a = [bits(a)[ROW + 8 * (i % 2), COLUMN + 4 * (i // 2)] for i in range(4)]
            word_b = [bits(b)[COLUMN + 4 * i, ROW] for i in range(2)]
            # What the instruction reads of a float: 10 bits of mantissa.
            a, b = ((bits(x) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
        else:
            word_a = [pairs(a)[ROW + 8 * (i % 2), COLUMN + 4 * (i // 2)] for i in range(4)]
            word_b = [pairs(b.T)[ROW, COLUMN + 4 * i] for i in range(2)]
        place = [(ROW + 8 * (i // 2), 2 * COLUMN + i % 2) for i in range(4)]
        words = np.stack([*(bits(c)[at] for at in place), *word_a, *word_b], axis=1)
        found = run(probe, words, 4).view(np.float32)
        a, b = a.astype(np.float64), b.astype(np.float64)
        exact, size = a @ b + c, np.abs(a) @ np.abs(b) + np.abs(c)
        for i, at in enumerate(place):
            # Tensor cores cut sums off instead of rounding them: some last bits of the largest term.
            assert (np.abs(found[:, i] - exact[at]) <= 2.0**-21 * size[at]).all()
            if np.array_equal(exact, np.round(exact)):
                np.testing.assert_array_equal(found[:, i], exact[at])


SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-45,
    -1e-40,
    65504.0,
    65519.9,
    65520.0,
    -7e4,
    3.4e38,
    6e-8,
    2.9e-8,
]


def same_numbers(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, except that any NaN equals any other."""
    assert found.dtype == expected.dtype
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    kind = f"u{found.dtype.itemsize}"
    np.testing.assert_array_equal(found[~nan].view(kind), expected[~nan].view(kind))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of 16-bit numbers, rounded once: what double precision gives, or its neighbour if that is nearer."""
    rough = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    found = rough.astype(a.dtype)
    for at in np.ndindex(found.shape):
        if not np.isfinite(float(rough[at])) or not np.isfinite(float(found[at])):
            continue
        exact = Fraction(float(a[at])) * Fraction(float(b[at])) + Fraction(float(c[at]))
        word = int(found[at].view(np.uint16))
        near = [np.uint16(w).view(a.dtype) for w in (word - 1, word, word + 1) if 0 <= w < 2**16]
        distances = [
            (abs(Fraction(float(x)) - exact), int(x.view(np.uint16)) % 2, x)
            for x in near
            if np.isfinite(float(x))
        ]
        best = min(distances, key=lambda of: of[:2])
        found[at] = best[2]
    return found


def check_conversions(run: Run) -> None:
    """Every conversion, sum, product and maximum of ``ptx/math.cuh``, special numbers and ties included."""
    random = np.random.default_rng(2)
    halves = np.uint32(1) << np.arange(32, dtype=np.uint32) % 24
    for round_ in range(20):
        x, y = (random.standard_normal(32) * 2.0 ** random.integers(-30, 12, 32) for _ in range(2))
        x, y = x.astype(np.float32), y.astype(np.float32)
        if round_ == 0:
            x[: len(SPECIAL)] = SPECIAL
        if round_ == 1:  # numbers whose dropped bits are one and zeros: ties, for some of the formats
            x = (bits(np.ones(32)) + halves).view(np.float32)
        pair_words = random.integers(0, 2**32, (32, 3), np.uint32)
        found = run(CONVERT, np.concatenate([bits(x)[:, None], bits(y)[:, None], pair_words], axis=1), 13)
        low = np.ascontiguousarray(found & 0xFFFF).astype(np.uint16)

        with np.errstate(all="ignore"):
            power = found[:, 0].copy().view(np.float32)
            exact = np.exp2(np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float64))
            exact = np.where(exact < 2.0**-126, 0.0, exact)  # ftz
            normal = np.isfinite(exact) & (exact > 2.0**-125) & (exact < 2.0**127)
            assert (np.abs(power[normal] - exact[normal]) <= 2.0**-22 * exact[normal]).all()
            same_numbers(
                power[~normal & (exact < 2.0**-126)], exact[~normal & (exact < 2.0**-126)].astype(np.float32)
            )
            assert (np.isnan(power) == np.isnan(x)).all()

            reciprocal = found[:, 12].copy().view(np.float32)
            exact = 1 / np.where(np.abs(x) < 2.0**-126, 0 * x, x).astype(np.float64)
            exact = np.where(np.abs(exact) < 2.0**-126, 0 * exact, exact)
            normal = np.isfinite(exact) & (np.abs(exact) > 2.0**-125)
            assert (np.abs(reciprocal - exact)[normal] <= 2.0**-23 * np.abs(exact[normal])).all()
            same_numbers(reciprocal[np.isinf(exact)], exact[np.isinf(exact)].astype(np.float32))
            assert (np.isnan(reciprocal) == np.isnan(x)).all()

            finite = np.isfinite(x) & (np.abs(x) >= 2.0**-126)
            tf32 = ((bits(x) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
            same_numbers(found[:, 1].copy().view(np.float32)[finite], tf32[finite])
            rest = found[:, 1].copy().view(np.float32)[~np.isfinite(x)]
            same_numbers(rest, x[~np.isfinite(x)])

            one, two, three = (
                np.ascontiguousarray(pair_words[:, i]).view(np.uint16).reshape(32, 2) for i in range(3)
            )
            same_numbers(
                found[:, 2].copy().view(np.float32), one[:, 0].copy().view(np.float16).astype(np.float32)
            )
            same_numbers(low[:, 3].copy().view(np.float16), x.astype(np.float16))
            same_numbers(low[:, 4].copy().view(ml_dtypes.bfloat16), x.astype(ml_dtypes.bfloat16))
            for column, dtype in ((5, np.float16), (6, ml_dtypes.bfloat16)):
                packed = np.ascontiguousarray(found[:, column]).view(np.uint16).reshape(32, 2)
                same_numbers(packed[:, 0].copy().view(dtype), x.astype(dtype))
                same_numbers(packed[:, 1].copy().view(dtype), y.astype(dtype))
            for column, dtype in ((7, np.float16), (8, ml_dtypes.bfloat16)):
                total = one.copy().view(dtype).astype(np.float64) + two.copy().view(dtype).astype(np.float64)
                packed = np.ascontiguousarray(found[:, column]).view(np.uint16).reshape(32, 2)
                same_numbers(packed.view(dtype), total.astype(np.float32).astype(dtype))
            for column, dtype in ((9, np.float16), (10, ml_dtypes.bfloat16)):
                factors = (x.copy().view(dtype) for x in (one, two, three))
                packed = np.ascontiguousarray(found[:, column]).view(np.uint16).reshape(32, 2)
                same_numbers(packed.view(dtype), fused(*factors))
            magnitudes = ((x & 0x7FFF).view(ml_dtypes.bfloat16).astype(np.float32) for x in (one, two))
            packed = np.ascontiguousarray(found[:, 11]).view(np.uint16).reshape(32, 2)
            same_numbers(packed.view(ml_dtypes.bfloat16), np.fmax(*magnitudes).astype(ml_dtypes.bfloat16))


def check_cp_async(run: Run) -> None:
    """Sixteen bytes a lane, or zeros where the copy is told that there is no source."""
    random = np.random.default_rng(3)
    chunks, valid = random.integers(1, 2**32, (32, 4), np.uint32), random.integers(0, 2, 32, np.uint32)
    found = run(CP_ASYNC, np.concatenate([chunks.ravel(), valid]), 4)
    np.testing.assert_array_equal(found, chunks * valid[:, None])


def check_places(run: Run) -> None:
    """Lanes, and thread blocks along three axes, the first of which is the fastest."""
    grid = (2, 3, 4)
    found = run(PLACE, np.array(grid[:2]), 4, grid)
    z, y, x, lane = np.indices((*grid[::-1], 32)).reshape(4, -1)
    np.testing.assert_array_equal(found, np.stack([lane, x, y, z], axis=1))


CHECKS: dict[str, Callable[[Run], None]] = {
    "ldmatrix": lambda run: check_ldmatrix(run, False),
    "ldmatrix.trans": lambda run: check_ldmatrix(run, True),
    "mma.f16": lambda run: check_mma(run, MMA_F16),
    "mma.bf16": lambda run: check_mma(run, MMA_BF16),
    "mma.tf32": lambda run: check_mma(run, MMA_TF32),
    "conversions": check_conversions,
    "cp.async": check_cp_async,
    "places": check_places,
}
