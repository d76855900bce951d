"""Every example runs and prints what it should, and so does the README's snippet."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu import mpi

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

NUMBER = r"(-?\d+\.?\d*(?:e[+-]?\d+)?)"


def run(*arguments: str) -> str:
    """What a Python process prints with the checkout on its path."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def example(name: str, processes: int = 0) -> str:
    """What an example prints, by itself or in so many processes without GPUs."""
    if not processes:
        return run(str(EXAMPLES / name))
    command = mpi.command(processes, str(EXAMPLES / name))
    done = subprocess.run(command, cwd=ROOT, env=mpi.variables(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def value(label: str, text: str) -> float:
    """The number after a label in what an example printed."""
    found = re.search(re.escape(label) + r":? " + NUMBER, text)
    assert found, f"no '{label}' in:\n{text}"
    return float(found[1])


def test_every_example_has_a_test() -> None:
    here = Path(__file__).read_text()
    assert [p.name for p in sorted(EXAMPLES.glob("*.py")) if f'example("{p.name}"' not in here] == []


def test_exact() -> None:
    text = example("01_exact.py")
    assert "out: (1, 8, 300, 64) float16" in text
    assert "lse: (1, 8, 300) float32" in text
    # Outputs here are below 1, where float16 is spaced by at most 2**-11; probabilities are rounded too.
    assert value("largest difference from float64", text) <= 2 * 2**-11
    assert value("a window changes the result by up to", text) > 0.1
    assert "the same bits from another layout: True" in text


def test_grouped() -> None:
    text = example("02_grouped.py")
    rows = {
        found[1].strip(): [float(x) for x in found[2].split()]
        for found in re.finditer(r"^(\D.*?)((?:\s+\d\.\d{3}){4})$", text, re.M)
    }
    assert len(rows) == 6, text
    # Columns that repeat in pairs are found by the hash, and then group_size=2 is exact.
    sampled, mean, any_order, four = rows["paired columns, no noise"]
    assert max(sampled, mean) <= 0.001
    assert min(any_order, four) > 0.1
    # What the example is there to say: on uniform data an arbitrary order is as good, on normal data all fail.
    sampled, _, any_order, _ = rows["uniform on [0, 1)"]
    assert max(sampled, any_order) < 0.01
    assert rows["normal"][0] > 0.5


def test_torch() -> None:
    text = example("03_torch_dlpack.py")
    if importlib.util.find_spec("torch") is None:
        assert text.startswith("PyTorch is not installed")
        pytest.skip("PyTorch is not installed")
    assert "out: Tensor (1, 4, 256, 64)" in text
    assert "lse: Tensor (1, 4, 256) torch.float32" in text
    bound = 2**-7 if "torch.bfloat16" in text else 1e-5  # two units in the last place below 1
    assert value("largest difference from torch's attention", text) <= bound
    assert value("the same, causal", text) <= 4 * bound  # first rows see few keys: outputs up to 4


def test_jax() -> None:
    text = example("04_jax_dlpack.py")
    if importlib.util.find_spec("jax") is None:
        assert text.startswith("JAX is not installed")
        pytest.skip("JAX is not installed")
    assert "out: jax array True, (1, 4, 256, 64) float32" in text
    # JAX's product on a GPU is TF32 unless asked otherwise: 10 bits of fraction, outputs up to 4.
    bound = 1e-5 if " on cpu" in text else 4 * 2**-9
    assert value("largest difference from JAX's attention", text) <= bound


def test_merge_key_shards() -> None:
    text = example("05_merge_key_shards.py")
    assert "keys  300 to  300: lse of the first row -inf" in text
    merged, whole = re.search(rf"merged: lse of the first row {NUMBER}, of one call {NUMBER}", text).groups()
    assert float(merged) == pytest.approx(float(whole), abs=0.0011)  # printed to three places
    assert value("largest difference from one call over all keys", text) <= 1e-5


def test_measured_error() -> None:
    text = example("06_measured_error.py")
    low, high = (float(x) for x in re.search(rf"all +\S+ \({NUMBER} to {NUMBER}\)", text).groups())
    assert low <= value("every row compared", text) <= high
    assert float(text.splitlines()[-1].split()[0]) < low  # columns that are alike have a smaller error


def test_tolerance() -> None:
    text = example("07_tolerance.py")
    assert text.splitlines()[-1] == "ranks of the heads: 32, 32, 64, 64"
    loose, kept = text.split("tolerance ")[1:]
    heads = [[float(x) for x in re.findall(rf"head \d +{NUMBER}", part)] for part in (loose, kept)]
    assert [len(errors) for errors in heads] == [4, 4]
    assert max(heads[0][:2]) < 0.05 < min(heads[0][2:]) and max(heads[1]) < 0.05


def test_evaluate() -> None:
    text = example("08_evaluate.py")
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("skimage") is None:
        pytest.skip("the extra demo is not installed")
    grouped, projected = (value(label + ": cosine with the exact features", text) for label in (
        "LSH, 32 columns", "Projection, 32 columns on average"
    ))  # fmt: skip
    assert grouped < 0.8 < 0.9 < projected  # on data that neither has seen


needs_mpi = pytest.mark.skipif(not mpi.available(), reason="mpi4py and mpiexec are not installed")


@needs_mpi
@pytest.mark.parametrize("processes", [1, 2])
def test_several_gpus(processes: int) -> None:
    text = example("09_several_gpus.py", processes)
    assert text.startswith(f"{processes} processes, arrays: numpy")
    for way in ("ring", "ring, LSH", "heads"):
        # float32 sums in another order; outputs of the first rows are as large as values, up to 4.
        assert value(f"{way}, largest difference from one call", text) <= 4e-6


@needs_mpi
def test_several_gpus_torch() -> None:
    text = example("10_several_gpus_torch.py")
    if importlib.util.find_spec("torch") is None:
        assert text.startswith("PyTorch is not installed")
        pytest.skip("PyTorch is not installed")
    assert "out: Tensor (1, 8, 512, 64)" in text
    bound = 2**-5 if "torch.bfloat16" in text else 1e-5  # two units in the last place of outputs up to 4
    assert value("largest difference from torch's attention", text) <= bound


def test_readme_snippet() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert run("-c", snippet).strip() == "(1, 8, 1024, 64)"
