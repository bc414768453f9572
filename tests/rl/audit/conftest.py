from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.rl.audit.runs import make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(made, tmp_path / "small"))
