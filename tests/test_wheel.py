"""What a wheel holds: every file of our packages that git holds, the recipes, and a library an instruction set."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "model", "rollout", "reward", "rl")
LIBRARIES = {"kernels/cpu/_native_avx2.so", "kernels/cpu/_native_avx512.so"}


def expected() -> set[str]:
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES, "configs"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    recipes = {f"model/{name}" for name in listed if name.startswith("configs/") and name.endswith(".yaml")}
    documents = {name for name in listed if name.endswith(".md")}  # for readers of the repository
    return recipes | LIBRARIES | {name for name in listed if not name.startswith("configs/")} - documents


def contents(folder: Path, project: str) -> set[str]:
    """Of a wheel built from a copy of our sources with ``project`` as pyproject.toml. The compiler only makes empty
    files: what the libraries hold is `tests/kernels`'."""
    source = folder / "source"
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "pyproject.toml").write_text(project)
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run(
        [*command, str(source)], env={"PATH": "/usr/bin:/bin", "CXX": str(compiler)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_a_wheel_holds_everything(tmp_path: Path) -> None:
    assert contents(tmp_path, (ROOT / "pyproject.toml").read_text()) == expected()


@pytest.mark.slow
def test_a_missing_line_is_seen(tmp_path: Path) -> None:
    """The control: without the speech that ships with the program."""
    project = (ROOT / "pyproject.toml").read_text()
    spoiled = project.replace('rollout = ["py.typed", "data/**"]', 'rollout = ["py.typed"]')
    assert spoiled != project
    missing = expected() - contents(tmp_path, spoiled)
    assert "rollout/data/speech/manifest.jsonl" in missing and all("/data/" in name for name in missing)


def test_every_package_says_that_it_has_types() -> None:
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []
