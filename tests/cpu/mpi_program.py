"""What a rank of tests/cpu/test_mpi.py and tests/gpu/test_several_gpus.py does, under mpiexec. Writes how it ended.

python mpi_program.py CASE FOLDER TRANSPORT
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

import cudistr
from cudistr.distributed import DistributedError, Layout, connect
from tests import fake_nccl
from tests.emulation import fake_cupy
from tests.strategies import BFLOAT16, random

CASE, FOLDER, TRANSPORT = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
SEQLEN = 257
DEADLINE = 1.0


def arrays(dtype=np.float32, heads=6):
    q = random(0, 1, heads, SEQLEN, 16, dtype=dtype)
    return q, *(random(i, 1, heads, SEQLEN, 16, dtype=dtype) for i in (1, 2))


def placed(group, host):
    """Where the group computes."""
    if group.device is None:
        return host
    import cupy

    cupy.cuda.Device(group.device).use()
    return [cupy.asarray(x) for x in host]


def works(group):
    """Every way of sharing, against one call."""
    reduction = cudistr.LSH(2, block_q=64, near=10, sinks=2)
    for dtype, parallel, options in (
        (np.float32, "context", {"causal": True}),
        (np.float32, "heads", {"causal": True, "reduction": reduction}),
        (np.float32, "context", {"causal": True, "reduction": reduction}),
        (BFLOAT16, "context", {"window": (50, None)}),
        (BFLOAT16, "heads", {"window": (50, None)}),
    ):
        host = arrays(dtype, heads=2 * SIZE)
        layout = Layout.split(SEQLEN, SIZE, zigzag=True, block=64)
        mine = [group.shard(x, layout) for x in placed(group, host)]
        out, lse = group.attention(*mine, layout=layout, parallel=parallel, return_lse=True, **options)
        found, found_lse = group.gather(out, layout), group.gather(lse, layout)
        if group.device is None:
            expected, expected_lse = cudistr.attention(*host, return_lse=True, **options)
            step = 2.0**-8 if dtype == BFLOAT16 else 2.0**-22
            found, expected = (x.astype(np.float64) for x in (found, expected))
            np.testing.assert_allclose(found, expected, rtol=step, atol=1e-7)
            np.testing.assert_allclose(found_lse, expected_lse, rtol=2.0**-22, atol=1e-7)
        else:
            from tests.gpu.util import baseline, compare, compare_lse

            wide = (x.astype(np.float64) for x in host)
            like, like_lse = cudistr.reference.attention(*wide, return_lse=True, **options)
            base, base_lse = baseline(*host, np, **options)
            compare(found, like, base)
            compare_lse(found_lse, like_lse, base_lse)


def breaks(group, how):
    """The last rank does not take part in the second call, or not in the middle of it."""
    q, k, v = arrays()
    layout = Layout.split(SEQLEN, SIZE)
    mine = [group.shard(x, layout) for x in placed(group, (q, k, v))]
    group.attention(*mine, layout=layout)
    for transport in filter(None, (group._transport, getattr(group._transport, "_control", None))):
        transport.timeout = DEADLINE  # not before: processes do not start at once
    if RANK == SIZE - 1:
        how(group)
    group.attention(*mine, layout=layout)


def dies(group):
    os._exit(9)


def dies_in_the_ring(group):
    group._transport.start = lambda *arguments: os._exit(9)


def is_late(group):
    time.sleep(DEADLINE + 0.5)


def raises(group):
    raise ZeroDivisionError("a mistake of the caller's")


def gpus(count):
    """Connect with a stand-in for CuPy that has so many GPUs: no message travels after that."""
    with fake_cupy.installed() as cupy, fake_nccl.installed(cupy, None):
        cupy.cuda.runtime.getDeviceCount = lambda: count
        with connect(timeout=60.0) as group:
            assert (group.device, group.rank, group.size) == (RANK, RANK, SIZE)


def never_connects():
    """The last rank does other things."""
    if RANK == SIZE - 1:
        time.sleep(60)
        return
    connect(timeout=DEADLINE, transport=TRANSPORT)


def main():
    if CASE == "never_connects":
        MPI.COMM_WORLD.Barrier()  # processes do not start at once
        return never_connects()
    if CASE.endswith("_gpus"):
        return gpus(int(CASE[0]))
    with connect(timeout=60.0, transport=TRANSPORT) as group:
        if CASE == "works":
            works(group)
        else:
            breaks(group, globals()[CASE])


if __name__ == "__main__":
    began = time.monotonic()
    try:
        main()
        ended = {"error": None}
    except Exception as error:
        own = (
            {"ranks": error.ranks, "operation": error.operation}
            if isinstance(error, DistributedError)
            else {}
        )
        ended = {"error": type(error).__name__, "message": str(error), **own}
    ended["seconds"] = time.monotonic() - began
    (FOLDER / f"{RANK}.json").write_text(json.dumps(ended))
    sys.exit(ended["error"] is not None)
