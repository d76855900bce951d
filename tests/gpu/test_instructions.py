"""What the emulated instructions are tested for holds on a GPU too."""

from __future__ import annotations

import pytest

from cudistr import compiler
from tests import probes
from tests.gpu.util import cp

pytestmark = pytest.mark.gpu


@pytest.mark.small
@pytest.mark.parametrize("check", probes.CHECKS.values(), ids=probes.CHECKS)
def test_instruction(check, monkeypatch, tmp_path):
    check(probes.runner(cp, monkeypatch, tmp_path))
    monkeypatch.undo()
    compiler._digest.cache_clear()
