"""JAX arrays in, JAX arrays out, through DLPack and without a copy of the inputs.

python examples/04_jax_dlpack.py
"""

import sys

import cudistr

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    print("JAX is not installed: nothing to show. Try: pip install jax")
    sys.exit(0)

print(f"jax {jax.__version__} on {jax.default_backend()}")

# JAX computes lazily; arrays handed over through DLPack are waited for by CuPy's stream, not by the host.
keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (1, 4, 256, 64), dtype=jnp.float32) for key in keys)

out = cudistr.attention(q, k, v, causal=True)
print(f"out: jax array {isinstance(out, jax.Array)}, {out.shape} {out.dtype}")

# JAX's own function has (batch, seqlen, heads, head_dim).
swapped = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
theirs = jax.nn.dot_product_attention(*swapped, is_causal=True).transpose(0, 2, 1, 3)
print(f"largest difference from JAX's attention: {float(jnp.abs(out - theirs).max()):.1e}")
