"""One compiled kernel an op and type for every number of rows, wherever they lie: Triton's own binder is asked.

`test_launch.py` says which arguments are given; this says what Triton makes of them. In a process of its own, because
kernels are bound only where TRITON_INTERPRET was not set at the first import of triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.backend import OPS

ROOT = Path(__file__).parents[3]
NO_KERNEL = {"pack_linear", "pack_experts", "repack", "scale"}  # copies; a product of torch's, and dot


@pytest.fixture(scope="module")
def bound() -> dict[str, Any]:
    hidden = {"TRITON_INTERPRET", "METRONOME_BACKEND"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.triton.binder"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.rpartition("RESULTS ")[2])
    return found


def test_one_kernel_for_every_row_count(bound: dict[str, Any]) -> None:
    varied = {call: lines for call, lines in bound["varied"].items() if lines}
    assert not varied, json.dumps(varied, indent=1)


def test_every_op_and_every_kernel_was_bound(bound: dict[str, Any]) -> None:
    """Each op in both types, each kernel that the backend launches, and every call at least one."""
    assert all(bound["kernels"].values())
    assert {name for names in bound["kernels"].values() for name in names} == set(bound["launched"])
    for op in set(OPS) - NO_KERNEL:
        types = {call.split(", ")[1] for call in bound["varied"] if call.startswith(op)}
        only = op in ("route", "logprob", "sample", "dot", "adamw")  # fp32 alone
        assert types == {"torch.float32"} | (set() if only else {"torch.bfloat16"}), op


def test_controls(bound: dict[str, Any]) -> None:
    """An address that 16 does not divide, a row count that is specialised and a tile that follows it are named, by
    kernel and argument; without them nothing is."""
    said = {name: "\n".join(lines) for name, lines in bound["controls"].items()}
    assert (
        "swiglu_kernel: gate is '*fp32 tt.divisibility=16' in 1 rows, odd, '*fp32' in 1 rows, shifted"
        in said["pointer"]
    )
    assert "swiglu_kernel: rows is 'constexpr 1' in 1 rows, odd, 'i32' in 2 rows, odd" in said["row count"]
    assert "rows is 'constexpr 1' in 1 rows, odd, 'i32 tt.divisibility=16' in 16 rows, odd" in said["row count"]
    assert "product_kernel: M is 'constexpr 16' in 1 rows, odd, 'constexpr 32'" in said["tile"]
    assert said["none"] == ""
