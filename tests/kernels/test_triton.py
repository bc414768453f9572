"""Runs the tests of the ops on the Triton backend: in Triton's interpreter, and on a GPU where there is one.

The same files prove the cpu backend in this process. In processes of their own, because TRITON_INTERPRET counts only
when it is set before triton is first imported, and other tests import triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.backend import COPIES, DEVICE_VARIABLE, OPS

FOLDER = Path(__file__).parent
SHARED = [
    "test_attention.py",
    "test_attention_first.py",
    "test_attention_numbers.py",
    "test_conv.py",
    "test_devices.py",
    "test_embedding.py",
    "test_experts.py",
    "test_gelu.py",
    "test_linear.py",
    "test_logprob.py",
    "test_norm.py",
    "test_optimizer.py",
    "test_route.py",
    "test_sample.py",
]
OWN = sorted(f"triton/{path.name}" for path in FOLDER.glob("triton/test_*.py") if path.name != "test_binder.py")


def run(files: list[str], **variables: str) -> None:
    paths = [str(FOLDER / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"METRONOME_BACKEND": "triton"} | variables
    done = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(done.stdout[-20000:] + done.stderr[-5000:], pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("files", [SHARED, OWN], ids=["shared", "own"])
def test_in_the_interpreter(files: list[str]) -> None:
    run(files, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_a_flow_head_in_the_interpreter() -> None:
    chains = "../model/voice/test_chain.py::test_the_learner_has_the_samplers_bits"
    run([f"{chains}[dtype0-2]", f"{chains}[dtype1-2]"], TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch finds none")
@pytest.mark.parametrize("files", [SHARED, OWN], ids=["shared", "own"])
def test_on_a_gpu(files: list[str]) -> None:
    run(files, **{DEVICE_VARIABLE: "cuda"})


def test_every_op_has_its_tests() -> None:
    """Row contract, oracle, gradients and control stand in a file that both of the above run."""
    text = {file: (FOLDER / file).read_text() for file in SHARED}
    for op in set(OPS) - COPIES:
        files = [file for file, content in text.items() if re.search(rf"\bops\.{op}\b", content)]
        assert files, f"no test of {op}"
        parts = ("_control", "oracle") if op in ("dot", "adamw") else ("contract", "_control", "oracle", "gradient")
        for part in parts:  # sums over whole tensors and updates have no rows
            assert op == "sample" or any(part in text[file] for file in files), f"{op}: no {part} in {files}"
