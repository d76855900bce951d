"""A stand-in for ``cupy.cuda.nccl``: ranks are threads with streams on one GPU, and messages are copies on it.

It has what cudistr uses, with the signatures of CuPy 14, and refuses what NCCL would refuse or never finish: calls after
an end, messages outside a group whose other end is not in one, lengths that differ. Where NCCL only queues a message,
``groupEnd`` here waits for the other rank, so that nothing is ever under way that nobody will complete.
"""

from __future__ import annotations

import sys
import threading
import types
from contextlib import contextmanager
from typing import Any
from unittest import mock

from cudistr import normalize
from tests.cpu.ranks import Network

NCCL_UINT8 = 1
ID_BYTES = 128


class NcclError(RuntimeError):
    """As CuPy's; the text is NCCL's."""


class Nccl(types.ModuleType):
    """The module."""

    NCCL_UINT8 = NCCL_UINT8
    NcclError = NcclError
    available = True

    def __init__(self, cupy: Any, network: Network | None = None) -> None:
        super().__init__("cupy.cuda.nccl")
        self.cupy, self.network = cupy, network
        self.calls: list[tuple[Any, ...]] = []
        self.async_error: str | None = None
        self.refuses: str | None = None
        self._group = threading.local()
        nccl = self

        class NcclCommunicator:
            """Of one rank."""

            def __init__(self, ndev: int, commId: bytes, rank: int, config: Any = None) -> None:
                assert type(commId) is bytes and len(commId) == ID_BYTES and 0 <= rank < ndev
                nccl.calls.append(("init", ndev, rank))
                self.rank, self.alive = rank, True

            def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
                """Queue a message of the group."""
                nccl._queue(self, "send", sendbuf, count, datatype, peer, stream)

            def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
                """Queue a message of the group."""
                nccl._queue(self, "recv", recvbuf, count, datatype, peer, stream)

            def check_async_error(self) -> None:
                """Raise what went wrong behind the calls."""
                assert self.alive
                if nccl.async_error is not None:
                    raise NcclError(nccl.async_error)

            def abort(self) -> None:
                """End."""
                nccl.calls.append(("abort", self.rank))
                self.alive = False

            def destroy(self) -> None:
                """End."""
                nccl.calls.append(("destroy", self.rank))
                self.alive = False

        self.NcclCommunicator = NcclCommunicator

    def get_unique_id(self) -> bytes:
        """As CuPy 14 gives it."""
        return bytes(range(ID_BYTES))

    def groupStart(self) -> None:
        """Begin to queue."""
        assert getattr(self._group, "queued", None) is None, "a group in a group"
        self.calls.append(("groupStart",))
        self._group.queued = []

    def _queue(self, comm: Any, *call: Any) -> None:
        queued = getattr(self._group, "queued", None)
        assert queued is not None, "a message outside a group may wait for ever"
        way, pointer, count, datatype, peer, stream = call
        assert comm.alive and pointer and count > 0 and peer != comm.rank
        assert datatype == NCCL_UINT8 and type(stream) is int
        if self.refuses is not None:
            raise NcclError(self.refuses)
        self.calls.append((way, comm.rank, peer, count))
        queued.append((comm, *call))

    def groupEnd(self) -> None:
        """Copy, on the streams, after what the streams hold."""
        self.calls.append(("groupEnd",))
        queued, self._group.queued = self._group.queued, None
        if self.network is None:  # a rank alone: nobody ever answers
            return
        for comm, way, pointer, count, _, peer, stream in queued:
            if way == "send":
                self.network.put(comm.rank, peer, (pointer, count, self._event(stream)))
        for comm, way, pointer, count, _, peer, stream in queued:
            if way == "recv":
                source, sent, ready = self.network.take(peer, comm.rank)
                assert sent == count, f"rank {comm.rank} takes {count} bytes, rank {peer} sends {sent}"
                self._wait(stream, ready)
                runtime = self.cupy.cuda.runtime
                runtime.memcpyAsync(pointer, source, count, runtime.memcpyDeviceToDevice, stream)
                self.network.put(comm.rank, -1 - peer, self._event(stream))
        for comm, way, _, _, _, peer, stream in queued:
            if way == "send":
                self._wait(stream, self.network.take(peer, -1 - comm.rank))

    def _event(self, stream: int) -> Any:
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(self._stream(stream))
        return event

    def _wait(self, stream: int, event: Any) -> None:
        self._stream(stream).wait_event(event)

    def _stream(self, stream: int) -> Any:
        if not stream:
            return self.cupy.cuda.Stream.null
        return normalize._external_stream(stream, self.cupy.cuda.Device().id)


@contextmanager
def installed(cupy: Any, network: Network | None) -> Any:
    """The stand-in in place of NCCL for a while."""
    fake = Nccl(cupy, network)
    with (
        mock.patch.dict(sys.modules, {fake.__name__: fake}),
        mock.patch.object(cupy.cuda, "nccl", fake, create=True),
    ):
        yield fake
