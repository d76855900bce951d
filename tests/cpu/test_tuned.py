"""Tiles that were measured: how they are found, kept and used, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cudistr import LSH, compiler, tune, tuned
from cudistr import plan as planner
from cudistr.plan import Device, Tile, TileKey, plan, tile_key
from tests.cpu.test_plan import devices, portable_problems, problem, small_enough
from tests.grid import DEVICES

AMPERE = DEVICES[80]
KEY = TileKey("float16", False, 64, 64, 0, "sample", False)
TILES = {KEY: Tile(128, 64, 2), dataclasses.replace(KEY, group_size=2): Tile(64, 64, 1)}


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUDISTR_CACHE_DIR", str(tmp_path))
    forget = compiler.cache_folder.cache_clear
    forget()
    yield tmp_path
    forget()


# The plan


@given(portable_problems(), devices)
def test_candidates_can_run(one: planner.Problem, device: Device) -> None:
    found = planner.candidate_tiles(one, device)
    assert len(set(found)) == len(found)
    for tile in found:
        kernel = planner.tile_kernel(one, device, tile)
        assert kernel.shared_bytes <= device.shared_bytes and 32 <= kernel.threads <= 1024
        assert tile.block_m <= 64 or one.seqlen_q > 64
        assert one.reduction is None or one.reduction.rows_per_block % tile.block_m == 0
    estimates = [planner.tile_clocks(one, device, tile) for tile in found]
    assert estimates == sorted(estimates)


@given(portable_problems(), devices, st.data())
def test_a_measured_tile_is_used(one: planner.Problem, device: Device, data: st.DataObject) -> None:
    assume(small_enough(one) and planner.candidate_tiles(one, device))
    tile = data.draw(st.sampled_from(planner.candidate_tiles(one, device)))
    key = tile_key(one)
    plain = one.aligned and one.softcap is None and one.scale > 0
    assert (key is not None) == plain
    if key is not None:
        with_tile = dataclasses.replace(device, tiles=((key, tile),))
        assert planner.portable_kernel(one, with_tile) == (
            planner.tile_kernel(one, device, tile, tile.block_m <= 64),
            tile,
        )


@given(portable_problems(), devices)
def test_a_tile_that_cannot_run_is_not_used(one: planner.Problem, device: Device) -> None:
    assume(small_enough(one))
    one = dataclasses.replace(one, aligned=True, softcap=None, scale=1.0)
    key = tile_key(one)
    assert key is not None
    for tile in (Tile(96, 64, 1), Tile(128, 8, 1), Tile(128, 4096, 2), Tile(0, 0, 0), Tile(-128, 64, 2)):
        assert plan(one, dataclasses.replace(device, tiles=((key, tile),))) == plan(one, device)


def test_other_problems_keep_their_tiles() -> None:
    one = problem()
    key = tile_key(one)
    assert key is not None
    device = dataclasses.replace(AMPERE, tiles=((key, Tile(64, 16, 1)),))
    assert plan(one, device).tile == Tile(64, 16, 1)
    for other in (
        problem(head_dim=128), problem(dtype="bfloat16"), problem(seqlen_q=3), problem(reduction=LSH(2)),
        problem(aligned=False), problem(softcap=3.0),
    ):  # fmt: skip
        assert plan(other, device) == plan(other, AMPERE)


@pytest.mark.parametrize(
    ("head_dim", "faster", "slower"),
    [
        (64, Tile(128, 128, 2), Tile(128, 96, 2)),
        (64, Tile(128, 96, 2), Tile(128, 64, 2)),
        (128, Tile(128, 64, 2), Tile(128, 48, 2)),
        (128, Tile(128, 64, 2), Tile(64, 64, 1)),
    ],
)
def test_the_estimate_has_the_order_that_was_measured(head_dim: int, faster: Tile, slower: Tile) -> None:
    # _longest_keys and _tiles in plan.py have the measurements.
    one = problem(head_dim=head_dim, head_dim_v=head_dim, seqlen_q=4096, dtype="bfloat16")
    first, second = (planner.tile_clocks(one, DEVICES[90], tile) for tile in (faster, slower))
    assert first < second


# The file


def test_what_is_kept_comes_back(folder: pathlib.Path) -> None:
    assert tuned.read_tiles(AMPERE, "A") == () and not tuned.clear(AMPERE, "A")
    place = tuned.save_tiles(AMPERE, "A", TILES)
    assert place.parent == folder and [x.name for x in folder.iterdir()] == [place.name]
    assert tuned.read_tiles(AMPERE, "A") == tuned.load_tiles(AMPERE, "A") == tuple(TILES.items())
    tuned.save_tiles(AMPERE, "A", {KEY: Tile(64, 32, 1)})
    assert dict(tuned.load_tiles(AMPERE, "A")) == {KEY: Tile(64, 32, 1)}
    assert tuned.clear(AMPERE, "A") and tuned.load_tiles(AMPERE, "A") == ()


def test_it_is_kept_for_one_gpu_version_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save_tiles(AMPERE, "A", TILES)
    assert tuned.load_tiles(AMPERE, "B") == ()
    for change in ({"capability": 86}, {"multiprocessors": 7}, {"shared_bytes": 1}):
        assert tuned.load_tiles(dataclasses.replace(AMPERE, **change), "A") == ()
    # What the device is planned with does not matter.
    assert tuned.load_tiles(dataclasses.replace(AMPERE, tiles=tuple(TILES.items())), "A")
    with monkeypatch.context() as changed:
        changed.setattr("cudistr.__version__", "99")
        assert tuned.load_tiles(AMPERE, "A") == ()
    monkeypatch.setattr(compiler, "source_digest", lambda kernel: "other sources")
    assert tuned.load_tiles(AMPERE, "A") == ()


def test_a_variable_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save_tiles(AMPERE, "A", TILES)
    monkeypatch.setenv("CUDISTR_TUNED", "0")
    assert tuned.load_tiles(AMPERE, "A") == () and tuned.read_tiles(AMPERE, "A")


DAMAGED: dict[str, Any] = {
    "empty": "", "no JSON": "{", "a list": "[]", "no text": b"\xff\xfe\x00", "nested": "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_no_file(content: Any) -> None:
    place = tuned.save_tiles(AMPERE, "A", TILES)
    place.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tuned.load_tiles(AMPERE, "A") == ()
    with pytest.raises((ValueError, RecursionError)):
        tuned.read_tiles(AMPERE, "A")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda stored: stored.pop("for"),
        lambda stored: stored["for"].update(device="B"),
        lambda stored: stored.update(tiles={}),
        lambda stored: stored["tiles"].append(3),
        lambda stored: stored["tiles"][0].pop("tile"),
        lambda stored: stored["tiles"][0]["tile"].update(block_m="128"),
        lambda stored: stored["tiles"][0]["tile"].update(block_m=True),
        lambda stored: stored["tiles"][0]["tile"].update(more=1),
        lambda stored: stored["tiles"][0]["key"].pop("dtype"),
    ],
)
def test_a_file_of_another_form_is_no_file(spoil: Any) -> None:
    place = tuned.save_tiles(AMPERE, "A", TILES)
    stored = json.loads(place.read_text())
    spoil(stored)
    place.write_text(json.dumps(stored))
    assert tuned.load_tiles(AMPERE, "A") == ()
    with pytest.raises(ValueError, match="must|has|is not about"):
        tuned.read_tiles(AMPERE, "A")


def test_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "cache_folder", lambda: None)
    assert tuned.load_tiles(AMPERE, "A") == () and not tuned.clear(AMPERE, "A")
    with pytest.raises(OSError, match="set CUDISTR_CACHE_DIR"):
        tuned.save_tiles(AMPERE, "A", TILES)


# From how many keys on reductions are faster

FOUND: tuned.Measured = (
    (("lsh2", False, False), ("portable", 64), 900.0),
    (("half", True, True), ("hopper", 128), math.inf),
)


def test_numbers_of_keys_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save_tiles(AMPERE, "A", TILES)
    place = tuned.save_break_even(AMPERE, "A", FOUND)
    assert json.loads(place.read_text())["break-even"][1]["keys"] is None
    assert tuned.read_break_even(AMPERE, "A") == tuned.load_break_even(AMPERE, "A") == FOUND
    assert tuned.load_break_even(AMPERE, "B") == ()
    assert tuned.load_tiles(AMPERE, "A")  # a file of its own
    with monkeypatch.context() as changed:
        changed.setenv("CUDISTR_TUNED", "0")
        assert tuned.load_break_even(AMPERE, "A") == ()
    with monkeypatch.context() as changed:  # any kernel of which has other sources
        digest = compiler.source_digest
        changed.setattr(
            compiler, "source_digest", lambda kernel: digest(kernel) + "x" * (kernel == "smxx_draw")
        )
        assert tuned.load_break_even(AMPERE, "A") == () and tuned.load_tiles(AMPERE, "A")
    assert tuned.clear(AMPERE, "A")
    assert tuned.load_break_even(AMPERE, "A") == tuned.load_tiles(AMPERE, "A") == ()


@pytest.mark.parametrize(
    "change",
    [{"keys": "7"}, {"keys": -1}, {"keys": True}, {"keys": 1e999}, {"kind": 2}, {"exact_keys": 1}, {"head_dim": "64"},
     {"more": 1}],
)  # fmt: skip
def test_numbers_of_keys_of_another_form_are_none(change: dict[str, Any]) -> None:
    place = tuned.save_break_even(AMPERE, "A", FOUND)
    stored = json.loads(place.read_text())
    stored["break-even"][0].update(change)
    place.write_text(json.dumps(stored))
    assert tuned.load_break_even(AMPERE, "A") == ()
    with pytest.raises(ValueError, match="must"):
        tuned.read_break_even(AMPERE, "A")


def test_numbers_of_keys_from_times() -> None:
    exact = {False: {4: 1.0, 16: 4.0}, True: {4: 1.0, 16: 4.0}}
    times = {
        "exact": exact,
        "lsh2": {False: {4: 1.5, 16: 3.5}, True: {4: 1.5, 16: 3.5}},
        "lsh4": {False: {4: 1.5, 16: 3.5}, True: {4: 1.5, 16: 4.6}},
        "projection:32": {False: {4: 0.5, 16: 2.0}, True: {4: 0.5, 16: 2.0}},
        "projection:16": {False: {4: 0.5, 16: 2.0}, True: {4: 0.5}},  # failed in one case
        "projection:48": exact,  # has no place
    }
    assert tune.break_even(times, 64) == {
        "lsh2": (("lsh2", False, False), 10.0),
        "lsh4": (("lsh4", False, False), math.inf),
        "projection:32": (("half", False, False), 0.0),
    }
    assert tune.break_even({"exact": {False: {4: 1.0}}, "lsh2": {False: {4: 1.5}}}, 64) == {}
    assert tune.break_even({"lsh2": exact}, 64) == {}


# The search


class Clock:
    """Tiles take the times that they are given, and give the results that they are given."""

    def __init__(self, times: dict[Tile | None, float]) -> None:
        self.times, self.tile, self.calls = times, None, 0
        self.out: dict[Tile | None, Any] = {}

    def use(self, tile: Tile | None) -> None:
        self.tile = tile

    def case(self) -> tuple[Any, Any]:
        self.calls += 1
        result = self.out.get(self.tile, (np.ones(4, np.float16), np.zeros(4, np.float32)))
        if isinstance(result, Exception):
            raise result
        return result

    def timer(self, call: Any) -> float:
        before = self.calls
        call()
        return self.times[self.tile] * (self.calls - before)


A, B, C = Tile(128, 96, 2), Tile(128, 64, 2), Tile(64, 64, 1)


def search(clock: Clock, cases: int = 2) -> tune.Result:
    return tune.search(KEY, A, (B, C), [clock.case] * cases, clock.use, clock.timer)


def test_the_fastest_wins() -> None:
    clock = Clock({None: 1.0, B: 0.9, C: 0.7})
    result = search(clock)
    assert result.best == C and clock.tile is None
    assert result.relative == pytest.approx({B: 0.9, C: 0.7}) and not result.refused


def test_a_little_faster_is_noise() -> None:
    assert search(Clock({None: 1.0, B: 0.985, C: 1.2})).best == A


def test_a_wrong_result_does_not_win() -> None:
    clock = Clock({None: 1.0, B: 0.9, C: 0.1})
    clock.out[C] = (np.full(4, 1.01, np.float16), np.zeros(4, np.float32))
    result = search(clock)
    assert result.best == B and "out differs by" in result.refused[C]
    clock.out[B] = RuntimeError("launch failed\nsecond line")
    result = search(clock)
    assert result.best == A and result.refused[B] == "RuntimeError: launch failed"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_results_are_compared(dtype: str) -> None:
    out, lse = np.linspace(-1, 1, 9, dtype=np.float32), np.linspace(0, 5, 9, dtype=np.float32)
    unit = np.float32(tune.UNITS[dtype])
    assert not tune.compare((out + unit, lse), (out, lse), dtype)
    assert tune.compare((out + 8 * unit, lse), (out, lse), dtype)
    assert tune.compare((out, lse + 1), (out, lse), dtype)
    broken = np.where(np.arange(9) == 3, np.float32(np.nan), out)
    assert tune.compare((broken, lse), (out, lse), dtype)
    without = np.where(np.arange(9) == 3, np.float32(-np.inf), lse)
    assert not tune.compare((out, without), (out, without), dtype)
    assert "other rows without keys" in tune.compare((out, lse), (out, without), dtype)


def test_spills_are_seen() -> None:
    pytest.importorskip("cupy", reason="NVRTC comes with the extra cuda12 or cuda13")
    one = problem(head_dim=128, head_dim_v=128)
    assert tune.spilled(one, AMPERE, Tile(64, 32, 1)) == 0
    assert tune.spilled(one, AMPERE, Tile(128, 128, 2)) > 0


def test_names_of_the_cache_do_not_collide(folder: pathlib.Path) -> None:
    tuned.save_tiles(AMPERE, "A", TILES)
    tuned.save_tiles(DEVICES[90], "A", TILES)
    assert len(os.listdir(folder)) == 2
