"""Run a case with every method: its score, the error of each layer and head on exact inputs, and times on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from cudistr.demo.measure import Device

from .methods import Inputs, Method, Within, attend, decided, mean_dim, prepare
from .models import Case, Forward
from .rivals import TRAINED

__all__ = ["measure", "steps"]

GPU_WARM_UP, GPU_RUNS = 2, 11


def steps(case: Case, methods: list[Method]) -> int:
    """How often `measure` calls ``tick``: once for each forward, and for each comparison of all layers."""
    static = any(method.options.get("fit") == "static" for method in methods)
    calibration = sum(map(len, case.calibration)) if static else 0
    return len(case.forwards) * (1 + 2 * len(methods)) + calibration


def _collect(forward: Forward, causal: bool, device: Device) -> tuple[Any, list[Any]]:
    """Features of an exact forward, and q, k, v and the output of each layer."""
    layers: list[Any] = []

    def attention(layer: int, q: Any, k: Any, v: Any) -> Any:
        out = attend(q, k, v, None, causal, device.xp)
        layers.append((q, k, v, out))
        return out

    return forward(attention), layers


def measure(
    case: Case, methods: list[Method], device: Device, tick: Callable[[], Any]
) -> list[dict[str, Any]]:
    """One row for each method, the exact one's outputs being what the others are compared with.

    A row has ``method``, ``trained`` (whether it needs training), the scores of the case (means over the inputs, the
    worst of ``cosine_worst``), ``error_mean`` and ``error_worst`` (``||O - Ohat|| / ||O||`` over layers, heads and
    inputs), ``layer_errors``, ``dim`` and ``rank_mean`` where they are known, and on a GPU ``ms_attention``: the
    milliseconds of the attention of all layers of one input.
    """
    parts: dict[str, list[dict[str, Any]]] = {method.spec: [] for method in methods}
    for i, forward in enumerate(case.forwards):
        exact, layers = _collect(forward, case.causal, device)
        tick()
        inputs = [layer[:3] for layer in layers]
        calibration = []
        if any(method.options.get("fit") == "static" for method in methods):
            for other in case.calibration[i]:
                calibration.append([layer[:3] for layer in _collect(other, case.causal, device)[1]])
                tick()
        fitted: dict[Any, Any] = {}
        for method in methods:
            reductions = prepare(method, inputs, calibration, case.causal, fitted)

            def attention(layer: int, q: Any, k: Any, v: Any, chosen: list[Any] = reductions) -> Any:
                return attend(q, k, v, chosen[layer], case.causal, device.xp)

            part: dict[str, Any] = dict(case.score(i, forward(attention), exact))
            tick()
            part["errors"] = np.array(
                [_errors(attention(n, q, k, v), o, device) for n, (q, k, v, o) in enumerate(layers)]
            )
            if device.gpu:
                part["ms"] = _milliseconds(inputs, attention, device)
            part["dim"] = _dim(reductions, inputs, case.causal, device.xp)
            parts[method.spec].append(part)
            tick()
    return [_row(method, parts[method.spec]) for method in methods]


def _dim(reductions: list[Any], inputs: Inputs, causal: bool, xp: Any) -> float | None:
    """Mean over layers of what `mean_dim` says, or of the columns that a call has decided on; None if unknown."""
    seqlen, head_dim = inputs[0][0].shape[2:]
    known: dict[Any, float | None] = {}
    dims: list[float | None] = []
    for reduction, (q, k, v) in zip(reductions, inputs, strict=True):
        if isinstance(reduction, Within):
            dims.append(float(decided(q, k, v, reduction, causal, xp).mean()))
            continue
        ranks = getattr(reduction, "ranks", reduction)
        if ranks not in known:
            known[ranks] = mean_dim(reduction, head_dim, seqlen, causal)
        dims.append(known[ranks])
    return None if None in dims else statistics.fmean(dim for dim in dims if dim is not None)


def _errors(out: Any, exact: Any, device: Device) -> Any:
    """Relative error of each head."""
    xp = device.xp
    out, exact = (x.astype(np.float32) for x in (out, exact))
    squares = xp.stack([((out - exact) ** 2).sum(axis=(0, 2, 3)), (exact**2).sum(axis=(0, 2, 3))])
    error, size = device.to_host(squares).astype(np.float64)
    return np.sqrt(error / size)


def _milliseconds(inputs: list[Any], attention: Callable[..., Any], device: Device) -> float:
    """Of the attention of all layers, one call after the other: the median of several."""
    cupy = device.xp
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    found = []
    for _ in range(GPU_WARM_UP + GPU_RUNS):
        start.record()
        for layer, (q, k, v) in enumerate(inputs):
            attention(layer, q, k, v)
        stop.record()
        stop.synchronize()
        found.append(float(cupy.cuda.get_elapsed_time(start, stop)))
    return statistics.median(found[GPU_WARM_UP:])


def _row(method: Method, parts: list[dict[str, Any]]) -> dict[str, Any]:
    errors = np.stack([part["errors"] for part in parts])  # (inputs, layers, heads)
    row: dict[str, Any] = {"method": method.spec, "trained": method.kind in TRAINED}
    for name in ("perplexity", "cosine"):
        if name in parts[0]:
            row[name] = round(statistics.fmean(part[name] for part in parts), 6)
    if "cosine_worst" in parts[0]:
        row["cosine_worst"] = round(min(part["cosine_worst"] for part in parts), 6)
    row["error_mean"], row["error_worst"] = round(float(errors.mean()), 6), round(float(errors.max()), 6)
    row["layer_errors"] = [round(float(x), 6) for x in errors.mean(axis=(0, 2))]
    if parts[0]["dim"] is not None:
        row["dim"] = round(statistics.fmean(part["dim"] for part in parts), 3)
    if "ms" in parts[0]:
        row["ms_attention"] = round(statistics.fmean(part["ms"] for part in parts), 5)
    return row
