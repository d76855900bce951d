"""A projection fitted once, and calls that keep to an error that you choose."""

import pathlib
import tempfile

import numpy as np

import cudistr

random = np.random.RandomState(0)
HEADS, HEAD_DIM = 4, 64
# Scores of the first heads sum over few directions, those of the last over all.
widths = (8, 24, 48, HEAD_DIM)
bases = [random.standard_normal((width, HEAD_DIM)) / width**0.5 for width in widths]


def activations(seqlen: int) -> list[np.ndarray]:
    """Queries, keys and values, such as a layer of a model makes of a text."""
    heads = [random.standard_normal((2, 1, seqlen, len(basis))) @ basis for basis in bases]
    noise = 0.01 * random.standard_normal((2, 1, HEADS, seqlen, HEAD_DIM))
    q, k = np.stack(heads, axis=2) + noise
    return [x.astype(np.float32) for x in (q, k, random.standard_normal(q.shape))]


# Once for each layer of a model; kept in a file.
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "layer.npz"
    cudistr.Projection.fit(*activations(1000), rank=32, causal=True).save(file)
    projection = cudistr.Projection.load(file)
of_rank = projection.output_errors[:, 32 // 16]  # a column for each of the ranks 0, 16, 32, ...
print("error of each head where it was fitted:", *(f"{error:.2g}" for error in of_rank))

q, k, v = activations(700)
for tolerance in (None, 0.05):
    options = {"causal": True, "reduction": projection, "tolerance": tolerance}
    out = cudistr.attention(q, k, v, **options)
    print(f"\ntolerance {tolerance}, output {out.shape}")
    print(cudistr.attention_error(q, k, v, **options))
