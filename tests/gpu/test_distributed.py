"""Ranks as streams of one GPU, with a stand-in for NCCL whose messages are copies on it: kernels, order, and merging."""

from __future__ import annotations

import numpy as np
import pytest

import cudistr
from cudistr import reference
from cudistr.distributed import Group, Layout
from cudistr.distributed.transport import Nccl
from tests import fake_nccl
from tests.cpu.ranks import Network, run_groups, run_ranks
from tests.gpu.util import baseline, compare, compare_lse, cp, inputs, on_device, same_bits
from tests.strategies import BFLOAT16

pytestmark = pytest.mark.gpu


class OneThread(Nccl):
    """Ranks take turns, so that no other thread can connect a rank while it waits."""

    def _guard(self, work):
        work()


def over_streams(size, body):
    """What ``body(group)`` returns on ranks with a stream each."""
    network = Network()
    cp.cuda.Device().synchronize()  # streams that do not block do not wait for what has made the arrays

    def each(rank):
        with cp.cuda.Stream(non_blocking=True) as stream:
            group = Group(OneThread(size, rank, bytes(range(128)), cp.cuda.Device().id, 60.0, None))
            with group:
                found = body(group)
            stream.synchronize()
            return found

    with fake_nccl.installed(cp, network) as nccl:
        found = run_ranks(size, each, network)
    assert not any(network.sent.values()), "messages that nobody received"
    assert [call[0] for call in nccl.calls].count("destroy") == size
    return found, nccl


def check(size, q, k, v, layout, on_host=True, parallel="context", **options):
    arrays = [on_device(x) for x in (q, k, v)]
    pair = layout if isinstance(layout, tuple) else (layout, layout)

    def body(group):
        mine = [group.shard(x, own) for x, own in zip(arrays, (pair[0], pair[1], pair[1]), strict=True)]
        out, lse = group.attention(*mine, layout=layout, parallel=parallel, return_lse=True, **options)
        assert type(out) is cp.ndarray and out.dtype == q.dtype and lse.dtype == np.float32
        return group.gather(out, pair[0]), group.gather(lse, pair[0])

    found, _ = over_streams(size, body)
    for other in found[1:]:
        for one, same in zip(other, found[0], strict=True):
            same_bits(one, same)
    like = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), return_lse=True, **options)
    base, base_lse = baseline(q, k, v, np if on_host else cp, **options)
    compare(found[0][0], like[0], base)
    compare_lse(found[0][1], like[1], base_lse)


each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)


@each_dtype
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (90, 20), "softcap": 4.0},
        {"causal": True, "reduction": cudistr.LSH(2)},
    ],
    ids=str,
)
def test_ring(dtype, size, options):
    q, k, v = inputs(61, dtype, batch=1, heads_kv=2, lengths=(500, 500))
    check(size, q, k, v, Layout.split(500, size, zigzag=True, block=128), on_host=False, **options)


@each_dtype
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"reduction": cudistr.LSH(2, near=40, sinks=5)}], ids=str
)
def test_heads(dtype, options):
    q, k, v = inputs(62, dtype, batch=1, heads_kv=2, lengths=(300, 300))
    check(4, q, k, v, Layout.split(300, 4), on_host=False, parallel="heads", **options)


def test_exact_keys_and_unequal_shards():
    q, k, v = inputs(63, BFLOAT16, batch=1, heads_kv=2, lengths=(300, 400))
    pair = Layout.contiguous([128, 0, 172]), Layout.contiguous([31, 200, 169])
    reduction = cudistr.LSH(2, near=70, sinks=5)
    check(3, q, k, v, pair, on_host=False, causal=True, reduction=reduction)


def test_projection():
    q, k, v = inputs(64, np.float16, batch=1, lengths=(260, 260))
    projection = cudistr.Projection.fit(*(x.astype(np.float32) for x in (q, k)), rank=32)
    for parallel in ("context", "heads"):
        check(
            2,
            q,
            k,
            v,
            Layout.split(260, 2),
            on_host=False,
            parallel=parallel,
            reduction=projection,
            causal=True,
        )


@pytest.mark.small
@pytest.mark.parametrize("size", [2, 3])
def test_small_ring(size):
    q, k, v = inputs(65, BFLOAT16, batch=1, heads=2, heads_kv=1, lengths=(200, 200))
    check(size, q, k, v, Layout.split(200, size, zigzag=True), causal=True)


@pytest.mark.small
def test_small_grouped_and_heads():
    q, k, v = inputs(66, np.float16, batch=1, heads=2, heads_kv=1, lengths=(200, 200))
    reduction = cudistr.LSH(2, block_q=64)
    check(2, q, k, v, Layout.split(200, 2, zigzag=True, block=64), causal=True, reduction=reduction)
    check(2, q, k, v, Layout.split(200, 2), parallel="heads", causal=True)


@pytest.mark.small
def test_permutations_of_shards_are_those_of_one_call():
    q, _, _ = inputs(67, np.float16, batch=1, heads=2, lengths=(330, 330))
    reduction = cudistr.LSH(2, block_q=64)
    single = cp.asnumpy(cudistr.group(on_device(q), reduction))
    layout = Layout.split(330, 2, zigzag=True, block=64)
    for rank in range(2):
        rows = layout.positions(rank)
        own = cp.asnumpy(cudistr.group(on_device(q[:, :, rows]), reduction))
        np.testing.assert_array_equal(own, single[:, :, rows[::64] // 64])


@pytest.mark.small
def test_one_rank_has_the_bits_of_one_call():
    arrays = [on_device(x) for x in inputs(68, np.float16, batch=1, heads=2, lengths=(100, 100))]
    (found,), nccl = over_streams(1, lambda group: group.attention(*arrays, causal=True))
    same_bits(found, cudistr.attention(*arrays, causal=True))
    assert not any(call[0] == "send" for call in nccl.calls)


@pytest.mark.small
def test_a_group_without_gpus_refuses_their_arrays():
    x = cp.asarray(np.zeros((1, 1, 4, 8), np.float32))

    def body(group):
        with pytest.raises(
            TypeError, match="this group moves arrays on the host over MPI, got arrays on a GPU"
        ):
            group.attention(x, x, x)

    run_groups(1, body)


@pytest.mark.hardware
def test_a_late_transfer_is_waited_for():
    """A message that the other stream copies long after it was asked for: nothing reads its buffer before."""
    q, k, v = inputs(69, np.float16, batch=1, heads=8, lengths=(4096, 4096), head_dim=128)
    check(4, q, k, v, Layout.split(4096, 4, zigzag=True), on_host=False, causal=True)
