"""Reductions of the score product, as data: small, frozen, printable objects without any GPU code."""

from __future__ import annotations

import abc
import functools
import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK_Q_DEFAULT",
    "BLOCK_Q_MULTIPLE",
    "KEEP_MULTIPLE",
    "LSH",
    "MAX_BLOCK_Q",
    "MAX_PROJ",
    "MAX_RANK",
    "RANK_MULTIPLE",
    "Energy",
    "Fitted",
    "LowRank",
    "Reduction",
    "projections",
]

BLOCK_Q_DEFAULT = (
    128  # the paper's l; also the rows of the largest query tile, so a block is one thread block
)
BLOCK_Q_MULTIPLE = 64  # a query tile (64 or 128 rows) must lie inside one block: it has one column order
MAX_BLOCK_Q = 65536  # beyond any use, and the projections are still small
RANK_MULTIPLE = 16  # columns of one matrix instruction
KEEP_MULTIPLE = 16  # the same
REPRESENTATIVES = ("sample", "mean", "rank1")
MAX_RANK = 128  # columns whose squares and products a thread block holds while it finds them
MAX_PROJ = 16  # bits of a hash code that the grouping kernel keeps in registers


def integer(owner: str, name: str, value: object, remedy: str) -> int:
    """``value`` as a Python int; bool and float are refused, NumPy integers are fine."""
    if isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an integer, got bool {value!r}. {remedy}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{owner}: {name} must be an integer, got {type(value).__name__} {value!r}. {remedy}"
        ) from None


def exact_keys(owner: str, near: object, sinks: object) -> tuple[int, int]:
    """``near`` and ``sinks`` of a reduction as Python ints."""
    numbers = []
    for name, value, remedy in (
        ("near", near, "Pass how many keys back from a query's own position are exact, 0 for none."),
        ("sinks", sinks, "Pass how many of the first keys are exact, 0 for none."),
    ):
        number = integer(owner, name, value, remedy)
        if number < 0:
            raise ValueError(f"{owner}: {name} must not be negative, got {number}. {remedy}")
        numbers.append(number)
    return numbers[0], numbers[1]


def rows_of_block(owner: str, value: object) -> int:
    """``block_q`` of a reduction as a Python int, None as the default."""
    if value is None:
        return BLOCK_Q_DEFAULT
    block_q = integer(owner, "block_q", value, "Pass a multiple of 64, or None for 128.")
    if not BLOCK_Q_MULTIPLE <= block_q <= MAX_BLOCK_Q or block_q % BLOCK_Q_MULTIPLE:
        nearest = min(MAX_BLOCK_Q, max(1, block_q // BLOCK_Q_MULTIPLE) * BLOCK_Q_MULTIPLE)
        raise ValueError(
            f"{owner}: block_q must be a positive multiple of {BLOCK_Q_MULTIPLE}, at most {MAX_BLOCK_Q}, "
            f"got {block_q}. Pass {nearest}, or None for {BLOCK_Q_DEFAULT}."
        )
    return block_q


class Reduction(abc.ABC):
    """Base of what may stand for the score product."""

    @property
    @abc.abstractmethod
    def outline(self) -> LSH | Energy | LowRank | Fitted:
        """All that checks and planning have to know: a value without arrays, equal for equal ones."""

    @property
    def by_keys(self) -> bool:
        """Whether what a call does with columns depends on all of its keys."""
        return False


@dataclass(frozen=True)
class Fitted:
    """Outline of a :class:`cudistr.Projection`: what it serves, and what it leaves of it."""

    heads: int
    heads_kv: int
    head_dim: int
    rank: int
    near: int
    sinks: int
    mixed: bool = False  # whether some heads use fewer columns than rank


@dataclass(frozen=True)
class LSH(Reduction):
    """Group the columns of each block of queries by locality-sensitive hashing: the paper's DistrAttention.

    Per block of ``block_q`` query rows the head_dim columns of Q are hashed (angular LSH), sorted by the
    Gray rank of their code and cut into groups of ``group_size``. One column represents a group in Q, the
    group's columns of K are summed, and the score product sums over ``head_dim / group_size`` terms.

    This is an approximation whose error depends on the data. On pretrained models without fine-tuning it
    is large; see the accuracy page of the documentation before you use it.

    Parameters
    ----------
    group_size : int
        Columns per group (the paper's G*), at least 1. It must divide head_dim, and head_dim / group_size
        must be a multiple of 8. 1 is exact attention.
    block_q : int, optional
        Query rows per block (the paper's l), a multiple of 64 up to 65536. 128 unless given.
    n_proj : int, default 16
        Bits of the hash, 1 to 16: the number of Gaussian projections.
    seed : int, default 0
        Seed of the projections, 0 to 2**32 - 1. Equal seeds give equal bits.
    representative : {"sample", "mean", "rank1"}, default "sample"
        What stands for a group in Q: its first column (the paper's sampling); the mean of its columns; or their best
        approximation of rank one: each column is a multiple of the representative, by a weight of its own, with
        which its column of K enters the sum. Weights go by how much the columns of K vary over the keys, the sinks
        left out. They may be negative, so "rank1" hashes a column and its negative alike. Of the three it leaves the
        least of the scores out; and beside exact keys reduced ones get back the weight that they lose by it.
    near : int, default 0
        Keys less than ``near`` positions away from a query's own position (bottom-right aligned) keep the full
        score product: with a causal mask the last ``near`` keys, the query's own included. 0 is none; beyond the
        length of the sequence everything is exact.
    sinks : int, default 0
        The first ``sinks`` keys keep the full score product too.

    Raises
    ------
    TypeError, ValueError
        If a parameter is of the wrong kind or out of its range.

    Notes
    -----
    From 4096 keys and 65 queries on, whole blocks of keys stay exact: more than asked for, never fewer. In a ring of
    GPUs they do not (see "Exact keys" in the documentation).

    References
    ----------
    Jin et al., *DistrAttention: An Efficient and Flexible Self-Attention Mechanism on Modern GPUs*,
    arXiv 2507.17245, section 3.

    Examples
    --------
    >>> import cudistr
    >>> cudistr.LSH(group_size=2)
    LSH(group_size=2, block_q=128, n_proj=16, seed=0, representative='sample', near=0, sinks=0)
    """

    group_size: int
    block_q: int | None = None
    n_proj: int = 16
    seed: int = 0
    representative: str = "sample"
    near: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        group_size = integer("LSH", "group_size", self.group_size, "Pass 1 (exact), 2, 4, 8, ...")
        block_q = rows_of_block("LSH", self.block_q)
        n_proj = integer("LSH", "n_proj", self.n_proj, f"Pass 1 to {MAX_PROJ}.")
        seed = integer("LSH", "seed", self.seed, "Pass an integer from 0 to 2**32 - 1.")
        if group_size < 1:
            raise ValueError(
                f"LSH: group_size must be at least 1, got {group_size}. Pass 1 (exact), 2, 4, 8, ..."
            )
        if not 1 <= n_proj <= MAX_PROJ:
            raise ValueError(f"LSH: n_proj must be from 1 to {MAX_PROJ}, got {n_proj}. The default is 16.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"LSH: seed must be from 0 to 2**32 - 1, got {seed}.")
        if self.representative not in REPRESENTATIVES:
            raise ValueError(
                f"LSH: representative must be 'sample', 'mean' or 'rank1', got {self.representative!r}. "
                "'sample' is the paper's choice, 'rank1' leaves the least of the scores out."
            )
        near, sinks = exact_keys("LSH", self.near, self.sinks)
        for name, value in (
            ("group_size", group_size),
            ("block_q", block_q),
            ("n_proj", n_proj),
            ("seed", seed),
            ("near", near),
            ("sinks", sinks),
        ):
            object.__setattr__(self, name, value)
        # Hashed on every call, so once; numbers alone, because the hash travels with a pickle to other processes,
        # where text has another hash.
        numbers = (group_size, block_q, n_proj, seed, REPRESENTATIVES.index(self.representative), near, sinks)
        object.__setattr__(self, "_hash", hash(numbers))

    def __hash__(self) -> int:
        return self.__dict__["_hash"]  # type: ignore[no-any-return]

    @property
    def outline(self) -> LSH:
        """Itself: it has no arrays."""
        return self

    @property
    def rows_per_block(self) -> int:
        """Query rows of a block as an int: ``block_q`` with its default filled in."""
        assert self.block_q is not None  # __post_init__ filled it in
        return self.block_q

    @property
    def by_keys(self) -> bool:
        """Whether weights are found, which go by K too."""
        return self.representative == "rank1"


@dataclass(frozen=True)
class Energy(Reduction):
    """Keep the columns of each block of queries that matter most, and put the mean of Q for the rest.

    The energy of column c in a block of ``block_q`` query rows is ``||q_c - mean(q_c)|| * ||k_c - mean(k_c)||``: the
    norm of what column c adds to the scores, less what softmax does not see. The ``keep`` columns with the most are
    multiplied as they are. Of the others Q is taken for constant over the block, so that together they add one
    number to each key's scores, ``sum_c mean(q_c) k_jc``, in float32. Beside exact keys reduced ones get back the
    weight that they lose by it.

    This is an approximation whose error depends on the data; see the accuracy page of the documentation.

    Parameters
    ----------
    keep : int, default 32
        Columns of each block that stay, a multiple of 16, at most head_dim, with which attention is exact.
    near : int, default 256
        Keys less than ``near`` positions away from a query's own position (bottom-right aligned) keep the full score
        product, as in :class:`LSH`. 0 is none.
    sinks : int, default 64
        The first ``sinks`` keys keep the full score product too.
    block_q : int, optional
        Query rows per block, a multiple of 64 up to 65536. 128 unless given.

    Raises
    ------
    TypeError, ValueError
        If a parameter is of the wrong kind or out of its range.

    Notes
    -----
    The mean and the norm of a column of K are taken over all keys of its head but the sinks, seen or not. The order of
    the columns by energy is that of float32 sums in a fixed order, so that NumPy and the GPU keep the same columns;
    :func:`cudistr.group` shows it.

    From 4096 keys and 65 queries on, whole blocks of keys stay exact: more than asked for, never fewer. In a ring of
    GPUs they do not (see "Exact keys" in the documentation).

    Examples
    --------
    >>> import cudistr
    >>> cudistr.Energy(keep=32)
    Energy(keep=32, near=256, sinks=64, block_q=128)
    """

    keep: int = 32
    near: int = 256
    sinks: int = 64
    block_q: int | None = None

    def __post_init__(self) -> None:
        keep = integer("Energy", "keep", self.keep, f"Pass a multiple of {KEEP_MULTIPLE}, 32 for example.")
        if keep < KEEP_MULTIPLE or keep % KEEP_MULTIPLE:
            raise ValueError(
                f"Energy: keep must be a positive multiple of {KEEP_MULTIPLE} (columns of one matrix instruction), got "
                f"{keep}. Pass {max(1, keep // KEEP_MULTIPLE) * KEEP_MULTIPLE}."
            )
        near, sinks = exact_keys("Energy", self.near, self.sinks)
        block_q = rows_of_block("Energy", self.block_q)
        for name, value in (("keep", keep), ("near", near), ("sinks", sinks), ("block_q", block_q)):
            object.__setattr__(self, name, value)

    @property
    def outline(self) -> Energy:
        """Itself: it has no arrays."""
        return self

    @property
    def rows_per_block(self) -> int:
        """Query rows of a block as an int: ``block_q`` with its default filled in."""
        assert self.block_q is not None  # __post_init__ filled it in
        return self.block_q

    @property
    def by_keys(self) -> bool:
        """Always: the energy of a column is that of K too."""
        return True


@dataclass(frozen=True)
class LowRank(Reduction):
    """Reduce the score product to ``rank`` columns for each head, found anew in every call.

    ``Qhat = Q A`` and ``Khat = (K - mean) B``, as a :class:`cudistr.Projection` has them, with factors of the call's
    own q and k: it needs no calibration data, and there is none that could be unlike the call's. To find them takes
    time in every call, so that it is for long sequences; see "What it costs" on the accuracy page of the documentation.

    This is an approximation whose error depends on the data: :func:`cudistr.attention_error` measures it, and with a
    ``tolerance`` heads whose error may be larger are exact.

    Parameters
    ----------
    rank : int, default 32
        Columns that are left: a multiple of 16 up to 128 and below head_dim; or head_dim, with which attention is
        exact.
    near : int, default 0
        Keys less than ``near`` positions away from a query's own position (bottom-right aligned) keep the full score
        product, as in :class:`LSH`. 0 is none.
    sinks : int, default 0
        The first ``sinks`` keys keep the full score product too.

    Raises
    ------
    TypeError, ValueError
        If a parameter is of the wrong kind or out of its range.

    Notes
    -----
    What is found, for each KV head of each batch entry, from its keys, or 2048 of them all over the sequence, and from
    rows of all query heads that share it: 512 rows give ``S = sum_i q_i q_i^T``. The softmax of 64 rows gives each key
    a weight ``w_j``, what it receives of them if it does not stay exact; a tenth of the sum of weights is shared out
    equally. Then ``T = sum_j w_j (k_j - mean) (k_j - mean)^T``, with the mean of 128 keys. To second order the
    divergence of a softmax from one whose scores are off by ``e_j`` is half the variance of ``e_j`` under it: so keys
    count by the attention they get.

    ``B`` has ``B^T T B = 1``, and spans the vectors of ``S T`` with the largest eigenvalues, but for what two rounds of
    subspace iteration from random vectors leave out; ``A = T B``. These are the factors of a Projection for the same
    sums (Eckart and Young, *Psychometrika* 1, 1936). Each round is orthonormalised twice, since in float32 no more than
    one factor of the scores may pile up before.

    The rows, the keys and the random vectors are the same in every call of a shape: equal arrays give equal bits. Sums
    are of rows that are rounded to bfloat16, whatever the dtype, and what is not finite counts as 0 in them; q and k
    are multiplied with the factors in their own precision.

    From 4096 keys and 65 queries on, whole blocks of keys stay exact: more than asked for, never fewer.

    Examples
    --------
    >>> import numpy as np, cudistr
    >>> q, k, v = np.random.RandomState(0).standard_normal((3, 1, 2, 300, 64)).astype(np.float32)
    >>> cudistr.attention(q, k, v, causal=True, reduction=cudistr.LowRank(32, near=64)).shape
    (1, 2, 300, 64)
    """

    rank: int = 32
    near: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        rank = integer("LowRank", "rank", self.rank, f"Pass a multiple of {RANK_MULTIPLE}, 32 for example.")
        if rank < RANK_MULTIPLE or rank % 8:
            raise ValueError(
                f"LowRank: rank must be a positive multiple of {RANK_MULTIPLE} (columns of one matrix instruction), or "
                f"head_dim, got {rank}. Pass {max(1, rank // RANK_MULTIPLE) * RANK_MULTIPLE}."
            )
        near, sinks = exact_keys("LowRank", self.near, self.sinks)
        for name, value in (("rank", rank), ("near", near), ("sinks", sinks)):
            object.__setattr__(self, name, value)

    @property
    def outline(self) -> LowRank:
        """Itself: it has no arrays."""
        return self

    @property
    def by_keys(self) -> bool:
        """Always: the factors are those of K too."""
        return True

    # What a Projection says of itself, too.
    @property
    def columns(self) -> int:
        """Columns of Qhat and Khat."""
        return self.rank

    @property
    def mixed(self) -> bool:
        """Whether a kernel has to be told how many columns each head uses."""
        return False

    @property
    def alike(self) -> bool:
        """Whether heads that are not exact all use the same columns, and some."""
        return True


@functools.lru_cache(maxsize=64)
def projections(n_proj: int, block_q: int, seed: int) -> NDArray[np.float32]:
    """Gaussian vectors of the hash, shape (n_proj, block_q), float32, read-only.

    Rounded to odd multiples of 1/128, none of which is zero and all of at most ten bits: their products with numbers of
    16 bits are exact in float32, and each is a number of float16, or the sum of two of bfloat16.

    Drawn with ``numpy.random.RandomState``: NumPy guarantees that its stream never changes, which it does
    not for ``default_rng``, so equal seeds give equal groups on every machine and NumPy version.
    """
    drawn = np.random.RandomState(seed).standard_normal((n_proj, block_q))
    vectors = ((np.floor(drawn * 64) + 0.5) / 64).astype(np.float32)
    vectors.setflags(write=False)
    return vectors
