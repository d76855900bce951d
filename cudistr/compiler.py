"""Kernel name and constants in, compiled function out.

A translation unit is a few ``#define`` lines and one ``#include``; NVRTC compiles it to a cubin for one architecture,
which works without a GPU. Cubins are kept on disk under a digest of everything that went in: the unit, every header
that it reaches, the options, NVRTC's version and the architecture.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

from cudistr.errors import CompileError, CudaUnavailableError
from cudistr.plan import Kernel

__all__ = [
    "SOURCES",
    "cache_folder",
    "compile_cubin",
    "function",
    "nvrtc_version",
    "source_digest",
    "supported_architectures",
    "unit",
]


def _sources() -> Path:
    """The folder of CUDA sources: inside the package in a wheel, beside it in a checkout."""
    inside = Path(__file__).resolve().parent / "kernels_cu"
    return inside if inside.is_dir() else inside.parent.parent / "kernels_cu"


SOURCES = _sources()
_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
_OPTIONS = ("-std=c++17",)
_lock = threading.Lock()
_REMEDY = "Run `python -m cudistr doctor` for what is missing."


def _nvrtc() -> Any:
    """CuPy's NVRTC binding.

    Raises
    ------
    CudaUnavailableError
    """
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # ImportError, or whatever a broken CUDA install raises
        raise CudaUnavailableError(
            f"NVRTC, which compiles the kernels, cannot be used ({type(error).__name__}: {error}). Install CuPy with "
            f'its CUDA parts: pip install "cudistr[cuda12]" or "cudistr[cuda13]". {_REMEDY}'
        ) from error
    return nvrtc


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Version (major, minor) of NVRTC."""
    major, minor = _nvrtc().getVersion()
    return int(major), int(minor)


@functools.cache
def supported_architectures() -> list[int]:
    """Compute capabilities, times ten, that this NVRTC compiles for, in rising order."""
    return sorted(int(x) for x in _nvrtc().getSupportedArchs())


def target(capability: int, specific: bool = False) -> str:
    """NVRTC's name of the architecture: ``sm_90``, or PTX for the driver (``compute_120``) if NVRTC is too old.

    ``specific`` asks for the instructions that this architecture alone has: ``sm_90a``.

    Raises
    ------
    CudaUnavailableError
        If NVRTC is too new for the GPU.
    """
    known = supported_architectures()
    if capability in known:
        return f"sm_{capability}a" if specific else f"sm_{capability}"
    older = [x for x in known if x < capability]
    if not older:
        major, minor = nvrtc_version()
        raise CudaUnavailableError(
            f"NVRTC {major}.{minor} compiles for compute capability {known[0] / 10:.1f} and newer, the GPU has "
            f"{capability / 10:.1f}. Install a CuPy for an older CUDA."
        )
    return f"compute_{older[-1]}"


@functools.cache
def _digest(name: str) -> str:
    """Digest of a source file and of every file that it includes, directly or not."""
    seen: dict[str, bytes] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen[current] = (SOURCES / current).read_bytes()
            waiting += _INCLUDE.findall(seen[current].decode())
    return hashlib.sha256(b"\0".join(key.encode() + b"\0" + seen[key] for key in sorted(seen))).hexdigest()


def source_digest(kernel: str) -> str:
    """Digest of everything that a kernel is compiled from, but for its constants."""
    return _digest(f"kernels/{kernel}.cu")


def unit(kernel: Kernel) -> str:
    """The translation unit of a kernel."""
    defines = "".join(f"#define {key} {value}\n" for key, value in kernel.constants)
    include = f"kernels/{kernel.name}.cu"
    return f'// sources {source_digest(kernel.name)}\n{defines}#include "{include}"\n'


def compile_cubin(kernel: Kernel, architecture: str, *, report: bool = False) -> tuple[bytes, str]:
    """Compile with NVRTC, past the cache.

    Parameters
    ----------
    architecture : str
        ``sm_90`` for a cubin, ``compute_90`` for PTX.
    report : bool
        Whether the log lists registers and spills.

    Returns
    -------
    code : bytes
    log : str

    Raises
    ------
    CompileError
        With the compiler's log.
    CudaUnavailableError
        If there is no NVRTC.
    """
    nvrtc = _nvrtc()
    options = (*_OPTIONS, *kernel.options, f"-arch={architecture}", f"-I{SOURCES}")
    # Quoted includes are looked up beside the unit first, so it is named as if it lay among the sources.
    program = nvrtc.createProgram(unit(kernel), str(SOURCES / f"{kernel.name}.unit.cu"), (), ())
    try:
        try:
            nvrtc.compileProgram(program, (*options, "-Xptxas=-v") if report else options)
        except nvrtc.NVRTCError as error:
            constants = ", ".join(f"{key}={value}" for key, value in kernel.constants)
            raise CompileError(
                f"{kernel.name} ({constants}) did not compile for {architecture}: {error}. {_REMEDY}",
                nvrtc.getProgramLog(program),
            ) from error
        log = nvrtc.getProgramLog(program)
        if architecture.startswith("compute_"):
            return nvrtc.getPTX(program), log
        return nvrtc.getCUBIN(program) + b"\0", log  # CuPy drops the last byte, which an ELF file needs
    finally:
        nvrtc.destroyProgram(program)


def _wanted_folder() -> Path:
    named = os.environ.get("CUDISTR_CACHE_DIR")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "cudistr" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cudistr"


@functools.cache
def cache_folder() -> Path | None:
    """Where cubins are kept: ``CUDISTR_CACHE_DIR``, or ``cudistr`` in the user's cache folder.

    None, with one warning, if it cannot be written; kernels are then compiled anew in every process.
    """
    folder = None
    try:
        folder = _wanted_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # Path.home raises RuntimeError for a user without a home folder
        warnings.warn(
            f"cudistr cannot write its kernel cache {folder or 'folder'} ({error}), so kernels are compiled anew "
            "in every process. Set CUDISTR_CACHE_DIR to a folder that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return folder


def _read(path: Path) -> bytes | None:
    """Code from a cache file, None if it is not there or damaged: the first 32 bytes are its digest."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, code = stored[:32], stored[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Put code into the cache; a reader sees all of the file or none, and a full disk is not an error."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = file.name
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _cached(kernel: Kernel, architecture: str) -> bytes:
    key = "\0".join((unit(kernel), *_OPTIONS, *kernel.options, architecture, str(nvrtc_version())))
    folder = cache_folder()
    path = (
        None
        if folder is None
        else folder / f"{kernel.name}-{hashlib.sha256(key.encode()).hexdigest()[:40]}.bin"
    )
    code = None if path is None else _read(path)
    if code is None:
        code, _ = compile_cubin(kernel, architecture)
        if path is not None:
            _write(path, code)
    return code


_functions: dict[tuple[Kernel, int], Any] = {}


def function(kernel: Kernel, capability: int, device: int) -> Any:
    """The compiled kernel, loaded on the current device, which must be ``device``.

    Returns
    -------
    cupy.cuda.function.Function

    Raises
    ------
    CompileError, CudaUnavailableError
    """
    found = _functions.get((kernel, device))
    if found is not None:
        return found
    with _lock:
        found = _functions.get((kernel, device))
        if found is None:
            import cupy

            module = cupy.cuda.function.Module()
            code = _cached(kernel, target(capability, kernel.specific))
            try:
                module.load(code)
            except cupy.cuda.driver.CUDADriverError as error:
                raise CudaUnavailableError(
                    f"the CUDA driver does not load the kernel {kernel.name} ({error}). If it is older than NVRTC's "
                    "CUDA {}.{}, update it, or install a CuPy for its CUDA. ".format(*nvrtc_version())
                    + _REMEDY
                ) from error
            found = module.get_function(kernel.name)
            if kernel.shared_bytes > 48 * 1024:  # what a kernel may have without asking
                attribute = cupy.cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                cupy.cuda.driver.funcSetAttribute(found.ptr, attribute, kernel.shared_bytes)
            _functions[kernel, device] = found
    return found
