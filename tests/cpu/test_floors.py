"""The clock model of the Hopper page: its table, and the part of a measured time that its clocks are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pages import DOCS, load

floors = load("floors")

ROW = {
    "method": "exact", "kernel": "hopper", "dtype": "bfloat16", "head_dim": 128, "head_dim_v": 128, "heads": 16,
    "heads_kv": 16, "batch": 2, "seqlen_q": 8192, "seqlen_k": 8192, "causal": False, "ms": {"cudistr": 3.0},
}  # fmt: skip


def page_rows() -> list[list[str]]:
    """The table of the page: dims and method, tile, three numbers of clocks, what binds."""
    model = (
        (DOCS / "hopper.md").read_text(encoding="utf-8").partition("## Clock model")[2].partition("\n## ")[0]
    )
    lines = [line.strip("|").split("|") for line in model.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines[1:]]


def test_the_page_has_rows() -> None:
    assert len(page_rows()) >= 9


@pytest.mark.parametrize("line", page_rows(), ids=lambda line: line[0])
def test_the_table_of_the_page_is_the_models(line: list[str]) -> None:
    what, tile, *clocks, binds = line
    dim, dim_v, *method = what.split(", ")
    group_size = int(method[0][5:-2]) if method and method[0].startswith("`LSH") else 0
    rows, keys = map(int, tile.split(" x "))
    found = floors.step_clocks(rows, keys, int(dim), int(dim_v), group_size)
    assert [f"{x:.0f}" for x in found.values()] == clocks
    most = [name for name, x in found.items() if x == max(found.values())]
    assert binds == (most[0] if len(most) == 1 else "both")


def test_floor_of_a_row() -> None:
    # 2 x 16 heads of 8192 x 8192 pairs, each 512 operations of 4096 in a clock, on 132 multiprocessors.
    clocks = 2 * 16 * 8192**2 * 512 / 4096 / 132
    assert floors.floor_of(ROW) == ("products", pytest.approx(clocks))
    causal = floors.floor_of({**ROW, "causal": True})
    assert causal == ("products", pytest.approx(clocks * 8193 / 16384))
    later = floors.floor_of({**ROW, "causal": True, "seqlen_q": 1024})  # the last 1024 queries
    assert later == ("products", pytest.approx(clocks / 8 * (8192 - 511.5) / 8192))
    half = floors.floor_of({**ROW, "method": "projection:64"})
    assert half == ("products", pytest.approx(clocks * 3 / 4))
    # 1664 clocks for a tile of 128 x 128, see the table of the page.
    grouped = floors.floor_of({**ROW, "method": "lsh2"})
    assert grouped == ("shared memory", pytest.approx(2 * 16 * 64 * 64 * 1664 / 132))
    assert floors.floor_of({**ROW, "kernel": "portable"}) is None
    for method in (
        "group",
        "energy:64",
        "lsh:2,near=256",
        "projection:64,near=256",
        "lsh:2,representative=rank1",
    ):
        assert floors.floor_of({**ROW, "method": method}) is None, method


def test_parts_of_the_time() -> None:
    text = floors.parts([ROW, {**ROW, "seqlen_q": 4096, "seqlen_k": 4096, "ms": {"cudistr": 2.0}}], 1980.0)
    ms = 2 * 16 * 8192**2 * 512 / 4096 / 132 / 1.98e6
    assert f"| exact | 128 | none | products | {ms / 4 / 2:.0%} | {ms / 3:.0%} |" in text
    record = {"rows": [{**ROW, "mhz": {"cudistr": 990.0}}]}
    assert f"| 990 | {2 * ms:#.3g} | 3.00 | {2 * ms / 3:.0%} |" in floors.of_clocks(record)


def test_without_records(tmp_path: Path) -> None:
    assert floors.floors(tmp_path) == floors.make_tables.NONE


def measured() -> list[tuple[float, dict[str, Any]]]:
    """Clocks of the floor, and the row, of all that the model is for in the records of one GPU."""
    rows = [row for _, record in floors.make_tables.records() for row in record.get("rows", [])]
    rows = [
        row for row in rows if row.get("kernel") == "hopper" and "cudistr" in row["ms"] and "ranks" not in row
    ]
    found = [(floors.floor_of(row), row) for row in rows]
    return [(floor[1], row) for floor, row in found if floor is not None]


def test_no_call_is_faster_than_its_floor() -> None:
    found = measured()
    assert len(found) > 100
    for clocks, row in found:
        assert clocks / 1.98e6 < row["ms"]["cudistr"], row  # the highest clock of an H100 and an H200


def test_what_the_page_says_of_floors() -> None:
    """Exact attention of 128 columns is nearest to its floor, under each mask."""
    rows = [
        (clocks / row["mhz"]["cudistr"] / row["ms"]["cudistr"], row)
        for clocks, row in measured()
        if "mhz" in row
    ]
    for causal in (False, True):
        _, nearest = max((x for x in rows if x[1]["causal"] == causal), key=lambda x: x[0])
        assert (nearest["method"], nearest["head_dim"]) == ("exact", 128)
