"""Tables from the records in docs/benchmarks/<device>/*.json, so that no measured figure is typed by hand.

python docs/make_tables.py            print all tables, as the documentation shows them
python docs/make_tables.py --readme   write the README's table between its markers
python docs/make_tables.py --check    fail if the README's table is not that of the records
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cudistr import bench, evaluate, normalize, plan, tuned, worth  # noqa: E402

RECORDS = ROOT / "docs" / "benchmarks"
README = ROOT / "README.md"
BEGIN, END = "<!-- table: begin (docs/make_tables.py --readme) -->", "<!-- table: end -->"
NONE = "No record has been committed yet.\n"

CASE = tuple(field.name for field in dataclasses.fields(bench.Case))
PEERS = {
    "flash2": "FlashAttention-2 (torch)",
    "cudnn": "cuDNN (torch)",
    "fa3": "FlashAttention-3",
    "cupy": "plain CuPy",
}


def records(folder: Path = RECORDS) -> list[tuple[Path, dict[str, Any]]]:
    """Every record with its path, sorted by path."""
    return [(p, json.loads(p.read_text(encoding="utf-8"))) for p in sorted(folder.glob("*/*.json"))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def method_name(method: str) -> str:
    """ "lsh2" as LSH(2), others as they are, with a space after a comma."""
    return f"LSH({method[3:]})" if method[3:].isdigit() else method.replace(",", ", ")


def figure(number: float | None) -> str:
    """Three significant digits, more for large numbers, and a dash for what was not timed."""
    if number is None:
        return "-"
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


CASE_HEAD = ("dtype", "head_dim", "heads", "batch", "seqlen", "mask")


def case_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The problem of a row, for people."""
    heads = f"{row['heads']}" if row["heads"] == row["heads_kv"] else f"{row['heads']}/{row['heads_kv']}"
    dims = {row["head_dim"], row["head_dim_v"]}
    dim = str(row["head_dim"]) if len(dims) == 1 else f"{row['head_dim']}/{row['head_dim_v']}"
    seqlens = {row["seqlen_q"], row["seqlen_k"]}
    seqlen = str(row["seqlen_q"]) if len(seqlens) == 1 else f"{row['seqlen_q']}/{row['seqlen_k']}"
    return row["dtype"], dim, heads, str(row["batch"]), seqlen, "causal" if row["causal"] else "none"


def times(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of a bench record, one line per problem: milliseconds of each method and each peer."""
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        found = cases.setdefault(case_cells(row), {})
        for name, ms in row["ms"].items():
            if name == "cudistr":
                found[method_name(row["method"])] = ms
            elif row["method"] != "group":
                found.setdefault(PEERS[name], ms)
    names = list(dict.fromkeys(name for found in cases.values() for name in found))
    names.sort(key=lambda name: name in PEERS.values())
    return table(
        [*CASE_HEAD, *names],
        [[*case, *(figure(found.get(n)) for n in names)] for case, found in cases.items()],
    )


MANY_METHODS = 6  # of a record, more of which become lines instead of columns


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The problem of a row of a bench record."""
    return tuple(row[name] for name in CASE)


def in_lines(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether methods become lines: they are many, and the cases differ in nothing but length and mask."""
    fixed = [name for name in CASE if name not in ("batch", "seqlen_q", "seqlen_k", "causal")]
    alike = len({tuple(row[name] for name in fixed) for row in rows}) == 1
    return alike and len({row["method"] for row in rows}) > MANY_METHODS


def costs(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of a bench record of many methods, one line for each: milliseconds, and the part of exact attention's.

    Only for cases that differ in nothing but length and mask.
    """
    exact = {case_of(row): row["ms"].get("cudistr") for row in rows if row["method"] == "exact"}
    cases = list(dict.fromkeys(map(case_of, rows)))
    lines: dict[str, dict[Any, float]] = {}
    for row in rows:
        case = case_of(row)
        for name, ms in row["ms"].items():
            if name == "cudistr":
                lines.setdefault(f"`{row['method']}`", {})[case] = ms
            elif row["method"] != "group":
                lines.setdefault(PEERS[name], {}).setdefault(case, ms)

    def cell(ms: float | None, case: Any) -> str:
        return figure(ms) if ms is None or not exact.get(case) else f"{figure(ms)} ({ms / exact[case]:.2f})"

    names = sorted(lines, key=lambda name: name in PEERS.values())
    head = [f"{n}, {'causal' if causal else 'no mask'}" for *_, n, causal in cases]
    what = f"{rows[0]['dtype']}, head_dim {rows[0]['head_dim']}"
    return table([what, *head], [[name, *(cell(lines[name].get(c), c) for c in cases)] for name in names])


def reductions(folder: Path = RECORDS, name: str = "reductions") -> str:
    """What each reduction costs: the records of that name."""
    found = [
        f"Milliseconds of a call on {record['device']}, and the part of exact attention's time, by length and mask:\n\n"
        f"{costs(record['rows'])}"
        for path, record in records(folder)
        if path.stem == name
    ]
    return "\n".join(found) or NONE


BREAK_EVEN = "break-even*.json"  # records of the same calls at two lengths


def break_even(folder: Path = RECORDS) -> dict[tuned.Kind, tuple[float | None, ...]]:
    """`cudistr.worth.BREAK_EVEN`, from the records: of the two masks the larger number."""
    ms: dict[Any, dict[int, float]] = {}
    for path, record in records(folder):
        for row in record["rows"] if path.match(BREAK_EVEN) else ():
            family = "float32" if row["dtype"] == "float32" else row["kernel"]
            key = (path, (family, row["head_dim"]), row["method"], row["causal"])
            ms.setdefault(key, {})[row["seqlen_k"]] = row["ms"]["cudistr"]
    # A reduction is compared with exact attention of the same run.
    exact = {
        (path, column, causal): x for (path, column, method, causal), x in ms.items() if method == "exact"
    }
    return worth.table(
        (kind, column, worth.rounded(worth.faster_from(exact[path, column, causal], reduced, causal)))
        for (path, column, method, causal), reduced in ms.items()
        if (kind := worth.kind_of(method, column[1])) is not None
    )


def break_even_table() -> str:
    """The same, for people."""
    named = {
        "lsh2": "`LSH(2)`",
        "lsh4": "`LSH(4)`",
        "rank1": '`LSH(2, representative="rank1")`',
        "energy": "`Energy`, half of head_dim",
        "half": "`Projection`, half of head_dim",
        "quarter": "`Projection`, a quarter",
        "lowrank half": "`LowRank`, half of head_dim",
        "lowrank quarter": "`LowRank`, a quarter",
    }
    kernels = {"hopper": "Hopper kernel", "portable": "portable kernel", "float32": "float32"}

    def cell(keys: float | None) -> str:
        return (
            "-" if keys is None else "never" if math.isinf(keys) else "always" if keys == 0 else f"{keys:.0f}"
        )

    rows = [
        [named[kind] + ", exact keys" * kept + ", tolerance" * within, *map(cell, keys)]
        for (kind, kept, within), keys in worth.BREAK_EVEN.items()
    ]
    return table(["faster from", *(f"{kernels[family]}, {dim}" for family, dim in worth.COLUMNS)], rows)


def host_times(record: dict[str, Any]) -> str:
    rows = [[method_name(m), figure(us)] for m, us in record["host_us"].items()]
    return table(["method", "microseconds of the host per call"], rows)


def clock(record: dict[str, Any]) -> str:
    """Rows of a record of clocks, one line for each candidate."""
    rows = [
        [PEERS.get(name) or method_name(name), *case_cells(row), figure(of["ms"]), f"{of['mhz']:.0f}",
         f"{of['watts']:.0f}", figure(of["joules"]), f"{of['limited']:.0%}"]
        for name, row, of in bench.watched(record["rows"])
    ]  # fmt: skip
    limits = f"Power limit {record['limit_watts']:.0f} W, highest clock {record['max_mhz']:.0f} MHz."
    return f"{limits}\n\n{table(['method', *CASE_HEAD, 'ms', 'MHz', 'W', 'J', 'limited'], rows)}"


def clocks(folder: Path = RECORDS) -> str:
    """What clock and power do while attention runs, on every device that has such a record."""
    found = [
        f"`{record['command']}` on {record['device']}, commit {record['commit'][:12]}. {clock(record)}"
        for _, record in records(folder)
        if "limit_watts" in record
    ]
    return "\n".join(found) or NONE


def sharing(record: dict[str, Any]) -> str:
    """Rows of a bench record of several GPUs."""
    columns = {
        "cudistr": "ms",
        "attention": "attention alone, ms",
        "transfers": "transfers alone, ms",
        "single_total": "one GPU, whole sequence, ms",
        "single_share": "one GPU, share of a rank, ms",
    }
    figures = {
        "overlap": "overlap",
        "scaling_total": "scaling at fixed length",
        "scaling_share": "scaling at fixed length per GPU",
    }
    rows = []
    for row in record["rows"]:
        heads = f"{row['heads']}" if row["heads"] == row["heads_kv"] else f"{row['heads']}/{row['heads_kv']}"
        case = [method_name(row["method"]), row["parallel"], row["dtype"], str(row["head_dim"]), heads]
        case += [str(row["batch"]), str(row["seqlen_k"]), "causal" if row["causal"] else "none"]
        times = [figure(row["ms"].get(name)) for name in columns]
        rows.append([*case, *times, *(f"{row[name]:.2f}" if name in row else "-" for name in figures)])
    head = ["method", "parallel", "dtype", "head_dim", "heads", "batch", "seqlen", "mask"]
    return table([*head, *columns.values(), *figures.values()], rows)


def several_gpus(folder: Path = RECORDS) -> str:
    """The records of several GPUs, or that there are none."""
    found = [section(path, record) for path, record in records(folder) if "ranks" in record]
    return (
        "\n".join(found) or "Speed on several GPUs has not been measured yet: no record has been committed.\n"
    )


def demo(record: dict[str, Any]) -> str:
    head = ["method", "ms per forward", "ms of attention", "layer error, mean", "worst layer", "worst head",
            "rounding, worst layer", "cosine of features, mean", "worst token"]  # fmt: skip
    rows = []
    for name, m in record["methods"].items():
        errors = m["layer_errors"]
        rounding = "-" if m["rounding"] is None else f"{max(m['rounding']):.1e}"
        approximation = [sum(errors) / len(errors), max(errors), max(map(max, m["head_errors"]))]
        rows.append([
            name, figure(m["ms_per_forward"]), figure(m["ms_attention"]), *(f"{x:.3f}" for x in approximation),
            rounding, f"{m['cosine_mean']:.4f}", f"{m['cosine_min']:.4f}",
        ])  # fmt: skip
    return table(head, rows)


PROFILE = {
    "call_ms": "whole call, ms", "attention_ms": "attention kernel, ms",
    "tensor_percent": "tensor cores busy, % of the time", "shared_percent": "shared memory busy, % of the time",
    "instructions_per_clock": "instructions per clock, of 4", "registers": "registers per thread",
    "warps_per_scheduler": "warps per scheduler",
}  # fmt: skip


def _check_profile(record: dict[str, Any]) -> None:
    """Refuse a profile that is not of its form."""
    found = {"device", "how", "case", "kernel", "profile"} ^ set(record)
    if found:
        raise ValueError(
            f"a profile has device, how, case, kernel and profile; missing or unknown: {sorted(found)}"
        )
    for method, figures in record["profile"].items():
        bench.reduction_of(method)  # refuses what is no method
        if not set(figures) <= set(PROFILE):
            raise ValueError(f"a profile maps methods to {', '.join(PROFILE)}, got {method}: {figures}")
        for name, figure_of in figures.items():
            if type(figure_of) not in (int, float) or not figure_of > 0:
                raise ValueError(f"{method}.{name} must be a positive number, got {figure_of!r}")


def profile(record: dict[str, Any]) -> str:
    """What a profiler saw, a column for each method."""
    _check_profile(record)
    methods = record["profile"]
    rows = [
        [text, *(f"{of[name]:g}" if name in of else "-" for of in methods.values())]
        for name, text in PROFILE.items()
    ]
    return table(["measured", *map(method_name, methods)], rows)


def predicted(record: dict[str, Any]) -> str:
    """What the planner's estimate says of the same kernels, a column for each method of a profile."""
    case = record["case"]
    device = plan.Device(90, 227 * 1024)
    columns = {}
    for method in record["profile"]:
        shape = (case["batch"], case["heads"], case["seqlen"], case["head_dim"])
        empty = np.broadcast_to(np.zeros(1, bench.DTYPES[case["dtype"]]), shape)
        problem = normalize.problem(empty, empty, empty, reduction=bench.reduction_of(method))
        kernel, tile = plan.portable_kernel(problem, device)
        resident = plan.resident_blocks(tile, kernel, device, case["head_dim"])
        steps = plan.step_clocks(problem, device, tile)
        clocks = {f"{unit}, clocks": x for unit, x in steps.items()}
        alone = sum(steps.values()) + plan.WAIT_CLOCKS
        columns[method] = {
            "tile, queries x keys": f"{tile.block_m} x {tile.tile_k}",
            **{name: f"{x:.0f}" for name, x in clocks.items()},
            "one after another, with two waits for memory": f"{alone:.0f}",
            "thread blocks that overlap": f"{resident}",
            "the busiest unit at work, % of the time": f"{100 * resident * max(steps.values()) / alone:.0f}",
        }
    names = next(iter(columns.values()))
    rows = [[name, *(of[name] for of in columns.values())] for name in names]
    return table(["estimated for a step of keys", *map(method_name, columns)], rows)


def profiles(folder: Path = RECORDS) -> str:
    """The page of profiles: estimates and measurements side by side."""
    parts = []
    for path, record in records(folder):
        if "profile" in record:
            case = record["case"]
            text = (
                f"`{record['kernel']}` on {record['device']}, {case['dtype']}, {case['head_dim']} columns, "
                f"{case['heads']} heads, batch {case['batch']}, "
                f"N = {case['seqlen']}; measured: {record['how']}.\n\n"
            )
            parts.append(f"## {path.parent.name}\n\n{text}{predicted(record)}\n{profile(record)}")
    return "\n".join(parts) or NONE


def evaluation(record: dict[str, Any]) -> str:
    """Rows of an evaluation, one line per method; columns that no row has are left out."""
    names = {
        "perplexity": ("perplexity", lambda x: f"{x:.2f}"),
        "cosine": ("cosine of features, mean", lambda x: f"{x:.4f}"),
        "cosine_worst": ("worst token", lambda x: f"{x:.4f}"),
        "error_mean": ("output error, mean", lambda x: f"{x:.4f}"),
        "error_worst": ("worst head", lambda x: f"{x:.3f}"),
        "dim": ("columns of a score", lambda x: f"{x:.1f}"),
        "ms_attention": ("ms, called from Python", figure),
        "ms_graph": ("ms, as a CUDA graph", figure),
    }
    shown = [name for name in names if any(name in row for row in record["rows"])]
    exact = next(
        (row["perplexity"] for row in record["rows"] if row["method"] == "exact" and "perplexity" in row), 0
    )
    rows = []
    for row in record["rows"]:
        cells = [names[name][1](row[name]) if name in row else "-" for name in shown]
        if exact:
            cells[0] += f" ({100 * (row['perplexity'] / exact - 1):+.2f}%)"
        rows.append([f"`{row['method']}`{' (needs training)' if row.get('trained') else ''}", *cells])
    return table(["method", *(names[name][0] for name in shown)], rows)


def section(path: Path, record: dict[str, Any]) -> str:
    """One record as a section: what was run, and its table.

    Raises
    ------
    ValueError
        If the record is of no known kind, or not of its form.
    """
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    title = f"### {path.parent.name}/{path.name}\n\n"
    if "profile" in record:
        return f"{title}{record['kernel']} under a profiler: {{doc}}`time`.\n\n{profile(record)}"
    if "methods" in record:
        text = (
            f"The demo: DINOv2 ViT-S/14, {record['model']['layers']} layers, {record['tokens']} tokens of the "
            f"photograph {record['image']}, {record['dtype']}, {record['path']} on {record['device']}. Layer errors "
            f"are ‖O - Ô‖ / ‖O‖ against exact attention; rounding is against the float64 reference of the same "
            f"method; features are compared at the end of the model, the method in all layers. {versions}.\n\n"
        )
        picture = path.with_suffix(".png")
        shown = f"\n![photograph and saliency maps](benchmarks/{path.parent.name}/{picture.name})\n"
        return title + text + demo(record) + (shown if picture.is_file() else "")
    if "evaluated" in record:
        evaluate.validate(record)
        facts = record["evaluated"]
        text = (
            f"`{record['command']}`, {facts['model']}, {facts['seqlen']} tokens, {facts['dtype']}, on "
            f"{record['device']}, commit {record['commit'][:12]}. {versions}.\n\n"
        )
        return title + text + evaluation(record)
    try:
        bench.validate(record)
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name}: {error}") from error
    text = f"`{record['command']}` on {record['device']}, commit {record['commit'][:12]}. {versions}.\n\n"
    if "host_us" in record:
        return title + text + host_times(record)
    if "limit_watts" in record:
        return title + text + clock(record)
    if "ranks" in record:
        return f"{title}{record['ranks']} ranks over {record['transport'].upper()}. {text}{sharing(record)}"
    text += "Milliseconds of a call, medians over rounds in which all take turns.\n\n"
    return title + text + (costs if in_lines(record["rows"]) else times)(record["rows"])


def all_tables(folder: Path = RECORDS) -> str:
    """Every record, a section for each device."""
    found = records(folder)
    parts = []
    for device in dict.fromkeys(path.parent.name for path, _ in found):
        sections = [section(path, record) for path, record in found if path.parent.name == device]
        parts.append(f"## {device}\n\n" + "\n".join(sections))
    return "\n".join(parts) or NONE


def evaluations(folder: Path = RECORDS) -> dict[str, str]:
    """Tables of each evaluation by the name of its records: those of GPUs, which have times, before the CPU's."""
    found: dict[str, list[str]] = {}
    for path, record in sorted(records(folder), key=lambda x: x[0].parent.name == "cpu"):
        if "evaluated" in record:
            facts = record["evaluated"]
            device = "a CPU" if record["device"] == "cpu" else record["device"]
            line = f"{facts['model']}, {facts['seqlen']} tokens, {facts['dtype']}, on {device}:"
            found.setdefault(path.stem, []).append(f"{line}\n\n{evaluation(record)}")
    return {name: "\n".join(tables) for name, tables in found.items()}


def readme_table(folder: Path = RECORDS) -> str:
    """The README's table: each device's record attention.json."""
    parts = []
    for path, record in records(folder):
        if path.name != "attention.json":
            continue
        rows = [row for row in record["rows"] if row["method"] != "group"]
        versions = record["versions"]
        peers = [
            f"{name} {versions[key]}"
            for key, name in (("torch", "torch"), ("cudnn", "cuDNN"))
            if key in versions
        ]
        parts.append(
            f"Milliseconds on {record['device']}, standard normal inputs, commit {record['commit'][:12]}"
            f"{''.join(f', {x}' for x in peers)}:\n\n{times(rows)}"
        )
    return "\n".join(parts) or NONE


def with_table(readme: str, content: str) -> str:
    """The README's text with the table between its markers replaced.

    Raises
    ------
    ValueError
        If a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the line {BEGIN if not begin else END}. Put both back.")
    return f"{before}{BEGIN}\n{content}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--readme", action="store_true", help="write the README's table between its markers")
    action.add_argument(
        "--check", action="store_true", help="fail if the README's table is not that of the records"
    )
    args = parser.parse_args()
    if not (args.readme or args.check):
        print(all_tables(), end="")
        return 0
    old = README.read_text(encoding="utf-8")
    new = with_table(old, readme_table())
    if args.readme:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        print("README.md: the table is not that of the records. Run: python docs/make_tables.py --readme")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
