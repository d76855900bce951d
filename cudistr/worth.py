"""Whether a reduction is worth its error: from how many keys on it is faster than exact attention."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from cudistr.normalize import Problem, exact
from cudistr.plan import Device, hopper_kernel
from cudistr.reductions import LSH

__all__ = ["BREAK_EVEN", "COLUMNS", "Worth", "worth"]

NEVER = math.inf
# Of BREAK_EVEN: the kernel that exact attention has, and head_dim, the second for all beyond 64.
COLUMNS = (
    ("hopper", 64),
    ("hopper", 128),
    ("portable", 64),
    ("portable", 128),
    ("float32", 64),
    ("float32", 128),
)
# What a reduction is: its kind, and whether it leaves keys exact and keeps to a tolerance. "half" and "quarter" are
# projections and the part of head_dim that they leave, and "energy" keeps half.
Kind = tuple[str, bool, bool]
# Keys that a query sees on average, from which on the reduction is faster than exact attention. The time of a token is
# taken for a constant and a part that grows with its keys; both follow from calls with 4096 and with 16384 keys, 16384
# tokens, and heads of 2048 columns in all; of the two masks, the larger number counts. Beyond 2^16 is never, and None
# was not measured. Made from the records break-even*.json of one H200, and compared with them by a test.
BREAK_EVEN: dict[Kind, tuple[float | None, ...]] = {
    ("lsh2", False, False): (12000, 6600, 4300, 7100, 130, 260),
    ("lsh2", True, False): (NEVER, 22000, 49000, NEVER, 2300, 3900),
    ("lsh4", False, False): (7300, 4700, 2200, 2000, 55, 140),
    ("lsh4", True, False): (NEVER, 23000, 25000, 20000, None, None),
    ("rank1", False, False): (36000, 46000, 18000, 27000, None, None),
    ("energy", False, False): (NEVER, NEVER, NEVER, NEVER, None, None),
    ("energy", True, False): (NEVER, NEVER, NEVER, NEVER, None, None),
    ("half", False, False): (4800, 3900, 760, 1400, 150, None),
    ("half", False, True): (NEVER, NEVER, 3700, 5000, None, None),
    ("half", True, False): (22000, 37000, 4800, 11000, 2500, None),
    ("half", True, True): (NEVER, NEVER, 7800, 14000, None, None),
    ("quarter", False, False): (2200, 1100, 450, 680, None, 79),
    ("quarter", True, False): (13000, 8400, 3200, 4400, None, 2200),
    ("quarter", True, True): (None, NEVER, None, 6400, None, None),
}
ROWS = 4096  # queries that are looked at for the average, at most


@dataclass(frozen=True)
class Worth:
    """How many keys a query of a problem sees on average, and how many it would have to.

    Attributes
    ----------
    keys : float
        Those that it sees.
    least : float or None
        From how many on the reduction was measured to be faster than exact attention; infinity for never, None if
        nothing like it was measured.
    """

    keys: float
    least: float | None

    @property
    def exact_is_faster(self) -> bool:
        """Whether exact attention was measured to be faster."""
        return self.least is not None and self.keys < self.least

    def __str__(self) -> str:
        seen = f"a query sees {self.keys:.0f} keys on average"
        if self.least is None:
            return f"{seen}; from how many on it is faster than exact attention was not measured"
        if math.isinf(self.least):
            return f"{seen}; it is not faster than exact attention for any number of them"
        return f"{seen}; it is faster than exact attention from about {self.least:.0f} on"


def _visible_keys(problem: Problem) -> float:
    """Keys that a query sees on average."""
    rows = np.unique(np.linspace(0, problem.seqlen_q - 1, min(problem.seqlen_q, ROWS)).round())
    position = rows + (problem.seqlen_k - problem.seqlen_q)
    first = np.zeros_like(rows) if problem.left is None else np.maximum(0, position - problem.left)
    last = np.full_like(rows, problem.seqlen_k - 1)
    if problem.right is not None:
        last = np.minimum(last, position + problem.right)
    return float(np.maximum(last - first + 1, 0).mean())


def _family(problem: Problem, device: Device) -> str:
    """The kernel that exact attention has."""
    if hopper_kernel(exact(problem), device) is not None:
        return "hopper"
    return "float32" if problem.dtype == "float32" and not problem.tf32 else "portable"


def _kind(problem: Problem, columns: float) -> str:
    reduction = problem.reduction
    if isinstance(reduction, LSH):
        return "rank1" if reduction.by_keys else "lsh2" if reduction.group_size < 4 else "lsh4"
    if reduction is not None:
        return "energy"
    return "quarter" if columns <= problem.head_dim / 4 else "half"


@functools.lru_cache(maxsize=1024)
def worth(problem: Problem, device: Device, columns: float, within: bool) -> Worth:
    """Whether a reduced problem on a device, which is not empty, takes less time than exact attention.

    Parameters
    ----------
    problem : Problem
        With a reduction or a rank.
    device : Device
        Where it runs.
    columns : float
        Of a projection, those that are left of a head's on average.
    within : bool
        Whether it keeps to a tolerance. Heads that turn out to be exact save nothing, which is not known here.
    """
    keys = _visible_keys(problem)
    family = _family(problem, device)
    kept = bool(problem.near or problem.sinks)
    kind = _kind(problem, columns)
    if family == "hopper" and kind.startswith("lsh") and not kept and hopper_kernel(problem, device) is None:
        return Worth(keys, NEVER)  # the portable kernel beside the exact Hopper kernel
    column = COLUMNS.index((family, 64 if problem.head_dim <= 64 else 128))
    # What comes on top takes time: where it was not measured, the number without it is a bound, but a bound alone.
    least, known = 0.0, False
    for more in {(False, False), (kept, False), (False, within), (kept, within)}:
        measured = BREAK_EVEN.get((kind, *more), (None,) * len(COLUMNS))[column]
        if measured is not None:
            least = max(least, measured)
            known |= more == (kept, within)
    if kind == "half":  # more columns save less, for the same cost
        saved = 1 - columns / problem.head_dim
        least = NEVER if saved <= 0 else least * max(1.0, 0.5 / saved)
    # What is made of K serves this call alone: few queries pay more for it.
    least *= max(1.0, problem.seqlen_k / problem.seqlen_q)
    return Worth(keys, least if known or keys < least else None)
