"""Several processes: results, and how all of them end when one dies, is late, or raises."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cudistr import bench
from tests.cpu import mpi

PROGRAM = Path(__file__).with_name("mpi_program.py")
LIMIT = 120  # seconds, of a test that hangs

pytestmark = pytest.mark.skipif(not mpi.available(), reason="mpi4py and mpiexec are not installed")


def run(case: str, size: int, folder: Path, transport: str = "mpi") -> list[dict | None]:
    """How each rank ended; None for one that wrote nothing."""
    ends_well = case in ("works", "2_gpus")
    if not (ends_well or mpi.is_hydra()):
        pytest.skip("needs the mpiexec of MPICH")
    # mpiexec would end all processes as soon as one does; a launcher on several machines may not notice.
    command = mpi.command(size, str(PROGRAM), case, str(folder), transport, keep=not ends_well)
    done = subprocess.run(
        command,
        cwd=mpi.ROOT,
        env=mpi.variables(transport == "nccl"),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode == 0) == ends_well, done.stdout + done.stderr
    files = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.mark.parametrize("size", [2, 3])
def test_works(size, tmp_path):
    assert [rank["error"] for rank in run("works", size, tmp_path)] == [None] * size


@pytest.mark.parametrize(
    ("case", "operation"),
    [("dies", "agreeing on attention"), ("dies_in_the_ring", "step 1 of 2 of the ring")],
)
def test_a_rank_that_dies_is_named_by_all_others(case, operation, tmp_path):
    *others, dead = run(case, 3, tmp_path)
    assert dead is None
    for rank, found in enumerate(others):
        assert found["error"] == "DistributedError"
        assert found["ranks"] == [2], found
        assert operation in found["operation"] or "step 2 of 2 of the ring" in found["operation"]
        assert found["message"].startswith(f"rank {rank}, {found['operation']}: rank 2 did not answer (")
        assert found["seconds"] < 30  # of a deadline of 1 s, on a machine that does other things too


def test_a_rank_that_is_late_is_named_by_all(tmp_path):
    *others, late = run("is_late", 3, tmp_path)
    for rank, found in enumerate(others):
        assert found["ranks"] == [2], found
        assert found["message"].startswith(f"rank {rank}, agreeing on attention: rank 2 did not answer (")
        assert "for 1 s" in found["message"]
    assert late["ranks"] == [2]
    assert re.match(
        r"rank 2, [^:]+: the other ranks have given up on this one \(another rank gave up in: agreeing on ",
        late["message"],
    )


def test_a_rank_that_does_not_connect_is_named(tmp_path):
    *others, away = run("never_connects", 3, tmp_path)
    assert away is None  # the others ended it with themselves, by MPI_Abort
    for rank, found in enumerate(others):
        assert found["ranks"] == [2], found
        assert found["message"].startswith(
            f"rank {rank}, connecting: rank 2 did not answer (nothing came for 1 s)."
        )


def test_an_error_on_one_rank_ends_the_others_at_once(tmp_path):
    *others, last = run("raises", 3, tmp_path)
    assert last["error"] == "ZeroDivisionError"
    for found in others:
        assert found["ranks"] == [2]
        assert "left the group after ZeroDivisionError: a mistake of the caller's" in found["message"]


def test_ranks_of_a_machine_take_its_gpus_in_turn(tmp_path):
    assert [rank["error"] for rank in run("2_gpus", 2, tmp_path)] == [None] * 2


def test_ranks_that_would_share_a_gpu_are_refused(tmp_path):
    for found in run("1_gpus", 2, tmp_path):
        assert found["error"] == "ValueError"
        assert found["message"].startswith(
            "every process must have a GPU of its own, got ranks 0 and 1 on one (of machine "
        )


def test_a_process_that_its_mpi_does_not_know_is_told_so():
    """As under the mpiexec of another MPI."""
    variables = {**mpi.variables(), "OMPI_COMM_WORLD_SIZE": "2"}
    program = "from cudistr.distributed import connect\nconnect(transport='mpi')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=variables,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (
        "OMPI_COMM_WORLD_SIZE says that this is one of 2 processes, but for mpi4py it is alone" in done.stderr
    )


def test_bench_writes_a_record(tmp_path):
    words = (
        "-m cudistr bench --distributed --seqlen 128 --batch 1 --heads 2 --head-dim 16 --dtype float32 --causal 1 "
        f"--method exact lsh4 --seconds 0.01 --output {tmp_path}"
    ).split()
    variables = {**mpi.variables(), "CUDISTR_COMMIT": "abc"}
    done = subprocess.run(
        mpi.command(2, *words),
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1, (
        done.stdout + done.stderr
    )  # LSH(4) does not fit 16 columns, and the exit status says so
    record = json.loads((tmp_path / "cpu" / "distributed.json").read_text())
    bench.validate(record)
    assert (record["ranks"], record["transport"], record["commit"]) == (2, "mpi", "abc")
    ring, heads, refused, _ = record["rows"]
    assert set(ring["ms"]) == {"cudistr", "attention", "transfers", "single_total", "single_share"}
    assert {"overlap", "scaling_total", "scaling_share"} <= set(ring)
    assert set(heads["ms"]) == {"cudistr", "single_total", "single_share"} and "overlap" not in heads
    assert "group_size must divide head_dim" in refused["failed"]["cudistr"]
    assert "overlap" in done.stdout
