"""How tests start several processes."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def mpiexec() -> str | None:
    """That of the environment, which belongs to mpi4py's MPI there, or another one."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def available() -> bool:
    """Whether processes can be started and connected."""
    return importlib.util.find_spec("mpi4py") is not None and mpiexec() is not None


@functools.cache
def is_hydra() -> bool:
    """Whether it is MPICH's, which can be told to leave the other processes alone when one ends."""
    return (
        "HYDRA"
        in subprocess.run([str(mpiexec()), "--version"], capture_output=True, text=True, check=False).stdout
    )


def command(size: int, *words: str, keep: bool = False) -> list[str]:
    """Words for Python, in several processes; ``keep`` does not end the others when one ends."""
    return [
        str(mpiexec()),
        *(["-disable-auto-cleanup"] if keep else []),
        "-n",
        str(size),
        sys.executable,
        *words,
    ]


def variables(gpus: bool = False) -> dict[str, str]:
    """The environment of the processes: more of them than cores, by whomever; on the host unless there are ``gpus``."""
    return {
        **os.environ,
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}), "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "HYDRA_LAUNCHER": "fork", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }  # fmt: skip
