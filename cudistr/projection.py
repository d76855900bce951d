"""A reduction of the score product by the best low-rank factors of calibration scores, per head."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cudistr import launch, lowrank, normalize, reference
from cudistr.launch import Factors
from cudistr.plan import PANEL_COLUMNS, PROBE_ROWS, PROJECT_GROUP
from cudistr.reductions import RANK_MULTIPLE, Fitted, Reduction, exact_keys, integer

__all__ = ["Projection", "wide"]

FORMAT = "cudistr projection 1"
# Of the largest singular value: below, float64 sums of squares have no digit left (the square root of its epsilon).
NOISE = 1e-7
# Of the unweighted sums, by the weighted ones' trace: a sample of rows does not see every direction that other data
# uses.
PLAIN_KEYS, PLAIN_QUERIES = 0.03, 1.0
WEIGHT_ROWS = 512  # of a head and a batch entry, that weights are found of
ERROR_ROWS = 2048  # the same of errors
ROW_MARGIN = 3.0  # a row that no sample has may be so many times as bad as the worst of these
MAX_WEIGHTED = 2**23  # numbers at once in the sums that are weighted by the output: 32 MiB in float32
MAX_CACHED = 2**18  # the same of what fits into a CPU's cache
RANK_UNIT = 8  # what ranks are counted in where they are shared out: head_dim is a multiple of it


def wide(array: Any, xp: Any) -> Any:
    """A contiguous copy in float64; by way of float32, because bfloat16 has no direct way there."""
    return xp.ascontiguousarray(array.astype(np.float32).astype(np.float64))


@dataclass(frozen=True, eq=False)
class Projection(Reduction):
    """Reduce the score product to the best ``rank`` columns for each head, found on calibration data.

    ``Qhat = Q A`` and ``Khat = (K - mean) B`` are made once per call, and the score product sums over ``rank``
    instead of head_dim columns. Make one with :meth:`fit` or :meth:`load`.

    This is an approximation. How good it is depends on how alike the calibration data and the data of a call are;
    :func:`cudistr.attention_error` measures it. Of a model with rotary positions they are alike only if the calibration
    data is as long: factors of shorter texts fail at positions that these do not have.

    Attributes
    ----------
    heads, heads_kv, head_dim : int
        What it was fitted for, and serves. The dtype does not matter: the factors are float32.
    ranks : tuple of int
        Columns that each KV head uses.
    rank : int
        The largest of them.
    near, sinks : int
        Keys that stay exact, see :meth:`with_near`.
    score_error : float64 array (heads_kv,)
        ``||S - Shat|| / ||S||`` of each KV head on the calibration data, S with the mean over the keys taken off
        each row, and weighted as the notes say. Exactly the part of ``singular_values`` that was cut off.
    singular_values : float64 array (heads_kv, head_dim)
        Of the weighted scores of all calibration queries with all calibration keys, largest first.
    output_errors : float64 array (heads_kv, head_dim / 16 rounded up + 1)
        ``||O - Ohat|| / ||O||`` of each KV head on calibration rows that the fit has not seen, if it was fitted with
        v: for the ranks 0, 16, 32, ... and last head_dim. (heads_kv, 0) without v.
    row_errors : float64 array of the same shape
        ``||o - ohat||`` of the worst of these rows over the root mean square of ``||o||``; what a call with a tolerance
        draws for certain counts less. Both are of the ``near`` and ``sinks`` of the fit.

    Notes
    -----
    Softmax does not see a constant added to a row, so the mean of K is taken off first. With square roots
    ``Cq^T Cq = Q^T Q`` and ``Ck^T Ck = K^T K`` (head_dim x head_dim, float64) and the singular value
    decomposition ``Cq Ck^T = U s W^T``, the factors ``A = Ck^T W / sqrt(s)`` and ``B = Cq^T U / sqrt(s)``, cut to rank
    columns, give the best approximation of ``Q K^T`` of that rank (Eckart and Young, *Psychometrika* 1, 1936), and
    its squared Frobenius error is the sum of the squared singular values that were cut off. They are computed from the
    eigenvalues ``s^2`` and vectors ``U`` of ``Cq K^T K Cq^T``, since ``A = K^T K B / s``. Under grouped-query
    attention the queries of all heads that share a KV head count together.

    An error of the scores is felt where the softmax looks. So each key counts by how much it gets of the softmax of
    sampled rows, if it is not exact for them: to second order the divergence of a softmax from one whose scores are off
    by ``e_j`` is half the variance of ``e_j`` under it. With v, more is known: to first order, a score error
    ``q^T E (k_j - mean)`` changes the output of a row by ``G E^T q`` with ``G = sum_j p_j (v_j - o) (k_j - mean)^T``, j
    over the keys that are not exact. Then :meth:`fit` puts the mean of ``G^T G`` over these rows in place of ``K^T K``,
    and weights each query by ``||G||^2``. A part of the unweighted sums stays for the directions that the sample lacks.
    With ``scale=0`` all keys count alike, and without v the factors are those of the scores themselves.

    On a GPU one kernel makes Qhat and Khat, and the attention kernel takes from them as many columns as a head uses. A
    head whose rank is head_dim is exact: it multiplies q and k themselves. A head of rank 0 multiplies nothing: a query
    has the score ``scale * q mean`` with every key that is not exact, so that these keys have one weight.

    Examples
    --------
    >>> import numpy as np, cudistr
    >>> q, k, v = np.random.RandomState(0).standard_normal((3, 1, 2, 300, 64)).astype(np.float32)
    >>> projection = cudistr.Projection.fit(q, k, rank=32).with_near(64, sinks=8)
    >>> projection
    Projection(heads=2, heads_kv=2, head_dim=64, ranks=(32, 32), near=64, sinks=8)
    >>> cudistr.attention(q, k, v, causal=True, reduction=projection).shape
    (1, 2, 300, 64)
    """

    heads: int
    heads_kv: int
    head_dim: int
    ranks: tuple[int, ...]
    near: int = 0
    sinks: int = 0
    # A and B, (heads_kv, head_dim, rank), but at least a multiplication's 16 columns, or head_dim; zeros beyond a rank.
    queries: NDArray[np.float32] = field(repr=False, kw_only=True)
    keys: NDArray[np.float32] = field(repr=False, kw_only=True)
    mean: NDArray[np.float32] = field(repr=False, kw_only=True)  # of K, (heads_kv, head_dim)
    singular_values: NDArray[np.float64] = field(repr=False, kw_only=True)
    output_errors: NDArray[np.float64] = field(repr=False, kw_only=True)
    row_errors: NDArray[np.float64] = field(repr=False, kw_only=True)
    _copies: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        outline = Fitted(
            self.heads,
            self.heads_kv,
            self.head_dim,
            self.rank,
            self.near,
            self.sinks,
            len(set(self.ranks)) > 1,
        )
        object.__setattr__(self, "_outline", outline)
        for array in (
            self.queries,
            self.keys,
            self.mean,
            self.singular_values,
            self.output_errors,
            self.row_errors,
        ):
            array.setflags(write=False)

    @property
    def outline(self) -> Fitted:
        """All that planning has to know, without arrays."""
        return self.__dict__["_outline"]  # type: ignore[no-any-return]

    @functools.cached_property
    def rank(self) -> int:
        """The largest of ``ranks``."""
        return max(self.ranks, default=0)

    @property
    def score_error(self) -> NDArray[np.float64]:
        """Relative score error of each KV head on the calibration data."""
        squares = self.singular_values**2
        total = squares.sum(axis=1)
        cut = np.array([s[rank:].sum() for s, rank in zip(squares, self.ranks, strict=True)])
        return np.sqrt(cut / np.where(total > 0, total, 1.0))

    @classmethod
    def fit(
        cls,
        q: Any,
        k: Any,
        v: Any = None,
        *,
        rank: int | None = None,
        tolerance: float | None = None,
        causal: bool = False,
        near: int = 0,
        sinks: int = 0,
        scale: float | None = None,
        rows: int | None = None,
        seed: int = 0,
    ) -> Projection:
        """Find the factors on calibration data.

        Parameters
        ----------
        q : array (batch, heads, seqlen_q, head_dim), or a sequence of such arrays
            Queries as :func:`cudistr.attention` takes them; several arrays are several batches of calibration data,
            which may differ in batch and seqlen.
        k : array (batch, heads_kv, seqlen_k, head_dim), or a sequence of such arrays
            The keys of each.
        v : array (batch, heads_kv, seqlen_k, head_dim_v), or a sequence of such arrays, optional
            The values of each. With them the factors have the smallest error of the output instead of the scores, as
            far as a sample of rows tells: use it where you have them.
        rank : int, optional
            Columns of every head: a multiple of 16 below head_dim, 0 included, or head_dim.
        tolerance : float, optional
            Instead of ``rank``: each head gets the smallest rank, in steps of 16 from 0 on, whose ``score_error``, with
            v whose ``output_errors``, is at most this. Between 0 and 1.
        causal, scale
            As :func:`cudistr.attention` will be called: they say which keys are attended to.
        near, sinks : int, default 0
            As for :meth:`with_near`. Rows are weighted by what they see of the other keys.
        rows : int, optional
            Query rows of each head and batch entry that are sampled for the weights, by default 512, or half of those
            that there are. With v, errors are found of the others, at most 2048; of the same if there are no others.
        seed : int, default 0
            Of that sample, 0 to 2**32 - 1.

        Returns
        -------
        Projection

        See Also
        --------
        share : ranks shared out over the heads of all layers.

        Raises
        ------
        TypeError, ValueError
            For arrays that :func:`cudistr.attention` refuses, and for a rank or tolerance out of range.

        Notes
        -----
        The sums over rows run where the arrays are, in float64. They are head_dim x head_dim per head and come to the
        host, which does the rest: the call waits for the device. Fit once per layer, and :meth:`save`.
        """
        if (rank is None) == (tolerance is None):
            came = "neither" if rank is None else "both"
            raise ValueError(
                f"Projection.fit: pass either rank or tolerance, got {came}. Pass rank=32, for example."
            )
        if rank is not None:
            rank = integer("Projection.fit", "rank", rank, "Pass a multiple of 16, 32 for example.")
        elif isinstance(tolerance, bool) or not isinstance(tolerance, int | float | np.integer | np.floating):
            raise TypeError(
                f"Projection.fit: tolerance must be a number, got {type(tolerance).__name__} {tolerance!r}. "
                "Pass a relative error such as 0.01."
            )
        elif not 0 < tolerance < 1:
            raise ValueError(
                f"Projection.fit: tolerance must be between 0 and 1, got {tolerance}. "
                "Pass a relative error such as 0.01."
            )
        near, sinks = exact_keys("Projection.fit", near, sinks)
        asked, seed = normalize.check_sample(WEIGHT_ROWS if rows is None else rows, seed)
        batches = _batches(q, k, v)
        sums = _Sums(near, sinks, causal, scale, None if rows is None else asked, seed)
        for batch in batches:
            sums.add(*batch)
        full = sums.best()
        if v is not None:
            of_batches = [sums.errors(full, *batch) for batch in batches]
            *squares, worst = (np.stack(x) for x in zip(*of_batches, strict=True))
            errors, sizes = (x.sum(axis=0) for x in squares)
            full = dataclasses.replace(
                full,
                output_errors=np.sqrt(errors / np.maximum(sizes, np.finfo(float).tiny)),
                row_errors=np.sqrt(worst.max(axis=0)),
            )
        allowed = ranks_allowed(full.head_dim)
        if rank is None:
            assert tolerance is not None
            return full._cut([_rank(full, h, tolerance, allowed) for h in range(full.heads_kv)])
        if rank not in allowed:
            raise ValueError(
                f"Projection.fit: rank must be a multiple of {RANK_MULTIPLE} below head_dim, or head_dim, got {rank}. "
                f"Allowed here: {', '.join(map(str, allowed))}."
            )
        return full._cut([rank] * full.heads_kv)

    @staticmethod
    def share(projections: Sequence[Projection], rank: int) -> list[Projection]:
        """Ranks that differ from head to head, for the smallest sum of squared output errors.

        Parameters
        ----------
        projections : sequence of Projection
            Those of all layers of a model, each fitted with v and ``rank=head_dim``.
        rank : int
            The mean over all KV heads of all layers. Heads may get 0, and others more for it.

        Returns
        -------
        list of Projection
            One for each, with the same near and sinks.

        Raises
        ------
        TypeError, ValueError
            If a projection has no ``output_errors``, or was cut to a lower rank.

        Notes
        -----
        Every choice of one rank per head whose mean is at most ``rank`` is compared, by dynamic programming.
        """
        rank = integer("Projection.share", "rank", rank, "Pass a mean rank, 32 for example.")
        costs, columns = [], []
        for projection in projections:
            if not isinstance(projection, Projection):
                raise TypeError(
                    f"Projection.share: projections must be cudistr.Projection, got {type(projection).__name__}."
                )
            allowed = ranks_allowed(projection.head_dim)
            known = projection.output_errors.shape == (projection.heads_kv, len(allowed))
            if not known or set(projection.ranks) != {projection.head_dim}:
                raise ValueError(
                    "Projection.share: every projection must be fitted with v and rank=head_dim, got "
                    f"{projection!r}. Pass Projection.fit(q, k, v, rank={projection.head_dim})."
                )
            costs += list(projection.output_errors**2)
            columns += [allowed] * projection.heads_kv
        if rank < 0:
            raise ValueError(
                f"Projection.share: rank must not be negative, got {rank}. Pass a mean rank, 32 for example."
            )
        chosen = iter(_shared(costs, columns, rank * len(costs)))
        return [p._cut([next(chosen) for _ in range(p.heads_kv)]) for p in projections]

    def _cut(self, ranks: Sequence[int]) -> Projection:
        """The same with fewer columns: those of a rank are the first of any higher one."""
        stored = max([*ranks, min(RANK_MULTIPLE, self.head_dim)])
        keep = np.arange(stored) < np.array(ranks)[:, None]
        a, b = (np.where(keep[:, None], x[:, :, :stored], np.float32(0)) for x in (self.queries, self.keys))
        return dataclasses.replace(self, ranks=tuple(ranks), queries=a, keys=b, _copies={})

    def with_near(self, near: int, *, sinks: int = 0) -> Projection:
        """The same projection, with keys that stay exact.

        Parameters
        ----------
        near : int
            Keys less than ``near`` positions away from a query's own position (bottom-right aligned) keep the full
            score product: with a causal mask the last ``near`` keys, the query's own included. 0 is none; beyond the
            length of the sequence everything is exact.
        sinks : int, default 0
            The first ``sinks`` keys keep the full score product too.

        Raises
        ------
        TypeError, ValueError
            If one is not an integer, or negative.

        Notes
        -----
        From 4096 keys and 65 queries on, whole blocks stay exact: if a key is exact for a query, all keys of its
        block are, for all queries of the query's block. Blocks are counted from the first query and the first key.
        They have 128 queries and 192 keys; with ``head_dim_v`` up to 64, 384 and 128; with more than 128, 128 and 128.
        So there may be more exact keys than asked for, never fewer, and a call is faster (see "Exact keys" in the
        documentation).
        """
        near, sinks = exact_keys("Projection.with_near", near, sinks)
        return dataclasses.replace(self, near=near, sinks=sinks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file in NumPy's npz format, under exactly this name."""
        with open(path, "wb") as file:  # a file object, because savez would add .npz to a name without it
            np.savez(
                file,
                format=np.array(FORMAT),
                numbers=np.array([self.heads, self.near, self.sinks]),
                ranks=np.array(self.ranks, np.int64),
                queries=self.queries,
                keys=self.keys,
                mean=self.mean,
                singular_values=self.singular_values,
                output_errors=self.output_errors,
                row_errors=self.row_errors,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Projection:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                content = dict(file)
        except (ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
            raise _not_ours(path) from error
        if str(content.get("format")) != FORMAT:
            raise _not_ours(path)
        heads, near, sinks = (int(x) for x in content["numbers"])
        ranks = tuple(int(x) for x in content["ranks"])
        heads_kv, head_dim, _ = content["queries"].shape
        names = ("queries", "keys", "mean", "singular_values", "output_errors", "row_errors")
        for name in names[-2:]:
            content.setdefault(name, np.zeros((heads_kv, 0)))  # files of version 0.1 have none
        arrays = {name: content[name] for name in names}
        return cls(heads, heads_kv, head_dim, ranks, near, sinks, **arrays)

    # Calls ask for these every time.
    @functools.cached_property
    def mixed(self) -> bool:
        """Whether a kernel has to be told how many columns each head uses."""
        return len(set(self.ranks)) > 1 or 0 in self.ranks

    @functools.cached_property
    def reduced(self) -> frozenset[int]:
        """The ranks of heads that are not exact."""
        return frozenset(rank for rank in self.ranks if rank < self.head_dim)

    @functools.cached_property
    def alike(self) -> bool:
        """Whether heads that are not exact all use the same columns, and some."""
        return len(self.reduced) == 1 and 0 not in self.reduced

    @functools.cached_property
    def columns(self) -> int:
        """Columns of Qhat and Khat. Heads that use head_dim columns use those of q and k themselves."""
        # At least those of one matrix instruction.
        return max([*self.reduced, min(RANK_MULTIPLE, self.head_dim)])

    def check_mean(self, dtype: str) -> None:
        """Refuse a dtype in which keys with the mean of the calibration keys cannot be."""
        if dtype != "float16":
            return
        largest = float(np.abs(self.mean).max(initial=0.0))
        if largest > float(np.finfo(np.float16).max):
            raise ValueError(
                f"reduction: the mean of the projection's calibration keys reaches {largest:.6g}, beyond float16 "
                "(65504), which k is. Fit the projection on keys like those of this call, or pass q, k and v as "
                "bfloat16 or float32."
            )

    def factors(self, dtype: Any, index: int) -> Factors:
        """The factors on a device, which must be the current one; copied once."""
        key = index, np.dtype(dtype).name
        if key not in self._copies:
            import cupy

            columns = self.columns
            # A Hopper kernel copies whole panels, so these are made whole.
            widths = [
                -1 if r == self.head_dim else min(columns, -(-r // PANEL_COLUMNS) * PANEL_COLUMNS)
                for r in self.ranks
            ]
            bias = (self.mean[:, None].astype(np.float64) @ self.keys)[:, 0, :columns]
            host = (
                *(
                    in_lanes(in_parts(x.swapaxes(1, 2)[:, :columns], dtype), PROJECT_GROUP)
                    for x in (self.queries, self.keys)
                ),
                bias.astype(np.float32),
                in_lanes(mean_columns(self.mean, dtype), lowrank.SKETCH)[..., :4, :],
                np.array(widths, np.int32),
                in_lanes(in_parts(self.sketch().astype(np.float32).swapaxes(1, 2), dtype), lowrank.SKETCH),
            )
            self._copies[key] = Factors(*(cupy.asarray(np.ascontiguousarray(x)) for x in host))
            cupy.cuda.get_current_stream().synchronize()  # once: later calls may come on any stream
        copy: Factors = self._copies[key]
        return copy

    def sketch(self) -> NDArray[np.float64]:
        """Random vectors less what the factors keep of them, (heads_kv, head_dim, 16).

        A score is ``q k``, its reduction ``q A B^T k``: with ``k`` drawn at random, ``|q (1 - A B^T) k|`` says how much
        of a query is missed.
        """
        vectors = lowrank.sketch_vectors(self.head_dim)
        a, b = (x.astype(np.float64) for x in (self.queries, self.keys))
        return vectors - a @ (b.swapaxes(1, 2) @ vectors)

    def known(self) -> NDArray[np.float32]:
        """Squares of each head's ``output_errors`` at its rank, and of ROW_MARGIN ``row_errors``, (heads, 2).

        They are 0 where the fit has none.
        """
        if not self.output_errors.size or not self.row_errors.size:
            return np.zeros((self.heads, 2), np.float32)
        at = [ranks_allowed(self.head_dim).index(rank) for rank in self.ranks]
        own = np.stack(
            [x[np.arange(self.heads_kv), at] for x in (self.output_errors, ROW_MARGIN * self.row_errors)],
            axis=1,
        )
        return np.repeat(np.square(own).astype(np.float32), self.heads // self.heads_kv, axis=0)

    def narrowed(self, tolerance: float) -> Projection:
        """The same, with heads exact that a call with this tolerance would find to be so: by what the fit knows."""
        key = "tolerance", tolerance, self.near, self.sinks  # copies are those of any exact keys
        if key not in self._copies:
            known = self.known()[:: max(1, self.heads // self.heads_kv), 0]
            limit = np.float32(tolerance**2)
            ranks = tuple(r if x <= limit else self.head_dim for r, x in zip(self.ranks, known, strict=True))
            copies = self._copies.setdefault(("ranks", *ranks), {})
            other = ranks != self.ranks
            self._copies[key] = dataclasses.replace(self, ranks=ranks, _copies=copies) if other else None
        found: Projection | None = self._copies[key]
        return self if found is None else found

    def head_errors(self, batch: int, index: int) -> Any:
        """The same for each batch entry, (batch, heads, 2) on the current device; copied once."""
        key = "errors", index, batch
        if key not in self._copies:
            import cupy

            self._copies[key] = cupy.asarray(np.tile(self.known(), (batch, 1, 1)))
            cupy.cuda.get_current_stream().synchronize()
        return self._copies[key]

    def head_ranks(self, batch: int, index: int) -> Any:
        """Columns that each head of each batch entry uses, int32 (batch, heads) on the current device; copied once."""
        key = index, batch
        if key not in self._copies:
            import cupy

            ranks = np.repeat(np.array(self.ranks, np.int32), self.heads // self.heads_kv)
            self._copies[key] = cupy.asarray(np.tile(ranks, (batch, 1)))
            cupy.cuda.get_current_stream().synchronize()
        return self._copies[key]


def in_parts(factor: NDArray[Any], dtype: Any, count: int | None = None) -> NDArray[Any]:
    """A factor (units, columns, head_dim) as (units, parts, columns, head_dim), whose sum over the parts it is.

    Two parts are made of 16-bit dtypes, the rounded number and the rest, and one of float32, if no count is given.
    """
    parts = []
    for _ in range(count or 4 // np.dtype(dtype).itemsize):
        parts.append(factor.astype(dtype))
        factor = factor - parts[-1].astype(np.float32)
    return np.stack(parts, axis=1)


def mean_columns(mean: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """The mean (units, head_dim) as two columns whose parts all together it is: bfloat16 needs three for float32."""
    parts = 4 // np.dtype(dtype).itemsize
    split = in_parts(mean[:, None], dtype, 2 * parts)
    return split.reshape(len(mean), 2, parts, -1).swapaxes(1, 2)


def in_lanes(factor: NDArray[Any], group: int) -> NDArray[np.uint32]:
    """Columns (units, parts, columns, head_dim) in the order in which smxx_project.cu reads them, in words of 32 bits.

    The result is (units, columns / 16, parts, steps, 32, 4), for the left operand of matrix instructions of 16 rows,
    which are columns here: lane ``4 g + t`` has rows ``g`` and ``g + 8``. Of the ``group`` columns that are multiplied
    at once, its rows are neighbours. Along head_dim, the words of 64 bytes are dealt out to lanes ``t`` in fours, two
    for each of two steps. Columns are filled up to whole groups, and head_dim to 64 bytes, with zeros.
    """
    units, parts, columns, head_dim = factor.shape
    padding = ((0, 0), (0, 0), (0, -columns % group), (0, -head_dim % (64 // factor.itemsize)))
    words = np.pad(factor, padding).view(np.uint32)
    # unit, part, group, g, tile of the group, row; 64 bytes, t, step, word
    words = words.reshape(units, parts, -1, 8, group // 16, 2, words.shape[3] // 16, 4, 2, 2)
    words = words.transpose(0, 2, 4, 1, 6, 8, 3, 7, 9, 5)
    return words.reshape(units, -1, parts, words.shape[4] * 2, 32, 4)


def _not_ours(path: Any) -> ValueError:
    return ValueError(
        f"path: {os.fspath(path)!r} was not written by Projection.save. Fit and save one first."
    )


def ranks_allowed(head_dim: int) -> list[int]:
    """Multiples of 16 below head_dim, 0 included, and head_dim."""
    return [*range(0, head_dim, RANK_MULTIPLE), head_dim]


def _batches(q: Any, k: Any, v: Any) -> list[tuple[Any, Any, Any]]:
    """Arrays or lists of arrays as a list of batches; v may be None."""
    given = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    many = {name: isinstance(x, list | tuple) for name, x in given.items()}
    if len(set(many.values())) > 1:
        raise TypeError(
            f"Projection.fit: {' and '.join(given)} must be all arrays or all lists of arrays, got "
            f"{' and '.join(type(x).__name__ for x in given.values())}."
        )
    if not many["q"]:
        return [(q, k, v)]
    lengths = [len(x) for x in given.values()]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(
            f"Projection.fit: {' and '.join(given)} must be lists of one length, at least 1, got "
            f"{' and '.join(map(str, lengths))}. Pass the keys of each batch of queries."
        )
    return list(zip(q, k, [None] * len(q) if v is None else v, strict=True))


class _Sums:
    """What the factors need of the calibration data: sums of products, head_dim x head_dim per KV head."""

    def __init__(
        self, near: int, sinks: int, causal: bool, scale: float | None, rows: int | None, seed: int
    ) -> None:
        self.first: normalize.Problem | None = None
        self.count = 0
        self.near, self.sinks, self.causal, self.scale = near, sinks, causal, scale
        self.rows, self.seed = rows, seed

    def problem(self, q: Any, k: Any, v: Any) -> normalize.Problem:
        """The checked call of one batch, its exact keys included."""
        problem = normalize.problem(q, k, k if v is None else v, causal=self.causal, scale=self.scale)
        return normalize.keeping(problem, self.near, self.sinks)

    def add(self, q: Any, k: Any, v: Any) -> None:
        """Count one batch in."""
        adopted = normalize.adopt(q=q, k=k, **({} if v is None else {"v": v}))
        q, k, *rest = adopted.arrays
        v = rest[0] if rest else None
        problem = self.problem(q, k, v)
        head_dim = problem.head_dim
        if self.first is None:
            self.first = problem
            # Q^T Q, K^T K and the sum of K's rows, one below the other; then the weighted two.
            self.sums = np.zeros((problem.heads_kv, 2 * head_dim + 1, head_dim))
            self.weighted = np.zeros((2, problem.heads_kv, head_dim, head_dim))
        for name in ("heads", "heads_kv", "head_dim"):
            size, other = getattr(self.first, name), getattr(problem, name)
            if size != other:
                raise ValueError(
                    f"Projection.fit: every batch must have the {name} of the first, {size}, got {other}. "
                    "Fit one projection per layer."
                )
        if problem.empty:
            return
        shared = problem.heads // problem.heads_kv
        xp = np if problem.device is None else importlib.import_module("cupy")
        # What is not finite is refused when all sums are there.
        with launch.placed(problem.device, adopted.stream), np.errstate(invalid="ignore", over="ignore"):
            for b in range(problem.batch):
                sums: list[Any] = []
                for h in range(problem.heads_kv):
                    rows = wide(q[b, h * shared : (h + 1) * shared], xp).reshape(-1, head_dim)
                    keys = wide(k[b, h], xp)
                    sums.append(xp.concatenate([rows.T @ rows, keys.T @ keys, keys.sum(axis=0)[None]]))
                    of_head = range(h * shared, (h + 1) * shared)
                    if v is None:
                        own = [q[b, j] for j in of_head]
                        self.weighted[1, h] += _host(_received(own, k[b, h], problem, self._drawn, xp))
                        continue
                    for j in of_head:
                        self.weighted[:, h] += _host(
                            _felt(q[b, j], k[b, h], v[b, h], problem, self._drawn, xp)
                        )
                self.sums += _host(xp.stack(sums))
        self.count += problem.batch * problem.seqlen_k

    def _seeing(self, problem: normalize.Problem) -> NDArray[np.intp]:
        """Rows of one head that see keys which are not exact."""
        return np.flatnonzero(reference.reduced_count(problem) > 0)

    def _drawn(self, problem: normalize.Problem) -> NDArray[np.intp]:
        """A sample of these rows, or all."""
        seeing = self._seeing(problem)
        # Some are left for the errors, if nobody asked for all.
        count = min(WEIGHT_ROWS, (len(seeing) + 1) // 2) if self.rows is None else self.rows
        return self._sample(seeing, 0, count)

    def _held_out(self, problem: normalize.Problem) -> NDArray[np.intp]:
        """Those that were not drawn, which the factors fit too well; the same ones if there are no others."""
        seeing, drawn = self._seeing(problem), self._drawn(problem)
        return self._sample(np.setdiff1d(seeing, drawn), 1, ERROR_ROWS) if len(drawn) < len(seeing) else drawn

    def _sample(self, rows: NDArray[np.intp], stream: int, count: int) -> NDArray[np.intp]:
        if len(rows) <= count:
            return rows
        random = np.random.RandomState([self.seed, stream])
        return np.sort(random.choice(rows, count, replace=False))

    def best(self) -> Projection:
        """The factors of these sums, all columns of them."""
        first = self.first
        assert first is not None
        head_dim = first.head_dim
        if self.count == 0 or first.heads == 0:
            raise ValueError(
                "Projection.fit: there must be at least one query and one key, got arrays without. "
                "Pass calibration data."
            )
        if not (np.isfinite(self.sums).all() and np.isfinite(self.weighted).all()):
            raise ValueError(
                "Projection.fit: q, k and v must be finite, got NaN or infinity. Leave such rows away."
            )
        queries, keys = self.sums[:, :head_dim], self.sums[:, head_dim : 2 * head_dim]
        mean = self.sums[:, 2 * head_dim] / self.count
        keys = keys - self.count * mean[:, :, None] * mean[:, None, :]
        root = _root(_mixed(queries, self.weighted[0], PLAIN_QUERIES))
        keys = _mixed(keys, self.weighted[1], PLAIN_KEYS)
        # Eigenvalues, which take a fraction of the time of a singular value decomposition.
        squares, u = (x[..., ::-1] for x in np.linalg.eigh(root @ keys @ root.swapaxes(1, 2)))
        s = np.sqrt(np.maximum(squares, 0.0))
        used = s > NOISE * s[:, :1]
        weights = np.where(used, 1.0 / np.sqrt(np.where(used, s, 1.0)), 0.0)[:, None]
        b = root.swapaxes(1, 2) @ u * weights
        a = keys @ b * weights**2
        return Projection(
            first.heads,
            first.heads_kv,
            head_dim,
            (head_dim,) * first.heads_kv,
            self.near,
            self.sinks,
            queries=a.astype(np.float32),
            keys=b.astype(np.float32),
            mean=mean.astype(np.float32),
            singular_values=s,
            output_errors=np.zeros((first.heads_kv, 0)),
            row_errors=np.zeros((first.heads_kv, 0)),
        )

    def errors(
        self, full: Projection, q: Any, k: Any, v: Any
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Of one batch and each KV head, over the rows that are held out.

        Squared output errors (heads_kv, ranks), squared outputs (heads_kv, 1), and the largest squared error of a row
        over the mean squared output (heads_kv, ranks).
        """
        adopted = normalize.adopt(q=q, k=k, v=v)
        q, k, v = adopted.arrays
        problem = self.problem(q, k, v)
        allowed = ranks_allowed(problem.head_dim)
        found = np.zeros((problem.heads_kv, len(allowed) + 1))
        worst = np.zeros((problem.heads_kv, len(allowed)))
        if problem.empty:
            return found[:, :-1], found[:, -1:], worst
        rows = self._held_out(problem)
        chances = reference.chances(np.zeros(problem.seqlen_q), problem)
        missed = 1 - np.minimum(1.0, PROBE_ROWS * chances[rows] / chances.sum())  # by a call's sample
        shared = problem.heads // problem.heads_kv
        xp = np if problem.device is None else importlib.import_module("cupy")
        with launch.placed(problem.device, adopted.stream):
            factors = [xp.asarray(x) for x in (full.queries, full.keys, full.mean)]
            for b, j in np.ndindex(problem.batch, problem.heads):
                h = j // shared
                own = [x[h] for x in factors]
                errors, size = _felt_ranks(q[b, j], k[b, h], v[b, h], own, allowed, problem, rows, xp)
                found[h] += [*errors.sum(axis=1), size]
                if size:
                    largest = (errors * missed).max(axis=1)
                    worst[h] = np.maximum(worst[h], largest * (len(rows) / size))
        return found[:, :-1], found[:, -1:], worst


def _single(array: Any, xp: Any) -> Any:
    return xp.ascontiguousarray(array.astype(np.float32))


def _host(array: Any) -> NDArray[np.float64]:
    """The array as a NumPy array in float64."""
    return np.asarray(array if type(array) is np.ndarray else array.get(), np.float64)


def _softmax(scores: Any, xp: Any) -> Any:
    """Rows of weights; a row that sees nothing is all zeros."""
    top = scores.max(axis=1, keepdims=True)
    weights = xp.exp(scores - xp.where(top == -np.inf, np.float32(0), top))
    total = weights.sum(axis=1, keepdims=True)
    return weights / xp.where(total == 0, np.float32(1), total)


def _weights(
    q: Any, keys: Any, problem: normalize.Problem, every: NDArray[np.intp], xp: Any
) -> Iterator[tuple[Any, Any, Any]]:
    """Of some rows of one head, some at a time: which, their queries, and the softmax over all keys."""
    step = max(1, MAX_WEIGHTED // max(problem.seqlen_k, problem.head_dim * problem.head_dim_v))
    for start in range(0, len(every), step):
        rows = xp.asarray(every[start : start + step])
        queries = _single(q[rows], xp)
        scores = np.float32(problem.scale) * (queries @ keys.T)
        seen = reference.visible(rows, problem, xp)
        yield rows, queries, _softmax(xp.where(seen, scores, np.float32(-np.inf)), xp)


def _received(heads: list[Any], k: Any, problem: normalize.Problem, drawn: Any, xp: Any) -> Any:
    """Of a KV head: ``sum_j w_j k_j k_j^T`` of keys less their mean, w what they get of the drawn rows."""
    keys, centred = _single(k, xp), wide(k, xp)
    centred -= centred.mean(axis=0)
    received = xp.zeros(problem.seqlen_k)
    for q in heads:
        for rows, _, weights in _weights(q, keys, problem, drawn(problem), xp):
            received += xp.where(reference.kept(rows, problem, xp), np.float32(0), weights).sum(axis=0)
    return centred.T @ (received[:, None] * centred)


def _felt(q: Any, k: Any, v: Any, problem: normalize.Problem, drawn: Any, xp: Any) -> Any:
    """Of one head: ``sum ||G||^2 q q^T`` and ``sum G^T G`` over the drawn rows, see the notes of `Projection`."""
    keys, values = _single(k, xp), _single(v, xp)
    centred = keys - keys.mean(axis=0)
    head_dim, head_dim_v = problem.head_dim, problem.head_dim_v
    total = xp.zeros((2, head_dim, head_dim))
    key_step = max(1, MAX_WEIGHTED // (head_dim * head_dim_v))
    for rows, queries, weights in _weights(q, keys, problem, drawn(problem), xp):
        out = weights @ values
        weights = xp.where(reference.kept(rows, problem, xp), np.float32(0), weights)
        felt = -out[:, :, None] * (weights @ centred)[:, None]
        for first in range(0, problem.seqlen_k, key_step):  # v k^T of each key, then one product for all rows
            own = slice(first, first + key_step)
            pairs = (values[own, :, None] * centred[own, None]).reshape(-1, head_dim_v * head_dim)
            felt += (weights[:, own] @ pairs).reshape(felt.shape)
        flat = felt.reshape(-1, head_dim)
        total[0] += (queries * (felt**2).sum(axis=(1, 2))[:, None]).T @ queries
        total[1] += flat.T @ flat
    return total


def _felt_ranks(
    q: Any,
    k: Any,
    v: Any,
    factors: list[Any],
    allowed: list[int],
    problem: normalize.Problem,
    every: NDArray[np.intp],
    xp: Any,
) -> tuple[NDArray[np.float64], float]:
    """Of some rows of one head: squared output errors (ranks, rows), and the sum of all squared outputs."""
    a, b, mean = factors
    scale = np.float32(problem.scale)
    keys, values = _single(k, xp), _single(v, xp)
    khat = (keys - mean) @ b
    found = xp.zeros((len(allowed) + 1, len(every)), np.float32)
    step = max(1, (MAX_CACHED if xp is np else MAX_WEIGHTED) // problem.seqlen_k)
    for start in range(0, len(every), step):
        some = slice(start, start + step)
        rows = xp.asarray(every[some])
        queries = _single(q[rows], xp)
        qhat, shift = queries @ a, (queries @ mean)[:, None]
        unseen = ~reference.visible(rows, problem, xp)
        kept = reference.kept(rows, problem, xp)
        exact = scale * (queries @ keys.T)
        out = _softmax(xp.where(unseen, np.float32(-np.inf), exact), xp) @ values
        for i, rank in enumerate(allowed):
            scores = xp.where(kept, exact, scale * (qhat[:, :rank] @ khat[:, :rank].T + shift))
            error = _softmax(xp.where(unseen, np.float32(-np.inf), scores), xp) @ values - out
            found[i, some] = (error**2).sum(axis=1)
        found[-1, some] = (out**2).sum(axis=1)
    *errors, sizes = _host(found)
    return np.stack(errors), float(sizes.sum())


def _mixed(plain: NDArray[np.float64], weighted: NDArray[np.float64], part: float) -> NDArray[np.float64]:
    """Weighted sums with a part of the plain ones, by their traces; the plain ones where there are no weights."""
    traces = [np.trace(x, axis1=1, axis2=2)[:, None, None] for x in (plain, weighted)]
    some = (traces[0] > 0) & (traces[1] > 0)
    scaled = weighted * np.where(some, traces[0] / np.where(some, traces[1], 1.0), 0.0)
    return np.where(some, (scaled + part * plain) / (1 + part), plain)


def _root(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """C with C^T C = squares, for each head: a Cholesky factor, or by eigenvalues where the matrix lacks full rank."""
    root = np.empty_like(squares)
    for head, square in enumerate(squares):
        try:
            root[head] = np.linalg.cholesky(square).T
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(square)
            root[head] = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    return root


def _rank(full: Projection, head: int, tolerance: float, allowed: list[int]) -> int:
    """The smallest rank whose error is at most the tolerance; head_dim if none is."""
    s = full.singular_values[head]
    if full.output_errors.size:
        within = full.output_errors[head] <= tolerance
    else:
        within = np.array([(s[rank:] ** 2).sum() for rank in allowed]) <= tolerance**2 * (s**2).sum()
    return next((rank for rank, fits in zip(allowed, within, strict=True) if fits), allowed[-1])


def _shared(costs: list[NDArray[np.float64]], columns: list[list[int]], total: int) -> list[int]:
    """One rank for each head, the sum of them at most ``total``, with the smallest sum of costs."""
    size = total // RANK_UNIT
    best = np.zeros(size + 1)  # of the heads so far, by the columns that they may use
    choices = []
    for cost, ranks in zip(costs, columns, strict=True):
        options = np.full((len(ranks), size + 1), np.inf)
        for option, rank, error in zip(options, ranks, cost, strict=True):
            units = rank // RANK_UNIT
            option[units:] = best[: max(0, size + 1 - units)] + error
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    ranks_found = []
    for choice, ranks in zip(reversed(choices), reversed(columns), strict=True):
        ranks_found.append(ranks[choice[size]])
        size -= ranks_found[-1] // RANK_UNIT
    return ranks_found[::-1]
