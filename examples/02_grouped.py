"""DistrAttention: what grouping costs in accuracy, on six kinds of data.

The error of grouping depends on whether columns of Q are alike within a block of queries. This prints the
relative error of the output, ||out - exact|| / ||exact||, for grouping by hash and for an arbitrary order of the
columns. Where the two are equal the hash has found nothing.

    python examples/02_grouped.py
"""

import numpy as np

import cudistr


def array_module():
    """CuPy if it is installed and sees a GPU, else NumPy."""
    try:
        import cupy
    except ImportError:
        return np
    return cupy if cupy.cuda.is_available() else np


xp = array_module()
rng = np.random.default_rng(0)
HEADS, SEQLEN, HEAD_DIM = 2, 512, 64
SHAPE = (1, HEADS, SEQLEN, HEAD_DIM)


def low_rank(noise):
    """Eight directions and some noise: columns are mixtures of the same few."""
    mixed = rng.standard_normal((*SHAPE[:3], 8)) @ rng.standard_normal((1, HEADS, 8, HEAD_DIM))
    return mixed / np.sqrt(8) + noise * rng.standard_normal(SHAPE)


def pairs(noise):
    """Every column has a near copy somewhere: what the method is made for."""
    half = rng.standard_normal((*SHAPE[:3], HEAD_DIM // 2))
    both = np.concatenate([half, half], axis=3)[..., rng.permutation(HEAD_DIM)]
    return both + noise * rng.standard_normal(SHAPE)


def normal():
    return rng.standard_normal(SHAPE)


# Name, Q, K, V.
KINDS = [
    ("uniform on [0, 1)", rng.random(SHAPE), rng.random(SHAPE), rng.random(SHAPE)),
    ("uniform, but normal V", rng.random(SHAPE), rng.random(SHAPE), normal()),
    ("normal", normal(), normal(), normal()),
    ("rank 8 plus 10% noise", low_rank(0.1), low_rank(0.1), normal()),
    ("paired columns, 10% noise", pairs(0.1), normal(), normal()),
    ("paired columns, no noise", pairs(0.0), normal(), normal()),
]


def relative_error(out, exact):
    return float(xp.linalg.norm((out - exact).ravel()) / xp.linalg.norm(exact.ravel()))


print(f"arrays: {xp.__name__}")
print(f"{'data':<27}{'group_size=2':>13}{'mean':>8}{'any order':>11}{'group_size=4':>14}")
for name, q, k, v in KINDS:
    shuffle = rng.permutation(HEAD_DIM)
    q, k, v = (xp.asarray(x, dtype=xp.float32) for x in (q, k, v))
    exact = cudistr.attention(q, k, v)

    by_hash = [
        relative_error(cudistr.attention(q, k, v, reduction=reduction), exact)
        for reduction in (
            cudistr.LSH(group_size=2),
            cudistr.LSH(group_size=2, representative="mean"),
            cudistr.LSH(group_size=4),
        )
    ]
    # Pairs of columns in an arbitrary order, by hand: exact attention on half of the columns.
    qhat = q[..., shuffle][..., ::2].copy()
    khat = k[..., shuffle].reshape(1, HEADS, SEQLEN, -1, 2).sum(axis=4)
    any_order = relative_error(cudistr.attention(qhat, khat, v, scale=HEAD_DIM**-0.5), exact)

    two, mean, four = by_hash
    print(f"{name:<27}{two:>13.3f}{mean:>8.3f}{any_order:>11.3f}{four:>14.3f}")
print("Uniform data proves nothing: an arbitrary order does as well there. Measure on your own data.")
