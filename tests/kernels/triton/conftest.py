"""The tests here look inside the Triton backend; `test_triton.py` runs them, in processes where it can be imported.

Only `test_binder.py` runs in every process: it starts its own."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.backend import NATIVE


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    inside = collection_path.name.startswith("test_") and collection_path.name != "test_binder.py"
    return True if NATIVE and inside else None
