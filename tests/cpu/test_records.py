"""Tables are made from records, and the README's is that of the records in this checkout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cudistr import bench, compose, plan, worth
from tests.pages import load

ROOT = Path(__file__).resolve().parents[2]


make_tables, pareto_figure = load("make_tables"), load("pareto_figure")

CASE = {
    "dtype": "bfloat16", "head_dim": 64, "head_dim_v": 64, "heads": 32, "heads_kv": 8, "batch": 4,
    "seqlen_q": 4096, "seqlen_k": 4096, "causal": False,
}  # fmt: skip
BENCH = {
    "device": "GPU X",
    "commit": "0123456789abcdef",
    "command": "python -m cudistr bench",
    "versions": {"cudistr": "0.1.0", "torch": "2.9"},
    "rows": [
        {"method": "exact", "kernel": "portable", **CASE, "ms": {"cudistr": 1.23456, "flash2": 1.0}},
        {"method": "lsh2", "kernel": "portable", **CASE, "ms": {"cudistr": 0.98765, "flash2": 1.0}},
        {"method": "exact", "kernel": "portable", **CASE, "causal": True,
         "ms": {"cudistr": 0.7}, "failed": {"flash2": "RuntimeError: no"}},
        {"method": "group", "kernel": "portable", **CASE, "ms": {"cudistr": 0.0456, "exact": 1.23456}},
    ],
}  # fmt: skip
HOST = {**BENCH, "rows": [], "host_us": {"exact": 21.5}, "host_case": CASE}
METHOD = {
    "reduction": None, "ms_per_forward": 12.345, "ms_attention": 3.0, "layer_errors": [0.25, 0.75],
    "head_errors": [[0.1, 0.3], [0.5, 0.875]], "rounding": [1e-4, 3e-4], "cosine_mean": 0.5, "cosine_min": 0.125,
}  # fmt: skip
DEMO = {
    "what": "cudistr demo", "path": "GPU kernels", "device": "GPU X", "versions": {"cudistr": "0.1.0"},
    "model": {"layers": 2, "heads": 2, "head_dim": 64}, "image": "astronaut", "size": 518, "tokens": 1370,
    "dtype": "float16", "methods": {"LSH(group_size=2)": METHOD},
}  # fmt: skip

EVAL = {
    "device": "cpu", "commit": "0123456789abcdef", "command": "python -m cudistr eval", "versions": {"numpy": "2"},
    "evaluated": {"model": "M", "seqlen": 99, "dtype": "float32"},
    "rows": [
        {"method": "exact", "perplexity": 10.0, "error_mean": 0.0, "error_worst": 0.0, "dim": 64.0},
        {"method": "hydra", "trained": True, "perplexity": 12.5, "error_mean": 0.5, "error_worst": 1.25},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    device = tmp_path / "gpu-x"
    device.mkdir()
    for name, record in (("attention", BENCH), ("host", HOST), ("demo", DEMO)):
        (device / f"{name}.json").write_text(json.dumps(record))
    return tmp_path


def test_readme_shows_the_records_of_this_checkout() -> None:
    readme = make_tables.README.read_text(encoding="utf-8")
    assert readme == make_tables.with_table(readme, make_tables.readme_table()), (
        "run: python docs/make_tables.py --readme"
    )


def test_every_record_of_this_checkout_has_a_section() -> None:
    text = make_tables.all_tables()
    for path, _ in make_tables.records():
        assert f"### {path.parent.name}/{path.name}\n" in text


def test_readme_table(folder: Path) -> None:
    lines = make_tables.readme_table(folder).splitlines()
    assert lines[0] == ("Milliseconds on GPU X, standard normal inputs, commit 0123456789ab, torch 2.9:")
    assert lines[2:] == [
        "| dtype | head_dim | heads | batch | seqlen | mask | exact | LSH(2) | FlashAttention-2 (torch) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| bfloat16 | 64 | 32/8 | 4 | 4096 | none | 1.23 | 0.988 | 1.00 |",
        "| bfloat16 | 64 | 32/8 | 4 | 4096 | causal | 0.700 | - | - |",
    ]


def test_all_tables(folder: Path) -> None:
    text = make_tables.all_tables(folder)
    assert text.startswith("## gpu-x\n")
    assert "| bfloat16 | 64 | 32/8 | 4 | 4096 | none | 1.23 | 0.988 | 0.0456 | 1.00 |" in text
    assert "| bfloat16 | 64 | 32/8 | 4 | 4096 | causal | 0.700 | - | - | - |" in text
    assert "| exact | 21.5 |" in text
    assert "| LSH(group_size=2) | 12.3 | 3.00 | 0.500 | 0.750 | 0.875 | 3.0e-04 | 0.5000 | 0.1250 |" in text


def test_evaluation(folder: Path) -> None:
    for device, name in (("cpu", "cpu"), ("gpu-x", "GPU X")):
        (folder / device).mkdir(exist_ok=True)
        (folder / device / "eval-m.json").write_text(json.dumps({**EVAL, "device": name}))
    text = make_tables.all_tables(folder)
    assert "| method | perplexity | output error, mean | worst head | columns of a score |" in text
    assert "| `exact` | 10.00 (+0.00%) | 0.0000 | 0.000 | 64.0 |" in text
    assert "| `hydra` (needs training) | 12.50 (+25.00%) | 0.5000 | 1.250 | - |" in text
    found = make_tables.evaluations(folder)
    assert list(found) == ["eval-m"]
    of_gpu, of_cpu = (
        found["eval-m"].index(f"M, 99 tokens, float32, on {x}:\n\n| method |") for x in ("GPU X", "a CPU")
    )
    assert of_gpu == 0 < of_cpu
    timed = [{**EVAL["rows"][0], "ms_attention": 0.9}, {**EVAL["rows"][1], "ms_attention": 500.0}]
    assert "| 64.0 | 0.900 |" in make_tables.evaluation({**EVAL, "rows": timed})
    timed[0]["ms_graph"] = 0.25
    text = make_tables.evaluation({**EVAL, "rows": timed})
    assert "| ms, called from Python | ms, as a CUDA graph |" in text
    assert "| 64.0 | 0.900 | 0.250 |" in text
    assert "| - | 500 | - |" in text


def test_several_gpus(folder: Path) -> None:
    unmeasured = "Speed on several GPUs has not been measured yet: no record has been committed.\n"
    assert make_tables.several_gpus(folder) == unmeasured
    ms = {"cudistr": 2.0, "attention": 1.75, "transfers": 1.0, "single_total": 6.0, "single_share": 0.4}
    ring = {"method": "lsh2", "parallel": "context", **CASE, "ms": ms, **bench.sharing_figures(ms, 4)}
    heads = {"method": "exact", "parallel": "heads", **CASE, "ms": {"cudistr": 3.0}}
    record = {**BENCH, "ranks": 4, "transport": "nccl", "rows": [ring, heads]}
    (folder / "gpu-x" / "distributed.json").write_text(json.dumps(record))
    text = make_tables.several_gpus(folder)
    assert text in make_tables.all_tables(folder)
    assert "4 ranks over NCCL. `python -m cudistr bench` on GPU X" in text
    case = "bfloat16 | 64 | 32/8 | 4 | 4096 | none"
    assert f"| LSH(2) | context | {case} | 2.00 | 1.75 | 1.00 | 6.00 | 0.400 | 0.75 | 0.75 | 0.80 |" in text
    assert f"| exact | heads | {case} | 3.00 | - | - | - | - | - | - | - |" in text


def test_clocks(folder: Path) -> None:
    assert make_tables.clocks(folder) == make_tables.NONE
    seen = {"exact": bench.Steady(2.0, 1500.0, 695.0, 1.0), "fa3": bench.Steady(2.25, 1980.0, 400.0, 0.0)}
    timings = bench.Timings({name: of.ms for name, of in seen.items()})
    rows = bench.make_rows(bench.Case(**CASE), {"exact": "hopper"}, timings, ["fa3"])
    record = {**BENCH, "limit_watts": 700.0, "max_mhz": 1980.0, "rows": bench.add_clock(rows, seen)}
    (folder / "gpu-x" / "clock.json").write_text(json.dumps(record))
    text = make_tables.clocks(folder)
    assert "### gpu-x/clock.json\n" in make_tables.all_tables(folder)
    assert "on GPU X, commit 0123456789ab. Power limit 700 W, highest clock 1980 MHz." in text
    case = "bfloat16 | 64 | 32/8 | 4 | 4096 | none"
    assert f"| exact | {case} | 2.00 | 1500 | 695 | 1.39 | 100% |" in text
    assert f"| FlashAttention-3 | {case} | 2.25 | 1980 | 400 | 0.900 | 0% |" in text


def test_no_record(tmp_path: Path) -> None:
    assert make_tables.all_tables(tmp_path) == make_tables.readme_table(tmp_path) == make_tables.NONE


def test_a_record_of_no_known_form_is_refused(folder: Path) -> None:
    (folder / "gpu-x" / "odd.json").write_text('{"speed": "great"}')
    with pytest.raises(ValueError, match=r"gpu-x/odd\.json: record: the record must be an object with"):
        make_tables.all_tables(folder)


PROFILE = {
    "device": "GPU X", "how": "a profiler", "kernel": "sm80_flash_fwd",
    "case": {"dtype": "bfloat16", "head_dim": 128, "heads": 16, "batch": 4, "seqlen": 4096, "causal": False},
    "profile": {"lsh2": {"call_ms": 1.5, "tensor_percent": 40}, "exact": {"tensor_percent": 54}},
}  # fmt: skip


def test_a_profile_stands_beside_the_estimate(folder: Path) -> None:
    (folder / "gpu-x" / "profile.json").write_text(json.dumps(PROFILE))
    text = make_tables.profiles(folder)
    assert "| measured | LSH(2) | exact |" in text and "| whole call, ms | 1.5 | - |" in text
    assert "| tensor cores busy, % of the time | 40 | 54 |" in text
    assert "| tile, queries x keys | 128 x 64 | 128 x 64 |" in text
    assert "### gpu-x/profile.json\n" in make_tables.all_tables(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"profile": {"lsh2": {"speed": 1}}},
        {"profile": {"exact": {"call_ms": -1}}},
        {"profile": {"exact": {"call_ms": "1"}}},
        {"profile": {"fast": {"call_ms": 1}}},
        {"more": 1},
    ],
)
def test_a_profile_of_another_form_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be|has|maps|method"):
        make_tables.profile({**PROFILE, **change})


def test_what_the_page_says_of_tolerances() -> None:
    """Every head of every evaluation keeps to its tolerance."""
    rows = [row for _, record in make_tables.records() if "evaluated" in record for row in record["rows"]]
    found = [
        (x["error_worst"], x["method"].split("tolerance=")[1]) for x in rows if "tolerance=" in x["method"]
    ]
    assert len(found) >= 2 and all(error <= float(text.split(",")[0]) for error, text in found)


def test_what_the_pages_say_of_low_rank() -> None:
    """Less than half of the error of Energy with as many columns, and with a tolerance next to nothing is lost."""
    found = {path.stem: record for path, record in make_tables.records()}
    for name in ("eval-smollm2", "eval-dinov2"):
        rows = {row["method"]: row for row in found[name]["rows"]}
        reduced = [x for x in rows if x.startswith("energy:")]
        within = [row for method, row in rows.items() if "lowrank" in method and "tolerance=0.1" in method]
        assert reduced and within
        for method in reduced:
            same = method.replace("energy", "lowrank").replace(",near=0,sinks=0", "")
            assert rows[same]["error_mean"] < rows[method]["error_mean"] / 2
        for row in within:
            assert row["error_worst"] < 0.1
            if "perplexity" in row:
                assert row["perplexity"] < 1.002 * rows["exact"]["perplexity"]
            else:
                assert row["cosine"] > 0.9998


def test_the_front_of_a_figure() -> None:
    """Who is slower has to be nearer to exact attention than all that are faster, and of two alike one is enough."""
    points = [(3.0, 0.1), (1.0, 0.5), (2.0, 0.6), (3.0, 0.2), (4.0, 0.1), (5.0, 0.05)]
    assert pareto_figure.front_of(points) == [(1.0, 0.5), (3.0, 0.1), (5.0, 0.05)]
    assert pareto_figure.front_of([]) == []


def test_the_figure_takes_the_smaller_error_of_fp8() -> None:
    def record(seqlen: int, **errors: float) -> dict[str, Any]:
        rows = [{"method": method.replace("_", ",rotate="), "error_mean": x} for method, x in errors.items()]
        return {"evaluated": {"model": "M", "seqlen": seqlen}, "rows": rows}

    own, others = record(99, exact=0.0), [record(99, fp8=0.3, fp8_yes=0.2, lsh=0.1), record(50, fp8=0.05)]
    assert pareto_figure.fp8_of(own, others) == 0.2
    assert pareto_figure.fp8_of(own, []) is None


@pytest.mark.parametrize(
    ("model", "nearer", "further"),
    [
        (
            "smollm2",
            (
                "projection:32,share=yes,near=256,sinks=64",
                "projection:32,share=yes,fit=static,near=256,sinks=64",
            ),
            ("lsh:2", "lsh:2,near=256,sinks=64"),
        ),
        ("dinov2", ("projection:32,share=yes",), ("lsh:2",)),
    ],
)
def test_what_the_page_says_of_fp8(model: str, nearer: tuple[str, ...], further: tuple[str, ...]) -> None:
    """What is nearer to exact attention than rounding to FP8, and what is further away."""
    errors: dict[str, list[float]] = {}
    for path, record in make_tables.records():
        if path.stem == f"eval-{model}":
            for row in record["rows"]:
                errors.setdefault(row["method"].split(",rotate")[0], []).append(row["error_mean"])
    assert len(errors["fp8"]) >= 2
    assert max(max(errors[method]) for method in nearer) < min(errors["fp8"])
    assert max(errors["fp8"]) < min(min(errors[method]) for method in further)


def test_the_page_says_from_where_a_tolerance_alone_reduces() -> None:
    """Thousands of tokens with 128 columns, on both kernels, without a mask and with a causal one."""
    text = " ".join((ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").split())
    found = re.search(
        r"128 columns below (\S+) thousand tokens, or (\S+) thousand under a causal mask; on the portable kernel "
        r"below (\S+) and (\S+) thousand",
        text,
    )
    assert found is not None
    wanted = []
    for place in (("hopper", 128), ("portable", 128)):
        index = worth.COLUMNS.index(place)
        of_kind = [worth.BREAK_EVEN["lowrank half", near, True][index] for near in (False, True)]
        # Under the mask a query sees half of the keys, and some stay exact.
        wanted += [
            compose.PICKED_KEYS * keys * part / 1000 for keys, part in zip(of_kind, (1, 2), strict=True)
        ]
    assert [float(x) for x in found.groups()] == pytest.approx(wanted)


def test_the_page_says_what_the_profile_says() -> None:
    """Its sentences hold for the committed profile."""
    (record,) = (r for _, r in make_tables.records() if "profile" in r)
    grouped, exact = record["profile"]["lsh2"], record["profile"]["exact"]
    busy = [grouped["tensor_percent"], grouped["shared_percent"], 25 * grouped["instructions_per_clock"]]
    assert max(busy) < 55 and exact["tensor_percent"] < 65  # no unit is at work all the time
    assert grouped["registers"] >= 250 and grouped["warps_per_scheduler"] == 2
    assert grouped["attention_ms"] < grouped["call_ms"]


def test_what_the_page_says_of_energy() -> None:
    """The bounds on what can be gained where power binds."""
    text = " ".join((ROOT / "docs" / "hopper.md").read_text(encoding="utf-8").split())

    def ratios(name: str, method: str) -> list[str]:
        record = json.loads((make_tables.RECORDS / "nvidia-h200" / name).read_text())
        found = []
        for causal in (False, True):
            rows = {row["method"]: row["joules"] for row in record["rows"] if row["causal"] == causal}
            found.append(f"{rows['exact']['fa3'] / rows[method]['cudistr']:.2f}")
        return found

    of_groups = ratios("clock.json", "projection:64")
    assert "takes {} times the energy of that projection, and {} times".format(*of_groups) in text
    of_64 = ratios("clock-64.json", "exact")
    assert "takes {} times the energy, and {} times under a causal mask".format(*of_64) in text


@pytest.mark.parametrize(("name", "head_dim", "larger"), [("clock", 128, True), ("clock-64", 64, False)])
@pytest.mark.parametrize("causal", [False, True])
def test_what_the_page_says_of_leads(name: str, head_dim: int, larger: bool, causal: bool) -> None:
    """Whose lead over FlashAttention-3 is larger where candidates take turns than where each runs alone."""

    def lead(file: str) -> float:
        rows = json.loads((make_tables.RECORDS / "nvidia-h200" / f"{file}.json").read_text())["rows"]
        (ms,) = (
            row["ms"]
            for row in rows
            if (row["method"], row["head_dim"], row["seqlen_k"]) == ("exact", head_dim, 16384)
            and row["causal"] == causal
        )
        return float(ms["fa3"] / ms["cudistr"])

    assert (lead("attention") > lead(name)) == larger


def test_the_rate_of_products_follows_from_the_records() -> None:
    folder = make_tables.RECORDS / "nvidia-h200"
    times, profile = (json.loads((folder / f"{name}.json").read_text()) for name in ("portable", "profile"))
    case = profile["case"]
    (ms,) = (
        row["ms"]["cudistr"]
        for row in times["rows"]
        if (row["dtype"], row["method"], row["head_dim"]) == ("bfloat16", "exact", 128)
        and (row["seqlen_k"], row["causal"]) == (4096, False)
    )
    products = 2 * case["batch"] * case["heads"] * case["seqlen"] ** 2 * case["head_dim"]

    def in_a_clock(ms: float) -> float:
        return products / (1e-3 * ms) / (132 * 1.755e9)

    # Under the profiler the GPU is not at its limit of power, and calls take less time.
    exact = profile["profile"]["exact"]
    rate = in_a_clock(exact["call_ms"]) / (exact["tensor_percent"] / 100)
    assert abs(rate / plan.MMA_PER_CLOCK["bfloat16"] - 1) < 0.02
    assert abs(in_a_clock(ms) / plan.PRODUCTS_PER_CLOCK["bfloat16"] - 1) < 0.02


def test_readme_markers() -> None:
    readme = f"a\n{make_tables.BEGIN}\nold\n{make_tables.END}\nb\n"
    new = make_tables.with_table(readme, "new\n")
    assert new == f"a\n{make_tables.BEGIN}\nnew\n{make_tables.END}\nb\n"
    assert make_tables.with_table(new, "new\n") == new
    with pytest.raises(ValueError, match=r"README\.md lacks the line <!-- table: end -->"):
        make_tables.with_table(make_tables.BEGIN, "new\n")


def test_methods_become_lines_where_only_length_and_mask_differ() -> None:
    case = {"dtype": "float16", "head_dim": 64, "head_dim_v": 64, "heads": 2, "heads_kv": 2, "batch": 1}
    case |= {"seqlen_q": 10, "seqlen_k": 10}
    methods = ["exact", *(f"lsh{n}" for n in range(2, 8))]
    rows = [
        {**case, "method": m, "causal": c, "ms": {"cudistr": 2.0 + i, "fa3": 1.0}}
        for c in (False, True)
        for i, m in enumerate(methods)
    ]
    assert make_tables.in_lines(rows) and not make_tables.in_lines(rows[:3])
    assert not make_tables.in_lines([*rows, {**rows[0], "head_dim": 128}])
    lines = make_tables.costs(rows).splitlines()
    assert lines[0] == "| float16, head_dim 64 | 10, no mask | 10, causal |"
    assert lines[2] == "| `exact` | 2.00 (1.00) | 2.00 (1.00) |"
    assert lines[3] == "| `lsh2` | 3.00 (1.50) | 3.00 (1.50) |"
    assert lines[-1] == "| FlashAttention-3 | 1.00 (0.50) | 1.00 (0.50) |"
