"""What is refused, and with which words; what a Problem says about what is not."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

import cudistr
from cudistr import normalize, reference
from tests.cpu.fakes import DeviceArray, library
from tests.strategies import BFLOAT16, LAYOUTS, laid_out, random

Q, K, V = (2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 24)


def zeros(shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def raises(error, text):
    """pytest.raises that matches plain text."""
    return pytest.raises(error, match=re.escape(text))


# Arrays


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize(
    ("value", "kind"), [([1.0], "list"), (1.0, "float"), ("abc", "str"), (np.float32(1), "numpy.float32")]
)
def test_not_an_array(name, value, kind):
    arguments = {"q": zeros(Q), "k": zeros(K), "v": zeros(V)} | {name: value}
    with raises(
        TypeError, f"{name} must be an array (CuPy, NumPy, or any with __dlpack__, such as torch and jax)"
    ) as e:
        cudistr.attention(**arguments)
    assert f"got {kind}. Convert it, for example with cupy.asarray({name})" in str(e.value)


def test_none_is_no_array():
    with raises(TypeError, "k must be an array"):
        cudistr.attention(zeros(Q), None, zeros(V))


def test_libraries_mixed(monkeypatch):
    other = library(monkeypatch, "otherlib")
    with raises(
        TypeError, "arrays of different libraries are mixed (q: numpy, k: otherlib, v: numpy)"
    ) as caught:
        cudistr.attention(zeros(Q), other(zeros(K)), zeros(V))
    assert "Bring them to one library and one device" in str(caught.value)


def test_host_and_device_mixed(monkeypatch):
    on_device = library(monkeypatch, "cupylike")
    with raises(TypeError, "must be all on one CUDA device or all on the host") as caught:
        cudistr.attention(on_device(zeros(Q), device=(2, 0)), on_device(zeros(K)), on_device(zeros(V)))
    assert "{'q': (2, 0), 'k': (1, 0), 'v': (1, 0)}. Move them to one device" in str(caught.value)


def test_subclass_of_an_array():
    masked = np.ma.masked_array(zeros(K))
    with raises(TypeError, "k must be a plain array, got numpy.ma") as caught:
        cudistr.attention(zeros(Q), masked, zeros(V))
    assert "numpy.asarray" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.complex64, np.bool_, np.uint8])
def test_dtype_that_is_not_supported(dtype):
    with raises(
        TypeError, f"q must be float16, bfloat16, float32, got {np.dtype(dtype)}. Convert it with q.astype"
    ):
        cudistr.attention(zeros(Q, dtype), zeros(K, dtype), zeros(V, dtype))
    with raises(TypeError, "q must be float16, bfloat16, float32, got"):
        cudistr.group(zeros(Q, dtype), cudistr.LSH(2))


def test_reference_takes_float64_too():
    assert (
        reference.attention(zeros(Q, np.float64), zeros(K, np.float64), zeros(V, np.float64)).dtype
        == np.float64
    )
    with raises(TypeError, "q must be float16, bfloat16, float32, float64, got int64"):
        reference.attention(zeros(Q, int), zeros(K, int), zeros(V, int))


@pytest.mark.parametrize("name", ["k", "v"])
def test_dtypes_mixed(name):
    arguments = {"q": zeros(Q), "k": zeros(K), "v": zeros(V)}
    arguments[name] = arguments[name].astype(np.float16)
    with raises(
        TypeError,
        f"q, k and v must have one dtype, got q float32 and {name} float16. Convert with {name}.astype",
    ):
        cudistr.attention(**arguments)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("q", "(batch, heads, seqlen_q, head_dim)"),
        ("k", "(batch, heads_kv, seqlen_k, head_dim)"),
        ("v", "(batch, heads_kv, seqlen_k, head_dim_v)"),
    ],
)
@pytest.mark.parametrize("drop", [True, False])
def test_rank(name, layout, drop):
    arguments = {"q": zeros(Q), "k": zeros(K), "v": zeros(V)}
    arguments[name] = arguments[name][0] if drop else arguments[name][None]
    shape = arguments[name].shape
    with raises(
        ValueError, f"{name} must have 4 axes {layout}, got {len(shape)} with shape {shape}. Add the missing"
    ):
        cudistr.attention(**arguments)


def test_rank_zero():
    with raises(ValueError, "q must have 4 axes (batch, heads, seqlen_q, head_dim), got 0 with shape ()"):
        cudistr.attention(zeros(()), zeros(K), zeros(V))


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ((Q, (3, 2, 7, 16), V), "k: batch must be that of q, 2, got 3 (shape (3, 2, 7, 16))"),
        ((Q, K, (1, 2, 7, 24)), "v: batch must be that of q, 2, got 1 (shape (1, 2, 7, 24))"),
        ((Q, K, (2, 4, 7, 24)), "v must have the heads_kv and seqlen_k of k, (2, 7), got (4, 7)"),
        ((Q, K, (2, 2, 8, 24)), "v must have the heads_kv and seqlen_k of k, (2, 7), got (2, 8)"),
        ((Q, (2, 2, 7, 24), V), "k: head_dim must be that of q, 16, got 24"),
        (
            (Q, (2, 3, 7, 16), (2, 3, 7, 24)),
            "must be a multiple of heads of k and v (grouped-query attention), got 4 and 3",
        ),
        ((Q, (2, 8, 7, 16), (2, 8, 7, 24)), "got 4 and 8"),
        ((Q, (2, 0, 7, 16), (2, 0, 7, 24)), "got 4 and 0"),
        (
            ((2, 4, 5, 12), (2, 2, 7, 12), V),
            "head_dim must be a multiple of 8 from 8 to 256, got 12. Pad with zeros to 16",
        ),
        (
            ((2, 4, 5, 0), (2, 2, 7, 0), V),
            "head_dim must be a multiple of 8 from 8 to 256, got 0. Pad with zeros to 8",
        ),
        (
            ((2, 4, 5, 264), (2, 2, 7, 264), V),
            "head_dim must be a multiple of 8 from 8 to 256, got 264. Split the head",
        ),
        (
            (Q, K, (2, 2, 7, 25)),
            "head_dim_v must be a multiple of 8 from 8 to 256, got 25. Pad with zeros to 32",
        ),
        ((Q, K, (2, 2, 7, 512)), "head_dim_v must be a multiple of 8 from 8 to 256, got 512. Split the head"),
    ],
    ids=str,
)
def test_shapes(shapes, text):
    with raises(ValueError, text):
        cudistr.attention(*map(zeros, shapes))


@pytest.mark.parametrize("name", ["seqlen_q", "seqlen_k"])
def test_sequence_too_long(name):
    long = np.broadcast_to(np.float16(0), (1, 1, 2**31 - 1023, 8))
    short = zeros((1, 1, 4, 8), np.float16)
    q, k = (long, short) if name == "seqlen_q" else (short, long)
    text = f"{name} must be at most {2**31 - 1024}, got {2**31 - 1023}. Split it and use cudistr.merge"
    with raises(ValueError, text):
        cudistr.attention(q, k, k)
    if name == "seqlen_q":
        with raises(ValueError, f"seqlen_q must be at most {2**31 - 1024}, got {2**31 - 1023}"):
            cudistr.group(long, cudistr.LSH(1))


# Options


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"reduction": 2},
            TypeError,
            "reduction must be None (exact), a cudistr.LSH, a cudistr.Energy, a cudistr.LowRank or a cudistr.Projection, got int. Pass, for example",
        ),
        (
            {"reduction": cudistr.LSH},
            TypeError,
            "reduction must be None (exact), a cudistr.LSH, a cudistr.Energy, a cudistr.LowRank or a cudistr.Projection, got the class cudistr.reductions.LSH. Pass",
        ),
        (
            {"reduction": cudistr.LSH(3)},
            ValueError,
            "group_size must divide head_dim 16 into a multiple of 8 columns, got 3",
        ),
        ({"reduction": cudistr.LSH(4)}, ValueError, "columns, got 4. Allowed here: 1, 2."),
        (
            {"reduction": cudistr.Energy(32)},
            ValueError,
            "keep must be at most head_dim 16, got 32. Pass 16 or less.",
        ),
        ({"causal": 1}, TypeError, "causal must be True or False, got int 1"),
        ({"causal": "yes"}, TypeError, "causal must be True or False, got str 'yes'"),
        ({"causal": None}, TypeError, "causal must be True or False, got NoneType None"),
        (
            {"window": 5},
            TypeError,
            "window must be a pair (left, right), got 5. Pass (left, right): keys visible before",
        ),
        ({"window": (1,)}, TypeError, "window must be a pair (left, right), got (1,)"),
        ({"window": (1, 2, 3)}, TypeError, "window must be a pair (left, right), got (1, 2, 3)"),
        ({"window": "ab"}, TypeError, "window must be a pair (left, right), got 'ab'"),
        ({"window": (1.5, 0)}, TypeError, "window: left must be an integer or None, got float 1.5"),
        ({"window": (0, "1")}, TypeError, "window: right must be an integer or None, got str '1'"),
        ({"window": (True, 0)}, TypeError, "window: left must be an integer or None, got bool True"),
        ({"window": (-1, 0)}, ValueError, "window: left must not be negative, got -1"),
        ({"window": (0, -1)}, ValueError, "window: right must not be negative, got -1. Pass (left, right)"),
        (
            {"scale": "1"},
            TypeError,
            "scale must be a number (the factor on the scores, 1/sqrt(head_dim) if None), got str",
        ),
        ({"scale": True}, TypeError, "scale must be a number"),
        ({"scale": 1j}, TypeError, "scale must be a number"),
        (
            {"scale": math.nan},
            ValueError,
            "scale must be finite (the factor on the scores, 1/sqrt(head_dim) if None), got nan",
        ),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        (
            {"softcap": "30"},
            TypeError,
            "softcap must be a number (scores become softcap * tanh(scores / softcap), None",
        ),
        ({"softcap": math.inf}, ValueError, "softcap must be finite"),
        ({"softcap": 0}, ValueError, "softcap must be positive, got 0.0. Pass None for no cap"),
        ({"softcap": -3.0}, ValueError, "softcap must be positive, got -3.0"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_options(options, error, text):
    arrays = zeros(Q), zeros(K), zeros(V)
    for function in (cudistr.attention, reference.attention):
        with raises(error, text):
            function(*arrays, **options)


def test_kinds_of_numbers_that_are_welcome():
    problem = normalize.problem(
        zeros(Q),
        zeros(K),
        zeros(V),
        causal=np.bool_(True),
        window=[np.int64(3), None],
        scale=np.float32(0.5),
        softcap=7,
    )
    assert (problem.left, problem.right, problem.scale, problem.softcap) == (3, 0, 0.5, 7.0)
    assert [type(x) for x in (problem.left, problem.scale, problem.softcap)] == [int, float, float]


# Devices, with arrays that only claim to be on a GPU


@pytest.mark.parametrize("name", ["k", "v"])
def test_arrays_on_different_devices(name):
    arrays = {"q": zeros(Q), "k": zeros(K), "v": zeros(V)}
    devices = {x: DeviceArray(array, 3 if x == name else 1) for x, array in arrays.items()}
    text = (
        f"q, k and v must be on one device, got q on 1 and {name} on 3. Move {name} with cupy.asarray under"
    )
    with raises(ValueError, text):
        normalize.problem(**devices)


def test_out_on_another_device_or_host():
    q, k, v = DeviceArray(zeros(Q)), DeviceArray(zeros(K)), DeviceArray(zeros(V))
    problem = normalize.problem(q, k, v)
    assert problem.device == 0
    with raises(ValueError, "out must be on the device of q, 0, got 2"):
        normalize.check_out(DeviceArray(zeros(problem.out_shape), 2), problem, (q, k, v))
    with raises(TypeError, "out must be of the kind of q, tests.cpu.fakes.DeviceArray, got numpy.ndarray"):
        normalize.check_out(zeros(problem.out_shape), problem, (q, k, v))


def test_shards_on_different_devices():
    out, lse = zeros((1, 1, 2, 8)), zeros((1, 1, 2))
    outs = [DeviceArray(out, 0), DeviceArray(out, 1)]
    with raises(ValueError, "outs[1] must be on the device of outs[0], 0, got 1. Move it there first"):
        normalize.check_merge(outs, [DeviceArray(lse), DeviceArray(lse)])
    with raises(ValueError, "lses[0] must be on the device of outs[0], 0, got 1"):
        normalize.check_merge(outs[:1], [DeviceArray(lse, 1)])


def test_reference_takes_numpy_arrays_alone():
    q, k, v = zeros(Q), zeros(K), zeros(V)
    with raises(
        TypeError, "cudistr.reference takes NumPy arrays, got numpy.ndarray, tests.cpu.fakes.DeviceArray"
    ):
        reference.attention(q, DeviceArray(k), v)
    with raises(TypeError, "cudistr.reference takes NumPy arrays, got list"):
        reference.attention([1.0], k, v)
    with raises(TypeError, "cudistr.reference takes NumPy arrays, got list. Use cupy.asnumpy"):
        reference.group([1.0], cudistr.LSH(2))
    with raises(TypeError, "cudistr.reference takes NumPy arrays, got outs[0] list"):
        reference.merge([[1.0]], [zeros((1, 1, 2))])
    with raises(TypeError, "lses[0] must be of the kind of outs[0], numpy.ndarray, got list"):
        reference.merge([zeros((1, 1, 2, 8))], [[1.0]])


# out

OUT = (2, 4, 5, 24)


def test_out_of_another_kind():
    problem = normalize.problem(zeros(Q), zeros(K), zeros(V))
    with raises(TypeError, "out must be of the kind of q, numpy.ndarray, got list"):
        normalize.check_out([0.0], problem, (zeros(Q), zeros(K), zeros(V)))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, BFLOAT16, np.int32])
def test_out_dtype(dtype):
    with raises(TypeError, f"out must have dtype float32, got {np.dtype(dtype)}"):
        cudistr.attention(zeros(Q), zeros(K), zeros(V), out=zeros(OUT, dtype))
    with raises(TypeError, "out must have dtype float64, got float32"):
        reference.attention(zeros(Q), zeros(K), zeros(V), out=zeros(OUT))


@pytest.mark.parametrize("shape", [Q, (2, 4, 5), (1, *OUT), (4, 2, 5, 24), (2, 4, 6, 24)], ids=str)
def test_out_shape(shape):
    text = f"out must have shape (batch, heads, seqlen_q, head_dim_v) = (2, 4, 5, 24), got {shape}"
    with raises(ValueError, text):
        cudistr.attention(zeros(Q), zeros(K), zeros(V), out=zeros(shape))


def test_out_that_cannot_be_written():
    out = zeros(OUT)
    out.setflags(write=False)
    with raises(ValueError, "out must be writable, got a read-only array"):
        cudistr.attention(zeros(Q), zeros(K), zeros(V), out=out)
    out = zeros((2, 4, 24, 5)).transpose(0, 1, 3, 2)
    with raises(ValueError, "out: the last axis must be contiguous, got strides (1920, 480, 4, 20) bytes"):
        cudistr.attention(zeros(Q), zeros(K), zeros(V), out=out)


@pytest.mark.parametrize(
    "strides", [(0, 480, 96, 4), (1920, 480, 0, 4), (1920, 480, 92, 4), (96, 96, 192, 4)], ids=str
)
def test_out_that_overlaps_itself(strides):
    out = np.lib.stride_tricks.as_strided(zeros(4096), OUT, strides)
    with raises(ValueError, f"out must not overlap itself, got strides {strides} bytes"):
        cudistr.attention(zeros(Q), zeros(K), zeros(V), out=out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("backwards", [False, True])
def test_out_that_overlaps_an_input(name, backwards):
    shape = (1, 2, 4, 16)
    arrays = {x: zeros(shape) for x in ("q", "k", "v")}
    out = arrays[name][:, ::-1] if backwards else arrays[name]
    with raises(ValueError, f"out must not share memory with {name}: bytes 0x"):
        cudistr.attention(**arrays, out=out)
    # The last byte of one in the first of the other is enough; side by side is fine.
    buffer = zeros(2 * 128)
    arrays[name] = buffer[:128].reshape(shape)
    with raises(ValueError, f"out must not share memory with {name}"):
        cudistr.attention(**arrays, out=buffer[127:255].reshape(shape))
    cudistr.attention(**arrays, out=buffer[128:].reshape(shape))


def test_empty_out_overlaps_nothing():
    buffer = zeros((1, 1, 8, 16))
    q, out = buffer[:, :, 4:4], buffer[:, :, 5:5]
    assert cudistr.attention(q, buffer, buffer, out=out) is out
    full = zeros((1, 1, 4, 16))
    k = full[:, :, 2:2]
    assert (cudistr.attention(zeros((1, 1, 4, 16)), k, k, out=full) == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "shifted", "ragged", "reversed"])
def test_out_layouts_that_are_welcome(layout):
    q, k, v = random(0, *Q), random(1, *K), random(2, *V)
    out = laid_out(zeros(OUT), layout)
    assert cudistr.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, cudistr.attention(q, k, v))


# group and merge


def test_group_arguments():
    for function in (cudistr.group, reference.group):
        with raises(
            TypeError,
            "reduction must be a cudistr.LSH or a cudistr.Energy, got NoneType. Pass, for example, cudistr.LSH(group_size=2)",
        ):
            function(zeros(Q), None)
        with raises(
            ValueError, "q must have 4 axes (batch, heads, seqlen_q, head_dim), got 2 with shape (5, 16)"
        ):
            function(zeros((5, 16)), cudistr.LSH(2))
        with raises(
            ValueError, "head_dim must be a multiple of 8 from 8 to 256, got 20. Pad with zeros to 24"
        ):
            function(zeros((1, 1, 5, 20)), cudistr.LSH(2))
        with raises(
            ValueError,
            "group_size must divide head_dim 48 into a multiple of 8 columns, got 4. Allowed here: 1, 2, 3, 6.",
        ):
            function(zeros((1, 1, 5, 48)), cudistr.LSH(4))
        energy = cudistr.Energy(16)
        for by_keys in (energy, cudistr.LSH(2, representative="rank1")):
            with raises(TypeError, "k must be given for a cudistr.Energy and for representative='rank1'"):
                function(zeros((1, 1, 5, 32)), by_keys)
        with raises(TypeError, "k must be None for this cudistr.LSH"):
            function(zeros((1, 1, 5, 32)), cudistr.LSH(2), zeros((1, 1, 5, 32)))
        with raises(ValueError, "keep must be at most head_dim 8, got 16. This head_dim has too few columns"):
            function(zeros((1, 1, 5, 8)), energy, zeros((1, 1, 5, 8)))
        with raises(ValueError, "k must have 4 axes (batch, heads, seqlen_k, head_dim), got 2"):
            function(zeros((1, 1, 5, 32)), energy, zeros((5, 32)))
        with raises(ValueError, "k: head_dim must be that of q, 32, got 48"):
            function(zeros((1, 1, 5, 32)), energy, zeros((1, 1, 5, 48)))
        with raises(ValueError, "heads of q must be a multiple of heads of k"):
            function(zeros((1, 3, 5, 32)), energy, zeros((1, 2, 5, 32)))
    with raises(TypeError, "q must be an array"):
        cudistr.group([[1.0]], cudistr.LSH(2))


@pytest.mark.parametrize(
    ("outs", "lses", "error", "text"),
    [
        (
            [],
            [],
            ValueError,
            "outs and lses must be lists of one length, at least 1, got 0 and 0. Pass what attention",
        ),
        (
            [(1, 1, 2, 8)],
            [],
            ValueError,
            "outs and lses must be lists of one length, at least 1, got 1 and 0",
        ),
        (
            [(1, 1, 2, 8)] * 33,
            [(1, 1, 2)] * 33,
            ValueError,
            "at most 32 shards are merged at once, got 33. Merge in two",
        ),
        (
            [(1, 2, 8)],
            [(1, 2)],
            ValueError,
            "outs[0] must have 4 axes (batch, heads, seqlen_q, head_dim_v), got 3 with",
        ),
        (
            [(1, 1, 2, 8), (1, 1, 3, 8)],
            [(1, 1, 2)] * 2,
            ValueError,
            "outs must have one shape, got (1, 1, 2, 8) and outs[1] (1, 1, 3, 8)",
        ),
        (
            [(1, 1, 2, 8)] * 2,
            [(1, 1, 2), (1, 1, 2, 1)],
            ValueError,
            "lses[1] must have shape (batch, heads, seqlen_q) = (1, 1, 2), got (1, 1, 2, 1)",
        ),
    ],
    ids=lambda x: str(x)[:30],
)
def test_merge_shapes(outs, lses, error, text):
    for function in (cudistr.merge, reference.merge):
        with raises(error, text):
            function([zeros(x) for x in outs], [zeros(x) for x in lses])


def test_merge_dtypes():
    out, lse = zeros((1, 1, 2, 8)), zeros((1, 1, 2))
    for function in (cudistr.merge, reference.merge):
        with raises(TypeError, "outs must have one dtype, got float32 and outs[1] float16"):
            function([out, out.astype(np.float16)], [lse, lse])
        with raises(TypeError, "lses[0] must be float32, as attention returns it, got float16"):
            function([out], [lse.astype(np.float16)])
    with raises(TypeError, "outs[0] must be float16, bfloat16, float32, got float64"):
        cudistr.merge([out.astype(np.float64)], [lse])
    with raises(TypeError, "lses[0] must be float32, as attention returns it, got float64"):
        cudistr.merge([out], [lse.astype(np.float64)])
    with raises(TypeError, "lses[0] must be an array"):
        cudistr.merge([out], [[0.0]])


# What a Problem says


def test_problem_is_frozen_hashable_and_printable():
    problem = normalize.problem(zeros(Q), zeros(K), zeros(V))
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.batch = 3  # type: ignore[misc]
    same = normalize.problem(zeros(Q), zeros(K), zeros(V))
    assert problem == dataclasses.replace(same, aligned=problem.aligned) and hash(problem) is not None
    assert "heads_kv=2" in repr(problem) and "dtype='float32'" in repr(problem)
    assert problem.out_shape == OUT and not problem.empty and problem.scale == 0.25


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({}, (None, None)),
        ({"causal": True}, (None, 0)),
        ({"window": (3, 2)}, (3, 2)),
        ({"window": (3, 2), "causal": True}, (3, 0)),
        ({"window": (None, 2)}, (None, 2)),
        ({"window": (12, 12)}, (None, None)),  # seqlen_q + seqlen_k = 12: no key is that far away
        ({"window": (11, 11)}, (11, 11)),
        ({"window": (2**40, None)}, (None, None)),
    ],
    ids=str,
)
def test_mask_bounds(options, bounds):
    problem = normalize.problem(zeros(Q), zeros(K), zeros(V), **options)
    assert (problem.left, problem.right) == bounds


def test_group_size_one_is_no_reduction():
    problem = normalize.problem(zeros(Q), zeros(K), zeros(V), reduction=cudistr.LSH(1, block_q=64))
    assert problem.reduction is None


@pytest.mark.parametrize(
    ("layout", "strides", "aligned"),
    [
        ("contiguous", (384, 128, 16), True),
        ("transposed", (384, 16, 48), True),
        ("sliced", (5 * 19 * 32, 19 * 32, 64), True),
        ("shifted", (384, 128, 16), False),
        ("ragged", (3 * 8 * 17, 8 * 17, 17), False),
        ("reversed", (-384, -128, -16), True),
    ],
)
def test_strides_are_in_elements(layout, strides, aligned):
    plain = zeros((2, 3, 8, 16))  # NumPy's allocations start at multiples of 16 bytes
    arrays = [DeviceArray(x) for x in (laid_out(plain, layout), plain, plain)]
    problem = normalize.problem(*arrays)
    assert problem.q_strides == strides and problem.k_strides == (384, 128, 16)
    assert problem.aligned is aligned
    for name in ("k", "v"):
        first, *others = arrays
        arrays = [*others, first]  # one unaligned array is enough, whichever it is
        assert normalize.problem(*arrays).aligned is aligned, name


@pytest.mark.parametrize(("value", "wanted"), [(None, False), ("0", False), ("", False), ("1", True)])
def test_tf32_is_asked_for_as_cupy_asks(monkeypatch, value, wanted):
    monkeypatch.delenv("CUPY_TF32", raising=False)
    if value is not None:
        monkeypatch.setenv("CUPY_TF32", value)
    assert normalize.problem(zeros(Q), zeros(K), zeros(V)).tf32 is wanted
    half = (zeros(shape, np.float16) for shape in (Q, K, V))
    assert normalize.problem(*half).tf32 is False  # it is a matter of float32 alone


@pytest.mark.parametrize("value", [None, "", "portable", "hopper"])
def test_a_family_of_kernels_can_be_asked_for(monkeypatch, value):
    monkeypatch.delenv("CUDISTR_KERNEL", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDISTR_KERNEL", value)
    on_device = [DeviceArray(zeros(shape)) for shape in (Q, K, V)]
    assert normalize.problem(*on_device).family == (value or None)
    assert normalize.problem(zeros(Q), zeros(K), zeros(V)).family is None  # NumPy arrays meet no kernel


def test_a_family_of_kernels_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("CUDISTR_KERNEL", "fast")
    text = "the environment variable CUDISTR_KERNEL must be one of portable, hopper, got 'fast'. Unset it"
    with raises(ValueError, text):
        normalize.problem(*(DeviceArray(zeros(shape)) for shape in (Q, K, V)))


def test_strides_that_split_elements():
    # A field of a structured array on a GPU; NumPy copes with it.
    odd = DeviceArray(zeros(K))
    odd.strides = (odd.strides[0], odd.strides[1], 66, 4)
    arguments = {"q": DeviceArray(zeros(Q)), "k": DeviceArray(zeros(K)), "v": DeviceArray(zeros(V))}
    for name in ("k", "v"):
        with raises(
            ValueError, f"{name}: strides must be multiples of the item size, 4 bytes, got (896, 448, 66, 4)"
        ):
            normalize.problem(**(arguments | {"v": DeviceArray(zeros(K)), name: odd}))
    host = np.zeros((1, 1, 7, 16), np.dtype([("a", np.float32), ("b", np.int8)]))["a"]
    assert normalize.problem(host, host, host).seqlen_q == 7


def test_strides_of_axes_of_length_one_say_nothing():
    q = zeros((1, 3, 1, 16))[:, ::2]
    problem = normalize.problem(q, zeros((1, 1, 9, 16)), zeros((1, 1, 9, 16)))
    assert problem.q_strides == (0, 32, 0) and problem.k_strides == (0, 0, 16)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_problems(shape):
    b, h, n, m = shape
    problem = normalize.problem(zeros((b, h, n, 8)), zeros((b, h, m, 8)), zeros((b, h, m, 8)))
    assert problem.empty


def test_every_layout_of_the_tests_is_taken():
    for layout in LAYOUTS:
        normalize.problem(*(laid_out(zeros((2, 2, 5, 16)), layout) for _ in range(3)))
