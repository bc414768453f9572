"""The tests here look inside the Triton backend; `test_triton.py` runs them, in processes where it can be imported."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.backend import NATIVE


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if NATIVE and collection_path.name.startswith("test_") else None
