"""GPUs that are too old and CUDA installs that are broken, through the public functions and a CuPy that is a fake."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cudistr
from cudistr import compiler, launch
from tests.cpu.fakes import DeviceArray, forgotten, library

Q = (1, 2, 5, 16)


class CUDARuntimeError(RuntimeError):
    """As CuPy names it."""


class CUDADriverError(RuntimeError):
    """As CuPy names it."""


class Array(DeviceArray):
    """A device array that is made as CuPy makes one."""

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
        super().__init__(np.zeros(shape, dtype))

    def fill(self, value: float) -> None:
        self._values.fill(value)


class FakeCupy:
    """Installs itself as CuPy. Attributes named ``*_error`` are raised where CuPy would raise them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.shared_bytes = "90", 227 * 1024
        self.get_device_error: Exception | None = None
        self.attribute_error: Exception | None = None
        self.nvrtc_error: Exception | None = None
        self.architectures = [80, 90, 100]
        self.load_error: Exception | None = None
        cupy: Any = types.ModuleType("cupy")
        cuda: Any = types.ModuleType("cupy.cuda")
        cupy.ndarray, cupy.cuda, cupy.ascontiguousarray = Array, cuda, lambda array: array
        cuda.Device = lambda index: types.SimpleNamespace(compute_capability=self.capability)
        cuda.runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            cudaDevAttrMaxSharedMemoryPerBlockOptin=97,
            cudaDevAttrMultiProcessorCount=16,
            getDevice=lambda: self._answer(0, self.get_device_error),
            deviceGetAttribute=lambda *_: self._answer(self.shared_bytes, self.attribute_error),
            getDeviceProperties=lambda index: {"name": b"Some GPU"},
        )
        cuda.nvrtc = types.SimpleNamespace(
            getVersion=lambda: self._answer((13, 0), self.nvrtc_error),
            getSupportedArchs=lambda: self.architectures,
        )
        cuda.driver = types.SimpleNamespace(CUDADriverError=CUDADriverError)
        cuda.function = types.SimpleNamespace(Module=lambda: types.SimpleNamespace(load=self._load))
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
        monkeypatch.setattr(compiler, "_functions", {})  # kernels of a GPU that is really there

    def _load(self, code: bytes) -> None:
        self._answer(None, self.load_error)

    @staticmethod
    def _answer(value: Any, error: Exception | None) -> Any:
        if error is not None:
            raise error
        return value


CACHES = (
    launch.device_properties,
    launch._recipe,
    launch._group_recipe,
    launch._device_projections,
    compiler.nvrtc_version,
    compiler.supported_architectures,
    compiler.cache_folder,
)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """What the fake says is remembered by nobody."""
    with forgotten(CACHES):
        yield


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    return FakeCupy(monkeypatch)


def halves(*shape: int) -> Array:
    return Array(shape, np.float16)


def exact() -> Any:
    return cudistr.attention(halves(*Q), halves(*Q), halves(*Q))


def exact_into_out() -> Any:
    return cudistr.attention(halves(*Q), halves(*Q), halves(*Q), out=halves(*Q), return_lse=True)


def grouped() -> Any:
    return cudistr.attention(halves(*Q), halves(*Q), halves(*Q), reduction=cudistr.LSH(2), causal=True)


def without_keys() -> Any:
    return cudistr.attention(halves(*Q), halves(1, 2, 0, 16), halves(1, 2, 0, 16), return_lse=True)


def group() -> Any:
    return cudistr.group(halves(*Q), cudistr.LSH(2))


def merge() -> Any:
    return cudistr.merge([halves(*Q)] * 2, [Array(Q[:3])] * 2)


COMPUTES = (exact, exact_into_out, grouped, group, merge)
each_call = pytest.mark.parametrize("call", COMPUTES)


def raises(error: type[Exception], text: str) -> Any:
    """pytest.raises that matches the whole message as plain text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("call", [*COMPUTES, without_keys])
@pytest.mark.parametrize(("capability", "written"), [("75", "7.5"), ("70", "7.0"), ("61", "6.1")])
def test_gpu_that_is_too_old(cupy: FakeCupy, call: Callable[[], Any], capability: str, written: str) -> None:
    cupy.capability, cupy.shared_bytes = capability, 64 * 1024
    text = (
        f"GPU 0 has compute capability {written}; cudistr's kernels need 8.0 (Ampere) or newer. "
        "Use another GPU, or NumPy arrays, which run on the CPU."
    )
    for _ in range(2):  # a refusal is not remembered as something that worked
        with raises(cudistr.UnsupportedDeviceError, text):
            call()


def test_no_key_to_see_needs_no_kernel(cupy: FakeCupy) -> None:
    cupy.nvrtc_error = RuntimeError("not needed")
    out, lse = without_keys()
    assert not out._values.any() and (lse._values == -np.inf).all()


@pytest.mark.parametrize("call", [*COMPUTES, without_keys])
@pytest.mark.parametrize("where", ["get_device_error", "attribute_error"])
def test_driver_that_does_not_answer(cupy: FakeCupy, call: Callable[[], Any], where: str) -> None:
    error = CUDARuntimeError("cudaErrorInitializationError: initialization error")
    setattr(cupy, where, error)
    with pytest.raises(cudistr.CudaUnavailableError) as caught:
        call()
    assert str(caught.value).startswith("the CUDA driver does not answer")
    assert "(cudaErrorInitializationError: initialization error)" in str(caught.value)
    assert str(caught.value).endswith("Run `python -m cudistr doctor`.")
    assert caught.value.__cause__ is error


def test_driver_that_answers_again(cupy: FakeCupy) -> None:
    cupy.attribute_error = CUDARuntimeError("cudaErrorUnknown: unknown error")
    with pytest.raises(cudistr.CudaUnavailableError, match="cudaErrorUnknown: unknown error"):
        without_keys()
    cupy.attribute_error = None
    without_keys()


@each_call
def test_nvrtc_that_cannot_be_used(cupy: FakeCupy, call: Callable[[], Any]) -> None:
    cupy.nvrtc_error = RuntimeError("Failed to load libnvrtc.so.13")
    text = (
        "NVRTC, which compiles the kernels, cannot be used (RuntimeError: Failed to load libnvrtc.so.13). "
        'Install CuPy with its CUDA parts: pip install "cudistr[cuda12]" or "cudistr[cuda13]". '
        "Run `python -m cudistr doctor` for what is missing."
    )
    with raises(cudistr.CudaUnavailableError, text):
        call()


@each_call
def test_nvrtc_that_has_left_the_gpu_behind(cupy: FakeCupy, call: Callable[[], Any]) -> None:
    cupy.capability, cupy.architectures = "80", [90, 100]
    text = "NVRTC 13.0 compiles for compute capability 9.0 and newer, the GPU has 8.0. Install a CuPy for an older CUDA."
    with raises(cudistr.CudaUnavailableError, text):
        call()


@each_call
def test_driver_that_refuses_a_kernel(
    cupy: FakeCupy, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a driver does that is older than NVRTC."""
    monkeypatch.setattr(compiler, "_cached", lambda kernel, architecture: b"code")
    cupy.load_error = CUDADriverError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
    with pytest.raises(cudistr.CudaUnavailableError) as caught:
        call()
    text = str(caught.value)
    assert re.match(
        r"the CUDA driver does not load the kernel sm\w+ \(CUDA_ERROR_UNSUPPORTED_PTX_VERSION\)", text
    )
    assert text.endswith("Run `python -m cudistr doctor` for what is missing.")


def test_arrays_on_a_gpu_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch and jax have arrays on a GPU without it."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    array = library(monkeypatch, "tensors")(np.zeros(Q, np.float16), device=(2, 0))
    with pytest.raises(cudistr.CudaUnavailableError) as caught:
        cudistr.attention(array, array, array)
    text = str(caught.value)
    assert text.startswith("arrays on a GPU need CuPy, which cannot be imported (")
    assert 'pip install "cudistr[cuda12]" or "cudistr[cuda13]"' in text
    assert text.endswith("Run `python -m cudistr doctor` for what is missing.")
