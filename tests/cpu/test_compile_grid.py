"""Every kernel variant of the grid, compiled for every architecture, and what the compiler made of it.

It takes minutes and all cores. pytest-xdist would share cores that the grid uses already: run it without ``-n``.
"""

from __future__ import annotations

import os
import struct
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest

import pytest

from cudistr import compiler
from cudistr import plan as planner
from cudistr.plan import Kernel
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


def machine_code(cubin: bytes) -> list[bytes]:
    """The instructions of an ELF file: its sections named .text and what follows."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [
        struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)
    ]  # name, ..., offset, size
    text = sections[names][4]
    return [cubin[x[4] : x[4] + x[5]] for x in sections if cubin.startswith(b".text", text + x[0])]


def compare_with_nvrtc(kernel: Kernel) -> list[str]:
    """For which architectures the grid takes other code, or another report, for a kernel than NVRTC makes."""
    wrong = []
    for ptx in set(grid.SAME_PTX.values()):
        like = [c for c in grid.DEVICES if grid.SAME_PTX.get(c) == ptx]
        made = dict(zip(like, grid.cubins(kernel, like), strict=True))
        for capability in grid.DEVICES:
            own = grid.SAME_CODE.get(capability, capability)
            if own in made:
                code, log = compiler.compile_cubin(kernel, compiler.target(capability), report=True)
                instructions = machine_code(code)
                same = instructions and instructions == machine_code(made[own][0])
                if not same or grid.numbers(kernel, log) != grid.numbers(kernel, made[own][1]):
                    wrong.append(f"{kernel.name} sm_{capability}")
    return wrong


def test_what_the_grid_takes_once_is_what_nvrtc_makes(nvrtc: None) -> None:
    """A variant of every kernel, and one with every option of the compiler: by NVRTC alone as for a user, and as the
    grid makes it."""
    some: dict[object, Kernel] = {}
    for kernel in grid.kernels(80).values():
        some.setdefault(kernel.name, kernel)
        some.setdefault(kernel.options, kernel)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        wrong = [line for lines in pool.map(compare_with_nvrtc, set(some.values())) for line in lines]
    assert not wrong


@pytest.mark.parametrize(
    ("capability", "threads", "registers", "shared_bytes", "blocks"),
    [
        (90, 128, 255, 69632, 2),  # by registers
        (90, 128, 128, 69632, 3),  # by shared memory
        (86, 128, 255, 55296, 1),
        (86, 128, 64, 49 * 1024, 2),  # 2 * (49 + 1) KB is all of it
        (80, 256, 32, 0, 8),  # by threads
        (89, 32, 16, 0, 24),  # by blocks
        (80, 128, 161, 0, 3),  # warps take 168
    ],
)
def test_occupancy(capability: int, threads: int, registers: int, shared_bytes: int, blocks: int) -> None:
    assert grid.occupancy(capability, threads, registers, shared_bytes) == blocks


def test_the_plan_knows_how_many_blocks_fit() -> None:
    """Its estimate of registers is at most one thread block off; where shared memory decides it is right."""
    _, (header, *body) = grid.read()
    table = {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in body}
    checked = 0
    for capability, device in grid.DEVICES.items():
        for name, problem in grid.problems():
            kernel, tile = planner.portable_kernel(problem, device)
            cell = table[f"sm80_flash_fwd {name}"][f"sm_{capability}"].split(" / ")
            estimate = planner.resident_blocks(tile, kernel, device, problem.head_dim_v)
            assert abs(estimate - int(cell[2])) <= 1, f"{name} sm_{capability}: {estimate}, is {cell[2]}"
            checked += 1
    assert checked > 800


def test_everything_fits_the_smallest_gpus() -> None:
    """99 KB is what a thread block may have on sm_86, 89 and 120."""
    _, (header, *body) = grid.read()
    for name, *cells in body:
        for column, cell in zip(header[1:], cells, strict=True):
            if cell and column in ("sm_86", "sm_89", "sm_120"):
                assert int(cell.split(" / ")[1]) <= 99 * 1024, f"{name} {column}"


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
