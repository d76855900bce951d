"""Inputs for the tests: random arrays, memory layouts with equal values, and Hypothesis cases over both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import cudistr
from cudistr.reductions import projections

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}

View = Callable[[Any], Any]


def random(seed: int, *shape: int, dtype: Any = np.float32, spread: float = 1.0) -> np.ndarray:
    """Normal numbers rounded to ``dtype``, from a seed."""
    return (spread * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def near_ties(seed: int, rows: int, head_dim: int, reduction: cudistr.LSH) -> np.ndarray:
    """A float32 block, (rows, head_dim), each column of which has a hash sum that cancels to a few ulps or to zero.

    Another order of summation, a fused multiply-add or wider accumulation then settles some bit otherwise.
    """
    vectors = projections(reduction.n_proj, reduction.block_q, reduction.seed)
    block = random(seed, rows, head_dim)
    for c in range(head_dim):
        vector = vectors[c % reduction.n_proj, :rows]
        total = np.float32(0)
        for r in range(rows - 1):
            total += vector[r] * block[r, c]
        block[-1, c] = -total / vector[-1]
    return block


def lost_sums(seed: int, rows: int, head_dim: int, reduction: cudistr.LSH, dtype: Any) -> np.ndarray:
    """A block of 16-bit numbers, (rows, head_dim), each column of which has a hash sum that is zero in float32.

    A large number, a small one, which the sum loses, and what cancels the large one. The exact sum is positive.
    """
    vectors = projections(reduction.n_proj, reduction.block_q, reduction.seed)
    large, small = (2.0**7, 2.0**-20) if dtype == np.float16 else (2.0**26, 1.0)
    rng = np.random.default_rng(seed)
    block = np.zeros((rows, head_dim))
    for c in range(head_dim):
        odd = vectors[c % reduction.n_proj, :rows] * 128
        (usual,) = np.nonzero((abs(odd) > 32) & (abs(odd) < 256))  # neither lost nor of more than eight bits
        first, last = rng.choice(usual[: len(usual) // 2]), usual[-1]
        between = rng.integers(first + 1, last)
        block[first, c], block[last, c] = odd[last] * large, -odd[first] * large
        block[between, c] = np.sign(odd[between]) * small
    return block.astype(dtype)


# Memory layouts. Each takes values and returns a contiguous buffer and the view of it that has them, so that a
# test can send the buffer to a GPU and take the same view there. What lies between the values is NaN: a read
# outside the array shows.


def _filled(shape: tuple[int, ...], values: np.ndarray, view: View) -> tuple[np.ndarray, View]:
    buffer = np.full(shape, np.nan, values.dtype)
    view(buffer)[...] = values
    return buffer, view


def _contiguous(x: np.ndarray) -> tuple[np.ndarray, View]:
    return x.copy(), lambda buffer: buffer


def _transposed(x: np.ndarray) -> tuple[np.ndarray, View]:
    b, h, n, d = x.shape
    return _filled((b, n, h, d), x, lambda buffer: buffer.transpose(0, 2, 1, 3))


def _sliced(x: np.ndarray) -> tuple[np.ndarray, View]:
    """Rows that still start at multiples of 16 bytes."""
    b, h, n, d = x.shape
    return _filled(
        (b + 1, h + 2, 2 * n + 3, d + 16),
        x,
        lambda buffer: buffer[1:, 1 : h + 1, 2 : 2 * n + 2 : 2, 8 : d + 8],
    )


def _shifted(x: np.ndarray) -> tuple[np.ndarray, View]:
    """One element off: no row starts at a multiple of 16 bytes."""
    return _filled((x.size + 2,), x, lambda buffer: buffer[1:-1].reshape(x.shape))


def _ragged(x: np.ndarray) -> tuple[np.ndarray, View]:
    """A row pitch that is odd: rows start at every alignment."""
    b, h, n, d = x.shape
    return _filled((b, h, n, d + 1), x, lambda buffer: buffer[..., :d])


def _reversed(x: np.ndarray) -> tuple[np.ndarray, View]:
    return _filled(x.shape, x, lambda buffer: buffer[::-1, ::-1, ::-1])


def _strided_last(x: np.ndarray) -> tuple[np.ndarray, View]:
    b, h, n, d = x.shape
    return _filled((b, h, n, 2 * d), x, lambda buffer: buffer[..., ::2])


def _columns_outside(x: np.ndarray) -> tuple[np.ndarray, View]:
    b, h, n, d = x.shape
    return _filled((b, h, d, n), x, lambda buffer: buffer.transpose(0, 1, 3, 2))


LAYOUTS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, View]]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "sliced": _sliced,
    "shifted": _shifted,
    "ragged": _ragged,
    "reversed": _reversed,
    "strided_last": _strided_last,
    "columns_outside": _columns_outside,
}


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """``x`` as a NumPy view with another memory layout."""
    buffer, view = LAYOUTS[layout](x)
    return view(buffer)


@dataclass(frozen=True)
class Case:
    """Arguments of one call of ``cudistr.attention``: NumPy arrays and keywords."""

    q: np.ndarray = field(repr=False)
    k: np.ndarray = field(repr=False)
    v: np.ndarray = field(repr=False)
    options: dict[str, Any]
    layouts: tuple[str, str, str]
    shapes: str

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.q, self.k, self.v


# (head_dim, group sizes that divide it into multiples of 8)
HEAD_DIMS = {
    8: (1,),
    16: (1, 2),
    24: (1, 3),
    32: (1, 2, 4),
    48: (1, 2, 3, 6),
    64: (1, 2, 4, 8),
    80: (1, 2, 5, 10),
}

bounds = st.none() | st.integers(0, 6) | st.integers(0, 200)
masks = st.fixed_dictionaries({}, optional={"causal": st.booleans(), "window": st.tuples(bounds, bounds)})
scales = st.fixed_dictionaries(
    {},
    optional={
        "scale": st.sampled_from([0.0, 0.05, -0.3, 1.0]),
        "softcap": st.sampled_from([0.5, 5.0, 50.0]),
    },
)
seeds = st.integers(0, 2**16)
layouts = st.sampled_from(list(LAYOUTS))


@st.composite
def reductions(draw: st.DrawFn, group_sizes: tuple[int, ...] = (1, 2, 4, 8)) -> cudistr.LSH:
    """An LSH with one of the group sizes."""
    return cudistr.LSH(
        group_size=draw(st.sampled_from(group_sizes)),
        block_q=draw(st.sampled_from([None, 64, 128, 192])),
        n_proj=draw(st.sampled_from([16, 1, 7, 12])),
        seed=draw(st.integers(0, 3)),
        representative=draw(st.sampled_from(["sample", "mean", "rank1"])),
    )


# Columns kept by energy, of heads of 32 columns and more.
kept = st.builds(
    cudistr.Energy,
    keep=st.just(16),
    near=st.just(0),
    sinks=st.just(0),
    block_q=st.sampled_from([None, 64, 192]),
)


@st.composite
def with_exact_keys(draw: st.DrawFn, group_sizes: tuple[int, ...] = (2, 4)) -> cudistr.LSH:
    """An LSH that leaves near keys or sinks exact."""
    lengths = st.integers(0, 8) | st.sampled_from([16, 64, 1000]) | st.integers(0, 200)
    near, sinks = draw(st.tuples(lengths, lengths).filter(any))
    return dataclasses.replace(draw(reductions(group_sizes)), near=near, sinks=sinks)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    head_dims: tuple[int, ...] = tuple(HEAD_DIMS),
    head_dims_v: tuple[int, ...] = (8, 24, 64),
    reduced: bool | None = None,
    methods: st.SearchStrategy[cudistr.LSH | None] | None = None,
    masked: bool = True,
    scaled: bool = True,
    max_seqlen: int = 200,
    min_rows: int = 1,
) -> Case:
    """Shapes, strides, dtypes, masks, scales and reductions.

    ``reduced``: True is always a group size above 1, False is exact attention, None lets all of them appear.
    ``methods``, if given, draws the reduction instead; a GPU test bounds with it how many kernels it compiles.
    ``min_rows``: a larger batch makes up for short sequences. Where errors are compared with those of a baseline, a
    single row says more about the baseline's luck than about the kernel.
    """
    if reduced:
        head_dims = tuple(x for x in head_dims if len(HEAD_DIMS[x]) > 1)
    head_dim = draw(st.sampled_from(head_dims))
    head_dim_v = draw(st.sampled_from(head_dims_v))
    batch, heads_kv, shared = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    edges = [x for x in (63, 64, 65, 127, 128, 129, 192) if x <= max_seqlen]
    lengths = st.integers(1, 8) | st.sampled_from([max_seqlen, *edges]) | st.integers(1, max_seqlen)
    seqlen_q, seqlen_k = draw(lengths), draw(lengths)
    batch = max(batch, -(-min_rows // (heads_kv * shared * seqlen_q)))
    dtype = DTYPES[draw(st.sampled_from(dtypes))]
    seed = draw(seeds)
    spread = draw(st.sampled_from([1.0, 0.1, 4.0]))
    options = draw(masks) if masked else {}
    if scaled:
        options |= draw(scales)
    if methods is not None:
        options["reduction"] = draw(methods)
    elif reduced or (reduced is None and draw(st.booleans())):
        options["reduction"] = draw(reductions(HEAD_DIMS[head_dim][1 if reduced else 0 :]))
    q = random(seed, batch, heads_kv * shared, seqlen_q, head_dim, dtype=dtype, spread=spread)
    k = random(seed + 1, batch, heads_kv, seqlen_k, head_dim, dtype=dtype)
    v = random(seed + 2, batch, heads_kv, seqlen_k, head_dim_v, dtype=dtype)
    used = (draw(layouts), draw(layouts), draw(layouts))
    arrays = [laid_out(x, layout) for x, layout in zip((q, k, v), used, strict=True)]
    return Case(*arrays, options, used, f"q {q.shape} k {k.shape} v {v.shape} {dtype} spread {spread}")


# An independent account of attention: whole matrices, masks by comparing every pair of positions. It shares no
# code with cudistr.reference, which works block by block.


def seen_pairs(seqlen_q: int, seqlen_k: int, causal: bool = False, window: Any = None) -> np.ndarray:
    """Which query sees which key, (seqlen_q, seqlen_k), pair by pair from the definition."""
    left, right = window if window is not None else (None, None)
    seen = np.zeros((seqlen_q, seqlen_k), bool)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            ahead = j - (i + seqlen_k - seqlen_q)
            seen[i, j] = not (
                (causal and ahead > 0)
                or (left is not None and -ahead > left)
                or (right is not None and ahead > right)
            )
    return seen


def kept_pairs(
    seqlen_q: int, seqlen_k: int, near: int, sinks: int, block: tuple[int, int] = (1, 1)
) -> np.ndarray:
    """For which query which key stays exact, (seqlen_q, seqlen_k), pair by pair from the definition.

    A block of so many queries and keys does as a whole, whether or not all of them are there.
    """
    rows, keys = (
        np.arange(-(-n // size) * size) for n, size in zip((seqlen_q, seqlen_k), block, strict=True)
    )
    ahead = keys - (rows[:, None] + seqlen_k - seqlen_q)
    kept = (abs(ahead) < near) | (keys < sinks)
    blocks = kept.reshape(len(rows) // block[0], block[0], len(keys) // block[1], block[1]).any(axis=(1, 3))
    return np.repeat(np.repeat(blocks, block[0], axis=0), block[1], axis=1)[:seqlen_q, :seqlen_k]


def naive_scores(
    q: np.ndarray, k: np.ndarray, scale: float | None = None, softcap: float | None = None
) -> np.ndarray:
    """Scores before the mask, (batch, heads, seqlen_q, seqlen_k), float64."""
    k = np.repeat(k.astype(np.float64), q.shape[1] // k.shape[1], axis=1)
    scores = np.einsum("bhqd,bhkd->bhqk", q.astype(np.float64), k)
    scores *= q.shape[3] ** -0.5 if scale is None else scale
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def naive_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    window: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact attention in float64: out and lse."""
    seen = seen_pairs(q.shape[2], k.shape[2], causal, window)
    return naive_softmax(naive_scores(q, k, scale, softcap), v, seen)


def naive_softmax(scores: np.ndarray, v: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out and lse from scores (batch, heads, seqlen_q, seqlen_k) and a mask (seqlen_q, seqlen_k)."""
    scores = np.where(seen, scores, -np.inf)
    lse = np.logaddexp.reduce(scores, axis=3, initial=-np.inf)
    some = lse > -np.inf
    weights = np.exp(scores - np.where(some, lse, 0.0)[..., None])
    v = np.repeat(v.astype(np.float64), scores.shape[1] // v.shape[1], axis=1)
    out = np.where(some[..., None], np.einsum("bhqk,bhkd->bhqd", weights, v), 0.0)
    return out, lse


def expanded(
    q: np.ndarray, reduction: cudistr.LSH | cudistr.Energy, k: np.ndarray | None = None
) -> np.ndarray:
    """Qtilde, float64: what stands for each column of Q. ``S_hat = Qtilde K^T``. k is used where columns go by it."""
    result = q.astype(np.float64)
    q = np.ascontiguousarray(q)
    if reduction.by_keys:
        assert k is not None
        k = np.ascontiguousarray(k)
    if isinstance(reduction, cudistr.Energy):
        permutations = cudistr.reference.group(q, reduction, k)
        for b, h, n in np.ndindex(*permutations.shape[:3]):
            rows = slice(n * reduction.block_q, (n + 1) * reduction.block_q)
            for column in permutations[b, h, n, reduction.keep :]:
                result[b, h, rows, column] = q[b, h, rows, column].astype(np.float64).mean()
        return result
    permutations = cudistr.reference.group(q, reduction, k if reduction.by_keys else None)
    for b, h, n in np.ndindex(*permutations.shape[:3]):
        rows = slice(n * reduction.block_q, (n + 1) * reduction.block_q)
        block = q[b, h, rows].astype(np.float64)
        for group in permutations[b, h, n].reshape(-1, reduction.group_size):
            if reduction.by_keys:
                energies = cudistr.reference.key_energies(
                    k[b, h // (q.shape[1] // k.shape[1]), reduction.sinks :]
                )
                found, numbers = cudistr.reference.balance(
                    q[b, h, rows], group.astype(int), reduction, energies
                )
                weights, shares = numbers.astype(np.float64)
                one = block[:, found] @ shares / (weights @ shares)
                result[b, h, rows, found] = np.outer(weights, one)
                continue
            one = block[:, group[0]] if reduction.representative == "sample" else block[:, group].mean(axis=1)
            result[b, h, rows, group] = one  # advanced index first: (group_size, rows)
    return result
