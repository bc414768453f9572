"""mypy holds every backend to `kernels.backend.Backend`: one that lacks an op, or types it otherwise, is an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.reference import naive

ROOT = Path(__file__).resolve().parents[2]
COMPARED = """
from kernels.backend import Backend
from kernels.reference import naive
import lacks_an_op, returns_another_type

whole: Backend = naive
lacking: Backend = lacks_an_op
other: Backend = returns_another_type
"""


@pytest.mark.slow
def test_a_spoilt_backend_is_a_type_error(tmp_path: Path) -> None:
    text = Path(naive.__file__).read_text()
    renamed, count = re.subn(r"^def dot\(", "def another(", text, flags=re.MULTILINE)
    retyped, again = re.subn(r"^(def embedding_sum\(.*\)) -> Tensor:$", r"\1 -> None:", text, flags=re.MULTILINE)
    assert count == again == 1
    (tmp_path / "lacks_an_op.py").write_text(renamed)
    (tmp_path / "returns_another_type.py").write_text(retyped)
    (tmp_path / "compared.py").write_text(COMPARED)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "compared.py")]
    paths = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "MYPYPATH": paths}, capture_output=True, text=True)
    errors = re.findall(r"compared\.py:(\d+): error: Incompatible types in assignment", done.stdout)
    assert errors == ["7", "8"], done.stdout  # and none for the backend as it is, in line 6
    assert "dot" in done.stdout and "embedding_sum" in done.stdout
