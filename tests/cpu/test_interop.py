"""Arrays of other libraries through DLPack, on the host: what comes in goes out, and memory is shared."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import cudistr
from tests.cpu.fakes import library
from tests.strategies import random

REDUCTION = cudistr.LSH(2)


@pytest.fixture
def inputs():
    return [random(seed, 1, 2, 9, 16) for seed in range(3)]


@pytest.fixture
def fake(monkeypatch):
    """Array class of a library with ``from_dlpack`` at its top level."""
    array = library(monkeypatch, "fakelib")
    sys.modules["fakelib"].from_dlpack = lambda x: array(np.from_dlpack(x))
    return array


def test_unknown_library_gets_its_arrays_back(fake, inputs):
    expected, expected_lse = cudistr.attention(*inputs, reduction=REDUCTION, return_lse=True)
    out, lse = cudistr.attention(*map(fake, inputs), reduction=REDUCTION, return_lse=True)
    assert type(out) is fake and type(lse) is fake
    np.testing.assert_array_equal(np.from_dlpack(out), expected)
    np.testing.assert_array_equal(np.from_dlpack(lse), expected_lse)
    permutations = cudistr.group(fake(inputs[0]), REDUCTION)
    assert type(permutations) is fake
    np.testing.assert_array_equal(np.from_dlpack(permutations), cudistr.group(inputs[0], REDUCTION))
    merged, total = cudistr.merge([out, out], [lse, lse], return_lse=True)
    assert type(merged) is fake and type(total) is fake
    np.testing.assert_allclose(np.from_dlpack(total), expected_lse + np.log(2), rtol=1e-6)


def test_out_of_an_unknown_library_is_written_in_place(fake, inputs):
    out = fake(np.full_like(inputs[0], np.nan))
    assert cudistr.attention(*map(fake, inputs), out=out) is out
    np.testing.assert_array_equal(out._values, cudistr.attention(*inputs))
    with pytest.raises(ValueError, match="out must not share memory with q"):
        cudistr.attention(*map(fake, inputs), out=fake(inputs[0]))


def test_views_keep_their_strides(fake, inputs):
    views = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in inputs]
    out = cudistr.attention(*map(fake, views))
    np.testing.assert_array_equal(out._values, cudistr.attention(*inputs))


def test_library_that_cannot_hand_an_array_over(fake, inputs):
    bad = fake(inputs[1], error=BufferError("it needs gradients"))
    with pytest.raises(TypeError, match="k: fakelib could not hand the array over through DLPack") as caught:
        cudistr.attention(fake(inputs[0]), bad, fake(inputs[2]))
    assert "(it needs gradients). Detach it (cudistr has no backward pass) or convert" in str(caught.value)


def test_library_that_keeps_from_dlpack_in_a_module_of_its_own(monkeypatch, inputs):
    array = library(monkeypatch, "tuckedlib")
    sys.modules["tuckedlib"].__path__ = []
    library(monkeypatch, "tuckedlib.dlpack")
    sys.modules["tuckedlib.dlpack"].from_dlpack = lambda x: array(np.from_dlpack(x))
    assert type(cudistr.attention(*map(array, inputs))) is array


def test_library_that_cannot_take_a_result_back(monkeypatch, inputs):
    array = library(monkeypatch, "onewaylib")
    with pytest.raises(TypeError, match=r"onewaylib has no from_dlpack.*Pass CuPy or NumPy arrays"):
        cudistr.attention(*map(array, inputs))


def test_cuda_array_interface_alone_is_no_array(inputs):
    class Old:
        shape = (1, 2, 9, 16)

        @property
        def __cuda_array_interface__(self):
            raise AssertionError("CuPy's predecessor protocol is not asked for")

    with pytest.raises(TypeError, match="q must be an array .*got .*Old"):
        cudistr.attention(Old(), *inputs[1:])


def test_jax(inputs):
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = [jax.numpy.asarray(x) for x in inputs]
        out, lse = cudistr.attention(*arrays, causal=True, return_lse=True)
        assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
        expected, expected_lse = cudistr.attention(*inputs, causal=True, return_lse=True)
        np.testing.assert_array_equal(np.asarray(out), expected)
        np.testing.assert_array_equal(np.asarray(lse), expected_lse)
        permutations = cudistr.group(arrays[0], REDUCTION)
        assert isinstance(permutations, jax.Array)
        assert isinstance(cudistr.merge([out, out], [lse, lse]), jax.Array)
        with pytest.raises(ValueError, match="out must be writable.*jax arrays never are"):
            cudistr.attention(*arrays, out=out)
        with pytest.raises(TypeError, match="bfloat16 cannot travel to NumPy through DLPack"):
            cudistr.attention(*(x.astype("bfloat16") for x in arrays))
        with pytest.raises(TypeError, match="different libraries are mixed .q: jax, k: numpy"):
            cudistr.attention(arrays[0], inputs[1], arrays[2])


def test_torch(inputs):
    torch = pytest.importorskip("torch")
    arrays = [torch.from_numpy(x) for x in inputs]
    out, lse = cudistr.attention(*arrays, causal=True, return_lse=True)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    expected, expected_lse = cudistr.attention(*inputs, causal=True, return_lse=True)
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(lse.numpy(), expected_lse)
    target = torch.full_like(arrays[0], torch.nan)
    assert cudistr.attention(*arrays, causal=True, out=target) is target
    np.testing.assert_array_equal(target.numpy(), expected)
    assert cudistr.group(arrays[0], REDUCTION).dtype == torch.uint8
    with pytest.raises(TypeError, match="q: torch could not hand the array over.*Detach it"):
        cudistr.attention(arrays[0].clone().requires_grad_(), *arrays[1:])
