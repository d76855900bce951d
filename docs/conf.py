"""Sphinx configuration. What can be computed is computed at build time: tables, the figure, example output."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import floors  # noqa: E402
import grouping_figure  # noqa: E402
import make_tables  # noqa: E402
import pareto_figure  # noqa: E402
import speed_figure  # noqa: E402

import cudistr  # noqa: E402

project = "cudistr"
author = "the cudistr developers"
project_copyright = f"2026, {author}"
version = release = cudistr.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated", "benchmarks"]
html_theme = "furo"
html_title = f"cudistr {release}"
autodoc_typehints = "none"  # the numpydoc sections say more than the annotations
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False


def generate(_app):
    """Write the pages' computed parts into docs/_generated."""
    generated = HERE / "_generated"
    generated.mkdir(exist_ok=True)
    (generated / "records.md").write_text(make_tables.all_tables(), encoding="utf-8")
    (generated / "distributed.md").write_text(make_tables.several_gpus(), encoding="utf-8")
    (generated / "reductions.md").write_text(make_tables.reductions(), encoding="utf-8")
    lowrank = make_tables.reductions(name="lowrank")
    (generated / "lowrank.md").write_text(lowrank, encoding="utf-8")
    (generated / "break-even.md").write_text(make_tables.break_even_table(), encoding="utf-8")
    (generated / "clock.md").write_text(make_tables.clocks(), encoding="utf-8")
    (generated / "floors.md").write_text(floors.floors(), encoding="utf-8")
    (generated / "profiles.md").write_text(make_tables.profiles(), encoding="utf-8")
    (generated / "speed.md").write_text(speed_figure.draw_all(generated), encoding="utf-8")
    evaluations = make_tables.evaluations()
    for name in ("eval-smollm2", "eval-dinov2", *evaluations):  # a word where one is missing
        text = evaluations.get(name, make_tables.NONE)
        (generated / f"{name}.md").write_text(text, encoding="utf-8")
    pareto_figure.draw(generated / "pareto.svg")
    grouping_figure.draw(generated / "grouping.svg")
    for example in ("02_grouped", "06_measured_error", "07_tolerance"):
        run = subprocess.run(
            [sys.executable, str(HERE.parent / "examples" / f"{example}.py")],
            cwd=HERE.parent,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        (generated / f"{example}.txt").write_text(run.stdout, encoding="utf-8")


def setup(app):
    app.connect("builder-inited", generate)
