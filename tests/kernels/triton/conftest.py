"""Runs every test file of this folder in its own process: in Triton's interpreter, and on a GPU where there is one.

TRITON_INTERPRET counts only when it is set before triton is first imported, and other tests import triton; so
the process that pytest was started in runs none of these tests, but starts, for each file, pytest anew. To run one test
while working on it, be that process: ``TRITON_INTERPRET=1 pytest tests/kernels/triton/test_linear.py -k oracle``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.triton.device import DEVICE_VARIABLE, inside

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.triton.interpreter import quicken

    quicken()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if inside() or not module_path.name.startswith("test_"):
        return None
    return _OwnProcess.from_parent(parent, path=module_path)


class _OwnProcess(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield _Run.from_parent(self, name="interpreter")
        on_gpu = _Run.from_parent(self, name="gpu")
        on_gpu.add_marker(pytest.mark.gpu)
        yield on_gpu


class _Run(pytest.Item):
    def runtest(self) -> None:
        variables = {"interpreter": {"TRITON_INTERPRET": "1"}, "gpu": {DEVICE_VARIABLE: "cuda"}}[self.name]
        if self.name == "gpu":
            import torch

            if not torch.cuda.is_available():
                pytest.skip("no GPU here")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | variables
        done = subprocess.run(
            command, cwd=self.config.rootpath, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise _Failed(done.stdout[-20000:] + done.stderr[-5000:])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: None = None) -> str:
        return str(excinfo.value) if isinstance(excinfo.value, _Failed) else str(excinfo.getrepr())

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} [{self.name}]"


class _Failed(Exception):
    """The other process' report."""
