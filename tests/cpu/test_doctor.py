"""The doctor's lines, from facts that no machine at hand has to have."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import cudistr
from cudistr import compiler, doctor
from cudistr.doctor import Cache, Check, Compiled, Facts, Gpu, SelfTest

H200 = Gpu(0, "NVIDIA H200", (9, 0), 140 << 30, 132, 227 << 10)
T4 = Gpu(1, "Tesla T4", (7, 5), 15 << 30, 40, 64 << 10)
NEWER = Gpu(0, "Tomorrow", (13, 0), 200 << 30, 200, 227 << 10)

ON_GPU = Facts(
    python="3.12.3 (CPython)",
    system="Linux-6.1",
    packages={"numpy": "2.5.0", "ml_dtypes": "0.6.0"},
    cupy_wheels={"cupy-cuda13x": "14.2.0"},
    cupy="14.2.0",
    driver=(13, 0),
    runtime=(13, 0),
    gpus=(H200,),
    nvrtc=(13, 0),
    architectures=(75, 80, 86, 90, 100, 120),
    sources=("/somewhere/kernels_cu", 5, 12),
    cache=Cache("/home/me/.cache/cudistr", 3, 3 << 20),
    compiled=Compiled("sm80_flash_fwd", "sm_90", 1.5),
    self_test=SelfTest("GPU 0", {"exact": 5e-4, "LSH(group_size=2)": 6e-4}, 1.25, 0.0002),
)
ON_CPU = dataclasses.replace(
    ON_GPU,
    cupy_wheels={},
    cupy=None,
    driver=None,
    runtime=None,
    gpus=None,
    nvrtc=None,
    architectures=None,
    compiled=None,
    self_test=SelfTest("NumPy", {"exact": 2e-4}, 0.1, 0.1),
)


def line(facts: Facts, name: str) -> Check:
    """The one line of that name."""
    (found,) = [check for check in doctor.checks(facts) if check.name == name]
    return found


def problems(facts: Facts) -> list[str]:
    return [check.name for check in doctor.checks(facts) if check.status == "problem"]


def changed(**fields: Any) -> Facts:
    return dataclasses.replace(ON_GPU, **fields)


def test_healthy_gpu_machine() -> None:
    lines = doctor.checks(ON_GPU)
    assert {check.status for check in lines} == {"ok"}
    gpu = line(ON_GPU, "GPU 0").found
    assert gpu == ("NVIDIA H200, compute capability 9.0, 140.0 GiB, 132 SMs, 227 KiB shared memory per block")
    assert line(ON_GPU, "nvrtc").found.startswith("13.0, compiles for sm_75, sm_80")
    assert line(ON_GPU, "kernels").found == "5 kernels and 12 headers in /somewhere/kernels_cu"
    assert line(ON_GPU, "cache").found == "/home/me/.cache/cudistr: 3 cubins, 3.0 MiB"
    assert "first call 1.25 s" in line(ON_GPU, "self test").found
    assert doctor.conclusion(ON_GPU, lines) == "CuPy arrays run on the kernels (GPU 0, NVIDIA H200)."


def test_machine_without_gpu_is_not_broken() -> None:
    lines = doctor.checks(ON_CPU)
    assert problems(ON_CPU) == []
    assert doctor.conclusion(ON_CPU, lines) == (
        "No GPU here: NumPy arrays run on the NumPy reference, and nothing is broken."
    )


def test_cupy_without_gpu_is_not_broken() -> None:
    facts = changed(driver=None, gpus=(), self_test=ON_CPU.self_test)
    assert problems(facts) == []
    assert line(facts, "driver").status == "note"


@pytest.mark.parametrize(
    ("driver", "wrong", "keep"),
    [((13, 0), "cupy-cuda12x", "cupy-cuda13x"), ((12, 4), "cupy-cuda13x", "cupy-cuda12x")],
)
def test_two_cupy_wheels(driver: tuple[int, int], wrong: str, keep: str) -> None:
    facts = changed(cupy_wheels={"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}, driver=driver)
    check = line(facts, "cupy")
    assert check.status == "problem"
    assert "cupy-cuda12x 14.2.0, cupy-cuda13x 14.2.0" in check.found
    assert check.remedy.startswith(f"Uninstall {wrong} and keep {keep}")
    assert f"pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install '{keep}[ctk]'" in check.remedy


@pytest.mark.parametrize(("driver", "extra"), [((12, 8), "cuda12"), ((13, 0), "cuda13")])
def test_driver_without_cupy(driver: tuple[int, int], extra: str) -> None:
    facts = dataclasses.replace(ON_CPU, driver=driver)
    assert problems(facts) == ["cupy"]
    assert line(facts, "cupy").remedy == f"pip install 'cudistr[{extra}]'"


def test_cupy_that_cannot_be_imported() -> None:
    facts = changed(cupy=None, gpus=None, errors={"cupy": "ImportError: libcudart.so.13"})
    assert problems(facts) == ["cupy"]
    assert "libcudart.so.13" in line(facts, "cupy").found


def test_cupy_too_old() -> None:
    facts = changed(cupy="13.6.0", cupy_wheels={"cupy-cuda12x": "13.6.0"})
    assert "pip install -U cupy-cuda12x" in line(facts, "cupy").remedy
    assert problems(facts) == ["cupy"]


def test_nvrtc_missing() -> None:
    errors = {"nvrtc": "RuntimeError: libnvrtc.so.13 not found"}
    facts = changed(nvrtc=None, architectures=None, errors=errors)
    assert problems(facts) == ["nvrtc"]
    assert "libnvrtc.so.13" in line(facts, "nvrtc").found
    assert "pip install 'cupy-cuda13x[ctk]'" in line(facts, "nvrtc").remedy
    assert problems(dataclasses.replace(facts, driver=None, gpus=())) == []


def test_driver_older_than_runtime() -> None:
    facts = changed(driver=(12, 4))
    assert problems(facts) == ["runtime"]
    assert "pip uninstall -y cupy-cuda13x && pip install 'cupy-cuda12x[ctk]'" in line(facts, "runtime").remedy


def test_driver_that_does_not_answer() -> None:
    facts = changed(driver=None, gpus=(), errors={"driver": "RuntimeError: cuDriverGetVersion returned 999"})
    assert problems(facts) == ["driver"]


def test_gpus_that_cannot_be_listed() -> None:
    facts = changed(gpus=None, errors={"gpus": "CUDARuntimeError: cudaErrorUnknown"})
    assert problems(facts) == ["GPU"]
    assert "nvidia-smi" in line(facts, "GPU").remedy


def test_no_visible_gpu_is_a_note() -> None:
    facts = changed(gpus=(), environ={"CUDA_VISIBLE_DEVICES": ""})
    assert problems(facts) == []
    assert "CUDA_VISIBLE_DEVICES" in line(facts, "GPU").remedy


def test_old_gpu_beside_a_supported_one() -> None:
    facts = changed(gpus=(H200, T4))
    assert line(facts, "GPU 1").status == "note"
    assert facts.device == H200


def test_only_an_old_gpu() -> None:
    facts = changed(gpus=(T4,))
    assert facts.device is None
    assert problems(facts) == ["GPU 1"]
    assert "8.0" in line(facts, "GPU 1").remedy


def test_several_gpus_need_nccl_and_mpi() -> None:
    several = tuple(dataclasses.replace(ON_GPU.gpus[0], index=i) for i in range(2))
    facts = changed(gpus=several, nccl="2.27.7", mpi="mpi4py 4.1.2, MPICH Version: 5.0.2")
    assert problems(facts) == []
    assert line(facts, "nccl") == Check("nccl", "ok", "2.27.7")
    assert line(facts, "mpi").found.startswith("mpi4py 4.1.2")
    facts = changed(gpus=several, errors={"nccl": "CuPy does not find it", "mpi": "No module named 'mpi4py'"})
    assert problems(facts) == []  # each GPU works
    assert line(facts, "nccl").status == line(facts, "mpi").status == "note"
    assert line(facts, "nccl").remedy.endswith("pip install nvidia-nccl-cu13")
    assert "mpi4py, and mpich" in line(facts, "mpi").remedy
    assert "nccl" not in [check.name for check in doctor.checks(ON_GPU)]


def test_architecture_that_nvrtc_does_not_know() -> None:
    check = line(changed(gpus=(NEWER,)), "GPU 0 target")
    assert check.status == "note"
    assert check.found == "NVRTC does not know sm_130: kernels become PTX of compute_120 for the driver"


def test_architecture_older_than_all_that_nvrtc_knows() -> None:
    assert problems(changed(architectures=(100, 120))) == ["GPU 0 target"]


@pytest.mark.parametrize("sources", [None, ("/somewhere/kernels_cu", 0, 0)])
def test_kernels_missing(sources: tuple[str, int, int] | None) -> None:
    facts = changed(sources=sources)
    assert problems(facts) == ["kernels"]
    assert "pip install --force-reinstall cudistr" in line(facts, "kernels").remedy


@pytest.mark.parametrize(
    ("cache", "found"),
    [
        (None, "unknown"),
        (Cache(None), "in memory only"),
        (Cache(None, why="cannot write /c"), "cannot write /c"),
    ],
)
def test_cache_that_does_not_last(cache: Cache | None, found: str) -> None:
    check = line(changed(cache=cache), "cache")
    assert (check.status, check.found) == ("note", found)
    assert "CUDISTR_CACHE_DIR" in check.remedy


def test_environment(tmp_path: pathlib.Path) -> None:
    facts = changed(environ={"CUPY_TF32": "1", "CUDA_PATH": str(tmp_path / "gone"), "CUPY_CACHE_DIR": "/c"})
    assert "3 decimal digits" in line(facts, "CUPY_TF32").found
    assert line(facts, "CUDA_PATH").status == "note"
    forced = line(changed(environ={"CUDISTR_KERNEL": "portable"}), "CUDISTR_KERNEL")
    assert (forced.status, forced.found) == ("note", "portable")
    assert line(facts, "CUPY_CACHE_DIR") == Check("CUPY_CACHE_DIR", "ok", "/c")
    assert line(changed(environ={"CUDA_PATH": str(tmp_path)}), "CUDA_PATH").status == "ok"
    # a search path can be long and private: only that it is set matters
    path = line(changed(environ={"LD_LIBRARY_PATH": "/opt/cuda/lib64"}), "LD_LIBRARY_PATH")
    assert (path.status, path.found) == ("note", "set")


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_wrong_results_are_a_problem(error: float) -> None:
    facts = changed(self_test=SelfTest("GPU 0", {"exact": 1e-4, "LSH(group_size=2)": error}, 1.0, 1.0))
    assert problems(facts) == ["self test"]


def test_self_test_that_failed() -> None:
    facts = changed(self_test=None, errors={"self_test": "CompileError: no"})
    assert problems(facts) == ["self test"]
    assert line(facts, "self test").found == "CompileError: no"


def test_missing_and_old_packages() -> None:
    facts = changed(packages={"numpy": "2.0.1"})
    assert line(facts, "numpy").status == "note"
    assert problems(facts) == ["ml_dtypes"]


def test_a_failing_check_becomes_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_weather(facts: Facts) -> list[Check]:
        raise KeyError("rain")

    monkeypatch.setattr(doctor, "CHECKS", (check_weather, doctor.check_machine))
    lines = doctor.checks(ON_GPU)
    assert lines[0].name == "weather"
    assert "the check itself failed: KeyError" in lines[0].found
    assert lines[1:] == doctor.check_machine(ON_GPU)


def test_nothing_known_at_all() -> None:
    """Facts that are all absent still make a report."""
    lines = doctor.checks(Facts())
    assert all("the check itself failed" not in check.found for check in lines)
    assert {"numpy", "ml_dtypes", "kernels"} <= {check.name for check in lines if check.status == "problem"}


def test_every_question_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """gather() turns each failure into an entry, and asks the rest."""

    def broken(*args: Any) -> Any:
        raise OSError("torn\nsecond line")

    questions = ["_driver", "_import_cupy", "_runtime", "_gpus", "_nvrtc", "_architectures"]
    for name in [*questions, "_sources", "_cache", "_compile", "_self_test", "_distributions"]:
        monkeypatch.setattr(doctor, name, broken)
    facts = doctor.gather()
    assert facts.errors["driver"] == "OSError: torn"
    assert {"driver", "sources", "cache", "self_test", "cupy_wheels"} <= set(facts.errors)
    assert {"driver", "kernels", "self test"} <= set(problems(facts))
    monkeypatch.undo()
    for name in questions:
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor, "_distributions", lambda: {"cupy-cuda13x": "14.2.0"})
    monkeypatch.setattr(doctor, "_import_cupy", lambda: "14.2.0")
    assert {"runtime", "gpus", "nvrtc", "architectures"} <= set(doctor.gather(self_test=False).errors)


def test_self_test_on_numpy_compares_with_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor._self_test(None)
    assert result.where == "NumPy"
    assert result.errors["exact"] < doctor.SELF_TEST_BOUND
    honest = cudistr.attention
    monkeypatch.setattr(cudistr, "attention", lambda q, k, v: honest(q, k, v, causal=True))
    assert doctor._self_test(None).errors["exact"] > doctor.SELF_TEST_BOUND


def test_break_even_line() -> None:
    assert "tune --break-even` measures this GPU" in line(ON_GPU, "break-even").found
    assert line(changed(break_even=("hopper 64: lsh2 900",)), "break-even").found.endswith(
        "hopper 64: lsh2 900"
    )
    damaged = line(changed(errors={"break_even": "ValueError: an entry"}), "break-even")
    assert damaged.status == "note" and "--clear" in damaged.remedy


def test_compile_line() -> None:
    assert line(ON_GPU, "compile").found == "sm80_flash_fwd for sm_90 in 1.50 s"
    facts = changed(compiled=None, errors={"compiled": "CompileError: sm80_flash_fwd did not compile"})
    assert problems(facts) == ["compile"]


def test_cache_of_this_process(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDISTR_CACHE_DIR", str(tmp_path))
    (tmp_path / "k.bin").write_bytes(b"x" * 100)
    compiler.cache_folder.cache_clear()
    try:
        assert doctor._cache() == Cache(str(tmp_path), 1, 100)
        monkeypatch.setenv("CUDISTR_CACHE_DIR", str(tmp_path / "k.bin" / "folder"))
        compiler.cache_folder.cache_clear()
        found = doctor._cache()
        assert found.folder is None
        assert "cannot write its kernel cache" in found.why
    finally:
        compiler.cache_folder.cache_clear()


@pytest.mark.parametrize(
    "gpu", [None, H200, dataclasses.replace(H200, capability=(8, 6), shared_optin=99 << 10)]
)
def test_a_kernel_compiles(gpu: Gpu | None) -> None:
    if doctor.gather(self_test=False).nvrtc is None:
        pytest.skip("NVRTC comes with the extra cuda12 or cuda13")
    found = doctor._compile(gpu)
    assert found.architecture.removesuffix("a") == f"sm_{80 if gpu is None else gpu.arch}"
    assert found.kernel == ("sm90_flash_fwd" if found.architecture == "sm_90a" else "sm80_flash_fwd")


@pytest.mark.parametrize(("facts", "status"), [(ON_GPU, 0), (ON_CPU, 0), (changed(sources=None), 1)])
def test_exit_status_and_json(
    facts: Facts, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda self_test: facts)
    assert doctor.run(argparse.Namespace(json=True, no_self_test=False)) == status
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is (status == 0)
    assert [Check(**check) for check in printed["checks"]] == doctor.checks(facts)


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "gather", lambda self_test: changed(sources=None))
    assert doctor.run(argparse.Namespace(json=False, no_self_test=False)) == 1
    printed = capsys.readouterr().out.splitlines()
    place = next(i for i, text in enumerate(printed) if text.startswith("problem  kernels"))
    assert printed[place + 1].lstrip().startswith("-> Install cudistr anew")
    assert printed[-1] == "1 problem: mend what stands behind '->'."


def test_this_machine_is_examined() -> None:
    """The real questions answer here, GPU or not."""
    facts = doctor.gather(self_test=False)
    assert facts.packages["numpy"] == np.__version__
    assert facts.sources is not None
    assert facts.sources[1] > 0
    assert facts.cache is not None
