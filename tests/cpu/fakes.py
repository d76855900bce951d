"""Arrays of other libraries and of GPUs that are not there, as far as the checks look at them."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest


class DeviceArray:
    """What :mod:`cudistr.normalize` reads of a CuPy array, on any device."""

    def __init__(self, values: np.ndarray, device: int = 0) -> None:
        self.shape, self.strides, self.dtype = values.shape, values.strides, values.dtype
        self.size, self.itemsize = values.size, values.itemsize
        self.device = types.SimpleNamespace(id=device)
        self.data = types.SimpleNamespace(ptr=values.ctypes.data, device_id=device)
        self._values = values  # keeps the address its own


class ForeignArray:
    """An array of a library that cudistr has never heard of; it speaks DLPack and nothing else."""

    def __init__(
        self, values: np.ndarray, device: tuple[int, int] | None = None, error: Exception | None = None
    ):
        self._values, self._device, self._error = values, device, error

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    @property
    def dtype(self) -> Any:
        return self._values.dtype

    def __dlpack__(self, **options: Any) -> Any:
        if self._error is not None:
            raise self._error
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device or self._values.__dlpack_device__()


def library(monkeypatch: pytest.MonkeyPatch, name: str) -> type[ForeignArray]:
    """The array class of a new library, whose module is in ``sys.modules`` while the test runs."""
    array: type[ForeignArray] = type("Array", (ForeignArray,), {"__module__": name})
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return array


class Gpu:
    """A GPU as far as times go: one unit of it for each call of attention, whether from Python or in a graph."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.captured: list[float] | None = None
        self.cuda = types.SimpleNamespace(
            Event=self.event,
            Stream=lambda non_blocking: self,
            Device=lambda: self,
            get_elapsed_time=lambda start, stop: stop.at - start.at,
        )

    def event(self) -> Any:
        event = types.SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.clock)
        return event

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        assert self.captured is None, "a capture is left open"

    def begin_capture(self) -> None:
        self.synchronize()
        self.captured = []

    def end_capture(self) -> Any:
        assert self.captured is not None
        units, self.captured = sum(self.captured), None
        return types.SimpleNamespace(launch=lambda stream=None: self.work(units))

    def work(self, units: float) -> None:
        if self.captured is None:
            self.clock += units
        else:
            self.captured.append(units)


@contextlib.contextmanager
def forgotten(caches: Iterable[Any]) -> Iterator[None]:
    """Nothing that these caches remembered counts inside, and nothing from inside counts afterwards."""
    caches = list(caches)
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()
