"""The public functions: normalize, plan and launch in that order, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cudistr import compose, launch, normalize
from cudistr.explain import CallPlan, explain
from cudistr.measure import ErrorReport, measure
from cudistr.reductions import LSH, Energy, Reduction

__all__ = ["attention", "attention_error", "attention_plan", "group", "merge"]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    reduction: Reduction | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    tolerance: float | None = None,
    exact_if_faster: bool | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Softmax attention, exact or with a reduced score product.

    ``S = scale * Q K^T``, ``P = softmax(S)`` over the visible keys, ``out = P V``, per batch entry and head.

    Parameters
    ----------
    q : array (batch, heads, seqlen_q, head_dim)
        float16, bfloat16 (``ml_dtypes``) or float32. A CuPy array, a NumPy array, or any array with
        ``__dlpack__`` (torch, jax), taken without a copy. head_dim is a multiple of 8 up to 256.
    k : array (batch, heads_kv, seqlen_k, head_dim)
        heads must be a multiple of heads_kv: query head h reads KV head ``h // (heads // heads_kv)``.
    v : array (batch, heads_kv, seqlen_k, head_dim_v)
        head_dim_v is a multiple of 8 up to 256 and need not be head_dim.
    reduction : None, cudistr.LSH, cudistr.Energy, cudistr.LowRank or cudistr.Projection, optional
        None is exact attention. ``cudistr.LSH(group_size)`` is DistrAttention; ``cudistr.Energy(keep)`` keeps the
        columns of each block of queries that matter most; ``cudistr.LowRank(rank)`` finds the best columns of a given
        rank in the call, and ``cudistr.Projection.fit(q, k, rank=...)`` on calibration data. All are approximations
        whose error depends on the data: :func:`attention_error` measures it.
    causal : bool, default False
        Query i sees key j when ``j <= i + seqlen_k - seqlen_q``: aligned to the bottom right, so that the
        last query sees every key. For seqlen_q = 2 and seqlen_k = 4 (1 is visible)::

            1 1 1 0
            1 1 1 1

    window : (left, right), optional
        Query i sees the keys from ``i + off - left`` to ``i + off + right``, with
        ``off = seqlen_k - seqlen_q``. None on a side is no bound; with ``causal`` the right side is 0.
    scale : float, optional
        Factor on the scores, ``1 / sqrt(head_dim)`` unless given.
    softcap : float, optional
        If given, scores become ``softcap * tanh(scores / softcap)`` before the mask.
    tolerance : float, optional
        The largest relative error ``||O - Ohat|| / ||O||`` that the output of a head of a batch entry may have,
        between 0 and 1. With a ``cudistr.Projection`` or a ``cudistr.LowRank``, 64 query rows of each head are
        computed exactly too in every call, and a head whose error may be larger than this is exact: see the notes.
        Without a reduction the call picks one: a ``cudistr.LowRank`` of half of head_dim where it was measured to be
        faster, else exact attention.
    exact_if_faster : bool, optional
        Whether the call may be exact where exact attention was measured to be faster, as it is for short sequences:
        :func:`attention_plan` says what a call does. True allows it, False does not. None, the default, allows it
        with a ``tolerance``, to which exact attention keeps too; without one a call does what it says. NumPy arrays
        are reduced in any case.
    return_lse : bool, default False
        Whether to return ``lse`` too.
    out : array (batch, heads, seqlen_q, head_dim_v), optional
        Where to write the result: q's kind, dtype and device, last axis contiguous, no memory shared with
        q, k or v. It is returned.

    Returns
    -------
    out : array (batch, heads, seqlen_q, head_dim_v)
        q's dtype and kind of array. A row that sees no key is 0. Empty axes give an empty or zero result.
    lse : float32 array (batch, heads, seqlen_q)
        Only with ``return_lse``: natural logarithm of the sum of exponentials of the row's scores; minus
        infinity for a row that sees no key.

    Raises
    ------
    TypeError
        For kinds of arrays and dtypes.
    ValueError
        For shapes, devices, layouts and values out of range.
    UnsupportedDeviceError
        If the GPU has a compute capability below 8.0.
    CudaUnavailableError
        If CuPy's CUDA or NVRTC cannot be used.
    CompileError
        If a kernel does not compile; the message has the compiler's log.

    Notes
    -----
    Any strides do, as long as the last axis is contiguous: (batch, seqlen, heads, head_dim) data is a
    transpose away, without a copy. An array whose last axis is not contiguous is copied once.

    Work is queued on CuPy's current stream (torch tensors: on torch's) without synchronisation, so that a
    CUDA graph can capture a call after a first one has compiled the kernels. Results are the same bits from
    run to run. Sums are accumulated in float32; float32 input gives float32-grade results unless
    ``CUPY_TF32=1`` is set, as for CuPy's own products. NumPy arrays are computed by the float64 reference.
    ``CUDISTR_KERNEL=portable`` keeps attention on Hopper GPUs on the kernel that runs everywhere.

    NaN and infinity go where IEEE arithmetic sends them: from a query to its own row, from a key or value to the
    rows that see it. A value that is not finite may also reach rows to which its key is masked, because a weight of
    0 times NaN is NaN; keep padding finite. In float16, a fused column of K (a sum of group_size numbers) can
    overflow where its members do not.

    With ``tolerance``, rows of a head are drawn uniformly, by one over the number of keys that they see and that do not
    stay exact, and by how much of the query the projection misses. The squared error is estimated from them by the
    ratio of weighted sums, and four standard errors of its logarithm are added before it is held against the tolerance.
    If the projection was fitted with v, so is one row three times as bad as the worst of the calibration data
    (``row_errors``), since a query that attends to one far key by what the projection misses is rare, and no rule
    favours it; and no head is taken to be better than it was on that data (``output_errors``), so that one that was
    worse than the tolerance there is exact without a sample. Of a ``LowRank``, which has no such data, it is one row
    that is off by three times the root mean square of an output: with 2048 queries no tolerance below 0.067 leaves a
    head reduced, with 16384 none below 0.024. The decision is made on the device, without
    synchronisation, and can be captured. It is a statement about a sample and about calibration data: an error that
    sits in a few rows out of thousands, unlike any of the calibration data, can escape it. :func:`attention_error`
    with the same arguments says what was chosen, and measures it with other rows.

    With a ``tolerance`` alone, a ``LowRank`` of half of head_dim is taken, under a causal mask with ``near=256`` and
    ``sinks=64``, if a query sees one and a half times as many keys as :func:`attention_plan` gives for it to be faster,
    and if there are ``18 / tolerance**2`` queries, with fewer of which one unseen row takes more than half of the
    squared tolerance. Otherwise, and with a softcap or NumPy arrays, the call is exact. With ``exact_if_faster=False``
    it is taken however few keys there are.

    References
    ----------
    Exact: Dao et al., *FlashAttention-2*, arXiv 2307.08691. Reduced: Jin et al., *DistrAttention*,
    arXiv 2507.17245.

    Examples
    --------
    >>> import numpy as np, cudistr
    >>> q = np.ones((1, 2, 3, 8), np.float32)
    >>> out, lse = cudistr.attention(q, q, q, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((1, 2, 3, 8), (1, 2, 3))
    """
    given = {"q": q, "k": k, "v": v} if out is None else {"q": q, "k": k, "v": v, "out": out}
    adopted = normalize.adopt(**given)
    q_in, k_in, v_in = inputs = adopted.arrays[:3]
    problem = normalize.problem(
        q_in, k_in, v_in, reduction=reduction, causal=causal, window=window, scale=scale, softcap=softcap
    )
    target = None
    if out is not None:
        target = adopted.arrays[3]
        normalize.check_out(target, problem, inputs)
    if tolerance is not None:
        tolerance = normalize.check_tolerance(tolerance, problem, reduction)
    exact_if_faster = normalize.check_exact_if_faster(exact_if_faster)
    result, lse = compose.attention(
        problem, reduction, q_in, k_in, v_in, target, return_lse, adopted.stream, tolerance, exact_if_faster
    )
    if adopted.restore is not None:
        result = adopted.restore(result) if out is None else out
        lse = None if lse is None else adopted.restore(lse)
    return (result, lse) if return_lse else result


def attention_error(
    q: Any,
    k: Any,
    v: Any,
    *,
    reduction: Reduction | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    tolerance: float | None = None,
    exact_if_faster: bool | None = None,
    rows: int = 64,
    seed: int = 0,
) -> ErrorReport:
    """How far a reduction is from exact attention on these arrays, measured on sampled query rows.

    Computes what :func:`attention` returns with the same arguments, draws ``rows`` query rows of each head, computes
    these exactly in float64, and compares. Rounding is part of the error; with ``reduction=None`` it is all of it.

    Parameters
    ----------
    q, k, v, reduction, causal, window, scale, softcap, tolerance, exact_if_faster
        As for :func:`attention`.
    rows : int, default 64
        Query rows of each head to compare, drawn from all batch entries with replacement. As many as there are, or
        more, compares every row once: the report then holds the error itself.
    seed : int, default 0
        Seed of the sample, 0 to 2**32 - 1. Equal seeds draw the same rows from the same data.

    Returns
    -------
    ErrorReport
        ``print`` it, or read ``report.output.value``, ``report.output_heads[h].high``. It has

        - ``output``: ``||O - Ohat|| / ||O||``, Frobenius norms, over all heads and batch entries;
        - ``scores``: ``||S - Shat|| / ||S||`` over the visible keys, after ``softcap``, each row of S and Shat less
          its mean over these keys, because softmax does not see a constant added to a row;
        - ``output_heads``, ``scores_heads``: tuples with the same for each head;
        - ``ranks``, only with a ``tolerance``: columns that each head of each batch entry uses,
          head_dim if it is exact.

        Each is an ``Estimate`` with ``value`` and the ends ``low`` and ``high`` of a 95% interval.

    Raises
    ------
    TypeError, ValueError, UnsupportedDeviceError, CudaUnavailableError, CompileError
        As :func:`attention`.

    Notes
    -----
    A third of the draws each is uniform, goes by the squared norm of a row of Ohat, and by one over the number of
    keys that a row sees: where few rows hold most of the output or of the error, as the first rows of a causal mask
    do, a uniform sample would miss them. The estimate is the ratio of two sums, of the squared errors and of the
    squared norms of the drawn rows, each divided by its probability of being drawn, so that both sums are unbiased
    [1]_; the bias of their ratio is of order 1 / rows. The interval is a studentised bootstrap [2]_ of the logarithm
    of the ratio, in which each head is resampled by itself; it leaves 2.5% below and 1.5% above, because squared
    errors are skewed. The tests hold it to covering the true error in 93 to 97% of 2000 trials for 64 rows. An error
    that sits in a few rows out of thousands, which none of the three rules favours, can still escape a sample.

    The rows cost about ``rows / seqlen_q`` of an exact call, in float64 array code; K and V of one head at a time
    are copied to float64. The call waits for the device.

    References
    ----------
    .. [1] Hansen and Hurwitz, "On the theory of sampling from finite populations", *Annals of Mathematical
       Statistics* 14, 1943.
    .. [2] Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, section 12.5.

    Examples
    --------
    >>> import numpy as np, cudistr
    >>> q, k, v = np.random.RandomState(0).standard_normal((3, 1, 2, 200, 16)).astype(np.float32)
    >>> report = cudistr.attention_error(q, k, v, reduction=cudistr.LSH(group_size=2))
    >>> report.output.low <= report.output.value <= report.output.high
    True
    """
    rows, seed = normalize.check_sample(rows, seed)
    adopted = normalize.adopt(q=q, k=k, v=v)
    problem = normalize.problem(
        *adopted.arrays, reduction=reduction, causal=causal, window=window, scale=scale, softcap=softcap
    )
    if tolerance is not None:
        tolerance = normalize.check_tolerance(tolerance, problem, reduction)
    exact_if_faster = normalize.check_exact_if_faster(exact_if_faster)
    q_in, k_in, v_in = adopted.arrays
    return measure(
        problem, reduction, q_in, k_in, v_in, rows, seed, adopted.stream, tolerance, exact_if_faster
    )


def attention_plan(
    q: Any,
    k: Any,
    v: Any,
    *,
    reduction: Reduction | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    tolerance: float | None = None,
    exact_if_faster: bool | None = None,
) -> CallPlan:
    """What :func:`attention` does with the same arguments, and why, without doing it.

    Parameters
    ----------
    q, k, v, reduction, causal, window, scale, softcap, tolerance, exact_if_faster
        As for :func:`attention`. Only shapes, dtypes, strides and devices of the arrays matter.

    Returns
    -------
    CallPlan
        ``print`` it, or read

        - ``reduction``: what is computed, None if it is exact attention; of a projection with a ``tolerance``, heads
          that its fit knows to be worse have head_dim columns;
        - ``reason``: why, in a sentence;
        - ``kernels``: names of this library's kernels in the order of their launches, none for NumPy arrays;
        - ``tiles``: a line for each attention kernel with its tiles and thread blocks.

    Raises
    ------
    TypeError, ValueError, UnsupportedDeviceError, CudaUnavailableError
        As :func:`attention`.

    Notes
    -----
    A reduction makes the score product shorter, and has to pay for that before it starts, and for each exact key.
    Whether that is worth it depends on how many keys a query sees. From how many on it was measured to be, on one GPU
    and for as many heads and tokens as fill it, is a table under "What it costs" on the accuracy page of the
    documentation. With a ``tolerance``, heads that turn out to be exact save nothing, which is not known before: the
    table has calls in which no head is.

    Examples
    --------
    >>> import numpy as np, cudistr
    >>> q = np.zeros((1, 2, 64, 16), np.float32)
    >>> print(cudistr.attention_plan(q, q, q))
    exact attention: NumPy arrays are computed by the float64 reference
    kernels: none
    """
    adopted = normalize.adopt(q=q, k=k, v=v)
    q_in, k_in, v_in = adopted.arrays
    problem = normalize.problem(
        q_in, k_in, v_in, reduction=reduction, causal=causal, window=window, scale=scale, softcap=softcap
    )
    if tolerance is not None:
        tolerance = normalize.check_tolerance(tolerance, problem, reduction)
    exact_if_faster = normalize.check_exact_if_faster(exact_if_faster)
    with launch.placed(problem.device, adopted.stream):
        return explain(problem, reduction, k_in, v_in, tolerance, exact_if_faster)


def group(q: Any, reduction: LSH | Energy, k: Any = None) -> Any:
    """The column order that a reduction finds for every block of queries, for people who want to look.

    Of an ``LSH``, group t of a block is ``permutation[t * group_size : (t + 1) * group_size]``; its first entry is
    the sampled column, or with "rank1" the one that adds the most to the scores. Of an ``Energy``, the first
    ``keep`` entries are the columns that stay, those with the most energy first. See arXiv 2507.17245, section 3, and
    the method page of the documentation.

    Parameters
    ----------
    q : array (batch, heads, seqlen_q, head_dim)
        As for :func:`attention`.
    reduction : cudistr.LSH or cudistr.Energy
        ``block_q``, ``n_proj``, ``seed`` and, with "rank1", ``group_size`` and ``sinks`` decide the order; of an
        ``Energy``, ``block_q`` and ``sinks``.
    k : array (batch, heads_kv, seqlen_k, head_dim)
        For an ``Energy`` and for "rank1" only, as for :func:`attention`.

    Returns
    -------
    uint8 array (batch, heads, ceil(seqlen_q / block_q), head_dim)
        A permutation of the columns per block, of q's kind of array. The GPU gives the same bits as NumPy.

    Raises
    ------
    TypeError, ValueError, UnsupportedDeviceError, CudaUnavailableError, CompileError
        As :func:`attention`.

    Examples
    --------
    >>> import numpy as np, cudistr
    >>> q = np.zeros((1, 1, 64, 16), np.float32)
    >>> cudistr.group(q, cudistr.LSH(group_size=2)).shape
    (1, 1, 1, 16)
    """
    adopted = normalize.adopt(q=q) if k is None else normalize.adopt(q=q, k=k)
    q_in, k_in = adopted.arrays if len(adopted.arrays) == 2 else (*adopted.arrays, None)
    normalize.check_group(q_in, reduction, k_in)
    result, _ = launch.columns(q_in, k_in, reduction, adopted.stream)
    return result if adopted.restore is None else adopted.restore(result)


def merge(outs: Sequence[Any], lses: Sequence[Any], *, return_lse: bool = False) -> Any:
    """Combine attention over shards of the keys into attention over all of them.

    ``lse = log sum_s exp(lse_s)``, ``out = sum_s exp(lse_s - lse) out_s``.

    Parameters
    ----------
    outs : sequence of arrays (batch, heads, seqlen_q, head_dim_v)
        What :func:`attention` returned for each shard of k and v, at most 32.
    lses : sequence of float32 arrays (batch, heads, seqlen_q)
        The ``lse`` that belongs to each.
    return_lse : bool, default False
        Whether to return the combined ``lse`` too.

    Returns
    -------
    out : array (batch, heads, seqlen_q, head_dim_v)
        Dtype and kind of the shards. A row that sees no key in any shard is 0.
    lse : float32 array (batch, heads, seqlen_q)
        Only with ``return_lse``.

    Raises
    ------
    TypeError, ValueError, UnsupportedDeviceError, CudaUnavailableError, CompileError
        As :func:`attention`.

    Examples
    --------
    >>> import numpy as np, cudistr
    >>> q = np.ones((1, 1, 2, 8), np.float32)
    >>> shards = [cudistr.attention(q, q, q, return_lse=True) for _ in range(2)]
    >>> cudistr.merge([out for out, lse in shards], [lse for out, lse in shards]).shape
    (1, 1, 2, 8)
    """
    outs, lses = list(outs), list(lses)
    named = {f"outs[{i}]": x for i, x in enumerate(outs)} | {f"lses[{i}]": x for i, x in enumerate(lses)}
    adopted = normalize.adopt(**named)
    outs, lses = adopted.arrays[: len(outs)], adopted.arrays[len(outs) :]
    normalize.check_merge(outs, lses)
    out, lse = launch.merge(outs, lses, return_lse, adopted.stream)
    if adopted.restore is not None:
        out = adopted.restore(out)
        lse = None if lse is None else adopted.restore(lse)
    return (out, lse) if return_lse else out
