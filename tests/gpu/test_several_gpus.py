"""Several GPUs and NCCL itself: the processes of tests/cpu/test_mpi.py, with a GPU each."""

from __future__ import annotations

import pytest

from tests.cpu import mpi
from tests.cpu.test_mpi import run


def gpus() -> int:
    """That CuPy sees, and can connect."""
    try:
        import cupy

        if not cupy.cuda.is_available():
            return 0
        from cupy.cuda import nccl
    except ImportError:
        return 0
    return int(cupy.cuda.runtime.getDeviceCount()) if nccl.available else 0


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.hardware,
    pytest.mark.skipif(
        gpus() < 2 or not mpi.available(), reason="needs several GPUs, NCCL, mpi4py and mpiexec"
    ),
]

SIZES = sorted({2, gpus()})


@pytest.mark.parametrize("size", SIZES)
def test_works(size, tmp_path):
    assert [rank["error"] for rank in run("works", size, tmp_path, "nccl")] == [None] * size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["dies", "dies_in_the_ring"])
def test_a_rank_that_dies_is_named_by_all_others(case, size, tmp_path):
    *others, dead = run(case, size, tmp_path, "nccl")
    assert dead is None
    for found in others:
        assert found["error"] == "DistributedError", found
        assert found["ranks"] == [size - 1], found


def test_a_rank_that_is_late_is_named_by_all(tmp_path):
    for found in run("is_late", 2, tmp_path, "nccl"):
        assert found["error"] == "DistributedError" and found["ranks"] == [1], found


def test_an_error_on_one_rank_ends_the_others(tmp_path):
    first, last = run("raises", 2, tmp_path, "nccl")
    assert last["error"] == "ZeroDivisionError"
    assert first["ranks"] == [1] and "left the group after ZeroDivisionError" in first["message"]
