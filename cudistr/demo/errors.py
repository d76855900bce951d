"""What can go wrong in the demo, as one exception whose text is for the person at the terminal."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["DemoError", "require"]


class DemoError(Exception):
    """The demo cannot run; the message says why and what to do."""


def require(module: str, package: str) -> Any:
    """Import ``module``, or raise a `DemoError` that names the ``package`` to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DemoError(
            f"the demo needs {package}, which cannot be imported ({error}). "
            'Install what the demo needs: pip install "cudistr[demo]"'
        ) from error
