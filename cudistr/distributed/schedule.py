"""Who holds, sends and computes what, and when: pure functions of lengths and ranks, without arrays."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cudistr.plan import Pass

__all__ = ["PARALLEL", "Call", "HeadShare", "Layout", "Move", "calls", "head_share", "ring"]

PARALLEL = ("context", "heads")  # ways to share a call

Range = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Which rows of a sequence each rank holds.

    Make one with :meth:`contiguous` or :meth:`split`, or from ranges of your own.

    Parameters
    ----------
    pieces : sequence, one entry per rank, of sequences of (start, stop)
        The array of a rank has these rows, one range after another. Together they are all rows of the sequence, each
        once. Empty ranges are dropped, and ranges of a rank that follow each other become one.

    Raises
    ------
    TypeError, ValueError
        If the ranges are not pairs of integers, or leave a row out or name one twice.

    Examples
    --------
    >>> from cudistr.distributed import Layout
    >>> Layout.split(512, 2, zigzag=True)
    Layout(pieces=(((0, 128), (384, 512)), ((128, 384),)))
    """

    pieces: tuple[tuple[Range, ...], ...]

    def __post_init__(self) -> None:
        form = "Pass one sequence of (start, stop) per rank, or use Layout.split and Layout.contiguous."
        try:
            given = [[(operator.index(a), operator.index(b)) for a, b in ranges] for ranges in self.pieces]
        except (TypeError, ValueError):
            raise TypeError(
                f"Layout: pieces must be pairs of integers for each rank, got {self.pieces!r}. {form}"
            ) from None
        if not given:
            raise ValueError(f"Layout: pieces must have an entry for each rank, got none. {form}")
        merged = []
        for ranges in given:
            own: list[Range] = []
            for a, b in ranges:
                if not 0 <= a <= b:
                    raise ValueError(f"Layout: a range must have 0 <= start <= stop, got {(a, b)}. {form}")
                if own and own[-1][1] == a:
                    own[-1] = (own[-1][0], b)
                elif a < b:
                    own.append((a, b))
            merged.append(tuple(own))
        reached = 0
        for a, b in sorted(piece for own in merged for piece in own):
            if a != reached:
                wrong = f"rows {reached} to {a} are missing" if a > reached else f"row {a} is there twice"
                raise ValueError(f"Layout: every row must be held by one rank, but {wrong}. {form}")
            reached = b
        object.__setattr__(self, "pieces", tuple(merged))

    @classmethod
    def contiguous(cls, lengths: Iterable[int]) -> Layout:
        """Rank after rank: the first ``lengths[0]`` rows on rank 0, and so on."""
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + length)
        return cls(tuple((piece,) for piece in itertools.pairwise(ends)))

    @classmethod
    def split(cls, seqlen: int, size: int, *, zigzag: bool = False, block: int = 1) -> Layout:
        """Shares of a sequence that are as equal as blocks of rows allow.

        Parameters
        ----------
        seqlen : int
            Rows of the sequence.
        size : int
            Ranks.
        zigzag : bool, default False
            Cut the sequence into ``2 * size`` chunks and give rank r the chunks r and ``2 * size - 1 - r``: under a
            causal mask every rank then has the same work. Otherwise rank r has the r-th of ``size`` chunks.
        block : int, default 1
            Chunks begin at multiples of this. With an LSH it must be a multiple of its ``block_q``, so that blocks of
            queries, and with them the groups of columns, are those of a single call.

        Raises
        ------
        ValueError
            If a number is out of range.
        """
        for name, value, least in (("seqlen", seqlen, 0), ("size", size, 1), ("block", block, 1)):
            if value < least:
                raise ValueError(f"Layout.split: {name} must be at least {least}, got {value}.")
        count = 2 * size if zigzag else size
        blocks = -(-seqlen // block)
        ends = [min(seqlen, blocks * i // count * block) for i in range(count + 1)]
        chunks = list(itertools.pairwise(ends))
        if zigzag:
            return cls(tuple((chunks[r], chunks[-1 - r]) for r in range(size)))
        return cls(tuple((chunk,) for chunk in chunks))

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.pieces)

    @property
    def seqlen(self) -> int:
        """Rows of the whole sequence."""
        return sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each rank."""
        return tuple(sum(b - a for a, b in own) for own in self.pieces)

    def positions(self, rank: int) -> NDArray[np.intp]:
        """Where in the sequence the rows of a rank's array are, (lengths[rank],)."""
        return np.concatenate([np.arange(a, b) for a, b in self.pieces[rank]] or [np.arange(0)])

    def placed(self, rank: int) -> list[tuple[int, Range]]:
        """Where in a rank's array each of its ranges begins, and the range."""
        found, at = [], 0
        for a, b in self.pieces[rank]:
            found.append((at, (a, b)))
            at += b - a
        return found


class Call(NamedTuple):
    """Attention of a slice of a rank's queries to a slice of a key shard; ranges are of the arrays of the ranks.

    ``left`` and ``right`` bound what a query sees as a window does, bottom-right aligned in the slices; they may be
    negative, and None is no bound.
    """

    exact: bool  # whether the scores are, if the call has a reduction
    rows: Range
    keys: Range
    left: int | None
    right: int | None


def calls(
    queries: Layout, keys: Layout, rank: int, source: int, bands: Sequence[Pass], block: int = 1
) -> list[Call]:
    """What a rank computes with the keys of another: together, each pair that the bands let through once.

    Parameters
    ----------
    queries, keys : Layout
        Of the sequence of queries and that of keys.
    rank, source : int
        Whose queries and whose keys.
    bands : sequence of Pass
        Which keys are seen, in positions of the whole sequences.
    block : int
        Slices of queries begin at multiples of so many rows of the sequence.
    """
    offset = keys.seqlen - queries.seqlen
    found: list[Call] = []
    for band in bands:
        own: list[Call] = []
        if rank == source and _stays_causal(queries, keys, rank, band, block):
            length = queries.lengths[rank]
            found.append(Call(not band.reduced, (0, length), (0, length), None, 0))
            continue
        for q_at, (a, b) in queries.placed(rank):
            for k_at, (c, d) in keys.placed(source):
                first, last = max(c, band.first), min(d, band.last)
                # The rows that see a key: key - position lies in the band for a key of the slice.
                start, stop = max(a, first - band.high - offset), min(b, last - band.low - offset)
                if first >= last or start >= stop:
                    continue
                start = max(a, start // block * block)
                stop = min(b, -(-stop // block) * block)
                low, high = first - (stop - 1 + offset), last - 1 - (start + offset)  # all of key - position
                left = right = None
                if band.low > low or band.high < high:
                    shift = start + offset - first - ((last - first) - (stop - start))
                    left, right = -(band.low + shift), band.high + shift
                at = k_at + first - c
                rows = (q_at + start - a, q_at + stop - a)
                own.append(Call(not band.reduced, rows, (at, at + last - first), left, right))
        found += _joined(own, block)
    return found


def _stays_causal(queries: Layout, keys: Layout, rank: int, band: Pass, block: int) -> bool:
    """Whether a rank's queries see its own keys by a causal mask of its arrays too, however many ranges these have."""
    pieces, seqlen = queries.pieces[rank], keys.seqlen
    plain = band.high == 0 and band.low <= 1 - seqlen and band.first <= 0 and band.last >= seqlen
    if not plain or queries.seqlen != seqlen or not pieces or pieces != keys.pieces[rank]:
        return False
    in_order = all(one[1] <= other[0] for one, other in itertools.pairwise(pieces))
    return in_order and all((b - a) % block == 0 for a, b in pieces[:-1])


def _joined(found: list[Call], block: int) -> list[Call]:
    """Calls without bounds on neighbouring slices as one call; slices of queries only where blocks stay whole."""

    def join(one: Call, other: Call) -> Call | None:
        bounded = (one.left, one.right, other.left, other.right) != (None,) * 4
        if bounded:
            return None
        if one.rows == other.rows and one.keys[1] == other.keys[0]:
            return one._replace(keys=(one.keys[0], other.keys[1]))
        whole = (one.rows[1] - one.rows[0]) % block == 0
        if one.keys == other.keys and one.rows[1] == other.rows[0] and whole:
            return one._replace(rows=(one.rows[0], other.rows[1]))
        return None

    done: list[Call] = []
    for call in found:
        while True:
            match = next(((i, both) for i, x in enumerate(done) if (both := join(x, call))), None)
            if match is None:
                break
            del done[match[0]]
            call = match[1]
        done.append(call)
    return done


class Move(NamedTuple):
    """What a rank does in a step of the ring: pass a shard on, and take one. None is nothing."""

    sends: int | None  # whose shard goes to the next rank
    receives: int | None  # whose shard comes from the rank before


@functools.lru_cache(maxsize=64)
def ring(reach: tuple[int, ...]) -> tuple[tuple[Move, ...], ...]:
    """The steps of a ring: ``ring(reach)[s][r]`` is what rank r does in step s + 1, while it computes step s.

    In step s a rank computes with the shard of the rank s places before it, so a shard that is passed on was received
    one step before, or is the rank's own.

    Parameters
    ----------
    reach : tuple of int, one per rank
        How many places the shard of a rank has to travel, 0 to ``len(reach) - 1``.
    """
    size = len(reach)

    def travels(shard: int, step: int) -> int | None:
        return shard if reach[shard] >= step else None

    return tuple(
        tuple(Move(travels((r + 1 - s) % size, s), travels((r - s) % size, s)) for r in range(size))
        for s in range(1, max(reach) + 1)
    )


class HeadShare(NamedTuple):
    """The heads that a rank computes in head parallelism."""

    queries: Range
    keys: Range


def head_share(heads: int, heads_kv: int, size: int, rank: int) -> HeadShare:
    """Heads of q, and of k and v, of a rank. Where KV heads are fewer than ranks, several ranks have the same one.

    Raises
    ------
    ValueError
        If the ranks cannot share the heads.
    """
    remedy = "Use as many ranks as divide them, or parallel='context', which does not split heads."
    if heads % size:
        raise ValueError(
            f"parallel='heads': the number of ranks must divide the heads of q, got {size} ranks and {heads} heads. "
            f"{remedy}"
        )
    if heads_kv and heads_kv % size and size % heads_kv:
        raise ValueError(
            f"parallel='heads': the number of ranks must divide the heads of k and v, or be a multiple of them, got "
            f"{size} ranks and {heads_kv} heads. {remedy}"
        )
    if not heads:
        return HeadShare((0, 0), (0, 0))
    own, shared = heads // size, heads // heads_kv
    first = rank * own
    return HeadShare((first, first + own), (first // shared, (first + own - 1) // shared + 1))


def same(names: Sequence[str], headers: Sequence[dict[str, Any]]) -> None:
    """Refuse ranks that were called with different arguments.

    Raises
    ------
    ValueError
        Naming what differs, and on which ranks.
    """
    for name in names:
        held: dict[str, list[int]] = {}
        for rank, header in enumerate(headers):
            held.setdefault(str(header[name]), []).append(rank)
        if len(held) > 1:
            came = ", ".join(f"{value} on {of_ranks(ranks)}" for value, ranks in held.items())
            raise ValueError(
                f"{name} must be the same on all ranks, got {came}. Only the sequence lengths of shards may differ."
            )


def of_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 1, 2 and 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}"
