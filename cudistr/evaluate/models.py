"""The two models as one thing: something with layers, a forward that takes an attention, and a score at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cudistr.demo import photo, vit, weights
from cudistr.demo.errors import DemoError

from . import llama, text
from .errors import EvalError

__all__ = ["Case", "dinov2", "save", "smollm2", "to_dtype"]

SIZE = 518  # pixels of a photograph's side: 1370 tokens, what DINOv2 was trained for
CALIBRATION_STARTS = (30000, 46000, 62000, 78000)  # tokens of the text, behind what is evaluated
CALIBRATION_TOKENS = 16000  # from each of these on, at most: as many as are evaluated
SAVED_TOKENS = 96000  # of the text, enough for both

Forward = Callable[[vit.Attention], Any]


@dataclass(frozen=True)
class Case:
    """A model with the data that it is evaluated on.

    Attributes
    ----------
    name, causal : str, bool
        Of the model, and whether its attention is.
    forwards : list of callables
        One for each input: a forward with the attention of the caller, which returns features (tokens, width).
    calibration : list of lists of callables
        For each input those on other data.
    score : callable
        ``score(i, features, exact features)``: what the record says of input i, by name.
    facts : dict
        What the data is, for the record.
    """

    name: str
    causal: bool
    forwards: list[Forward]
    calibration: list[list[Forward]]
    score: Callable[[int, Any, Any], dict[str, float]]
    facts: dict[str, Any]


def _packaged() -> tuple[dict[str, Any], Any]:
    """Quantised weights of the installed package, and the tokens of the text."""
    content, vocabulary, merges = llama.load_gguf(llama.find_gguf())
    return content, text.tokenise(text.prose(), vocabulary, merges)[:SAVED_TOKENS]


def save(name: str, folder: Path) -> list[Path]:
    """Write what a model needs of its package, for another machine; the paths of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "smollm2":
        return llama.save(*_packaged(), folder)
    try:
        weights.save_npz(weights.load_onnx(weights.find_onnx()), folder / "dinov2.npz")
    except DemoError as error:
        raise EvalError(str(error)) from error
    return [folder / "dinov2.npz"]


def smollm2(folder: Path | None, seqlen: int, dtype: Any, xp: Any) -> Case:
    """SmolLM2-135M-Instruct on the first ``seqlen`` tokens of the text."""
    content, tokens = _packaged() if folder is None else llama.load(folder)
    if not 2 <= seqlen <= min(CALIBRATION_STARTS):
        raise EvalError(f"--seqlen must be from 2 to {min(CALIBRATION_STARTS)}, got {seqlen}")
    model = llama.build(content).to(xp.asarray)
    every = xp.asarray(tokens)

    def forward(first: int, count: int) -> Forward:
        return lambda attention: llama.forward(
            model, every[first : first + count], attention, dtype=dtype, xp=xp
        )

    def score(_: int, features: Any, __: Any) -> dict[str, float]:
        return {"perplexity": llama.perplexity(model, features, every[:seqlen], xp)}

    return Case(
        "SmolLM2-135M-Instruct",
        True,
        [forward(0, seqlen)],
        [[forward(start, min(seqlen, CALIBRATION_TOKENS)) for start in CALIBRATION_STARTS]],
        score,
        {"seqlen": seqlen, "layers": model.depth, "heads": model.heads, "heads_kv": model.heads_kv},
    )


def dinov2(file: Path | None, dtype: Any, xp: Any) -> Case:
    """DINOv2 ViT-S/14 on three photographs; what is calibrated on other data sees the other two."""
    try:
        source = weights.load_npz(file) if file is not None else weights.load_onnx(weights.find_onnx())
        pixels = [xp.asarray(photo.load(name, SIZE).pixels) for name in photo.PHOTOGRAPHS]
    except DemoError as error:
        raise EvalError(str(error)) from error
    model = source.to(xp.asarray)

    def forward(picture: Any) -> Forward:
        return lambda attention: vit.forward(model, picture, attention, dtype=dtype, xp=xp)[0][0]

    def score(_: int, features: Any, exact: Any) -> dict[str, float]:
        norms = xp.linalg.norm(features, axis=1) * xp.linalg.norm(exact, axis=1)
        cosine = (features * exact).sum(axis=1) / norms
        return {"cosine": float(cosine.mean()), "cosine_worst": float(cosine.min())}

    forwards = [forward(x) for x in pixels]
    return Case(
        "DINOv2 ViT-S/14",
        False,
        forwards,
        [[f for j, f in enumerate(forwards) if j != i] for i in range(len(forwards))],
        score,
        {
            "seqlen": 1 + (SIZE // model.patch) ** 2,
            "layers": model.depth,
            "heads": model.heads,
            "heads_kv": model.heads,
        },
    )


def to_dtype(name: str) -> Any:
    """A dtype by its name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
