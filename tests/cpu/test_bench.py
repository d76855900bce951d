"""The bench without a GPU: order of the rounds, medians, failures, rows, and the form of a record."""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cudistr
from cudistr import bench
from cudistr.bench import Case, Timings
from tests.cpu.fakes import Gpu

CASE = Case("bfloat16", 64, 64, 32, 8, 4, 4096, 4096, True)
KERNELS = {"exact": "hopper", "lsh2": "portable"}


class FakeGpu:
    """Candidates that append their name when called, and a timer that reads their times off a list."""

    def __init__(self, **times: list[float]) -> None:
        self.times = {name: iter(each) for name, each in times.items()}
        self.called: list[str] = []

    def factories(self) -> dict[str, bench.Factory]:
        return {name: self.factory(name) for name in self.times}

    def factory(self, name: str) -> bench.Factory:
        return lambda: lambda: self.called.append(name)

    def timer(self, call: bench.Call) -> float:
        call()
        return next(self.times[self.called[-1]])


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(words)
    args.argv = ["bench", *words]
    return args


# --- measuring ---------------------------------------------------------------------------------------------


def test_candidates_take_turns_after_their_warmup() -> None:
    gpu = FakeGpu(a=[1.0] * 9, b=[1.0] * 9, c=[1.0] * 9)
    bench.interleave(gpu.factories(), gpu.timer, seconds=0, warmup=2, min_rounds=3)
    assert gpu.called == ["a", "a", "b", "b", "c", "c"] + ["a", "b", "c"] * 3


def test_median_over_rounds_without_warmup() -> None:
    gpu = FakeGpu(a=[900.0, 5.0, 1.0, 3.0], b=[900.0, 2.0, 80.0, 4.0])
    timings = bench.interleave(gpu.factories(), gpu.timer, seconds=0, warmup=1, min_rounds=3)
    assert timings == Timings({"a": 3.0, "b": 4.0}, {})


def test_rounds_go_on_for_the_seconds_asked_for() -> None:
    gpu = FakeGpu(a=[10.0] * 500, b=[30.0] * 500)
    bench.interleave(gpu.factories(), gpu.timer, seconds=0.4, warmup=1, min_rounds=7)
    assert gpu.called.count("a") == gpu.called.count("b") == 1 + 20  # 20 rounds of 40 ms are 0.8 s for two


@pytest.mark.parametrize(("ms", "row"), [(0.1, 20), (1.0, 5), (2.4, 3), (5.0, 1), (90.0, 1)])
def test_a_timing_covers_calls_in_a_row(ms: float, row: int) -> None:
    called = []

    def timer(call: bench.Call) -> float:
        before = len(called)
        call()
        return ms * (len(called) - before)

    timings = bench.interleave(
        {"a": lambda: lambda: called.append("a")}, timer, seconds=0, warmup=1, min_rounds=3, row_ms=5.0
    )
    assert len(called) == 1 + 3 * row
    assert timings.ms["a"] == pytest.approx(ms)


@pytest.mark.parametrize(("ms", "rounds"), [(10_000.0, 7), (0.001, 400)])
def test_rounds_are_bounded(ms: float, rounds: int) -> None:
    gpu = FakeGpu(a=[ms] * 500)
    bench.interleave(gpu.factories(), gpu.timer, seconds=0.4, warmup=1)
    assert len(gpu.called) == 1 + rounds


def test_failures_are_recorded_and_the_rest_goes_on() -> None:
    """A candidate may fail when it is made, in its warm-up, or in a later round."""
    gpu = FakeGpu(good=[1.0] * 9)
    left = [None] * 3

    def make_fails() -> bench.Call:
        raise ImportError("no such peer\nand more")

    def call_fails() -> object:
        raise ValueError("head_dim 512")

    def third_round_fails() -> object:
        left.pop()
        gpu.called.append("good")
        return None

    factories = {"x": make_fails, "y": lambda: call_fails, "z": lambda: third_round_fails, **gpu.factories()}
    gpu.times["good"] = iter([1.0] * 99)
    timings = bench.interleave(factories, gpu.timer, seconds=0, warmup=1, min_rounds=5)
    assert timings.ms == {"good": 1.0}
    assert timings.failed == {
        "x": "ImportError: no such peer",
        "y": "ValueError: head_dim 512",
        "z": "IndexError: pop from empty list",
    }


def test_nothing_left_to_time() -> None:
    def fails() -> bench.Call:
        raise RuntimeError

    assert bench.interleave({"a": fails}, lambda call: 1.0) == Timings({}, {"a": "RuntimeError: "})


def test_host_overhead_is_the_median_batch_without_the_synchronisation() -> None:
    now = 0.0
    events: list[str] = []
    costs = {"exact": iter([9.0] * 2 + [1e-5] * 2 + [5e-5] * 2 + [2e-5] * 2), "lsh2": iter([4e-5] * 8)}

    def call(name: str) -> bench.Call:
        def work() -> None:
            nonlocal now
            events.append(name)
            now += next(costs[name])

        return work

    def synchronize() -> None:
        nonlocal now
        events.append("sync")
        now += 1000.0

    found = bench.host_overhead(
        {name: call(name) for name in costs}, synchronize, batches=3, per_batch=2, clock=lambda: now
    )
    assert found["exact"] == pytest.approx(20)
    assert found["lsh2"] == pytest.approx(40)
    assert events[:5] == ["exact", "exact", "lsh2", "lsh2", "sync"]
    assert events[5:] == ["exact", "exact", "sync", "lsh2", "lsh2", "sync"] * 3


# --- what is measured --------------------------------------------------------------------------------------


def test_methods() -> None:
    assert bench.reduction_of("exact") is None
    assert bench.reduction_of("lsh4") == cudistr.LSH(group_size=4)


@pytest.mark.parametrize("method", ["lsh", "lsh0", "LSH2", "group", "", "lsh2 "])
def test_unknown_method(method: str) -> None:
    with pytest.raises(ValueError, match="method must be 'exact' or 'lsh' with a group size"):
        bench.reduction_of(method)


def test_methods_of_eval() -> None:
    arrays = [np.random.RandomState(0).standard_normal((1, 2, 40, 32)).astype(np.float32) for _ in range(3)]
    assert bench.prepare("exact", arrays, False) == (None, None)
    assert bench.prepare("lsh4", arrays, False) == (cudistr.LSH(4), None)
    assert bench.prepare("lsh:2,near=8,representative=rank1", arrays, False)[0] == cudistr.LSH(
        2, near=8, representative="rank1"
    )
    assert bench.prepare("energy:16,sinks=4", arrays, True)[0] == cudistr.Energy(16, sinks=4)
    projection, tolerance = bench.prepare("projection:16,near=8,tolerance=0.02", arrays, True)
    assert (projection.ranks, projection.near, tolerance) == ((16, 16), 8, 0.02)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lsh", "needs a number"),
        ("lsh0", "method must be 'exact', 'lsh' with a group size"),
        ("lsh:0", "group_size"),
        ("energy:16,far=2", "far"),
        ("hydra", "method must be 'exact', 'lsh' with a group size"),
        ("projection:16,fit=static", "fitted on the call's own arrays"),
        ("projection:16,tolerance=2", "between 0 and 1"),
        ("group", "method must be 'exact', 'lsh' with a group size"),
    ],
)
def test_what_bench_cannot_time(method: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        bench.method_of(method)


def test_cases_keep_tokens_and_hidden_size() -> None:
    args = parse("--head-dim", "64", "128", "--seqlen", "2048", "32768", "--kv-heads", "4", "--causal", "1")
    found = bench.cases(args)
    assert len(found) == 4
    assert found[0] == Case("bfloat16", 64, 64, 32, 4, 8, 2048, 2048, True)
    assert found[3] == Case("bfloat16", 128, 128, 16, 4, 1, 32768, 32768, True)


def test_few_queries_of_a_given_batch_and_heads() -> None:
    words = (
        "--seqlen 8192 --seqlen-q 1 16 --batch 3 --heads 32 --kv-heads 8 --head-dim 128 --causal 0".split()
    )
    found = bench.cases(parse(*words))
    assert [(c.seqlen_q, c.seqlen_k) for c in found] == [(1, 8192), (16, 8192)]
    assert {(c.batch, c.heads, c.heads_kv) for c in found} == {(3, 32, 8)}


def test_torch_is_not_asked_for_another_mask() -> None:
    case = bench.Case("float16", 64, 64, 4, 4, 1, 16, 128, True)
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="torch aligns a causal mask with the first key"):
        bench._make_sdpa([None] * 3, case, "flash2")


def test_value_head_dim_is_its_own() -> None:
    found = bench.cases(parse("--head-dim", "192", "--head-dim-v", "128", "--seqlen", "64", "--causal", "0"))
    assert [(case.head_dim, case.head_dim_v, case.heads_kv, case.causal) for case in found] == [
        (192, 128, 10, False)
    ]


@pytest.mark.parametrize(
    "words", [["--seqlen", "0"], ["--dtype", "int8"], ["--peers", "flash9"], ["--causal", "2"]]
)
def test_options_out_of_range(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_peer_computes_attention(causal: bool) -> None:
    random = np.random.RandomState(0)
    q = random.standard_normal((2, 4, 5, 16)).astype(np.float32)
    k, v = (random.standard_normal((2, 2, 9, d)).astype(np.float32) for d in (16, 8))
    found = bench.plain_attention(q, k, v, causal, np)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, cudistr.reference.attention(q, k, v, causal=causal), atol=1e-5)


def test_plain_peer_refuses_scores_that_do_not_fit() -> None:
    big = Case("bfloat16", 64, 64, 32, 32, 1, 16384, 16384, False)
    with pytest.raises(MemoryError, match="the scores take 16 GiB, more than 4"):
        bench._make_plain([None] * 3, big, np)


def test_kernel_families() -> None:
    assert bench.kernel_family("sm90_flash_fwd") == "hopper"
    assert bench.kernel_family("sm80_flash_fwd") == "portable"


def test_rows_repeat_the_peers() -> None:
    timings = Timings({"exact": 2.0, "lsh2": 1.5, "flash2": 1.0}, {"fa3": "TypeError: bf16 only"})
    rows = bench.make_rows(CASE, KERNELS, timings, ["flash2", "fa3"])
    assert [row["method"] for row in rows] == ["exact", "lsh2"]
    assert [row["ms"] for row in rows] == [{"cudistr": 2.0, "flash2": 1.0}, {"cudistr": 1.5, "flash2": 1.0}]
    assert all(row["failed"] == {"fa3": "TypeError: bf16 only"} for row in rows)
    assert [row["kernel"] for row in rows] == ["hopper", "portable"]
    assert {name: rows[0][name] for name in bench.asdict(CASE)} == bench.asdict(CASE)


def test_rows_of_a_method_that_failed_and_of_the_grouping() -> None:
    kernels = dict.fromkeys(("exact", "lsh16", "group"), "portable")
    timings = Timings({"exact": 2.0, "group": 0.05, "flash2": 1.0}, {"lsh16": "ValueError: group_size"})
    rows = bench.make_rows(CASE, kernels, timings, ["flash2"])
    assert rows[1]["ms"] == {"flash2": 1.0}
    assert rows[1]["failed"] == {"cudistr": "ValueError: group_size"}
    assert rows[2]["ms"] == {"cudistr": 0.05, "exact": 2.0}
    assert rows[2]["failed"] == {"lsh16": "ValueError: group_size"}
    assert "failed" not in rows[0]


# --- the record --------------------------------------------------------------------------------------------


@pytest.fixture
def record() -> dict[str, Any]:
    timings = Timings({"exact": 2.0, "lsh2": 1.5, "flash2": 1.0}, {"fa3": "TypeError: bf16 only"})
    return {
        "device": "NVIDIA H200",
        "commit": "0123abc",
        "command": "python -m cudistr bench",
        "versions": {"cudistr": "0.1.0"},
        "rows": bench.make_rows(CASE, KERNELS, timings, ["flash2", "fa3"]),
    }


def test_valid_records(record: dict[str, Any]) -> None:
    bench.validate(record)
    bench.validate({**record, "rows": []})
    bench.validate({**record, "host_us": {"exact": 21.5}, "host_case": bench.asdict(bench.HOST_CASE)})


def spoil(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set, or with ... remove, what stands at a path such as "rows.0.ms.cudistr"."""

    def change(record: dict[str, Any]) -> None:
        *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
        place: Any = record
        for step in steps:
            place = place[step]
        if value is ...:
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (spoil("device", ""), r"the record\['device'\] must be text"),
        (spoil("commit", ...), r"the record must be .*missing \['commit'\]"),
        (spoil("note", "fast"), r"unknown \['note'\]"),
        (spoil("versions.cupy", 14), r"versions\['cupy'\] must be text, got 14"),
        (spoil("versions", []), "versions must be an object"),
        (spoil("rows", {}), "rows must be a list"),
        (spoil("rows.1", 3), r"rows\[1\] must be an object"),
        (spoil("rows.0.method", "lsh"), r"rows\[0\]\.method must be 'exact'"),
        (spoil("rows.0.method", None), r"rows\[0\]\.method must be 'exact'"),
        (spoil("rows.0.kernel", "fast"), r"rows\[0\]\.kernel must be one of portable, hopper"),
        (spoil("rows.0.dtype", "int8"), r"rows\[0\]\.dtype must be one of float16"),
        (spoil("rows.0.batch", 0), r"rows\[0\]\.batch must be at least 1"),
        (spoil("rows.0.batch", True), r"rows\[0\]\.batch must be of type int"),
        (spoil("rows.0.causal", 1), r"rows\[0\]\.causal must be of type bool"),
        (spoil("rows.0.tflops", 300.0), r"unknown \['tflops'\]"),
        (spoil("rows.0.ms.cudistr", 0.0), r"rows\[0\]\.ms\['cudistr'\] must be a positive number"),
        (spoil("rows.0.ms.cudistr", float("nan")), r"rows\[0\]\.ms\['cudistr'\] must be a positive number"),
        (spoil("rows.0.ms.cudistr", ...), "'cudistr' in ms or in failed"),
        (spoil("rows.0.failed.cudistr", "ValueError: no"), "'cudistr' in ms or in failed"),
        (spoil("rows.0.failed.fa3", ""), r"rows\[0\]\.failed\['fa3'\] must be text"),
        (spoil("host_us", {"exact": 20.0}), r"missing \['host_case'\]"),
    ],
)
def test_invalid_records(record: dict[str, Any], change: Callable[[dict[str, Any]], None], text: str) -> None:
    bench.validate(record)
    spoiled = copy.deepcopy(record)
    change(spoiled)
    with pytest.raises(ValueError, match=text):
        bench.validate(spoiled)


@pytest.fixture
def shared() -> dict[str, Any]:
    """A record of several GPUs."""
    ms = {"cudistr": 2.0, "attention": 1.75, "transfers": 1.0, "single_total": 6.0, "single_share": 0.4}
    row = {"method": "lsh2", "parallel": "context", **bench.asdict(CASE), "ms": ms}
    return {
        "device": "NVIDIA H200", "commit": "0123abc", "command": "python -m cudistr bench --distributed",
        "versions": {"cudistr": "0.1.0"}, "ranks": 4, "transport": "nccl",
        "rows": [{**row, **bench.sharing_figures(ms, 4)}],
    }  # fmt: skip


def test_figures_of_several_gpus(shared: dict[str, Any]) -> None:
    bench.validate(shared)
    row = shared["rows"][0]
    assert row["overlap"] == 0.75  # of the transfers' 1 ms, 0.25 are seen
    assert row["scaling_total"] == 0.75  # 6 ms of one GPU are 1.5 ms of each of four
    assert row["scaling_share"] == 0.8  # four shares of keys, 0.4 ms each
    assert bench.sharing_figures({}, 4) == {}
    assert bench.sharing_figures({"cudistr": 9.0, "attention": 2.0, "transfers": 1.0}, 2) == {"overlap": 0.0}
    assert "overlap" in bench.table(shared["rows"]) and "context" in bench.table(shared["rows"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (spoil("ranks", ...), r"missing \['ranks'\]"),
        (spoil("ranks", 0), r"the record\['ranks'\] must be a positive number"),
        (spoil("transport", ""), r"the record\['transport'\] must be text"),
        (spoil("rows.0.method", "group"), r"rows\[0\]\.method must be 'exact', or 'lsh'"),
        (spoil("rows.0.parallel", "batch"), r"rows\[0\]\.parallel must be one of context, heads"),
        (spoil("rows.0.overlap", 0.9), r"figures follow from its ms"),
        (spoil("rows.0.scaling_total", ...), r"figures follow from its ms"),
        (spoil("rows.0.kernel", "portable"), r"unknown \['kernel'\]"),
        (spoil("rows.0.ms.cudistr", ...), "'cudistr' in ms or in failed"),
    ],
)
def test_invalid_records_of_several_gpus(
    shared: dict[str, Any], change: Callable[[dict[str, Any]], None], text: str
) -> None:
    change(shared)
    with pytest.raises(ValueError, match=text):
        bench.validate(shared)


def test_record_is_written_and_read_back(record: dict[str, Any], tmp_path: pathlib.Path) -> None:
    for written in (record, {**record, "rows": []}):
        path = bench.write(written, tmp_path / "benchmarks", "attention")
        assert path == tmp_path / "benchmarks" / "nvidia-h200" / "attention.json"
        assert json.loads(path.read_text()) == written


def test_invalid_record_is_not_written(record: dict[str, Any], tmp_path: pathlib.Path) -> None:
    record["rows"][0]["batch"] = 0
    with pytest.raises(ValueError, match="batch"):
        bench.write(record, tmp_path, "attention")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "folder"),
    [("NVIDIA H200", "nvidia-h200"), ("GeForce RTX 4090 (Laptop)", "geforce-rtx-4090-laptop")],
)
def test_slug(device: str, folder: str) -> None:
    assert bench.slug(device) == folder


def test_default_output(tmp_path: pathlib.Path) -> None:
    assert bench.default_output(tmp_path) == tmp_path / "benchmarks"
    (tmp_path / "kernels_cu").mkdir()
    (tmp_path / "docs").mkdir()
    assert bench.default_output(tmp_path) == tmp_path / "docs" / "benchmarks"


@pytest.mark.parametrize("option", ["--output", "--weights"])
@pytest.mark.parametrize("words", [["{}", "/home/me/x y"], ["{}=/home/me"]])
def test_command_leaves_folders_out(option: str, words: list[str]) -> None:
    folder = [word.format(option) for word in words]
    found = bench.command_of(["bench", *folder, "--head-dim", "64", "--name", "a b"])
    assert found == "python -m cudistr bench --head-dim 64 --name 'a b'"


def test_table_marks_what_was_not_timed(record: dict[str, Any]) -> None:
    lines = bench.table(record["rows"]).splitlines()
    assert lines[0].split()[-6:] == ["cudistr", "ms", "flash2", "ms", "fa3", "ms"]
    assert " ".join(lines[1].split()) == "exact hopper bfloat16 64 64 32 8 4 4096 yes 2.000 1.000 -"
    assert len(lines[1]) == len(lines[0])
    assert lines[-1] == "not timed: fa3: TypeError: bf16 only"


def git(folder: pathlib.Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit(tmp_path: pathlib.Path) -> None:
    assert bench.commit_of(tmp_path, {}) == "unknown"
    assert bench.commit_of(tmp_path, {"CUDISTR_COMMIT": "abc"}) == "abc"
    git(tmp_path, "init", "-q")
    source = tmp_path / "cudistr" / "a.py"
    source.parent.mkdir()
    source.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert bench.commit_of(tmp_path, {}) == commit
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "record.json").write_text("{}")
    assert bench.commit_of(tmp_path, {}) == commit  # a record beside the sources changes nothing
    assert bench.commit_of(source.parent, {}) == "unknown"  # somewhere inside another checkout
    source.write_text("2")
    assert bench.commit_of(tmp_path, {}) == f"{commit}-dirty"


def test_the_order_of_columns_is_timed_as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, orders = Gpu(), []

    def group(q: Any, reduction: Any) -> object:
        gpu.work(1.0)
        orders.append(object())
        return orders[-1]

    monkeypatch.setattr(cudistr, "group", group)
    replay = bench._make_group([np.zeros(1)], gpu)
    assert len(orders) == 2  # before the capture, and in it
    assert [replay(), replay()] == [orders[1]] * 2
    assert len(orders) == 2
    assert gpu.clock == 3.0


@pytest.mark.parametrize("ends", [True, False], ids=["the capture ends", "its end fails too"])
def test_a_capture_that_fails_ends_with_the_first_error(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    end = gpu.end_capture

    def failing() -> Any:
        graph = end()
        if not ends:
            raise RuntimeError("the capture was invalidated")
        return graph

    def call() -> None:
        if gpu.captured is not None:
            raise ValueError("the first")

    monkeypatch.setattr(gpu, "end_capture", failing)
    with pytest.raises(ValueError, match="the first"):
        bench.capture(call, gpu)
    gpu.synchronize()  # which asks for the end of the capture


# --- the whole command, on a machine made of NumPy ----------------------------------------------------------


class FakeMachine:
    device = "Fake GPU"
    cupy = np

    class stream:
        @staticmethod
        def synchronize() -> None: ...

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *reason: object) -> None: ...

    def versions(self) -> dict[str, str]:
        return {"cudistr": cudistr.__version__}

    def importable(self, peers: list[str]) -> list[str]:
        return [peer for peer in peers if peer == "cupy"]

    def timer(self, call: bench.Call) -> float:
        call()
        return 100.0

    def inputs(self, case: Case) -> tuple[list[Any], list[Any]]:
        sizes = ((case.heads, case.seqlen_q, case.head_dim), (case.heads_kv, case.seqlen_k, case.head_dim))
        return [], [np.ones((case.batch, *size), bench.DTYPES[case.dtype]) for size in (*sizes, sizes[1])]

    def family(self, arrays: list[Any], case: Case, method: str, prepared: bench.Prepared) -> str:
        return "portable"


SMALL = ["--seqlen", "16", "--tokens", "16", "--hidden", "64", "--head-dim", "64", "--causal", "0"]


def run(*words: str) -> int:
    return bench.run(parse(*words))


def test_run_writes_a_record(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "Machine", FakeMachine)
    monkeypatch.setenv("CUDISTR_COMMIT", "abc")
    words = ["--method", "exact", "lsh4", "exact", "--dtype", "float32", "--grouping", "--seconds", "0.1"]
    assert run(*SMALL, *words, "--output", str(tmp_path), "--name", "small") == 0
    record = json.loads((tmp_path / "fake-gpu" / "small.json").read_text())
    bench.validate(record)
    assert [row["method"] for row in record["rows"]] == ["exact", "lsh4", "group"]
    assert record["rows"][0]["ms"] == {"cudistr": 100.0, "cupy": 100.0}
    assert record["rows"][2]["ms"] == {"cudistr": 100.0, "exact": 100.0, "lsh4": 100.0}
    assert record["commit"] == "abc"
    assert str(tmp_path) not in json.dumps(record)
    printed = capsys.readouterr()
    assert "not importable here: flash2, cudnn, fa3" in printed.err
    assert "lsh4" in printed.out


def test_run_of_a_projection(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Machine", FakeMachine)
    methods = ["projection:32,near=4,sinks=1", "projection:128"]
    words = ["--dtype", "float32", "--method", *methods, "--seconds", "0.1", "--output", str(tmp_path)]
    assert run(*SMALL, *words) == 1
    rows = json.loads((tmp_path / "fake-gpu" / "attention.json").read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    assert rows[0]["ms"] == {"cudistr": 100.0, "cupy": 100.0}
    assert "rank must be a multiple of 16" in rows[1]["failed"]["cudistr"]


def test_run_says_when_cudistr_itself_failed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Machine", FakeMachine)
    assert run(*SMALL, "--method", "lsh16", "--dtype", "float32", "--output", str(tmp_path)) == 1
    record = json.loads((tmp_path / "fake-gpu" / "attention.json").read_text())
    assert "group_size must divide head_dim" in record["rows"][0]["failed"]["cudistr"]


def test_run_of_the_host(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Machine", FakeMachine)
    monkeypatch.setattr(bench, "HOST_CASE", Case("float32", 16, 16, 1, 1, 1, 4, 4, False))
    assert run("--host", "--method", "exact", "lsh2", "--output", str(tmp_path)) == 0
    record = json.loads((tmp_path / "fake-gpu" / "host.json").read_text())
    bench.validate(record)
    assert record["rows"] == []
    assert set(record["host_us"]) == {"exact", "lsh2"}


def test_bad_method_is_refused_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_machine() -> None:
        raise AssertionError("reached the GPU")

    monkeypatch.setattr(bench, "Machine", no_machine)
    with pytest.raises(ValueError, match="got 'fast'"):
        run("--method", "exact", "fast")
