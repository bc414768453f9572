"""Random arguments in a process of their own, so that a crash is a failed test (fuzz.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.faults.cases import CASES
from tests.kernels.faults.fuzz import CRASH, assert_alike

ROOT = Path(__file__).parents[3]
EXAMPLES = 150


def _fuzz(folder: Path, *names: str) -> str:
    """What the process said; AssertionError with the example that ended it if it did not end well."""
    last = folder / "example"
    command = [sys.executable, "-m", "tests.kernels.faults.fuzz", str(EXAMPLES), str(last), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode} in {last.read_text()}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.mark.slow
def test_random_arguments(tmp_path: Path) -> None:
    accepted = {name: int(n) for name, n in re.findall(r"^(.*): (\d+) of", _fuzz(tmp_path, *CASES), re.MULTILINE)}
    assert accepted.keys() == CASES.keys()
    assert all(EXAMPLES / 20 < n < EXAMPLES for n in accepted.values()), accepted  # both ways out are taken


def test_control_crash(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"exit -11 in {CRASH}"):
        _fuzz(tmp_path, CRASH)


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, torch.nan]), torch.tensor([1.0])])
def test_control_wrong_numbers(wrong: torch.Tensor) -> None:
    right = torch.tensor([1.0, 2.0])
    assert_alike([right], [right.clone()])
    with pytest.raises(AssertionError):
        assert_alike([wrong], [right])
