"""``cudistr tune``: time the tiles of the portable kernel on this GPU, and keep what is faster than the planner's own.

For every kernel that the options span, the planner's own tile and the candidates by
:func:`cudistr.plan.candidate_tiles` that ptxas compiles without a spill take turns; each must give the result of the
planner's tile. A winner holds for this GPU, this version of cudistr and these sources, whatever the lengths, so it is
the one with the smallest product of times over all lengths and masks.

With ``--break-even``, exact attention and every reduction take turns at two lengths instead, and from how many keys on
a reduction is faster follows from both (:mod:`cudistr.worth`).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import cudistr
from cudistr import bench, compiler, launch, normalize, tuned, worth
from cudistr import plan as planner
from cudistr.plan import Device, Tile, TileKey

__all__ = ["Result", "add_arguments", "break_even", "compare", "run", "search"]

LENGTHS = (4096, 16384)  # of --break-even, those of the table
MAX_CANDIDATES = 10  # beyond the tenth the estimate has never been near
GAIN = 0.98  # of the time of the planner's tile is what a winner may take at most: less is noise
ROUNDS = 7
ROW_MS = 5.0  # a timing covers calls in a row that take about this long
# A result is rounded to the dtype after weights were, each at most half a unit in the last place, in either tile.
UNITS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """Tiles of one kernel: milliseconds per case, relative to the planner's tile, and why others were left out."""

    key: TileKey
    default: Tile
    relative: Mapping[Tile, float]
    refused: Mapping[Tile, str]

    @property
    def best(self) -> Tile:
        """The fastest tile, the planner's own if none is faster by more than noise."""
        fastest = min(self.relative, key=self.relative.__getitem__, default=self.default)
        return fastest if self.relative.get(fastest, 1.0) <= GAIN else self.default


def _on_host(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array.get() if hasattr(array, "get") else array)  # of CuPy


def compare(found: tuple[Any, Any], expected: tuple[Any, Any], dtype: str) -> str:
    """What is wrong with (out, lse) of one tile beside those of another; empty if nothing is."""
    for name, one, other, unit in zip(
        ("out", "lse"), found, expected, (UNITS[dtype], max(UNITS[dtype], 2.0**-12)), strict=True
    ):
        one, other = (_on_host(x).astype(np.float64) for x in (one, other))
        some = other > -np.inf  # lse of a row without keys
        if not np.array_equal(one > -np.inf, some):
            return f"{name} has other rows without keys"
        largest = float(np.abs(one[some] - other[some]).max(initial=0.0))
        allowed = 4 * unit * max(float(np.abs(other[some]).max(initial=0.0)), 2.0**-4)
        if not largest <= allowed:  # NaN too
            return f"{name} differs by {largest:.3g}, allowed {allowed:.3g}"
    return ""


def search(
    key: TileKey,
    default: Tile,
    candidates: Sequence[Tile],
    cases: Sequence[Call],
    use: Callable[[Tile | None], None],
    timer: Callable[[Call], float],
    *,
    rounds: int = ROUNDS,
) -> Result:
    """Time tiles in turns.

    Parameters
    ----------
    cases : sequence of callable
        Calls that return (out, lse).
    use : callable
        Lets calls from now on use a tile; None is the planner's own.
    timer : callable
        Runs a call and returns its milliseconds.
    """
    logs: dict[Tile, float] = dict.fromkeys(candidates, 0.0)
    refused: dict[Tile, str] = {}
    for case in cases:
        use(None)
        expected = case()
        row = max(1, min(20, math.ceil(ROW_MS / max(timer(case), 1e-3))))
        times: dict[Tile | None, list[float]] = {None: []}  # None: the planner's own
        for tile in list(logs):
            try:
                use(tile)
                wrong = compare(case(), expected, key.dtype)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}".splitlines()[0]
            if wrong:
                refused[tile] = wrong
                del logs[tile]
            else:
                times[tile] = []
        several = bench.in_a_row(case, row)
        for _ in range(rounds):
            for turn, spent in times.items():
                use(turn)
                timer(case)  # prepares the launch
                spent.append(timer(several))
        own = statistics.median(times[None])
        for tile in logs:
            logs[tile] += math.log(statistics.median(times[tile]) / own)
    use(None)
    return Result(key, default, {tile: math.exp(x / len(cases)) for tile, x in logs.items()}, refused)


def spilled(problem: normalize.Problem, device: Device, tile: Tile) -> int:
    """Bytes that ptxas spills for a tile."""
    kernel = planner.tile_kernel(problem, device, tile)
    _, log = compiler.compile_cubin(kernel, compiler.target(device.capability), report=True)
    return sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cudistr tune``: the shapes of ``cudistr bench``."""
    bench.add_shapes(parser, seqlen=[2048, 8192])
    parser.set_defaults(seqlen=None, method=None, dtype=None)
    parser.add_argument(
        "--break-even",
        action="store_true",
        help="measure from how many keys on reductions are faster than exact attention instead, at two --seqlen "
        f"({' '.join(map(str, LENGTHS))}), with every --method of which that is known",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="of timing (%(default)s)")
    parser.add_argument("--clear", action="store_true", help="forget what was kept for this GPU, and stop")


@contextmanager
def _portable() -> Iterator[None]:
    """Calls in here take the portable kernel, on Hopper too."""
    before = os.environ.get("CUDISTR_KERNEL")
    os.environ["CUDISTR_KERNEL"] = "portable"
    try:
        yield
    finally:
        del os.environ["CUDISTR_KERNEL"]
        if before is not None:
            os.environ["CUDISTR_KERNEL"] = before


def _kernels(args: argparse.Namespace, machine: Any) -> dict[TileKey, list[tuple[bench.Case, str]]]:
    """The kernels that the options span, and what each is timed with."""
    found: dict[TileKey, list[tuple[bench.Case, str]]] = {}
    for case in bench.cases(args):
        for method in dict.fromkeys(args.method):
            key = planner.tile_key(_problem(machine.inputs(case)[1], case, method))
            if key is not None:
                found.setdefault(key, []).append((case, method))
    return found


def _problem(arrays: Sequence[Any], case: bench.Case, method: str) -> normalize.Problem:
    return normalize.problem(*arrays, causal=case.causal, reduction=bench.reduction_of(method))


def _case(machine: Any, case: bench.Case, method: str) -> Call:
    """A call that keeps its arrays."""
    q, k, v = machine.inputs(case)[1]
    reduction = bench.reduction_of(method)
    return lambda: cudistr.attention(q, k, v, causal=case.causal, reduction=reduction, return_lse=True)


def _describe(tile: Tile) -> str:
    return f"{tile.block_m} x {tile.tile_k}{' in pairs of rows' if tile.row_tiles == 2 else ''}"


def _line(result: Result) -> str:
    key = result.key
    method = f"lsh{key.group_size}" if key.group_size else "exact"
    head = f"{key.dtype} {method} {key.head_dim}{'' if key.head_dim == key.head_dim_v else f' v{key.head_dim_v}'}"
    head += " few queries" if key.small else ""
    if result.best == result.default:
        return f"{head}: {_describe(result.default)} stays"
    gain = result.relative[result.best]
    return f"{head}: {_describe(result.best)} takes {gain:.3f} of the time of {_describe(result.default)}"


def break_even(
    times: Mapping[str, Mapping[bool, Mapping[int, float]]], head_dim: int
) -> dict[str, tuple[tuned.Kind, float]]:
    """What each method is, and from how many keys on it is faster than exact attention under any of the masks.

    Parameters
    ----------
    times : mapping
        Milliseconds by method, mask (whether it is causal) and seqlen, those of "exact" among them. What lacks one of
        them, since a call failed, is left out.
    """
    exact = {causal: ms for causal, ms in times.get("exact", {}).items() if len(ms) == 2}
    found = {}
    for method, of_masks in times.items():
        kind = worth.kind_of(method, head_dim)
        if (
            kind is None
            or not exact
            or any(of_masks.get(causal, {}).keys() != ms.keys() for causal, ms in exact.items())
        ):
            continue
        keys = max(worth.faster_from(ms, of_masks[causal], causal) for causal, ms in exact.items())
        found[method] = kind, worth.rounded(keys)
    return found


def _methods(args: argparse.Namespace, head_dim: int) -> list[str]:
    """Those that take turns with exact attention."""
    if args.method is None:
        return [x.format(half=head_dim // 2, quarter=head_dim // 4) for x in worth.METHODS]
    return [method for method in args.method if method != "exact"]


def _break_even(args: argparse.Namespace) -> int:
    """Measure, print what was found, and keep it."""
    args.seqlen, args.dtype = args.seqlen or list(LENGTHS), args.dtype or ["bfloat16", "float32"]
    if len(set(args.seqlen)) != 2 or args.seqlen_q:
        came = f"--seqlen {' '.join(map(str, args.seqlen))}" + " and --seqlen-q" * bool(args.seqlen_q)
        raise ValueError(
            f"--break-even takes two different --seqlen and no --seqlen-q, got {came}. Leave both away, or pass "
            f"--seqlen {' '.join(map(str, LENGTHS))}."
        )
    for head_dim, method in ((d, m) for d in args.head_dim for m in _methods(args, d)):
        bench.method_of(method)
        if args.method is not None and worth.kind_of(method, head_dim) is None:
            raise ValueError(f"--break-even has no place for {method} at head_dim {head_dim}. Leave it away.")
    with bench.Machine() as machine:
        device, name = launch.device_properties(machine.index), machine.device
        try:
            kept = {(kind, column): keys for kind, column, keys in tuned.read_break_even(device, name)}
        except (OSError, ValueError) as error:
            print(f"what was kept cannot be read, and is replaced: {error}", file=sys.stderr)
            kept = {}
        found: dict[tuple[tuned.Kind, tuned.Column], float] = {}
        times: dict[tuple[str, int], dict[str, dict[bool, dict[int, float]]]] = {}
        columns = {}
        cases = bench.cases(args)
        for case in bench.progress(cases, "case"):
            tensors, arrays = machine.inputs(case)
            methods = ["exact", *_methods(args, case.head_dim)]
            made = bench.prepared(methods, arrays, case)
            calls = bench.make_factories(case, methods, made, (), tensors, arrays, machine.cupy)
            timings = bench.interleave(
                calls, machine.timer, seconds=0.0, min_rounds=args.rounds, row_ms=bench.ROW_MS
            )
            key = case.dtype, case.head_dim
            columns[key] = worth.column(_problem(arrays, case, "exact"), device)
            for method, ms in timings.ms.items():
                of_masks = times.setdefault(key, {}).setdefault(method, {})
                of_masks.setdefault(case.causal, {})[case.seqlen_k] = ms
            for method, why in timings.failed.items():
                bench.say(f"{case.dtype} {case.head_dim}, {case.seqlen_k} keys: {method} failed: {why}")
        for (dtype, head_dim), of_methods in times.items():
            column = columns[dtype, head_dim]
            bench.say(f"{dtype} {head_dim}, against exact attention of {_name(column)}:")
            for method, (kind, keys) in break_even(of_methods, head_dim).items():
                bench.say(f"  {method}: {_from(keys)}")
                found[kind, column] = max(keys, found.get((kind, column), 0.0))
        kept |= found
        place = tuned.save_break_even(
            device, name, tuple((kind, column, keys) for (kind, column), keys in kept.items())
        )
        launch.break_even.cache_clear()
    print(
        f"{name}: {len(kept)} numbers of keys in {place}; CUDISTR_TUNED=0 leaves them out, --clear forgets them"
    )
    return 0


def _name(column: tuned.Column) -> str:
    kernel, head_dim = column
    kind = {"hopper": "the Hopper kernel", "portable": "the portable kernel"}.get(kernel, kernel)
    return f"{kind}, head_dim {'up to 64' if head_dim == 64 else 'beyond 64'}"


def _from(keys: float) -> str:
    return (
        "never faster" if math.isinf(keys) else f"faster from {keys:.0f} keys on" if keys else "always faster"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print what was found, and keep it."""
    if args.break_even and not args.clear:
        return _break_even(args)
    args.seqlen, args.dtype = args.seqlen or [2048, 8192], args.dtype or ["bfloat16"]
    args.method = args.method or ["exact", "lsh2", "lsh4"]
    for method in args.method:
        bench.reduction_of(method)  # refuse a wrong name before anything is timed
    with bench.Machine() as machine, _portable():
        index = machine.index
        launch.use_tiles(index, ())
        try:
            device, name = launch.device_properties(index), machine.device
            if args.clear:
                print(
                    f"{name}: {'forgotten' if tuned.clear(device, name) else 'there was nothing to forget'}"
                )
                return 0
            return _tune(args, machine, device, name)
        finally:
            launch.use_tiles(index, None)


def _tune(args: argparse.Namespace, machine: Any, device: Device, name: str) -> int:
    try:
        kept = dict(tuned.read_tiles(device, name))
    except (OSError, ValueError) as error:
        print(f"what was kept cannot be read, and is replaced: {error}", file=sys.stderr)
        kept = {}
    kernels = _kernels(args, machine)
    if not kernels:
        raise ValueError("none of these problems has a tile to choose. See `cudistr tune --help`.")

    for key, timed in bench.progress(list(kernels.items()), "kernel"):
        problem = _problem(machine.inputs(timed[0][0])[1], *timed[0])
        default = planner.portable_kernel(problem, device)[1]
        candidates = (tile for tile in planner.candidate_tiles(problem, device) if tile != default)
        clean = (tile for tile in candidates if not spilled(problem, device, tile))
        fitting = list(itertools.islice(clean, MAX_CANDIDATES))

        def use(tile: Tile | None, key: TileKey = key) -> None:
            launch.use_tiles(machine.index, () if tile is None else ((key, tile),))

        cases = [_case(machine, *one) for one in timed]
        result = search(key, default, fitting, cases, use, machine.timer, rounds=args.rounds)
        bench.say(_line(result))
        for tile, why in result.refused.items():
            bench.say(f"  {_describe(tile)} was refused: {why}")
        kept.pop(key, None)
        if result.best != default:
            kept[key] = result.best
        place = tuned.save_tiles(device, name, kept)  # after each: an interrupted run keeps what it has
    print(f"{name}: {len(kept)} tiles in {place}; CUDISTR_TUNED=0 leaves them out, --clear forgets them")
    return 0
