"""Run a case with every method: its score, the error of each layer and head on exact inputs, and times on a GPU."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from cudistr import bench
from cudistr.demo.measure import Device

from .methods import Inputs, Method, Within, attend, decided, mean_dim, prepare
from .models import Case, Forward
from .rivals import RIVALS, TRAINED

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
    milliseconds of the attention of all layers of one input, called from Python. With few heads and short sequences
    that is how fast the host launches; ``ms_graph`` is the same calls as one CUDA graph, which a rival does not have.
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
                part["ms_attention"] = _milliseconds(inputs, attention, device)
                if method.kind not in RIVALS:
                    part["ms_graph"] = _graph_milliseconds(method.spec, inputs, attention, device)
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
            ranks = decided(q, k, v, reduction, causal, xp)
            dims.append(mean_dim(reduction.projection, head_dim, seqlen, causal, ranks))
            continue
        key = getattr(reduction, "ranks", reduction)
        if key not in known:
            known[key] = mean_dim(reduction, head_dim, seqlen, causal)
        dims.append(known[key])
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

    def calls() -> None:
        for layer, (q, k, v) in enumerate(inputs):
            attention(layer, q, k, v)

    return _median(calls, lambda: None, device.xp.cuda)


def _graph_milliseconds(
    spec: str, inputs: list[Any], attention: Callable[..., Any], device: Device
) -> float | None:
    """Of the same calls, captured once and replayed: what the GPU takes. None, with a warning, if that fails."""
    cuda = device.xp.cuda
    stream = cuda.Stream(non_blocking=True)
    device.finish()  # the inputs come from another stream

    def calls() -> list[Any]:
        return [attention(layer, q, k, v) for layer, (q, k, v) in enumerate(inputs)]

    with stream:
        try:
            graph, outputs = bench.capture(calls, stream)
        except Exception as error:
            warnings.warn(f"{spec} has no ms_graph, it could not be captured: {error}", stacklevel=2)
            return None
        # The replay before the one that is timed keeps the GPU busy while the host launches.
        found = _median(lambda: graph.launch(stream), lambda: graph.launch(stream), cuda)
        del outputs
    return found


def _median(run: Callable[[], Any], before: Callable[[], Any], cuda: Any) -> float:
    """Milliseconds of ``run`` on the current stream, each time after ``before``, which is not timed."""
    start, stop = cuda.Event(), cuda.Event()
    found = []
    for _ in range(GPU_WARM_UP + GPU_RUNS):
        before()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        found.append(float(cuda.get_elapsed_time(start, stop)))
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
    for name in ("ms_attention", "ms_graph"):
        if all(part.get(name) is not None for part in parts):
            row[name] = round(statistics.fmean(part[name] for part in parts), 5)
    return row
