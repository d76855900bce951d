"""Run the model with exact and reduced attention; time it, and measure what the reduction does to it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cudistr

from .errors import DemoError
from .vit import forward
from .weights import Weights

__all__ = ["EXACT", "METHODS", "Device", "Measurement", "choose_device", "measure", "rounding_error", "steps"]

EXACT = "exact"
METHODS: dict[str, cudistr.LSH | None] = {
    EXACT: None,
    "LSH(group_size=2)": cudistr.LSH(group_size=2),
    "LSH(group_size=4)": cudistr.LSH(group_size=4),
}
GPU_WARM_UP = 2  # the first call compiles, the second finds the memory pool filled
GPU_RUNS = 11  # odd, so that the median is one of them


@dataclass(frozen=True)
class Device:
    """Where the demo runs: the array module, a name for people, and whether it is a GPU."""

    xp: Any
    name: str
    gpu: bool

    def finish(self) -> None:
        """Wait until everything launched so far is done."""
        if self.gpu:
            self.xp.cuda.Device().synchronize()

    def to_host(self, array: Any) -> Any:
        """The array as a NumPy array."""
        return self.xp.asnumpy(array) if self.gpu else array


def choose_device(requested: str) -> Device:
    """The device for ``--device auto``, ``cpu`` or ``gpu``."""
    if requested == "cpu":
        return Device(np, "as asked", False)
    device = _gpu()
    if isinstance(device, Device):
        return device
    if requested == "gpu":
        raise DemoError(
            f"--device gpu: {device}. `python -m cudistr doctor` says how to mend that; "
            "--device cpu runs the NumPy reference"
        )
    return Device(np, device, False)


def _gpu() -> Device | str:
    """The current GPU, or why there is none that cudistr can use."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        cupy.cuda.runtime.getDeviceCount()
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    except Exception as error:  # a broken CUDA install fails in many ways, and all of them mean: no GPU
        return f"CuPy finds no usable GPU ({error})"
    name = properties["name"].decode()
    if properties["major"] < 8:
        found = f"{properties['major']}.{properties['minor']}"
        return f"{name} has compute capability {found}, the kernels need 8.0 or newer"
    return Device(cupy, name, True)


@dataclass(frozen=True)
class Measurement:
    """What one method did, against exact attention in the same dtype on the same device.

    Attributes
    ----------
    ms : float
        Milliseconds of a forward, from pixels to saliency map: median of several on a GPU, of one on a CPU.
    attention_ms : float
        Milliseconds of the attention of all layers alone, one call after the other on the q, k, v of the exact
        forward; median as above.
    layer_errors : array (layers,)
        ``||O - Ohat|| / ||O||`` (Frobenius over heads, tokens, head_dim) of each attention layer, with the q,
        k, v of the exact forward.
    head_errors : array (layers, heads)
        The same per head.
    rounding : array (layers,), or None on a CPU
        The other kind of error: ``||O_kernel - O_ref|| / ||O_ref||`` with the float64 reference of the *same*
        method and the same q, k, v.
    cosine : array (tokens,)
        Cosine between the final features of each token, the method used in all layers, and those of exact.
    saliency : array (size, size)
        Saliency map.
    """

    ms: float
    attention_ms: float
    layer_errors: NDArray[np.float64]
    head_errors: NDArray[np.float64]
    rounding: NDArray[np.float64] | None
    cosine: NDArray[np.float64]
    saliency: NDArray[np.float32]


def steps(weights: Weights, device: Device) -> int:
    """How often `measure` calls ``tick``: the length of the progress bar."""
    forwards = GPU_WARM_UP + GPU_RUNS if device.gpu else 1
    return weights.depth * len(METHODS) * (forwards + (GPU_RUNS if device.gpu else 1))


def measure(
    weights: Weights, pixels: NDArray[np.float32], dtype: Any, device: Device, tick: Callable[[], Any]
) -> dict[str, Measurement]:
    """Measure every method of `METHODS`; ``tick`` is called once a layer, in the forwards and after them."""
    xp = device.xp
    weights, pixels = weights.to(xp.asarray), xp.asarray(pixels)
    inputs: list[tuple[Any, Any, Any, Any]] = []
    exact_features: Any = None
    results = {}
    for name, reduction in METHODS.items():

        def attention(layer: int, q: Any, k: Any, v: Any, reduction: cudistr.LSH | None = reduction) -> Any:
            o = cudistr.attention(q, k, v, reduction=reduction)
            if reduction is None and len(inputs) == layer:  # the first exact forward
                inputs.append((q, k, v, o))
            tick()
            return o

        ms = []
        for _ in range(GPU_WARM_UP + GPU_RUNS if device.gpu else 1):
            device.finish()
            start = time.perf_counter()
            features, saliency = forward(weights, pixels, attention, dtype=dtype, xp=xp)
            device.finish()
            ms.append(1e3 * (time.perf_counter() - start))
        features = device.to_host(features)[0].astype(np.float64)
        if reduction is None:
            exact_features = features
        attention_ms, outputs = _attention_alone(inputs, reduction, device, tick)
        norms, differences, rounding = [], [], []
        for (q, k, v, o), o_hat in zip(inputs, outputs, strict=True):
            norms.append(_norms(o, device))
            differences.append(_norms(o_hat.astype(np.float32) - o.astype(np.float32), device))
            if device.gpu:
                on_host = [device.to_host(x) for x in (o_hat, q, k, v)]
                rounding.append(rounding_error(*on_host, reduction=reduction))
        results[name] = Measurement(
            ms=statistics.median(ms[GPU_WARM_UP:] if device.gpu else ms),
            attention_ms=attention_ms,
            layer_errors=np.linalg.norm(differences, axis=1) / np.linalg.norm(norms, axis=1),
            head_errors=np.array(differences) / np.array(norms),
            rounding=np.array(rounding) if device.gpu else None,
            cosine=_cosine(features, exact_features),
            saliency=device.to_host(saliency)[0],
        )
    return results


def _attention_alone(
    inputs: list[tuple[Any, Any, Any, Any]],
    reduction: cudistr.LSH | None,
    device: Device,
    tick: Callable[[], Any],
) -> tuple[float, list[Any]]:
    """Milliseconds of the attention of all layers, and its outputs. The forwards before have warmed it up."""
    ms = []
    outputs: list[Any] = []
    for _ in range(GPU_RUNS if device.gpu else 1):
        outputs.clear()
        device.finish()
        start = time.perf_counter()
        for q, k, v, _o in inputs:
            outputs.append(cudistr.attention(q, k, v, reduction=reduction))
            tick()
        device.finish()
        ms.append(1e3 * (time.perf_counter() - start))
    return statistics.median(ms), outputs


def _norms(o: Any, device: Device) -> NDArray[np.float64]:
    """Norm of each head of o (1, heads, tokens, head_dim): (heads,)."""
    norms: NDArray[np.float64] = device.to_host(
        device.xp.sqrt((o.astype(np.float64) ** 2).sum(axis=(0, 2, 3)))
    )
    return norms


def rounding_error(o: Any, q: Any, k: Any, v: Any, *, reduction: cudistr.LSH | None) -> float:
    """``||o - O_ref|| / ||O_ref||``, O_ref from the float64 reference of the same method; NumPy arrays."""
    o_ref = cudistr.reference.attention(q, k, v, reduction=reduction)
    return float(np.linalg.norm(o.astype(np.float64) - o_ref) / np.linalg.norm(o_ref))


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine between the rows of two (tokens, dim) arrays: (tokens,)."""
    product = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine: NDArray[np.float64] = (a * b).sum(axis=1) / product
    return cosine
