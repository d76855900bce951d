"""Every test here sees the emulated device in place of CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.emulation import fake_cupy
from tests.gpu import util


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in for CuPy, with an H100's limits; what a test changes of the device is undone."""
    for name in ("capability", "shared_bytes", "seed"):
        monkeypatch.setattr(fake_cupy.Settings, name, getattr(fake_cupy.Settings, name))
    for name in ("CUPY_TF32", "CUDISTR_KERNEL"):
        monkeypatch.delenv(name, raising=False)
    fake_cupy.statistics.clear()
    with fake_cupy.installed() as cupy:
        monkeypatch.setattr(util, "cp", cupy)
        yield cupy
