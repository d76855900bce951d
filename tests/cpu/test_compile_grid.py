"""Every kernel variant of the grid, compiled for every architecture, and what the compiler made of it.

It takes minutes and all cores. pytest-xdist would share cores that the grid uses already: run it without ``-n``.
"""

from __future__ import annotations

import os
from itertools import zip_longest

import pytest

from cudistr import compiler
from tests import grid

RENEW = "if that is meant, renew it with: python -m tests.grid --write"


@pytest.fixture
def nvrtc() -> None:
    if not os.environ.get("CI"):  # where it must be
        pytest.importorskip("cupy", reason="NVRTC comes with the extra cuda12 or cuda13")


def differences(rows: list[list[str]], committed: list[list[str]]) -> list[str]:
    """What changed between two tables with a header, a line for each variant and architecture."""
    header, *body = rows
    header_before, *body_before = committed
    if header != header_before:
        return [f"the columns are {header}, docs/resources.csv has {header_before}"]
    found = []
    now, before = ({row[0]: row[1:] for row in of} for of in (body, body_before))
    for variant in now | before:
        if variant not in now or variant not in before:
            where = "docs/resources.csv" if variant not in now else "the grid"
            found.append(f"{variant} is in {where} only")
            continue
        cells = zip_longest(header[1:], now[variant], before[variant])
        found += [f"{variant} {column}: {new}, was {old}" for column, new, old in cells if new != old]
    return found


def test_every_kernel_is_in_the_grid() -> None:
    files = {path.stem for path in (compiler.SOURCES / "kernels").glob("*.cu")}
    assert files
    for capability in grid.DEVICES:
        kernels = grid.kernels(capability)
        own = {name for name in files if name.startswith("sm90_")} if capability != 90 else set()
        assert {kernel.name for kernel in kernels.values()} == files - own
        everywhere = [name for name, kernel in kernels.items() if not kernel.specific]
        assert everywhere == list(grid.kernels(80))  # one row each, without a hole


def test_the_grid_compiles_without_spills(nvrtc: None, capsys: pytest.CaptureFixture[str]) -> None:
    """One test, so that the grid is compiled once however tests are shared between processes."""
    table, complaints = grid.build()
    rows = grid.rows(table)
    version, committed = grid.read()
    comparable = version == grid.version()
    width = max(len(name) for name in table)
    lines = [
        "",
        grid.version(),
        *(f"{name:<{width}}  " + "  ".join(f"{x:<12}" for x in row) for name, *row in rows),
    ]
    if not comparable:
        lines.append(f"Not compared with docs/resources.csv, which another compiler made: {version}")
    spilled = [
        f"{name} sm_{capability}: {numbers['spilled']} bytes spilled"
        for name, of in table.items()
        for capability, numbers in of.items()
        if numbers["spilled"]
    ]
    with capsys.disabled():
        print("\n".join(line.rstrip() for line in [*lines, *spilled]))

    # What fits the registers is known for the compiler of the table; another one's spills are shown, not refused.
    wrong = [*complaints, *(spilled if comparable else [])]
    for name, of in table.items():
        for capability, numbers in of.items():
            limit = grid.DEVICES[capability].shared_bytes
            if numbers["shared_bytes"] > limit:
                wrong.append(
                    f"{name} sm_{capability}: {numbers['shared_bytes']} bytes of shared memory, at most {limit}"
                )
    changes = differences(rows, committed) if comparable else []
    if changes:
        wrong += [*changes, f"docs/resources.csv says otherwise; {RENEW}"]
    # The constraints of CI pin NVRTC, so that there the table is always compared.
    if not comparable and os.environ.get("CI"):
        wrong.append(f"docs/resources.csv belongs to {version}, this is {grid.version()}; {RENEW}")
    assert not wrong, "\n".join(wrong)


TABLE = [["variant", "sm_80", "sm_90"], ["a", "1 / 2", "3 / 4"], ["b", "5 / 6", "7 / 8"]]


@pytest.mark.parametrize(
    ("committed", "found"),
    [
        (TABLE, []),
        ([TABLE[0], TABLE[2], TABLE[1]], []),
        (TABLE[:2], ["b is in the grid only"]),
        ([*TABLE, ["c", "1", "1"]], ["c is in docs/resources.csv only"]),
        ([*TABLE[:2], ["b", "5 / 7", "7 / 8"]], ["b sm_80: 5 / 6, was 5 / 7"]),
        ([*TABLE[:2], ["b", "5 / 6"]], ["b sm_90: 7 / 8, was None"]),
        (
            [TABLE[0][:2]],
            ["the columns are ['variant', 'sm_80', 'sm_90'], docs/resources.csv has ['variant', 'sm_80']"],
        ),
    ],
)
def test_differences_are_found(committed: list[list[str]], found: list[str]) -> None:
    assert differences(TABLE, committed) == found
