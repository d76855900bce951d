"""Attention over several GPUs, one process for each: heads or the sequence shared among them.

Processes are started by ``mpiexec`` with mpi4py, or by a launcher of yours. CuPy arrays travel over NCCL, NumPy arrays
over MPI.
"""

from __future__ import annotations

from cudistr.distributed.group import Group, connect
from cudistr.distributed.schedule import Layout
from cudistr.errors import DistributedError

__all__ = ["DistributedError", "Group", "Layout", "connect"]
