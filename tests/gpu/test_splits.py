"""Thread blocks of the portable kernel: those that share keys, query heads that share tiles, and their order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cudistr
from cudistr import launch, normalize
from cudistr.plan import Plan, plan
from tests.gpu.util import check_kernel, check_tf32, cp, inputs, on_device, same_bits, sections, splits
from tests.strategies import BFLOAT16, DTYPES, LAYOUTS, cases

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_method = pytest.mark.parametrize("reduction", [None, cudistr.LSH(2)], ids=["exact", "G2"])


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    """On Hopper too."""
    monkeypatch.setenv("CUDISTR_KERNEL", "portable")


def planned(q, k, v, **options) -> Plan:
    """The plan of a call."""
    arrays = [on_device(x) for x in (q, k, v)]
    return plan(normalize.problem(*arrays, **options), launch.device_properties(0))


@each_dtype
@each_method
@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.small)])
def test_large_tiles(dtype, reduction, count):
    # 203 keys are two to thirteen tiles: some of five thread blocks may find nothing.
    host = inputs(1, dtype, batch=1, heads=2, heads_kv=1)
    with splits(count):
        chosen = planned(*host, reduction=reduction)
        assert chosen.split is not None and chosen.split.splits == count
        check_kernel(*host, reduction=reduction, on_host=True)
        check_kernel(*host, reduction=reduction, on_host=True, causal=True)


@each_dtype
@each_method
@pytest.mark.parametrize("seqlen_q", [1, pytest.param(17, marks=pytest.mark.small)])
def test_few_queries(dtype, reduction, seqlen_q):
    host = inputs(2, dtype, batch=2, heads=4, heads_kv=2, lengths=(seqlen_q, 517))
    with splits(3):
        assert planned(*host, reduction=reduction).packed == (2 if reduction is None else 1)
        check_kernel(*host, reduction=reduction, on_host=True)
        check_kernel(*host, reduction=reduction, on_host=True, causal=True)


@each_method
@pytest.mark.parametrize(
    "options", [{"window": (30, 0)}, {"window": (100, 20)}, {"window": (10, None)}], ids=str
)
@pytest.mark.parametrize("lengths", [(300, 300), (40, 500), (200, 90)], ids=str)
def test_windows(reduction, options, lengths):
    # (200, 90): rows without keys in any thread block stay 0 and -inf, which check_kernel asserts.
    with splits(4):
        check_kernel(
            *inputs(3, np.float16, batch=1, heads=2, lengths=lengths), reduction=reduction, **options
        )


@each_method
@pytest.mark.parametrize("options", [{"softcap": 3.0, "causal": True}, {"scale": -0.2}], ids=str)
def test_scores(reduction, options):
    with splits(3):
        check_kernel(*inputs(4, np.float16), reduction=reduction, **options)
        check_kernel(*inputs(4, np.float16, lengths=(5, 203), heads_kv=2), reduction=reduction, **options)


@each_dtype
@each_method
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, reduction, layout):
    host = inputs(5, dtype, heads_kv=2, lengths=(70, 150), head_dim_v=40)
    with splits(2):
        check_kernel(*host, layouts=(layout,) * 3, reduction=reduction)


@each_dtype
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("lengths", [(1, 150), (9, 150)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "ragged", "reversed"])
def test_out(dtype, count, lengths, layout):
    q, k, v = inputs(6, dtype, heads_kv=1, lengths=lengths, head_dim_v=40)
    buffer, view = LAYOUTS[layout](np.zeros((2, 4, lengths[0], 40), dtype))
    target = cp.asarray(buffer)
    out = view(target)
    with splits(count):
        check_kernel(q, k, v, out=out, causal=True)
    view(buffer)[...] = cp.asnumpy(out)  # what lies between the rows of out is not touched
    same_bits(target, buffer)


# Query heads that share tiles


@each_dtype
@pytest.mark.parametrize("heads", [(8, 2), (6, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 2, 16, 32])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 3)}], ids=str)
def test_packed_heads(dtype, heads, seqlen_q, options):
    # Up to 224 rows: several tiles, whose borders are not those of heads.
    host = inputs(7, dtype, heads=heads[0], heads_kv=heads[1], lengths=(seqlen_q, 150))
    assert planned(*host, **options).packed == heads[0] // heads[1]
    check_kernel(*host, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_packed_heads_of_any_layout(layout, seqlen_q):
    host = inputs(8, np.float16, heads_kv=2, lengths=(seqlen_q, 150))
    check_kernel(*host, layouts=(layout,) * 3, causal=True)


def test_packed_heads_in_tf32(monkeypatch):
    monkeypatch.setenv("CUPY_TF32", "1")
    with splits(3):
        check_tf32(*inputs(9, np.float32, heads_kv=2, lengths=(6, 150)), causal=True)


@each_dtype
def test_packing_does_not_change_a_bit(dtype):
    # Sums are in the order of the keys, whichever tile a row lies in.
    q, k, v = (on_device(x) for x in inputs(10, dtype, heads_kv=2, lengths=(5, 300)))
    apart = [cp.ascontiguousarray(cp.repeat(x, 2, axis=1)) for x in (k, v)]
    for one, other in zip(
        cudistr.attention(q, k, v, causal=True, return_lse=True),
        cudistr.attention(q, *apart, causal=True, return_lse=True),
        strict=True,
    ):
        same_bits(one, other)


@pytest.mark.parametrize(
    "reduction", [None, cudistr.LSH(2), cudistr.LSH(4, near=40, sinks=9)], ids=["exact", "G2", "G4-kept"]
)
@pytest.mark.parametrize("count", [1, 3])
def test_the_order_of_tiles_does_not_change_a_bit(reduction, count):
    # Two tiles of queries of each of twelve heads, of which two have the same keys.
    host = inputs(12, BFLOAT16, batch=2, heads=6, heads_kv=3, lengths=(150, 203))
    arrays = [on_device(x) for x in host]

    def results(heads: int) -> tuple:
        with sections(heads), splits(count):
            chosen = planned(*host, causal=True, reduction=reduction)
            assert chosen.grid[1:] == (12 // heads, count)
            return cudistr.attention(*arrays, causal=True, reduction=reduction, return_lse=True)

    first = results(1)
    for heads in (2, 4, 12):
        for one, other in zip(results(heads), first, strict=True):
            same_bits(one, other)


# Laws


@settings(max_examples=60, derandomize=True)
@given(
    cases(
        head_dims=(64,), head_dims_v=(64,), methods=st.sampled_from([None, cudistr.LSH(2)]), max_seqlen=300
    ),
    st.integers(2, 9),
)
def test_shares_of_the_keys_are_the_whole(case, count):
    with splits(count):
        check_kernel(*case.arrays, layouts=case.layouts, **case.options)


@each_dtype
@each_method
def test_same_input_same_bits(dtype, reduction):
    arrays = [on_device(x) for x in inputs(11, dtype, heads_kv=2, lengths=(130, 300))]
    with splits(4):
        first = cudistr.attention(*arrays, reduction=reduction, return_lse=True)
        for one, other in zip(
            first, cudistr.attention(*arrays, reduction=reduction, return_lse=True), strict=True
        ):
            same_bits(one, other)


@each_method
def test_nan_stays_in_its_rows(reduction):
    q, k, v = inputs(12, np.float32, batch=1, heads=2, heads_kv=1, lengths=(6, 200))
    with splits(3):
        clean = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
        q[0, 1, 3] = np.nan
        out = cp.asnumpy(cudistr.attention(*map(on_device, (q, k, v))))
    assert np.isnan(out[0, 1, 3]).all()
    out[0, 1, 3] = clean[0, 1, 3]
    same_bits(out, clean)


# The plan, and graphs


@pytest.mark.hardware
@each_dtype
@each_method
def test_a_gpu_that_would_idle_is_filled(dtype, reduction):
    host = inputs(13, dtype, batch=1, heads=8, heads_kv=2, lengths=(1, 20000))
    chosen = planned(*host, reduction=reduction)
    assert (chosen.split is None) == (dtype == np.float32)
    check_kernel(*host, reduction=reduction)


@pytest.mark.hardware
@each_method
@pytest.mark.parametrize("given_out", [False, True])
def test_a_captured_graph_keeps_its_scratch(reduction, given_out):
    host = inputs(14, np.float16, batch=1, heads=4, heads_kv=2, lengths=(3, 5000))
    stream = cp.cuda.Stream(non_blocking=True)
    with splits(5), stream:
        q, k, v = (on_device(x) for x in host)
        out = cp.empty_like(q) if given_out else None
        expected = cp.asnumpy(cudistr.attention(q, k, v, reduction=reduction, out=out))
        stream.begin_capture()
        result = cudistr.attention(q, k, v, reduction=reduction, out=out)
        graph = stream.end_capture()
        others = [cp.full(2**n, 7, np.uint8) for n in range(9, 20)]
        for _ in range(2):
            result.fill(0)
            graph.launch(stream)
            stream.synchronize()
            same_bits(result, expected)
        assert all(bool((x == 7).all()) for x in others)
