"""Arrays and options in, a frozen, printable :class:`Problem` out: the only place that refuses user input."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import operator
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cudistr.errors import CudaUnavailableError
from cudistr.reductions import (
    KEEP_MULTIPLE,
    LSH,
    MAX_RANK,
    RANK_MULTIPLE,
    Energy,
    Fitted,
    LowRank,
    Reduction,
)

__all__ = [
    "Adopted",
    "NearKeys",
    "Problem",
    "Ranked",
    "adopt",
    "check_exact_if_faster",
    "check_group",
    "check_merge",
    "check_out",
    "check_sample",
    "check_tolerance",
    "exact",
    "keeping",
    "near_keys",
    "problem",
]

MAX_HEAD_DIM = 256  # the output row of a warp has to stay in registers
MAX_SEQLEN = (
    2**31 - 1024
)  # positions are 32-bit inside a kernel; the margin keeps sums with a tile from wrapping
FAMILIES = ("portable", "hopper")  # of attention kernels
MAX_SHARDS = 32  # pointers that the merge kernel takes in its parameter block

SMALL_SEQLEN_Q = (
    64  # up to here a 128-row tile would be half empty; heads may share one, and no keys come in blocks
)
EXACT_BLOCK_SEQLEN_K = 4096  # from so many keys on blocks of exact ones are a small part of them

_DTYPES = {
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.float32): "float32",
}
_DTYPES_REFERENCE = {**_DTYPES, np.dtype(np.float64): "float64"}
_DLPACK_CPU, _DLPACK_CUDA, _DLPACK_CUDA_HOST, _DLPACK_CUDA_MANAGED = 1, 2, 3, 13


class Ranked(NamedTuple):
    """Qhat and Khat beside q and k, of which every head uses the first columns, as many as an array says.

    A head that uses head_dim columns has those of q and k themselves. Or all of them have what stands for q, of as many
    columns, in the place of Qhat, and k itself. Strides are in elements.
    """

    columns: int  # of Qhat and Khat
    q_strides: tuple[int, int, int]
    k_strides: tuple[int, int, int]
    copied: bool = False  # whether something stands for q
    alike: bool = False  # whether heads that are not exact all use all of these columns


@dataclass(frozen=True)
class Problem:
    """What was asked for. Strides are in elements, for the axes (batch, head, position).

    Attributes
    ----------
    left, right : int or None
        Keys visible on either side of a query's own position, bottom-right aligned; None is unbounded.
        ``causal`` has become ``right = 0``.
    aligned : bool
        Whether every row of q, k and v starts at a multiple of 16 bytes, so that it can be copied
        asynchronously in chunks of 16 bytes.
    tf32 : bool
        Whether float32 products may round their operands to TF32, as ``CUPY_TF32=1`` asks for.
    device : int or None
        CUDA device of the arrays, None for NumPy arrays.
    family : str or None
        The family of kernels that ``CUDISTR_KERNEL`` asks for, ``"portable"`` or ``"hopper"``; None leaves the choice
        to the planner.
    near, sinks : int
        Keys that the reduction leaves exact: less than ``near`` positions away from the query's own, and the first
        ``sinks``. They have left ``reduction``, whose own are 0.
    exact_block : tuple of int
        Queries and keys of a block: where one of its keys stays exact for one of its queries, all do for all of them.
    rank : int or None
        Columns that a projection leaves of Q and K where it reduces. ``reduction`` is None then.
    ranked : Ranked or None
        If heads differ in the columns of Q and K that count, or leave keys exact: where those of fewer than head_dim
        columns have theirs.
    restore : bool
        Whether the lse of reduced keys gets back what a reduction that goes by K leaves out: if others are exact.
    """

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: str
    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    reduction: LSH | Energy | None
    q_strides: tuple[int, int, int]
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    aligned: bool
    tf32: bool
    device: int | None
    family: str | None = None
    near: int = 0
    sinks: int = 0
    exact_block: tuple[int, int] = (1, 1)
    rank: int | None = None
    ranked: Ranked | None = None
    restore: bool = False

    def __post_init__(self) -> None:
        # Problems are looked up on every call: hash the fields once. Equality stays that of the fields.
        fields = tuple(vars(self).values())
        object.__setattr__(self, "_hash", hash(fields))

    def __hash__(self) -> int:
        return self.__dict__["_hash"]  # type: ignore[no-any-return]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the output: (batch, heads, seqlen_q, head_dim_v)."""
        return (self.batch, self.heads, self.seqlen_q, self.head_dim_v)

    @property
    def reduced(self) -> bool:
        """Whether a reduction was asked for that is not exact attention by itself."""
        return self.reduction is not None or self.rank is not None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: the output has no element, or no query has a key."""
        return 0 in self.out_shape or self.seqlen_k == 0


@functools.lru_cache(maxsize=1024)
def exact(problem: Problem) -> Problem:
    """The problem without its reduction. Kept, since a call may need it every time."""
    changes: dict[str, Any] = {"near": 0, "sinks": 0, "exact_block": (1, 1), "restore": False}
    return dataclasses.replace(problem, reduction=None, rank=None, **changes)


@functools.lru_cache(maxsize=1024)
def with_rank(problem: Problem, reduction: LowRank) -> Problem:
    """An exact problem with low-rank factors of its own, of fewer columns than it has."""
    return keeping(dataclasses.replace(problem, rank=reduction.rank), reduction.near, reduction.sinks)


def keeping(problem: Problem, near: int, sinks: int) -> Problem:
    """The reduced problem with so many exact keys: to the key, or whole blocks of them where that is faster.

    Blocks are whole tiles of queries of both kernels, and of the longest tiles of keys of the Hopper kernel, so that no
    tile has to be multiplied both ways, and no pass over the keys ends within one. Queries: two tiles of the Hopper
    kernel, or three of the portable one, for up to 64 columns of V; one for more, and where K is summed in groups.
    Groups of more than 128 columns have no kernel of their own for exact keys, and no blocks.
    """
    block = 1, 1
    if (near or sinks) and problem.seqlen_q > SMALL_SEQLEN_Q and problem.seqlen_k >= EXACT_BLOCK_SEQLEN_K:
        columns = problem.head_dim_v
        block = (384, 128) if columns <= 64 else (128, 192) if columns <= 128 else (128, 128)
        if problem.reduction is not None and not problem.reduction.by_keys:
            columns = max(columns, problem.head_dim)
            block = (128, 192) if columns <= 64 else (128, 128) if columns <= 128 else (1, 1)
    near, sinks = (
        min(near, problem.seqlen_q + problem.seqlen_k),
        min(sinks, problem.seqlen_k),
    )  # more is no more
    return dataclasses.replace(problem, near=near, sinks=sinks, exact_block=block)


class NearKeys(NamedTuple):
    """Which keys stay exact for the queries of a block of ``rows``.

    Those from ``start`` up to but not including ``stop``, counted from the first of these queries, and what is left
    of the blocks of ``keys`` that they begin and end in; and the first ``sinks``, whole blocks. There are none near a
    query where ``start`` is not below ``stop``; then nothing is a block.
    """

    start: int
    stop: int
    rows: int
    keys: int
    sinks: int


@functools.lru_cache(maxsize=1024)
def near_keys(problem: Problem) -> NearKeys:
    """The keys of a problem that stay exact."""
    position = problem.seqlen_k - problem.seqlen_q  # of the first query
    rows, keys = problem.exact_block
    sinks = min(-(-problem.sinks // keys) * keys, problem.seqlen_k)
    if problem.near == 0:
        rows = keys = 1
    return NearKeys(position - problem.near + 1, position + rows - 1 + problem.near, rows, keys, sinks)


class Adopted(NamedTuple):
    """Arrays of the caller as CuPy or NumPy arrays, and the way back.

    ``restore`` turns a result into the caller's kind of array (None: it already is), ``stream`` is the
    CuPy stream to work on (None: CuPy's current one).
    """

    arrays: list[Any]
    restore: Callable[[Any], Any] | None
    stream: Any


def _library(array: Any) -> str:
    library = type(array).__module__.partition(".")[0]
    return "jax" if library == "jaxlib" else library  # jax's arrays are defined in its compiled half


def _kind(value: Any) -> str:
    """The value's type as a message names it; of a class, passed where an instance should be, the class."""
    kind = value if isinstance(value, type) else type(value)
    named = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return f"the class {named}" if isinstance(value, type) else named


def adopt(**named: Any) -> Adopted:
    """Take the caller's arrays: CuPy and NumPy arrays as they are, others through DLPack without a copy.

    Raises
    ------
    TypeError
        If something is not an array, arrays of several libraries are mixed, or an array's library cannot
        hand it over.
    """
    loaded = sys.modules.get("cupy")  # nobody can hold a CuPy array without having imported it
    arrays = list(named.values())
    kinds = {type(x) for x in arrays}
    if not arrays or kinds == {np.ndarray}:
        return Adopted(arrays, None, None)
    if loaded is not None and kinds == {loaded.ndarray}:
        for x in arrays:  # the usual case first: this runs on every call
            if x.strides and x.strides[-1] != x.itemsize:
                return Adopted([_whole_rows(n, x) for n, x in named.items()], None, None)
        return Adopted(arrays, None, None)
    for name, array in named.items():
        if not hasattr(array, "__dlpack__") or not hasattr(array, "shape"):
            raise TypeError(
                f"{name} must be an array (CuPy, NumPy, or any with __dlpack__, such as torch and jax), "
                f"got {_kind(array)}. Convert it, for example with cupy.asarray({name})."
            )
    libraries = {name: _library(x) for name, x in named.items()}
    if len(set(libraries.values())) > 1:
        came = ", ".join(f"{name}: {library}" for name, library in libraries.items())
        raise TypeError(
            f"arrays of different libraries are mixed ({came}). Bring them to one library and one device first, "
            "for example with cupy.asarray(...)."
        )
    library = next(iter(libraries.values()))
    if library in ("numpy", "cupy"):  # subclasses; only the plain array has the plain meaning
        name, array = next(
            (n, x) for n, x in named.items() if _kind(x) not in ("numpy.ndarray", "cupy.ndarray")
        )
        raise TypeError(
            f"{name} must be a plain array, got {_kind(array)}. Pass a view with {library}.asarray."
        )
    devices = {name: array.__dlpack_device__() for name, array in named.items()}
    kinds_of_device = {int(kind) for kind, _ in devices.values()}
    if kinds_of_device == {_DLPACK_CPU}:
        return Adopted([_import_host(n, x) for n, x in named.items()], _restorer(library), None)
    if not kinds_of_device <= {_DLPACK_CUDA, _DLPACK_CUDA_MANAGED}:
        raise TypeError(
            "q, k, v (and out) must be all on one CUDA device or all on the host, got DLPack devices "
            f"{ {n: (int(a), int(b)) for n, (a, b) in devices.items()} }. Move them to one device."
        )
    try:
        import cupy
    except ImportError as error:
        raise CudaUnavailableError(
            f"arrays on a GPU need CuPy, which cannot be imported ({error}). Install it: "
            'pip install "cudistr[cuda12]" or "cudistr[cuda13]". Run `python -m cudistr doctor` for what is missing.'
        ) from error

    index = int(next(iter(devices.values()))[1])
    stream = _foreign_stream(library, index)
    with cupy.cuda.Device(index):
        if stream is None:
            imported = [_whole_rows(n, _import_device(n, x)) for n, x in named.items()]
        else:
            with stream:
                imported = [_whole_rows(n, _import_device(n, x)) for n, x in named.items()]
    return Adopted(imported, _restorer(library), stream)


def _whole_rows(name: str, array: Any) -> Any:
    """The array itself, or a copy if its last axis is not contiguous. ``out`` is never copied."""
    if not array.size or not array.strides or array.strides[-1] == array.itemsize or name == "out":
        return array
    import cupy

    with array.device:
        return cupy.ascontiguousarray(array)


def _handover_error(name: str, array: Any, error: Exception) -> TypeError:
    remedy = "Detach it (cudistr has no backward pass) or convert it to a supported dtype first."
    if "bfloat16" in str(getattr(array, "dtype", "")):
        remedy = (
            "bfloat16 cannot travel to NumPy through DLPack: move it to the GPU, or convert it to float32."
        )
    return TypeError(
        f"{name}: {_library(array)} could not hand the array over through DLPack ({error}). {remedy}"
    )


def _import_host(name: str, array: Any) -> Any:
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise _handover_error(name, array, error) from error


def _import_device(name: str, array: Any) -> Any:
    import cupy

    try:
        return cupy.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise _handover_error(name, array, error) from error


def _foreign_stream(library: str, device: int) -> Any:
    """The stream that the arrays' own library works on, so that its allocator may reuse their memory safely."""
    if library != "torch":
        return None  # jax keeps its streams to itself; DLPack orders CuPy's stream after the producer
    import cupy

    handle = sys.modules["torch"].cuda.current_stream(device).cuda_stream
    if handle == 0:
        return cupy.cuda.Stream.null
    return _external_stream(handle, device)


@functools.lru_cache(maxsize=64)
def _external_stream(handle: int, device: int) -> Any:
    import cupy

    class Foreign:  # CuPy 14 wants the protocol object instead of the bare handle
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, handle)

    with cupy.cuda.Device(device):
        if hasattr(cupy.cuda.Stream, "from_external"):
            return cupy.cuda.Stream.from_external(Foreign())
        return cupy.cuda.ExternalStream(handle, device)


def _restorer(library: str) -> Callable[[Any], Any]:
    for module in (library, f"{library}.dlpack"):  # jax keeps it in jax.dlpack
        try:
            return importlib.import_module(module).from_dlpack  # type: ignore[no-any-return]
        except (ImportError, AttributeError):
            continue
    raise TypeError(
        f"{library} has no from_dlpack, so that a result cannot be given back as one of its arrays. "
        "Pass CuPy or NumPy arrays, for example with cupy.from_dlpack(...)."
    )


def _real(name: str, value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number ({what}), got {_kind(value)}. Pass a Python float.")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite ({what}), got {number}.")
    return number


def _window(window: Any) -> tuple[int | None, int | None]:
    form = "Pass (left, right): keys visible before and after a query's own position, None for no bound."
    if isinstance(window, str | bytes) or not isinstance(window, Sequence) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right), got {window!r}. {form}")
    sides: list[int | None] = []
    for name, side in zip(("left", "right"), window, strict=True):
        if side is None:
            sides.append(None)
            continue
        if isinstance(side, bool):
            raise TypeError(f"window: {name} must be an integer or None, got bool {side!r}. {form}")
        try:
            number = operator.index(side)
        except TypeError:
            raise TypeError(
                f"window: {name} must be an integer or None, got {type(side).__name__} {side!r}. {form}"
            ) from None
        if number < 0:
            raise ValueError(f"window: {name} must not be negative, got {number}. {form}")
        sides.append(number)
    return sides[0], sides[1]


def _tf32() -> bool:
    """CuPy's own switch for its float32 products."""
    return os.environ.get("CUPY_TF32", "0") not in ("", "0")


def _family() -> str | None:
    """The family of kernels that is asked for, for comparisons of one with the other."""
    wanted = os.environ.get("CUDISTR_KERNEL") or None
    if wanted is not None and wanted not in FAMILIES:
        raise ValueError(
            f"the environment variable CUDISTR_KERNEL must be one of {', '.join(FAMILIES)}, got {wanted!r}. "
            "Unset it to leave the choice to cudistr."
        )
    return wanted


def _device(array: Any) -> int | None:
    return None if type(array) is np.ndarray else int(array.device.id)


def problem(
    q: Any,
    k: Any,
    v: Any,
    *,
    reduction: Reduction | None = None,
    causal: Any = False,
    window: Any = None,
    scale: Any = None,
    softcap: Any = None,
    reference: bool = False,
) -> Problem:
    """Check CuPy or NumPy arrays and options; see :func:`cudistr.attention` for what is allowed.

    ``reference`` admits float64 NumPy arrays, and nothing but NumPy arrays.

    Raises
    ------
    TypeError
        For kinds and dtypes.
    ValueError
        For shapes, devices and values, and for a ``CUDISTR_KERNEL`` that is not a family of kernels.
    """
    if reduction is not None and not isinstance(reduction, Reduction):
        raise TypeError(
            f"reduction must be None (exact), a cudistr.LSH, a cudistr.Energy, a cudistr.LowRank or a "
            f"cudistr.Projection, got {_kind(reduction)}. Pass, for example, cudistr.LSH(group_size=2)."
        )
    outline = None if reduction is None else reduction.outline
    if causal is not True and causal is not False:
        if not isinstance(causal, np.bool_):
            raise TypeError(f"causal must be True or False, got {_kind(causal)} {causal!r}.")
        causal = bool(causal)
    if window is not None:
        window = _window(window)
    if scale is not None:
        scale = _real("scale", scale, "the factor on the scores, 1/sqrt(head_dim) if None")
    if softcap is not None:
        softcap = _real("softcap", softcap, "scores become softcap * tanh(scores / softcap), None for no cap")
        if softcap <= 0:
            raise ValueError(f"softcap must be positive, got {softcap}. Pass None for no cap.")
    on_host = type(q) is np.ndarray
    if reference and not (on_host and type(k) is np.ndarray and type(v) is np.ndarray):
        raise TypeError(
            f"cudistr.reference takes NumPy arrays, got {_kind(q)}, {_kind(k)}, {_kind(v)}. "
            "Bring them to the host, for example with cupy.asnumpy."
        )
    family = None
    if on_host:
        device, pointers = None, 0
    else:
        family = _family()
        device = q.data.device_id
        for name, array in (("k", k), ("v", v)):
            if array.data.device_id != device:
                raise ValueError(
                    f"q, k and v must be on one device, got q on {device} and {name} on {array.data.device_id}. "
                    f"Move {name} with cupy.asarray under cupy.cuda.Device({device})."
                )
        pointers = q.data.ptr | k.data.ptr | v.data.ptr
    tf32 = q.dtype == np.float32 and _tf32()
    return _problem(
        q.shape, k.shape, v.shape, q.strides, k.strides, v.strides, q.dtype, k.dtype, v.dtype,
        pointers % 16 == 0, tf32, device, family, outline, causal, window, scale, softcap, reference,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _problem(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    q_bytes: tuple[int, ...],
    k_bytes: tuple[int, ...],
    v_bytes: tuple[int, ...],
    q_dtype: np.dtype[Any],
    k_dtype: np.dtype[Any],
    v_dtype: np.dtype[Any],
    pointers_aligned: bool,
    tf32: bool,
    device: int | None,
    family: str | None,
    outline: LSH | Energy | LowRank | Fitted | None,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float | None,
    reference: bool,
) -> Problem:
    """The checks that depend on values alone, so that a repeated call pays for them once."""
    dtype = _check_dtype("q", q_dtype, reference)
    layouts = (
        ("q", q_shape, "(batch, heads, seqlen_q, head_dim)"),
        ("k", k_shape, "(batch, heads_kv, seqlen_k, head_dim)"),
        ("v", v_shape, "(batch, heads_kv, seqlen_k, head_dim_v)"),
    )
    for name, shape, layout in layouts:
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 axes {layout}, got {len(shape)} with shape {shape}. "
                "Add the missing axes with [None], or reshape."
            )
    for name, other in (("k", k_dtype), ("v", v_dtype)):
        if other != q_dtype:
            raise TypeError(
                f"q, k and v must have one dtype, got q {q_dtype} and {name} {other}. Convert with {name}.astype."
            )
    batch, heads, seqlen_q, head_dim = q_shape
    heads_kv, seqlen_k, head_dim_v = k_shape[1], k_shape[2], v_shape[3]
    for name, shape in (("k", k_shape), ("v", v_shape)):
        if shape[0] != batch:
            raise ValueError(f"{name}: batch must be that of q, {batch}, got {shape[0]} (shape {shape}).")
    if v_shape[1:3] != k_shape[1:3]:
        raise ValueError(
            f"v must have the heads_kv and seqlen_k of k, {k_shape[1:3]}, got {v_shape[1:3]} (shape {v_shape})."
        )
    if k_shape[3] != head_dim:
        raise ValueError(f"k: head_dim must be that of q, {head_dim}, got {k_shape[3]} (shape {k_shape}).")
    if heads and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(
            f"heads of q must be a multiple of heads of k and v (grouped-query attention), got {heads} and {heads_kv}."
        )
    for name, size in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        _check_head_dim(name, size)
    for name, size in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
        if size > MAX_SEQLEN:
            raise ValueError(
                f"{name} must be at most {MAX_SEQLEN}, got {size}. Split it and use cudistr.merge."
            )
    reduction, rank, near, sinks = None, None, 0, 0
    if isinstance(outline, LSH | Energy):
        _check_columns(outline, head_dim)
        if _terms(outline, head_dim) < head_dim:
            reduction = dataclasses.replace(outline, near=0, sinks=0)
            near, sinks = outline.near, outline.sinks
    elif isinstance(outline, LowRank):
        _check_rank(outline.rank, head_dim)
        _check_no_softcap("LowRank", softcap)
        if outline.rank < head_dim:
            rank, near, sinks = outline.rank, outline.near, outline.sinks
    elif outline is not None:
        _check_projection(outline, (heads, heads_kv, head_dim))
        _check_no_softcap("Projection", softcap)
        if outline.rank < head_dim or outline.mixed:
            rank, near, sinks = outline.rank, outline.near, outline.sinks
    left, right = window if window is not None else (None, None)
    if causal:
        right = 0
    span = seqlen_q + seqlen_k  # a wider bound sees no more
    left = None if left is None or left >= span else left
    right = None if right is None or right >= span else right
    itemsize = q_dtype.itemsize
    if device is not None:
        for name, shape, steps in (("q", q_shape, q_bytes), ("k", k_shape, k_bytes), ("v", v_shape, v_bytes)):
            _check_steps(name, shape, steps, itemsize)
    strides = [
        row_strides(s, b, itemsize) for s, b in ((q_shape, q_bytes), (k_shape, k_bytes), (v_shape, v_bytes))
    ]
    found = Problem(
        batch=batch,
        heads=heads,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        scale=1.0 / math.sqrt(head_dim) if scale is None else scale,
        softcap=softcap,
        left=left,
        right=right,
        reduction=reduction,
        q_strides=strides[0],
        k_strides=strides[1],
        v_strides=strides[2],
        aligned=pointers_aligned and all(rows_aligned(0, s, itemsize) for s in strides),
        tf32=tf32,
        device=device,
        family=family,
        restore=reduction is not None and reduction.by_keys and bool(near or sinks) and softcap is None,
        rank=rank,
    )
    return keeping(found, near, sinks) if found.reduced else found


def _check_steps(name: str, shape: tuple[int, ...], steps: tuple[int, ...], itemsize: int) -> None:
    """Refuse elements that do not start at multiples of their size: a kernel could not load them."""
    if any(step % itemsize for step, size in zip(steps, shape, strict=True) if size > 1):
        raise ValueError(
            f"{name}: strides must be multiples of the item size, {itemsize} bytes, got {steps} for shape {shape}. "
            f"Pass {name}.copy()."
        )


def row_strides(shape: tuple[int, ...], in_bytes: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
    """Strides in elements; an axis of length 1 is never stepped over, so its stride says nothing."""
    b, h, n = (s // itemsize if size > 1 else 0 for s, size in zip(in_bytes[:3], shape[:3], strict=True))
    return b, h, n


def rows_aligned(pointer: int, strides: tuple[int, int, int], itemsize: int) -> bool:
    """Whether every row starts at a multiple of 16 bytes; strides are in elements."""
    return pointer % 16 == 0 and all(stride * itemsize % 16 == 0 for stride in strides)


def _check_dtype(name: str, dtype: np.dtype[Any], reference: bool) -> str:
    allowed = _DTYPES_REFERENCE if reference else _DTYPES
    try:
        return allowed[dtype]
    except KeyError:
        raise TypeError(
            f"{name} must be {', '.join(allowed.values())}, got {dtype}. Convert it with {name}.astype."
        ) from None


def _check_head_dim(name: str, size: int) -> None:
    if size < 8 or size > MAX_HEAD_DIM or size % 8:
        nearest = min(MAX_HEAD_DIM, max(8, -(-size // 8) * 8))
        remedy = (
            "Split the head."
            if size > MAX_HEAD_DIM
            else f"Pad with zeros to {nearest} (and pass the scale you mean)."
        )
        raise ValueError(f"{name} must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {size}. {remedy}")


def _terms(reduction: LSH | Energy, head_dim: int) -> int:
    """Columns of Q and K that the product of a reduction has."""
    return reduction.keep if isinstance(reduction, Energy) else head_dim // reduction.group_size


def _check_columns(reduction: LSH | Energy, head_dim: int) -> None:
    if isinstance(reduction, Energy):
        if reduction.keep > head_dim:
            remedy = (
                f"Pass {head_dim // KEEP_MULTIPLE * KEEP_MULTIPLE} or less"
                if head_dim >= KEEP_MULTIPLE
                else "This head_dim has too few columns to leave any out: pass reduction=None"
            )
            raise ValueError(
                f"reduction: keep must be at most head_dim {head_dim}, got {reduction.keep}. {remedy}."
            )
        return
    if head_dim % reduction.group_size or head_dim // reduction.group_size % 8:
        allowed = [g for g in range(1, head_dim // 8 + 1) if head_dim % g == 0 and head_dim // g % 8 == 0]
        raise ValueError(
            f"reduction: group_size must divide head_dim {head_dim} into a multiple of 8 columns, got "
            f"{reduction.group_size}. Allowed here: {', '.join(map(str, allowed))}."
        )


def _check_projection(outline: Fitted, found: tuple[int, int, int]) -> None:
    fitted = (outline.heads, outline.heads_kv, outline.head_dim)
    if fitted != found:
        numbers = "{} heads over {} of head_dim {}"
        raise ValueError(
            f"reduction: the projection was fitted for {numbers.format(*fitted)}, got q and k with "
            f"{numbers.format(*found)}. Fit one on q and k of this layer: cudistr.Projection.fit(q, k, rank=...)."
        )


def _check_rank(rank: int, head_dim: int) -> None:
    allowed = [*range(RANK_MULTIPLE, min(head_dim, MAX_RANK + 1), RANK_MULTIPLE), head_dim]
    if rank not in allowed:
        raise ValueError(
            f"reduction: rank must be a multiple of {RANK_MULTIPLE} up to {MAX_RANK} and below head_dim {head_dim}, or "
            f"head_dim, got {rank}. Allowed here: {', '.join(map(str, allowed))}."
        )


def _check_no_softcap(name: str, softcap: float | None) -> None:
    if softcap is not None:
        raise ValueError(
            f"softcap cannot be used with a cudistr.{name}, got {softcap}: it takes the mean off the keys, which "
            "softmax does not see, but softcap does. Use cudistr.LSH, or no softcap."
        )


def _bounds(array: Any) -> tuple[int, int]:
    """First byte and one past the last byte that an array touches."""
    start = array.ctypes.data if type(array) is np.ndarray else array.data.ptr
    if array.size == 0:
        return start, start
    spans = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    return start + sum(s for s in spans if s < 0), start + sum(s for s in spans if s > 0) + array.itemsize


def check_out(out: Any, problem: Problem, inputs: Sequence[Any], *, dtype: str | None = None) -> None:
    """Refuse an ``out`` that cannot take the result: kind, dtype, shape, device, layout, overlap.

    Raises
    ------
    TypeError, ValueError
    """
    if type(out) is not type(inputs[0]):
        raise TypeError(f"out must be of the kind of q, {_kind(inputs[0])}, got {_kind(out)}.")
    wanted = dtype or problem.dtype
    if _DTYPES_REFERENCE.get(out.dtype) != wanted:
        raise TypeError(f"out must have dtype {wanted}, got {out.dtype}.")
    if out.shape != problem.out_shape:
        raise ValueError(
            f"out must have shape (batch, heads, seqlen_q, head_dim_v) = {problem.out_shape}, got {out.shape}."
        )
    if _device(out) != problem.device:
        raise ValueError(f"out must be on the device of q, {problem.device}, got {out.device.id}.")
    if type(out) is np.ndarray and not out.flags.writeable:
        raise ValueError(
            "out must be writable, got a read-only array. Pass a writable one; jax arrays never are, so leave out away."
        )
    if out.size and out.strides[3] != out.itemsize:
        raise ValueError(
            f"out: the last axis must be contiguous, got strides {out.strides} bytes. "
            "Allocate it with empty(shape), or a transposed view of (batch, seqlen_q, heads, head_dim_v)."
        )
    if problem.device is not None:
        _check_steps("out", out.shape, out.strides, out.itemsize)
    if out.size and _self_overlap(out):
        raise ValueError(
            f"out must not overlap itself, got strides {out.strides} bytes. Pass an array of its own."
        )
    low, high = _bounds(out)
    for name, array in zip(("q", "k", "v"), inputs, strict=True):
        start, stop = _bounds(array)
        if start < stop and low < high and low < stop and start < high:
            raise ValueError(
                f"out must not share memory with {name}: bytes {low:#x}-{high:#x} and {start:#x}-{stop:#x} overlap. "
                "Pass an array of its own; one that is interleaved with an input counts as overlapping."
            )


def _self_overlap(array: Any) -> bool:
    """Whether two indices share an element, for the layouts that slicing and transposing make."""
    axes = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    reach = array.itemsize
    for stride, size in axes:
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def check_group(q: Any, reduction: Any, k: Any = None, *, reference: bool = False) -> None:
    """Refuse bad arguments of :func:`cudistr.group`.

    Raises
    ------
    TypeError, ValueError
    """
    if type(reduction) not in (LSH, Energy):
        raise TypeError(
            f"reduction must be a cudistr.LSH or a cudistr.Energy, got {_kind(reduction)}. "
            "Pass, for example, cudistr.LSH(group_size=2)."
        )
    if (k is None) == reduction.by_keys:
        raise TypeError(
            "k must be given for a cudistr.Energy and for representative='rank1', which go by its columns too. "
            "Pass k as for attention."
            if k is None
            else "k must be None for this cudistr.LSH, which goes by q alone. Leave k away."
        )
    arrays = {"q": q} if k is None else {"q": q, "k": k}
    for name, array in arrays.items():
        if reference and type(array) is not np.ndarray:
            raise TypeError(f"cudistr.reference takes NumPy arrays, got {_kind(array)}. Use cupy.asnumpy.")
        if len(array.shape) != 4:
            raise ValueError(
                f"{name} must have 4 axes (batch, heads, seqlen_{name}, head_dim), got {len(array.shape)} "
                f"with shape {array.shape}. Add the missing axes with [None], or reshape."
            )
        _check_dtype(name, array.dtype, reference)
        if type(array) is not np.ndarray:
            _check_steps(name, array.shape, array.strides, array.itemsize)
        if array.shape[2] > MAX_SEQLEN:
            raise ValueError(f"seqlen_{name} must be at most {MAX_SEQLEN}, got {array.shape[2]}.")
    _check_head_dim("head_dim", q.shape[3])
    _check_columns(reduction, q.shape[3])
    if k is not None:
        # What the two have to have in common is what attention asks for; v is not looked at.
        problem(q, k, k, reduction=reduction, reference=reference)


def check_merge(outs: Sequence[Any], lses: Sequence[Any], *, reference: bool = False) -> None:
    """Refuse bad arguments of :func:`cudistr.merge`; the shards are CuPy or NumPy arrays by now.

    Raises
    ------
    TypeError, ValueError
    """
    if len(outs) != len(lses) or not outs:
        raise ValueError(
            f"outs and lses must be lists of one length, at least 1, got {len(outs)} and {len(lses)}. "
            "Pass what attention(..., return_lse=True) returned for each shard of the keys."
        )
    if len(outs) > MAX_SHARDS:
        raise ValueError(
            f"at most {MAX_SHARDS} shards are merged at once, got {len(outs)}. Merge in two rounds."
        )
    first = outs[0]
    if reference and type(first) is not np.ndarray:
        raise TypeError(
            f"cudistr.reference takes NumPy arrays, got outs[0] {_kind(first)}. Use cupy.asnumpy."
        )
    for named, arrays in (("outs", outs), ("lses", lses)):
        for i, array in enumerate(arrays):
            if type(array) is not type(first):
                raise TypeError(
                    f"{named}[{i}] must be of the kind of outs[0], {_kind(first)}, got {_kind(array)}. Convert it."
                )
            if _device(array) != _device(first):
                raise ValueError(
                    f"{named}[{i}] must be on the device of outs[0], {_device(first)}, "
                    f"got {_device(array)}. Move it there first."
                )
    if len(first.shape) != 4:
        raise ValueError(
            f"outs[0] must have 4 axes (batch, heads, seqlen_q, head_dim_v), got {len(first.shape)} "
            f"with shape {first.shape}."
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_dtype(f"outs[{i}]", out.dtype, reference)
        if out.dtype != first.dtype:
            raise TypeError(f"outs must have one dtype, got {first.dtype} and outs[{i}] {out.dtype}.")
        if lse.dtype != np.float32 and not (reference and lse.dtype == np.float64):
            raise TypeError(f"lses[{i}] must be float32, as attention returns it, got {lse.dtype}.")
        if out.shape != first.shape:
            raise ValueError(f"outs must have one shape, got {first.shape} and outs[{i}] {out.shape}.")
        if lse.shape != first.shape[:3]:
            raise ValueError(
                f"lses[{i}] must have shape (batch, heads, seqlen_q) = {first.shape[:3]}, got {lse.shape}."
            )


def check_tolerance(tolerance: Any, problem: Problem, reduction: Any) -> float:
    """``tolerance`` of :func:`cudistr.attention` as a float.

    Raises
    ------
    TypeError, ValueError
    """
    number = _real(
        "tolerance", tolerance, "the largest relative error of the output of a head, 0.02 for example"
    )
    if not 0 < number < 1:
        raise ValueError(
            f"tolerance must be between 0 and 1, got {number}. It is the largest relative error of the output of a "
            "head: pass 0.02, for example, or None."
        )
    if reduction is None:  # the call picks one
        return number
    if not isinstance(reduction.outline, LowRank | Fitted):
        raise TypeError(
            f"tolerance is for a reduction that is a cudistr.LowRank or a cudistr.Projection, got reduction "
            f"{_kind(reduction)}. Pass cudistr.LowRank(rank=...), or leave tolerance away."
        )
    if problem.head_dim % RANK_MULTIPLE:
        raise ValueError(
            f"tolerance needs a head_dim that is a multiple of {RANK_MULTIPLE}, got {problem.head_dim}. "
            "Pad q and k with zeros (and pass the scale you mean)."
        )
    return number


def check_exact_if_faster(value: Any) -> bool | None:
    """``exact_if_faster`` of :func:`cudistr.attention`.

    Raises
    ------
    TypeError
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(
        f"exact_if_faster must be True, False or None, got {_kind(value)} {value!r}. True takes exact attention where "
        "the reduction is slower, False never does, None does with a tolerance."
    )


def check_sample(rows: Any, seed: Any) -> tuple[int, int]:
    """``rows`` and ``seed`` of :func:`cudistr.attention_error` and of `Projection.fit` as Python ints.

    Raises
    ------
    TypeError, ValueError
    """
    numbers = []
    for name, value, remedy in (
        ("rows", rows, "Pass how many query rows of each head to sample, 64 for example."),
        ("seed", seed, "Pass an integer from 0 to 2**32 - 1."),
    ):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, got {_kind(value)} {value!r}. {remedy}")
        numbers.append(operator.index(value))
    if numbers[0] < 1:
        raise ValueError(
            f"rows must be at least 1, got {numbers[0]}. Pass 64, for example; as many as there are takes all."
        )
    if not 0 <= numbers[1] < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {numbers[1]}.")
    return numbers[0], numbers[1]
