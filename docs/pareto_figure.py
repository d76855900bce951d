"""The figure of the accuracy page: output error against the columns of a score, or time, from committed records.

python docs/pareto_figure.py FILE.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_tables

NAMES = ("eval-smollm2", "eval-dinov2")  # of the records, one panel each
KINDS = {
    "lsh": ("LSH", "C3", "o"),
    "projection": ("Projection", "C0", "s"),
    "energy": ("Energy", "C2", "^"),
    "hyper": ("HyperAttention", "C1", "D"),
}


def words_of(row: dict[str, Any]) -> list[str]:
    """Kind, number and options of a row's method."""
    return str(row["method"]).replace(":", ",", 1).split(",")


def draw(path: Path) -> None:
    """One panel per evaluation: GPU records by milliseconds, others by columns."""
    from matplotlib.figure import Figure

    chosen: dict[str, dict[str, Any]] = {}
    for file, record in sorted(make_tables.records(), key=lambda x: x[0].parent.name == "cpu"):
        if file.stem in NAMES:
            chosen.setdefault(file.stem, record)
    if not chosen:
        raise ValueError("docs/benchmarks holds no record of an evaluation. Make one: python -m cudistr eval")
    figure = Figure(figsize=(4.6 * len(chosen), 3.6), layout="constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    for panel, record in zip(panels, chosen.values(), strict=True):
        timed = all("ms_attention" in row for row in record["rows"])
        across = "ms_attention" if timed else "dim"
        for kind, (name, colour, marker) in KINDS.items():
            rows = [r for r in record["rows"] if words_of(r)[0] == kind and across in r]
            if rows:
                points = ([r[across] for r in rows], [r["error_mean"] for r in rows])
                panel.plot(*points, marker, color=colour, label=name)
                for row in rows:
                    options = (w for w in words_of(row)[1:] if "=" in w)
                    note = ",".join(w for w in options if not w.startswith(("near", "sinks")))
                    place = (row[across], row["error_mean"])
                    panel.annotate(note, place, fontsize=5.5, xytext=(4, 2), textcoords="offset points")
        if timed:
            exact = next((r[across] for r in record["rows"] if r["method"] == "exact"), None)
            if exact is not None:
                panel.axvline(exact, color="0.6", linestyle=":", label="exact")
        facts = record["evaluated"]
        panel.set_title(f"{facts['model']}, {facts['seqlen']} tokens", fontsize=10)
        panel.set_xlabel("ms of attention, all layers" if timed else "columns of a score, on average")
        panel.set_ylabel("relative output error, mean")
        panel.set_yscale("log")
        panel.margins(x=0.4)  # for the notes
        panel.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
