"""Time against N for each method and peer, from a committed record.

python docs/speed_figure.py speed.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_tables

STYLES = {"cudistr": "-", "peer": "--"}


def series(rows: list[dict[str, Any]]) -> dict[tuple[str, int, bool], dict[str, list[tuple[int, float]]]]:
    """(dtype, head_dim, causal) to the points (N, milliseconds) of each method and peer, where Q is as long as K."""
    panels: dict[tuple[str, int, bool], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["method"] == "group" or row["seqlen_q"] != row["seqlen_k"]:
            continue
        lines = panels.setdefault((row["dtype"], row["head_dim"], row["causal"]), {})
        for name, ms in row["ms"].items():
            shown = make_tables.method_name(row["method"]) if name == "cudistr" else make_tables.PEERS[name]
            lines.setdefault(shown, {})[row["seqlen_k"]] = ms
    return {key: {name: sorted(x.items()) for name, x in lines.items()} for key, lines in panels.items()}


def draw(path: Path, record: dict[str, Any]) -> None:
    """Write the figure; the format follows from the file's suffix."""
    panels = series(record["rows"])
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    names.sort(key=lambda name: name in make_tables.PEERS.values())
    figure = Figure(figsize=(10, 3.2 * -(-len(panels) // 2) + 0.8), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    for axis, ((dtype, head_dim, causal), lines) in zip(axes, sorted(panels.items()), strict=False):
        for i, name in enumerate(names):
            if name in lines:
                kind = "peer" if name in make_tables.PEERS.values() else "cudistr"
                axis.plot(
                    *zip(*lines[name], strict=True), STYLES[kind], marker="o", color=f"C{i}", label=name
                )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(sorted({n for points in lines.values() for n, _ in points}))
        for along in (axis.xaxis, axis.yaxis):
            along.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{dtype}, {head_dim} columns, {'causal' if causal else 'no mask'}", fontsize=11)
        axis.set_xlabel("N")
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3, which="both")
    handles = {
        label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{record['device']}, commit {record['commit'][:12]}", fontsize=11)
    figure.savefig(path)


def draw_all(folder: Path) -> str:
    """A figure for every record that has enough lengths; returns the text that shows them."""
    parts = []
    for path, record in make_tables.records():
        if path.stem not in ("attention", "portable"):
            continue
        if len({row["seqlen_k"] for row in record["rows"]}) > 2:
            name = f"speed-{path.parent.name}-{path.stem}.svg"
            draw(folder / name, record)
            parts.append(
                f"## {path.parent.name}/{path.name}\n\n`{record['command']}`: milliseconds of a call.\n\n"
                f"![time against N](_generated/{name})\n"
            )
    return "\n".join(parts) or make_tables.NONE


if __name__ == "__main__":
    record = next(r for p, r in make_tables.records() if p.name == "attention.json")
    draw(Path(sys.argv[1]), record)
