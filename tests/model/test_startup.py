"""What is wrong outside the program ends it with one line and status 2, before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.program import startup

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "TORCHELASTIC_ERROR_FILE", "METRONOME_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=plain | environment, capture_output=True, text=True, timeout=300
    )


def command(folder: Path, body: str, native: bool = False) -> str:
    """Code that runs a command module holding ``body``; without ``native`` the check that loads torch is left out."""
    (folder / "some_command.py").write_text(body)
    check = "" if native else "import model.program.startup; model.program.startup.check_native = lambda: None; "
    path = f"import sys; sys.path.append({str(folder)!r}); "
    return f"{path}{check}from model.program.startup import run_command; run_command('some_command')"


def test_a_clean_command_ends_with_0(tmp_path: Path) -> None:
    done = run(command(tmp_path, "def main(): print('ran')", native=True), METRONOME_BACKEND="reference")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_a_user_error_is_one_line(tmp_path: Path) -> None:
    body = (
        "from kernels.errors import MetronomeError\ndef main(): raise MetronomeError('x.wav: too short; record anew')"
    )
    report = tmp_path / "report.json"
    done = run(command(tmp_path, body), TORCHELASTIC_ERROR_FILE=str(report))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: x.wav: too short; record anew\n")
    message = json.loads(report.read_text())["message"]
    assert message["message"] in message["extraInfo"]["py_callstack"] == "error: x.wav: too short; record anew"


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    done = run(command(tmp_path, "def main(): raise KeyError('oops')"))
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'oops'" in done.stderr


def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    done = run(command(tmp_path, "def main(): raise KeyboardInterrupt"))
    assert done.returncode == 130 and done.stderr.startswith("error: interrupted") and "--resume" in done.stderr


def test_foreign_kernels_package_is_named(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign" / "kernels"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    code = command(tmp_path, "def main(): print('ran')")
    done = run(f"import sys; sys.path.insert(0, {str(foreign.parent)!r}); sys.path.append({str(ROOT)!r}); {code}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: the package `kernels` at {foreign} shadows Metronome's own")
    assert done.stderr.count("\n") == 1


def test_missing_kernels_package_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rl", tmp_path / "rl", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.raises(startup.StartupError, match="shadows"):
        startup.check_kernels(tmp_path)  # ours is not the one beside a copied rl/
    startup.check_kernels()


def test_old_python_is_named() -> None:
    startup.check_python((3, 11, 0))
    with pytest.raises(startup.StartupError, match=r"Python 3\.10 .* needs 3\.11 or newer"):
        startup.check_python((3, 10, 14))


def test_unknown_backend_is_named(tmp_path: Path) -> None:
    done = run(command(tmp_path, "def main(): print('ran')", native=True), METRONOME_BACKEND="abacus")
    assert (done.returncode, done.stdout) == (2, "")
    assert "METRONOME_BACKEND='abacus'" in done.stderr and done.stderr.count("\n") == 1


def test_missing_native_library_says_how_to_build_it(tmp_path: Path) -> None:
    for package in ("kernels", "model"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    done = run(command(tmp_path, "def main(): print('ran')", native=True), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install -e ." in done.stderr and "g++" in done.stderr and done.stderr.count("\n") == 1


def test_no_compiler_says_which_package_to_install(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace", "--force"],
        cwd=tmp_path, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "no C++ compiler: 'no-such-compiler'" in done.stderr and "apt-get install g++" in done.stderr


def test_a_later_rank_speaks_after_a_moment(tmp_path: Path) -> None:
    body = "from kernels.errors import MetronomeError\ndef main(): raise MetronomeError('disk full')"
    done = run(command(tmp_path, body), RANK="1")
    assert (done.returncode, done.stderr) == (2, "error (process 1): disk full\n")
