"""``cudistr bench --distributed``: time attention over several processes and write a record.

Every process runs the command, under mpiexec. A round of a candidate begins when all ranks are there, and its time is
that of the slowest. Beside attention itself there are the ring's attention without its transfers, its transfers without
attention, and one GPU by itself with the whole sequence and with the share of a rank.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np

import cudistr
from cudistr import bench, launch, normalize
from cudistr.bench import Call, Case, Factory
from cudistr.distributed import solve
from cudistr.distributed.group import Group, connect
from cudistr.distributed.schedule import Layout
from cudistr.distributed.transport import Message, Transfer, Transport
from cudistr.errors import DistributedError

__all__ = ["Clock", "factories", "row_of", "run"]

T = TypeVar("T")

WARMUP_CALLS, MIN_ROUNDS = 2, 5  # calls of long sequences take seconds


class _Arrived(Transfer):
    def arrive(self) -> None:
        """Nothing is under way."""


class Silent(Transport):
    """A group whose messages are not sent: what arrives is what the memory held."""

    def __init__(self, like: Transport) -> None:
        self.rank, self.size, self.device, self.timeout = like.rank, like.size, like.device, like.timeout

    def exchange(self, header: dict[str, Any], operation: str) -> list[dict[str, Any]]:
        """As :meth:`Transport.exchange`."""
        return [header] * self.size

    def start(self, sends: Sequence[Message], receives: Sequence[Message], operation: str) -> Transfer:
        """As :meth:`Transport.start`."""
        return _Arrived()

    def finish(self) -> None:
        """As :meth:`Transport.finish`."""

    def leave(self, reason: str | None) -> None:
        """As :meth:`Transport.leave`."""


class Clock:
    """Times calls that all ranks make together, each of which then knows the time of the slowest."""

    def __init__(self, group: Group) -> None:
        self._transport = group._transport
        self._on_host = group.device is None
        if not self._on_host:
            import cupy

            self._cupy = cupy
            self._events = cupy.cuda.Event(), cupy.cuda.Event()

    def __call__(self, call: Call) -> float:
        """Milliseconds. Raises on every rank what any of them could not do."""
        self._transport.exchange({}, "the beginning of a round")
        found = self.together(lambda: self._time(call))
        return max(float(ms) for ms in self._told(found, "the end of a round"))

    def together(self, work: Callable[[], T]) -> T:
        """Do what every rank does.

        Raises
        ------
        RuntimeError
            On every rank, with the message of the first that could not.
        """
        failed = None
        try:
            found = work()
        except DistributedError:
            raise
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
        for rank, other in enumerate(self._told(failed, "the end of a round")):
            if other is not None:
                raise RuntimeError(f"rank {rank}: {other}")
        return found

    def _told(self, value: Any, operation: str) -> list[Any]:
        """The values of all ranks."""
        return [other["value"] for other in self._transport.exchange({"value": value}, operation)]

    def _time(self, call: Call) -> float:
        if self._on_host:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        first, last = self._events
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(first, last))


def factories(group: Group, case: Case, method: str, parallel: str) -> dict[str, Factory]:
    """The candidates of a row, each with what makes its call."""
    xp = solve.module(group.device is None)
    reduction = bench.reduction_of(method)
    block = 1 if reduction is None else reduction.rows_per_block
    layout = Layout.split(
        case.seqlen_k, group.size, zigzag=case.causal and parallel == "context", block=block
    )

    def normal(rows: int) -> tuple[Any, Any, Any]:
        random = xp.random.RandomState(group.rank)
        shapes = (
            (case.batch, case.heads, rows, case.head_dim),
            (case.batch, case.heads_kv, rows, case.head_dim),
            (case.batch, case.heads_kv, rows, case.head_dim_v),
        )
        kind = {} if xp is np else {"dtype": np.float32}  # NumPy's draws float64
        dtype = bench.DTYPES[case.dtype]
        q, k, v = (random.standard_normal(shape, **kind).astype(dtype) for shape in shapes)
        return q, k, v

    def shared() -> Call:
        q, k, v = normal(layout.lengths[group.rank])
        return lambda: group.attention(
            q, k, v, parallel=parallel, layout=layout, causal=case.causal, reduction=reduction
        )

    def alone(rows: int) -> Call:
        q, k, v = normal(rows)
        return lambda: cudistr.attention(q, k, v, causal=case.causal, reduction=reduction)

    def ring(transport: Transport, attends: bool) -> Call:
        q, k, v = normal(layout.lengths[group.rank])
        problem = normalize.problem(q, k, v, reduction=reduction)
        options = solve.Options(reduction, problem.scale, None, None, 0 if case.causal else None)
        if attends:
            return lambda: solve.context(transport, problem, options, layout, layout, q, k, v)
        bands = solve.bands_of(solve.whole(problem, options, layout, layout))
        moves, _ = solve.plan(layout, layout, bands, solve.block_of(problem), group.rank)

        def pass_on() -> None:
            for _ in solve.passing(transport, moves, layout, k, v):
                pass

        return pass_on

    candidates: dict[str, Factory] = {"cudistr": shared}
    if parallel == "context" and group.size > 1:
        candidates["attention"] = functools.partial(ring, Silent(group._transport), True)
        candidates["transfers"] = functools.partial(ring, group._transport, False)
    candidates["single_total"] = functools.partial(alone, case.seqlen_k)
    candidates["single_share"] = functools.partial(alone, -(-case.seqlen_k // group.size))
    return candidates


def row_of(case: Case, method: str, parallel: str, timings: bench.Timings, ranks: int) -> dict[str, Any]:
    """A row of the record."""
    ms = {name: round(x, 5) for name, x in timings.ms.items()}
    row: dict[str, Any] = {"method": method, "parallel": parallel, **asdict(case), "ms": ms}
    if timings.failed:
        row["failed"] = dict(timings.failed)
    return {**row, **bench.sharing_figures(ms, ranks)}


def _versions(group: Group) -> dict[str, str]:
    found = {"cudistr": cudistr.__version__, "numpy": np.__version__}
    if group.device is not None:
        from cupy.cuda import nccl

        found = bench.Machine().versions()
        version = int(nccl.get_version())
        found["nccl"] = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["mpi4py"] = importlib.metadata.version("mpi4py")
    return found


def run(args: argparse.Namespace) -> int:
    """Measure, and on rank 0 print a table and write the record. 0, or 1 if a shared call could not be timed."""
    with connect(timeout=args.timeout) as group, contextlib.ExitStack() as stack:
        device = "cpu"
        if group.device is not None:
            import cupy

            stack.enter_context(cupy.cuda.Device(group.device))
            stack.enter_context(cupy.cuda.Stream(non_blocking=True))
            device = launch.device_name(group.device)
        clock = Clock(group)
        rows = []
        asked = [case for case in bench.cases(args) if case.seqlen_q == case.seqlen_k]
        for case in bench.progress(asked, "case") if group.rank == 0 else asked:
            for method in dict.fromkeys(args.method):
                for parallel in dict.fromkeys(args.parallel):
                    candidates = {
                        name: functools.partial(clock.together, make)
                        for name, make in factories(group, case, method, parallel).items()
                    }
                    timings = bench.interleave(
                        candidates, clock, seconds=args.seconds, warmup=WARMUP_CALLS, min_rounds=MIN_ROUNDS
                    )
                    rows.append(row_of(case, method, parallel, timings, group.size))
        if group.rank == 0:
            record = {
                "device": device,
                "commit": bench.commit_of(pathlib.Path(cudistr.__file__).parents[1], os.environ),
                "command": bench.command_of(args.argv),
                "versions": _versions(group),
                "ranks": group.size,
                "transport": "mpi" if group.device is None else "nccl",
                "rows": rows,
            }
            path = bench.write(
                record, args.output or bench.default_output(pathlib.Path.cwd()), args.name or "distributed"
            )
            print(f"{group.size} x {device}, {record['transport']}")
            print(bench.table(rows))
            print(f"record: {path}")
            sys.stdout.flush()
    return int(any("cudistr" in row.get("failed", {}) for row in rows))
