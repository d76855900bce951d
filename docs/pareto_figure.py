"""The figure of the accuracy page: output error against the columns of a score, or time, from committed records.

python docs/pareto_figure.py FILE.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_tables

from cudistr.evaluate.rivals import RIVALS

NAMES = ("eval-smollm2", "eval-dinov2")  # of the records, one panel each
KINDS = {
    "lsh": ("LSH", "C3", "o"),
    "projection": ("Projection", "C0", "s"),
    "lowrank": ("LowRank", "C4", "v"),
    "energy": ("Energy", "C2", "^"),
    "hyper": ("HyperAttention", "C1", "D"),
}
LIMIT = 20  # times the exact one's number: what is beyond, or lacks that number, is written below


def words_of(row: dict[str, Any]) -> list[str]:
    """Kind, number and options of a row's method."""
    return str(row["method"]).replace(":", ",", 1).split(",")


def axis_of(record: dict[str, Any]) -> tuple[str, str]:
    """The best number for the horizontal axis that all methods of cudistr have, and its label."""
    own = [row for row in record["rows"] if words_of(row)[0] not in RIVALS]
    for across, label in (
        ("ms_graph", "ms of attention as a CUDA graph, all layers"),
        ("ms_attention", "ms of attention called from Python, all layers"),
    ):
        if all(across in row for row in own):
            return across, label
    return "dim", "columns of a score, on average"


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of some (number, error) that no other beats in both, by number."""
    found: list[tuple[float, float]] = []
    for across, error in sorted(points):
        if not found or error < found[-1][1]:
            found.append((across, error))
    return found


def fp8_of(record: dict[str, Any], others: list[dict[str, Any]]) -> float | None:
    """The smallest error of exact attention in FP8 on the data of a record, by its own rows or other records'."""
    facts = record["evaluated"]
    errors = []
    for other in (record, *others):
        if all(other["evaluated"][name] == facts[name] for name in ("model", "seqlen")):
            errors += [float(row["error_mean"]) for row in other["rows"] if words_of(row)[0] == "fp8"]
    return min(errors, default=None)


def draw(path: Path) -> None:
    """One panel per evaluation: records of a GPU by milliseconds, others by columns."""
    from matplotlib.figure import Figure

    chosen: dict[str, dict[str, Any]] = {}
    every = sorted(make_tables.records(), key=lambda x: x[0].parent.name == "cpu")
    for file, record in every:
        if file.stem in NAMES:
            chosen.setdefault(file.stem, record)
    evaluations = [record for _, record in every if "evaluated" in record]
    if not chosen:
        raise ValueError("docs/benchmarks holds no record of an evaluation. Make one: python -m cudistr eval")
    named: dict[str, Any] = {}  # lines of the legend
    figure = Figure(figsize=(4.6 * len(chosen), 3.6), layout="constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    for panel, record in zip(panels, chosen.values(), strict=True):
        across, label = axis_of(record)
        exact = next((r[across] for r in record["rows"] if r["method"] == "exact" and across in r), None)
        left_out = []
        own = []
        for kind, (name, colour, marker) in KINDS.items():
            rows = [r for r in record["rows"] if words_of(r)[0] == kind]
            shown = [r for r in rows if across in r and (exact is None or r[across] <= LIMIT * exact)]
            left_out += [
                f"{name}: {r['ms_attention']:.0f} ms from Python, error {r['error_mean']:.2f}"
                for r in rows
                if r not in shown and "ms_attention" in r
            ]
            if shown:
                points = ([r[across] for r in shown], [r["error_mean"] for r in shown])
                panel.plot(*points, marker, color=colour, label=name)
                own += [] if kind in RIVALS else list(zip(*points, strict=True))
                for row in shown:
                    note = ",".join(w for w in words_of(row)[1:] if not w.startswith(("near", "sinks")))
                    place = (row[across], row["error_mean"])
                    panel.annotate(note, place, fontsize=5.5, xytext=(4, 2), textcoords="offset points")
        if exact is not None:
            panel.axvline(exact, color="0.6", linestyle=":", label="exact")
        front = front_of(own)
        panel.plot(
            *zip(*front, strict=True), color="0.6", linewidth=0.8, drawstyle="steps-post", label="front"
        )
        fp8 = fp8_of(record, evaluations)
        if fp8 is not None:
            panel.axhline(fp8, color="0.3", linestyle="--", linewidth=0.8, label="exact, rounded to FP8")
        facts = record["evaluated"]
        device = "CPU" if record["device"] == "cpu" else record["device"]
        panel.set_title(f"{facts['model']}, {facts['seqlen']} tokens\n{device}", fontsize=9)
        if left_out:
            label = "\n".join([label, *(f"not shown: {text}" for text in left_out)])
        panel.set_xlabel(label)
        panel.set_ylabel("relative output error, mean")
        panel.set_yscale("log")
        panel.margins(x=0.4)  # for the notes
        panel.set_xlim(left=0)
        named |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named, loc="outside upper center", ncols=len(named), fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
