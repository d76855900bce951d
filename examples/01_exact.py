"""Exact attention: grouped-query heads, a causal mask, a sliding window, and the log-sum-exp.

Runs on the GPU if CuPy finds one, otherwise on the NumPy reference:

    python examples/01_exact.py
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
print(f"arrays: {xp.__name__}")

# Eight query heads share two key and value heads.
batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim = 1, 8, 2, 300, 500, 64
rng = np.random.default_rng(0)
q = xp.asarray(rng.standard_normal((batch, heads, seqlen_q, head_dim)), dtype=xp.float16)
k = xp.asarray(rng.standard_normal((batch, heads_kv, seqlen_k, head_dim)), dtype=xp.float16)
v = xp.asarray(rng.standard_normal((batch, heads_kv, seqlen_k, head_dim)), dtype=xp.float16)

out = cudistr.attention(q, k, v)
print(f"out: {out.shape} {out.dtype}")

# How far the result is from the same method in float64: this is rounding, nothing else.
host = [np.asarray(x.get() if xp is not np else x) for x in (q, k, v, out)]
truth = cudistr.reference.attention(*host[:3])
print(f"largest difference from float64: {np.abs(host[3] - truth).max():.1e}")

# Causal masks are aligned to the bottom right: the last query sees every key.
out, lse = cudistr.attention(q, k, v, causal=True, return_lse=True)
print(f"lse: {lse.shape} {lse.dtype}")

# Each query sees the 128 keys before its own position, itself, and none after.
near = cudistr.attention(q, k, v, window=(128, 0))
print(f"a window changes the result by up to {float(abs(near - out).max()):.2f}")

# Data laid out as (batch, seqlen, heads, head_dim) is a transpose away: no copy is made.
q_bshd = xp.ascontiguousarray(q.transpose(0, 2, 1, 3))
same = cudistr.attention(q_bshd.transpose(0, 2, 1, 3), k, v, causal=True)
print(f"the same bits from another layout: {bool((same == out).all())}")
