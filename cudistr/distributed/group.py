"""The public functions of several processes: connect, and attention over a group."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import types
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from cudistr import launch, normalize
from cudistr.distributed import schedule, solve
from cudistr.distributed.schedule import PARALLEL, Layout
from cudistr.distributed.transport import Mpi, Nccl, Transport
from cudistr.errors import CudaUnavailableError, DistributedError
from cudistr.projection import Projection
from cudistr.reductions import Reduction

__all__ = ["Group", "connect"]

T = TypeVar("T")

# Where launchers write which process of its machine a process is.
LOCAL_RANKS = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
)

# Where they write how many processes they have started (Hydra: MPICH and Intel MPI; Open MPI).
WORLD_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


class Group:
    """The processes that compute together, as one of them sees it. Made by :func:`connect`.

    Use it in a ``with`` statement: an error in one process then ends the others' waiting at once, with a
    :class:`DistributedError` that repeats it. Every process must make the same calls in the same order, from one
    thread.

    Attributes
    ----------
    rank, size : int
        Which of how many processes this one is.
    device : int or None
        Its GPU, on which its arrays have to be (``cupy.cuda.Device(group.device).use()``); None if the group computes
        on the host.
    timeout : float
        Seconds that a process waits for another, the other's computing included, before all give up.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank, self.size, self.device = transport.rank, transport.size, transport.device
        self.timeout = transport.timeout

    def __repr__(self) -> str:
        where = "host" if self.device is None else f"GPU {self.device}"
        return f"Group(rank={self.rank}, size={self.size}, {where})"

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._transport.leave(None if error is None else f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Give the connection up; the end of the ``with`` statement does the same."""
        self._transport.leave(None)

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        parallel: str = "context",
        layout: Layout | tuple[Layout, Layout] | None = None,
        reduction: Reduction | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        tolerance: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """:func:`cudistr.attention` of a sequence of which every rank has some rows.

        Parameters
        ----------
        q : array (batch, heads, own rows, head_dim)
            The rank's rows of the queries. A CuPy array, or any with ``__dlpack__``, on the group's GPU; a NumPy array
            (or one of the host) in a group without GPUs.
        k : array (batch, heads_kv, own rows, head_dim)
            The rank's rows of the keys.
        v : array (batch, heads_kv, own rows, head_dim_v)
            Of the same positions as k.
        parallel : {"context", "heads"}, default "context"
            ``"context"``: every rank computes its own queries, while the shards of k and v pass by in a ring and what
            each adds is merged by its lse. While a rank computes with one shard, the next one is on its way.
            ``"heads"``: an all-to-all gives every rank all rows of some heads, and another one brings the output back.
            The number of ranks must divide heads, and must divide heads_kv or be a multiple of it.
        layout : Layout or (Layout, Layout), optional
            Which rows each rank has, of q and of k and v if these differ. Without it the rows are contiguous, rank
            after rank, as many as each rank passes. Under a causal mask pass
            ``Layout.split(seqlen, size, zigzag=True)``, with which all ranks have the same work in the ring.
        reduction, causal, window, scale, softcap
            As for :func:`cudistr.attention`, of the whole sequence. With an LSH and ``"context"``, ranges of the
            layout of q must begin at multiples of ``block_q``: ``Layout.split(..., block=block_q)``.
        tolerance : float, optional
            As for :func:`cudistr.attention`; of a reduction only with ``parallel="heads"``, because its decision takes
            all keys, while in the ring a call without a reduction is exact. An Energy, a LowRank, and an LSH with
            ``representative="rank1"``, are for ``"heads"`` alone for the same reason. On GPUs ranks whose projection
            would save no time are exact, as there.
        return_lse : bool, default False
            Whether to return ``lse`` too.

        Returns
        -------
        out : array (batch, heads, own rows, head_dim_v)
            The rank's rows, of q's dtype and kind of array.
        lse : float32 array (batch, heads, own rows)
            Only with ``return_lse``.

        Raises
        ------
        TypeError, ValueError
            On every rank if any rank passes what cannot be computed, or if ranks disagree; the message says which.
        DistributedError
            On every rank if one does not answer in time. The group cannot be used any more.
        UnsupportedDeviceError, CudaUnavailableError, CompileError
            As :func:`cudistr.attention`.

        Notes
        -----
        The call returns when all messages have arrived; the last kernels may still be at work on the current stream
        (torch tensors: torch's). It cannot be captured into a CUDA graph. Before a call ranks tell each other what they
        were called with, over MPI; processes connected by ``unique_id`` do over NCCL, and wait for their GPU to do so.

        Results equal a single call's up to rounding, of which there is one more in float16 and bfloat16: what each
        shard of keys adds is rounded to the dtype once, and merged in float32. A block of queries has the groups of
        columns of the single call, whatever keys pass by. Results are the same bits from run to run.

        References
        ----------
        Ring: Liu et al., *Ring Attention with Blockwise Transformers for Near-Infinite Context*, arXiv 2310.01889.
        All-to-all: Jacobs et al., *DeepSpeed Ulysses*, arXiv 2309.14509.

        Examples
        --------
        Under ``mpiexec -n 2 python script.py``, each process having the whole q, k and v:

        >>> from cudistr.distributed import Layout, connect  # doctest: +SKIP
        >>> with connect() as group:  # doctest: +SKIP
        ...     layout = Layout.split(q.shape[2], group.size, zigzag=True)
        ...     mine = [group.shard(x, layout) for x in (q, k, v)]
        ...     out = group.attention(*mine, layout=layout, causal=True)
        ...     whole = group.gather(out, layout)
        """

        def check() -> tuple[Any, dict[str, Any], dict[str, Any]]:
            adopted = normalize.adopt(q=q, k=k, v=v)
            problem = normalize.problem(
                *adopted.arrays,
                reduction=reduction,
                causal=causal,
                window=window,
                scale=scale,
                softcap=softcap,
            )
            self._check_place(problem.device, adopted.stream)
            given = _layouts(layout, self.size)
            if parallel not in PARALLEL:
                raise ValueError(
                    f"parallel must be one of {', '.join(map(repr, PARALLEL))}, got {parallel!r}."
                )
            left, right = (None if x is None else int(x) for x in window or (None, None))
            within = None if tolerance is None else normalize.check_tolerance(tolerance, problem, reduction)
            if reduction is None and parallel == "context":
                within = None  # exact attention keeps to any
            options = solve.Options(
                reduction,
                problem.scale,
                problem.softcap,
                left,
                0 if causal else right,
                within,
            )
            if options.tolerance is not None and parallel == "context":
                raise ValueError(
                    "tolerance needs all keys of a head on one rank, so it cannot be used with parallel='context'. "
                    "Pass parallel='heads', or leave it away."
                )
            if reduction is not None and reduction.by_keys and parallel == "context":
                raise ValueError(
                    "a cudistr.Energy, a cudistr.LowRank, and representative='rank1', go by all keys of a head, so "
                    "they cannot be used with parallel='context'. Pass parallel='heads', or a cudistr.LSH with another "
                    "representative."
                )
            alike = {
                "batch": problem.batch,
                "heads": problem.heads,
                "heads_kv": problem.heads_kv,
                "head_dim": problem.head_dim,
                "head_dim_v": problem.head_dim_v,
                "dtype": problem.dtype,
                "parallel": parallel,
                "causal": bool(causal),
                "window": None if window is None else (left, right),
                "scale": problem.scale,
                "softcap": problem.softcap,
                "reduction": _named(reduction),
                "tolerance": options.tolerance,
                "layout": _digest(given),
                "return_lse": bool(return_lse),
            }
            own = {"rows_q": problem.seqlen_q, "rows_k": problem.seqlen_k}
            return (adopted, problem, given, options), alike, own

        (adopted, problem, given, options), headers = self._agree("attention", check)
        q_in, k_in, v_in = adopted.arrays
        lengths = [[int(h[name]) for h in headers] for name in ("rows_q", "rows_k")]
        queries, keys = map(Layout.contiguous, lengths) if given is None else given
        _check_lengths("q", queries, lengths[0])
        _check_lengths("k", keys, lengths[1])
        if parallel == "heads":
            schedule.head_share(problem.heads, problem.heads_kv, self.size, self.rank)
        else:
            _check_blocks(queries, solve.block_of(problem))
        with launch.placed(problem.device, adopted.stream):
            if parallel == "heads":
                out, lse = solve.heads(
                    self._transport, problem, options, queries, keys, q_in, k_in, v_in, return_lse
                )
            else:
                out, lse = solve.context(self._transport, problem, options, queries, keys, q_in, k_in, v_in)
        if adopted.restore is not None:
            out = adopted.restore(out)
            lse = adopted.restore(lse) if return_lse else None
        return (out, lse) if return_lse else out

    def shard(self, x: Any, layout: Layout) -> Any:
        """The rank's rows of an array that has all of them: a copy, nothing travels.

        Parameters
        ----------
        x : array (batch, heads, seqlen, ...)
            CuPy or NumPy array, or any with ``__dlpack__``.
        layout : Layout
            Which rows each rank has.

        Returns
        -------
        array (batch, heads, own rows, ...)

        Raises
        ------
        TypeError, ValueError
            If the layout is not one of this array and this group.
        """
        if not isinstance(layout, Layout):
            raise TypeError(
                f"layout must be a cudistr.distributed.Layout, got {layout!r}. Pass Layout.split(seqlen, group.size)."
            )
        _layouts(layout, self.size)
        adopted = normalize.adopt(x=x)
        (array,) = adopted.arrays
        if len(array.shape) < 3 or array.shape[2] != layout.seqlen:
            raise ValueError(
                f"x must have the layout's {layout.seqlen} rows in axis 2, got shape {array.shape}. "
                f"Pass Layout.split({array.shape[2] if len(array.shape) > 2 else 'seqlen'}, group.size)."
            )
        on_host = type(array) is np.ndarray
        with launch.placed(None if on_host else array.device.id, adopted.stream):
            share = solve.cut(array, layout, self.rank, solve.module(on_host)).copy()
        return share if adopted.restore is None else adopted.restore(share)

    def gather(self, x: Any, layout: Layout | None = None) -> Any:
        """The rows of all ranks, on every rank: what :meth:`shard` has cut, whole again.

        Parameters
        ----------
        x : array (batch, heads, own rows, ...)
            The output of :meth:`attention`, or its lse.
        layout : Layout, optional
            Which rows each rank has: contiguous, rank after rank, unless given.

        Returns
        -------
        array (batch, heads, seqlen, ...)

        Raises
        ------
        TypeError, ValueError
            On every rank if ranks disagree or the layout does not fit.
        DistributedError
            As :meth:`attention`.
        """

        def check() -> tuple[Any, dict[str, Any], dict[str, Any]]:
            adopted = normalize.adopt(x=x)
            (array,) = adopted.arrays
            self._check_place(None if type(array) is np.ndarray else array.device.id, adopted.stream)
            given = _layouts(layout, self.size)
            if len(array.shape) < 3:
                raise ValueError(
                    f"x must have rows in axis 2, got shape {array.shape}. Pass what attention returned."
                )
            shape = (*array.shape[:2], *array.shape[3:])
            alike = {"shape without rows": str(shape), "dtype": str(array.dtype), "layout": _digest(given)}
            return (adopted, array, given), alike, {"rows": array.shape[2]}

        (adopted, array, given), headers = self._agree("gather", check)
        lengths = [int(h["rows"]) for h in headers]
        whole = Layout.contiguous(lengths) if given is None else given[0]
        _check_lengths("x", whole, lengths)
        with launch.placed(self.device, adopted.stream):
            found = solve.gather(self._transport, array, whole, "gather")
        return found if adopted.restore is None else adopted.restore(found)

    def _check_place(self, device: int | None, stream: Any) -> None:
        """Refuse arrays that are not where the group computes, and a stream that is being captured."""
        if device is None and self.device is not None:
            raise TypeError(
                f"this group moves arrays of GPU {self.device} over NCCL, got arrays on the host. "
                "Convert them with cupy.asarray, or connect(transport='mpi')."
            )
        if device is not None and self.device is None:
            raise TypeError(
                "this group moves arrays on the host over MPI, got arrays on a GPU. "
                "Convert them with cupy.asnumpy, or connect(transport='nccl')."
            )
        if device != self.device:
            raise ValueError(
                f"arrays must be on this rank's GPU {self.device}, got GPU {device}. Move them there."
            )
        if device is not None:
            with launch.placed(device, stream):
                if launch.capturing():
                    raise ValueError(
                        "a call of a group waits for other processes, so it cannot be captured into a CUDA graph. "
                        "Capture cudistr.attention, or end the capture first."
                    )

    def _agree(
        self, call: str, check: Callable[[], tuple[T, dict[str, Any], dict[str, Any]]]
    ) -> tuple[T, list[dict[str, Any]]]:
        """Check a rank's arguments, and that they suit those of the other ranks.

        ``check`` returns what the rank goes on with, what has to be alike on all ranks, and what each rank has of its
        own. Returns the first of these, and what all ranks have. An error of one rank is raised on all.
        """
        failure: Exception | None = None
        try:
            found, alike, own = check()
            header = {**alike, **own}
        except (TypeError, ValueError) as error:
            failure = error
            header = {"error": type(error).__name__, "message": str(error)}
        headers = self._transport.exchange({"call": call, **header}, f"agreeing on {call}")
        if failure is not None:
            raise failure
        for rank, other in enumerate(headers):
            if "error" in other:
                kind = TypeError if other["error"] == "TypeError" else ValueError
                raise kind(f"rank {rank}: {other['message']}")
        schedule.same(["call", *alike], headers)
        return found, headers


def _layouts(layout: Any, size: int) -> tuple[Layout, Layout] | None:
    """The layouts of q and of k and v."""
    if layout is None:
        return None
    pair = layout if isinstance(layout, tuple) else (layout, layout)
    if len(pair) != 2 or not all(isinstance(x, Layout) for x in pair):
        raise TypeError(
            f"layout must be a cudistr.distributed.Layout, or two (of q, of k and v), got {layout!r}. "
            "Pass Layout.split(seqlen, group.size)."
        )
    for one in pair:
        if one.size != size:
            raise ValueError(
                f"layout must have the group's {size} ranks, got {one.size}. Pass Layout.split(seqlen, group.size)."
            )
    return pair[0], pair[1]


def _check_lengths(name: str, layout: Layout, found: list[int]) -> None:
    for rank, (wanted, length) in enumerate(zip(layout.lengths, found, strict=True)):
        if wanted != length:
            raise ValueError(
                f"{name} of rank {rank} must have the {wanted} rows that the layout gives it, got {length}."
            )


def _check_blocks(layout: Layout, block: int) -> None:
    for rank, pieces in enumerate(layout.pieces):
        for start, _ in pieces:
            if start % block:
                raise ValueError(
                    f"layout: with this LSH, ranges of q must begin at multiples of block_q = {block}, got {start} on "
                    f"rank {rank}. Pass Layout.split(seqlen, size, block={block})."
                )


@functools.lru_cache(maxsize=64)
def _named(reduction: Reduction | None) -> str:
    """A reduction as text that is equal for equal ones."""
    if isinstance(reduction, Projection):
        factors = (reduction.queries, reduction.keys, reduction.mean)
        return f"{reduction} {_hash(b''.join(np.ascontiguousarray(x).tobytes() for x in factors))}"
    return str(reduction)


@functools.lru_cache(maxsize=64)
def _digest(layouts: tuple[Layout, Layout] | None) -> str | None:
    """What tells layouts apart, however many ranges they have."""
    return None if layouts is None else _hash(repr(layouts).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def connect(
    comm: Any = None,
    *,
    transport: str | None = None,
    unique_id: bytes | None = None,
    rank: int | None = None,
    size: int | None = None,
    device: int | None = None,
    timeout: float = 300.0,
) -> Group:
    """Connect the processes that compute together; each of them calls this.

    With mpi4py, started by ``mpiexec -n 4 python script.py``, no argument is needed. Processes of another launcher
    pass the ``unique_id`` that one of them has made: ``from cupy.cuda import nccl``, ``nccl.get_unique_id()``.

    Parameters
    ----------
    comm : mpi4py communicator, optional
        ``mpi4py.MPI.COMM_WORLD`` unless given.
    transport : {"nccl", "mpi"}, optional
        ``"nccl"`` moves CuPy arrays between GPUs, ``"mpi"`` NumPy arrays between processes. ``"nccl"`` unless given, if
        CuPy sees a GPU.
    unique_id : bytes, optional
        Of the processes of another launcher; MPI is not used then.
    rank, size : int, optional
        Only with ``unique_id``: which process this is, of how many. The environment variables RANK and WORLD_SIZE
        unless given.
    device : int, optional
        The GPU of this process. Unless given, the processes of a machine take its GPUs in turn; with ``unique_id`` it
        is the environment variable LOCAL_RANK, or else the current device.
    timeout : float, default 300
        Seconds that a process waits for another before it gives up. The other's computing counts: choose more than a
        step of the ring takes, a few seconds at most unless sequences are very long.

    Returns
    -------
    Group

    Raises
    ------
    TypeError, ValueError
        For arguments, and if processes would share a GPU.
    DistributedError
        If a process does not come in time, or mpiexec and mpi4py belong to two MPIs, with which every process would be
        alone.
    CudaUnavailableError
        If CuPy, its GPU or NCCL is missing.
    ImportError
        If mpi4py is missing and there is no ``unique_id``.

    Examples
    --------
    >>> from cudistr.distributed import connect  # doctest: +SKIP
    >>> with connect(timeout=30) as group:  # doctest: +SKIP
    ...     print(group)
    Group(rank=0, size=1, host)
    """
    if transport not in (None, "nccl", "mpi"):
        raise ValueError(f"transport must be 'nccl' or 'mpi', or None to choose, got {transport!r}.")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}.")
    if unique_id is not None:
        if comm is not None or transport == "mpi":
            raise ValueError(
                "unique_id is NCCL's, of processes without MPI: leave comm and transport='mpi' away."
            )
        rank = _from_environment("rank", rank, "RANK")
        size = _from_environment("size", size, "WORLD_SIZE")
        if not 0 <= rank < size:
            raise ValueError(f"rank must be from 0 to size - 1, got rank {rank} of size {size}.")
        if device is None:
            device = (
                _from_environment("device", device, "LOCAL_RANK")
                if "LOCAL_RANK" in os.environ
                else _current()
            )
        _check_nccl()
        return Group(Nccl(size, rank, unique_id, device, timeout, None))
    if rank is not None or size is not None:
        raise ValueError("rank and size belong to unique_id; mpiexec sets them otherwise. Leave them away.")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        raise ImportError(
            f"processes are connected with mpi4py, which cannot be used here ({error}). Install it with an MPI: "
            "pip install 'cudistr[distributed]'. Processes of another launcher can pass unique_id instead."
        ) from error
    if MPI.COMM_WORLD.size == 1:
        _check_alone(MPI.Get_library_version())
    control = Mpi(MPI.COMM_WORLD if comm is None else comm, timeout)
    header: dict[str, Any] = {"host": MPI.Get_processor_name(), "device": device}
    try:
        if transport is None:
            transport = "nccl" if _sees_gpu() else "mpi"
        if transport == "nccl":
            _check_nccl()
            header["identifier"] = list(_unique_id()) if control.rank == 0 else None
        header["transport"] = transport
    except CudaUnavailableError as error:
        header["error"] = str(error)
    headers = control.exchange(header, "connecting")
    for other_rank, other in enumerate(headers):
        if "error" in other:
            raise CudaUnavailableError(f"rank {other_rank}: {other['error']}")
    schedule.same(["transport"], headers)
    if transport == "mpi":
        return Group(control)
    if device is None:
        local = next((os.environ[name] for name in LOCAL_RANKS if os.environ.get(name, "").isdigit()), None)
        before = [h for h in headers[: control.rank] if h["host"] == header["host"]]
        device = (len(before) if local is None else int(local)) % _gpus()
    buses = control.exchange({"gpu": f"{header['host']} {_bus(device)}"}, "connecting")
    taken: dict[str, list[int]] = {}
    for other_rank, other in enumerate(buses):
        taken.setdefault(other["gpu"], []).append(other_rank)
    for gpu, ranks in taken.items():
        if len(ranks) > 1:
            raise ValueError(
                f"every process must have a GPU of its own, got {schedule.of_ranks(ranks)} on one (of machine "
                f"{gpu}). Start as many processes as there are GPUs, or pass device."
            )
    identifier = bytes(headers[0]["identifier"])
    return Group(Nccl(control.size, control.rank, identifier, device, timeout, control))


def _check_alone(version: str) -> None:
    """Refuse a process that is alone for its MPI, though it was started as one of several."""
    for name in WORLD_SIZES:
        started = os.environ.get(name, "")
        if started.isdigit() and int(started) > 1:
            raise DistributedError(
                f"{name} says that this is one of {started} processes, but for mpi4py it is alone: mpi4py uses "
                f"{' '.join(version.split()[:3]).rstrip(',')}, which is not the MPI of this mpiexec. "
                "Start with the mpiexec of that MPI, or install mpi4py and mpich into one environment and use its "
                "mpiexec.",
                operation="connecting",
            )


def _from_environment(name: str, value: int | None, variable: str) -> int:
    if value is not None:
        return int(value)
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        raise ValueError(
            f"{name} must be given with unique_id, or be in the environment variable {variable}, which is "
            f"{os.environ.get(variable)!r}."
        ) from None


def _check_nccl() -> None:
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise CudaUnavailableError(
            f"transport 'nccl' needs CuPy, which cannot be imported ({error}). Install it: "
            'pip install "cudistr[cuda13]", or "cudistr[cuda12]".'
        ) from error
    if not nccl.available:
        raise CudaUnavailableError(
            "transport 'nccl' needs NCCL, which CuPy does not find. Install it: pip install nvidia-nccl-cu13 (or "
            "nvidia-nccl-cu12). transport='mpi' moves NumPy arrays without it."
        )


def _sees_gpu() -> bool:
    try:
        import cupy
    except ImportError:
        return False
    return bool(cupy.cuda.is_available())


def _unique_id() -> bytes:
    from cupy.cuda import nccl

    return bytes(nccl.get_unique_id())


def _gpus() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def _current() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def _bus(device: int) -> str:
    """What tells a GPU from the others of its machine, whatever number a process calls it by."""
    import cupy

    return str(cupy.cuda.runtime.deviceGetPCIBusId(device))
