"""Markers, the GPU skip, Hypothesis profiles, and memory given back between GPU modules."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from cudistr import normalize

# Deadlines are timing assertions in disguise: the first GPU example of a shape compiles its kernel.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("local", **_common)
settings.register_profile("ci", **_common, derandomize=True, max_examples=300)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@functools.cache
def missing_gpu() -> str | None:
    """Why GPU tests cannot run here, or None when they can."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    return None if cupy.cuda.is_available() else "no CUDA device"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate",
        action="store_true",
        help="run GPU tests on the emulated device of tests/emulation; needs g++",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device and CuPy, or --emulate")
    config.addinivalue_line(
        "markers", "small: GPU test small enough for compute-sanitizer; every kernel family"
    )
    config.addinivalue_line(
        "markers", "hardware: GPU test of what is not emulated: streams, graphs, size, other libraries"
    )
    if config.getoption("--emulate"):
        from tests.emulation import fake_cupy

        fake_cupy.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--emulate"):
        for item in items:
            if item.get_closest_marker("hardware"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: not emulated"))
        return
    reason = missing_gpu()
    # A machine that should have a GPU must not pass by skipping everything.
    if reason is None or os.environ.get("CUDISTR_REQUIRE_GPU"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="module")
def _give_memory_back() -> Iterator[None]:
    yield
    if missing_gpu() is None:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()


@pytest.fixture
def whole_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whole blocks of keys stay exact, however few there are."""
    with monkeypatch.context() as patch:
        patch.setattr(normalize, "EXACT_BLOCK_SEQLEN_K", 1)
        normalize._problem.cache_clear()
        yield
    normalize._problem.cache_clear()
