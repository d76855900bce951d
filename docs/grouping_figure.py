"""The figure of the method page: what grouping does to the columns of Q and K, with the real hash.

python docs/grouping_figure.py grouping.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import cudistr
from cudistr import reference

ROWS, HEAD_DIM, GROUP = 128, 16, 2
NOISE = 0.15


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q (rows, head_dim) of noisy column pairs in a random order, K, and the pair that each column belongs to."""
    rng = np.random.default_rng(3)
    partner = rng.permutation(np.repeat(np.arange(HEAD_DIM // 2), 2))
    smooth = np.exp(
        -0.5 * (np.arange(-20, 21) / 6) ** 2
    )  # so that a column is a pattern that the eye can follow

    def columns(count: int) -> np.ndarray:
        raw = rng.standard_normal((ROWS + 40, count))
        mixed = np.stack([np.convolve(x, smooth, "valid") for x in raw.T], axis=1)
        return mixed / mixed.std()

    q = columns(HEAD_DIM // 2)[:, partner] + NOISE * rng.standard_normal((ROWS, HEAD_DIM))
    return q.astype(np.float32), columns(HEAD_DIM).astype(np.float32), partner


def draw(path: Path) -> None:
    """Write the figure; the format follows from the file's suffix."""
    q, k, partner = inputs()
    reduction = cudistr.LSH(group_size=GROUP)
    order = reference.order(q, reduction)
    groups = order.reshape(-1, GROUP)
    found = [len(set(partner[g])) == 1 for g in groups]
    panels = [
        ("Q block", q, range(HEAD_DIM)),
        ("Q, columns sorted by hash", q[:, order], order),
        ("sampled: $\\hat Q$", reference.sample(q, order, reduction), groups[:, 0]),
        ("K", k, range(HEAD_DIM)),
        ("K, in the order of Q", k[:, order], order),
        ("fused: $\\hat K$", reference.fuse(k, order, GROUP), ["+".join(map(str, g)) for g in groups]),
    ]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=(2, 2, 1.4))
    for axis, (title, values, names) in zip(axes.flat, panels, strict=True):
        axis.imshow(values, aspect="auto", cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_xticks(range(values.shape[1]), names, fontsize=6.5)
        axis.set_yticks([])
        axis.tick_params(length=0)
    for axis in axes[:, 1]:  # a frame around each group: solid where it joins true partners
        for t, true_pair in enumerate(found):
            axis.axvline((t + 1) * GROUP - 0.5, color="black", linewidth=0.6)
            axis.text(
                (t + 0.5) * GROUP - 0.5, 1.06 * ROWS, "pair" if true_pair else "no", ha="center", va="top",
                fontsize=7, color="green" if true_pair else "firebrick", transform=axis.transData, clip_on=False,
            )  # fmt: skip
    axes[0, 0].set_ylabel(f"{ROWS} queries")
    axes[1, 0].set_ylabel(f"{ROWS} keys")
    figure.suptitle(
        f"head_dim {HEAD_DIM}, group_size {GROUP}: {sum(found)} of {len(found)} groups join columns that are alike",
        fontsize=11,
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
