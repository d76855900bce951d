"""A reduction of the score product by the best low-rank factors of calibration scores, per head."""

from __future__ import annotations

import dataclasses
import importlib
import os
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cudistr import launch, normalize
from cudistr.launch import Factors
from cudistr.plan import PANEL_COLUMNS
from cudistr.reductions import RANK_MULTIPLE, LowRank, Reduction, exact_keys, integer

__all__ = ["Projection", "wide"]

FORMAT = "cudistr projection 1"
# Of the largest singular value: below, float64 sums of squares have no digit left (the square root of its epsilon).
NOISE = 1e-7
SKETCH = 16  # random vectors; columns of one matrix instruction


def wide(array: Any, xp: Any) -> Any:
    """A contiguous copy in float64; by way of float32, because bfloat16 has no direct way there."""
    return xp.ascontiguousarray(array.astype(np.float32).astype(np.float64))


@dataclass(frozen=True, eq=False)
class Projection(Reduction):
    """Reduce the score product to the best ``rank`` columns for each head, found on calibration data.

    ``Qhat = Q A`` and ``Khat = (K - mean) B`` are made once per call, and the score product sums over ``rank``
    instead of head_dim columns. Make one with :meth:`fit` or :meth:`load`.

    This is an approximation. How good it is depends on how alike the calibration data and the data of a call are;
    :func:`cudistr.attention_error` measures it.

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
        each row. Exactly the part of ``singular_values`` that was cut off.
    singular_values : float64 array (heads_kv, head_dim)
        Of the scores of all calibration queries with all calibration keys, largest first.

    Notes
    -----
    Softmax does not see a constant added to a row, so the mean of K is taken off first. With square roots
    ``Cq^T Cq = Q^T Q`` and ``Ck^T Ck = K^T K`` (head_dim x head_dim, float64, from eigenvalues) and the singular value
    decomposition ``Cq Ck^T = U s W^T``, the factors ``A = Ck^T W / sqrt(s)`` and ``B = Cq^T U / sqrt(s)``, cut to rank
    columns, give the best approximation of ``Q K^T`` of that rank (Eckart and Young, *Psychometrika* 1, 1936), and
    its squared Frobenius error is the sum of the squared singular values that were cut off. Under grouped-query
    attention the queries of all heads that share a KV head count together.

    On a GPU one kernel makes Qhat and Khat, and the attention kernel takes from them as many columns as a head uses. A
    head whose rank is head_dim is exact: it multiplies q and k themselves.

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
    queries: NDArray[np.float32] = field(repr=False, kw_only=True)  # A, (heads_kv, head_dim, rank)
    keys: NDArray[np.float32] = field(repr=False, kw_only=True)  # B, (heads_kv, head_dim, rank)
    mean: NDArray[np.float32] = field(repr=False, kw_only=True)  # of K, (heads_kv, head_dim)
    singular_values: NDArray[np.float64] = field(repr=False, kw_only=True)
    _copies: dict[tuple[int, Any], Any] = field(default_factory=dict, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        outline = LowRank(
            self.heads,
            self.heads_kv,
            self.head_dim,
            self.rank,
            self.near,
            self.sinks,
            len(set(self.ranks)) > 1,
        )
        object.__setattr__(self, "_outline", outline)
        for array in (self.queries, self.keys, self.mean, self.singular_values):
            array.setflags(write=False)

    @property
    def outline(self) -> LowRank:
        """All that planning has to know, without arrays."""
        return self.__dict__["_outline"]  # type: ignore[no-any-return]

    @property
    def rank(self) -> int:
        """Columns of Qhat and Khat: the largest of ``ranks``."""
        return max(self.ranks, default=RANK_MULTIPLE)

    @property
    def score_error(self) -> NDArray[np.float64]:
        """Relative score error of each KV head on the calibration data."""
        squares = self.singular_values**2
        total = squares.sum(axis=1)
        cut = np.array([s[rank:].sum() for s, rank in zip(squares, self.ranks, strict=True)])
        return np.sqrt(cut / np.where(total > 0, total, 1.0))

    @classmethod
    def fit(cls, q: Any, k: Any, *, rank: int | None = None, tolerance: float | None = None) -> Projection:
        """Find the factors on calibration data.

        Parameters
        ----------
        q : array (batch, heads, seqlen_q, head_dim), or a sequence of such arrays
            Queries as :func:`cudistr.attention` takes them; several arrays are several batches of calibration data,
            which may differ in batch and seqlen.
        k : array (batch, heads_kv, seqlen_k, head_dim), or a sequence of such arrays
            The keys of each.
        rank : int, optional
            Columns of every head: a multiple of 16 below head_dim, or head_dim.
        tolerance : float, optional
            Instead of ``rank``: each head gets the smallest rank, in steps of 16, whose ``score_error`` is at most
            this. Between 0 and 1.

        Returns
        -------
        Projection

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
        many = isinstance(q, list | tuple), isinstance(k, list | tuple)
        if many[0] != many[1]:
            raise TypeError(
                "Projection.fit: q and k must be both arrays or both lists of arrays, got "
                f"{type(q).__name__} and {type(k).__name__}."
            )
        batches = list(zip(q, k, strict=False)) if many[0] else [(q, k)]
        if not batches or (many[0] and len(q) != len(k)):
            raise ValueError(
                f"Projection.fit: q and k must be lists of one length, at least 1, got {len(q)} and {len(k)}. "
                "Pass the keys of each batch of queries."
            )
        sums = _Sums()
        for queries, keys in batches:
            sums.add(queries, keys)
        return sums.best(rank, tolerance)

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
        arrays = {name: content[name] for name in ("queries", "keys", "mean", "singular_values")}
        return cls(heads, heads_kv, head_dim, ranks, near, sinks, **arrays)

    @property
    def mixed(self) -> bool:
        """Whether a kernel has to be told how many columns each head uses."""
        return self.head_dim % RANK_MULTIPLE == 0 and len(set(self.ranks)) > 1

    @property
    def columns(self) -> int:
        """Columns of Qhat and Khat. Heads that use head_dim columns use those of q and k themselves."""
        return max((r for r in self.ranks if r < self.head_dim or not self.mixed), default=RANK_MULTIPLE)

    def factors(self, dtype: Any, index: int) -> Factors:
        """The factors on a device, which must be the current one; copied once."""
        key = index, np.dtype(dtype).name
        if key not in self._copies:
            import cupy

            columns = self.columns
            # A Hopper kernel copies whole panels, so these are made whole.
            widths = [
                0 if r > columns else min(columns, -(-r // PANEL_COLUMNS) * PANEL_COLUMNS) for r in self.ranks
            ]
            bias = (self.mean[:, None].astype(np.float64) @ self.keys)[:, 0, :columns]
            host = (
                *(in_parts(x.swapaxes(1, 2)[:, :columns], dtype) for x in (self.queries, self.keys)),
                bias.astype(np.float32),
                self.mean,
                np.array(widths, np.int32),
                in_parts(self.sketch().astype(np.float32).swapaxes(1, 2), dtype),
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
        vectors = np.random.RandomState(0).standard_normal((self.head_dim, SKETCH))
        a, b = (x.astype(np.float64) for x in (self.queries, self.keys))
        return vectors - a @ (b.swapaxes(1, 2) @ vectors)

    def head_ranks(self, batch: int, index: int) -> Any:
        """Columns that each head of each batch entry uses, int32 (batch, heads) on the current device; copied once."""
        key = index, batch
        if key not in self._copies:
            import cupy

            ranks = np.repeat(np.array(self.ranks, np.int32), self.heads // self.heads_kv)
            self._copies[key] = cupy.asarray(np.tile(ranks, (batch, 1)))
            cupy.cuda.get_current_stream().synchronize()
        return self._copies[key]


def in_parts(factor: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """A factor (units, columns, head_dim) as smxx_project.cu takes it, (units, parts, columns, head_dim)."""
    rounded = factor.astype(dtype)
    if rounded.dtype.itemsize == 4:
        return rounded[:, None]
    return np.stack([rounded, (factor - rounded.astype(np.float32)).astype(dtype)], axis=1)


def _not_ours(path: Any) -> ValueError:
    return ValueError(
        f"path: {os.fspath(path)!r} was not written by Projection.save. Fit and save one first."
    )


class _Sums:
    """What the factors need of the calibration data: sums of products, head_dim x head_dim per KV head."""

    def __init__(self) -> None:
        self.first: normalize.Problem | None = None
        self.count = 0

    def add(self, q: Any, k: Any) -> None:
        """Count one batch in."""
        adopted = normalize.adopt(q=q, k=k)
        q, k = adopted.arrays
        problem = normalize.problem(q, k, k)
        if self.first is None:
            self.first = problem
            # Q^T Q, K^T K and the sum of K's rows, one below the other.
            self.sums = np.zeros((problem.heads_kv, 2 * problem.head_dim + 1, problem.head_dim))
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
        with launch.placed(problem.device, adopted.stream):
            for b in range(problem.batch):
                sums: list[Any] = []
                for h in range(problem.heads_kv):
                    rows = wide(q[b, h * shared : (h + 1) * shared], xp).reshape(-1, problem.head_dim)
                    keys = wide(k[b, h], xp)
                    sums.append(xp.concatenate([rows.T @ rows, keys.T @ keys, keys.sum(axis=0)[None]]))
                every = xp.stack(sums)
                self.sums += every if xp is np else every.get()
        self.count += problem.batch * problem.seqlen_k

    def best(self, rank: int | None, tolerance: float | None) -> Projection:
        """The factors of these sums."""
        first = self.first
        assert first is not None
        head_dim = first.head_dim
        if self.count == 0 or first.heads == 0:
            raise ValueError(
                "Projection.fit: there must be at least one query and one key, got arrays without. "
                "Pass calibration data."
            )
        if not np.isfinite(self.sums).all():
            raise ValueError(
                "Projection.fit: q and k must be finite, got NaN or infinity. Leave such rows away."
            )
        allowed = [*range(RANK_MULTIPLE, head_dim, RANK_MULTIPLE), head_dim]
        if rank is not None and rank not in allowed:
            raise ValueError(
                f"Projection.fit: rank must be a multiple of {RANK_MULTIPLE} below head_dim, or head_dim, got {rank}. "
                f"Allowed here: {', '.join(map(str, allowed))}."
            )
        queries, keys = self.sums[:, :head_dim], self.sums[:, head_dim : 2 * head_dim]
        mean = self.sums[:, 2 * head_dim] / self.count
        root_q = _root(queries)
        root_k = _root(keys - self.count * mean[:, :, None] * mean[:, None, :])
        u, s, wt = np.linalg.svd(root_q @ root_k.swapaxes(1, 2))
        ranks = [rank] * first.heads_kv if rank is not None else [_rank(x, tolerance, allowed) for x in s]
        most = max(ranks)
        used = (s > NOISE * s[:, :1]) & (np.arange(head_dim) < np.array(ranks)[:, None])
        weights = np.where(used, 1.0 / np.sqrt(np.where(used, s, 1.0)), 0.0)[:, None, :most]
        a = root_k.swapaxes(1, 2) @ wt.swapaxes(1, 2)[:, :, :most] * weights
        b = root_q.swapaxes(1, 2) @ u[:, :, :most] * weights
        return Projection(
            first.heads,
            first.heads_kv,
            head_dim,
            tuple(ranks),
            queries=a.astype(np.float32),
            keys=b.astype(np.float32),
            mean=mean.astype(np.float32),
            singular_values=s,
        )


def _root(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """C with C^T C = squares, for each head. Eigenvalues, because a Cholesky factor needs a matrix of full rank."""
    values, vectors = np.linalg.eigh(squares)
    root: NDArray[np.float64] = np.sqrt(np.maximum(values, 0.0))[:, :, None] * vectors.swapaxes(1, 2)
    return root


def _rank(s: NDArray[np.float64], tolerance: float | None, allowed: list[int]) -> int:
    """The smallest rank whose error is at most the tolerance."""
    assert tolerance is not None
    limit = tolerance**2 * (s**2).sum()
    return next(rank for rank in allowed if (s[rank:] ** 2).sum() <= limit)
