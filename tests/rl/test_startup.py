"""What is wrong outside the program ends it with one line and status 2, before anything heavy is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rl import startup

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "TORCHELASTIC_ERROR_FILE", "METRONOME_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=plain | environment, capture_output=True, text=True, timeout=120
    )


def command(folder: Path, body: str) -> str:
    """Code that runs a command module holding ``body``."""
    (folder / "some_command.py").write_text(body)
    return (
        f"import sys; sys.path.append({str(folder)!r}); from rl.startup import run_command; run_command('some_command')"
    )


def test_a_clean_command_ends_with_0(tmp_path: Path) -> None:
    done = run(command(tmp_path, "def main(): print('ran')"), METRONOME_BACKEND="reference")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", "")


def test_a_user_error_is_one_line(tmp_path: Path) -> None:
    body = (
        "from kernels.errors import MetronomeError\ndef main(): raise MetronomeError('x.wav: too short; record anew')"
    )
    report = tmp_path / "report.json"
    done = run(command(tmp_path, body), METRONOME_BACKEND="reference", TORCHELASTIC_ERROR_FILE=str(report))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: x.wav: too short; record anew\n")
    message = json.loads(report.read_text())["message"]
    assert message["message"] in message["extraInfo"]["py_callstack"] == "error: x.wav: too short; record anew"


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    done = run(command(tmp_path, "def main(): raise KeyError('oops')"), METRONOME_BACKEND="reference")
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'oops'" in done.stderr


def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    done = run(command(tmp_path, "def main(): raise KeyboardInterrupt"), METRONOME_BACKEND="reference")
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
    done = run(command(tmp_path, "def main(): print('ran')"), METRONOME_BACKEND="abacus")
    assert (done.returncode, done.stdout) == (2, "")
    assert "METRONOME_BACKEND='abacus'" in done.stderr and done.stderr.count("\n") == 1


def test_missing_native_library_says_how_to_build_it(tmp_path: Path) -> None:
    for package in ("kernels", "rl"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    done = run(command(tmp_path, "def main(): print('ran')"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install -e ." in done.stderr and "g++" in done.stderr and done.stderr.count("\n") == 1


def test_no_compiler_says_which_package_to_install(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace", "--force"],
        cwd=tmp_path, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "no C++ compiler: 'no-such-compiler'" in done.stderr and "apt-get install g++" in done.stderr


def test_a_later_rank_speaks_after_a_moment(tmp_path: Path) -> None:
    body = "from kernels.errors import MetronomeError\ndef main(): raise MetronomeError('disk full')"
    done = run(command(tmp_path, body), METRONOME_BACKEND="reference", RANK="1")
    assert (done.returncode, done.stderr) == (2, "error (process 1): disk full\n")


@pytest.mark.slow
def test_two_launched_processes_print_one_error(tmp_path: Path) -> None:
    (tmp_path / "some_command.py").write_text(
        "from kernels.errors import MetronomeError\ndef main(): raise MetronomeError('no such recipe')"
    )
    (tmp_path / "start.py").write_text("from rl.startup import run_command\nrun_command('some_command')")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
         str(ROOT / "configs/accelerate/cpu.yaml"), "-m", "start"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "METRONOME_BACKEND": "reference"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("\nerror: no such recipe\n") == 1 and "error (process 1)" not in done.stderr
    assert "error: no such recipe" in done.stderr.splitlines()[-2]


@pytest.mark.slow
def test_deepspeed_compiles_nothing(tmp_path: Path) -> None:
    """Two processes, with compilers on the path that only leave a trace; one step equals torch's own AdamW."""
    for name in ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ninja"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "start.py").write_text(
        """
import os, torch
from rl.startup import import_deepspeed
deepspeed = import_deepspeed()
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
twin = torch.nn.Linear(8, 8)
twin.load_state_dict(model.state_dict())
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_force_ds_cpu_optimizer": False,
          "zero_allow_untested_optimizer": True}
engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
plain = torch.optim.AdamW(twin.parameters())
for _ in range(3):
    gradients = [torch.randn(p.shape) for p in model.parameters()]
    engine.backward(torch.stack([(p * g).sum() for p, g in zip(model.parameters(), gradients)]).sum())
    engine.step()
    for p, g in zip(twin.parameters(), gradients):
        p.grad = g
    plain.step()
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
print("equal", os.environ["RANK"], flush=True)
torch.distributed.destroy_process_group()
"""
    )
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
         str(ROOT / "configs/accelerate/cpu.yaml"), "-m", "start"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "equal 0" in done.stdout and "equal 1" in done.stdout
    assert not (tmp_path / "called").exists() and not (tmp_path / "extensions").exists()
