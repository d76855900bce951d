"""C++ out of CUDA: the emulated machine, and kernels for it, compiled by g++ into shared libraries."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "emulated"  # of what g++ made of the machine and of kernels
SHARED_LIMIT = 232448  # bytes of shared memory that a thread block of any GPU may have: 227 KB
# The machine stands in for the runtime of -fsanitize=thread and -fsanitize=undefined (see machine.cpp). Products and
# sums stay apart, or results would depend on the host.
KERNEL_OPTIONS = (
    "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-extern-tls-init", "-fno-exceptions",
    "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,alignment,null,shift,signed-integer-overflow,integer-divide-by-zero",
    "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-sign-compare", "-Wno-unused-variable",
    "-Wno-psabi",
)  # fmt: skip
MACHINE_OPTIONS = ("-std=c++17", "-O3", "-g1", "-fPIC", "-Wall", "-Wextra")
_INCLUDED = re.compile(r'#include "(kernels/(\w+)\.cu)"')
_DYNAMIC = re.compile(r"extern\s+__shared__\s+[^;]*?(\w+)\[\]\s*;")


class CompileFailed(Exception):
    """g++ refused; the text is its log."""


def compiler() -> str:
    """Path of g++.

    Raises
    ------
    RuntimeError
    """
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise RuntimeError(
            "the emulated machine needs g++ 11 or newer, which is not there. "
            "Install it (Debian, Ubuntu: apt-get install g++), or name one in CXX."
        )
    return found


def _run(command: Sequence[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise CompileFailed(run.stderr)


@functools.cache
def digest() -> str:
    """Of all that decides how kernels are emulated, but for their own source."""
    sources = sorted(path for path in HERE.rglob("*") if path.suffix in (".cpp", ".hpp", ".cuh"))
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    parts = [
        *(path.name.encode() + path.read_bytes() for path in sources),
        version,
        repr((KERNEL_OPTIONS, MACHINE_OPTIONS)).encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _build_machine(library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="cudistr-machine-") as temporary:
        made = Path(temporary) / "machine.so"
        _run(
            [compiler(), *MACHINE_OPTIONS, "-shared", "-o", str(made), *map(str, sorted(HERE.glob("*.cpp")))]
        )
        library.parent.mkdir(parents=True, exist_ok=True)
        copy = library.with_suffix(f".{os.getpid()}")
        shutil.copy(made, copy)
        os.replace(copy, library)  # another process sees all of it or nothing


@functools.cache
def machine() -> ctypes.CDLL:
    """The machine, compiled once and loaded once per process; kernels find its functions when they are loaded."""
    library = CACHE / f"machine-{digest()[:16]}.so"
    if not library.is_file():
        _build_machine(library)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded.machine_report.restype = ctypes.c_char_p
    loaded.machine_report_caller.restype = ctypes.c_void_p
    loaded.machine_statistics.restype = ctypes.POINTER(ctypes.c_uint64)
    return loaded


def kernel(unit: str, includes: Sequence[str]) -> bytes:
    """A translation unit of :func:`cudistr.compiler.unit` as a shared library.

    Raises
    ------
    CompileFailed
    """
    found = _INCLUDED.search(unit)
    if found is None:
        raise CompileFailed(f"the unit includes no kernel:\n{unit}")
    path = next(Path(folder) / found[1] for folder in includes if (Path(folder) / found[1]).is_file())
    dynamic = _DYNAMIC.search(path.read_text())
    name, limit = (dynamic[1], SHARED_LIMIT) if dynamic else ("machine_no_dynamic_shared", 16)
    tail = (
        f'extern "C" {{\nthread_local unsigned char {name}[{limit}] __attribute__((aligned(1024)));\n}}\n'
        f"MACHINE_KERNEL({found[2]}, {name}, {limit})\n"
    )
    # The twins of ptx come first, so that they are found in place of the real ones.
    folders = [f"-I{folder}" for folder in (HERE, *includes)]
    with tempfile.TemporaryDirectory(prefix="cudistr-kernel-") as temporary:
        source, compiled, library = (Path(temporary) / f"{found[2]}{end}" for end in (".cpp", ".o", ".so"))
        source.write_text(f'#include "machine.hpp"\n#line 1 "unit"\n{unit}{tail}')
        _run([compiler(), *KERNEL_OPTIONS, *folders, "-c", "-o", str(compiled), str(source)])
        # Linked without the sanitizers: what they call is the machine's.
        _run([compiler(), "-shared", "-o", str(library), str(compiled), "-lm"])
        return library.read_bytes()


def source_lines(library: str, address: int, offset: int) -> list[str]:
    """Function and line of an address in a loaded library, the innermost first."""
    command = ["addr2line", "-Cfie", library, hex(address - offset - 1)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()
    return [
        f"{where} in {name}" for name, where in zip(lines[::2], lines[1::2], strict=False) if "?" not in where
    ]
