"""Streams, graphs, devices, other libraries, and what is refused when the arrays are on a GPU."""

from __future__ import annotations

import re

import numpy as np
import pytest

import cudistr
from tests.gpu.util import cp, inputs, on_device, same_bits
from tests.strategies import BFLOAT16, DTYPES, random

pytestmark = pytest.mark.gpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_method = pytest.mark.parametrize("reduction", [None, cudistr.LSH(2)], ids=["exact", "G2"])


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


@pytest.fixture
def arrays():
    return [on_device(x) for x in inputs(0, np.float16, lengths=(150, 170))]


# Streams and graphs


@pytest.mark.hardware
@each_dtype
@each_method
@pytest.mark.parametrize("given_out", [False, True])
def test_a_captured_graph_replays(dtype, reduction, given_out):
    # A call that synchronised, or read from the device, would end the capture with an error.
    host = inputs(1, dtype, lengths=(150, 170))
    other = inputs(2, dtype, lengths=(150, 170))
    q, k, v = (on_device(x) for x in host)
    out = cp.empty_like(q) if given_out else None
    expected = [
        [
            cp.asnumpy(y)
            for y in cudistr.attention(*map(on_device, x), causal=True, reduction=reduction, return_lse=True)
        ]
        for x in (host, other)
    ]
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        # The first call compiles, and leaves in the stream's pool the memory that the captured one takes.
        cudistr.attention(q, k, v, causal=True, reduction=reduction, out=out, return_lse=True)
        stream.synchronize()
        stream.begin_capture()
        result, lse = cudistr.attention(q, k, v, causal=True, reduction=reduction, out=out, return_lse=True)
        graph = stream.end_capture()
        for values, (expected_out, expected_lse) in zip(
            (host, other, host), (*expected, expected[0]), strict=True
        ):
            for array, value in zip((q, k, v), values, strict=True):
                array.set(value, stream)
            graph.launch(stream)
            stream.synchronize()
            same_bits(result, expected_out)
            same_bits(lse, expected_lse)


@pytest.mark.hardware
@pytest.mark.parametrize("options", [{}, {"near": 40, "sinks": 8}], ids=str)
def test_a_captured_graph_keeps_its_scratch(options):
    # What a pool hands out after the capture must not be what the graph writes whenever it runs.
    reduction = cudistr.LSH(2, **options)
    host = inputs(7, np.float16, lengths=(150, 170))
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        q, k, v = (on_device(x) for x in host)
        expected = cp.asnumpy(cudistr.attention(q, k, v, reduction=reduction))
        stream.begin_capture()
        result = cudistr.attention(q, k, v, reduction=reduction)
        graph = stream.end_capture()
        sizes = [2**n for n in range(9, 20)] * 3
        others = [cp.full(size, 7, np.uint8) for size in sizes]
        graph.launch(stream)
        stream.synchronize()
        assert all(bool((x == 7).all()) for x in others)
        for x in others:
            x.fill(255)
        result.fill(0)
        graph.launch(stream)
        stream.synchronize()
        same_bits(result, expected)


@pytest.mark.hardware
def test_group_and_merge_can_be_captured(arrays):
    reduction = cudistr.LSH(2)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()

    def work():
        out, lse = cudistr.attention(*arrays, return_lse=True)
        return cudistr.merge([out, out], [lse, lse]), cudistr.group(arrays[0], reduction)

    with stream:
        expected = [cp.asnumpy(x) for x in work()]
        stream.begin_capture()
        results = work()
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    for result, value in zip(results, expected, strict=True):
        same_bits(result, value)


@pytest.mark.hardware
@each_method
def test_work_is_queued_on_the_current_stream(arrays, reduction):
    q, k, v = arrays
    expected = cp.asnumpy(cudistr.attention(q, k, v, reduction=reduction))
    late = cp.zeros_like(q)
    big = cp.ones((8192, 8192), cp.float32)
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(10):  # a while in which a kernel on any other stream would find late still zero
            big = big @ big
        late[...] = q
        out = cudistr.attention(late, k, v, reduction=reduction)
        assert not stream.done  # and the call did not wait for it
    stream.synchronize()
    same_bits(out, expected)


@pytest.mark.hardware
@each_method
def test_streams_do_not_disturb_each_other(reduction):
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(4)]
    sets = [[on_device(x) for x in inputs(seed, np.float16, lengths=(200, 300))] for seed in range(4)]
    expected = [cp.asnumpy(cudistr.attention(*x, reduction=reduction)) for x in sets]
    cp.cuda.Device().synchronize()
    for _ in range(5):
        outs = []
        for stream, inputs_of_one in zip(streams, sets, strict=True):
            with stream:
                outs.append(cudistr.attention(*inputs_of_one, reduction=reduction))
        cp.cuda.Device().synchronize()
        for out, value in zip(outs, expected, strict=True):
            same_bits(out, value)


def test_every_device_gives_the_same_bits(arrays):
    host = [cp.asnumpy(x) for x in arrays]
    current = cp.cuda.Device().id
    expected = cudistr.attention(*arrays, reduction=cudistr.LSH(2))
    for device in range(cp.cuda.runtime.getDeviceCount()):
        with cp.cuda.Device(device):
            there = [cp.asarray(x) for x in host]
        out = cudistr.attention(*there, reduction=cudistr.LSH(2))  # from whichever device is current
        assert out.device.id == device and cp.cuda.Device().id == current
        same_bits(out, expected)
        if device != current:
            with raises(
                ValueError, f"q, k and v must be on one device, got q on {current} and k on {device}"
            ):
                cudistr.attention(arrays[0], there[1], arrays[2])


# Refused on a GPU


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.complex64, np.uint8])
def test_dtypes(dtype):
    x = cp.ones((1, 1, 4, 16), dtype)
    with raises(
        TypeError, f"q must be float16, bfloat16, float32, got {np.dtype(dtype)}. Convert it with q.astype"
    ):
        cudistr.attention(x, x, x)
    with raises(TypeError, "q must be float16, bfloat16, float32"):
        cudistr.group(x, cudistr.LSH(2))
    lse = cp.zeros((1, 1, 4), np.float32)
    with raises(TypeError, "outs[0] must be float16, bfloat16, float32"):
        cudistr.merge([x], [lse])


@pytest.mark.hardware
def test_host_and_device_mixed(arrays):
    q, k, v = arrays
    with raises(TypeError, "arrays of different libraries are mixed (q: cupy, k: numpy, v: cupy)"):
        cudistr.attention(q, cp.asnumpy(k), v)
    with raises(TypeError, "arrays of different libraries are mixed (q: cupy, k: cupy, v: cupy, out: numpy)"):
        cudistr.attention(q, k, v, out=np.empty(q.shape, q.dtype))
    with raises(TypeError, "arrays of different libraries are mixed (outs[0]: cupy, lses[0]: numpy)"):
        cudistr.merge([q], [np.zeros(q.shape[:3], np.float32)])
    with raises(
        TypeError, "cudistr.reference takes NumPy arrays, got cupy.ndarray, cupy.ndarray, cupy.ndarray"
    ):
        cudistr.reference.attention(q, k, v)


def test_out(arrays):
    q, k, v = arrays
    with raises(ValueError, "out must not share memory with q"):
        cudistr.attention(q, k, v, out=q)
    with raises(ValueError, "out must not share memory with v"):
        cudistr.attention(q, k, v, out=v[:, :, ::-1][:, :, :150])
    with raises(
        ValueError, "out must have shape (batch, heads, seqlen_q, head_dim_v) = (2, 4, 150, 64), got"
    ):
        cudistr.attention(q, k, v, out=cp.empty((2, 4, 151, 64), np.float16))
    with raises(TypeError, "out must have dtype float16, got float32"):
        cudistr.attention(q, k, v, out=cp.empty(q.shape, np.float32))
    with raises(ValueError, "out: the last axis must be contiguous, got strides"):
        cudistr.attention(q, k, v, out=cp.empty((2, 4, 64, 150), np.float16).transpose(0, 1, 3, 2))
    with raises(ValueError, "out must not overlap itself, got strides"):
        cudistr.attention(q, k, v, out=cp.broadcast_to(cp.empty((1, 1, 150, 64), np.float16), q.shape))


@pytest.mark.parametrize("axes", [0, 1, 3, 5])
def test_rank(arrays, axes):
    q, k, v = arrays
    flat = cp.zeros((8,) * axes, np.float16)
    with raises(ValueError, f"q must have 4 axes (batch, heads, seqlen_q, head_dim), got {axes} with shape"):
        cudistr.attention(flat, k, v)
    with raises(
        ValueError, f"v must have 4 axes (batch, heads_kv, seqlen_k, head_dim_v), got {axes} with shape"
    ):
        cudistr.attention(q, k, flat)


def test_an_error_leaves_nothing_behind(arrays):
    q, k, v = arrays
    expected = cudistr.attention(q, k, v)
    with raises(ValueError, "k: head_dim must be that of q"):
        cudistr.attention(q, k[..., :32], v)
    same_bits(cudistr.attention(q, k, v), expected)


def test_inputs_are_left_alone(arrays):
    before = [cp.asnumpy(x) for x in arrays]
    cudistr.attention(*arrays, reduction=cudistr.LSH(2))
    for array, value in zip(arrays, before, strict=True):
        same_bits(array, value)


# Other libraries


@pytest.mark.hardware
@each_dtype
@each_method
def test_torch(dtype, reduction):
    torch = pytest.importorskip("torch")
    host = inputs(3, dtype, lengths=(150, 170))
    cupys = [on_device(x) for x in host]
    expected, expected_lse = cudistr.attention(*cupys, causal=True, reduction=reduction, return_lse=True)
    q, k, v = (torch.from_dlpack(x) for x in cupys)  # the same memory
    assert q.data_ptr() == cupys[0].data.ptr
    out, lse = cudistr.attention(q, k, v, causal=True, reduction=reduction, return_lse=True)
    assert isinstance(out, torch.Tensor) and out.dtype == q.dtype and out.device == q.device
    assert isinstance(lse, torch.Tensor) and lse.dtype == torch.float32
    same_bits(cp.from_dlpack(out), expected)
    same_bits(cp.from_dlpack(lse), expected_lse)
    target = torch.empty_like(q)
    assert cudistr.attention(q, k, v, causal=True, reduction=reduction, out=target) is target
    same_bits(cp.from_dlpack(target), expected)
    assert cudistr.group(q, cudistr.LSH(2)).dtype == torch.uint8
    assert isinstance(cudistr.merge([out, out], [lse, lse]), torch.Tensor)
    with raises(TypeError, "torch could not hand the array over through DLPack"):
        cudistr.attention(q.clone().requires_grad_(), k, v)
    with raises(TypeError, "must be all on one CUDA device or all on the host"):
        cudistr.attention(q, k.cpu(), v)


@pytest.mark.hardware
def test_torch_streams():
    torch = pytest.importorskip("torch")
    host = inputs(4, np.float16, lengths=(150, 170))
    q, k, v = (torch.from_dlpack(on_device(x)) for x in host)
    expected = cudistr.attention(*(on_device(x) for x in host))
    cp.cuda.Device().synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late, big = torch.zeros_like(q), torch.ones(8192, 8192, device="cuda")
        for _ in range(10):
            big = big @ big
        late.copy_(q)
        out = cudistr.attention(late, k, v)
    stream.synchronize()
    same_bits(cp.from_dlpack(out), expected)


@pytest.mark.hardware
@each_dtype
@each_method
def test_jax(dtype, reduction):
    jax = pytest.importorskip("jax")
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("jax has no CUDA backend")
    cupys = [on_device(x) for x in inputs(5, dtype, lengths=(150, 170))]
    expected, expected_lse = cudistr.attention(*cupys, causal=True, reduction=reduction, return_lse=True)
    arrays = [jax.dlpack.from_dlpack(x) for x in cupys]
    out, lse = cudistr.attention(*arrays, causal=True, reduction=reduction, return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array) and out.dtype == dtype
    same_bits(np.asarray(out), expected)
    same_bits(np.asarray(lse), expected_lse)


def test_bfloat16_is_the_ml_dtypes_one():
    x = on_device(random(0, 1, 1, 64, 16, dtype=BFLOAT16))
    assert cudistr.attention(x, x, x).dtype == BFLOAT16
