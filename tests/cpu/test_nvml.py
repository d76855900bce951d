"""Clock and power without a GPU: what NVML is asked, what is dropped, the figures, and the record."""

from __future__ import annotations

import copy
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cudistr import bench, cli, nvml
from cudistr.bench import Timings
from cudistr.errors import CudaUnavailableError
from cudistr.nvml import Reading
from tests.cpu.test_bench import CASE, KERNELS, SMALL, FakeMachine, run, spoil

BUS = "0000:19:00.0"


class FakeNvml(types.ModuleType):
    """pynvml with one GPU, which answers what ``says`` has for a function; an exception is raised."""

    NVML_CLOCK_SM = 1
    nvmlClocksEventReasonSwPowerCap = 4
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 128

    class NVMLError(Exception): ...

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.says: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByPciBusId": "gpu",
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetClockInfo": 1500,
            "nvmlDeviceGetPowerUsage": 650_500,
            "nvmlDeviceGetCurrentClocksEventReasons": 4 | 32,
        }
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def answer(*arguments: Any) -> Any:
            self.asked.append((name, *arguments))
            if isinstance(self.says[name], Exception):
                raise self.says[name]
            return self.says[name]

        return answer


@pytest.fixture
def pynvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_readings(pynvml: FakeNvml) -> None:
    meter = nvml.Meter(BUS)
    assert (meter.limit_watts, meter.max_mhz) == (700.0, 1980.0)
    assert ("nvmlDeviceGetHandleByPciBusId", BUS) in pynvml.asked
    assert meter.read() == Reading(1500.0, 650.5, True)
    for reasons, limited in ((0, False), (1 | 8 | 32 | 64, False), (128, True)):  # idle, heat: not power
        pynvml.says["nvmlDeviceGetCurrentClocksEventReasons"] = reasons
        assert meter.read().limited is limited


def test_the_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(bench, "Machine", ClockedMachine)
    assert cli.main(["bench", "--clock", *SMALL, "--output", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "the package nvidia-ml-py, whose module pynvml cannot be imported" in said
    assert "pip install 'cudistr[bench]'" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId", "nvmlDeviceGetPowerUsage"])
def test_nvml_cannot_say(pynvml: FakeNvml, name: str) -> None:
    pynvml.says[name] = FakeNvml.NVMLError("Not Supported")
    with pytest.raises(CudaUnavailableError, match=f"GPU {BUS} cannot be read: {name}: Not Supported. What"):
        nvml.Meter(BUS).read()


# --- watching ----------------------------------------------------------------------------------------------


class Watched:
    """A device whose calls take 15 ms of a clock that nothing else moves, and the readings that NVML has of it."""

    def __init__(self, readings: Iterator[Reading]) -> None:
        self.now, self.calls, self.read = 0.0, 0, lambda: next(readings)

    def call(self) -> None:
        self.calls += 1

    def timer(self, call: bench.Call, read: bench.Read) -> tuple[float, Reading]:
        before = self.calls
        call()
        ms = 15.0 * (self.calls - before)
        self.now += ms / 1e3
        return ms, read()

    def watch(self, **options: Any) -> tuple[dict[str, bench.Steady], dict[str, str]]:
        return bench.watch({"a": lambda: self.call}, self.timer, self.read, clock=lambda: self.now, **options)


def test_what_has_not_settled_is_dropped() -> None:
    # Three calls to warm up; then rows of two calls, of which those that begin at 0, 30 and 60 ms are dropped.
    early = [Reading(1980.0, 100.0, False)] * 6
    late = [Reading(1600.0, 690.0, True), Reading(1500.0, 700.0, True), Reading(1700.0, 650.0, False)]
    device = Watched(iter([*early, *late]))
    found, failed = device.watch(seconds=0.17, settle=0.07)
    assert not failed and device.calls == 3 + 2 * 6
    assert found["a"] == bench.Steady(15.0, 1600.0, 680.0, pytest.approx(2 / 3))


def test_long_calls_are_seen_settled_too() -> None:
    device = Watched(iter([Reading(1980.0, 100.0, False)] * 4 + [Reading(1500.0, 700.0, True)] * 3))
    found, _ = device.watch(seconds=0.02, settle=0.01)
    assert found["a"] == bench.Steady(15.0, 1500.0, 700.0, 1.0)


def test_a_candidate_may_fail_but_not_nvml() -> None:
    def fails() -> bench.Call:
        raise ImportError("no such peer")

    def cannot() -> Reading:
        raise CudaUnavailableError("power is not known")

    device = Watched(iter([]))
    assert bench.watch({"x": fails}, device.timer, device.read) == ({}, {"x": "ImportError: no such peer"})
    device.read = cannot
    with pytest.raises(CudaUnavailableError, match="power is not known"):
        device.watch()


def test_the_device_is_read_while_it_works() -> None:
    """After all is queued, so that the time has nothing of it, and before the end."""
    done: list[str] = []

    def event(name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            record=lambda stream: done.append(name), synchronize=lambda: done.append("wait")
        )

    machine = bench.Machine.__new__(bench.Machine)
    machine._start, machine._stop, machine.stream = event("start"), event("stop"), None
    machine.cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(get_elapsed_time=lambda a, b: 2.5))
    assert machine.timed(lambda: done.append("call"), lambda: done.append("read")) == (2.5, None)
    assert done == ["start", "call", "stop", "read", "wait"]


# --- the record --------------------------------------------------------------------------------------------


@pytest.fixture
def record() -> dict[str, Any]:
    found = {
        "exact": bench.Steady(2.0, 1500.0, 695.04, 1.0),
        "lsh2": bench.Steady(1.5, 1700.26, 650.0, 0.25),
        "fa3": bench.Steady(2.25, 1450.0, 700.0, 1.0),
    }
    timings = Timings({name: of.ms for name, of in found.items()}, {"flash2": "RuntimeError: no"})
    return {
        "device": "GPU X", "commit": "0123abc", "command": "python -m cudistr bench --clock",
        "versions": {"cudistr": "0.1.0"}, "limit_watts": 700.0, "max_mhz": 1980.0,
        "rows": bench.add_clock(bench.make_rows(CASE, KERNELS, timings, ["flash2", "fa3"]), found),
    }  # fmt: skip


def test_rows_have_the_figures_of_every_candidate(record: dict[str, Any]) -> None:
    bench.validate(record)
    row = record["rows"][1]
    assert row["mhz"] == {"cudistr": 1700.3, "fa3": 1450.0}
    assert row["watts"] == {"cudistr": 650.0, "fa3": 700.0}
    assert row["joules"] == {"cudistr": 0.975, "fa3": 1.575}
    assert row["limited"] == {"cudistr": 0.25, "fa3": 1.0}
    assert [name for name, *_ in bench.watched(record["rows"])] == ["exact", "lsh2", "fa3"]
    lines = bench.clock_table(record["rows"]).splitlines()
    assert len(lines) == 5 and lines[2].split()[-5:] == ["1.500", "1700", "650", "0.975", "25%"]
    assert lines[-1] == "not timed: flash2: RuntimeError: no"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (spoil("max_mhz", ...), r"missing \['max_mhz'\]"),
        (spoil("limit_watts", 0), r"the record\['limit_watts'\] must be a positive number"),
        (spoil("host_us", {"exact": 1.0}), r"unknown \['host_us'\]"),
        (spoil("rows.0.watts", ...), r"missing \['watts'\]"),
        (spoil("rows.0.method", "fast"), r"rows\[0\]\.method must be 'exact'"),
        (spoil("rows.0.mhz.fa3", ...), r"rows\[0\]\.mhz must be .*missing \['fa3'\]"),
        (spoil("rows.0.mhz.fa3", -1), r"rows\[0\]\.mhz\['fa3'\] must be a positive number"),
        (spoil("rows.0.limited.fa3", 1.5), r"rows\[0\]\.limited\['fa3'\] must be a share from 0 to 1"),
        (
            spoil("rows.0.joules.fa3", 1.6),
            r"rows\[0\]\.joules\['fa3'\] must be what ms and watts make, 1\.575",
        ),
    ],
)
def test_invalid_records(record: dict[str, Any], change: Callable[[dict[str, Any]], None], text: str) -> None:
    spoiled = copy.deepcopy(record)
    change(spoiled)
    with pytest.raises(ValueError, match=text):
        bench.validate(spoiled)


# --- the whole command -------------------------------------------------------------------------------------


class ClockedMachine(FakeMachine):
    bus_id = BUS

    def timed(self, call: bench.Call, read: bench.Read) -> tuple[float, Reading]:
        return self.timer(call), read()


def test_run(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pynvml: FakeNvml,
) -> None:
    monkeypatch.setattr(bench, "Machine", ClockedMachine)
    watch = bench.watch
    monkeypatch.setattr(bench, "watch", lambda *args, **_: watch(*args, seconds=0.0, settle=0.0))
    words = ["--clock", "--method", "exact", "lsh4", "--grouping", "--dtype", "float32"]
    assert run(*SMALL, *words, "--output", str(tmp_path)) == 0
    record = json.loads((tmp_path / "fake-gpu" / "clock.json").read_text())
    bench.validate(record)
    assert (record["limit_watts"], record["max_mhz"]) == (700.0, 1980.0)
    assert record["rows"][1]["joules"] == {"cudistr": 65.05, "cupy": 65.05}  # 650.5 W for 100 ms
    printed = capsys.readouterr().out
    assert "at most 700 W, 1980 MHz" in printed and printed.count("1500") == 4  # exact, lsh4, group, cupy


def test_too_few_seconds_are_refused() -> None:
    with pytest.raises(ValueError, match="--seconds must be more than 1.2 with --clock, got 1"):
        run("--clock", "--seconds", "1")


def test_one_thing_at_a_time() -> None:
    with pytest.raises(SystemExit):
        run("--clock", "--host")
