"""What the demo leaves behind: a table in the terminal, a picture, and a record in JSON."""

from __future__ import annotations

import importlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

import cudistr
from cudistr import bench

from .errors import DemoError, require
from .measure import EXACT, METHODS, Device, Measurement
from .photo import Photo
from .weights import Weights

__all__ = ["picture", "record", "table", "write_record"]


def table(results: dict[str, Measurement]) -> str:
    """Errors, times and cosines as text."""
    depth = len(results[EXACT].layer_errors)
    width = max(len(name) for name in results)
    lines = [
        "Relative error of each attention layer, ||O - Ohat|| / ||O||, on the inputs of the exact forward:",
        f"{'layer':<{width}}"
        + "".join(f"{layer:>7}" for layer in range(1, depth + 1))
        + "   mean  worst head",
    ]
    for name, result in results.items():
        if name != EXACT:
            cells = "".join(f"{error:>7.3f}" for error in (*result.layer_errors, result.layer_errors.mean()))
            lines.append(f"{name:<{width}}{cells}{np.max(result.head_errors):>12.3f}")
    lines += [
        "",
        "Whole model, the method in all layers; final features and saliency map against exact:",
        f"{'':<{width}}  ms/forward  ms attention  cosine mean  cosine worst token  saliency max difference",
    ]
    for name, result in results.items():
        difference = np.abs(result.saliency - results[EXACT].saliency).max()
        lines.append(
            f"{name:<{width}}{result.ms:>12.2f}{result.attention_ms:>14.2f}{result.cosine.mean():>13.4f}{np.min(result.cosine):>20.4f}{difference:>25.4f}"
        )
    rounding = [f"{name} {np.max(r.rounding):.1e}" for name, r in results.items() if r.rounding is not None]
    if rounding:
        lines += [
            "",
            f"Rounding (float64 reference of the same method), worst layer: {', '.join(rounding)}",
        ]
    return "\n".join(lines)


def record(
    results: dict[str, Measurement], weights: Weights, device: Device, dtype: str, image: str, size: int
) -> dict[str, Any]:
    """Everything `table` says and more, as plain numbers for JSON."""
    tokens = len(results[EXACT].cosine)
    return {
        "what": "cudistr demo",
        "path": "GPU kernels" if device.gpu else "NumPy reference",
        "device": device.name if device.gpu else platform.processor() or platform.machine(),
        "commit": bench.commit_of(Path(cudistr.__file__).parents[1], os.environ),
        "versions": _versions(device),
        "model": {"layers": weights.depth, "heads": weights.heads, "head_dim": weights.dim // weights.heads},
        "image": image,
        "size": size,
        "tokens": tokens,
        "dtype": dtype,
        "methods": {
            name: {
                "reduction": None if METHODS[name] is None else repr(METHODS[name]),
                "ms_per_forward": result.ms,
                "ms_attention": result.attention_ms,
                "layer_errors": result.layer_errors.tolist(),
                "head_errors": result.head_errors.tolist(),
                "rounding": None if result.rounding is None else result.rounding.tolist(),
                "cosine_mean": float(result.cosine.mean()),
                "cosine_min": float(np.min(result.cosine)),
                "cosine_cls": float(result.cosine[0]),
                "saliency_max_difference": float(np.abs(result.saliency - results[EXACT].saliency).max()),
            }
            for name, result in results.items()
        },
    }


def _versions(device: Device) -> dict[str, str]:
    versions = {"cudistr": cudistr.__version__, "python": platform.python_version(), "numpy": np.__version__}
    for module in ("scipy", "skimage"):
        versions[module] = importlib.import_module(module).__version__
    if device.gpu:
        runtime = device.xp.cuda.runtime
        versions["cupy"] = device.xp.__version__
        versions["cuda_runtime"] = str(runtime.runtimeGetVersion())
        versions["cuda_driver"] = str(runtime.driverGetVersion())
    return versions


def write_record(content: dict[str, Any], path: Path) -> None:
    """Write the record as JSON."""
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DemoError(f"--json: cannot write {path} ({error.strerror})") from error


def _duration(ms: float) -> str:
    return f"{ms:.1f} ms" if ms < 1e3 else f"{ms / 1e3:.1f} s"


def picture(
    results: dict[str, Measurement], photo: Photo, name_of_photo: str, subtitle: str, path: Path
) -> None:
    """Write the photograph and the saliency maps side by side, all maps on one colour scale."""
    figure_module = require("matplotlib.figure", "Matplotlib")
    rows, columns = photo.rgb.shape[:2]
    height = 3.6 * rows / columns + 1.1  # the titles take the rest
    figure = figure_module.Figure(figsize=(3.6 * (1 + len(results)), height), layout="constrained")
    axes = figure.subplots(1, 1 + len(results))
    axes[0].imshow(photo.rgb.clip(0, 1))
    axes[0].set_title(name_of_photo, fontsize=11)
    for axis, (name, result) in zip(axes[1:], results.items(), strict=True):
        image = axis.imshow(photo.crop(result.saliency), cmap="inferno", vmin=0, vmax=1)
        title = f"{name}\n{_duration(result.ms)} per forward"
        if name != EXACT:
            title += f"\nlayer error {result.layer_errors.mean():.2f}, cosine {result.cosine.mean():.3f}"
        axis.set_title(title, fontsize=11)
    for axis in axes:
        axis.set_axis_off()
    scale = axes[-1].inset_axes([1.03, 0, 0.04, 1])  # as high as the map, which the layout may shrink
    figure.colorbar(image, cax=scale, label="saliency")
    figure.suptitle(subtitle, fontsize=10, color="0.35")
    try:
        figure.savefig(path, format="png", dpi=110, bbox_inches="tight", pad_inches=0.1)
    except OSError as error:
        raise DemoError(f"--output: cannot write {path} ({error.strerror})") from error
