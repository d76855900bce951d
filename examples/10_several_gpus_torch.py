"""PyTorch tensors on several GPUs: each process passes its rows of q, k and v, and gets its rows of the output.

    mpiexec -n 4 python examples/10_several_gpus_torch.py

Tensors go through DLPack both ways, without a copy, and work is queued on torch's current stream. A process group of
torch's own is not needed; where there is one (torchrun), its processes can share NCCL's identifier instead of using
mpi4py:

    from cupy.cuda import nccl
    identifier = [nccl.get_unique_id() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(identifier)
    group = cudistr.distributed.connect(unique_id=identifier[0])  # RANK, WORLD_SIZE and LOCAL_RANK are torchrun's
"""

import sys

from cudistr.distributed import Layout, connect

try:
    import torch
except ImportError:
    print("PyTorch is not installed: nothing to show. Try: pip install torch")
    sys.exit(0)

with connect(timeout=60) as group:
    device = "cpu" if group.device is None else f"cuda:{group.device}"
    if group.device is not None:
        torch.cuda.set_device(group.device)
    if group.rank == 0:
        print(f"torch {torch.__version__}, {group.size} processes on {device.partition(':')[0]}")

    # float32 on the CPU, where NumPy cannot take bfloat16 through DLPack. Equal seeds: every process has all of it.
    dtype = torch.float32 if group.device is None else torch.bfloat16
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 512, 64).to(device, dtype) for _ in range(3))

    layout = Layout.split(512, group.size, zigzag=True)
    mine = [group.shard(x, layout) for x in (q, k, v)]
    out, lse = group.attention(*mine, layout=layout, causal=True, return_lse=True)
    whole = group.gather(out, layout)
    if group.rank == 0:
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        print(f"out: {type(out).__name__} {tuple(out.shape)} {out.dtype}")
        print(f"lse: {type(lse).__name__} {tuple(lse.shape)} {lse.dtype}")
        print(f"largest difference from torch's attention: {(whole - theirs).abs().max().item():.1e}")
