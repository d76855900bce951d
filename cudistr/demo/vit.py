"""DINOv2 vision transformer with a saliency head, one forward for NumPy and CuPy.

Everything is float32 except the inputs of attention, which the caller chooses. Attention itself is an
argument, so the same forward serves exact attention, every reduction, and the measurement of their errors.

References: Oquab et al., *DINOv2*, arXiv 2304.07193 (backbone); Touvron et al., *Going deeper with image
transformers*, arXiv 2103.17239 (LayerScale); Hendrycks and Gimpel, *Gaussian error linear units*,
arXiv 1606.08415.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import require
from .weights import Weights

__all__ = ["Attention", "forward", "resize_matrix"]

LAYER_NORM_EPS = 1e-6  # DINOv2's
CUBIC_A = -0.75  # of the position embedding's bicubic resize: PyTorch's and the ONNX graph's


class Attention(Protocol):
    """What `forward` calls in every layer."""

    def __call__(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        """Attention of one layer; q, k, v and the result are (batch, heads, tokens, head_dim)."""


def resize_matrix(size_out: int, size_in: int, mode: str) -> NDArray[np.float32]:
    """Interpolation along one axis as a matrix (size_out, size_in).

    Rows sum to 1, equal sizes give the identity. Pixel centres are at half-integers, samples beyond the edge
    repeat the edge, and nothing is smoothed when the size shrinks: ONNX Resize with ``half_pixel``, PyTorch's
    interpolate with ``align_corners=False``.

    Parameters
    ----------
    mode : {"linear", "cubic"}
        Tent, or Keys' cubic convolution with a = -0.75.
    """
    centre = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    first = np.floor(centre).astype(int)
    taps = range(2) if mode == "linear" else range(-1, 3)
    matrix = np.zeros((size_out, size_in))
    for tap in taps:
        distance = np.abs(centre - (first + tap))
        column = np.clip(first + tap, 0, size_in - 1)
        weight = 1 - distance if mode == "linear" else _keys(distance)
        np.add.at(matrix, (np.arange(size_out), column), weight)
    return matrix.astype(np.float32)


def _keys(x: NDArray[Any]) -> NDArray[Any]:
    """Keys' cubic convolution kernel at distances 0 <= x <= 2 (IEEE ASSP 29, 1981, equation 15)."""
    near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * CUBIC_A - 4 * CUBIC_A
    kernel: NDArray[np.float64] = np.where(x <= 1, near, far)
    return kernel


def _resize(image: Any, rows: int, columns: int, mode: str, xp: Any) -> Any:
    """Resize the axes 0 and 1 of a (height, width, channels) array."""
    down = xp.asarray(resize_matrix(rows, image.shape[0], mode))
    across = xp.asarray(resize_matrix(columns, image.shape[1], mode))
    return xp.einsum("yh,hwc,xw->yxc", down, image, across, optimize=True)


def _layer_norm(x: Any, weight: Any, bias: Any, xp: Any) -> Any:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / xp.sqrt(variance + np.float32(LAYER_NORM_EPS)) * weight + bias


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    """Product over the last axis as one flat GEMM: a stacked one would be a GEMM per image row."""
    return (x.reshape(-1, x.shape[-1]) @ weight + bias).reshape(*x.shape[:-1], -1)


def _gelu(x: Any, erf: Any) -> Any:
    return x * (erf(x * np.float32(0.5**0.5)) + np.float32(1)) * np.float32(0.5)


def _upsample(x: Any, weight: Any, bias: Any, xp: Any) -> Any:
    """Transposed convolution, kernel 4, stride 2, padding 1: (batch, h, w, in) to (batch, 2 h, 2 w, out)."""
    batch, height, width, _ = x.shape
    padded = xp.zeros((batch, 2 * height + 2, 2 * width + 2, weight.shape[-1]), x.dtype)
    for ky in range(4):
        for kx in range(4):
            padded[:, ky : ky + 2 * height : 2, kx : kx + 2 * width : 2] += _linear(x, weight[ky, kx], 0)
    return padded[:, 1:-1, 1:-1] + bias


def _embed(weights: Weights, pixels: Any, xp: Any) -> Any:
    """Tokens (batch, 1 + rows * columns, dim): the cls token and the patches, plus their positions."""
    batch, height, width, _ = pixels.shape
    p = weights.patch
    rows, columns = height // p, width // p
    patches = pixels.reshape(batch, rows, p, columns, p, 3).transpose(0, 1, 3, 5, 2, 4)
    position = _resize(weights["position.patch"], rows, columns, "cubic", xp)
    tokens = _linear(
        patches.reshape(batch, rows, columns, -1), weights["patch.weight"], weights["patch.bias"]
    )
    tokens += position
    cls = xp.broadcast_to(weights["token.cls"] + weights["position.cls"], (batch, 1, weights.dim))
    return xp.concatenate([cls, tokens.reshape(batch, rows * columns, -1)], axis=1)


def forward(weights: Weights, pixels: Any, attention: Attention, *, dtype: Any, xp: Any) -> tuple[Any, Any]:
    """Final features and saliency map of normalised photographs.

    Parameters
    ----------
    weights : Weights
        Arrays of the module ``xp``.
    pixels : array (batch, height, width, 3), float32
        Normalised with ImageNet's mean and standard deviation; height and width multiples of the patch.
    attention : Attention
        Called once per layer with strided views of the qkv projection: nothing is copied for it.
    dtype : dtype
        Type of q, k and v. All else is float32.
    xp : module
        ``numpy`` or ``cupy``.

    Returns
    -------
    features : array (batch, tokens, dim), float32
        Tokens after the final layer norm; token 0 is the cls token.
    saliency : array (batch, height, width), float32
        Values between 0 and 1.
    """
    scipy_name = "scipy" if xp is np else "cupyx.scipy"
    erf = require(f"{scipy_name}.special", "SciPy" if xp is np else "CuPy").erf
    batch, height, width, _ = pixels.shape
    x = _embed(weights, pixels, xp)
    tokens = x.shape[1]
    for layer in range(weights.depth):

        def w(name: str, block: str = f"block.{layer}") -> Any:
            return weights[f"{block}.{name}"]

        y = _layer_norm(x, w("norm1.weight"), w("norm1.bias"), xp)
        qkv = _linear(y, w("qkv.weight"), w("qkv.bias")).astype(dtype)
        q, k, v = qkv.reshape(batch, tokens, 3, weights.heads, -1).transpose(2, 0, 3, 1, 4)
        o = attention(layer, q, k, v).transpose(0, 2, 1, 3).reshape(batch, tokens, -1).astype(np.float32)
        x = x + _linear(o, w("out.weight"), w("out.bias")) * w("scale1")
        y = _layer_norm(x, w("norm2.weight"), w("norm2.bias"), xp)
        y = _gelu(_linear(y, w("fc1.weight"), w("fc1.bias")), erf)
        x = x + _linear(y, w("fc2.weight"), w("fc2.bias")) * w("scale2")
    features = _layer_norm(x, weights["norm.weight"], weights["norm.bias"], xp)
    y = features[:, 1:].reshape(batch, height // weights.patch, width // weights.patch, -1)
    for stage in range(weights.head_stages):
        y = xp.maximum(_upsample(y, weights[f"head.{stage}.weight"], weights[f"head.{stage}.bias"], xp), 0)
    logits = _linear(y, weights["head.last.weight"], weights["head.last.bias"])[..., 0]
    logits = xp.moveaxis(_resize(xp.moveaxis(logits, 0, -1), height, width, "linear", xp), -1, 0)
    return features, np.float32(1) / (np.float32(1) + xp.exp(-logits))
