"""Whether a reduction is worth its error: from how many keys on it is faster than exact attention.

There is a table of one GPU, and ``cudistr tune --break-even`` measures another's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cudistr.normalize import Problem, exact
from cudistr.plan import Device, hopper_kernel
from cudistr.reductions import LSH
from cudistr.tuned import Column, Kept, Kind

__all__ = [
    "BREAK_EVEN",
    "COLUMNS",
    "METHODS",
    "Worth",
    "column",
    "faster_from",
    "kind_of",
    "rounded",
    "table",
    "worth",
]

NEVER = math.inf
# Of BREAK_EVEN: the kernel that exact attention has, and head_dim, the second for all beyond 64.
COLUMNS: tuple[Column, ...] = (
    ("hopper", 64),
    ("hopper", 128),
    ("portable", 64),
    ("portable", 128),
    ("float32", 64),
    ("float32", 128),
)
# Of the kinds, "half" and "quarter" are projections and the part of head_dim that they leave, with "lowrank" found in
# the call, and "energy" keeps half.
# Keys that a query sees on average, from which on the reduction is faster than exact attention. The time of a token is
# taken for a constant and a part that grows with its keys; both follow from calls with 4096 and with 16384 keys, 16384
# tokens, and heads of 2048 columns in all; of the two masks, the larger number counts. Beyond 2^16 is never, and None
# was not measured. Made from the records break-even*.json of one H200, and compared with them by a test.
BREAK_EVEN: dict[Kind, tuple[float | None, ...]] = {
    ("lsh2", False, False): (30000, 8100, 3000, 1500, 440, 320),
    ("lsh2", True, False): (NEVER, 23000, 12000, 3200, 1700, 1600),
    ("lsh4", False, False): (8400, 4100, 1400, 960, 210, 79),
    ("lsh4", True, False): (NEVER, 8400, 4900, 2600, None, None),
    ("rank1", False, False): (17000, 20000, NEVER, NEVER, None, None),
    ("energy", False, False): (21000, NEVER, NEVER, NEVER, None, None),
    ("energy", True, False): (27000, NEVER, NEVER, NEVER, None, None),
    ("half", False, False): (2500, 3600, 890, 770, 240, None),
    ("half", False, True): (8800, 14000, 3300, 2100, None, None),
    ("half", True, False): (5700, 7100, 4500, 2100, 1600, None),
    ("half", True, True): (12000, 16000, 8900, 3400, None, None),
    ("quarter", False, False): (1500, 2500, 520, 190, None, 170),
    ("quarter", True, False): (4200, 3800, 3300, 1600, None, 1600),
    ("quarter", True, True): (None, 31000, None, 2500, None, None),
    ("lowrank half", False, False): (9500, 13000, 3400, 4000, None, None),
    ("lowrank half", False, True): (13000, 18000, 5700, 5200, None, None),
    ("lowrank half", True, False): (11000, 15000, 7000, 5000, None, None),
    ("lowrank half", True, True): (14000, 20000, 16000, 6400, None, None),
    ("lowrank quarter", False, False): (7300, 8100, 2300, 2300, None, None),
    ("lowrank quarter", True, False): (8600, 9400, 4400, 3400, None, None),
}
# The same as methods of cudistr bench. A tolerance is one that no head exceeds.
METHODS = (
    "lsh2",
    "lsh:2,near=256,sinks=64",
    "lsh4",
    "lsh:4,near=256,sinks=64",
    "lsh:2,representative=rank1",
    "energy:{half}",
    "energy:{half},near=256,sinks=64",
    "projection:{half}",
    "projection:{half},tolerance=0.99",
    "projection:{half},near=256,sinks=64",
    "projection:{half},near=256,sinks=64,tolerance=0.99",
    "projection:{quarter}",
    "projection:{quarter},near=256,sinks=64",
    "projection:{quarter},near=256,sinks=64,tolerance=0.99",
    "lowrank:{half}",
    "lowrank:{half},tolerance=0.99",
    "lowrank:{half},near=256,sinks=64",
    "lowrank:{half},near=256,sinks=64,tolerance=0.99",
    "lowrank:{quarter}",
    "lowrank:{quarter},near=256,sinks=64",
)
MOST_KEYS = 2**16  # beyond them a reduction counts as never faster
ROWS = 4096  # queries that are looked at for the average, at most


def kind_of(method: str, head_dim: int) -> Kind | None:
    """What a method of cudistr bench is, None for exact attention and for what has no row in the table."""
    name, *options = method.split(",")
    name, _, number = name.replace("lsh:", "lsh").partition(":")
    more = (any(x.startswith("near=") for x in options), any(x.startswith("tolerance=") for x in options))
    if "representative=rank1" in options:
        return ("rank1", *more)
    if name in ("lsh2", "lsh4"):
        return (name, *more)
    if name == "energy" and 2 * int(number) == head_dim:
        return ("energy", *more)
    parts = {2: "half", 4: "quarter"}
    if name in ("projection", "lowrank") and head_dim % int(number) == 0 and head_dim // int(number) in parts:
        part = parts[head_dim // int(number)]
        return (f"lowrank {part}" if name == "lowrank" else part, *more)
    return None


def faster_from(exact: Mapping[int, float], reduced: Mapping[int, float], causal: bool) -> float:
    """Keys of a query, on average, from which on a reduction is faster, from milliseconds at two lengths."""
    (short, long), share = sorted(exact), 2 if causal else 1  # under the mask a query sees half of them
    over = (reduced[short] - exact[short]) * long - (reduced[long] - exact[long]) * short
    gain = (exact[long] - exact[short]) - (reduced[long] - reduced[short])
    keys = over / gain / share if gain > 0 else math.inf
    return math.inf if keys > MOST_KEYS else max(0.0, keys)


def rounded(keys: float) -> float:
    """Two digits of a number of keys, rounded up."""
    if not 0 < keys < math.inf:
        return keys
    unit = 10 ** max(0, math.floor(math.log10(keys)) - 1)
    return float(math.ceil(keys / unit) * unit)


def table(found: Iterable[tuple[Kind, Column, float]]) -> dict[Kind, tuple[float | None, ...]]:
    """Numbers of keys in the form of BREAK_EVEN; of several in one place the largest."""
    of_kinds: dict[Kind, dict[Column, float]] = {}
    for kind, place, keys in found:
        of_kind = of_kinds.setdefault(kind, {})
        of_kind[place] = max(keys, of_kind.get(place, 0.0))
    return {kind: tuple(x.get(place) for place in COLUMNS) for kind, x in of_kinds.items()}


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
    here : bool
        Whether that was measured on this GPU, at least in part.
    """

    keys: float
    least: float | None
    here: bool = False

    @property
    def exact_is_faster(self) -> bool:
        """Whether exact attention was measured to be faster."""
        return self.least is not None and self.keys < self.least

    def __str__(self) -> str:
        seen = f"a query sees {self.keys:.0f} keys on average"
        if self.least is None:
            return f"{seen}; from how many on it is faster than exact attention was not measured"
        where = "measured on this GPU" if self.here else "measured on an NVIDIA H200"
        if math.isinf(self.least) or self.least == 0:
            faster = "faster" if self.least == 0 else "not faster"
            return f"{seen}; it is {faster} than exact attention for any number of them ({where})"
        return f"{seen}; it is faster than exact attention from about {self.least:.0f} on ({where})"


def _visible_keys(problem: Problem) -> float:
    """Keys that a query sees on average."""
    rows = np.unique(np.linspace(0, problem.seqlen_q - 1, min(problem.seqlen_q, ROWS)).round())
    position = rows + (problem.seqlen_k - problem.seqlen_q)
    first = np.zeros_like(rows) if problem.left is None else np.maximum(0, position - problem.left)
    last = np.full_like(rows, problem.seqlen_k - 1)
    if problem.right is not None:
        last = np.minimum(last, position + problem.right)
    return float(np.maximum(last - first + 1, 0).mean())


def column(problem: Problem, device: Device) -> Column:
    """Of the table: the kernel that exact attention has, and the head_dim that stands for the problem's."""
    if hopper_kernel(exact(problem), device) is not None:
        family = "hopper"
    else:
        family = "float32" if problem.dtype == "float32" and not problem.tf32 else "portable"
    return family, 64 if problem.head_dim <= 64 else 128


def _kind(problem: Problem, columns: float, anew: bool) -> str:
    reduction = problem.reduction
    if isinstance(reduction, LSH):
        return "rank1" if reduction.by_keys else "lsh2" if reduction.group_size < 4 else "lsh4"
    if reduction is not None:
        return "energy"
    size = "quarter" if columns <= problem.head_dim / 4 else "half"
    return f"lowrank {size}" if anew else size


NOTHING = Kept()


@functools.lru_cache(maxsize=16)
def _own(measured: Kept) -> dict[Kind, tuple[float | None, ...]]:
    return table(measured.found)


@functools.lru_cache(maxsize=1024)
def worth(
    problem: Problem,
    device: Device,
    columns: float,
    within: bool,
    measured: Kept = NOTHING,
    anew: bool = False,
) -> Worth:
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
    measured : Kept
        What was measured on this device, in place of the table.
    anew : bool
        Whether its factors are found in the call.
    """
    keys = _visible_keys(problem)
    place = column(problem, device)
    kept = bool(problem.near or problem.sinks)
    kind = _kind(problem, columns, anew)
    plain = dataclasses.replace(problem, near=0, sinks=0) if kept else problem
    if place[0] == "hopper" and kind.startswith("lsh") and hopper_kernel(plain, device) is None:
        return Worth(keys, NEVER)  # the portable kernel beside the exact Hopper kernel
    index, own = COLUMNS.index(place), _own(measured)
    unknown = (None,) * len(COLUMNS)
    # What comes on top takes time: where it was not measured, the number without it is a bound, but a bound alone.
    least, known, here = 0.0, False, False
    for more in {(False, False), (kept, False), (False, within), (kept, within)}:
        found = own.get((kind, *more), unknown)[index]
        here |= found is not None
        if found is None:
            found = BREAK_EVEN.get((kind, *more), unknown)[index]
        if found is not None:
            least = max(least, found)
            known |= more == (kept, within)
    if kind.endswith("half"):  # more columns save less, for the same cost
        saved = 1 - columns / problem.head_dim
        least = NEVER if saved <= 0 else least * max(1.0, 0.5 / saved)
    # What is made of K serves this call alone: few queries pay more for it.
    least *= max(1.0, problem.seqlen_k / problem.seqlen_q)
    return Worth(keys, least if known or keys < least else None, here)
