"""Tiles that ``cudistr tune`` found fastest, kept beside compiled kernels: a JSON file for a GPU, a version of cudistr
and the sources of its kernel. What cannot be read, or does not fit, is as if it were not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cudistr import compiler
from cudistr.plan import Device, Tile, TileKey

__all__ = ["VARIABLE", "clear", "load", "path", "read", "save"]

VARIABLE = "CUDISTR_TUNED"  # 0: the planner's own tiles

Tiles = tuple[tuple[TileKey, Tile], ...]


def identity(device: Device, name: str) -> dict[str, Any]:
    """What measurements hold for."""
    import cudistr

    return {
        "device": name,
        "capability": device.capability,
        "multiprocessors": device.multiprocessors,
        "shared_bytes": device.shared_bytes,
        "cudistr": cudistr.__version__,
        "sources": compiler.source_digest("sm80_flash_fwd"),
    }


def path(device: Device, name: str) -> Path | None:
    """Where the tiles of a device are kept; None if there is no folder that can be written."""
    folder = compiler.cache_folder()
    if folder is None:
        return None
    text = json.dumps(identity(device, name), sort_keys=True)
    return folder / f"tiles-{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"


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


def read(device: Device, name: str) -> Tiles:
    """The tiles that are kept for a device, none if there is no file.

    Raises
    ------
    ValueError
        If the file is damaged.
    OSError
        If it cannot be read.
    """
    place = path(device, name)
    if place is None or not place.exists():
        return ()
    stored = json.loads(place.read_text(encoding="utf-8"))
    if not isinstance(stored, dict) or stored.get("for") != identity(device, name):
        raise ValueError(f"{place} is not about {name}")
    if not isinstance(stored.get("tiles"), list):
        raise ValueError(f"{place} has no list of tiles")
    found = {}
    for entry in stored["tiles"]:
        if not isinstance(entry, dict):
            raise ValueError(f"{place} has an entry that is no object: {entry!r}")
        found[TileKey(**_fields(TileKey, entry.get("key")))] = Tile(**_fields(Tile, entry.get("tile")))
    return tuple(found.items())


def load(device: Device, name: str) -> Tiles:
    """The same for a call, which neither a damaged file nor ``CUDISTR_TUNED=0`` may fail."""
    if os.environ.get(VARIABLE) == "0":
        return ()
    try:
        return read(device, name)
    except (OSError, ValueError, RecursionError):
        return ()


def save(device: Device, name: str, tiles: Mapping[TileKey, Tile]) -> Path:
    """Keep tiles in place of what was kept; a reader sees all of the file or none.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    place = path(device, name)
    if place is None:
        raise OSError("there is no folder to keep tiles in: set CUDISTR_CACHE_DIR to one that can be written")
    entries = [
        {"key": dataclasses.asdict(key), "tile": dataclasses.asdict(tile)} for key, tile in tiles.items()
    ]
    text = json.dumps({"for": identity(device, name), "tiles": entries}, indent=1)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=place.parent, delete=False) as file:
        file.write(text + "\n")
    os.replace(file.name, place)
    return place


def clear(device: Device, name: str) -> bool:
    """Forget the tiles of a device; whether there were any."""
    place = path(device, name)
    if place is None or not place.exists():
        return False
    place.unlink()
    return True
