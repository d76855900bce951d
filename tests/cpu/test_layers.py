"""Rules about the sources that no compiler checks: who may include, import and contain what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels_cu"
PACKAGE = ROOT / "cudistr"

FLOORS = {"ptx": 0, "tile": 1, "kernels": 2}  # a floor may include itself (headers only) and those below
ARCHITECTURE = "sm_80"  # the oldest that is supported: a header may guard newer instructions, not demand them

SOURCES = sorted(KERNELS.rglob("*.cu*"))
HEADERS = [p for p in SOURCES if p.suffix == ".cuh"]
MODULES = sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(path: Path) -> str:
    """A CUDA source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(), flags=re.S)


def test_there_is_something_to_check() -> None:
    assert {p.parent.name for p in SOURCES} == set(FLOORS)
    assert HEADERS
    assert all(p.parent.parent == KERNELS for p in SOURCES), (
        "kernels_cu has three rooms and no rooms inside them"
    )
    assert [name(p) for p in SOURCES if (p.suffix == ".cu") != (p.parent.name == "kernels")] == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_includes_point_down(path: Path) -> None:
    for written in re.findall(r'^\s*#\s*include\s*"([^"]+)"', code(path), re.M):
        target = next((p for p in (path.parent / written, KERNELS / written) if p.is_file()), None)
        assert target is not None, f"{name(path)} includes {written}, which is not in kernels_cu"
        assert target.suffix == ".cuh", f"{name(path)} includes {written}: only headers are included"
        room = target.resolve().relative_to(KERNELS).parts[0]
        assert FLOORS[room] <= FLOORS[path.parent.name], f"{name(path)} includes {written}, one floor up"


def test_includes_have_no_cycle() -> None:
    """Follow every chain of includes; '#pragma once' would hide a cycle from the compiler."""

    def follow(path: Path, chain: tuple[Path, ...]) -> None:
        assert path not in chain, " -> ".join(name(p) for p in (*chain, path))
        for written in re.findall(r'^\s*#\s*include\s*"([^"]+)"', code(path), re.M):
            target = next(p for p in (path.parent / written, KERNELS / written) if p.is_file())
            follow(target.resolve(), (*chain, path))

    for path in SOURCES:
        follow(path, ())


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_inline_assembly_lives_in_ptx_only(path: Path) -> None:
    found = re.findall(r"\b(?:asm|__asm__)\b", code(path))
    assert not found or path.parent.name == "ptx", (
        f"{name(path)} has inline assembly; put it in kernels_cu/ptx"
    )


@pytest.mark.parametrize("path", HEADERS, ids=name)
def test_header_is_included_once(path: Path) -> None:
    assert re.search(r"^#pragma once$", path.read_text(), re.M), f"{name(path)} lacks #pragma once"


@pytest.mark.parametrize("path", HEADERS, ids=name)
def test_header_compiles_alone(path: Path) -> None:
    nvrtc = pytest.importorskip("cupy", reason="NVRTC comes with the extra cuda12 or cuda13").cuda.nvrtc
    header = path.relative_to(KERNELS).as_posix()
    program = nvrtc.createProgram(f'#include "{header}"\n', "alone.cu", (), ())
    options = (f"-I{KERNELS}", f"-arch={ARCHITECTURE}", "-std=c++17", "-default-device")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(f"{name(path)} does not compile alone:\n{nvrtc.getProgramLog(program)}")
    finally:
        nvrtc.destroyProgram(program)


def imports_at_top(tree: ast.Module) -> Iterator[str]:
    """Modules imported when a file is imported: everything outside functions and ``if TYPE_CHECKING``."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_modules_import_at_top_only_what_is_always_installed(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "ml_dtypes", "cudistr"}
    found = {m.partition(".")[0] for m in imports_at_top(ast.parse(path.read_text()))}
    assert found <= allowed, (
        f"{name(path)} imports {found - allowed} at top level; import it where it is used"
    )


# Each may import those before it.
ROOMS = (
    "errors",
    "reductions",
    "normalize",
    "plan",
    "compiler",
    "tuned",
    "tensormap",
    "launch",
    "projection",
    "worth",
    "compose",
    "measure",
    "explain",
    "api",
)


def test_every_module_imports_with_cupy_blocked() -> None:
    """A machine without CuPy, torch and the demo's libraries can import all of cudistr."""
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in MODULES
        if p.name != "__main__.py"
    ]
    assert {f"cudistr.{m}" for m in ROOMS} <= set(modules)
    program = (
        "import sys, importlib\n"
        "for m in ('cupy', 'cupyx', 'torch', 'jax', 'onnx', 'skimage', 'scipy', 'matplotlib', 'tqdm', 'gguf', 'tokenizers', 'mpi4py', 'pynvml'):\n"
        "    sys.modules[m] = None\n"
        f"for m in {modules!r}:\n"
        "    importlib.import_module(m)\n"
        "print('imported')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "imported", run.stderr


def imported_rooms(path: Path) -> set[str]:
    """Modules of cudistr that a module of cudistr imports, anywhere in it."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return {m.split(".")[1] for m in named if m.startswith("cudistr.")}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(room: str) -> None:
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    assert not imported_rooms(PACKAGE / f"{room}.py") & above


# Of cudistr.distributed, which stands above all of the rooms. Each may import those before it.
SHARED_ROOMS = ("schedule", "transport", "solve", "group", "measure")


@pytest.mark.parametrize("room", SHARED_ROOMS)
def test_rooms_of_several_processes_import_one_way(room: str) -> None:
    text = (PACKAGE / "distributed" / f"{room}.py").read_text()
    above = set(SHARED_ROOMS[SHARED_ROOMS.index(room) + 1 :])
    assert not set(re.findall(r"cudistr\.distributed(?:\.| import )(\w+)", text)) & above


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_do_not_know_of_several_processes(room: str) -> None:
    assert "distributed" not in imported_rooms(PACKAGE / f"{room}.py")


def test_schedules_are_pure() -> None:
    """Who sends what when is decided from numbers alone."""
    found = {
        m.partition(".")[0]
        for m in imports_at_top(ast.parse((PACKAGE / "distributed" / "schedule.py").read_text()))
    }
    assert not found & {"mpi4py", "cupy", "threading", "time"}


def test_kernels_map_names_every_source() -> None:
    written = re.findall(r"^\| `([\w/.]+)` \|", (ROOT / "docs" / "kernels.md").read_text(), re.M)
    assert sorted(written) == sorted(p.relative_to(KERNELS).as_posix() for p in SOURCES)
