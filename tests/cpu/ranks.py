"""Ranks as threads of one process, one of which runs at a time: a group without MPI and without GPUs."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cudistr.distributed.group import Group
from cudistr.distributed.transport import Message, Transfer, Transport, pack, unpack

TIMEOUT = 60.0  # for tests that hang


class Network:
    """What threads have in common: messages that were sent, and who may run."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.sent: dict[tuple[int, int], deque[Any]] = defaultdict(deque)
        self.started: list[tuple[int, str, list[int], list[int]]] = []  # rank, operation, to whom, from whom

    def take(self, sender: int, receiver: int) -> Any:
        """The next message between two ranks; others run until it is there."""
        box = self.sent[sender, receiver]
        assert self.turn.wait_for(lambda: box, TIMEOUT), f"rank {receiver} waits for rank {sender}"
        return box.popleft()

    def put(self, sender: int, receiver: int, what: Any) -> None:
        """Send."""
        self.sent[sender, receiver].append(what)
        self.turn.notify_all()


def run_ranks(size: int, body: Callable[[int], Any], network: Network) -> list[Any]:
    """What ``body(rank)`` returns on each rank; the first error of any."""
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        with network.turn:
            try:
                results[rank] = body(rank)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT if not errors else 1.0)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


class Threads(Transport):
    """Messages between NumPy arrays of threads: what is sent is copied at once, what is received when it arrives."""

    device = None
    timeout = TIMEOUT

    def __init__(self, rank: int, size: int, network: Network) -> None:
        self.rank, self.size, self.network = rank, size, network
        self.going: list[Arrival] = []

    def exchange(self, header: dict[str, Any], operation: str) -> list[dict[str, Any]]:
        for peer in range(self.size):
            self.network.put(self.rank, peer, pack(header))
        return [unpack(self.network.take(peer, self.rank)) for peer in range(self.size)]

    def start(self, sends: Sequence[Message], receives: Sequence[Message], operation: str) -> Transfer:
        for array, peer in sends:
            assert array.flags.c_contiguous and peer != self.rank
            self.network.put(self.rank, peer, array.copy())
        for array, _ in receives:
            array.view(np.uint8).fill(0xFF)  # NaN, until it arrives
        self.network.started.append(
            (self.rank, operation, [m.peer for m in sends], [m.peer for m in receives])
        )
        transfer = Arrival(self, receives)
        self.going.append(transfer)
        return transfer

    def finish(self) -> None:
        for transfer in self.going:
            transfer.arrive()
        self.going.clear()

    def leave(self, reason: str | None) -> None:
        pass


class Arrival(Transfer):
    def __init__(self, transport: Threads, receives: Sequence[Message]) -> None:
        self.transport, self.receives = transport, list(receives)

    def arrive(self) -> None:
        for array, peer in self.receives:
            data = self.transport.network.take(peer, self.transport.rank)
            assert data.shape == array.shape and data.dtype == array.dtype
            array[...] = data
        self.receives.clear()


def run_groups(size: int, body: Callable[[Group], Any]) -> tuple[list[Any], Network]:
    """What ``body(group)`` returns on each rank of a group of threads, and what they have sent."""
    network = Network()
    found = run_ranks(size, lambda rank: body(Group(Threads(rank, size, network))), network)
    assert not any(network.sent.values()), "messages that nobody received"
    return found, network
