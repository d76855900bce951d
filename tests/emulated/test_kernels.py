"""Every kernel of the grid on the emulated device, against the float64 reference of the same method."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import cudistr
from cudistr import compiler, compose, launch, normalize, reference
from cudistr import plan as planner
from cudistr.normalize import Problem
from cudistr.plan import Device, Kernel
from tests import grid
from tests.emulation.fake_cupy import Settings, statistics
from tests.gpu import util
from tests.gpu.test_lowrank import check_found
from tests.strategies import BFLOAT16, random

MASKS: tuple[dict[str, Any], ...] = ({"causal": True}, {"window": (150, 20)}, {})


def attention_variants() -> dict[Kernel, tuple[str, Problem, int]]:
    """Every attention kernel that the planner names for the grid on any device, once: name, problem, capability."""
    found: dict[Kernel, tuple[str, Problem, int]] = {}
    for capability, device in grid.DEVICES.items():
        families = (("portable", grid.problems()), ("hopper", grid.hopper_problems()))
        for family, problems in families:
            for name, problem in problems:
                asked = dataclasses.replace(problem, family=family)
                kernel, _ = planner.attention_kernel(asked, device)
                if kernel.specific == (family == "hopper"):
                    found.setdefault(kernel, (f"{family} {name} sm_{capability}", asked, capability))
    return found


def other_variants(kind: str) -> dict[str, Kernel]:
    """The kernels of the grid that are the same for all devices."""
    found = grid.kernels(80)
    return {name: kernel for name, kernel in found.items() if kernel.name == kind}


ATTENTION = attention_variants()
PREPARE = other_variants("smxx_lsh_prepare")
WEIGHTS = other_variants("smxx_lsh_weights")
KEY_ENERGY = other_variants("smxx_key_energy")
ENERGY_ORDER = other_variants("smxx_energy_order")
COPIED_QUERIES = other_variants("smxx_copied_queries")
MERGE = other_variants("smxx_merge")
PROJECT = other_variants("smxx_project")
LOWRANK = {kind: other_variants(f"smxx_lowrank_{kind}") for kind in ("rows", "sums")}
DRAW = other_variants("smxx_draw")
PROBE = other_variants("smxx_probe")
DECIDE = other_variants("smxx_decide")
MERGE_SHARD = other_variants("smxx_merge_shard")
MERGE_SPLITS = other_variants("smxx_merge_splits")


def split_variants() -> dict[Kernel, tuple[str, Problem, int]]:
    """The same for large tiles whose thread blocks share keys."""
    found: dict[Kernel, tuple[str, Problem, int]] = {}
    for capability, device in grid.DEVICES.items():
        for name, problem in grid.split_problems():
            asked = dataclasses.replace(problem, family="portable")
            kernel, _ = planner.portable_kernel(asked, device, share_keys=True)
            found.setdefault(kernel, (f"{name} sm_{capability}", asked, capability))
    return found


SPLIT = split_variants()


def factors_variants() -> dict[Kernel, tuple[str, int]]:
    """Every kernel that finds factors on any device, once: name, capability. Shared memory decides which."""
    found: dict[Kernel, tuple[str, int]] = {}
    for capability in grid.DEVICES:
        for name, kernel in grid.kernels(capability).items():
            if kernel.name == "smxx_lowrank_factors":
                found.setdefault(kernel, (f"{name} sm_{capability}", capability))
    return found


FACTORS = factors_variants()


def use(device: Device) -> None:
    Settings.capability, Settings.shared_bytes = device.capability, device.shared_bytes


def test_the_suite_is_the_grid() -> None:
    kernels = {
        *ATTENTION,
        *SPLIT,
        *PREPARE.values(),
        *WEIGHTS.values(),
        *KEY_ENERGY.values(),
        *ENERGY_ORDER.values(),
        *COPIED_QUERIES.values(),
        *MERGE.values(),
        *MERGE_SHARD.values(),
        *MERGE_SPLITS.values(),
        *PROJECT.values(),
        *(kernel for kinds in LOWRANK.values() for kernel in kinds.values()),
        *FACTORS,
        *DRAW.values(),
        *PROBE.values(),
        *DECIDE.values(),
    }
    for capability in grid.DEVICES:
        assert set(grid.kernels(capability).values()) <= kernels


def reduction(problem: Problem, q: Any, k: Any) -> Any:
    """One for which the planner takes the kernel of a problem."""
    if problem.ranked is None:
        if problem.reduction is None:
            return None
        return dataclasses.replace(problem.reduction, near=problem.near, sinks=problem.sinks)
    if problem.ranked.copied:
        return cudistr.Energy(16, near=40, sinks=9)
    rank, alone = problem.ranked.columns, problem.ranked.alike and not problem.near
    # Beside a head that is exact one of a rank, beside exact keys two.
    other = problem.head_dim if alone else rank if problem.ranked.alike else rank // 2
    reduced = util.of_ranks(q, k, rank, other)
    return reduced if alone else reduced.with_near(40, sinks=9)


@pytest.mark.parametrize(
    ("number", "kernel"), list(enumerate(ATTENTION)), ids=[name for name, *_ in ATTENTION.values()]
)
def test_attention(
    number: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Two tiles of queries and two of keys, or more, the last ones short; two heads that share their keys.
    _, problem, capability = ATTENTION[kernel]
    if problem.exact_block != (1, 1):
        request.getfixturevalue("whole_blocks")
    use(grid.DEVICES[capability])
    assert problem.family is not None
    monkeypatch.setenv("CUDISTR_KERNEL", problem.family)
    _, tile = planner.attention_kernel(problem, grid.DEVICES[capability])
    seqlen_q = problem.seqlen_q if problem.seqlen_q <= planner.SMALL_SEQLEN_Q else tile.block_m + 37
    if kernel.specific:  # lengths for which the planner takes this tile of two
        seqlen_k = 520 if problem.right is None else 250
    else:
        seqlen_k = tile.tile_k * (1 if tile.tile_k > 64 else 2) + 29
    if problem.exact_block != (1, 1):
        seqlen_k = 900  # else all of them are exact
    q, k, v = util.inputs(
        number,
        grid.DTYPES[problem.dtype],
        batch=1,
        heads=2,
        heads_kv=1 if problem.ranked is None else 2,
        lengths=(seqlen_q, seqlen_k),
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
    )
    layout = "transposed" if problem.aligned else "ragged"
    masks = MASKS
    if kernel.specific:  # whose tile depends on whether there is a mask
        masks = MASKS[2:] if problem.right is None else MASKS[:2]
    options = {
        **masks[number % len(masks)],
        "reduction": reduction(problem, q, k),
        "softcap": problem.softcap,
    }
    options["copied"] = problem.ranked is not None and problem.ranked.copied
    with util.large_float32_tiles() if problem.batch > 1 else nullcontext():
        if problem.tf32:
            monkeypatch.setenv("CUPY_TF32", "1")
            del options["copied"]
            util.check_tf32(q, k, v, layout, **options)
        else:
            util.check_kernel(q, k, v, layouts=(layout,) * 3, on_host=True, **options)
    assert (kernel, 0) in compiler._functions  # it was this one that ran
    assert statistics.counts["multiplications"] > 0
    assert statistics.counts["matrix_load_conflicts"] == 0  # what the pitch of shared tiles is for


@pytest.mark.parametrize(
    ("number", "kernel"), list(enumerate(SPLIT)), ids=[name for name, *_ in SPLIT.values()]
)
def test_shared_keys(number: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, problem, capability = SPLIT[kernel]
    use(grid.DEVICES[capability])
    monkeypatch.setenv("CUDISTR_KERNEL", "portable")
    dtype, d, dv = grid.DTYPES[problem.dtype], problem.head_dim, problem.head_dim_v
    heads = 1 if problem.ranked is None else 2
    shape = {"batch": 1, "heads": heads, "heads_kv": heads, "lengths": (161, 173)}
    q, k, v = util.inputs(number, dtype, **shape, head_dim=d, head_dim_v=dv)
    with util.splits(2):
        options = {"reduction": reduction(problem, q, k), **MASKS[number % len(MASKS)]}
        util.check_kernel(q, k, v, on_host=True, **options)
    assert (kernel, 0) in compiler._functions


@pytest.mark.parametrize("kernel", MERGE_SPLITS.values(), ids=MERGE_SPLITS)
@pytest.mark.parametrize("seqlen_q", [1, 70])
def test_merge_splits(kernel: Kernel, seqlen_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDISTR_KERNEL", "portable")
    constants = dict(kernel.constants)
    dtype = list(grid.DTYPES.values())[constants["DTYPE"]]
    q, k, v = util.inputs(
        1, dtype, heads=2, lengths=(seqlen_q, 100), head_dim=32, head_dim_v=constants["HEAD_DIM_V"]
    )
    with util.splits(3):
        util.check_kernel(q, k, v, on_host=True)
    assert (kernel, 0) in compiler._functions


@pytest.mark.parametrize("kernel", PREPARE.values(), ids=PREPARE)
def test_prepare(kernel: Kernel) -> None:
    # Both tasks by themselves: not every head_dim has a group size with which attention would call for them.
    constants = dict(kernel.constants)
    head_dim = constants["HEAD_DIM"]
    dtype = np.dtype(list(grid.DTYPES.values())[constants["DTYPE"]])
    layout = "transposed" if constants["ALIGNED"] else "ragged"
    reduction = cudistr.LSH(1, representative="rank1" if constants["SIGNED"] else "sample")
    q = random(1, 1, 2, 161, head_dim, dtype=dtype)
    k = random(2, 2, 1, 77, head_dim, dtype=dtype)
    on_device = util.on_device(q, layout)
    keys = util.on_device(k, layout)
    of_keys = (keys[:1], k[:1]) if reduction.by_keys else (None, None)
    permutation = cudistr.group(on_device, reduction, of_keys[0])
    util.same_bits(permutation, reference.group(q, reduction, of_keys[1]))

    chosen = planner.prepare(2, 1, 0, head_dim, 128, (1, 77))
    strides = launch.row_strides(keys.shape, keys.strides, keys.itemsize)
    more = {
        **dict(zip(("k_batch", "k_head", "k_row"), strides, strict=True)), "heads_kv": 1, "seqlen_k": 77,
    }  # fmt: skip
    half = constants["HALF"]
    again = planner.Step(kernel, 3) if half else None
    if half:
        more |= {"limit": 1e3}
    first, second, vectors = launch._prepare_launch(
        kernel, chosen, (1, 0), (0, 0, 0), reduction, 0, more, again
    )
    run = second if half == 2 else first
    assert run is not None
    stored = np.dtype(np.float16) if half == 1 else dtype
    transposed = util.cp.ndarray((2, 1, head_dim, 80), stored)
    given = [x.data.ptr for x in (on_device, vectors, permutation, keys, transposed)]
    expected = np.zeros(transposed.shape, stored)
    if half == 2:  # runs if it was told to
        transposed.fill(0)
        told = util.on_device(np.zeros(1, np.int32), "contiguous")
        run(*given, told.data.ptr)
        util.same_bits(transposed, expected)
    wide = util.on_device(np.full(1, half == 2, np.int32), "contiguous")
    run(*given, *([wide.data.ptr] if half else []))
    expected[..., :77] = k.swapaxes(2, 3).astype(np.float32).astype(stored)
    util.same_bits(transposed, expected)
    if half == 1:
        assert int(wide[0]) == 0
        keys[1, 0, 76, head_dim - 1] = dtype.type(-1008)
        run(*given, wide.data.ptr)
        assert int(wide[0]) == 1
    assert (kernel, 0) in compiler._functions


def test_prepare_tells_of_large_queries() -> None:
    kernel = PREPARE["smxx_lsh_prepare bfloat16 64 half"]
    q, k = (random(i, 1, 2, 161, 64, dtype=BFLOAT16) for i in (1, 2))
    for place, told in (((0, 0, 0, 0), 2), ((0, 1, 160, 63), 1)):
        large = q.copy()
        large[place] = 1e5
        if told == 2:
            large[0, 1, 5, 5] = -1e6
        on_device, keys = (util.on_device(x, "contiguous") for x in (large, k))
        chosen = planner.prepare(1, 2, 161, 64, 128, (2, 161))
        strides = launch.row_strides(keys.shape, keys.strides, keys.itemsize)
        more: dict[str, Any] = {
            **dict(zip(("k_batch", "k_head", "k_row"), strides, strict=True)), "heads_kv": 2, "seqlen_k": 161,
            "limit": 5e4,
        }  # fmt: skip
        run, _, vectors = launch._prepare_launch(
            kernel, chosen, (2, 161), strides, cudistr.LSH(4), 0, more, planner.Step(kernel, 1)
        )
        permutation = util.cp.ndarray((1, 2, 2, 64), np.uint8)
        transposed = util.cp.ndarray((1, 2, 64, 168), np.float16)
        wide = util.on_device(np.zeros(1, np.int32), "contiguous")
        run(*(x.data.ptr for x in (on_device, vectors, permutation, keys, transposed, wide)))
        assert int(wide[0]) == told
        util.same_bits(permutation, reference.group(large, cudistr.LSH(4)))


@pytest.mark.parametrize("kernel", [*WEIGHTS.values(), *ENERGY_ORDER.values()], ids=[*WEIGHTS, *ENERGY_ORDER])
def test_columns(kernel: Kernel) -> None:
    # Two heads that share their keys, two blocks, the last one short; of keys two spans.
    constants = dict(kernel.constants)
    dtype = np.dtype(list(grid.DTYPES.values())[constants["DTYPE"]])
    q = random(1, 1, 2, 161, constants["HEAD_DIM"], dtype=dtype)
    k = random(2, 1, 1, 277, constants["HEAD_DIM"], dtype=dtype)
    reduction: cudistr.LSH | cudistr.Energy = cudistr.Energy(16)
    if "GROUP" in constants:
        reduction = cudistr.LSH(constants["GROUP"], representative="rank1")
    layout = "transposed" if constants.get("ALIGNED") else "ragged"
    found = launch.columns(util.on_device(q, layout), util.on_device(k, "ragged"), reduction, None)
    for one, other in zip(found, reference.solve_columns(q, reduction, k), strict=True):
        util.same_bits(one, other)
    assert (kernel, 0) in compiler._functions
    if kernel in ENERGY_ORDER.values():
        sums = planner.key_energy(dtype.name, constants["HEAD_DIM"], 1, 277).kernel
        assert sums in KEY_ENERGY.values() and (sums, 0) in compiler._functions


@pytest.mark.parametrize("kernel", COPIED_QUERIES.values(), ids=COPIED_QUERIES)
@pytest.mark.parametrize("block_q", [64, 256])
def test_copied_queries(kernel: Kernel, block_q: int) -> None:
    constants = dict(kernel.constants)
    dtype = np.dtype(list(grid.DTYPES.values())[constants["DTYPE"]])
    q = random(1, 2, 2, 161, constants["HEAD_DIM"], dtype=dtype)
    k = random(2, 2, 1, 277, constants["HEAD_DIM"], dtype=dtype)
    options = {"block_q": block_q, "sinks": 7}
    reduction: cudistr.LSH | cudistr.Energy = cudistr.LSH(
        constants["GROUP"], representative="rank1", **options
    )
    if constants["KEEP"]:
        reduction = cudistr.Energy(constants["KEEP"], near=0, **options)
    queries, keys = (util.on_device(x, "transposed") for x in (q, k))
    problem = normalize.problem(queries, keys, keys, reduction=reduction)
    made, shift = launch.copied(problem, queries, keys)
    found = util.cp.asnumpy(made).astype(np.float64)
    orders, numbers = reference.solve_columns(q, reduction, k)
    assert numbers is not None
    expected = np.empty(q.shape)
    lacking = np.empty(q.shape[:3])
    for batch, head, block in np.ndindex(orders.shape[:3]):
        rows = slice(block * block_q, (block + 1) * block_q)
        own, order = q[batch, head, rows].astype(np.float64), orders[batch, head, block]
        if isinstance(reduction, cudistr.Energy):
            copied = own.copy()
            copied[:, order[reduction.keep :]] = numbers[batch, head, block, reduction.keep :]
        else:
            of_block = numbers[:, batch, head, block]
            qhat = reference.sample(own, order, reduction, of_block)
            copied = np.empty_like(own)
            copied[:, order] = np.repeat(qhat, reduction.group_size, axis=1) * of_block[0]
        expected[batch, head, rows] = copied
        far = k[batch, 0, 7:].astype(np.float64)
        rounded = found[batch, head, rows]
        lacking[batch, head, rows] = reference.restored(own, rounded, far, problem.scale)[:, 0]
    error = np.abs(found - expected)
    assert (error <= 1.01 * util.ROUNDOFF[dtype] * np.abs(expected) + 1e-7).all()  # one rounding
    np.testing.assert_allclose(util.cp.asnumpy(shift), lacking, rtol=1e-4, atol=1e-5)
    assert (kernel, 0) in compiler._functions


def check_projected(kernel: Kernel, lengths: tuple[int, int], ranks: tuple[int, int]) -> None:
    constants = dict(kernel.constants)
    dtype = np.dtype(list(grid.DTYPES.values())[constants["DTYPE"]])
    layout = "transposed" if constants["ALIGNED"] else "ragged"
    q, k, _ = util.inputs(5, dtype, batch=2, heads=2, lengths=lengths, head_dim=constants["HEAD_DIM"])
    k += dtype.type(0.5)
    projection = util.of_ranks(q, k, *ranks)
    queries, keys = (util.on_device(x, layout) for x in (q, k))
    problem = normalize.problem(queries, keys, keys)
    made = launch.project(problem, queries, keys, projection.factors(dtype, 0), True, True)
    used = np.arange(projection.columns) < np.array(ranks)[:, None, None]  # others need not be written
    wide, mean = q.astype(np.float64), projection.mean[:, None].astype(np.float64)
    expected = (
        wide @ projection.queries,
        (k.astype(np.float64) - mean) @ projection.keys,
        problem.scale * (wide @ mean.swapaxes(1, 2))[..., 0],
        ((wide @ projection.sketch()) ** 2).sum(axis=-1),
    )
    for found, like, roundoff in zip(
        made, expected, (*[util.ROUNDOFF[dtype]] * 2, 2.0**-20, util.ROUNDOFF[dtype]), strict=True
    ):
        error = np.abs(util.cp.asnumpy(found).astype(np.float64) - like)
        assert np.where(used if like.ndim == 4 else True, error, 0).max() <= 2 * roundoff * np.abs(like).max()
    assert (kernel, 0) in compiler._functions


@pytest.mark.parametrize("kernel", PROJECT.values(), ids=PROJECT)
def test_project(kernel: Kernel) -> None:
    check_projected(kernel, (65, 131), (16, 48))


@pytest.mark.parametrize("dtype", grid.DTYPES)
def test_project_no_columns(dtype: str) -> None:
    check_projected(PROJECT[f"smxx_project {dtype} 64"], (65, 131), (0, 48))


def test_project_several_tiles_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "multiprocessors", 1)
    check_projected(PROJECT["smxx_project bfloat16 64"], (700, 1000), (16, 48))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_project_more_columns_than_shared_memory_holds(dtype: str) -> None:
    check_projected(PROJECT[f"smxx_project {dtype} 256"], (30, 150), (48, 144))


def low_rank_layouts() -> list[Any]:
    """Kernels that find factors, with rows of a layout for which the grid has the two before them."""
    found = []
    for kernel, (name, capability) in FACTORS.items():
        unaligned = dict(kernel.constants)["HEAD_DIM"] in grid.UNALIGNED
        for layout in ("transposed", "ragged")[: 1 + unaligned]:
            found.append(pytest.param(kernel, capability, layout, id=f"{name} {layout}"))
    return found


@pytest.mark.parametrize(("kernel", "capability", "layout"), low_rank_layouts())
def test_low_rank(kernel: Kernel, capability: int, layout: str) -> None:
    constants = dict(kernel.constants)
    head_dim, rank = constants["HEAD_DIM"], constants["RANK"]
    dtype = np.dtype(list(grid.DTYPES.values())[constants["DTYPE"]])
    kinds = {"rows": planner.lowrank_rows_kernel, "sums": planner.lowrank_sums_kernel}
    used = {kind: make(dtype.name, head_dim, layout == "transposed") for kind, make in kinds.items()}
    assert all(x in LOWRANK[kind].values() for kind, x in used.items())
    use(grid.DEVICES[capability])
    check_found(dtype, head_dim, rank, batch=1, lengths=(90, 140), layout=layout)
    assert all((x, 0) in compiler._functions for x in (kernel, *used.values()))


def test_low_rank_of_a_sample_of_keys() -> None:
    check_found(np.dtype(np.float16), 24, 16, lengths=(600, 2300))


@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_low_rank_on_a_small_gpu_and_a_large_one(
    multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "multiprocessors", multiprocessors)
    check_found(BFLOAT16, 40, 32, lengths=(130, 300))


@pytest.mark.parametrize("kernel", PROBE.values(), ids=PROBE)
def test_probe(kernel: Kernel) -> None:
    constants = dict(kernel.constants)
    dtype = np.dtype(list(grid.DTYPES.values())[constants["DTYPE"]])
    layout = "transposed" if constants["ALIGNED"] else "ragged"
    q, k, v = util.inputs(6, dtype, batch=1, heads=2, lengths=(90, 100), head_dim=constants["HEAD_DIM"])
    v = np.concatenate([v] * (constants["HEAD_DIM_V"] // v.shape[3]), axis=3)
    projection = util.of_ranks(q, k, 16, 32).with_near(20 * constants["KEPT"], sinks=5 * constants["KEPT"])
    projection = util.with_errors(projection)
    arrays = [util.on_device(x, layout) for x in (q, k, v)]
    problem = normalize.problem(*arrays, reduction=projection, causal=True)
    *_, ranks, errors = compose.within(problem, projection, *arrays, None, False, None, 0.02)
    expected, like = reference.decide(q, k, v, problem, projection, 0.02)
    np.testing.assert_array_equal(util.cp.asnumpy(ranks), expected)
    np.testing.assert_allclose(util.cp.asnumpy(errors), like, rtol=0.02)
    assert (kernel, 0) in compiler._functions
    for others in (DRAW, DECIDE):
        assert any((used, 0) in compiler._functions for used in others.values())


@pytest.mark.parametrize("head_dim_v", [40, 128, 192])
@pytest.mark.parametrize("lengths", [(5, 70), (90, 1100)], ids=str)
def test_a_tolerance_on_a_large_gpu(head_dim_v: int, lengths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "multiprocessors", 132)  # as many parts of a sampled row as there may be
    q, k, v = util.inputs(
        3, np.float16, batch=2, heads=2, heads_kv=1, lengths=lengths, head_dim=64, head_dim_v=head_dim_v
    )
    projection = util.with_errors(util.of_ranks(q, k, 16))
    arrays = [util.on_device(x) for x in (q, k, v)]
    problem = normalize.problem(*arrays, reduction=projection, causal=True)
    *_, ranks, errors = compose.within(problem, projection, *arrays, None, False, None, 0.9)
    expected, like = reference.decide(q, k, v, problem, projection, 0.9)
    np.testing.assert_array_equal(util.cp.asnumpy(ranks), expected)
    np.testing.assert_allclose(util.cp.asnumpy(errors), like, rtol=0.02)


def check_merged(out: Any, lse: Any, exact: Any, exact_lse: Any) -> None:
    """Rounding of the result; four of numbers of lse's size: two differences, a logarithm, a sum."""
    error = np.abs(util.cp.asnumpy(out).astype(np.float64) - exact).max()
    assert error <= 2 * util.ROUNDOFF[np.dtype(out.dtype)] * np.abs(exact).max()
    assert np.abs(util.cp.asnumpy(lse) - exact_lse).max() <= 4 * 2.0**-24 * np.abs(exact_lse).max()


@pytest.mark.parametrize("kernel", MERGE.values(), ids=MERGE)
@pytest.mark.parametrize("shards", [1, 3, 32])
def test_merge(kernel: Kernel, shards: int) -> None:
    dtype = np.dtype(list(grid.DTYPES.values())[dict(kernel.constants)["DTYPE"]])
    outs = [random(seed, 1, 3, 11, 64, dtype=dtype) for seed in range(shards)]
    lses = [random(100 + seed, 1, 3, 11, spread=3.0) for seed in range(shards)]
    arrays = ([util.on_device(x) for x in outs], [util.cp.asarray(x) for x in lses])
    out, lse = cudistr.merge(*arrays, return_lse=True)
    exact, exact_lse = reference.merge(outs, lses, return_lse=True)
    check_merged(out, lse, exact, exact_lse)
    assert (kernel, 0) in compiler._functions


@pytest.mark.parametrize("kernel", MERGE_SHARD.values(), ids=MERGE_SHARD)
def test_merge_shard(kernel: Kernel) -> None:
    constants, dtypes = dict(kernel.constants), list(grid.DTYPES.values())
    dtype, found, out = (np.dtype(dtypes[constants[name]]) for name in ("DTYPE", "FOUND", "OUT"))
    before, part = random(1, 1, 3, 11, 64, dtype=found), random(2, 1, 3, 6, 64, dtype=dtype)
    lse, part_lse = (random(3 + i, 1, 3, n, spread=3.0) for i, n in enumerate((11, 6)))
    arrays = [
        util.on_device(before),
        util.cp.asarray(lse),
        (3, 9),
        util.on_device(part),
        util.cp.asarray(part_lse),
    ]
    result = launch.merge_shard(*arrays, out)
    widened, widened_lse = np.zeros_like(before, dtype=dtype), np.full_like(lse, -np.inf)
    widened[:, :, 3:9], widened_lse[:, :, 3:9] = part, part_lse
    exact, exact_lse = reference.solve_merge([before, widened], [lse, widened_lse])
    check_merged(result, arrays[1], exact, exact_lse)
    assert (kernel, 0) in compiler._functions


@pytest.mark.parametrize(
    "reduction",
    [None, cudistr.LSH(2), cudistr.LSH(2, representative="rank1"), cudistr.Energy(32, near=0, sinks=0)],
    ids=["exact", "G2", "rank1", "energy"],
)
@pytest.mark.parametrize("dtype", grid.DTYPES.values(), ids=grid.DTYPES)
def test_the_order_of_warps_and_lanes_does_not_matter(
    dtype: Any, reduction: cudistr.LSH | cudistr.Energy | None
) -> None:
    arrays = [util.on_device(x) for x in util.inputs(7, dtype, batch=1, heads=2, lengths=(161, 173))]
    results = []
    for seed in range(5):
        Settings.seed = seed
        results.append(cudistr.attention(*arrays, causal=True, reduction=reduction, return_lse=True))
    for out, lse in results[1:]:
        util.same_bits(out, results[0][0])
        util.same_bits(lse, results[0][1])
