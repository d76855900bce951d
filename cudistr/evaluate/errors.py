"""What can go wrong in an evaluation, as one exception whose text is for the person at the terminal."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["EvalError", "require"]


class EvalError(ValueError):
    """The evaluation cannot run; the message says why and what to do."""


def require(module: str, package: str) -> Any:
    """Import ``module``, or raise an `EvalError` that names the ``package`` to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvalError(
            f"eval needs {package}, which cannot be imported ({error}). "
            'Install what it needs: pip install "cudistr[eval]"'
        ) from error
