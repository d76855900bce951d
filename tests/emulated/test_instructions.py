"""The emulated instructions do what PTX says, and there is one for each of ``kernels_cu/ptx``."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cudistr import compiler
from tests import probes
from tests.emulation import build
from tests.emulation.fake_cupy import statistics

HEADERS = sorted(path.name for path in (compiler.SOURCES / "ptx").glob("*.cuh"))


@pytest.mark.parametrize("check", probes.CHECKS.values(), ids=probes.CHECKS)
def test_instruction(
    check: object, device: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(probes.runner(device, monkeypatch, tmp_path))  # type: ignore[operator]


@pytest.mark.parametrize(("order", "conflicts"), [("side by side", 0), ("four to a bank", 12)])
def test_bank_conflicts_are_counted(
    order: str, conflicts: int, device: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Rows of 16 bytes; those a multiple of 128 bytes apart lie in the same banks and are read one after another.
    lanes = np.arange(32)
    places = lanes if order == "side by side" else lanes % 4 * 8 + lanes // 4
    rows = np.concatenate([np.zeros((32, 4), np.uint32), places[:, None].astype(np.uint32)], axis=1)
    probes.runner(device, monkeypatch, tmp_path)(probes.LDMATRIX, rows, 4)
    assert statistics.counts["matrix_load_conflicts"] == conflicts


def functions(path: Path) -> set[str]:
    """Signatures of the functions in a header, without names of parameters that a twin may choose."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    found = re.findall(r"((?:template\s*<[^>]*>\s*)?DEVICE\s+[\w\s]+?\w+\s*\([^{;]*\))\s*\{", text)
    return {re.sub(r"\s+", " ", signature) for signature in found}


def test_there_are_headers() -> None:
    assert HEADERS and sorted(path.name for path in (build.HERE / "ptx").glob("*.cuh")) == HEADERS


@pytest.mark.parametrize("name", HEADERS)
def test_every_function_has_a_twin(name: str) -> None:
    real, twin = functions(compiler.SOURCES / "ptx" / name), functions(build.HERE / "ptx" / name)
    assert real
    assert real <= twin, f"{name}: without a twin of the same signature: {real - twin}"
