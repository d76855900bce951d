"""The NCCL transport against a stand-in: what it calls, and how it ends when nobody answers. Kernels: tests/gpu."""

from __future__ import annotations

import functools
import re
import sys
import threading
import types

import numpy as np
import pytest

from cudistr import launch
from cudistr.distributed import DistributedError, Group, connect
from cudistr.distributed.transport import Message, Nccl, pack, unpack
from cudistr.errors import CudaUnavailableError
from tests import fake_nccl
from tests.cpu.ranks import Network, run_ranks
from tests.emulation import fake_cupy
from tests.strategies import BFLOAT16, random

ID = bytes(range(fake_nccl.ID_BYTES))


@pytest.fixture
def cupy():
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture
def alone(cupy):
    """NCCL whose other ranks do not exist."""
    with fake_nccl.installed(cupy, None) as nccl:
        yield nccl


class OneThread(Nccl):
    def _guard(self, work):
        work()


def pending(monkeypatch, cupy):
    """From now on nothing that is recorded gets done."""
    monkeypatch.setattr(cupy.cuda.Event, "done", False)


def array(cupy, dtype=np.float32, length=6):
    return cupy.asarray(random(0, 1, 2, length, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
def test_arrays_travel_as_bytes(cupy, dtype):
    """Of any dtype, each way in one group, with room for shards of any length."""
    lengths = [3, 0, 5]
    arrays = [random(r, 1, 2, n, 8, dtype=dtype) for r, n in enumerate(lengths)]
    network = Network()

    def each(rank):
        group = Group(OneThread(3, rank, ID, 0, 60.0, None))
        return group.gather(cupy.asarray(arrays[rank]))

    with fake_nccl.installed(cupy, network) as nccl:
        found = run_ranks(3, each, network)
    for one in found:
        assert one.dtype == dtype
        np.testing.assert_array_equal(cupy.asnumpy(one), np.concatenate(arrays, axis=2))
    sent = {call[1:] for call in nccl.calls if call[0] == "send"}
    assert {(0, 1, arrays[0].nbytes), (2, 1, arrays[2].nbytes)} <= sent
    marks = [call[0] for call in nccl.calls if call[0].startswith("group")]
    assert marks.count("groupStart") == marks.count("groupEnd") > 0


def test_ranks_are_connected_before_anything_else(alone):
    """With a byte from each to each, in one group: NCCL blocks while it connects two ranks."""
    Nccl(3, 1, ID, 0, 60.0, None)
    assert alone.calls == [
        ("init", 3, 1), ("groupStart",), ("recv", 1, 0, 1), ("recv", 1, 2, 1), ("send", 1, 0, 1), ("send", 1, 2, 1),
        ("groupEnd",),
    ]  # fmt: skip


def fails(call, transport, message, ranks):
    with pytest.raises(DistributedError, match=re.escape(message)) as error:
        call()
    assert error.value.ranks == ranks and error.value.operation == "step 2 of 3 of the ring"
    with pytest.raises(DistributedError, match="the group has failed or was left before. Connect again."):
        transport.exchange({}, "agreeing on attention")


def messages(cupy):
    return [Message(array(cupy), 2)], [Message(array(cupy), 0)]


def test_a_deadline_aborts_and_names_rank_and_operation(monkeypatch, cupy, alone):
    transport = Nccl(3, 1, ID, 0, 0.05, None)
    transport.start(*messages(cupy), "step 2 of 3 of the ring")
    pending(monkeypatch, cupy)
    fails(
        transport.finish,
        transport,
        "rank 1, step 2 of 3 of the ring: ranks 0 and 2 did not answer (nothing came for 0.05 s).",
        (0, 2),
    )
    assert alone.calls[-1] == ("abort", 1)


def test_an_error_of_nccl_aborts(monkeypatch, cupy, alone):
    transport = Nccl(2, 0, ID, 0, 60.0, None)
    transport.start([Message(array(cupy), 1)], [], "step 2 of 3 of the ring")
    pending(monkeypatch, cupy)
    alone.async_error = "NCCL_ERROR_REMOTE_ERROR: remote process exited or there was a network error"
    fails(
        transport.finish,
        transport,
        "rank 1 did not answer (NCCL says: NCCL_ERROR_REMOTE_ERROR: remote process exited",
        (1,),
    )
    assert alone.calls[-1] == ("abort", 0)


def test_a_refused_message_closes_its_group_and_aborts(cupy, alone):
    transport = Nccl(3, 1, ID, 0, 60.0, None)
    alone.refuses = "NCCL_ERROR_INVALID_ARGUMENT: invalid argument"
    start = functools.partial(transport.start, *messages(cupy), "step 2 of 3 of the ring")
    fails(start, transport, "(NCCL says: NCCL_ERROR_INVALID_ARGUMENT", (0, 2))
    assert alone.calls[-3:] == [("groupStart",), ("groupEnd",), ("abort", 1)]


def test_connecting_has_a_deadline(monkeypatch, alone):
    never = threading.Event()
    monkeypatch.setattr(alone, "NcclCommunicator", lambda *arguments: never.wait(60))
    with pytest.raises(
        DistributedError,
        match=r"rank 0, connecting: rank 1 did not answer \(NCCL has not connected the ranks for 0.05 s\)",
    ):
        Nccl(2, 0, ID, 0, 0.05, None)
    never.set()


def test_connecting_says_what_nccl_says(monkeypatch, alone):
    def refuse(*arguments):
        raise fake_nccl.NcclError("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")

    monkeypatch.setattr(alone, "NcclCommunicator", refuse)
    with pytest.raises(DistributedError, match="NCCL says: NCCL_ERROR_SYSTEM_ERROR"):
        Nccl(2, 0, ID, 0, 60.0, None)


class Control:
    """Stands for MPI: says whether another rank has failed, and notes what it is told."""

    def __init__(self):
        self.failed, self.told = False, []

    def look(self, operation):
        if self.failed:
            raise DistributedError("another rank has failed")

    def fail(self, operation, waiting_for, why):
        self.told.append((operation, list(waiting_for), why))
        raise DistributedError("as MPI tells it")

    def leave(self, reason):
        self.told.append(reason)


def test_ranks_tell_each_other_over_mpi(monkeypatch, cupy, alone):
    control = Control()
    transport = Nccl(3, 1, ID, 0, 0.05, control)
    transport.start(*messages(cupy), "step 1 of 2 of the ring")
    pending(monkeypatch, cupy)
    with pytest.raises(DistributedError, match="as MPI tells it"):
        transport.finish()
    assert control.told == [("step 1 of 2 of the ring", [0, 2], "nothing came for 0.05 s")]
    assert alone.calls[-1] == ("abort", 1)


def test_the_failure_of_another_rank_ends_the_wait(monkeypatch, cupy, alone):
    control = Control()
    transport = Nccl(3, 1, ID, 0, 60.0, control)
    transport.start(*messages(cupy), "step 1 of 2 of the ring")
    pending(monkeypatch, cupy)
    control.failed = True
    with pytest.raises(DistributedError, match="another rank has failed"):
        transport.finish()
    assert alone.calls[-1] == ("abort", 1)


def test_leaving(alone):
    control = Control()
    with Group(Nccl(2, 0, ID, 0, 60.0, control)):
        pass
    assert alone.calls[-1] == ("destroy", 0) and control.told == [None]

    def fail():
        with Group(Nccl(2, 0, ID, 0, 60.0, control)):
            raise ZeroDivisionError("no")

    with pytest.raises(ZeroDivisionError):
        fail()
    assert alone.calls[-1] == ("abort", 0) and control.told[-1] == "ZeroDivisionError: no"


def test_what_ranks_tell_each_other_fits():
    header = {"error": "ValueError", "message": "a long text" * 1000, "call": "attention"}
    found = unpack(pack(header))
    assert found["error"] == "ValueError" and found["call"] == "attention"
    assert found["message"].startswith("a long texta") and found["message"].endswith("...")
    assert len(pack(header)) == len(pack({}))
    assert unpack(pack({"window": (3, None), "scale": 0.1})) == {"window": [3, None], "scale": 0.1}


def test_arrays_of_the_host_are_refused(cupy, alone):
    group = Group(Nccl(1, 0, ID, 0, 60.0, None))
    x = np.zeros((1, 1, 4, 8), np.float32)
    with pytest.raises(TypeError, match="this group moves arrays of GPU 0 over NCCL, got arrays on the host"):
        group.attention(x, x, x)


def test_a_capture_is_refused(monkeypatch, cupy, alone):
    group = Group(Nccl(1, 0, ID, 0, 60.0, None))
    x = cupy.zeros((1, 1, 4, 8), np.float32)
    monkeypatch.setattr(launch, "capturing", lambda: True)
    with pytest.raises(ValueError, match="it cannot be captured into a CUDA graph"):
        group.attention(x, x, x)


def test_own_launcher(monkeypatch, alone):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with connect(unique_id=ID) as group:
        assert (group.rank, group.size, group.device) == (1, 2, 0)
    assert alone.calls[0] == ("init", 2, 1)
    with connect(unique_id=ID, rank=0, size=1, device=0) as group:
        assert (group.rank, group.size, group.device) == (0, 1, 0)


def test_missing_nccl_is_named(monkeypatch, cupy):
    missing = types.ModuleType("cupy.cuda.nccl")
    missing.available = False
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", missing)
    monkeypatch.setattr(cupy.cuda, "nccl", missing, raising=False)
    with pytest.raises(CudaUnavailableError, match="pip install nvidia-nccl-cu13"):
        connect(unique_id=ID, rank=0, size=1)


def test_missing_mpi_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"pip install 'cudistr\[distributed\]'"):
        connect()
