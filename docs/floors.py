"""The clock model of the Hopper kernel, and how much of a measured time its clocks explain.

python docs/floors.py    print the tables, as the documentation shows them
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_tables

import cudistr
from cudistr import bench, normalize, plan

# Of a multiprocessor in a clock: floating-point operations of products, exponentials, bytes of shared memory.
PRODUCTS, EXPONENTIALS, SHARED_BYTES = 4096, 16, 128
CONSUMER_ROWS = 64  # queries of a warpgroup
HOPPER = plan.Device(90, 227 * 1024)  # 132 multiprocessors: an H100 or H200 on its own board
COVERED = re.compile(r"exact|projection:(\d+)|lsh:?(\d+)")  # methods that the model is for
TIMES = ("attention.json", "asymmetric.json", "asymmetric-64.json")


def step_clocks(
    rows: int, keys: int, head_dim: int, head_dim_v: int, group_size: int = 0
) -> dict[str, float]:
    """The clocks that each unit of a multiprocessor needs for a tile of queries and one of keys, at least."""
    consumers = rows / CONSUMER_ROWS
    if group_size:
        # K is copied, read, and written as Khat, which the consumers read; they hold Qhat in registers.
        columns = head_dim // group_size
        copied, read = 2 * head_dim + columns + head_dim_v, columns + head_dim_v
        moved = 2 * keys * (consumers * read + copied)
    else:
        columns = head_dim
        read = 2 * keys * (head_dim + head_dim_v)
        moved = consumers * (read + 2 * CONSUMER_ROWS * head_dim) + read
    return {
        "products": 2 * rows * keys * (columns + head_dim_v) / PRODUCTS,
        "exponentials": rows * keys / EXPONENTIALS,
        "shared memory": moved / SHARED_BYTES,
    }


def floor_of(row: dict[str, Any]) -> tuple[str, float] | None:
    """The unit that binds a call of a bench record's row, and its clocks.

    None of what the model is not for: other kernels, exact keys, columns chosen by energy, weights. Tiles are those of
    today's planner. Of a causal call the pairs that are seen count, no matter how tiles cover them. The launch before a
    projected or grouped call is left out.
    """
    method = COVERED.fullmatch(row["method"])
    if row["kernel"] != "hopper" or method is None:
        return None
    rank, group_size = (int(number or 0) for number in method.groups())
    head_dim = rank or row["head_dim"]

    def empty(heads: int, seqlen: int, columns: int) -> Any:
        shape = (row["batch"], heads, seqlen, columns)
        return np.broadcast_to(np.zeros(1, bench.DTYPES[row["dtype"]]), shape)

    q = empty(row["heads"], row["seqlen_q"], head_dim)
    k, v = (empty(row["heads_kv"], row["seqlen_k"], columns) for columns in (head_dim, row["head_dim_v"]))
    reduction = cudistr.LSH(group_size) if group_size else None
    found = plan.hopper_kernel(normalize.problem(q, k, v, causal=row["causal"], reduction=reduction), HOPPER)
    if found is None:
        return None
    tile = found[1]
    step = step_clocks(tile.block_m, tile.tile_k, head_dim, row["head_dim_v"], group_size)
    unit = max(step, key=lambda name: step[name])
    rows, keys = row["seqlen_q"], row["seqlen_k"]
    seen = rows * keys - (rows * (rows - 1) // 2 if row["causal"] else 0)
    steps = row["batch"] * row["heads"] * seen / (tile.block_m * tile.tile_k)
    return unit, steps * step[unit] / HOPPER.multiprocessors


def parts(rows: list[dict[str, Any]], mhz: float) -> str:
    """Rows of bench records, one line per method and mask: the floor at a clock as a part of the time, by length."""
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        floor = floor_of(row) if "cudistr" in row["ms"] else None
        if floor is not None:
            _, dim, *_, mask = make_tables.case_cells(row)
            line = lines.setdefault((make_tables.method_name(row["method"]), dim, mask, floor[0]), {})
            line[row["seqlen_k"]] = f"{floor[1] / (1000 * mhz) / row['ms']['cudistr']:.0%}"
    lengths = sorted({seqlen for line in lines.values() for seqlen in line})
    head = ["method", "head_dim", "mask", "bound by", *(f"N = {n}" for n in lengths)]
    return make_tables.table(
        head, [[*line, *(of.get(n, "-") for n in lengths)] for line, of in lines.items()]
    )


def of_clocks(record: dict[str, Any]) -> str:
    """Rows of a record of clocks: the floor at the clock that was read."""
    rows = []
    for row in record["rows"]:
        floor = floor_of(row)
        if floor is not None:
            mhz, ms = row["mhz"]["cudistr"], row["ms"]["cudistr"]
            least = floor[1] / (1000 * mhz)
            *_, mask = make_tables.case_cells(row)
            rows.append([
                make_tables.method_name(row["method"]), str(row["head_dim"]), mask, floor[0], f"{mhz:.0f}",
                make_tables.figure(least), make_tables.figure(ms), f"{least / ms:.0%}",
            ])  # fmt: skip
    head = ["method", "head_dim", "mask", "bound by", "MHz", "floor at this clock, ms", "ms", "floor's part"]
    return make_tables.table(head, rows)


def floors(folder: Path = make_tables.RECORDS) -> str:
    """The tables of every device of which there are records of clocks."""
    found = make_tables.records(folder)
    texts = []
    for device in sorted({path.parent for path, record in found if "limit_watts" in record}):
        own = [(path, record) for path, record in found if path.parent == device]
        clocked = [(path, record) for path, record in own if "limit_watts" in record]
        beside = [(path, record) for path, record in own if path.name in TIMES]
        rows = [row for _, record in beside for row in record["rows"]]
        names = ", ".join(f"`{path.name}`" for path, _ in beside)
        most = clocked[0][1]["max_mhz"]
        texts.append(
            f"{clocked[0][1]['device']}, by {names}, at the highest clock, {most:.0f} MHz:\n\n{parts(rows, most)}"
        )
        texts += [
            f"By `{path.name}`, N = {record['rows'][0]['seqlen_k']}, at the clock that was read meanwhile:\n\n"
            f"{of_clocks(record)}"
            for path, record in clocked
        ]
    return "\n".join(texts) or make_tables.NONE


if __name__ == "__main__":
    print(floors(), end="")
