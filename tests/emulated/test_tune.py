"""``cudistr tune`` from end to end on the emulated device, with a clock that says which tile is fast."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import numpy as np
import pytest

import cudistr
from cudistr import bench, cli, doctor, launch, normalize, tune, tuned
from cudistr.plan import Tile, plan
from tests.gpu import util

FAST, SPILLS = Tile(64, 32, 1), Tile(128, 16, 2)
SHAPES = [
    "--head-dim", "64", "--dtype", "float16", "--heads", "2", "--batch", "1", "--seqlen", "150", "--causal", "0",
    "--method", "exact", "lsh2", "--rounds", "2",
]  # fmt: skip


class FakeMachine:
    index, device, cupy = 0, "Emulated GPU", util.cp

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *reason: object) -> None: ...

    def inputs(self, case: bench.Case) -> tuple[list[Any], list[Any]]:
        lengths = (case.seqlen_q, case.seqlen_k)
        host = util.inputs(0, bench.DTYPES[case.dtype], batch=1, heads=case.heads, lengths=lengths)
        return [], [util.on_device(x) for x in host]

    def timer(self, call: bench.Call) -> float:
        if "in_a_row" not in call.__qualname__:  # once is enough
            call()
        in_force = [tile for _, tile in launch.device_properties(0).tiles]
        return 0.5 if FAST in in_force else 1.0


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bench, "Machine", FakeMachine)
    monkeypatch.setattr(tuned, "path", lambda device, name, what: tmp_path / f"{what}.json")
    monkeypatch.setattr(tune, "spilled", lambda problem, device, tile: tile == SPILLS)
    monkeypatch.setattr(tune, "MAX_CANDIDATES", 1)
    monkeypatch.setattr(tune.planner, "tile_clocks", lambda problem, device, tile: tile not in (FAST, SPILLS))
    launch.use_tiles(0, None)
    yield tmp_path
    launch.use_tiles(0, None)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(words)


def test_winners_are_kept_and_used(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.run(parse(*SHAPES)) == 0
    printed = capsys.readouterr().out
    assert "float16 exact 64: 64 x 32 takes 0.500 of the time of 128 x 128 in pairs of rows" in printed
    assert "float16 lsh2 64: 64 x 32 takes 0.500" in printed and "Emulated GPU: 2 tiles in" in printed
    device = launch.device_properties(0)
    assert [tile for _, tile in device.tiles] == [FAST, FAST]
    host = util.inputs(1, np.float16, batch=1, heads=2, lengths=(150, 150))
    for reduction in (None, cudistr.LSH(2)):
        arrays = [util.on_device(x) for x in host]
        with tune._portable():
            problem = normalize.problem(*arrays, reduction=reduction)
            assert plan(problem, device).tile == FAST
            util.check_kernel(*host, reduction=reduction, on_host=True)
    gpu = doctor.Gpu(0, "Emulated GPU", (9, 0), 1 << 30, device.multiprocessors, device.shared_bytes)
    assert doctor._tiles(gpu) == ("float16 exact 64: 64 x 32", "float16 lsh2 64: 64 x 32")

    assert tune.run(parse("--clear")) == 0
    assert "Emulated GPU: forgotten" in capsys.readouterr().out
    assert launch.device_properties(0).tiles == ()


def test_a_tile_that_lost_its_place_is_forgotten(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.run(parse(*SHAPES))
    monkeypatch.setattr(FakeMachine, "timer", lambda self, call: 1.0)
    tune.run(parse(*SHAPES, "--method", "exact"))
    assert [key.group_size for key, _ in launch.device_properties(0).tiles] == [2]


def test_a_damaged_file_fails_no_call(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune.run(parse(*SHAPES, "--method", "exact"))
    (folder / "tiles.json").write_text("{")
    launch.use_tiles(0, None)
    assert launch.device_properties(0).tiles == ()
    util.check_kernel(*util.inputs(1, np.float16, batch=1, heads=2, lengths=(150, 150)), on_host=True)
    tune.run(parse(*SHAPES, "--method", "exact"))
    assert "cannot be read, and is replaced" in capsys.readouterr().err
    assert len(launch.device_properties(0).tiles) == 1


def test_numbers_of_keys_are_kept_and_used(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {
        "exact": (1.0, 4.0),
        "lsh2": (1.5, 3.5),
        "projection:32,tolerance=0.99": (9.0, 99.0),
        "lsh4": (2, 3),
    }

    def interleave(factories: Any, timer: Any, **options: Any) -> bench.Timings:
        case = factories["exact"].args[1]
        for factory in factories.values():
            factory()()
        ms = {name: times[name][case.seqlen_k > 100] for name in factories}
        failed = {"lsh4": "an error"} if case.seqlen_k > 100 else {}
        return bench.Timings({name: x for name, x in ms.items() if name not in failed}, failed)

    monkeypatch.setattr(bench, "interleave", interleave)
    monkeypatch.setenv("CUDISTR_KERNEL", "portable")
    shapes = [*SHAPES, "--seqlen", "80", "160", "--break-even"]
    assert tune.run(parse(*shapes, "--method", *times)) == 0
    printed = capsys.readouterr().out
    assert "float16 64, against exact attention of the portable kernel, head_dim up to 64:" in printed
    assert "lsh2: faster from 120 keys on" in printed and "tolerance=0.99: never faster" in printed
    assert "160 keys: lsh4 failed: an error" in printed and "2 numbers of keys in" in printed
    arrays = [util.on_device(x) for x in util.inputs(1, np.float16, batch=1, heads=2, lengths=(130, 130))]
    for reduction, reason in (
        (cudistr.LSH(2), "about 120 on (measured on this GPU)"),
        (cudistr.LSH(4), "H200"),
    ):
        plan = cudistr.attention_plan(*arrays, reduction=reduction, exact_if_faster=True)
        assert reason in plan.reason and (plan.reduction == reduction) == (reduction.group_size == 2)
    device = launch.device_properties(0)
    gpu = doctor.Gpu(0, "Emulated GPU", (9, 0), 1 << 30, device.multiprocessors, device.shared_bytes)
    assert doctor._break_even(gpu) == ("portable 64: lsh2 120, half tolerance never",)

    tune.run(parse("--clear"))
    assert "Emulated GPU: forgotten" in capsys.readouterr().out
    assert "H200" in cudistr.attention_plan(*arrays, reduction=cudistr.LSH(2), exact_if_faster=True).reason
    for wrong in (["--seqlen", "80"], ["--method", "lsh8"], ["--seqlen-q", "9"]):
        with pytest.raises(ValueError, match="--break-even"):
            tune.run(parse(*shapes, *wrong))


def test_the_command_line(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--clear"]) == 0
    assert "there was nothing to forget" in capsys.readouterr().out
    assert cli.main(["tune", *SHAPES, "--method", "fast"]) == 1
    assert "method must be 'exact'" in capsys.readouterr().err
