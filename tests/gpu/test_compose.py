"""Calls that leave keys exact beside groups or columns kept by energy, against the float64 reference of the method."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cudistr
from cudistr import normalize, reference
from tests.gpu.util import check_kernel, cp, inputs, on_device, same_bits
from tests.strategies import DTYPES, LAYOUTS, cases

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (120, 90)}], ids=str)
@pytest.mark.parametrize("exact", [(40, 0), (0, 30), (40, 30), (1, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(200, 200), (130, 260), (260, 130)], ids=str)
def test_near_and_sinks(dtype, options, exact, lengths):
    q, k, v = inputs(41, dtype, batch=1, heads_kv=2, lengths=lengths)
    check_kernel(q, k, v, reduction=cudistr.LSH(2, near=exact[0], sinks=exact[1]), **options)


@each_dtype
@pytest.mark.parametrize(
    "options",
    [{"scale": -0.2}, {"softcap": 3.0, "causal": True}, {"scale": 0.0, "window": (60, None)}],
    ids=str,
)
def test_scores(dtype, options):
    q, k, v = inputs(42, dtype, heads_kv=2, lengths=(150, 170))
    check_kernel(q, k, v, reduction=cudistr.LSH(2, near=30, sinks=10), **options)


@pytest.mark.parametrize(("dtype", "causal"), [(np.float16, True), (np.float32, False)], ids=str)
@pytest.mark.parametrize(
    "reduction",
    [cudistr.LSH(2, representative="rank1", near=40, sinks=30), cudistr.Energy(32, near=40, sinks=30)],
    ids=["rank1", "energy"],
)
def test_weights_and_energy(dtype, causal, reduction):
    q, k, v = inputs(49, dtype, batch=1, heads_kv=2, lengths=(200, 260))
    k[:, :, :30] *= 4
    check_kernel(q, k, v, reduction=reduction, causal=causal)


REDUCTIONS = {
    "lsh2": cudistr.LSH(2),
    "lsh4 mean": cudistr.LSH(4, representative="mean"),
    "rank1": cudistr.LSH(2, representative="rank1"),
    "energy": cudistr.Energy(16),
}


@pytest.mark.parametrize(
    ("dtype", "family", "dims", "lengths"),
    [
        ("float16", "portable", (64, 64), (500, 1100)),
        ("bfloat16", "portable", (128, 128), (300, 900)),
        ("float32", "portable", (96, 40), (450, 700)),
        ("float16", "hopper", (64, 64), (500, 1100)),
        ("bfloat16", "hopper", (64, 64), (900, 900)),
        ("bfloat16", "hopper", (128, 128), (300, 900)),
        ("float16", "hopper", (128, 96), (400, 700)),
        ("float16", "hopper", (128, 128), (700, 300)),  # rows before the first key
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (330, 190)}], ids=str)
@pytest.mark.parametrize(("near", "sinks"), [(90, 70), (1, 0), (0, 9)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
def test_whole_blocks_of_exact_keys(
    dtype, family, dims, lengths, options, near, sinks, reduction, monkeypatch, whole_blocks
):
    monkeypatch.setenv("CUDISTR_KERNEL", family)
    shape = {"batch": 1, "heads": 2, "heads_kv": 1, "lengths": lengths}
    q, k, v = inputs(63, DTYPES[dtype], **shape, head_dim=dims[0], head_dim_v=dims[1])
    k[:, :, : max(sinks, 9)] *= 3
    options = options | {"reduction": dataclasses.replace(reduction, near=near, sinks=sinks)}
    assert normalize.problem(q, k, v, **options).exact_block != (1, 1)
    copied = family == "hopper" and reduction.by_keys
    out = cp.asnumpy(check_kernel(q, k, v, copied=copied, **options)).astype(np.float64)
    # A yardstick without these blocks would have errors too, and allow them.
    expected = reference.attention(q, k, v, **options)
    assert np.linalg.norm(out - expected) < 0.02 * np.linalg.norm(expected)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    q, k, v = inputs(43, dtype, batch=1, heads=2, lengths=(90, 100), head_dim_v=40)
    reduction = cudistr.LSH(2, near=20, sinks=7)
    check_kernel(q, k, v, reduction=reduction, layouts=(layout,) * 3, causal=True)


@settings(max_examples=40, derandomize=True)
@given(
    cases(
        head_dims=(64,),
        head_dims_v=(64,),
        methods=st.builds(
            cudistr.LSH, st.just(2), near=st.sampled_from([0, 1, 64, 100]), sinks=st.sampled_from([1, 9, 64])
        ),
        max_seqlen=300,
        min_rows=128,
    )
)
def test_any_case(case):
    check_kernel(*case.arrays, layouts=case.layouts, **case.options)


@each_dtype
def test_near_beyond_the_sequence_is_exact_to_the_bit(dtype):
    arrays = [on_device(x) for x in inputs(44, dtype)]
    expected = cudistr.attention(*arrays, causal=True, return_lse=True)
    for reduction in (cudistr.LSH(2, near=10**9), cudistr.LSH(2, sinks=203)):
        found = cudistr.attention(*arrays, causal=True, reduction=reduction, return_lse=True)
        for one, other in zip(found, expected, strict=True):
            same_bits(one, other)


def test_out_is_written_and_returned():
    q, k, v = inputs(45, np.float16, lengths=(70, 90))
    out = on_device(np.zeros((*q.shape[:3], v.shape[3]), np.float16), "transposed")
    check_kernel(q, k, v, out=out, reduction=cudistr.LSH(2, near=20, sinks=7), causal=True)


def test_without_keys_and_rows():
    q, k, v = (on_device(x) for x in inputs(46, np.float16, lengths=(5, 7)))
    reduction = cudistr.LSH(2, near=2, sinks=1)
    out, lse = cudistr.attention(q, k[:, :, :0], v[:, :, :0], reduction=reduction, return_lse=True)
    assert not out.any() and bool((lse == -np.inf).all())
    assert cudistr.attention(q[:, :, :0], k, v, reduction=reduction).shape == (2, 4, 0, 64)


@pytest.mark.hardware
@pytest.mark.parametrize(
    "reduction",
    [
        cudistr.LSH(2, near=64, sinks=16),
        cudistr.LSH(2, representative="rank1", near=64, sinks=16),
        cudistr.Energy(32, near=64, sinks=16),
        cudistr.Energy(32, near=0, sinks=0),
        cudistr.LowRank(32),
        cudistr.LowRank(32, near=64, sinks=16),
    ],
    ids=str,
)
def test_a_graph_captures_it(reduction):
    arrays = [on_device(x) for x in inputs(47, np.float16, lengths=(500, 500))]
    options = dict(causal=True, reduction=reduction)
    expected = cudistr.attention(*arrays, **options)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        # Leaves in the stream's pool the memory that the captured call takes.
        cudistr.attention(*arrays, **options)
        stream.synchronize()
        stream.begin_capture()
        out = cudistr.attention(*arrays, **options)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        same_bits(out, expected)


@pytest.mark.small
def test_small():
    q, k, v = inputs(48, np.float16, batch=1, heads=2, heads_kv=1, lengths=(161, 173))
    check_kernel(q, k, v, on_host=True, causal=True, reduction=cudistr.LSH(2, near=40, sinks=9))
