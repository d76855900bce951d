"""The command line: ``cudistr demo | doctor | bench | tune | eval``. A module is imported when its command is used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import cudistr
from cudistr.errors import CompileError, CudaUnavailableError, DistributedError, UnsupportedDeviceError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "demo": "run a vision transformer on a photograph, exact and with DistrAttention",
    "doctor": "say what is there, what is wrong and how to mend it",
    "bench": "measure attention beside its peers and write a record",
    "tune": "find the fastest tiles for this GPU, or which reductions are faster than exact attention",
    "eval": "measure what a reduction does to pretrained models and write a record",
}
MODULES = {"eval": "evaluate"}  # where a command lives, if not in a module of its name
EXTRAS = {
    "demo": "demo",
    "bench": "bench",
    "tune": "bench",
    "eval": "eval",
}  # what pip calls the packages that a command needs
DEBUG_VARIABLE = "CUDISTR_DEBUG"
# What tells the user something about the machine or the arguments; anything else is a mistake of ours, and
# its traceback is what a bug report needs.
EXPECTED = (
    CompileError,
    CudaUnavailableError,
    DistributedError,
    UnsupportedDeviceError,
    ValueError,
    TypeError,
    OSError,
    ImportError,
)


def _command(argv: Sequence[str]) -> str | None:
    """The command that was named: no option before it takes a value."""
    first = next((word for word in argv if not word.startswith("-")), None)
    return first if first in COMMANDS else None


def _parser(command: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """The parser with the options of one command, and that command's module."""
    parser = argparse.ArgumentParser(
        prog="cudistr",
        description="Attention for CuPy arrays, without PyTorch: exact, and DistrAttention (arXiv 2507.17245).",
        epilog="'cudistr COMMAND --help' lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"cudistr {cudistr.__version__}")
    debug_help = f"show the traceback of an error (also {DEBUG_VARIABLE}=1)"
    parser.add_argument("--debug", action="store_true", help=debug_help)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = None
    for name, summary in COMMANDS.items():
        sentence = f"{summary[0].upper()}{summary[1:]}."
        sub = commands.add_parser(name, help=summary, description=sentence, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help=debug_help)
        if name == command:
            module = importlib.import_module(f"cudistr.{MODULES.get(name, name)}")
            module.add_arguments(sub)
    return parser, module


def _is_expected(error: Exception) -> bool:
    demo_errors = sys.modules.get("cudistr.demo.errors")
    return isinstance(error, EXPECTED) or (
        demo_errors is not None and isinstance(error, demo_errors.DemoError)
    )


def _line(error: Exception, command: str | None) -> str:
    """An error as one line: the message without what follows it (a compiler's log, say)."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, ImportError):
        extra = "cuda13" if error.name == "cupy" else EXTRAS.get(command or "")
        line += f". Install what is missing: pip install 'cudistr[{extra}]'" if extra else ""
    return line


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        The words after the program's name, ``sys.argv[1:]`` unless given.

    Returns
    -------
    int
        Exit status: 0, 1 after an error that was printed in one line, 130 when interrupted.

    Raises
    ------
    SystemExit
        With status 2 if the arguments cannot be understood, 0 after ``--help`` and ``--version``.
    Exception
        With ``--debug`` or ``CUDISTR_DEBUG=1`` whatever a command raised; without it, only mistakes of cudistr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Read off the words themselves: importing a command can fail before they are parsed.
    debug = "--debug" in words or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    command = _command(words)
    try:
        parser, module = _parser(command)
        arguments = parser.parse_args(words)
        arguments.argv = words
        return int(module.run(arguments))
    except KeyboardInterrupt:
        print("cudistr: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug or not _is_expected(error):
            raise
        print(f"cudistr: error: {_line(error, command)} (--debug shows where)", file=sys.stderr)
        return 1
