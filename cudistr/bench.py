"""``cudistr bench``: time attention beside its peers and write a record.

Every candidate gets the same arrays. Rounds go A B C, A B C, ..., so that a drift of the clock or of the
temperature hits all alike; a figure is the median over the rounds of one run. Everything that a call does is
counted: for DistrAttention also hashing, sorting, transposing and allocating. Nothing clears the L2 cache:
each candidate finds it as the one before left it.

A record is a JSON object ``{device, commit, command, versions, rows}``; :func:`validate` states its form.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import ml_dtypes
import numpy as np

import cudistr
from cudistr import launch, normalize, nvml, plan
from cudistr.distributed.schedule import PARALLEL
from cudistr.errors import CudaUnavailableError

if TYPE_CHECKING:
    from cudistr.evaluate.methods import Method

__all__ = [
    "Case",
    "Steady",
    "Timings",
    "add_arguments",
    "host_overhead",
    "interleave",
    "make_rows",
    "plain_attention",
    "prepared",
    "run",
    "validate",
    "watch",
]

PEERS = ("flash2", "cudnn", "fa3", "cupy")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
KERNELS = ("portable", "hopper")
SCORES_LIMIT = 4 << 30  # bytes of scores up to which the plain CuPy peer is timed
WARMUP_CALLS, MIN_ROUNDS, MAX_ROUNDS = 3, 7, 400
# Milliseconds of calls in a row that one timing covers. A single call on an idle device takes as long as the host needs
# to queue it, which for torch's peers is longer than a short kernel.
ROW_MS = 5.0
MAX_ROW = 20
SECONDS, CLOCK_SECONDS = 0.4, 2.0  # of a candidate, by default
# Power is an average over a second, and the clock needs some tenths of one to follow it.
SETTLE_SECONDS = 1.2
# Of calls in a row while the clock is watched: between rows the device idles for as long as the host needs to go on.
WATCHED_MS, MAX_WATCHED_ROW, MIN_WATCHED_ROWS = 20.0, 1000, 3
HOST_BATCHES, HOST_CALLS = 20, 100  # 100 launches are far from filling the driver's queue, which would block
COMMIT_VARIABLE = "CUDISTR_COMMIT"

Call = Callable[[], object]
Factory = Callable[[], Call]
Timer = Callable[[Call], float]
Read = Callable[[], nvml.Reading]
# Of each method what makes its reduction and its tolerance, once.
Prepared = Mapping[str, Callable[[], "tuple[Any, float | None]"]]
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One problem that all candidates solve."""

    dtype: str
    head_dim: int
    head_dim_v: int
    heads: int
    heads_kv: int
    batch: int
    seqlen_q: int
    seqlen_k: int
    causal: bool


# --- measuring: no GPU in here -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """Median milliseconds of each candidate, and a message for each that could not be timed."""

    ms: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


def _message(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


def in_a_row(call: Call, count: int) -> Call:
    """A call that makes several."""

    def several() -> None:
        for _ in range(count):
            call()

    return several


def interleave(
    factories: Mapping[str, Factory],
    timer: Timer,
    *,
    seconds: float = 0.4,
    warmup: int = WARMUP_CALLS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    row_ms: float = 0.0,
) -> Timings:
    """Time candidates in turns.

    Parameters
    ----------
    factories : mapping of name to factory
        A factory makes the call that is timed; what it does itself (layouts, conversions) is not counted.
    timer : callable
        Runs a call and returns its milliseconds.
    seconds : float
        Rounds stop once the candidates have been timed for this long on average, after ``min_rounds`` at
        least and ``max_rounds`` at most.
    warmup : int
        Calls before the first round, at least 1.
    row_ms : float
        A timing covers so many calls in a row that they take about this long, at most ``MAX_ROW``, and counts as one.

    Returns
    -------
    Timings
        A candidate that raises at any point is in ``failed`` and takes no further part.
    """
    calls: dict[str, Call] = {}
    rows: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, factory in factories.items():
        try:
            call = factory()
            taken = min(timer(call) for _ in range(warmup))
        except Exception as error:
            failed[name] = _message(error)
        else:
            rows[name] = max(1, min(MAX_ROW, math.ceil(row_ms / taken))) if taken > 0 else 1
            calls[name] = call if rows[name] == 1 else in_a_row(call, rows[name])
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    for finished in range(max_rounds):
        if not calls or (finished >= min_rounds and spent >= 1e3 * seconds * len(calls)):
            break
        for name, call in list(calls.items()):
            try:
                elapsed = timer(call)
            except Exception as error:
                failed[name] = _message(error)
                del calls[name]
                continue
            times[name].append(elapsed / rows[name])
            spent += elapsed
    return Timings({name: statistics.median(times[name]) for name in calls}, failed)


def host_overhead(
    calls: Mapping[str, Call],
    synchronize: Callable[[], object],
    *,
    batches: int = HOST_BATCHES,
    per_batch: int = HOST_CALLS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Microseconds that the host spends in one warm call, while the device works behind it.

    Parameters
    ----------
    calls : mapping of name to call
        Calls that only queue work.
    synchronize : callable
        Waits for the device; called before and after each batch, outside the measured time.
    clock : callable
        Seconds.

    Returns
    -------
    dict of name to float
        Median over batches of the mean of a batch; the batches of the calls take turns.
    """
    for call in calls.values():
        for _ in range(per_batch):
            call()
    synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(batches):
        for name, call in calls.items():
            start = clock()
            for _ in range(per_batch):
                call()
            stop = clock()
            synchronize()
            times[name].append(1e6 * (stop - start) / per_batch)
    return {name: statistics.median(batch) for name, batch in times.items()}


@dataclass(frozen=True)
class Steady:
    """A candidate that has the device to itself, once clock and power have settled."""

    ms: float  # of a call, median
    mhz: float  # this and the next are means
    watts: float
    limited: float  # share of the readings in which power held the clock down


def watch(
    factories: Mapping[str, Factory],
    timer: Callable[[Call, Read], tuple[float, nvml.Reading]],
    read: Read,
    *,
    seconds: float = CLOCK_SECONDS,
    settle: float = SETTLE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Steady], dict[str, str]]:
    """Run candidates one after another, each alone and without a pause, and see what clock and power do.

    Parameters
    ----------
    factories : mapping of name to factory
        As for :func:`interleave`.
    timer : callable
        Runs a call and returns its milliseconds, and what ``read`` says while the device works on it.
    seconds, settle : float
        How long a candidate runs, and which part of it is dropped.
    clock : callable
        Seconds.

    Returns
    -------
    tuple of dict
        Of each candidate what was seen; and a message for each that raised at any point.
    """
    found: dict[str, Steady] = {}
    failed: dict[str, str] = {}
    for name, factory in factories.items():
        try:
            call = factory()
            taken = min(timer(call, read)[0] for _ in range(WARMUP_CALLS))
            calls = max(1, min(MAX_WATCHED_ROW, math.ceil(WATCHED_MS / taken))) if taken > 0 else 1
            row = in_a_row(call, calls)
            settled: list[tuple[float, nvml.Reading]] = []
            start = now = clock()
            while now - start < seconds or len(settled) < MIN_WATCHED_ROWS:
                seen = timer(row, read)
                if now - start >= settle:  # when the row began
                    settled.append(seen)
                now = clock()
        except CudaUnavailableError:  # of read, which says nothing of the other candidates either
            raise
        except Exception as error:
            failed[name] = _message(error)
        else:
            readings = [reading for _, reading in settled]
            found[name] = Steady(
                statistics.median(ms for ms, _ in settled) / calls,
                statistics.fmean(reading.mhz for reading in readings),
                statistics.fmean(reading.watts for reading in readings),
                statistics.fmean(reading.limited for reading in readings),
            )
    return found, failed


# --- what is measured --------------------------------------------------------------------------------------


SHORT_NAME = re.compile(r"lsh([1-9]\d*)")


def reduction_of(method: str) -> cudistr.LSH | None:
    """The reduction that a short name stands for: "exact" none, "lsh4" ``LSH(group_size=4)``.

    Raises
    ------
    ValueError
        If the name is neither.
    """
    if method == "exact":
        return None
    match = SHORT_NAME.fullmatch(method)
    if match is None:
        raise ValueError(
            f"method must be 'exact' or 'lsh' with a group size, such as 'lsh2' and 'lsh4', got {method!r}."
        )
    return cudistr.LSH(group_size=int(match[1]))


def method_of(name: str) -> Method:
    """The method of a short name, or of one as ``cudistr eval`` takes it: ``projection:64,near=256,sinks=64``.

    Raises
    ------
    ValueError
        If it is neither, or cannot be timed on one call: no rival of the paper, no fit on other data.
    """
    from cudistr.evaluate import errors, methods  # imports this module

    if name.partition(":")[0] not in ("exact", "lsh", "energy", "lowrank", "projection"):
        if SHORT_NAME.fullmatch(name) is None:
            raise ValueError(
                "method must be 'exact', 'lsh' with a group size, such as 'lsh2', or as cudistr eval names lsh, "
                f"energy, lowrank and projection, such as 'projection:64,near=256,sinks=64', got {name!r}."
            )
        name = f"lsh:{name[3:]}"
    try:
        found = methods.parse(name)
    except errors.EvalError as error:
        raise ValueError(str(error).replace("--reduction", "method", 1)) from None
    if found.kind == "lsh":
        cudistr.LSH(found.number or 0, **found.options)  # refuses numbers and options
    elif found.kind == "energy":
        cudistr.Energy(found.number or 0, **found.options)
    elif found.kind == "lowrank":
        cudistr.LowRank(found.number or 0, **{k: x for k, x in found.options.items() if k != "tolerance"})
    if found.options.get("fit", "self") != "self":
        raise ValueError(
            f"method: a projection is fitted on the call's own arrays, got {name!r}. Leave fit away."
        )
    return found


def prepare(name: str, arrays: Sequence[Any], causal: bool) -> tuple[Any, float | None]:
    """The reduction and the tolerance that a method's name stands for; a projection is fitted on ``arrays``."""
    from cudistr.evaluate import methods

    (found,) = methods.prepare(method_of(name), [tuple(arrays)], [], causal, {})
    return (found.projection, found.tolerance) if isinstance(found, methods.Within) else (found, None)


def cases(args: argparse.Namespace) -> list[Case]:
    """The problems that the options span, in the order in which they are timed."""
    found = []
    for dtype, head_dim, causal, seqlen, seqlen_q in itertools.product(
        args.dtype, args.head_dim, args.causal, args.seqlen, args.seqlen_q or [None]
    ):
        heads = args.heads or max(1, args.hidden // head_dim)
        found.append(
            Case(
                dtype=dtype,
                head_dim=head_dim,
                head_dim_v=args.head_dim_v or head_dim,
                heads=heads,
                heads_kv=args.kv_heads or heads,
                batch=args.batch or max(1, args.tokens // seqlen),
                seqlen_q=seqlen_q or seqlen,
                seqlen_k=seqlen,
                causal=bool(causal),
            )
        )
    return found


def plain_attention(q: Any, k: Any, v: Any, causal: bool, xp: Any) -> Any:
    """What one writes without cudistr: product, softmax, product, each in the arrays' dtype.

    Parameters
    ----------
    q, k, v : arrays
        As for :func:`cudistr.attention`.
    xp : module
        cupy or numpy.
    """
    dtype, shared = q.dtype, q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = xp.repeat(k, shared, axis=1), xp.repeat(v, shared, axis=1)
    scores = xp.matmul(q, k.swapaxes(2, 3)) * dtype.type(q.shape[3] ** -0.5)
    if causal:
        seqlen_q, seqlen_k = scores.shape[2:]
        seen = xp.tri(seqlen_q, seqlen_k, seqlen_k - seqlen_q, dtype=bool)
        scores = xp.where(seen, scores, dtype.type(-np.inf))
    weights = xp.exp(scores - scores.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    return xp.matmul(weights.astype(dtype, copy=False), v)


def kernel_family(kernel: str) -> str:
    """Family of a kernel by its name: "hopper" is what needs sm_90a, "portable" runs from sm_80 on."""
    return "hopper" if kernel.startswith("sm90_") else "portable"


def make_rows(
    case: Case, kernels: Mapping[str, str], timings: Timings, peers: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per method: its own time as "cudistr", and the peers' times of the same rounds beside it.

    ``kernels`` has the methods that were timed, each with its family of kernels. The row of the method
    "group" has the times of the attention methods beside it instead.
    """
    rows = []
    for method, kernel in kernels.items():
        others = [m for m in kernels if m != "group"] if method == "group" else list(peers)
        names = {"cudistr": method, **{name: name for name in others}}
        row: dict[str, Any] = {"method": method, "kernel": kernel, **asdict(case)}
        row["ms"] = {key: round(timings.ms[name], 5) for key, name in names.items() if name in timings.ms}
        failed = {key: timings.failed[name] for key, name in names.items() if name in timings.failed}
        if failed:
            row["failed"] = failed
        rows.append(row)
    return rows


def joules(ms: float, watts: float) -> float:
    """Energy of a call, as a record has it."""
    return round(1e-3 * ms * watts, 6)


def add_clock(rows: list[dict[str, Any]], found: Mapping[str, Steady]) -> list[dict[str, Any]]:
    """The rows of a case, with what was seen of its candidates beside their times."""
    for row in rows:
        seen = {key: found[row["method"] if key == "cudistr" else key] for key in row["ms"]}
        row["mhz"] = {key: round(of.mhz, 1) for key, of in seen.items()}
        row["watts"] = {key: round(of.watts, 1) for key, of in seen.items()}
        row["joules"] = {key: joules(ms, row["watts"][key]) for key, ms in row["ms"].items()}
        row["limited"] = {key: round(of.limited, 3) for key, of in seen.items()}
    return rows


def watched(rows: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, float]]]:
    """Every candidate once: its name, a row of its case, and its figures. The peers of a case come last."""
    cases: dict[tuple[Any, ...], dict[str, tuple[dict[str, Any], dict[str, float]]]] = {}
    for row in rows:
        case = cases.setdefault(tuple(row[name] for name in _CASE_KINDS), {})
        for key in row["ms"]:
            figures = {figure: row[figure][key] for figure in ("ms", *_CLOCK_FIGURES)}
            case.setdefault(row["method"] if key == "cudistr" else key, (row, figures))
    return [
        (name, *case[name])
        for case in cases.values()
        for name in sorted(case, key=lambda name: name in PEERS)
    ]


# --- the record --------------------------------------------------------------------------------------------

_HEAD = ("device", "commit", "command", "versions", "rows")
_CASE_KINDS: dict[str, type] = {
    "dtype": str,
    "head_dim": int,
    "head_dim_v": int,
    "heads": int,
    "heads_kv": int,
    "batch": int,
    "seqlen_q": int,
    "seqlen_k": int,
    "causal": bool,
}


def _refuse(where: str, got: Any, allowed: str) -> NoReturn:
    raise ValueError(f"record: {where} must be {allowed}, got {got!r}.")


def _check_names(where: str, value: Any, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(value, dict):
        _refuse(where, value, "an object")
    needed = set(required)
    missing, unknown = sorted(needed - set(value)), sorted(set(value) - needed - set(optional))
    if missing or unknown:
        _refuse(
            where, sorted(value), f"an object with {sorted(needed)} (missing {missing}, unknown {unknown})"
        )


def _check_texts(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        _refuse(where, value, "an object")
    for name, entry in value.items():
        if not isinstance(entry, str) or not entry:
            _refuse(f"{where}[{name!r}]", entry, "text")


def _check_numbers(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        _refuse(where, value, "an object")
    for name, entry in value.items():
        if type(entry) not in (int, float) or not 0 < entry < math.inf:
            _refuse(f"{where}[{name!r}]", entry, "a positive number")


def _check_case(where: str, value: Mapping[str, Any]) -> None:
    for name, kind in _CASE_KINDS.items():
        if type(value[name]) is not kind:  # not isinstance: a bool is no length
            _refuse(f"{where}.{name}", value[name], f"of type {kind.__name__}")
        if kind is int and value[name] < 1:
            _refuse(f"{where}.{name}", value[name], "at least 1")
    _check_one_of(f"{where}.dtype", value["dtype"], tuple(DTYPES))


def _check_row(where: str, row: Any) -> None:
    _check_names(where, row, ("method", "kernel", *_CASE_KINDS, "ms"), ("failed",))
    if row["method"] != "group":
        try:
            method_of(str(row["method"]))
        except (TypeError, ValueError):
            allowed = "'exact', 'lsh' with a group size, a method of eval, or 'group'"
            _refuse(f"{where}.method", row["method"], allowed)
    _check_one_of(f"{where}.kernel", row["kernel"], KERNELS)
    _check_result(where, row)


def _check_method(where: str, method: Any, allowed: str) -> None:
    try:
        reduction_of(str(method))
    except ValueError:
        _refuse(f"{where}.method", method, allowed)


def _check_one_of(where: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        _refuse(where, value, f"one of {', '.join(allowed)}")


def _check_result(where: str, row: Any) -> None:
    """What was computed, and how long it took or why it failed."""
    _check_case(where, row)
    _check_numbers(f"{where}.ms", row["ms"])
    _check_texts(f"{where}.failed", row.get("failed", {}))
    if ("cudistr" in row["ms"]) == ("cudistr" in row.get("failed", {})):
        _refuse(where, row, "an object with 'cudistr' in ms or in failed, and not in both")


_CLOCK_FIGURES = ("mhz", "watts", "joules", "limited")


def _check_clock_row(where: str, row: Any) -> None:
    _check_names(where, row, ("method", "kernel", *_CASE_KINDS, "ms", *_CLOCK_FIGURES), ("failed",))
    _check_row(where, {name: value for name, value in row.items() if name not in _CLOCK_FIGURES})
    for figure in _CLOCK_FIGURES:
        _check_names(f"{where}.{figure}", row[figure], row["ms"])
        if figure != "limited":
            _check_numbers(f"{where}.{figure}", row[figure])
    for name, ms in row["ms"].items():
        share, energy = row["limited"][name], joules(ms, row["watts"][name])
        if type(share) not in (int, float) or not 0 <= share <= 1:
            _refuse(f"{where}.limited[{name!r}]", share, "a share from 0 to 1")
        if row["joules"][name] != energy:
            _refuse(f"{where}.joules[{name!r}]", row["joules"][name], f"what ms and watts make, {energy}")


_FIGURES = ("overlap", "scaling_total", "scaling_share")


def sharing_figures(ms: Mapping[str, float], ranks: int) -> dict[str, float]:
    """What follows from the times of a row of a record of several GPUs, as far as they are there.

    ``overlap`` is the part of the shorter of "attention" and "transfers", each by itself, that is hidden behind the
    longer one when both run together. ``scaling_total`` is the time of one GPU for the whole sequence over the time
    that all ranks need together. ``scaling_share`` is the time in which one GPU attends its share of the rows to as
    many keys, times the number of ranks, because that many shares of keys pass by, over the time of a rank.
    """
    figures: dict[str, float] = {}
    if "cudistr" not in ms:
        return figures
    if {"attention", "transfers"} <= set(ms):
        hidden = ms["attention"] + ms["transfers"] - ms["cudistr"]
        figures["overlap"] = round(min(1.0, max(0.0, hidden / min(ms["attention"], ms["transfers"]))), 4)
    if "single_total" in ms:
        figures["scaling_total"] = round(ms["single_total"] / (ranks * ms["cudistr"]), 4)
    if "single_share" in ms:
        figures["scaling_share"] = round(ranks * ms["single_share"] / ms["cudistr"], 4)
    return figures


def _check_shared_row(where: str, row: Any, ranks: int) -> None:
    _check_names(where, row, ("method", "parallel", *_CASE_KINDS, "ms"), ("failed", *_FIGURES))
    _check_method(where, row["method"], "'exact', or 'lsh' with a group size")
    _check_one_of(f"{where}.parallel", row["parallel"], PARALLEL)
    _check_result(where, row)
    figures, found = sharing_figures(row["ms"], ranks), {x: row[x] for x in _FIGURES if x in row}
    if figures != found:
        _refuse(where, found, f"an object whose figures follow from its ms, {figures}")


def validate(record: Any) -> None:
    """Check the form of a record.

    ``device``, ``commit`` and ``command`` are strings, ``versions`` maps names to strings, and ``rows`` is a
    list of objects with the fields of a :class:`Case`, ``method`` ("exact", "lsh2", "projection:64", ..., or "group"),
    ``kernel`` ("portable" or "hopper"), ``ms`` (candidate to milliseconds) and, if something could not be
    timed, ``failed`` (candidate to message). "cudistr" is in one of the two. A record of host overhead has
    ``host_us`` (method to microseconds) and ``host_case`` (the fields of a Case) as well. A record of clocks has
    ``limit_watts`` and ``max_mhz`` as well; its rows have ``mhz``, ``watts``, ``joules`` of a call, and ``limited``,
    the share of readings in which power held the clock down, each for the candidates of ms. A record of several GPUs
    has ``ranks`` and ``transport`` as well; its rows have ``parallel`` in place of ``kernel``, and what
    :func:`sharing_figures` makes of their ms.

    Raises
    ------
    ValueError
        Naming the field, what it holds and what is allowed.
    """
    host, shared, clock = ("host_us", "host_case"), ("ranks", "transport"), ("limit_watts", "max_mhz")
    _check_names("the record", record, _HEAD, (*host, *shared, *clock))
    for name in ("device", "commit", "command"):
        _check_texts("the record", {name: record[name]})
    _check_texts("versions", record["versions"])
    if not isinstance(record["rows"], list):
        _refuse("rows", record["rows"], "a list")
    if any(name in record for name in shared):
        _check_names("the record", record, (*_HEAD, *shared))
        _check_numbers("the record", {"ranks": record["ranks"]})
        _check_texts("the record", {"transport": record["transport"]})
        for i, row in enumerate(record["rows"]):
            _check_shared_row(f"rows[{i}]", row, record["ranks"])
        return
    if any(name in record for name in clock):
        _check_names("the record", record, (*_HEAD, *clock))
        _check_numbers("the record", {name: record[name] for name in clock})
        for i, row in enumerate(record["rows"]):
            _check_clock_row(f"rows[{i}]", row)
        return
    for i, row in enumerate(record["rows"]):
        _check_row(f"rows[{i}]", row)
    if any(name in record for name in host):
        _check_names("the record", record, (*_HEAD, *host))
        _check_numbers("host_us", record["host_us"])
        _check_names("host_case", record["host_case"], _CASE_KINDS)
        _check_case("host_case", record["host_case"])


def commit_of(folder: pathlib.Path, environ: Mapping[str, str]) -> str:
    """The commit that is measured.

    ``CUDISTR_COMMIT`` if it is set, for machines to which only the files travelled; else git's, with
    "-dirty" if the sources differ from it; "unknown" if ``folder`` is not the root of a git checkout.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", "-C", str(folder), *words), capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    if environ.get(COMMIT_VARIABLE):
        return environ[COMMIT_VARIABLE]
    try:
        # an installed package may lie inside a checkout of something else
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return "unknown"
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--", "cudistr", "kernels_cu") else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command_of(argv: Sequence[str]) -> str:
    """The command as one can repeat it anywhere: without the folders of this machine, where weights or records are."""
    folders = ("--output", "--weights")
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word in folders:
            next(rest, None)
        elif word.partition("=")[0] not in folders:
            words.append(word)
    return shlex.join(["python", "-m", "cudistr", *words])


def slug(device: str) -> str:
    """A device's name as a folder: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def default_output(folder: pathlib.Path) -> pathlib.Path:
    """docs/benchmarks in a checkout of cudistr, benchmarks elsewhere."""
    is_checkout = (folder / "kernels_cu").is_dir() and (folder / "docs").is_dir()
    return folder / "docs" / "benchmarks" if is_checkout else folder / "benchmarks"


def write(record: dict[str, Any], folder: pathlib.Path, name: str) -> pathlib.Path:
    """Write a valid record to ``folder/<device>/<name>.json``, one row per line, and return the path."""
    validate(record)
    path = folder / slug(record["device"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    rows = f"[\n{lines}\n ]" if lines else "[]"
    path.write_text(f'{head[:-2]},\n "rows": {rows}\n}}\n', encoding="utf-8")  # [:-2]: without its "\n}"
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text, one line each; milliseconds, and a dash where a candidate was not timed."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["ms"], *row.get("failed", {}))))
    figures = [name for name in _FIGURES if any(name in row for row in rows)]
    how = "parallel" if any("parallel" in row for row in rows) else "kernel"
    lines = [["method", how, *_CASE_HEAD, *(f"{name} ms" for name in names), *figures]]
    for row in rows:
        cells = [row["method"], row[how], *_case_cells(row)]
        cells += [f"{row['ms'][name]:.3f}" if name in row["ms"] else "-" for name in names]
        cells += [f"{row[name]:.2f}" if name in row else "-" for name in figures]
        lines.append(cells)
    return _aligned(lines, rows)


def clock_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of a record of clocks as text, one line for each candidate."""
    lines = [["method", *_CASE_HEAD, "ms", "MHz", "W", "J", "limited"]]
    for name, row, of in watched(rows):
        figures = [f"{of['ms']:.3f}", f"{of['mhz']:.0f}", f"{of['watts']:.0f}", f"{of['joules']:.3f}"]
        lines.append([name, *_case_cells(row), *figures, f"{of['limited']:.0%}"])
    return _aligned(lines, rows)


_CASE_HEAD = ("dtype", "d", "dv", "heads", "kv", "batch", "seqlen", "causal")


def _case_cells(row: Mapping[str, Any]) -> list[str]:
    numbers = [str(row[name]) for name in ("dtype", "head_dim", "head_dim_v", "heads", "heads_kv", "batch")]
    lengths = dict.fromkeys((row["seqlen_q"], row["seqlen_k"]))  # one if they are equal
    return [*numbers, "/".join(map(str, lengths)), "yes" if row["causal"] else "no"]


def _aligned(lines: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines of a table in columns, and what failed in its rows."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    failed = {f"{name}: {why}" for row in rows for name, why in row.get("failed", {}).items()}
    return "\n".join([*text, *(f"not timed: {line}" for line in sorted(failed))])


# --- the GPU -----------------------------------------------------------------------------------------------


class Machine:
    """CuPy, torch if it is there, and the one stream on which everything runs and is timed.

    Raises
    ------
    CudaUnavailableError
        If there is no CuPy, or no GPU that it can use.
    """

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise CudaUnavailableError(
                "timing needs CuPy and a GPU, and CuPy cannot be imported. 'cudistr doctor' says what to do."
            ) from error
        if not cupy.cuda.is_available():
            raise CudaUnavailableError(
                "timing needs a GPU, and CuPy sees none. 'cudistr doctor' says what to do."
            )
        self.cupy = cupy
        self.torch: Any = None
        if importlib.util.find_spec("torch") is not None:
            import torch

            self.torch = torch if torch.cuda.is_available() else None
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._start, self._stop = cupy.cuda.Event(), cupy.cuda.Event()

    def __enter__(self) -> Machine:
        self.stream.__enter__()
        if self.torch is not None:
            self._torch_stream = self.torch.cuda.stream(self.torch.cuda.ExternalStream(self.stream.ptr))
            self._torch_stream.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        if self.torch is not None:
            self._torch_stream.__exit__(*reason)
        self.stream.__exit__(*reason)

    @property
    def index(self) -> int:
        """The current device."""
        return int(self.cupy.cuda.Device().id)

    @property
    def device(self) -> str:
        """The current device's name."""
        return launch.device_name(self.index)

    @property
    def bus_id(self) -> str:
        """Where the current device is on the PCI bus."""
        return str(self.cupy.cuda.Device().pci_bus_id)

    def versions(self) -> dict[str, str]:
        """Versions of all that takes part, as far as it is there."""
        from cupy.cuda import nvrtc

        def cuda(version: int) -> str:
            return f"{version // 1000}.{version % 1000 // 10}"

        runtime = self.cupy.cuda.runtime
        found = {
            "cudistr": cudistr.__version__,
            "numpy": np.__version__,
            "cupy": self.cupy.__version__,
            "cuda_runtime": cuda(runtime.runtimeGetVersion()),
            "cuda_driver": cuda(runtime.driverGetVersion()),
            "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        }
        if self.torch is not None:
            found["torch"] = str(self.torch.__version__)
            if self.torch.backends.cudnn.is_available():
                version = self.torch.backends.cudnn.version()
                found["cudnn"] = f"{version // 10000}.{version % 10000 // 100}.{version % 100}"
        if "fa3" in self.importable(("fa3",)):
            try:
                found["fa3"] = importlib.metadata.version("fa3-fwd")
            except importlib.metadata.PackageNotFoundError:
                found["fa3"] = "unknown"
        return found

    def importable(self, peers: Iterable[str]) -> list[str]:
        """Those of the peers that can be tried here."""
        has_torch = self.torch is not None
        has = {
            "flash2": has_torch,
            "cudnn": has_torch,
            "fa3": has_torch and importlib.util.find_spec("fa3_fwd_interface") is not None,
            "cupy": True,
        }
        return [peer for peer in peers if has[peer]]

    def timer(self, call: Call) -> float:
        """Milliseconds between an event before the call and one after what it queued."""
        return self.timed(call, lambda: None)[0]

    def timed(self, call: Call, read: Callable[[], T]) -> tuple[float, T]:
        """The same, and what ``read`` returns while the device works on what was queued."""
        self._start.record(self.stream)
        call()
        self._stop.record(self.stream)
        found = read()
        self._stop.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(self._start, self._stop)), found

    def inputs(self, case: Case) -> tuple[list[Any], list[Any]]:
        """Standard normal q, k, v as torch tensors (empty without torch), and the same memory as CuPy arrays."""
        shapes = (
            (case.batch, case.heads, case.seqlen_q, case.head_dim),
            (case.batch, case.heads_kv, case.seqlen_k, case.head_dim),
            (case.batch, case.heads_kv, case.seqlen_k, case.head_dim_v),
        )
        self.cupy.get_default_memory_pool().free_all_blocks()  # what the last case's plain peer left behind
        if self.torch is not None:
            random = self.torch.Generator(device="cuda").manual_seed(0)
            dtype = getattr(self.torch, case.dtype)
            tensors = [self.torch.randn(s, device="cuda", generator=random).to(dtype) for s in shapes]
            return tensors, [self.cupy.from_dlpack(tensor) for tensor in tensors]
        normal = self.cupy.random.RandomState(0).standard_normal
        return [], [normal(s, dtype=np.float32).astype(DTYPES[case.dtype]) for s in shapes]

    def family(self, arrays: Sequence[Any], case: Case, method: str, prepared: Prepared) -> str:
        """The family of kernels that the planner takes for a method; "portable" if it refuses the problem."""
        if method == "group":
            return "portable"
        device = self.cupy.cuda.Device()
        seen = plan.Device(int(device.compute_capability), device.attributes["MaxSharedMemoryPerBlockOptin"])
        try:
            problem = normalize.problem(*arrays, causal=case.causal, reduction=prepared[method]()[0])
            if plan.copies_queries(problem, seen):
                return "hopper"
            return kernel_family(plan.plan(problem, seen).attention.name)
        except (TypeError, ValueError):
            return "portable"  # the row says under "failed" what was wrong


def make_factories(
    case: Case,
    methods: Iterable[str],
    prepared: Prepared,
    peers: Iterable[str],
    tensors: Sequence[Any],
    arrays: Sequence[Any],
    xp: Any,
) -> dict[str, Factory]:
    """Candidates of a case, each with what makes its call. ``xp`` is the module of ``arrays``."""
    factories: dict[str, Factory] = {}
    for method in methods:
        if method == "group":
            factories[method] = functools.partial(_make_group, arrays, xp)
        else:
            factories[method] = functools.partial(_make_cudistr, arrays, case, prepared[method])
    for peer in peers:
        if peer == "cupy":
            factories[peer] = functools.partial(_make_plain, arrays, case, xp)
        elif peer == "fa3":
            factories[peer] = functools.partial(_make_fa3, tensors, case)
        else:
            factories[peer] = functools.partial(_make_sdpa, tensors, case, peer)
    return factories


def prepared(methods: Iterable[str], arrays: Sequence[Any], case: Case) -> Prepared:
    """Of each method what makes its reduction and its tolerance, once, on the arrays of a case."""
    return {m: functools.cache(functools.partial(prepare, m, arrays, case.causal)) for m in methods}


def _make_cudistr(
    arrays: Sequence[Any], case: Case, prepared: Callable[[], tuple[Any, float | None]]
) -> Call:
    q, k, v = arrays
    reduction, tolerance = prepared()
    return lambda: cudistr.attention(
        q, k, v, causal=case.causal, reduction=reduction, tolerance=tolerance, exact_if_faster=False
    )


def _make_group(arrays: Sequence[Any], xp: Any) -> Call:
    """The order of all columns, as a part of a call: what the GPU takes. A call by itself would wait for the host."""
    q = arrays[0]
    reduction = cudistr.LSH(group_size=1)  # the order does not depend on it, and 1 fits every head_dim

    def call() -> object:
        return cudistr.group(q, reduction)

    if xp is np:
        return call
    stream = xp.cuda.Stream(non_blocking=True)
    xp.cuda.Device().synchronize()  # q comes from another stream
    with stream:
        graph, result = capture(call, stream)

    def replay() -> object:
        graph.launch()
        return result  # which every replay writes to

    return replay


def capture(call: Callable[[], T], stream: Any) -> tuple[Any, T]:
    """A call as a CUDA graph, and its result, which every replay writes to: keep it until the last one.

    The stream is the current one. The first error is raised, after the capture has ended: nothing could run before.
    """
    call()  # compiles, and leaves in the stream's pool the memory that the captured call takes
    stream.synchronize()
    stream.begin_capture()
    error: Exception | None = None
    try:
        result = call()
    except Exception as raised:  # whatever it is
        error = raised
    try:
        graph = stream.end_capture()
    except Exception as raised:  # a capture that has failed says so here too
        error = error or raised
    if error is not None:
        raise error
    return graph, result


def _make_plain(arrays: Sequence[Any], case: Case, cupy: Any) -> Call:
    size = case.batch * case.heads * case.seqlen_q * case.seqlen_k * np.dtype(DTYPES[case.dtype]).itemsize
    if size > SCORES_LIMIT:
        raise MemoryError(f"the scores take {size / 2**30:.0f} GiB, more than {SCORES_LIMIT >> 30}")
    q, k, v = arrays
    return lambda: plain_attention(q, k, v, case.causal, cupy)


def _make_sdpa(tensors: Sequence[Any], case: Case, peer: str) -> Call:
    import torch.nn.functional as functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"flash2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[peer]
    if case.causal and case.seqlen_q != case.seqlen_k:
        raise ValueError("torch aligns a causal mask with the first key, cudistr with the last")
    q, k, v = tensors
    grouped = q.shape[1] != k.shape[1]

    def call() -> object:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

    return call


def _make_fa3(tensors: Sequence[Any], case: Case) -> Call:
    attend = importlib.import_module("fa3_fwd_interface").flash_attn_func
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in tensors)
    return lambda: attend(q, k, v, causal=case.causal)


def progress(items: Sequence[T], unit: str) -> Iterable[T]:
    """Items behind a progress bar, where tqdm is installed and someone is looking."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, unit=unit, disable=None)  # type: ignore[no-any-return]


def say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    if importlib.util.find_spec("tqdm") is None:
        print(line)
        return
    from tqdm import tqdm

    tqdm.write(line)


HOST_CASE = Case("float16", 64, 64, 4, 4, 1, 128, 128, False)  # small: the device keeps up with the host


def _measure_host(machine: Machine, methods: Sequence[str]) -> dict[str, float]:
    _, arrays = machine.inputs(HOST_CASE)
    made = prepared(methods, arrays, HOST_CASE)
    calls = {method: _make_cudistr(arrays, HOST_CASE, made[method]) for method in methods}
    return {name: round(us, 3) for name, us in host_overhead(calls, machine.stream.synchronize).items()}


def add_shapes(parser: argparse.ArgumentParser, seqlen: list[int]) -> None:
    """Options that say which problems are timed; ``seqlen`` is their default."""
    many: dict[str, Any] = {"nargs": "+", "metavar": "N", "type": _positive}
    parser.add_argument("--head-dim", default=[64, 128], **many)
    parser.add_argument("--head-dim-v", type=_positive, metavar="N", help="if it is not head_dim")
    parser.add_argument("--seqlen", default=seqlen, **many)
    parser.add_argument("--seqlen-q", help="queries, if not as many as keys", **many)
    parser.add_argument("--batch", type=_positive, metavar="N", help="instead of --tokens")
    parser.add_argument("--heads", type=_positive, metavar="N", help="instead of --hidden")
    parser.add_argument(
        "--tokens", type=_positive, default=16384, metavar="N", help="batch * seqlen (%(default)s)"
    )
    parser.add_argument(
        "--hidden", type=_positive, default=2048, metavar="N", help="heads * head_dim (%(default)s)"
    )
    parser.add_argument("--kv-heads", type=_positive, metavar="N", help="if not as many as query heads")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--causal", nargs="+", type=int, default=[0, 1], choices=[0, 1])
    parser.add_argument(
        "--method",
        nargs="+",
        default=["exact", "lsh2", "lsh4"],
        metavar="METHOD",
        help="exact, lshG, or as eval names them (bench alone): energy:64, lowrank:64, projection:64,near=256,sinks=64",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cudistr bench``."""
    add_shapes(parser, seqlen=[2048, 4096, 8192, 16384])
    parser.add_argument(
        "--peers", nargs="*", default=list(PEERS), choices=PEERS, help="timed where importable"
    )
    parser.add_argument(
        "--grouping", action="store_true", help="time cudistr.group alone as well, as a CUDA graph"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--host", action="store_true", help="measure the host's time per call instead")
    instead.add_argument(
        "--clock",
        action="store_true",
        help="run each candidate alone instead, and record the GPU's clock, its power and the energy of a call",
    )
    instead.add_argument(
        "--distributed",
        action="store_true",
        help="measure several GPUs instead; every process of mpiexec runs this command",
    )
    parser.add_argument(
        "--parallel", nargs="+", default=list(PARALLEL), choices=PARALLEL, help="with --distributed"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds, with --distributed (%(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of timing per candidate ({SECONDS}; with --clock {CLOCK_SECONDS}, without the first {SETTLE_SECONDS})",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="FOLDER", help="where the folder of the device goes"
    )
    parser.add_argument("--name", help="of the record (attention; host, clock, distributed)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and write the record. 0, or 1 if cudistr itself could not be timed somewhere."""
    chosen = list(dict.fromkeys(args.method))
    for method in chosen:  # refuse a wrong name before anything is timed
        (reduction_of if args.distributed else method_of)(method)
    if args.seconds is None:
        args.seconds = CLOCK_SECONDS if args.clock else SECONDS
    if args.clock and args.seconds <= SETTLE_SECONDS:
        raise ValueError(
            f"--seconds must be more than {SETTLE_SECONDS} with --clock, got {args.seconds:g}: clock and power "
            f"have not settled before. Leave it out for {CLOCK_SECONDS}."
        )
    if args.distributed:
        return int(importlib.import_module("cudistr.distributed.measure").run(args))
    record: dict[str, Any] = {"device": "", "commit": "", "command": command_of(args.argv)}
    rows: list[dict[str, Any]] = []
    with Machine() as machine:
        peers = machine.importable(args.peers)
        absent = [peer for peer in args.peers if peer not in peers]
        if absent and not args.host:
            print(f"not importable here: {', '.join(absent)}", file=sys.stderr)
        record["device"], record["versions"] = machine.device, machine.versions()
        record["commit"] = commit_of(pathlib.Path(cudistr.__file__).parents[1], os.environ)
        if args.host:
            record["host_us"] = _measure_host(machine, chosen)
            record["host_case"] = asdict(HOST_CASE)
        else:
            meter = nvml.Meter(machine.bus_id) if args.clock else None
            if meter is not None:
                record["limit_watts"], record["max_mhz"] = meter.limit_watts, meter.max_mhz
            methods = [*chosen, "group"] if args.grouping else chosen
            for case in progress(cases(args), "case"):
                tensors, arrays = machine.inputs(case)
                made = prepared(chosen, arrays, case)
                kernels = {method: machine.family(arrays, case, method, made) for method in methods}
                factories = make_factories(case, methods, made, peers, tensors, arrays, machine.cupy)
                if meter is None:
                    timings = interleave(factories, machine.timer, seconds=args.seconds, row_ms=ROW_MS)
                    rows += make_rows(case, kernels, timings, peers)
                else:
                    found, failed = watch(factories, machine.timed, meter.read, seconds=args.seconds)
                    timings = Timings({name: of.ms for name, of in found.items()}, failed)
                    rows += add_clock(make_rows(case, kernels, timings, peers), found)
    record["rows"] = rows
    name = args.name or ("host" if args.host else "clock" if args.clock else "attention")
    path = write(record, args.output or default_output(pathlib.Path.cwd()), name)
    print(record["device"])
    for method, us in record.get("host_us", {}).items():
        print(f"{method:>8}  {us:.1f} us on the host per call")
    if args.clock:
        print(f"at most {record['limit_watts']:.0f} W, {record['max_mhz']:.0f} MHz")
    if rows:
        print((clock_table if args.clock else table)(rows))
    print(f"record: {path}")
    return int(any("cudistr" in row.get("failed", {}) for row in rows))
