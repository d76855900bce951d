"""The scripts that make the documentation's tables and figures, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

DOCS = Path(__file__).resolve().parents[1] / "docs"


def load(name: str) -> Any:
    """A script in docs/, which imports others from there."""
    with mock.patch.object(sys, "path", [str(DOCS), *sys.path]):
        return importlib.import_module(name)
