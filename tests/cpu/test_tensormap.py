"""What the driver is asked for when an array is described to the copy engine, and what comes of its refusal."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from cudistr import tensormap
from cudistr.errors import CudaUnavailableError
from cudistr.tensormap import MAP_BYTES, Layout

LAYOUT = Layout("bfloat16", (2, 6, 300, 96), (96 * 6 * 300, 96, 96 * 6), 176, 32)


class Driver:
    """Stands for cuTensorMapEncodeTiled."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status = 0

    def __call__(self, target: int, *arguments: Any) -> int:
        self.target = target
        self.calls.append(tuple(list(x) if isinstance(x, ctypes.Array) else x for x in arguments))
        ctypes.memmove(target, bytes(range(MAP_BYTES)), MAP_BYTES)
        return self.status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    tensormap.encode.cache_clear()
    found = Driver()
    monkeypatch.setattr(tensormap, "_encoder", lambda: found)
    yield found
    tensormap.encode.cache_clear()


def test_what_the_driver_gets(driver: Driver) -> None:
    assert tensormap.encode(LAYOUT, 0x7F0000000010) == bytes(range(MAP_BYTES))
    assert driver.target % 128 == 0
    dtype, rank, address, lengths, strides, box, steps, interleave, swizzle, promotion, fill = driver.calls[0]
    assert (dtype, rank, address) == (9, 4, 0x7F0000000010)
    # The fastest axis first; strides in bytes, of all axes but that.
    assert lengths == [96, 300, 6, 2]
    assert strides == [96 * 6 * 2, 96 * 2, 96 * 6 * 300 * 2]
    assert box == [32, 176, 1, 1] and steps == [1, 1, 1, 1]
    assert (interleave, swizzle, promotion, fill) == (0, 2, 3, 0)


@pytest.mark.parametrize(("columns", "swizzle"), [(16, 1), (32, 2), (64, 3)])
def test_the_swizzle_is_as_wide_as_a_row_of_the_box(driver: Driver, columns: int, swizzle: int) -> None:
    tensormap.encode(LAYOUT._replace(dtype="float16", columns=columns), 16)
    assert driver.calls[0][0] == 6 and driver.calls[0][8] == swizzle


def test_axes_of_length_1_get_a_legal_stride(driver: Driver) -> None:
    tensormap.encode(LAYOUT._replace(lengths=(1, 1, 1, 96), strides=(0, 0, 0)), 16)
    assert driver.calls[0][4] == [16, 16, 16]


def test_a_map_is_encoded_once(driver: Driver) -> None:
    for pointer in (16, 16, 32):
        tensormap.encode(LAYOUT, pointer)
    assert len(driver.calls) == 2


def test_a_refusal_says_what_was_asked_for(driver: Driver) -> None:
    driver.status = 1
    with pytest.raises(
        CudaUnavailableError, match=r"error 1, Layout\(dtype='bfloat16'.*address 0x10\)"
    ) as found:
        tensormap.encode(LAYOUT, 16)
    assert "CUDISTR_KERNEL=portable" in str(found.value)


def test_a_driver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    tensormap._encoder.cache_clear()
    with pytest.raises(
        CudaUnavailableError, match="cannot describe arrays to the copy engine .*cannot open"
    ) as found:
        tensormap._encoder()
    assert "Update it" in str(found.value)
