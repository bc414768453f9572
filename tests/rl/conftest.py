"""Fixtures of the tests of `--resume`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.rl.resuming import go


@pytest.fixture(scope="session")
def whole(world: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    runs = tmp_path_factory.mktemp("runs")
    go(runs, "whole", resume=False)
    return runs / "whole"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it in another folder of runs, under another name."""
    return Path(shutil.copytree(whole, tmp_path / "elsewhere" / "moved"))
