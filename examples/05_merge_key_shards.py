"""One long sequence of keys in shards: attend to each alone, then merge by log-sum-exp.

The same is done when the shards lie on several GPUs, or arrive one after another.

    python examples/05_merge_key_shards.py
"""

import itertools

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

rng = np.random.default_rng(0)
batch, heads, seqlen_q, seqlen_k, head_dim = 1, 4, 128, 1000, 64
q = xp.asarray(rng.standard_normal((batch, heads, seqlen_q, head_dim)), dtype=xp.float32)
k = xp.asarray(rng.standard_normal((batch, heads, seqlen_k, head_dim)), dtype=xp.float32)
v = xp.asarray(rng.standard_normal((batch, heads, seqlen_k, head_dim)), dtype=xp.float32)

# Shards may have any lengths, even none.
bounds = [0, 300, 300, 850, seqlen_k]
outs, lses = [], []
for start, stop in itertools.pairwise(bounds):
    out, lse = cudistr.attention(q, k[:, :, start:stop], v[:, :, start:stop], return_lse=True)
    outs.append(out)
    lses.append(lse)
    print(f"keys {start:4d} to {stop:4d}: lse of the first row {float(lse[0, 0, 0]):.3f}")

merged, lse = cudistr.merge(outs, lses, return_lse=True)
whole, lse_whole = cudistr.attention(q, k, v, return_lse=True)
print(f"merged: lse of the first row {float(lse[0, 0, 0]):.3f}, of one call {float(lse_whole[0, 0, 0]):.3f}")
print(f"largest difference from one call over all keys: {float(abs(merged - whole).max()):.1e}")
