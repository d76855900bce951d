"""One long sequence on several GPUs, a process for each.

    mpiexec -n 4 python examples/09_several_gpus.py

Without GPUs the processes compute on the CPU, and with one process nothing travels. Needs mpi4py and an MPI:
pip install "cudistr[distributed]" mpich
"""

import numpy as np

import cudistr
from cudistr.distributed import Layout, connect

with connect(timeout=60) as group:
    on_host = group.device is None
    if on_host:
        xp = np
    else:
        import cupy as xp

        xp.cuda.Device(group.device).use()
    if group.rank == 0:
        print(f"{group.size} processes, arrays: {xp.__name__}")

    # Here every process makes the whole arrays, to have something to compare with. Elsewhere each makes or loads its
    # own rows: layout.positions(group.rank) says which.
    batch, heads, heads_kv, seqlen, head_dim = 1, 8, 8, 700, 64
    rng = np.random.default_rng(0)
    q = xp.asarray(rng.standard_normal((batch, heads, seqlen, head_dim)), dtype=xp.float32)
    k = xp.asarray(rng.standard_normal((batch, heads_kv, seqlen, head_dim)), dtype=xp.float32)
    v = xp.asarray(rng.standard_normal((batch, heads_kv, seqlen, head_dim)), dtype=xp.float32)

    # Context parallel: the keys go round in a ring. Zig-zag gives all processes the same work under a causal mask.
    layout = Layout.split(seqlen, group.size, zigzag=True)
    mine = [group.shard(x, layout) for x in (q, k, v)]
    out = group.attention(*mine, layout=layout, causal=True)
    whole = group.gather(out, layout)
    if group.rank == 0:
        error = float(abs(whole - cudistr.attention(q, k, v, causal=True)).max())
        print(f"ranges of rank 0: {layout.pieces[0]}")
        print(f"ring, largest difference from one call: {error:.1e}")

    # The same with DistrAttention. Shards begin at multiples of block_q, so that its groups are those of one call.
    reduction = cudistr.LSH(group_size=2)
    layout = Layout.split(seqlen, group.size, zigzag=True, block=reduction.block_q)
    mine = [group.shard(x, layout) for x in (q, k, v)]
    whole = group.gather(group.attention(*mine, layout=layout, causal=True, reduction=reduction), layout)
    if group.rank == 0:
        one = cudistr.attention(q, k, v, causal=True, reduction=reduction)
        print(f"ring, LSH, largest difference from one call: {float(abs(whole - one).max()):.1e}")

    # Head parallel: an all-to-all gives every process all rows of some heads. Shards are contiguous unless a layout
    # says otherwise, and may have any lengths.
    if heads % group.size == 0:
        layout = Layout.split(seqlen, group.size)
        mine = [group.shard(x, layout) for x in (q, k, v)]
        whole = group.gather(group.attention(*mine, parallel="heads", causal=True))
        if group.rank == 0:
            error = float(abs(whole - cudistr.attention(q, k, v, causal=True)).max())
            print(f"heads, largest difference from one call: {error:.1e}")
