"""``cudistr doctor``: what is there, what is wrong, and how to mend it.

:func:`gather` asks the machine and catches whatever goes wrong; the ``check_*`` functions are pure and turn
the facts into lines, so that every line can be tested without a GPU. Nothing here raises.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

import cudistr

__all__ = ["Check", "Facts", "Gpu", "add_arguments", "checks", "gather", "report", "run"]

OLDEST_CAPABILITY = (8, 0)  # mma.sync for bfloat16, ldmatrix and cp.async came with it
OLDEST_CUPY = 14  # the first with bfloat16
OLDEST_NUMPY_BFLOAT16 = (2, 1, 2)  # CuPy needs it for bfloat16
PACKAGES = ("numpy", "ml_dtypes")
VARIABLES = (
    "CUDISTR_CACHE_DIR",
    "CUDISTR_DEBUG",
    "CUDISTR_KERNEL",
    "CUDISTR_TUNED",
    "CUPY_TF32",
    "CUPY_CACHE_DIR",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
)
SHARED_BYTES_EVERYWHERE = 99 << 10  # what a block may have on every GPU from compute capability 8.0 on
INSUFFICIENT_DRIVER, NO_DEVICE = 35, 100  # cudaError_t; without any driver the first is what comes
SELF_TEST_BOUND = (
    5e-3  # float16 rounds P and the output to 2**-11 each, about 1e-3 together; beyond 5e-3 is a fault
)

Status = Literal["ok", "note", "problem"]
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes
    ----------
    status : "ok", "note" or "problem"
        A note limits something and is no fault; a problem keeps attention from running as the machine intends.
    found : str
        What was found.
    remedy : str
        What to do about it, empty if there is nothing to do.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as CuPy reports it; memory in bytes, ``shared_optin`` in bytes per block."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int
    shared_optin: int

    @property
    def supported(self) -> bool:
        """Whether the kernels run on it."""
        return self.capability >= OLDEST_CAPABILITY

    @property
    def arch(self) -> int:
        """Architecture as NVRTC counts: 90 for compute capability 9.0."""
        return 10 * self.capability[0] + self.capability[1]


@dataclass(frozen=True)
class Cache:
    """The folder of compiled kernels; ``folder`` is None when they are kept in memory only, and ``why`` says why."""

    folder: str | None
    files: int = 0
    size: int = 0
    why: str = ""


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled past the cache."""

    kernel: str
    architecture: str
    seconds: float


@dataclass(frozen=True)
class SelfTest:
    """A small attention: largest error against the reference, and seconds of the first and the second call."""

    where: str
    errors: Mapping[str, float]
    first_s: float
    second_s: float


@dataclass(frozen=True)
class Facts:
    """What :func:`gather` found. None means absent; ``errors`` says why something could not be found out.

    ``driver`` and ``runtime`` are CUDA versions (major, minor); ``driver`` is the newest CUDA that the
    driver runs. ``sources`` counts the .cu and .cuh files. ``tiles`` and ``break_even`` are what ``cudistr tune``
    has kept for the GPU of the self test. ``nccl`` and ``mpi`` are asked for where there are several GPUs.
    """

    python: str = ""
    system: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    cupy_wheels: Mapping[str, str] = field(default_factory=dict)
    cupy: str | None = None
    driver: tuple[int, int] | None = None
    runtime: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] | None = None
    nvrtc: tuple[int, int] | None = None
    architectures: tuple[int, ...] | None = None
    sources: tuple[str, int, int] | None = None
    cache: Cache | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    tiles: tuple[str, ...] = ()
    break_even: tuple[str, ...] = ()
    nccl: str | None = None
    mpi: str | None = None
    compiled: Compiled | None = None
    self_test: SelfTest | None = None
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> Gpu | None:
        """The GPU that the self test runs on: the first that is supported."""
        return next((gpu for gpu in self.gpus or () if gpu.supported), None)

    @property
    def wants_gpu(self) -> bool:
        """Whether this machine has an NVIDIA driver with a GPU behind it, as far as can be told."""
        return self.driver is not None and self.gpus != ()


# --- asking the machine ------------------------------------------------------------------------------------


def _pair(version: int) -> tuple[int, int]:
    """CUDA's integer 13020 as (13, 2)."""
    return version // 1000, version % 1000 // 10


def _distributions() -> dict[str, str]:
    """Installed CuPy distributions: more than one share, and break, one folder."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == "cupy" or name.startswith(("cupy-cuda", "cupy-rocm")):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _driver() -> tuple[int, int] | None:
    """The driver's CUDA version, asked without CuPy. None: there is no driver."""
    for library in ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1", "libcuda.so"):
        try:
            cuda = ctypes.CDLL(library)
        except OSError:
            continue
        version = ctypes.c_int(0)
        status = cuda.cuDriverGetVersion(ctypes.byref(version))
        if status != 0:
            raise RuntimeError(f"cuDriverGetVersion returned {status}")
        return _pair(version.value) if version.value else None
    return None


def _import_cupy() -> str:
    return str(importlib.import_module("cupy").__version__)


def _runtime() -> tuple[int, int]:
    import cupy

    return _pair(cupy.cuda.runtime.runtimeGetVersion())


def _gpus() -> tuple[Gpu, ...]:
    import cupy

    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        without_driver = error.status == INSUFFICIENT_DRIVER and _driver() is None
        if error.status == NO_DEVICE or without_driver:
            return ()
        raise
    found = []
    for index in range(count):
        properties = runtime.getDeviceProperties(index)
        name = properties["name"]
        found.append(
            Gpu(
                index=index,
                name=name.decode() if isinstance(name, bytes) else str(name),
                capability=(int(properties["major"]), int(properties["minor"])),
                memory=int(properties["totalGlobalMem"]),
                multiprocessors=int(properties["multiProcessorCount"]),
                shared_optin=int(properties["sharedMemPerBlockOptin"]),
            )
        )
    return tuple(found)


def _nvrtc() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    major, minor = nvrtc.getVersion()
    return int(major), int(minor)


def _architectures() -> tuple[int, ...]:
    from cupy.cuda import nvrtc

    return tuple(sorted(int(arch) for arch in nvrtc.getSupportedArchs()))


def _nccl() -> str:
    from cupy.cuda import nccl

    if not nccl.available:
        raise RuntimeError("CuPy does not find it")
    version = int(nccl.get_version())
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _mpi() -> str:
    from mpi4py import MPI

    return (
        f"mpi4py {importlib.metadata.version('mpi4py')}, {MPI.Get_library_version().splitlines()[0].strip()}"
    )


def _sources() -> tuple[str, int, int]:
    from cudistr import compiler

    folder = pathlib.Path(compiler.SOURCES)
    return str(folder), sum(1 for _ in folder.rglob("*.cu")), sum(1 for _ in folder.rglob("*.cuh"))


def _cache() -> Cache:
    from cudistr import compiler

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = compiler.cache_folder()
    if folder is None:
        return Cache(None, why=str(caught[0].message) if caught else "")
    sizes = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process has just replaced it
            sizes.append(path.stat().st_size)
    return Cache(str(folder), len(sizes), sum(sizes))


def _tiles(gpu: Gpu | None) -> tuple[str, ...]:
    """Tiles that are kept for a GPU, in words."""
    from cudistr import plan, tuned

    if gpu is None:
        return ()
    device = plan.Device(gpu.arch, gpu.shared_optin, gpu.multiprocessors)
    return tuple(
        f"{key.dtype} {f'lsh{key.group_size}' if key.group_size else 'exact'} {key.head_dim}: "
        f"{tile.block_m} x {tile.tile_k}"
        for key, tile in tuned.read_tiles(device, gpu.name)
    )


def _break_even(gpu: Gpu | None) -> tuple[str, ...]:
    """From how many keys on reductions were measured to be faster on a GPU, in words."""
    from cudistr import plan, tuned

    if gpu is None:
        return ()
    device = plan.Device(gpu.arch, gpu.shared_optin, gpu.multiprocessors)
    columns: dict[tuned.Column, list[str]] = {}
    for (kind, kept, within), column, keys in tuned.read_break_even(device, gpu.name):
        name = kind + " near" * kept + " tolerance" * within
        columns.setdefault(column, []).append(f"{name} {'never' if math.isinf(keys) else f'{keys:.0f}'}")
    return tuple(f"{kernel} {dim}: {', '.join(found)}" for (kernel, dim), found in columns.items())


def _compile(gpu: Gpu | None) -> Compiled:
    """Compile the attention kernel of a small problem for a GPU, or for the oldest architecture without one."""
    from cudistr import compiler, normalize, plan

    capability = 10 * OLDEST_CAPABILITY[0] + OLDEST_CAPABILITY[1] if gpu is None else gpu.arch
    q = np.zeros((1, 1, 128, 64), np.float16)
    device = plan.Device(capability, SHARED_BYTES_EVERYWHERE if gpu is None else gpu.shared_optin)
    kernel, _ = plan.attention_kernel(normalize.problem(q, q, q), device)
    architecture = compiler.target(capability, kernel.specific)
    start = time.perf_counter()
    compiler.compile_cubin(kernel, architecture)
    return Compiled(kernel.name, architecture, time.perf_counter() - start)


def _plain_softmax_attention(q: Any, k: Any, v: Any) -> Any:
    """Attention written out once more, so that the reference is tested against something else than itself."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3])
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    return weights @ v / weights.sum(axis=3, keepdims=True)


def _self_test(gpu: Gpu | None) -> SelfTest:
    """Exact and grouped attention of one small problem on a GPU, or on NumPy arrays."""
    random = np.random.RandomState(0)
    q, k, v = (random.standard_normal((1, 2, 200, 64)).astype(np.float16) for _ in range(3))
    methods = {"exact": None, "LSH(group_size=2)": cudistr.LSH(group_size=2)}
    if gpu is None:
        start = time.perf_counter()
        out = cudistr.attention(q, k, v)
        spent = time.perf_counter() - start
        error = float(np.abs(out - _plain_softmax_attention(q, k, v)).max())
        return SelfTest("NumPy", {"exact": error}, spent, spent)
    import cupy

    errors: dict[str, float] = {}
    seconds: list[float] = []
    with cupy.cuda.Device(gpu.index) as device:
        inputs = [cupy.asarray(x) for x in (q, k, v)]
        for name, reduction in methods.items():
            for _ in range(1 if seconds else 2):  # twice for the first method: cold, then warm
                start = time.perf_counter()
                out = cudistr.attention(*inputs, reduction=reduction)
                device.synchronize()
                seconds.append(time.perf_counter() - start)
            expected = cudistr.reference.attention(q, k, v, reduction=reduction)
            errors[name] = float(np.abs(cupy.asnumpy(out).astype(np.float64) - expected).max())
    return SelfTest(f"GPU {gpu.index}", errors, seconds[0], seconds[1])


def _describe(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def gather(self_test: bool = True) -> Facts:
    """Ask the machine. Every question that fails becomes an entry in ``errors``; nothing is raised.

    Parameters
    ----------
    self_test : bool, default True
        Whether to run the small attention, which may compile kernels.
    """
    errors: dict[str, str] = {}

    def ask(name: str, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except Exception as error:
            errors[name] = _describe(error)
            return None

    versions = {name: ask(name, functools.partial(importlib.metadata.version, name)) for name in PACKAGES}
    wheels = ask("cupy_wheels", _distributions) or {}
    cupy = None
    if wheels or importlib.util.find_spec("cupy") is not None:
        cupy = ask("cupy", _import_cupy)
        wheels = wheels or {"cupy": cupy or "of unknown version"}  # built from source, without metadata
    driver = ask("driver", _driver)
    asked: dict[str, Any] = {}
    if cupy is not None:
        asked = {
            "runtime": ask("runtime", _runtime),
            "gpus": ask("gpus", _gpus),
            "nvrtc": ask("nvrtc", _nvrtc),
            "architectures": ask("architectures", _architectures),
        }
    facts = Facts(
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=ask("system", platform.platform) or sys.platform,
        packages={name: version for name, version in versions.items() if version is not None},
        cupy_wheels=wheels,
        cupy=cupy,
        driver=driver,
        sources=ask("sources", _sources),
        cache=ask("cache", _cache),
        environ={name: os.environ[name] for name in VARIABLES if name in os.environ},
        errors=errors,
        **asked,
    )
    if len(facts.gpus or ()) > 1:
        facts = dataclasses.replace(facts, nccl=ask("nccl", _nccl), mpi=ask("mpi", _mpi))
    gpu = facts.device
    facts = dataclasses.replace(
        facts,
        tiles=ask("tiles", lambda: _tiles(gpu)) or (),
        break_even=ask("break_even", lambda: _break_even(gpu)) or (),
    )
    if not self_test:
        return facts
    device = facts.device
    compiled = ask("compiled", lambda: _compile(device)) if facts.nvrtc is not None else None
    result = ask("self_test", lambda: _self_test(device))
    return dataclasses.replace(facts, compiled=compiled, self_test=result)


# --- facts into lines --------------------------------------------------------------------------------------


def _dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def _major(version: str) -> int:
    head = version.partition(".")[0]
    return int(head) if head.isdigit() else 0


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.1.2rc1" gives (2, 1)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _wheel_for(driver: tuple[int, int] | None) -> str:
    """The CuPy wheel that a driver can run; CUDA 13 unless the driver is older."""
    return "cupy-cuda12x" if driver is not None and driver[0] < 13 else "cupy-cuda13x"


def _extra_for(driver: tuple[int, int] | None) -> str:
    return f"cuda{_wheel_for(driver)[9:11]}"


def check_machine(facts: Facts) -> list[Check]:
    """Python and the operating system."""
    system = Check("system", "ok", facts.system)
    if not facts.system.startswith("Linux"):
        system = Check("system", "note", facts.system, "The kernels are tested on Linux only.")
    return [Check("python", "ok", facts.python), system, Check("cudistr", "ok", cudistr.__version__)]


def check_packages(facts: Facts) -> list[Check]:
    """NumPy and ml_dtypes."""
    lines = []
    for package in PACKAGES:
        version = facts.packages.get(package)
        if version is None:
            why = facts.errors.get(package, "not installed")
            lines.append(Check(package, "problem", why, f"pip install {package}"))
        elif package == "numpy" and _release(version) < OLDEST_NUMPY_BFLOAT16:
            needed = _dotted(OLDEST_NUMPY_BFLOAT16)
            lines.append(
                Check(
                    package, "note", version, f"CuPy needs NumPy {needed} for bfloat16: pip install -U numpy"
                )
            )
        else:
            lines.append(Check(package, "ok", version))
    return lines


def check_cupy(facts: Facts) -> list[Check]:
    """One CuPy wheel, importable, new enough and of the driver's CUDA."""
    wheels = facts.cupy_wheels
    listed = ", ".join(f"{name} {version}" for name, version in wheels.items())
    keep = _wheel_for(facts.driver)
    if len(wheels) > 1:
        wrong = [name for name in wheels if name != keep]
        takes = f"the driver runs CUDA {_dotted(facts.driver)}" if facts.driver else "for CUDA 13"
        remedy = (
            f"Uninstall {' and '.join(wrong)} and keep {keep} ({takes}). They overwrite each other's files, so "
            f"take all away first: pip uninstall -y {' '.join(wheels)} && pip install '{keep}[ctk]'"
        )
        return [Check("cupy", "problem", f"{len(wheels)} CuPy packages at once: {listed}", remedy)]
    if not wheels:
        install = f"pip install 'cudistr[{_extra_for(facts.driver)}]'"
        if facts.wants_gpu:
            return [Check("cupy", "problem", "not installed, but there is an NVIDIA driver", install)]
        return [Check("cupy", "note", "not installed", f"Needed on a machine with an NVIDIA GPU: {install}")]
    if facts.cupy is None:
        why = facts.errors.get("cupy", "cannot be imported")
        again = f"pip install --force-reinstall --no-cache-dir '{keep}[ctk]'"
        return [Check("cupy", "problem", f"{listed}: {why}", f"Install it anew: {again}")]
    if _major(facts.cupy) < OLDEST_CUPY:
        remedy = f"cudistr needs CuPy {OLDEST_CUPY} or newer: pip install -U {' '.join(wheels)}"
        return [Check("cupy", "problem", listed, remedy)]
    return [Check("cupy", "ok", listed)]


def check_cuda(facts: Facts) -> list[Check]:
    """The driver, the runtime and whether they go together."""
    if facts.driver is None:
        why = facts.errors.get("driver")
        if why is not None:
            return [
                Check("driver", "problem", why, "Reinstall the NVIDIA driver, or restart after an update.")
            ]
        remedy = "With a GPU: install the NVIDIA driver; in a container, start it with --gpus all."
        return [Check("driver", "note", "no NVIDIA driver", remedy)]
    lines = [Check("driver", "ok", f"runs CUDA up to {_dotted(facts.driver)}")]
    if facts.cupy is None:
        return lines
    if facts.runtime is None:
        why = facts.errors.get("runtime", "unknown")
        again = f"pip install '{_wheel_for(facts.driver)}[ctk]'"
        return [*lines, Check("runtime", "problem", why, f"The CUDA runtime is missing: {again}")]
    found = f"CUDA {_dotted(facts.runtime)}"
    if facts.runtime[0] > facts.driver[0]:
        remedy = (
            f"The driver is older than the runtime: update the driver, or pip uninstall -y "
            f"{' '.join(facts.cupy_wheels)} && pip install '{_wheel_for(facts.driver)}[ctk]'"
        )
        return [*lines, Check("runtime", "problem", found, remedy)]
    return [*lines, Check("runtime", "ok", found)]


def check_gpus(facts: Facts) -> list[Check]:
    """Each GPU: what it is and whether it is new enough."""
    if facts.cupy is None:
        return []
    if facts.gpus is None:
        if facts.driver is None:
            return []
        why = facts.errors.get("gpus", "unknown")
        return [Check("GPU", "problem", why, "Run nvidia-smi: if it fails too, mend the driver first.")]
    if not facts.gpus:
        if facts.driver is None:
            return []
        remedy = "Look at CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all."
        return [Check("GPU", "note", "none is visible, though there is a driver", remedy)]
    lines = []
    for gpu in facts.gpus:
        found = (
            f"{gpu.name}, compute capability {_dotted(gpu.capability)}, {gpu.memory / 2**30:.1f} GiB, "
            f"{gpu.multiprocessors} SMs, {gpu.shared_optin / 2**10:.0f} KiB shared memory per block"
        )
        if gpu.supported:
            lines.append(Check(f"GPU {gpu.index}", "ok", found))
            continue
        remedy = (
            f"Older than compute capability {_dotted(OLDEST_CAPABILITY)}: use another GPU, or NumPy arrays."
        )
        lines.append(Check(f"GPU {gpu.index}", "problem" if facts.device is None else "note", found, remedy))
    return lines


def check_several_gpus(facts: Facts) -> list[Check]:
    """Where there are several GPUs: what :mod:`cudistr.distributed` needs to use them together."""
    if len(facts.gpus or ()) < 2:
        return []
    major = facts.runtime[0] if facts.runtime is not None else 13
    lines = []
    for name, version, package in (
        ("nccl", facts.nccl, f"nvidia-nccl-cu{major}"),
        ("mpi", facts.mpi, "mpi4py, and mpich if the machine has no MPI"),
    ):
        if version is not None:
            lines.append(Check(name, "ok", version))
            continue
        remedy = f"cudistr.distributed uses several GPUs with it: pip install {package}"
        lines.append(Check(name, "note", facts.errors.get(name, "unknown"), remedy))
    return lines


def check_nvrtc(facts: Facts) -> list[Check]:
    """NVRTC, and whether it knows each GPU."""
    if facts.cupy is None:
        return []
    if facts.nvrtc is None:
        why = facts.errors.get("nvrtc", "unknown")
        status: Status = "problem" if facts.gpus else "note"
        remedy = f"NVRTC compiles the kernels: pip install '{_wheel_for(facts.driver)}[ctk]'"
        return [Check("nvrtc", status, why, remedy)]
    known = facts.architectures or ()
    listed = ", ".join(f"sm_{arch}" for arch in known) or facts.errors.get("architectures", "unknown")
    lines = [Check("nvrtc", "ok", f"{_dotted(facts.nvrtc)}, compiles for {listed}")]
    for gpu in facts.gpus or ():
        if not known or not gpu.supported or gpu.arch in known:
            continue
        below = [arch for arch in known if arch < gpu.arch]
        name = f"GPU {gpu.index} target"
        newer = (
            f"For its own architecture use a newer NVRTC: pip install -U '{_wheel_for(facts.driver)}[ctk]'"
        )
        if below:
            found = (
                f"NVRTC does not know sm_{gpu.arch}: kernels become PTX of compute_{below[-1]} for the driver"
            )
            lines.append(Check(name, "note", found, newer))
        else:
            lines.append(Check(name, "problem", f"NVRTC knows nothing that sm_{gpu.arch} runs", newer))
    return lines


def check_kernels(facts: Facts) -> list[Check]:
    """The CUDA sources, and the folder of what was compiled from them."""
    again = "Install cudistr anew: pip install --force-reinstall cudistr"
    if facts.sources is None:
        lines = [Check("kernels", "problem", facts.errors.get("sources", "not found"), again)]
    else:
        folder, kernels, headers = facts.sources
        found = f"{kernels} kernels and {headers} headers in {folder}"
        lines = [Check("kernels", "ok", found) if kernels else Check("kernels", "problem", found, again)]
    cache = facts.cache
    remedy = "Set CUDISTR_CACHE_DIR to a folder that can be written; until then each process compiles anew."
    if cache is None:
        return [*lines, Check("cache", "note", facts.errors.get("cache", "unknown"), remedy)]
    if cache.folder is None:
        return [*lines, Check("cache", "note", cache.why or "in memory only", remedy)]
    return [
        *lines,
        Check("cache", "ok", f"{cache.folder}: {cache.files} cubins, {cache.size / 2**20:.1f} MiB"),
    ]


def check_environment(facts: Facts) -> list[Check]:
    """Environment variables that change what happens."""
    lines = []
    for name, value in facts.environ.items():
        if name == "LD_LIBRARY_PATH":
            remedy = "It can hide the CUDA libraries that pip installed; unset it if a library does not load."
            lines.append(Check(name, "note" if "cuda" in value.lower() else "ok", "set", remedy))
        elif name == "CUPY_TF32" and value == "1":
            found = "1: float32 products keep about 3 decimal digits (TF32)"
            lines.append(Check(name, "note", found, "Unset it for float32-grade results."))
        elif name == "CUDISTR_TUNED" and value == "0":
            found = "0: what cudistr tune has measured is left out"
            lines.append(Check(name, "note", found, "Unset it to use them."))
        elif name == "CUDISTR_KERNEL":
            lines.append(Check(name, "note", value, "Unset it to leave the choice of kernels to cudistr."))
        elif name == "CUDA_PATH" and not pathlib.Path(value).is_dir():
            lines.append(
                Check(name, "note", f"{value} is no folder", "Unset it, or point it at a CUDA toolkit.")
            )
        else:
            lines.append(Check(name, "ok", value))
    return lines or [Check("environment", "ok", "no variable set that matters here")]


def check_tiles(facts: Facts) -> list[Check]:
    """Tiles that were measured on this GPU."""
    own = "cudistr's own"
    return _measured(facts, "tiles", own, f"Calls use {own} tiles.", "tune")


def check_break_even(facts: Facts) -> list[Check]:
    """From how many keys on reductions are taken to be faster than exact attention."""
    table = "the table of an NVIDIA H200; `python -m cudistr tune --break-even` measures this GPU"
    return _measured(facts, "break-even", table, "Calls go by another GPU's table.", "tune --break-even")


def _measured(facts: Facts, name: str, otherwise: str, meanwhile: str, command: str) -> list[Check]:
    """What a command has measured and kept, or what is in force without it."""
    fact = name.replace("-", "_")
    if fact in facts.errors:
        remedy = f"{meanwhile} Run `python -m cudistr {command}` again, or with --clear."
        return [Check(name, "note", facts.errors[fact], remedy)]
    if facts.device is None:
        return []
    found: tuple[str, ...] = getattr(facts, fact)
    return [Check(name, "ok", f"measured here: {'; '.join(found)}" if found else otherwise)]


def check_compiler(facts: Facts) -> list[Check]:
    """The one kernel that was compiled."""
    if facts.compiled is not None:
        compiled = facts.compiled
        found = f"{compiled.kernel} for {compiled.architecture} in {compiled.seconds:.2f} s"
        return [Check("compile", "ok", found)]
    if "compiled" not in facts.errors:
        return []
    remedy = "If NVRTC is fine above, install cudistr anew; if that does not help, report this line."
    return [Check("compile", "problem", facts.errors["compiled"], remedy)]


def check_self_test(facts: Facts) -> list[Check]:
    """The small attention that was run."""
    result = facts.self_test
    if result is None:
        why = facts.errors.get("self_test")
        if why is None:
            return []
        return [Check("self test", "problem", why, "Mend the problems above first; else report this line.")]
    errors = ", ".join(f"{error:.1e} ({name})" for name, error in result.errors.items())
    found = f"{result.where}: largest error {errors}"
    if result.where != "NumPy":
        found += f"; first call {result.first_s:.2f} s, then {1e3 * result.second_s:.2f} ms"
    if all(error <= SELF_TEST_BOUND for error in result.errors.values()):  # false for NaN too
        return [Check("self test", "ok", found)]
    bound = f"Results are wrong (allowed: {SELF_TEST_BOUND:.0e}). Please report this with the lines above."
    return [Check("self test", "problem", found, bound)]


CHECKS: tuple[Callable[[Facts], list[Check]], ...] = (
    check_machine,
    check_packages,
    check_cupy,
    check_cuda,
    check_gpus,
    check_several_gpus,
    check_nvrtc,
    check_kernels,
    check_environment,
    check_tiles,
    check_break_even,
    check_compiler,
    check_self_test,
)


def checks(facts: Facts) -> list[Check]:
    """All lines for the facts. A check that fails itself becomes a line too."""
    lines: list[Check] = []
    for check in CHECKS:
        try:
            lines.extend(check(facts))
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            lines.append(
                Check(name, "problem", f"the check itself failed: {_describe(error)}", "Please report this.")
            )
    return lines


def conclusion(facts: Facts, lines: Iterable[Check]) -> str:
    """The last sentence: where attention runs, or how many problems there are."""
    problems = sum(line.status == "problem" for line in lines)
    if problems:
        return f"{problems} problem{'s' if problems > 1 else ''}: mend what stands behind '->'."
    if facts.device is not None:
        return f"CuPy arrays run on the kernels (GPU {facts.device.index}, {facts.device.name})."
    return "No GPU here: NumPy arrays run on the NumPy reference, and nothing is broken."


def report(lines: Iterable[Check], last: str) -> str:
    """The table as text: status, name, what was found, and the remedy on a line of its own."""
    lines = list(lines)
    width = max(len(line.name) for line in lines)
    rows = []
    for line in lines:
        rows.append(f"{line.status:<8} {line.name:<{width}}  {line.found}")
        if line.remedy and line.status != "ok":
            rows.append(f"{'':<8} {'':<{width}}  -> {line.remedy}")
    return "\n".join([*rows, "", last])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cudistr doctor``."""
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument(
        "--no-self-test", action="store_true", help="do not run (and compile) a small attention"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report. 0: attention runs as this machine intends, 1: something is broken."""
    facts = gather(self_test=not args.no_self_test)
    lines = checks(facts)
    broken = any(line.status == "problem" for line in lines)
    last = conclusion(facts, lines)
    if args.json:
        print(
            json.dumps(
                {"ok": not broken, "conclusion": last, "checks": [asdict(line) for line in lines]}, indent=2
            )
        )
    else:
        print(report(lines, last))
    return int(broken)
