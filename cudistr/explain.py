"""What a call will do, as a value to print: which attention, why, and which kernels in which tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cudistr import compose, launch
from cudistr.normalize import Problem, exact
from cudistr.plan import (
    Plan,
    check_device,
    copied_queries,
    copies_queries,
    decide_kernel,
    draw_kernel,
    energy_order,
    key_energy,
    lowrank_steps,
    merge_kernel,
    passes,
    plan,
    prepare_kernel,
    probe_kernel,
    project_kernel,
    weights,
)
from cudistr.projection import Projection
from cudistr.reductions import LSH, LowRank, Reduction

__all__ = ["CallPlan", "explain"]


@dataclass(frozen=True)
class CallPlan:
    """What :func:`cudistr.attention` does with the same arguments.

    Attributes
    ----------
    reduction : None, cudistr.LSH, cudistr.Energy, cudistr.LowRank or cudistr.Projection
        What is computed; None is exact attention.
    reason : str
        Why that, in a sentence.
    kernels : tuple of str
        Kernels of this library, in the order in which they are launched; none for NumPy arrays and empty problems.
    tiles : tuple of str
        A line for each launch of an attention kernel: tiles, thread blocks, shared memory.
    """

    reduction: Reduction | None
    reason: str
    kernels: tuple[str, ...]
    tiles: tuple[str, ...]

    def __str__(self) -> str:
        what = "exact attention" if self.reduction is None else str(self.reduction)
        launched = ", ".join(self.kernels) or "none"
        return "\n".join([f"{what}: {self.reason}", f"kernels: {launched}", *self.tiles])


def explain(
    problem: Problem,
    reduction: Reduction | None,
    k: Any,
    v: Any,
    tolerance: float | None,
    exact_if_faster: bool | None,
) -> CallPlan:
    """What a call does with a checked problem."""
    asked = reduction if problem.reduced else None
    if problem.empty:
        return CallPlan(asked, "there is nothing to compute", (), ())
    if problem.device is None:
        return CallPlan(asked, "NumPy arrays are computed by the float64 reference", (), ())
    check_device(launch.device_properties(problem.device), problem.device)
    settled = compose.settle(problem, reduction, tolerance, exact_if_faster)
    names, plans = _Steps(problem.device).of(settled, k, v)
    if settled.exact_because is not None:
        seen = "" if settled.worth is None else f": {settled.worth}"
        reason = f"it keeps to any tolerance, and {settled.exact_because}{seen}"
    elif reduction is None and settled.reduction is not None:
        reason = f"picked for the tolerance: {settled.worth}"
    elif settled.worth is None:
        reason = "as asked for"
    elif not settled.problem.reduced:
        reason = f"instead of {reduction}, because it is faster: {settled.worth}"
    elif settled.worth.exact_is_faster:
        reason = (
            f"as asked for, though exact attention is faster (exact_if_faster=True takes it): {settled.worth}"
        )
    else:
        reason = f"as asked for: {settled.worth}"
    rows, keys = settled.problem.exact_block
    if (rows, keys) != (1, 1):
        reason += f"; exact keys are whole blocks of {rows} queries and {keys} keys"
    chosen = settled.reduction if settled.problem.reduced else None
    return CallPlan(chosen, reason, tuple(names), tuple(map(_tiles, plans)))


def _tiles(chosen: Plan) -> str:
    kernel, tile = chosen.attention, chosen.tile
    shared = f"{kernel.shared_bytes / 1024:.0f} KB of shared memory"
    blocks = f"{chosen.blocks} thread blocks of {kernel.threads} threads, {shared} each"
    more = f", {chosen.split.splits} of which share the keys of a tile" if chosen.split is not None else ""
    if chosen.shared_tiles:
        more = f", several of which share each of {chosen.shared_tiles} tiles"
    return f"{kernel.name}: tiles of {tile.block_m} queries and {tile.tile_k} keys, {blocks}{more}"


class _Steps:
    """The kernels of a call, as :mod:`cudistr.compose` launches them: a test compares the two."""

    def __init__(self, index: int) -> None:
        self.device = launch.device_properties(index)
        self.names: list[str] = []
        self.plans: list[Plan] = []

    def of(self, settled: compose.Settled, k: Any, v: Any) -> tuple[list[str], list[Plan]]:
        problem, reduction, tolerance, *_ = settled
        if problem.rank is not None:
            assert isinstance(reduction, Projection | LowRank)
            self._projected(problem, reduction, v, tolerance)
            return self.names, self.plans
        kept = bool(problem.near or problem.sinks)
        if kept and not any(x.reduced for x in passes(problem)):
            self._one(compose.parts(problem)[0].problem)
        elif copies_queries(problem, self.device):
            self._copied(problem, k, v)
        elif not kept or compose.in_one_kernel(problem, self.device):
            self._one(problem)
        else:
            chosen = compose.parts(problem)
            for part in chosen:
                self._one(part.problem)
            if len(chosen) > 1:
                self.names.append(merge_kernel(problem.dtype, problem.head_dim_v).name)
        return self.names, self.plans

    def _one(self, problem: Problem) -> None:
        """One attention kernel, what comes before it, and what merges its splits."""
        if problem.empty:
            return
        chosen = plan(problem, self.device)
        steps = (chosen.again, chosen.key_energy, chosen.columns)
        if chosen.prepare_kernel is not None:
            self.names.append(chosen.prepare_kernel.name)
        self.names += [step.kernel.name for step in steps if step is not None]
        self.names.append(chosen.attention.name)
        if chosen.split is not None:
            self.names.append(chosen.split.kernel.name)
        self.plans.append(chosen)

    def _copied(self, problem: Problem, k: Any, v: Any) -> None:
        reduction, keys = problem.reduction, problem.seqlen_k - problem.sinks
        if isinstance(reduction, LSH):
            self.names.append(prepare_kernel(problem.dtype, problem.head_dim, problem.aligned).name)
        if keys:
            self.names.append(key_energy(problem.dtype, problem.head_dim, problem.heads_kv, keys).kernel.name)
        find = (
            weights(problem.dtype, problem.head_dim, reduction.group_size, 1, 1)
            if isinstance(reduction, LSH)
            else energy_order(problem.dtype, problem.head_dim, problem.aligned, 1)
        )
        self.names += [find.kernel.name, copied_queries(problem)[0].kernel.name]
        self._one(compose.copied_problem(problem, k, v))

    def _projected(
        self, problem: Problem, projection: Projection | LowRank, v: Any, tolerance: float | None
    ) -> None:
        kept = bool(problem.near or problem.sinks)
        if kept and tolerance is None and not any(x.reduced for x in passes(problem)):
            return self._one(exact(problem))
        columns = projection.columns
        if isinstance(projection, LowRank):
            steps = lowrank_steps(problem, projection.rank, self.device)
            self.names += [step.kernel.name for step in (steps.rows, steps.sums, steps.factors)]
        self.names.append(project_kernel(problem, columns).name)
        if tolerance is not None:
            decide = decide_kernel(problem.head_dim, problem.head_dim_v)
            self.names += [x.name for x in (draw_kernel(problem), probe_kernel(problem), decide)]
        return self._one(compose.projected_problem(problem, projection, v, tolerance)[0])
