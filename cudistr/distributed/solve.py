"""Attention over a transport: a ring of key shards merged by lse, or an all-to-all to head shards and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cudistr import compose, launch, normalize, reference
from cudistr.distributed import schedule
from cudistr.distributed.schedule import Call, HeadShare, Layout, Move
from cudistr.distributed.transport import Message, Transport
from cudistr.normalize import Problem
from cudistr.plan import Pass, passes
from cudistr.projection import Projection
from cudistr.reductions import Reduction

__all__ = ["Options", "context", "cut", "gather", "heads"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What all ranks agree on beyond shapes: as for :func:`cudistr.attention`, checked."""

    reduction: Reduction | None
    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    tolerance: float | None = None


def block_of(problem: Problem) -> int:
    """Queries may be cut at multiples of so many rows: those of a block have one order of columns."""
    return 1 if problem.reduction is None else problem.reduction.rows_per_block


def whole(problem: Problem, options: Options, queries: Layout, keys: Layout) -> Problem:
    """The problem of the whole sequences, of which ``problem`` is a rank's share."""
    seqlen_q, seqlen_k = queries.seqlen, keys.seqlen
    span = seqlen_q + seqlen_k
    near = sinks = 0
    if options.reduction is not None and problem.reduced:
        near, sinks = options.reduction.outline.near, options.reduction.outline.sinks
    left, right = (None if x is None or x >= span else x for x in (options.left, options.right))
    return dataclasses.replace(
        problem,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        left=left,
        right=right,
        near=min(near, span),
        sinks=min(sinks, seqlen_k),
        exact_block=(1, 1),  # shares of keys may end within a block
    )


def bands_of(problem: Problem) -> tuple[Pass, ...]:
    """What a problem sees, as passes over its keys; one exact pass, if exact keys are all that any query sees."""
    found = passes(problem)
    if any(x.reduced for x in found):
        return found
    plain = dataclasses.replace(problem, near=0, sinks=0)
    return tuple(dataclasses.replace(x, reduced=False) for x in passes(plain))


def attend(call: Call, q: Any, k: Any, v: Any, options: Options) -> tuple[Any, Any]:
    """out and lse of one call: float64 on the host, the dtype of q and float32 on a GPU."""
    q = q[:, :, slice(*call.rows)]
    k, v = (x[:, :, slice(*call.keys)] for x in (k, v))
    reduction = None if call.exact else options.reduction
    problem = normalize.problem(q, k, v, reduction=reduction, scale=options.scale, softcap=options.softcap)
    problem = dataclasses.replace(
        problem, left=call.left, right=call.right, near=0, sinks=0, exact_block=(1, 1)
    )
    if problem.device is None:
        projection = reduction if isinstance(reduction, Projection) and problem.rank is not None else None
        return reference.solve(q, k, v, problem, projection)
    return compose.attention(problem, reduction, q, k, v, None, True, None)


class Merged:
    """What the keys so far say about the queries of a rank: out and lse, in float32 (on the host, float64)."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: Any, on_host: bool) -> None:
        self._shape, self._dtype, self._on_host = shape, np.dtype(dtype), on_host
        self._out: Any = None
        self._lse: Any = None

    def add(self, rows: tuple[int, int], out: Any, lse: Any, last: bool) -> None:
        """Take in what some queries found in more keys; ``last`` if nothing follows."""
        if self._out is None and rows == (0, self._shape[2]):
            self._out, self._lse = out, lse  # of its own dtype: if it stays the only one, these are its bits
            return
        if self._out is None:
            self._out, self._lse = self._nothing()
        if self._on_host:
            place = (slice(None), slice(None), slice(*rows))
            outs, lses = [self._out[place], out], [self._lse[place], lse]
            self._out[place], self._lse[place] = reference.solve_merge(outs, lses)
        else:
            dtype = self._dtype if last else np.dtype(np.float32)
            self._out = launch.merge_shard(self._out, self._lse, rows, out, lse, dtype)

    def result(self) -> tuple[Any, Any]:
        """out of the dtype of q, and float32 lse."""
        if self._out is None:
            self._out, self._lse = self._nothing()
        with np.errstate(over="ignore"):
            return self._out.astype(self._dtype, copy=False), self._lse.astype(np.float32, copy=False)

    def _nothing(self) -> tuple[Any, Any]:
        xp, wide = module(self._on_host), np.float64 if self._on_host else np.float32
        return xp.zeros(self._shape, wide), xp.full(self._shape[:3], -np.inf, wide)


def module(on_host: bool) -> Any:
    if on_host:
        return np
    import cupy

    return cupy


@functools.lru_cache(maxsize=256)
def plan(
    queries: Layout, keys: Layout, bands: tuple[Pass, ...], block: int, rank: int
) -> tuple[tuple[Move, ...], tuple[list[Call], ...]]:
    """The moves of a rank, and its calls with the shard of every rank."""
    ranks = range(keys.size)
    found = [[schedule.calls(queries, keys, r, source, bands, block) for source in ranks] for r in ranks]
    far = (max((away for away in ranks if found[(s + away) % keys.size][s]), default=0) for s in ranks)
    return tuple(step[rank] for step in schedule.ring(tuple(far))), tuple(found[rank])


def context(
    transport: Transport,
    problem: Problem,
    options: Options,
    queries: Layout,
    keys: Layout,
    q: Any,
    k: Any,
    v: Any,
) -> tuple[Any, Any]:
    """A rank's share of attention, keys passing by: while it computes with one shard, the next one arrives."""
    bands = bands_of(whole(problem, options, queries, keys))
    moves, calls = plan(queries, keys, bands, block_of(problem), transport.rank)
    found = Merged(problem.out_shape, q.dtype, problem.device is None)
    left = sum(map(len, calls))
    for source, shard in passing(transport, moves, keys, k, v):
        for call in calls[source]:
            left -= 1
            found.add(call.rows, *attend(call, q, *shard, options), left == 0)
    return found.result()


def passing(
    transport: Transport, moves: Sequence[Move], keys: Layout, k: Any, v: Any
) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """The key shards that pass a rank by, its own first, and whose each is; the next one travels meanwhile."""
    rank, size = transport.rank, transport.size
    xp = module(transport.device is None)
    held = {rank: (k, v)}
    if moves:
        held[rank] = xp.ascontiguousarray(k), xp.ascontiguousarray(v)
    spare: list[tuple[Any, Any]] = []  # memory of shards that are done with
    for step, move in enumerate((*moves, Move(None, None))):
        coming = move.receives
        transfer, room = None, None
        if coming is not None:
            room = _room(spare, keys.lengths[coming], k, v, xp)
        if step < len(moves):
            what = "nothing" if coming is None else f"the keys of rank {coming}"
            transfer = transport.start(
                [] if move.sends is None else [Message(x, (rank + 1) % size) for x in held[move.sends]],
                [] if room is None else [Message(x, (rank - 1) % size) for x in room],
                f"step {step + 1} of {len(moves)} of the ring ({what} from rank {(rank - 1) % size})",
            )
        source = (rank - step) % size
        if source in held:
            yield source, held[source]
            if step:  # passed on and computed with; what fills its memory next is ordered behind both
                spare.append(held.pop(source))
        if transfer is not None:
            transfer.arrive()
        if coming is not None and room is not None:
            held[coming] = room
    transport.finish()


def _room(spare: list[tuple[Any, Any]], length: int, k: Any, v: Any, xp: Any) -> tuple[Any, Any]:
    """Arrays that can take a shard: used ones where they have its length."""
    for i, pair in enumerate(spare):
        if pair[0].shape[2] == length:
            return spare.pop(i)
    spare.clear()
    shapes = [(*x.shape[:2], length, x.shape[3]) for x in (k, v)]
    return xp.empty(shapes[0], k.dtype), xp.empty(shapes[1], v.dtype)


def heads(
    transport: Transport,
    problem: Problem,
    options: Options,
    queries: Layout,
    keys: Layout,
    q: Any,
    k: Any,
    v: Any,
    return_lse: bool,
) -> tuple[Any, Any]:
    """A rank's rows of attention that each rank computes for some of the heads."""
    rank, size = transport.rank, transport.size
    on_host = problem.device is None
    xp = module(on_host)
    shares = [schedule.head_share(problem.heads, problem.heads_kv, size, r) for r in range(size)]
    own = shares[rank]
    q, k, v = swap(
        transport,
        [
            (q, queries, [x.queries for x in shares]),
            (k, keys, [x.keys for x in shares]),
            (v, keys, [x.keys for x in shares]),
        ],
        xp,
        "the all-to-all of q, k and v",
    )
    reduction = _of_heads(options.reduction, own)
    local = normalize.problem(q, k, v, reduction=reduction, scale=options.scale, softcap=options.softcap)
    local = whole(local, options, queries, keys)
    found = compose.attention(local, reduction, q, k, v, None, return_lse, None, options.tolerance)
    mine = [x for x in found if x is not None]
    rows = swap_back(transport, mine, queries, xp, "the all-to-all of the output")
    return rows[0], rows[1] if return_lse else None


def _of_heads(reduction: Reduction | None, share: HeadShare) -> Reduction | None:
    """A reduction of some of the heads."""
    if not isinstance(reduction, Projection):
        return reduction
    own = slice(*share.keys)
    arrays = {
        name: getattr(reduction, name)[own]
        for name in ("queries", "keys", "mean", "singular_values", "output_errors", "row_errors")
    }
    return dataclasses.replace(
        reduction,
        heads=share.queries[1] - share.queries[0],
        heads_kv=share.keys[1] - share.keys[0],
        ranks=reduction.ranks[own],
        _copies={},
        **arrays,
    )


def swap(
    transport: Transport,
    arrays: Sequence[tuple[Any, Layout, list[tuple[int, int]]]],
    xp: Any,
    operation: str,
) -> list[Any]:
    """All-to-all: of each array, which every rank has some rows of, some heads of all rows."""
    rank, size = transport.rank, transport.size
    sends, receives, taken = [], [], []
    for array, layout, shares in arrays:
        parts = []
        for r in range(size):
            if r == rank:
                parts.append(array[:, slice(*shares[rank])])
                continue
            count = shares[rank][1] - shares[rank][0]
            parts.append(xp.empty((array.shape[0], count, layout.lengths[r], *array.shape[3:]), array.dtype))
            receives.append(Message(parts[r], r))
            sends.append(Message(xp.ascontiguousarray(array[:, slice(*shares[r])]), r))
        taken.append((parts, layout))
    transport.start(sends, receives, operation).arrive()
    wholes = [assemble(parts, layout, xp) for parts, layout in taken]
    transport.finish()
    return wholes


def swap_back(
    transport: Transport, arrays: Sequence[Any], layout: Layout, xp: Any, operation: str
) -> list[Any]:
    """All-to-all: of each array, which every rank has some heads of, all heads of a rank's rows."""
    rank, size = transport.rank, transport.size
    sends, receives, taken = [], [], []
    for array in arrays:
        parts = []
        for r in range(size):
            share = cut(array, layout, r, xp)
            if r == rank:
                parts.append(share)
                continue
            sends.append(Message(xp.ascontiguousarray(share), r))
            parts.append(xp.empty((*array.shape[:2], layout.lengths[rank], *array.shape[3:]), array.dtype))
            receives.append(Message(parts[r], r))
        taken.append(parts)
    transport.start(sends, receives, operation).arrive()
    joined = [parts[0] if size == 1 else xp.concatenate(parts, axis=1) for parts in taken]
    transport.finish()
    return joined


def cut(array: Any, layout: Layout, rank: int, xp: Any) -> Any:
    """The rows (axis 2) of a rank, of an array that has all of them."""
    parts = [array[:, :, a:b] for a, b in layout.pieces[rank]]
    return parts[0] if len(parts) == 1 else xp.concatenate(parts or [array[:, :, :0]], axis=2)


def assemble(parts: Sequence[Any], layout: Layout, xp: Any) -> Any:
    """One array in the order of the sequence (axis 2) from the arrays of all ranks."""
    pieces = sorted((piece, r, at) for r in range(layout.size) for at, piece in layout.placed(r))
    slices = [parts[r][:, :, at : at + b - a] for (a, b), r, at in pieces]
    return slices[0] if len(slices) == 1 else xp.concatenate(slices or parts[:1], axis=2)


def gather(transport: Transport, array: Any, layout: Layout, operation: str) -> Any:
    """The rows (axis 2) of all ranks, on every rank."""
    xp = module(transport.device is None)
    own = xp.ascontiguousarray(array)
    parts = [
        own if r == transport.rank else xp.empty((*array.shape[:2], length, *array.shape[3:]), array.dtype)
        for r, length in enumerate(layout.lengths)
    ]
    others = [r for r in range(transport.size) if r != transport.rank]
    transport.start(
        [Message(own, r) for r in others], [Message(parts[r], r) for r in others], operation
    ).arrive()
    found = assemble(parts, layout, xp)
    transport.finish()
    return found
