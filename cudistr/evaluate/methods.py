"""Methods by name: what stands for exact attention in an evaluation, and how it is called on NumPy and CuPy arrays."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cudistr
from cudistr import compose, normalize, reference

from .errors import EvalError
from .rivals import RIVALS

__all__ = ["Method", "Within", "attend", "decided", "mean_dim", "parse", "prepare"]

ROWS = 128  # of a block of queries on the CPU: those of LSH's default
FIT_MARGIN = 0.5  # of a tolerance: what a fit without a rank is made for
FITS = ("self", "static")
WEIGHTS = ("output", "attention")  # Projection.fit with v, or without
# Of projection, besides near and sinks. A tolerance of 0 is none; a static fit goes by so many first tokens of each
# text, 0 for all.
OPTIONS = {"fit": "self", "weights": "output", "share": "no", "tolerance": 0.0, "tokens": 0}

Inputs = list[tuple[Any, Any, Any]]  # q, k, v of each layer


def _fields(reduction: type) -> set[str]:
    """What a reduction takes besides its number, by name."""
    return {field.name for field in dataclasses.fields(reduction)[1:]}


def _keywords(rival: str) -> set[str]:
    """What a rival takes by keyword."""
    return set(inspect.getfullargspec(RIVALS[rival]).kwonlyargs)


# The options of each kind of method, by name.
KINDS: dict[str, set[str]] = {
    "exact": set(),
    "lsh": _fields(cudistr.LSH),
    "energy": _fields(cudistr.Energy),
    "lowrank": {*_fields(cudistr.LowRank), "tolerance"},
    "projection": {*OPTIONS, "near", "sinks"},
    **{rival: _keywords(rival) - {"causal"} for rival in RIVALS},
}


@dataclass(frozen=True)
class Within:
    """A projection, or low-rank factors, whose heads keep to a tolerance, or are exact: decided in every call."""

    projection: cudistr.Projection | cudistr.LowRank
    tolerance: float


@dataclass(frozen=True)
class Method:
    """A method's name as it was typed, its kind, its number and its options."""

    spec: str
    kind: str
    number: int | None
    options: dict[str, Any]


def parse(spec: str) -> Method:
    """The method of a text such as ``lsh:2,near=256,sinks=64``: kind, number, options.

    Raises
    ------
    EvalError
        If there is no such method.
    """
    kind, *words = spec.replace(":", ",", 1).split(",")
    if kind not in KINDS:
        raise EvalError(f"--reduction: {kind!r} is no method. Allowed: {', '.join(KINDS)}")
    number: int | None = None
    options: dict[str, Any] = {}
    for i, word in enumerate(filter(None, words)):
        name, equals, value = word.partition("=")
        try:
            if equals:
                options[name] = int(value) if value.lstrip("-").isdigit() else value
            elif i == 0:
                number = int(word)
            else:
                raise ValueError
        except ValueError:
            raise EvalError(
                f"--reduction: {word!r} in {spec!r} is neither a number in first place nor name=value"
            ) from None
    if number is None and (
        kind in ("lsh", "energy", "lowrank") or (kind == "projection" and not options.get("tolerance"))
    ):
        raise EvalError(f"--reduction: {spec!r} needs a number, such as {kind}:{2 if kind == 'lsh' else 32}")
    if number is not None and kind in ("exact", *RIVALS):
        raise EvalError(f"--reduction: {kind} takes no number, got {spec!r}")
    unknown = set(options) - KINDS[kind]
    if unknown:
        allowed = f"Allowed: {', '.join(sorted(KINDS[kind]))}" if KINDS[kind] else "It has none"
        raise EvalError(f"--reduction: {kind} has no option {', '.join(sorted(unknown))}. {allowed}")
    if kind in RIVALS:
        for name, value in options.items():
            if value not in ("yes", "no"):
                raise EvalError(f"--reduction: {name} must be yes or no, got {value!r}")
    if kind == "lowrank" and "tolerance" in options:
        options["tolerance"] = _tolerance(options)
    if kind == "projection":
        options = OPTIONS | options
        for name, choices in (("fit", FITS), ("weights", WEIGHTS)):
            if options[name] not in choices:
                raise EvalError(
                    f"--reduction: {name} must be one of {', '.join(choices)}, got {options[name]!r}"
                )
        options["tolerance"] = _tolerance(options)
        tokens = options["tokens"]
        if not isinstance(tokens, int) or tokens < 0 or (tokens and options["fit"] != "static"):
            raise EvalError(
                f"--reduction: tokens must be a number such as 2048, and go with fit=static, got {spec!r}"
            )
        if number is None and options["share"] == "yes":
            raise EvalError(
                f"--reduction: {spec!r} shares ranks, for which it needs their mean, such as projection:32"
            )
    return Method(spec, kind, number, options)


def _tolerance(options: dict[str, Any]) -> float:
    """The tolerance of a method's options, 0 for none."""
    try:
        tolerance = float(options["tolerance"])
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < 1:
        raise EvalError(
            f"--reduction: tolerance must be a number between 0 and 1, such as 0.02, got {options['tolerance']!r}"
        )
    return tolerance


def prepare(
    method: Method, inputs: Inputs, calibration: list[Inputs], causal: bool, fitted: dict[Any, Any]
) -> list[Any]:
    """The reduction of each layer: None, a `cudistr` reduction, one `Within` a tolerance, or a rival's function.

    ``inputs`` are q, k and v of each layer of an exact forward on the data of the evaluation, ``calibration`` the same
    on other data. ``fitted`` keeps what methods have in common between calls with the same data.
    """
    depth = len(inputs)
    options = dict(method.options)
    if method.kind == "exact":
        return [None] * depth
    if method.kind in RIVALS:
        given = {name: value == "yes" for name, value in options.items()}
        if causal:
            if "causal" not in _keywords(method.kind):
                raise EvalError(f"--reduction: {method.kind} has no causal mask here; it is for dinov2")
            given["causal"] = True
        return [functools.partial(RIVALS[method.kind], **given)] * depth
    if method.kind == "lsh":
        return [cudistr.LSH(method.number or 0, **options)] * depth
    if method.kind == "energy":
        return [cudistr.Energy(method.number or 0, **options)] * depth
    if method.kind == "lowrank":
        tolerance = options.pop("tolerance", 0.0)
        anew = cudistr.LowRank(method.number or 0, **options)
        return [Within(anew, tolerance) if tolerance else anew] * depth
    near, sinks = options.get("near", 0), options.get("sinks", 0)
    rank, share = method.number or 0, options["share"] == "yes"
    tolerance = options["tolerance"]
    if method.number is None:  # each head its own rank, well within the tolerance on the data of the fit
        size: dict[str, Any] = {"tolerance": FIT_MARGIN * tolerance}
    else:
        size = {"rank": int(inputs[0][0].shape[3]) if share else rank}
    tokens = options["tokens"] or None
    if tokens and not causal:
        raise EvalError(
            "--reduction: tokens is for texts, whose first tokens see no others; it is for smollm2"
        )
    key = (options["fit"], options["weights"], near, sinks, tokens, *size.items())
    if key not in fitted:
        sources = [inputs] if options["fit"] == "self" else calibration
        fitted[key] = layers = []
        for layer in range(depth):
            cut = ([x[:, :, :tokens] for x in source[layer]] for source in sources)
            q, k, *v = zip(*cut, strict=True)
            values = v[0] if options["weights"] == "output" else None
            layers.append(cudistr.Projection.fit(q, k, values, **size, causal=causal, near=near, sinks=sinks))
    chosen = cudistr.Projection.share(fitted[key], rank) if share else fitted[key]
    return [Within(projection, tolerance) for projection in chosen] if tolerance else chosen


def mean_dim(
    reduction: Any, head_dim: int, seqlen: int, causal: bool, ranks: NDArray[np.int32] | None = None
) -> float | None:
    """Columns that the score product of a query and a visible key sums over, on average; None if that is unknown.

    ``ranks`` are what a call has decided on, instead of those of the projection.
    """
    if reduction is None:
        return float(head_dim)
    if isinstance(reduction, cudistr.LSH):
        reduced = head_dim / reduction.group_size
    elif isinstance(reduction, cudistr.Energy):
        reduced = float(reduction.keep)
    elif isinstance(reduction, cudistr.Projection):
        reduced = float(np.mean(reduction.ranks if ranks is None else ranks))
    elif isinstance(reduction, cudistr.LowRank):
        reduced = float(reduction.rank if ranks is None else np.mean(ranks))
    else:
        return None
    rows = np.zeros((1, 1, seqlen, head_dim), np.float32)
    projected = isinstance(reduction, cudistr.Projection)
    problem = normalize.problem(rows, rows, rows, causal=causal, reduction=None if projected else reduction)
    if projected:
        problem = normalize.keeping(problem, reduction.near, reduction.sinks)
    every = np.arange(seqlen)
    seen = reference.visible(every, problem)
    exact = float((seen & reference.kept(every, problem)).sum() / seen.sum())
    return exact * head_dim + (1 - exact) * reduced


def attend(q: Any, k: Any, v: Any, reduction: Any, causal: bool, xp: Any) -> Any:
    """One call of a prepared method. On CuPy arrays it is `cudistr.attention`, on NumPy arrays float32 code."""
    if callable(reduction):
        return reduction(q, k, v, xp)
    tolerance, ranks = None, None
    if isinstance(reduction, Within):
        if xp is np:
            ranks = decided(q, k, v, reduction, causal, np)
        reduction, tolerance = reduction.projection, reduction.tolerance
    if xp is not np:
        return cudistr.attention(
            q, k, v, causal=causal, reduction=reduction, tolerance=tolerance, exact_if_faster=False
        )
    return _on_cpu(q, k, v, reduction, causal, ranks)


def decided(q: Any, k: Any, v: Any, within: Within, causal: bool, xp: Any) -> NDArray[np.int32]:
    """Columns that each head of a call uses, (batch, heads) on the host."""
    if xp is not np:
        report = cudistr.attention_error(
            q,
            k,
            v,
            causal=causal,
            reduction=within.projection,
            tolerance=within.tolerance,
            exact_if_faster=False,
        )
        return np.array(report.ranks, np.int32)
    problem = normalize.problem(q, k, v, reduction=within.projection, causal=causal)
    found = compose.projection_of(problem, within.projection, q, k)
    return reference.decide(q, k, v, problem, found, within.tolerance)[0]


def _on_cpu(
    q: Any, k: Any, v: Any, reduction: Any, causal: bool, ranks: NDArray[np.int32] | None
) -> NDArray[np.float32]:
    """What `cudistr.reference.attention` computes, in float32 and without the keys after a block of queries.

    A projection is not used for heads whose ``ranks`` (1, heads) are head_dim.
    """
    heads, seqlen, head_dim = q.shape[1:]
    scale = np.float32(head_dim**-0.5)
    out = np.empty((1, heads, seqlen, v.shape[3]), np.float32)
    orders = numbers = None
    if isinstance(reduction, cudistr.LSH | cudistr.Energy):
        of_keys = k if reduction.by_keys else None
        normalize.check_group(q, reduction, of_keys)
        orders, numbers = reference.solve_columns(q, reduction, of_keys)
    problem = normalize.problem(q, k, v, reduction=reduction, causal=causal)
    if isinstance(reduction, cudistr.LowRank):
        reduction = compose.projection_of(problem, reduction, q, k)
    rows_per_block = ROWS if orders is None else reduction.rows_per_block
    for h in range(heads):
        kv = h * k.shape[1] // heads
        queries, keys, values = (np.ascontiguousarray(x, np.float32) for x in (q[0, h], k[0, kv], v[0, kv]))
        reduced_keys = None
        if isinstance(reduction, cudistr.Projection) and (ranks is None or ranks[0, h] < head_dim):
            a, b, mean = reduction.queries[kv], reduction.keys[kv], reduction.mean[kv]
            reduced_queries, reduced_keys = scale * (queries @ a), (keys - mean) @ b
            shift = scale * (queries @ mean)[:, None]
        for start in range(0, seqlen, rows_per_block):
            stop = min(start + rows_per_block, seqlen)
            last = stop if causal else seqlen
            block = queries[start:stop]
            if orders is not None:
                order = orders[0, h, start // rows_per_block].astype(np.intp)
                own: Any = None if numbers is None else numbers[..., 0, h, start // rows_per_block, :]
                copied = None
                if isinstance(reduction, cudistr.Energy):
                    qhat, khat = block.copy(), keys[:last]
                    qhat[:, order[reduction.keep :]] = own[reduction.keep :]
                    copied = qhat
                else:
                    qhat = reference.sample(block, order, reduction, own).astype(np.float32)
                    weights = None if own is None else own[0]
                    khat = reference.fuse(keys[:last], order, reduction.group_size, weights)
                    if own is not None:
                        copied = np.empty_like(block)
                        copied[:, order] = np.repeat(qhat, reduction.group_size, axis=1) * own[0]
                scores = scale * (qhat @ khat.T)
                if copied is not None and problem.restore:
                    scores += reference.restored(block, copied, keys[problem.sinks :], float(scale))
            elif reduced_keys is not None:
                scores = reduced_queries[start:stop] @ reduced_keys[:last].T + shift[start:stop]
            else:
                scores = scale * (block @ keys[:last].T)
            if problem.near or problem.sinks:
                kept = reference.kept(np.arange(start, stop), problem)[:, :last]
                some = np.flatnonzero(kept.any(axis=0))  # no other keys are multiplied
                scores[:, some] = np.where(kept[:, some], scale * (block @ keys[some].T), scores[:, some])
            if causal:
                scores[:, start:][np.triu(np.ones((stop - start,) * 2, bool), 1)] = -np.inf
            scores -= scores.max(axis=1, keepdims=True)
            weights = np.exp(scores)
            out[0, h, start:stop] = weights @ values[:last] / weights.sum(axis=1, keepdims=True)
    return out
