"""The compiler room: what a unit says, what comes out of NVRTC, and a cache that nothing in the file system breaks."""

from __future__ import annotations

import dataclasses
import errno
import functools
import multiprocessing
import os
import re
import shutil
import struct
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cudistr import compiler
from cudistr.errors import CompileError, CudaUnavailableError
from cudistr.plan import Device, Kernel, attention_kernel, merge_kernel, prepare_kernel
from tests.cpu.fakes import forgotten
from tests.cpu.test_plan import problem

MERGE = merge_kernel("float16", 64)  # the smallest
KERNELS = (
    attention_kernel(problem(), Device(80, 163 * 1024))[0],
    prepare_kernel("float16", 64, True),
    MERGE,
)
CACHES = (
    compiler.nvrtc_version,
    compiler.supported_architectures,
    compiler._digest,
    compiler.cache_folder,
)

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def raises(error: type[Exception], text: str) -> Any:
    """pytest.raises that matches plain text."""
    return pytest.raises(error, match=re.escape(text))


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Nothing that was remembered before a test counts in it, and nothing in it counts afterwards."""
    with forgotten(CACHES):
        yield


@pytest.fixture
def nvrtc() -> None:
    pytest.importorskip("cupy", reason="NVRTC comes with the extra cuda12 or cuda13")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that does not exist yet."""
    path = tmp_path / "deep" / "cache"
    monkeypatch.setenv("CUDISTR_CACHE_DIR", str(path))
    return path


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that a test may change."""
    path = tmp_path / "kernels_cu"
    shutil.copytree(compiler.SOURCES, path)
    monkeypatch.setattr(compiler, "SOURCES", path)
    return path


class Counted:
    """Stands for compile_cubin: gives code that tells the jobs apart, and counts."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Kernel, str]] = []

    def __call__(self, kernel: Kernel, architecture: str, *, report: bool = False) -> tuple[bytes, str]:
        self.jobs.append((kernel, architecture))
        return f"{kernel} {architecture}".encode() * 100, ""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    compile_cubin = Counted()
    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    return compile_cubin


# The unit


@each_kernel
def test_unit(kernel: Kernel) -> None:
    first, *defines, include = compiler.unit(kernel).splitlines()
    assert re.fullmatch(r"// sources [0-9a-f]{64}", first)
    assert defines == [f"#define {name} {value}" for name, value in kernel.constants]
    assert include == f'#include "kernels/{kernel.name}.cu"'


def compile_log(kernel: Kernel) -> str:
    """What the compiler says when the kernel does not compile; empty when it does."""
    try:
        compiler.compile_cubin(kernel, "sm_80")
    except CompileError as error:
        return error.log
    return ""


@each_kernel
def test_digest_covers_every_file_that_the_compiler_reads(nvrtc: None, sources: Path, kernel: Kernel) -> None:
    """An error planted in a file shows whether the compiler reads it; if so, the digest must have changed."""
    own = sources / "kernels" / f"{kernel.name}.cu"
    own.write_text(f"{own.read_text()}#error the end\n")  # to read is enough
    compiler._digest.cache_clear()
    before = compiler.unit(kernel)
    read = set()
    for path in sorted(sources.rglob("*.cu*")):
        text = path.read_text()
        path.write_text(f"#error planted\n{text}")
        compiler._digest.cache_clear()
        changed = compiler.unit(kernel) != before
        log = compile_log(kernel)
        assert "planted" in log or "the end" in log
        if "planted" in log:
            assert changed, f"{path.name} is read but not in the digest"
            read.add(path.relative_to(sources).as_posix())
        path.write_text(text)
        compiler._digest.cache_clear()
    assert compiler.unit(kernel) == before
    assert {f"kernels/{kernel.name}.cu", "ptx/arch.cuh"} <= read
    assert not any(x.startswith("kernels/") for x in read - {f"kernels/{kernel.name}.cu"})


def test_digest_changes_with_a_header_of_a_header(sources: Path) -> None:
    kernel = KERNELS[0]
    header = sources / "ptx" / "copy.cuh"
    assert header.name not in (sources / "kernels" / f"{kernel.name}.cu").read_text()
    before, other = compiler.unit(kernel), compiler.unit(MERGE)
    header.write_text(header.read_text() + "// changed\n")
    compiler._digest.cache_clear()
    assert compiler.unit(kernel) != before
    assert compiler.unit(MERGE) == other  # does not include it: what is cached stays good


def test_digest_of_includes_in_a_circle(sources: Path) -> None:
    (sources / "kernels" / "a.cu").write_text('#include "tile/b.cuh"\n')
    (sources / "tile" / "b.cuh").write_text('#include "tile/c.cuh"\n')
    (sources / "tile" / "c.cuh").write_text('#include "tile/b.cuh"\n')
    assert len(compiler._digest("kernels/a.cu")) == 64


# NVRTC


def table_ends(elf: bytes) -> list[int]:
    """Where the tables of program headers and of sections of a 64-bit ELF file end."""
    tables = struct.unpack_from("<QQ", elf, 32)
    sizes = struct.unpack_from("<HHHH", elf, 54)
    return [start + size * count for start, size, count in zip(tables, sizes[::2], sizes[1::2], strict=True)]


@each_kernel
def test_a_cubin_is_a_whole_elf_file(nvrtc: None, kernel: Kernel) -> None:
    code, log = compiler.compile_cubin(kernel, "sm_80")
    assert code.startswith(b"\x7fELF\x02")
    assert max(table_ends(code)) <= len(code)
    assert kernel.name.encode() in code
    assert log.strip() == ""


def test_the_report(nvrtc: None) -> None:
    _, log = compiler.compile_cubin(MERGE, "sm_80", report=True)
    assert re.search(r"Used \d+ registers", log) and "0 bytes spill stores" in log


def test_options_of_a_kernel_reach_the_compiler(nvrtc: None) -> None:
    (dtype, (name, value)) = MERGE.constants
    moved = dataclasses.replace(MERGE, constants=(dtype,), options=(f"-D{name}={value}",))
    code, _ = compiler.compile_cubin(moved, "sm_80")
    assert code.startswith(b"\x7fELF")
    with raises(CompileError, f'identifier "{name}" is undefined'):
        compiler.compile_cubin(dataclasses.replace(moved, options=()), "sm_80")


@pytest.mark.parametrize("options", [(), ("-Xptxas=-O1",)], ids=str)
def test_a_virtual_architecture_gives_ptx(nvrtc: None, options: tuple[str, ...]) -> None:
    newest = compiler.supported_architectures()[-1]
    kernel = dataclasses.replace(MERGE, options=options)
    code, _ = compiler.compile_cubin(kernel, f"compute_{newest}")
    assert isinstance(code, bytes)
    text = code.decode()
    assert f".target sm_{newest}" in text and f".visible .entry {MERGE.name}(" in text


def test_what_does_not_compile(nvrtc: None) -> None:
    wrong = dataclasses.replace(MERGE, constants=(("DTYPE", 7), ("HEAD_DIM_V", 64)))
    with raises(CompileError, "smxx_merge (DTYPE=7, HEAD_DIM_V=64) did not compile for sm_80: ") as caught:
        compiler.compile_cubin(wrong, "sm_80")
    error = caught.value
    assert 'error: incomplete type "ElementOf<7>"' in error.log
    assert str(error).endswith(error.log)
    assert "Run `python -m cudistr doctor` for what is missing.\n" in str(error)


def test_an_architecture_that_does_not_exist(nvrtc: None) -> None:
    with raises(CompileError, "did not compile for sm_1: "):
        compiler.compile_cubin(MERGE, "sm_1")


def test_sources_that_are_not_there(sources: Path) -> None:
    with pytest.raises(OSError, match=r"sm99_no_such\.cu"):
        compiler.unit(Kernel("sm99_no_such", (), 32))


def test_architectures_of_the_grid_are_known(nvrtc: None) -> None:
    assert {80, 86, 89, 90, 100, 120} <= set(compiler.supported_architectures())
    assert compiler.supported_architectures() == sorted(compiler.supported_architectures())


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        (80, "sm_80"),
        (90, "sm_90"),
        (120, "sm_120"),
        (87, "compute_86"),
        (103, "compute_100"),
        (130, "compute_120"),
    ],
)
def test_target(monkeypatch: pytest.MonkeyPatch, capability: int, name: str) -> None:
    monkeypatch.setattr(compiler, "supported_architectures", lambda: [75, 80, 86, 89, 90, 100, 120])
    assert compiler.target(capability) == name


def test_target_of_a_kernel_for_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "supported_architectures", lambda: [80, 90, 100])
    assert compiler.target(90, specific=True) == "sm_90a"


def test_the_architecture_of_a_kernel_is_passed_on(
    counted: Counted, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "supported_architectures", lambda: [80, 90])
    kernel, _ = attention_kernel(problem(), Device(90, 227 * 1024))
    assert kernel.specific
    compiler._cached(kernel, compiler.target(90, kernel.specific))
    assert counted.jobs == [(kernel, "sm_90a")]


def test_target_of_a_gpu_that_nvrtc_has_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "supported_architectures", lambda: [90, 100])
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (17, 2))
    text = (
        "NVRTC 17.2 compiles for compute capability 9.0 and newer, the GPU has 8.6. "
        "Install a CuPy for an older CUDA."
    )
    with raises(CudaUnavailableError, text):
        compiler.target(86)


def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)


def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy is there, the library behind its binding is not."""

    def get_version() -> tuple[int, int]:
        raise RuntimeError("Failed to load libnvrtc.so.13")

    cuda = types.ModuleType("cupy.cuda")
    cuda.nvrtc = types.SimpleNamespace(getVersion=get_version)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)


@pytest.mark.parametrize(
    ("broken", "why"),
    [(no_cupy, "ModuleNotFoundError: "), (no_library, "RuntimeError: Failed to load libnvrtc.so.13")],
)
def test_nvrtc_that_cannot_be_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, broken: Any, why: str
) -> None:
    broken(monkeypatch)
    calls = (
        compiler.nvrtc_version,
        compiler.supported_architectures,
        lambda: compiler.target(80),
        lambda: compiler.compile_cubin(MERGE, "sm_80"),
        lambda: compiler._cached(MERGE, "sm_80"),
    )
    for call in calls:
        with raises(
            CudaUnavailableError, f"NVRTC, which compiles the kernels, cannot be used ({why}"
        ) as caught:
            call()
        assert str(caught.value).endswith(
            'Install CuPy with its CUDA parts: pip install "cudistr[cuda12]" or "cudistr[cuda13]". '
            "Run `python -m cudistr doctor` for what is missing."
        )
        assert caught.value.__cause__ is not None


# Where the cache is


def test_the_named_folder(folder: Path, counted: Counted) -> None:
    assert compiler.cache_folder() == folder and folder.is_dir()
    code = compiler._cached(MERGE, "sm_80")
    (file,) = folder.iterdir()
    assert re.fullmatch(r"smxx_merge-[0-9a-f]{40}\.bin", file.name)
    assert file.read_bytes().endswith(code)


@pytest.mark.parametrize("named", [None, ""])
def test_the_folder_when_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.delenv("CUDISTR_CACHE_DIR", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDISTR_CACHE_DIR", named)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert compiler.cache_folder() == tmp_path / ".cache" / "cudistr"
    compiler.cache_folder.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiler.cache_folder() == tmp_path / "xdg" / "cudistr"


def test_a_user_without_a_home(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a user id of its own."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("CUDISTR_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(RuntimeWarning, match="Could not determine home directory.*Set CUDISTR_CACHE_DIR"):
        assert compiler._cached(MERGE, "sm_80")
    assert compiler.cache_folder() is None


# What is kept


def test_the_second_time_nothing_is_compiled(folder: Path, counted: Counted) -> None:
    first = compiler._cached(MERGE, "sm_80")
    assert compiler._cached(MERGE, "sm_80") == first
    compiler.cache_folder.cache_clear()  # as in another process
    assert compiler._cached(MERGE, "sm_80") == first
    assert counted.jobs == [(MERGE, "sm_80")]


def test_whatever_changes_the_code_changes_the_file(
    sources: Path, folder: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler._cached(MERGE, "sm_80")
    compiler._cached(MERGE, "sm_90")
    compiler._cached(MERGE, "compute_90")
    compiler._cached(merge_kernel("float16", 72), "sm_80")
    compiler._cached(merge_kernel("float32", 64), "sm_80")
    compiler._cached(dataclasses.replace(MERGE, options=("-Xptxas=-O1",)), "sm_80")
    assert len(counted.jobs) == len(list(folder.iterdir())) == 6
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 1))
    compiler._cached(MERGE, "sm_80")
    header = sources / "ptx" / "arch.cuh"
    header.write_text(header.read_text() + "\n")
    compiler._digest.cache_clear()
    compiler._cached(MERGE, "sm_80")
    assert len(counted.jobs) == len(list(folder.iterdir())) == 8


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_the_digest(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def flip(path: Path) -> None:
    stored = bytearray(path.read_bytes())
    stored[-7] ^= 1
    path.write_bytes(stored)


def zero(path: Path) -> None:
    """What a crash may leave behind: the right length, nothing written."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [halve, shorten, lengthen, empty, cut_in_the_digest, flip, zero])
def test_a_damaged_file_is_replaced(folder: Path, counted: Counted, damage: Any) -> None:
    code = compiler._cached(MERGE, "sm_80")
    (file,) = folder.iterdir()
    good = file.read_bytes()
    damage(file)
    assert file.read_bytes() != good
    assert compiler._cached(MERGE, "sm_80") == code
    assert len(counted.jobs) == 2
    assert list(folder.iterdir()) == [file] and file.read_bytes() == good
    assert compiler._cached(MERGE, "sm_80") == code
    assert len(counted.jobs) == 2


def test_a_folder_in_place_of_a_file(folder: Path, counted: Counted) -> None:
    code = compiler._cached(MERGE, "sm_80")
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    assert compiler._cached(MERGE, "sm_80") == code
    assert list(folder.iterdir()) == [file]


def test_a_cache_that_is_taken_away_meanwhile(folder: Path, counted: Counted) -> None:
    code = compiler._cached(MERGE, "sm_80")
    shutil.rmtree(folder)
    assert compiler._cached(MERGE, "sm_80") == code
    assert len(counted.jobs) == 2


# A file system that does not play along


def test_a_folder_that_cannot_be_written(
    nvrtc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below a file: permissions do not stop root, who runs tests in containers.
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv("CUDISTR_CACHE_DIR", str(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        codes = [compiler._cached(MERGE, "sm_80") for _ in range(2)]
    assert [w.category for w in caught] == [RuntimeWarning]
    text = str(caught[0].message)
    assert text.startswith(f"cudistr cannot write its kernel cache {folder} (")
    assert text.endswith(
        "), so kernels are compiled anew in every process. Set CUDISTR_CACHE_DIR to a folder that can be written."
    )
    assert codes[0] == codes[1] and codes[0].startswith(b"\x7fELF")


def full(*arguments: object, **options: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_is_read_only(folder: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.warns(RuntimeWarning, match="cudistr cannot write its kernel cache"):
        compiler._cached(MERGE, "sm_80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler._cached(merge_kernel("float16", 72), "sm_80")
    assert len(counted.jobs) == 2 and list(folder.iterdir()) == []


def no_new_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)


def no_room_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    create = tempfile.NamedTemporaryFile

    def create_full(**options: Any) -> Any:
        file = create(**options)
        monkeypatch.setattr(file, "write", full)
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", create_full)


def no_renaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize("fault", [no_new_file, no_room_in_the_file, no_renaming])
def test_a_full_disk_is_no_error(
    folder: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    expected, _ = Counted()(MERGE, "sm_80")
    with monkeypatch.context() as limited, warnings.catch_warnings():
        warnings.simplefilter("error")
        fault(limited)
        assert compiler._cached(MERGE, "sm_80") == expected
        assert list(folder.iterdir()) == []  # and no temporary file stays behind
    # Once there is room again, it is used.
    assert compiler._cached(MERGE, "sm_80") == compiler._cached(MERGE, "sm_80") == expected
    assert len(counted.jobs) == 2 and len(list(folder.iterdir())) == 1


# Processes at once


def cached_in_a_process(start: Any, results: Any) -> None:
    start.wait()
    results.put([compiler._cached(kernel, "sm_80") for kernel in (MERGE, merge_kernel("float32", 64))])


def test_processes_that_compile_at_once(nvrtc: None, folder: Path) -> None:
    count = 4
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=cached_in_a_process, args=(start, results), daemon=True) for _ in range(count)
    ]
    for process in processes:
        process.start()
    codes = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    assert codes == [codes[0]] * count
    assert codes[0][0] != codes[0][1]
    assert all(code.startswith(b"\x7fELF") and max(table_ends(code)) <= len(code) for code in codes[0])
    # What is left is one file for each kernel, and each holds that code.
    assert len(list(folder.iterdir())) == 2
    read = functools.partial(map, compiler._read)
    assert sorted(read(folder.iterdir())) == sorted(codes[0])
