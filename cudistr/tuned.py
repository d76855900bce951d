"""What ``cudistr tune`` has measured, kept beside compiled kernels: the fastest tiles, and from how many keys on
reductions are faster than exact attention.

Each is a JSON file for a GPU, a version of cudistr and the sources of kernels. What cannot be read, or does not fit, is
as if it were not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cudistr import compiler
from cudistr.plan import Device, Tile, TileKey

__all__ = [
    "BREAK_EVEN",
    "TILES",
    "VARIABLE",
    "Column",
    "Kept",
    "Kind",
    "Measured",
    "clear",
    "load_break_even",
    "load_tiles",
    "path",
    "read_break_even",
    "read_tiles",
    "save_break_even",
    "save_tiles",
]

VARIABLE = "CUDISTR_TUNED"  # 0: what cudistr comes with
TILES, BREAK_EVEN = "tiles", "break-even"  # files

T = TypeVar("T")
Tiles = tuple[tuple[TileKey, Tile], ...]
# What a reduction is: its kind, and whether it leaves keys exact and keeps to a tolerance.
Kind = tuple[str, bool, bool]
Column = tuple[str, int]  # the kernel that exact attention has, and head_dim
Measured = tuple[tuple[Kind, Column, float], ...]  # keys of a query, on average; infinity is never


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """Numbers of keys that were measured on a device; equal to itself alone, so that calls look answers up fast."""

    found: Measured = ()


def _sources(what: str) -> str:
    """Digest of all that times depend on: the tiles are those of one kernel."""
    if what == TILES:
        return compiler.source_digest("sm80_flash_fwd")
    kernels = sorted(path.stem for path in (compiler.SOURCES / "kernels").glob("*.cu"))
    return hashlib.sha256("".join(map(compiler.source_digest, kernels)).encode()).hexdigest()


def identity(device: Device, name: str, what: str) -> dict[str, Any]:
    """What measurements hold for."""
    import cudistr

    return {
        "device": name,
        "capability": device.capability,
        "multiprocessors": device.multiprocessors,
        "shared_bytes": device.shared_bytes,
        "cudistr": cudistr.__version__,
        "sources": _sources(what),
    }


def path(device: Device, name: str, what: str) -> Path | None:
    """Where something of a device is kept; None if there is no folder that can be written."""
    folder = compiler.cache_folder()
    if folder is None:
        return None
    text = json.dumps(identity(device, name, what), sort_keys=True)
    return folder / f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"


def _fields(kind: type, value: Any) -> dict[str, Any]:
    """The fields of a dataclass from JSON, refused unless they are all there and of their types."""
    types = {"str": str, "int": int, "bool": bool}
    wanted = {field.name: types[str(field.type)] for field in dataclasses.fields(kind)}
    if not isinstance(value, dict) or value.keys() != wanted.keys():
        raise ValueError(f"{kind.__name__} must have the fields {', '.join(wanted)}, got {value!r}")
    for name, of in wanted.items():
        if type(value[name]) is not of:
            raise ValueError(f"{kind.__name__}.{name} must be of type {of.__name__}, got {value[name]!r}")
    return value


def _read(device: Device, name: str, what: str, entry: Callable[[dict[str, Any]], T]) -> tuple[T, ...]:
    """The entries that are kept for a device, none if there is no file."""
    place = path(device, name, what)
    if place is None or not place.exists():
        return ()
    stored = json.loads(place.read_text(encoding="utf-8"))
    if not isinstance(stored, dict) or stored.get("for") != identity(device, name, what):
        raise ValueError(f"{place} is not about {name}")
    if not isinstance(stored.get(what), list):
        raise ValueError(f"{place} has no list of {what}")
    found = []
    for one in stored[what]:
        if not isinstance(one, dict):
            raise ValueError(f"{place} has an entry that is no object: {one!r}")
        found.append(entry(one))
    return tuple(found)


def read_tiles(device: Device, name: str) -> Tiles:
    """The tiles that are kept for a device, none if there is no file.

    Raises
    ------
    ValueError
        If the file is damaged.
    OSError
        If it cannot be read.
    """

    def entry(one: dict[str, Any]) -> tuple[TileKey, Tile]:
        return TileKey(**_fields(TileKey, one.get("key"))), Tile(**_fields(Tile, one.get("tile")))

    return tuple(dict(_read(device, name, TILES, entry)).items())


def read_break_even(device: Device, name: str) -> Measured:
    """From how many keys on reductions were measured to be faster, nothing if there is no file; raises alike."""
    types = {"kind": str, "exact_keys": bool, "tolerance": bool, "kernel": str, "head_dim": int}

    def entry(one: dict[str, Any]) -> tuple[Kind, Column, float]:
        keys = one.get("keys", "")
        if one.keys() != types.keys() | {"keys"} or any(
            type(one[x]) is not kind for x, kind in types.items()
        ):
            raise ValueError(f"an entry must have {', '.join(types)} and keys, got {one!r}")
        if keys is not None and not (type(keys) in (int, float) and 0 <= keys < math.inf):
            raise ValueError(f"keys must be a number, or null for never, got {keys!r}")
        kind, column = (one["kind"], one["exact_keys"], one["tolerance"]), (one["kernel"], one["head_dim"])
        return kind, column, math.inf if keys is None else float(keys)

    return _read(device, name, BREAK_EVEN, entry)


def _load(read: Callable[[Device, str], tuple[T, ...]], device: Device, name: str) -> tuple[T, ...]:
    """The same for a call, which neither a damaged file nor ``CUDISTR_TUNED=0`` may fail."""
    if os.environ.get(VARIABLE) == "0":
        return ()
    try:
        return read(device, name)
    except (OSError, ValueError, RecursionError):
        return ()


def load_tiles(device: Device, name: str) -> Tiles:
    """The same for a call, which neither a damaged file nor ``CUDISTR_TUNED=0`` may fail."""
    return _load(read_tiles, device, name)


def load_break_even(device: Device, name: str) -> Measured:
    """The same for a call, which neither a damaged file nor ``CUDISTR_TUNED=0`` may fail."""
    return _load(read_break_even, device, name)


def save_tiles(device: Device, name: str, tiles: Mapping[TileKey, Tile]) -> Path:
    """Keep tiles in place of what was kept; a reader sees all of the file or none.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    entries = [
        {"key": dataclasses.asdict(key), "tile": dataclasses.asdict(tile)} for key, tile in tiles.items()
    ]
    return _save(device, name, TILES, entries)


def save_break_even(device: Device, name: str, found: Measured) -> Path:
    """The same for numbers of keys."""
    entries = [
        {
            "kind": kind,
            "exact_keys": kept,
            "tolerance": within,
            "kernel": kernel,
            "head_dim": head_dim,
            "keys": None if math.isinf(keys) else keys,
        }
        for (kind, kept, within), (kernel, head_dim), keys in found
    ]
    return _save(device, name, BREAK_EVEN, entries)


def _save(device: Device, name: str, what: str, entries: Sequence[Any]) -> Path:
    place = path(device, name, what)
    if place is None:
        raise OSError(
            f"there is no folder to keep {what} in: set CUDISTR_CACHE_DIR to one that can be written"
        )
    text = json.dumps({"for": identity(device, name, what), what: entries}, indent=1)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=place.parent, delete=False) as file:
        file.write(text + "\n")
    os.replace(file.name, place)
    return place


def clear(device: Device, name: str) -> bool:
    """Forget what was measured on a device; whether there was anything."""
    places = [place for what in (TILES, BREAK_EVEN) if (place := path(device, name, what)) is not None]
    found = [place for place in places if place.exists()]
    for place in found:
        place.unlink()
    return bool(found)
