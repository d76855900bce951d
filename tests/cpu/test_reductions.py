"""LSH and Energy as data: what they refuse, and that equal ones are equal."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from cudistr import LSH, Energy
from cudistr.reductions import projections


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0. Pass 1 (exact), 2"),
        ({"group_size": -2}, ValueError, "group_size must be at least 1, got -2"),
        ({"group_size": 2.0}, TypeError, "group_size must be an integer, got float 2.0. Pass 1 (exact)"),
        ({"group_size": True}, TypeError, "group_size must be an integer, got bool True"),
        ({"group_size": "2"}, TypeError, "group_size must be an integer, got str '2'"),
        ({"group_size": None}, TypeError, "group_size must be an integer, got NoneType None"),
        (
            {"block_q": 0},
            ValueError,
            "block_q must be a positive multiple of 64, at most 65536, got 0. Pass 64, or None for 128",
        ),
        (
            {"block_q": -64},
            ValueError,
            "block_q must be a positive multiple of 64, at most 65536, got -64. Pass 64",
        ),
        (
            {"block_q": 100},
            ValueError,
            "block_q must be a positive multiple of 64, at most 65536, got 100. Pass 64",
        ),
        ({"block_q": 2**40}, ValueError, "at most 65536, got 1099511627776. Pass 65536, or None for 128"),
        ({"block_q": 200}, ValueError, "got 200. Pass 192"),
        ({"block_q": 128.0}, TypeError, "block_q must be an integer, got float 128.0. Pass a multiple of 64"),
        ({"n_proj": 0}, ValueError, "n_proj must be from 1 to 16, got 0"),
        ({"n_proj": 17}, ValueError, "n_proj must be from 1 to 16, got 17. The default is 16"),
        ({"n_proj": "16"}, TypeError, "n_proj must be an integer, got str '16'. Pass 1 to 16"),
        ({"seed": -1}, ValueError, "seed must be from 0 to 2**32 - 1, got -1"),
        ({"seed": 2**32}, ValueError, "seed must be from 0 to 2**32 - 1, got 4294967296"),
        ({"seed": None}, TypeError, "seed must be an integer, got NoneType None"),
        (
            {"representative": "median"},
            ValueError,
            "representative must be 'sample', 'mean' or 'rank1', got 'median'",
        ),
        (
            {"near": -1},
            ValueError,
            "near must not be negative, got -1. Pass how many keys back from a query's own",
        ),
        ({"near": 2.0}, TypeError, "near must be an integer, got float 2.0. Pass how many keys back"),
        ({"sinks": -64}, ValueError, "sinks must not be negative, got -64. Pass how many of the first keys"),
        (
            {"sinks": None},
            TypeError,
            "sinks must be an integer, got NoneType None. Pass how many of the first",
        ),
        (
            {"representative": None},
            ValueError,
            "representative must be 'sample', 'mean' or 'rank1', got None",
        ),
    ],
)
def test_bad_parameters(arguments, error, text):
    with pytest.raises(error, match=re.escape("LSH: ")) as caught:
        LSH(**({"group_size": 2} | arguments))
    assert text in str(caught.value)


def test_defaults_print_and_compare_by_value():
    assert (
        repr(LSH(2))
        == "LSH(group_size=2, block_q=128, n_proj=16, seed=0, representative='sample', near=0, sinks=0)"
    )
    assert LSH(2) == LSH(group_size=np.int64(2), block_q=128, n_proj=np.uint8(16))
    assert hash(LSH(2)) == hash(LSH(2, block_q=128)) and LSH(2) != LSH(2, seed=1)
    assert LSH(2, near=np.int64(256)) == LSH(2, near=256) != LSH(2, sinks=256)
    assert type(LSH(np.int64(2)).group_size) is int


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"keep": 0},
            ValueError,
            "keep must be a positive multiple of 16 (columns of one matrix instruction), got 0",
        ),
        ({"keep": 40}, ValueError, "got 40. Pass 32."),
        ({"keep": -16}, ValueError, "got -16. Pass 16."),
        ({"keep": 32.0}, TypeError, "keep must be an integer, got float 32.0. Pass a multiple of 16, 32"),
        ({"keep": True}, TypeError, "keep must be an integer, got bool True"),
        ({"near": -1}, ValueError, "near must not be negative, got -1"),
        ({"sinks": 1.5}, TypeError, "sinks must be an integer, got float 1.5"),
        (
            {"block_q": 100},
            ValueError,
            "block_q must be a positive multiple of 64, at most 65536, got 100. Pass 64",
        ),
    ],
)
def test_bad_parameters_of_energy(arguments, error, text):
    with pytest.raises(error, match=re.escape("Energy: ")) as caught:
        Energy(**arguments)
    assert text in str(caught.value)


def test_equal_energies_are_equal():
    assert repr(Energy(48)) == "Energy(keep=48, near=256, sinks=64, block_q=128)"
    assert Energy() == Energy(np.int64(32), block_q=128) != Energy(near=0)
    assert hash(Energy()) == hash(Energy(32, 256, 64, 128))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LSH(2).group_size = 4  # type: ignore[misc]


def test_limits_are_allowed():
    reduction = LSH(256, block_q=64, n_proj=1, seed=2**32 - 1, representative="rank1")
    assert projections(reduction.n_proj, reduction.block_q, reduction.seed).shape == (1, 64)


def test_projections_follow_the_seed():
    assert not np.array_equal(projections(16, 128, 0), projections(16, 128, 1))
    drawn = np.random.RandomState(7).standard_normal((16, 128))
    assert np.abs(projections(16, 128, 7) - drawn).max() <= 1 / 128


def test_a_product_with_a_projection_is_exact_in_float32():
    steps = projections(16, 512, 3).astype(np.float64) * 128
    assert (steps % 2 == 1).all() and np.abs(steps).max() < 2**10


def test_a_pickle_has_the_hash_of_its_equal_in_another_process():
    code = (
        "import pickle, sys, cudistr; x = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "y = cudistr.LSH(4, representative='mean'); assert x == y; assert hash(x) == hash(y)"
    )
    pickled = pickle.dumps(LSH(4, representative="mean")).hex()
    for seed in ("1", "2"):  # of the hash of text
        environ = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, pickled], env=environ, check=True)
