"""Bytes from rank to rank, with a deadline: MPI for arrays on the host, NCCL for those on a GPU.

Nothing here blocks without looking at the clock. A rank that gives up tells the others, where MPI is there to tell them
with, so that all end within moments of each other and can say who was missing.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from cudistr.distributed.schedule import of_ranks
from cudistr.errors import DistributedError

__all__ = ["Message", "Mpi", "Nccl", "Transfer", "Transport"]

HEADER_BYTES = 4096  # of what ranks tell each other before a call
GRACE = 1.0  # seconds in which ranks collect each other's reports of a failure
PAUSE = 2e-5  # seconds between two looks at what is under way


class Message(NamedTuple):
    """An array to send or to fill, contiguous, and the other rank."""

    array: Any
    peer: int


class Transfer(abc.ABC):
    """Messages under way."""

    @abc.abstractmethod
    def arrive(self) -> None:
        """Let what the caller does next, on the host or on its stream, see the arrays that were received."""


class Transport(abc.ABC):
    """What the ranks of a group have in common. After an error it cannot be used any more."""

    rank: int
    size: int
    device: int | None  # None is the host
    timeout: float  # seconds that a rank waits for another

    @abc.abstractmethod
    def exchange(self, header: dict[str, Any], operation: str) -> list[dict[str, Any]]:
        """Give every rank the header of every rank. Waits for all of them."""

    @abc.abstractmethod
    def start(self, sends: Sequence[Message], receives: Sequence[Message], operation: str) -> Transfer:
        """Begin to move arrays, after all that the caller's stream has been given to do. Does not wait.

        Between two ranks messages arrive in the order in which they were sent. Arrays without elements do not travel.
        """

    @abc.abstractmethod
    def finish(self) -> None:
        """Wait until all that was started has arrived: its arrays may be freed then."""

    @abc.abstractmethod
    def leave(self, reason: str | None) -> None:
        """Give up the connection; a reason is told to the other ranks, who should not wait any more."""


def pack(header: dict[str, Any]) -> NDArray[np.uint8]:
    """A header as bytes of one length; a long text is cut."""
    text = json.dumps(header).encode()
    while len(text) > HEADER_BYTES:
        longest = max(header, key=lambda name: len(str(header[name])))
        header = {**header, longest: str(header[longest])[: len(str(header[longest])) // 2] + "..."}
        text = json.dumps(header).encode()
    return np.frombuffer(text.ljust(HEADER_BYTES), np.uint8)


def unpack(data: NDArray[np.uint8]) -> dict[str, Any]:
    """The header of :func:`pack`."""
    header: dict[str, Any] = json.loads(data.tobytes())
    return header


def in_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The memory of a contiguous array: MPI knows no bfloat16."""
    return array.reshape(-1).view(np.uint8)


class Mpi(Transport):
    """mpi4py's point-to-point messages between NumPy arrays; also how ranks with GPUs tell each other what went wrong.

    Raises
    ------
    DistributedError
        If the ranks do not come to connect.
    """

    device = None
    _DATA, _HEADER, _REPORT = 1, 2, 3  # tags
    _HELLO = 0x7D15  # on the caller's communicator, which should have no such tag

    def __init__(self, comm: Any, timeout: float) -> None:
        self.rank, self.size, self.timeout = int(comm.rank), int(comm.size), timeout
        self._failed = self._joined = False
        self._going: list[MpiTransfer] = []
        self._told: list[Any] = []
        marks = np.zeros(self.size, np.uint8)
        hello = [(r, comm.Irecv(marks[r : r + 1], r, self._HELLO)) for r in self._others()]
        hello += [(r, comm.Isend(marks[:0], r, self._HELLO)) for r in self._others()]
        self.wait(hello, "connecting")
        self._comm, request = comm.Idup()  # of our own, so that messages of the caller's do not meet ours
        self.wait([(r, request) for r in range(self.size)], "connecting")
        self._joined = True

    def exchange(self, header: dict[str, Any], operation: str) -> list[dict[str, Any]]:
        """As :meth:`Transport.exchange`."""
        self.look(operation)
        own, others = pack(header), np.empty((self.size, HEADER_BYTES), np.uint8)
        others[self.rank] = own
        requests = [(r, self._comm.Irecv(others[r], r, self._HEADER)) for r in self._others()]
        requests += [(r, self._comm.Isend(own, r, self._HEADER)) for r in self._others()]
        self.wait(requests, operation)
        return [unpack(other) for other in others]

    def start(self, sends: Sequence[Message], receives: Sequence[Message], operation: str) -> Transfer:
        """As :meth:`Transport.start`."""
        requests = [
            (m.peer, self._comm.Irecv(in_bytes(m.array), m.peer, self._DATA))
            for m in receives
            if m.array.size
        ]
        requests += [
            (m.peer, self._comm.Isend(in_bytes(m.array), m.peer, self._DATA)) for m in sends if m.array.size
        ]
        transfer = MpiTransfer(self, requests, operation)
        self._going.append(transfer)
        return transfer

    def finish(self) -> None:
        """As :meth:`Transport.finish`."""
        for transfer in self._going:
            transfer.arrive()
        self._going.clear()

    def wait(self, requests: Sequence[tuple[int, Any]], operation: str) -> None:
        """Wait for requests, each with the rank that it is about."""
        left = list(requests)
        deadline = time.monotonic() + self.timeout
        while True:
            peers = sorted({peer for peer, _ in left})
            try:
                left = [(peer, request) for peer, request in left if not request.Test()]
            except Exception as error:  # MPI's own account of a peer that is gone
                self.fail(operation, peers, f"MPI says: {error}")
            if not left:
                return
            self.look(operation)
            if time.monotonic() > deadline:
                self.fail(operation, peers, f"nothing came for {self.timeout:g} s")
            time.sleep(PAUSE)

    def look(self, operation: str) -> None:
        """Fail if another rank has failed, or this one before."""
        if self._failed:
            raise DistributedError(
                f"rank {self.rank}, {operation}: the group has failed or was left before. Connect again.",
                (self.rank,),
                operation,
            )
        if self._joined and self._comm.Iprobe(tag=self._REPORT):
            self.fail(operation, [], "")

    def fail(self, operation: str, waiting_for: Sequence[int], why: str) -> NoReturn:
        """Tell the others, hear for a while what they have to say, and raise an error that names who was missing.

        A rank that says nothing is the one. In a ring all wait for a rank that waits itself, so whom this rank has
        waited for says little; it is what is left where all have reported.
        """
        self._failed = True
        _end_without_finalize()
        own = {"operation": operation, "why": why, "ranks": sorted(waiting_for), "left": False}
        reports = self._reports(own) if self._joined else {}
        left = [rank for rank, report in reports.items() if report["left"]]
        silent = [r for r in range(self.size) if r not in reports and r != self.rank]
        if left:
            raise _lost(self.rank, operation, left, reports[left[0]]["why"])
        told = next((report for report in reports.values() if report["why"]), None)
        if not why and told is not None:
            why = f"another rank gave up in: {told['operation']}; {told['why']}"
            waiting_for = told["ranks"]
        raise _lost(self.rank, operation, silent if silent and self._joined else waiting_for, why)

    def _reports(self, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(Exception):  # MPI may be what is broken
            self._tell(own)
            self._hear(found)
        return found

    def _hear(self, found: dict[int, dict[str, Any]]) -> None:
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and len(found) < self.size - 1:
            for peer in self._others():
                if peer not in found and self._comm.Iprobe(peer, self._REPORT):
                    taken = np.empty(HEADER_BYTES, np.uint8)
                    self._comm.Recv(taken, peer, self._REPORT)
                    found[peer] = unpack(taken)
            time.sleep(1e-3)

    def _tell(self, report: dict[str, Any]) -> None:
        data = pack(report)
        # Kept, not waited for: a rank that is gone takes nothing.
        self._told = [data, *(self._comm.Isend(data, peer, self._REPORT) for peer in self._others())]

    def _others(self) -> list[int]:
        return [r for r in range(self.size) if r != self.rank]

    def leave(self, reason: str | None) -> None:
        """As :meth:`Transport.leave`."""
        if self._failed:
            return
        self._failed = True
        if reason is None:
            self._comm.Free()  # nothing is under way over it
        elif self.size > 1:
            _end_without_finalize()
            self._tell(
                {"operation": "", "why": f"it left the group after {reason}", "ranks": [], "left": True}
            )


class MpiTransfer(Transfer):
    """Requests of MPI."""

    def __init__(self, transport: Mpi, requests: Sequence[tuple[int, Any]], operation: str) -> None:
        self._transport, self._requests, self._operation = transport, list(requests), operation

    def arrive(self) -> None:
        """As :meth:`Transfer.arrive`."""
        self._transport.wait(self._requests, self._operation)
        self._requests.clear()


class Nccl(Transport):
    """NCCL's point-to-point messages between CuPy arrays, on a stream of their own.

    They travel as bytes, which is right for every dtype; CuPy's table of NCCL's has no bfloat16.

    Parameters
    ----------
    size, rank, unique_id
        As for ``cupy.cuda.nccl.NcclCommunicator``.
    device : int
        The GPU of this rank.
    control : Mpi, optional
        How ranks tell each other about calls and failures. Without it they do over NCCL, and after a failure each has
        only its own account.

    Raises
    ------
    DistributedError
        If the ranks do not come to connect.
    """

    def __init__(
        self,
        size: int,
        rank: int,
        unique_id: bytes,
        device: int,
        timeout: float,
        control: Mpi | None,
    ) -> None:
        import cupy
        from cupy.cuda import nccl

        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self._cupy, self._nccl, self._control = cupy, nccl, control
        self._failed = False
        self._comm: Any = None
        self._going: list[tuple[Any, list[int], str]] = []
        with cupy.cuda.Device(device):
            self._stream = cupy.cuda.Stream(non_blocking=True)

        def connect() -> None:
            with cupy.cuda.Device(device):
                self._comm = nccl.NcclCommunicator(size, unique_id, rank)
                # NCCL connects two ranks with their first message, and blocks while it does.
                self._marks = marks = cupy.zeros((2, size), np.uint8)
                cupy.cuda.get_current_stream().synchronize()
                others = [r for r in range(size) if r != rank]
                with self._stream:
                    self.start(
                        [Message(marks[0, r : r + 1], r) for r in others],
                        [Message(marks[1, r : r + 1], r) for r in others],
                        "connecting",
                    )

        self._guard(connect)
        self.finish()

    def _guard(self, work: Callable[[], None]) -> None:
        """Run what can block in NCCL on a thread that can be left behind."""
        errors: list[Exception] = []

        def run() -> None:
            try:
                work()
            except Exception as error:
                errors.append(error)

        others = [r for r in range(self.size) if r != self.rank]
        thread = threading.Thread(target=run, name="cudistr-connect", daemon=True)
        thread.start()
        deadline = time.monotonic() + self.timeout
        while thread.is_alive():
            self._look("connecting")
            if time.monotonic() > deadline:
                self._fail("connecting", others, f"NCCL has not connected the ranks for {self.timeout:g} s")
            thread.join(1e-3)
        if errors:
            if isinstance(errors[0], DistributedError):
                raise errors[0]
            self._fail("connecting", others, f"NCCL says: {errors[0]}")

    def exchange(self, header: dict[str, Any], operation: str) -> list[dict[str, Any]]:
        """As :meth:`Transport.exchange`."""
        if self._control is not None:
            try:
                return self._control.exchange(header, operation)
            except DistributedError:
                self._abort()
                raise
        self._look(operation)
        cupy = self._cupy
        with cupy.cuda.Device(self.device), self._stream:
            own = cupy.asarray(pack(header))
            others = cupy.zeros((self.size, HEADER_BYTES), np.uint8)
            peers = [r for r in range(self.size) if r != self.rank]
            self.start([Message(own, r) for r in peers], [Message(others[r], r) for r in peers], operation)
            self.finish()
            others[self.rank] = own
            return [unpack(other) for other in cupy.asnumpy(others)]

    def start(self, sends: Sequence[Message], receives: Sequence[Message], operation: str) -> Transfer:
        """As :meth:`Transport.start`."""
        cupy, stream = self._cupy, self._stream
        # The buffers of the messages are ready, and those to be filled are no longer read, when what the caller's
        # stream holds now is done.
        ready = cupy.cuda.Event(disable_timing=True)
        ready.record(cupy.cuda.get_current_stream())
        stream.wait_event(ready)
        sends, receives = ([m for m in messages if m.array.size] for messages in (sends, receives))
        peers = sorted({m.peer for m in (*sends, *receives)})
        if peers:
            try:
                self._nccl.groupStart()
                try:
                    for way, messages in ((self._comm.recv, receives), (self._comm.send, sends)):
                        for array, peer in messages:
                            way(array.data.ptr, array.nbytes, self._nccl.NCCL_UINT8, peer, stream.ptr)
                finally:
                    self._nccl.groupEnd()
            except self._nccl.NcclError as error:
                self._fail(operation, peers, f"NCCL says: {error}")
        done = cupy.cuda.Event(disable_timing=True)
        done.record(stream)
        self._going.append((done, peers, operation))
        return NcclTransfer(cupy, done)

    def finish(self) -> None:
        """As :meth:`Transport.finish`."""
        for done, peers, operation in self._going:
            deadline = time.monotonic() + self.timeout
            while not done.done:
                try:
                    self._comm.check_async_error()
                except self._nccl.NcclError as error:
                    self._fail(operation, peers, f"NCCL says: {error}")
                self._look(operation)
                if time.monotonic() > deadline:
                    self._fail(operation, peers, f"nothing came for {self.timeout:g} s")
                time.sleep(PAUSE)
        self._going.clear()

    def _look(self, operation: str) -> None:
        if self._control is not None:
            try:
                self._control.look(operation)
            except DistributedError:
                self._abort()
                raise
        elif self._failed:
            raise DistributedError(
                f"rank {self.rank}, {operation}: the group has failed or was left before. Connect again.",
                (self.rank,),
                operation,
            )

    def _abort(self) -> None:
        """End NCCL's kernels, which would wait for ever."""
        self._failed = True
        self._going.clear()
        if self._comm is not None:
            self._comm.abort()

    def _fail(self, operation: str, waiting_for: Sequence[int], why: str) -> NoReturn:
        self._abort()
        if self._control is not None:
            self._control.fail(operation, waiting_for, why)
        raise _lost(self.rank, operation, waiting_for, why)

    def leave(self, reason: str | None) -> None:
        """As :meth:`Transport.leave`."""
        if self._failed:
            return
        self._failed = True
        if self._control is not None:
            self._control.leave(reason)
        if reason is not None:
            self._comm.abort()
        else:
            self._comm.destroy()


class NcclTransfer(Transfer):
    """An event behind the messages."""

    def __init__(self, cupy: Any, done: Any) -> None:
        self._cupy, self._done = cupy, done

    def arrive(self) -> None:
        """As :meth:`Transfer.arrive`."""
        self._cupy.cuda.get_current_stream().wait_event(self._done)


def _lost(rank: int, operation: str, ranks: Sequence[int], why: str) -> DistributedError:
    who = of_ranks(ranks) if ranks else "another rank"
    if rank in ranks:
        return DistributedError(
            f"rank {rank}, {operation}: the other ranks have given up on this one ({why}). Every rank must make every "
            "call of the group. If it only needed longer, connect with a larger timeout.",
            tuple(ranks),
            operation,
        )
    return DistributedError(
        f"rank {rank}, {operation}: {who} did not answer ({why}). The process may have ended, raised an error, or not "
        "have made the same calls; its own output says which. Every rank must make every call of the group. If it "
        "only needed longer, connect with a larger timeout.",
        tuple(ranks),
        operation,
    )


_ending = False


def _end_without_finalize() -> None:
    """Let this process end with MPI_Abort: MPI_Finalize, which mpi4py calls at exit, would wait for the lost rank."""
    global _ending
    if _ending:
        return
    _ending = True

    def abort() -> None:
        from mpi4py import MPI

        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(GRACE)  # the others have their errors to raise and print
        MPI.COMM_WORLD.Abort(1)

    atexit.register(abort)
