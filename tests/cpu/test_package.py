"""The built wheel and sdist: what they carry, and that the installed package runs on its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cudistr

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels_cu"

# Run from the clean environment: no CuPy, not the checkout, and everything that needs neither a GPU nor it.
SMOKE = """
import importlib.util, sys
from pathlib import Path
import numpy as np
import cudistr
from cudistr import compiler

assert importlib.util.find_spec("cupy") is None, "the environment is not clean: it has CuPy"
home = Path(cudistr.__file__).resolve().parent
assert home.is_relative_to(Path(sys.prefix).resolve()), f"imported from {home}, not from the environment"

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 2, 70, 16)).astype(np.float32) for _ in range(3))
scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3) / 4
weights = np.exp(scores - scores.max(-1, keepdims=True))
exact = weights / weights.sum(-1, keepdims=True) @ v
assert abs(cudistr.attention(q, k, v) - exact).max() < 1e-6
assert cudistr.attention(q, k, v, reduction=cudistr.LSH(group_size=2)).shape == q.shape

sources = Path(compiler.SOURCES).resolve()
assert sources == home / "kernels_cu", f"kernels are looked for in {sources}"
print("version", cudistr.__version__)
for path in sorted(sources.rglob("*.cu*")):
    print("kernel", path.relative_to(sources).as_posix())
"""


def kernel_files() -> set[str]:
    """Every file of the kernel folder, relative to it."""
    return {p.relative_to(KERNELS).as_posix() for p in KERNELS.rglob("*") if p.is_file()}


def module_files() -> set[str]:
    """Every file of the Python package, relative to the checkout."""
    found = (p.relative_to(ROOT) for p in (ROOT / "cudistr").rglob("*") if p.is_file())
    return {p.as_posix() for p in found if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the checkout, and the wheel built from that sdist."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("cudistr", "kernels_cu"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    run = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(copy / "dist"), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    (wheel,) = (copy / "dist").glob("*.whl")
    return sdist, wheel


def test_wheel_carries_the_package_and_the_kernels(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        files = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert files == module_files() | {f"cudistr/kernels_cu/{name}" for name in kernel_files()}
    assert "cudistr/py.typed" in files


def test_sdist_carries_what_a_build_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        files = {n.partition("/")[2] for n in sdist.getnames()}
    assert module_files() | {f"kernels_cu/{name}" for name in kernel_files()} <= files
    assert {"pyproject.toml", "README.md", "LICENSE"} <= files


def test_wheel_metadata(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = wheel.read(name).decode()
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
        entry_points = wheel.read(name).decode()
    assert f"\nVersion: {cudistr.__version__}\n" in metadata
    assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.M)) == {
        "bench", "cuda12", "cuda13", "demo", "distributed", "docs", "eval", "test",
    }  # fmt: skip
    # What is installed without extras: NumPy and its bfloat16, and nothing else.
    required = re.findall(r"^Requires-Dist: ([A-Za-z0-9_-]+)[^;\n]*$", metadata, re.M)
    assert sorted(x.replace("-", "_") for x in required) == ["ml_dtypes", "numpy"]
    assert "cudistr = cudistr.cli:main" in entry_points
    assert built[1].name.endswith("-py3-none-any.whl")


def test_installed_wheel_runs_in_a_clean_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    python = env / "bin" / "python"
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    install = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", str(built[1])],
        capture_output=True, text=True, check=False, env=variables,
    )  # fmt: skip
    assert install.returncode == 0, install.stdout + install.stderr
    run = subprocess.run(
        [str(python), "-c", SMOKE], cwd=tmp_path, capture_output=True, text=True, check=False, env=variables
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert f"version {cudistr.__version__}" in lines
    assert {x.removeprefix("kernel ") for x in lines if x.startswith("kernel ")} == kernel_files()

    script = subprocess.run(
        [str(env / "bin" / "cudistr"), "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=variables,
    )  # fmt: skip
    assert script.returncode == 0, script.stdout + script.stderr
    assert {"demo", "doctor", "bench", "eval"} <= set(re.findall(r"\w+", script.stdout))
