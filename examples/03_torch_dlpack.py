"""PyTorch tensors in, PyTorch tensors out, through DLPack and without a copy of the inputs.

python examples/03_torch_dlpack.py
"""

import sys

import cudistr

try:
    import torch
except ImportError:
    print("PyTorch is not installed: nothing to show. Try: pip install torch")
    sys.exit(0)


def usable_device():
    """CUDA needs both libraries to see the GPU; CPU tensors run on the NumPy reference."""
    try:
        import cupy
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() and cupy.cuda.is_available() else "cpu"


device = usable_device()
print(f"torch {torch.__version__} on {device}")

torch.manual_seed(0)
# float32 on the CPU, where NumPy cannot take bfloat16 through DLPack.
dtype = torch.bfloat16 if device == "cuda" else torch.float32
q, k, v = (torch.randn(1, 4, 256, 64, device=device, dtype=dtype) for _ in range(3))

out, lse = cudistr.attention(q, k, v, return_lse=True)
print(f"out: {type(out).__name__} {tuple(out.shape)} {out.dtype} on {out.device}")
print(f"lse: {type(lse).__name__} {tuple(lse.shape)} {lse.dtype}")

theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
print(f"largest difference from torch's attention: {(out - theirs).abs().max().item():.1e}")

# torch's causal mask starts at the top left, cudistr's ends at the bottom right: equal for equal lengths only.
ours = cudistr.attention(q, k, v, causal=True)
theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
print(f"the same, causal: {(ours - theirs).abs().max().item():.1e}")
