"""The command line: what it imports, what it prints, and the status it exits with."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

import cudistr
from cudistr import cli

ROOT = pathlib.Path(cudistr.__file__).parents[1]


def call(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m cudistr`` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "cudistr", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the module of a command by one that does what the test says."""

    def install(
        run: Callable[[Any], int],
        add_arguments: Callable[[Any], None] = lambda parser: None,
        name: str = "doctor",
    ) -> None:
        module = types.ModuleType(f"cudistr.{name}")
        module.run, module.add_arguments = run, add_arguments  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"cudistr.{name}", module)

    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    return install


def raiser(error: BaseException) -> Callable[[Any], int]:
    def run(args: Any) -> int:
        raise error

    return run


def test_version() -> None:
    done = call("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"cudistr {cudistr.__version__}")


def test_help_names_every_command() -> None:
    done = call("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "doctor", "bench"))


@pytest.mark.parametrize("name", ["doctor", "bench"])
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([name, "--help"])
    assert exit_info.value.code == 0
    assert f"usage: cudistr {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "text"), [([], "COMMAND"), (["dance"], "invalid choice: 'dance'")])
def test_command_missing_or_unknown(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(words)
    assert exit_info.value.code == 2
    assert text in capsys.readouterr().err


def test_only_the_called_command_is_imported() -> None:
    """``--help`` must not wait for matplotlib or CuPy, nor fail where an extra is missing."""
    program = (
        "import sys; from cudistr import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "names = ('cupy', 'torch', 'matplotlib', 'cudistr.demo', 'cudistr.doctor', 'cudistr.bench')\n"
        "loaded = [name for name in names if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_arguments_and_status_are_passed_on(command: Callable[..., None]) -> None:
    seen = []

    def run(args: Any) -> int:
        seen.append(args)
        return 3

    command(run, lambda parser: parser.add_argument("--size", type=int))
    assert cli.main(["doctor", "--size", "7"]) == 3
    assert (seen[0].size, seen[0].argv) == (7, ["doctor", "--size", "7"])


@pytest.mark.parametrize(
    "error",
    [
        cudistr.CompileError("kernel k does not compile", "k.cu(1): error\nmore of the log"),
        cudistr.CudaUnavailableError("no GPU"),
        cudistr.UnsupportedDeviceError("older than 8.0"),
        ValueError("head_dim must be a multiple of 8"),
        TypeError("q must be float16"),
        PermissionError("not writable"),
    ],
)
def test_expected_errors_are_one_line(
    error: Exception, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raiser(error))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().err.splitlines()
    assert printed == [f"cudistr: error: {str(error).splitlines()[0]} (--debug shows where)"]


def test_error_without_text_is_named(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(raiser(ValueError()))
    assert cli.main(["doctor"]) == 1
    assert "error: ValueError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "module", "hint"),
    [
        ("demo", "onnx", ". Install what is missing: pip install 'cudistr[demo]' (--debug shows where)"),
        ("bench", "cupy", ". Install what is missing: pip install 'cudistr[cuda13]' (--debug shows where)"),
        ("doctor", "something", " (--debug shows where)"),
    ],
)
def test_missing_package_names_the_extra(
    name: str,
    module: str,
    hint: str,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(raiser(ModuleNotFoundError(f"No module named '{module}'", name=module)), name=name)
    assert cli.main([name]) == 1
    assert capsys.readouterr().err == f"cudistr: error: No module named '{module}'{hint}\n"


@pytest.mark.parametrize("words", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback(words: list[str], command: Callable[..., None]) -> None:
    command(raiser(ValueError("told")))
    with pytest.raises(ValueError, match="told"):
        cli.main(words)


@pytest.mark.parametrize(("value", "raises"), [("1", True), ("0", False), ("", False)])
def test_debug_variable(
    value: str, raises: bool, command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cli.DEBUG_VARIABLE, value)
    command(raiser(ValueError("told")))
    if raises:
        with pytest.raises(ValueError, match="told"):
            cli.main(["doctor"])
    else:
        assert cli.main(["doctor"]) == 1


def test_mistakes_of_ours_keep_their_traceback(command: Callable[..., None]) -> None:
    command(raiser(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["doctor"])


def test_interrupt(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(raiser(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "cudistr: interrupted\n"


def test_bad_method_of_bench_from_a_shell() -> None:
    done = call("bench", "--method", "fast")
    assert done.returncode == 1
    assert done.stderr.startswith("cudistr: error: method must be 'exact', 'lsh' with a group size")
    assert len(done.stderr.splitlines()) == 1
