"""What becomes of errors that MPI itself raises, with a communicator that is none."""

from __future__ import annotations

import numpy as np
import pytest

from cudistr.distributed import DistributedError, transport
from cudistr.distributed.transport import Message, Mpi


class Request:
    def __init__(self, comm):
        self.comm = comm

    def Test(self):
        if self.comm.broken:
            raise RuntimeError("MPI_ERR_PROC_FAILED")
        return True


class Communicator:
    """Of two ranks, the other of which answers nothing."""

    rank, size = 0, 2

    def __init__(self):
        self.broken = False

    def Idup(self):
        return self, Request(self)

    def Irecv(self, *arguments):
        return Request(self)

    def Isend(self, *arguments):
        return Request(self)

    def Iprobe(self, *arguments, **options):
        if self.broken:
            raise RuntimeError("MPI_ERR_COMM")
        return False


@pytest.fixture
def ended(monkeypatch):
    """Whether the process would end with MPI_Abort, which would end the tests here."""
    calls = []
    monkeypatch.setattr(transport, "_end_without_finalize", lambda: calls.append(None))
    monkeypatch.setattr(transport, "GRACE", 0.01)
    return calls


@pytest.mark.parametrize("call", ["exchange", "ring"])
def test_an_error_of_mpi_names_rank_and_operation(ended, call):
    comm = Communicator()
    group = Mpi(comm, 60.0)
    x = np.zeros(4, np.float32)
    comm.broken = call == "ring"
    if call == "ring":
        group.start([], [Message(x, 1)], "step 1 of 1 of the ring")
        wait, operation = group.finish, "step 1 of 1 of the ring"
    else:
        comm.Isend = lambda *arguments: setattr(comm, "broken", True) or Request(comm)
        wait, operation = lambda: group.exchange({}, "agreeing on attention"), "agreeing on attention"
    with pytest.raises(DistributedError) as error:
        wait()
    assert str(error.value).startswith(
        f"rank 0, {operation}: rank 1 did not answer (MPI says: MPI_ERR_PROC_FAILED)."
    )
    assert (error.value.ranks, error.value.operation) == ((1,), operation)
    assert ended
    with pytest.raises(DistributedError, match="the group has failed or was left before. Connect again."):
        group.exchange({}, "agreeing on attention")


def test_arrays_without_elements_do_not_travel():
    group = Mpi(Communicator(), 60.0)
    nothing = np.zeros((1, 2, 0, 8), np.float32)
    assert not group.start([Message(nothing, 1)], [Message(nothing, 1)], "a call")._requests
