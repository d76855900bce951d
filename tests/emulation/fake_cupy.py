"""A stand-in for CuPy whose device is the emulated machine: what cudistr and its GPU tests use of CuPy, no more.

Arrays are NumPy arrays of a subclass. The difference is in what a kernel may touch: exactly the elements of the arrays
whose addresses it was given, and of fresh memory only what was written before.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import os
import shutil
import sys
import tempfile
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cudistr import compiler, launch, tensormap
from cudistr import plan as planner
from tests.cpu.fakes import forgotten
from tests.emulation import build

GUARD = 4096  # bytes around every allocation that belong to nobody
POISON = 0xFF  # in every byte: NaN in every float, and no column of a head


class EmulationError(Exception):
    """A kernel did what a GPU would have forgiven or crashed at. The text says what, which thread, and where."""


class Settings:
    """Of the emulated device; tests change them."""

    capability = 90
    shared_bytes = 227 * 1024
    multiprocessors = (
        2  # few, so that a thread block of a kernel that stays on the GPU has several tiles to do
    )
    seed = 0  # of the order in which warps and lanes run


class Statistics:
    """What the launches since the last :meth:`clear` executed, in warp instructions (copies: in threads' chunks)."""

    NAMES = (
        "multiplications", "matrix_loads", "matrix_load_conflicts", "copies", "barriers", "shuffles", "reads", "writes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.launches: list[str] = []
        self.counts = dict.fromkeys(self.NAMES, 0)


statistics = Statistics()


# Memory


class _Buffer(np.ndarray):
    """Bytes of one allocation, with a map of those that have been written; None once the host has written any."""

    written: np.ndarray | None = None


def _memory(size: int) -> _Buffer:
    """Fresh memory."""
    whole = np.empty(size + 2 * GUARD + 512, np.uint8)
    start = GUARD + -(_address(whole) + GUARD) % 512  # CuPy's allocations begin at multiples of 512
    buffer = whole[start : start + size].view(_Buffer)
    buffer.fill(POISON)
    buffer.written = np.zeros(size, np.uint8)
    _memories[_address(buffer)] = buffer
    return buffer


_memories: weakref.WeakValueDictionary[int, _Buffer] = weakref.WeakValueDictionary()  # alive


def _memcpy_async(target: int, source: int, size: int, kind: int, stream: int) -> None:
    """``cupy.cuda.runtime.memcpyAsync`` within the device."""
    for start, buffer in list(_memories.items()):
        if start <= target < start + buffer.size and buffer.written is not None:
            assert target + size <= start + buffer.size
            buffer.written[target - start : target - start + size] = 1
    ctypes.memmove(target, source, size)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


class MemoryPointer:
    """An address in device memory."""

    device_id = 0

    def __init__(self, array: np.ndarray, offset: int = 0) -> None:
        self.array, self.offset = array, offset

    @property
    def ptr(self) -> int:
        """The address; a launch that gets it may touch the array."""
        _seen.append(weakref.ref(self.array))
        return _address(self.array) + self.offset

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.array, self.offset + offset)

    def memset_async(self, value: int, size: int) -> None:
        """As CuPy's."""
        buffer = buffer_of(self.array)
        assert buffer is not None
        buffer[self.offset : self.offset + size] = value
        if buffer.written is not None:
            buffer.written[self.offset : self.offset + size] = 1


_seen: deque[weakref.ref[np.ndarray]] = deque(
    maxlen=256
)  # arrays whose address was asked for, the newest last
_scratch: weakref.WeakValueDictionary[int, _Buffer] = (
    weakref.WeakValueDictionary()
)  # plain allocations, alive


def _alloc(size: int) -> MemoryPointer:
    """``cupy.cuda.alloc``."""
    buffer = _memory(size)
    _scratch[_address(buffer)] = buffer
    return MemoryPointer(buffer)


def buffer_of(array: np.ndarray) -> _Buffer | None:
    base: Any = array
    while base is not None:
        if isinstance(base, _Buffer):
            return base
        base = base.base
    return None


class ndarray(np.ndarray):
    """An array on the device. Made by this constructor without memory, its elements have no value yet."""

    __module__ = "cupy"

    def __new__(
        cls, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None, order: str = "C"
    ) -> ndarray:
        kind = np.dtype(dtype)
        if memptr is None:
            memptr = MemoryPointer(_memory(int(np.prod(shape, dtype=np.int64)) * kind.itemsize))
        return np.ndarray.__new__(cls, shape, kind, memptr.array, memptr.offset, strides, order)  # type: ignore[call-overload, no-any-return]

    @property
    def data(self) -> MemoryPointer:  # type: ignore[override]
        """The address of the first element."""
        return MemoryPointer(self)

    @property
    def device(self) -> Device:  # type: ignore[override]
        """The device."""
        return Device(0)

    def _written(self) -> None:
        buffer = buffer_of(self)
        if buffer is not None:
            buffer.written = None

    def __setitem__(self, key: Any, value: Any) -> None:
        self._written()
        super().__setitem__(key, value)

    def fill(self, value: Any) -> None:
        """As NumPy's."""
        self._written()
        super().fill(value)

    def set(self, value: np.ndarray, stream: Any = None) -> None:
        """Copy from the host."""
        self[...] = value

    def get(self) -> np.ndarray:
        """Copy to the host."""
        return asnumpy(self)

    def copy(self, order: str = "C") -> ndarray:  # type: ignore[override]
        """As NumPy's."""
        return asarray(asnumpy(self))


def _guarded(array: np.ndarray) -> ndarray:
    """A copy in memory of the device, with a value in every element."""
    result = ndarray(array.shape, array.dtype)
    result[...] = array
    return result


def asarray(values: Any, dtype: Any = None) -> ndarray:
    """As CuPy's: the array itself if it is one of the device."""
    if type(values) is ndarray and dtype in (None, values.dtype):
        return values
    return _guarded(np.asarray(values, dtype))


def asnumpy(array: Any, stream: Any = None) -> np.ndarray:
    """A copy on the host."""
    return np.array(np.asarray(array).view(np.ndarray))


def ascontiguousarray(array: ndarray) -> ndarray:
    """As CuPy's."""
    return array if array.flags.c_contiguous else _guarded(array)


def _like_cupy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A NumPy function whose results are arrays of the device."""

    def wrapped(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        if not isinstance(result, np.ndarray | np.generic) or isinstance(result, np.bool_):
            return result
        array = np.asarray(result)
        return array.view(ndarray) if buffer_of(array) is not None else _guarded(array)

    return wrapped


# The driver


class Device:
    """The one device."""

    def __init__(self, device: int = 0) -> None:
        self.id = int(device)

    @property
    def compute_capability(self) -> str:
        """As CuPy gives it."""
        return str(Settings.capability)

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Stream:
    """Work is done when it is queued."""

    null: Stream
    ptr = 0
    done = True

    def __init__(self, non_blocking: bool = False) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def wait_event(self, event: Event) -> None:
        """Nothing is ever under way."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


Stream.null = Stream()


class Event:
    """It has happened when it is recorded."""

    done = True

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        """Nothing is ever under way."""


class _Region(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("valid", ctypes.c_void_p),
        ("written", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p),
        ("dynamic_shared", ctypes.c_void_p),
        ("blocks", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("dynamic_bytes", ctypes.c_uint32),
        ("dynamic_limit", ctypes.c_uint32),
        ("parameter_bytes", ctypes.c_uint32),
    )


def _reach(array: np.ndarray) -> tuple[int, int]:
    """First byte, and one past the last, of what an array's elements occupy."""
    start = _address(array)
    if array.size == 0:
        return start, start
    spans = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    return start + sum(s for s in spans if s < 0), start + sum(s for s in spans if s > 0) + array.itemsize


def _region(array: np.ndarray, keep: list[Any]) -> _Region:
    low, high = _reach(array)
    valid = None
    if high - low != array.nbytes or not (array.flags.c_contiguous or array.flags.f_contiguous):
        valid = np.zeros(high - low, np.uint8)
        np.lib.stride_tricks.as_strided(
            valid[_address(array) - low :], (*array.shape, array.itemsize), (*array.strides, 1)
        )[...] = 1
    buffer = buffer_of(array)
    written = None
    if buffer is not None and buffer.written is not None:
        written = _address(buffer.written) + low - _address(buffer)
    name = f"an array {array.shape} of {array.dtype}".encode()
    keep += [valid, buffer, name]
    return _Region(low, high - low, None if valid is None else _address(valid), written, name)


class Function:
    """A loaded kernel."""

    _numbers = itertools.count(1)
    _loaded: ClassVar[dict[int, Function]] = {}

    def __init__(self, library: ctypes.CDLL, path: str, name: str) -> None:
        self.library, self.path, self.name = library, path, name
        library.machine_dynamic_shared.restype = ctypes.c_void_p
        self.ptr = next(self._numbers)
        self._loaded[self.ptr] = self

    def launch(self, blocks: tuple[int, int, int], threads: int, shared_bytes: int, parameters: int) -> None:
        """Run on the machine.

        Raises
        ------
        EmulationError
        """
        machine = build.machine()
        # The driver's array of pointers to parameters; cudistr's kernels have one, a struct.
        first = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        assert first is not None
        raw = ctypes.string_at(first, self.library.machine_parameter_bytes())
        words = set(np.frombuffer(raw[: len(raw) // 8 * 8], np.uint64).tolist())
        keep: list[Any] = []
        regions, known = [], set()
        for array in (*(seen() for seen in _seen), *_scratch.values()):
            if array is None:
                continue
            low, high = _reach(array)
            key = (low, high, array.strides)
            if low < high and key not in known and any(low <= word < high for word in words):
                known.add(key)
                regions.append(_region(array, keep))
        table = (_Region * len(regions))(*regions)
        launch = _Launch(
            kernel=ctypes.cast(self.library.machine_run, ctypes.c_void_p).value,
            parameters=ctypes.cast(ctypes.c_char_p(raw), ctypes.c_void_p).value,
            dynamic_shared=self.library.machine_dynamic_shared(),
            blocks=(ctypes.c_uint32 * 3)(*blocks),
            seed=Settings.seed,
            regions=table,
            region_count=len(regions),
            threads=threads,
            dynamic_bytes=shared_bytes,
            dynamic_limit=self.library.machine_dynamic_limit(),
            parameter_bytes=len(raw),
        )
        failed = machine.machine_launch(ctypes.byref(launch))
        statistics.launches.append(self.name)
        for i, name in enumerate(Statistics.NAMES):
            statistics.counts[name] += int(machine.machine_statistics()[i])
        if failed:
            report = machine.machine_report().decode()
            caller = machine.machine_report_caller()
            offset = _load_offset(self.path)
            where = build.source_lines(self.path, caller, offset) if caller else []
            raise EmulationError("\n    at ".join([f"{self.name}: {report}", *where]))


def _load_offset(path: str) -> int:
    """Where a shared library was loaded."""
    with open("/proc/self/maps") as maps:
        return next(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(path))


class Module:
    """A cubin, which here is a shared library."""

    _numbers = itertools.count(1)

    def load(self, code: bytes) -> None:
        """Load it into the process."""
        build.machine()
        self.path = str(_folder() / f"{next(self._numbers)}.so")
        Path(self.path).write_bytes(code)
        self.library = ctypes.CDLL(self.path)

    def get_function(self, name: str) -> Function:
        """The kernel."""
        return Function(self.library, self.path, name)


@functools.cache
def _folder() -> Path:
    """Of loaded libraries, which addr2line reads when something goes wrong, until the process ends."""
    folder = tempfile.mkdtemp(prefix="cudistr-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def launch_kernel(
    function: int, grid_x: int, grid_y: int, grid_z: int, block_x: int, block_y: int, block_z: int,
    shared_bytes: int, stream: int, parameters: int, extra: int,
) -> None:  # fmt: skip
    """``cupy.cuda.driver.launchKernel``."""
    assert (block_y, block_z, stream, extra) == (1, 1, 0, 0)
    assert (
        0 < grid_x <= planner.MAX_BLOCKS
        and 0 < grid_y <= planner.MAX_BLOCKS_YZ
        and 0 < grid_z <= planner.MAX_BLOCKS_YZ
    )
    Function._loaded[function].launch((grid_x, grid_y, grid_z), block_x, shared_bytes, parameters)


# The compiler


class NVRTCError(RuntimeError):
    """g++ refused."""


class _Program:
    def __init__(self, unit: str) -> None:
        self.unit, self.code, self.log = unit, b"", ""


def _compile_program(program: _Program, options: tuple[str, ...]) -> None:
    includes = [option.removeprefix("-I") for option in options if option.startswith("-I")]
    try:
        program.code = build.kernel(program.unit, includes)
    except build.CompileFailed as error:
        program.log = str(error)
        raise NVRTCError("g++ reports errors") from error


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


MAP_MAGIC = 0x70616D726F736E74  # begins a tensor map; hopper.cpp reads it
INVALID_VALUE = 1


def encode_tensor_map(
    target: int, dtype: int, rank: int, address: int, lengths: Any, strides: Any, box: Any, steps: Any,
    interleave: int, swizzle: int, promotion: int, fill: int,
) -> int:  # fmt: skip
    """``cuTensorMapEncodeTiled``: writes what hopper.cpp reads, and refuses what the driver refuses."""
    itemsize = {6: 2, 9: 2, 7: 4}[dtype]
    lengths, strides, box = list(lengths)[:rank], list(strides)[: rank - 1], list(box)[:rank]
    row = box[0] * itemsize
    legal = (
        target % 64 == 0
        and address % 16 == 0
        and all(1 <= n <= 2**32 for n in lengths)
        and all(s % 16 == 0 and 0 <= s < 2**40 for s in strides)
        and all(1 <= n <= 256 for n in box)
        and row % 16 == 0
        and row <= 16 << swizzle
        and list(steps)[:rank] == [1] * rank
        and interleave == fill == 0
    )
    if not legal:
        return INVALID_VALUE
    if row != 16 << swizzle:
        raise NotImplementedError("the machine swizzles boxes whose rows are as wide as the swizzle")
    words = [MAP_MAGIC, address, itemsize | rank << 8 | swizzle << 16, *lengths, *[0] * (5 - rank), *strides]
    words += [0] * (12 - len(words)) + [sum(n << 12 * i for i, n in enumerate(box))]
    ctypes.memmove(target, np.array(words + [0] * 3, np.uint64).tobytes(), 128)
    return 0


class CUDARuntimeError(RuntimeError):
    """Never raised."""


class CUDADriverError(RuntimeError):
    """Never raised."""


def modules() -> dict[str, types.ModuleType]:
    """What ``sys.modules`` holds when CuPy is imported, as far as cudistr looks."""
    nvrtc = _module(
        "cupy.cuda.nvrtc",
        # The version goes into the key of cudistr's cache: what is emulated otherwise is compiled anew.
        getVersion=lambda: (0, int(build.digest()[:12], 16)),
        getSupportedArchs=lambda: [80, 86, 89, 90, 100, 120],
        createProgram=lambda unit, name, headers, names: _Program(unit),
        compileProgram=_compile_program,
        getProgramLog=lambda program: program.log,
        # cudistr.compiler adds a byte that CuPy drops.
        getCUBIN=lambda program: program.code,
        destroyProgram=lambda program: None,
        NVRTCError=NVRTCError,
    )
    driver = _module(
        "cupy.cuda.driver",
        launchKernel=launch_kernel,
        funcSetAttribute=lambda function, attribute, value: None,
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        CUDADriverError=CUDADriverError,
    )
    runtime = _module(
        "cupy.cuda.runtime",
        cudaDevAttrMaxSharedMemoryPerBlockOptin=97,
        cudaDevAttrMultiProcessorCount=16,
        deviceGetAttribute=lambda attribute, device: {
            97: Settings.shared_bytes,
            16: Settings.multiprocessors,
        }[attribute],
        getDevice=lambda: 0,
        getDeviceProperties=lambda device: {"name": b"Emulated GPU"},
        getDeviceCount=lambda: 1,
        deviceGetPCIBusId=lambda device: f"0000:{device:02x}:00.0",
        memcpyAsync=_memcpy_async,
        memcpyDeviceToDevice=3,
        CUDARuntimeError=CUDARuntimeError,
    )
    function = _module("cupy.cuda.function", Module=Module, Function=Function)
    cuda = _module(
        "cupy.cuda",
        nvrtc=nvrtc,
        driver=driver,
        runtime=runtime,
        function=function,
        Device=Device,
        Stream=Stream,
        Event=Event,
        alloc=_alloc,
        get_current_stream=lambda: Stream.null,
        is_available=lambda: True,
    )
    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    cupy = _module(
        "cupy",
        __version__="emulated",
        cuda=cuda,
        ndarray=ndarray,
        asarray=asarray,
        asnumpy=asnumpy,
        ascontiguousarray=ascontiguousarray,
        get_default_memory_pool=lambda: pool,
    )

    def fallback(name: str) -> Any:
        found = getattr(np, name)
        return found if isinstance(found, type) or not callable(found) else _like_cupy(found)

    cupy.__getattr__ = fallback  # type: ignore[method-assign]
    return {module.__name__: module for module in (cupy, cuda, nvrtc, driver, runtime, function)}


def install() -> None:
    """Let ``import cupy`` find the stand-in from now on; before anything has imported the real one."""
    assert "cupy" not in sys.modules
    sys.modules.update(modules())
    tensormap._encoder = lambda: encode_tensor_map
    os.environ["CUDISTR_CACHE_DIR"] = str(build.CACHE)


def _caches() -> Iterator[Any]:
    """What cudistr remembers of CuPy, its device and compiler."""
    for module in (compiler, launch, planner, tensormap):
        for value in vars(module).values():
            if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
                yield value


@contextmanager
def installed() -> Iterator[types.ModuleType]:
    """The stand-in in place of CuPy, real or missing, for a while."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "cupy"}
    functions = dict(compiler._functions)
    folder = os.environ.get("CUDISTR_CACHE_DIR")
    encoder = tensormap._encoder
    ours = modules()
    with forgotten(_caches()):
        compiler._functions.clear()
        for name in before:
            del sys.modules[name]
        sys.modules.update(ours)
        tensormap._encoder = lambda: encode_tensor_map
        os.environ["CUDISTR_CACHE_DIR"] = str(build.CACHE)
        try:
            yield ours["cupy"]
        finally:
            for name in ours:
                sys.modules.pop(name, None)
            sys.modules.update(before)
            tensormap._encoder = encoder
            compiler._functions.clear()
            compiler._functions.update(functions)
            del os.environ["CUDISTR_CACHE_DIR"]
            if folder is not None:
                os.environ["CUDISTR_CACHE_DIR"] = folder
