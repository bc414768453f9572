"""Builds of the native library other than those that setup.py installs, with its sources and its flags.

`METRONOME_NATIVE=FILE` loads one: AVX-512 code that runs on AVX2 (`emulated`), for processors without AVX-512, or one
with sanitizers (`sanitized`, which .ci/sanitize uses). `record_calls` and `build_replay` compare builds without Python.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[3]


def build(target: Path, isa: str, extra: list[str], more_sources: tuple[Path, ...] = ()) -> None:
    """Compiles the library for ``isa`` with setup.py's flags, then ``extra``, and links it into ``target``."""
    recipe = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    compiler = os.environ.get("CXX", "g++").split()
    flags = [*recipe["FLAGS"], *recipe["INSTRUCTION_SETS"][isa], *extra]
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: str | Path) -> str:
            out = f"{folder}/{Path(source).stem}.o"
            _run([*compiler, *flags, "-c", str(source), "-o", out])
            return out

        with ThreadPoolExecutor(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, [*(ROOT / source for source in recipe["SOURCES"]), *more_sources]))
        sanitize = [flag for flag in extra if flag.startswith("-fsanitize")]
        _run([*compiler, "-shared", *sanitize, *objects, "-o", str(target)])


def emulated(target: Path) -> None:
    """The AVX-512 sources with every intrinsic by SIMDe, which needs no AVX-512; vectors of 64 bytes become pairs."""
    import simde_py

    shim = Path(__file__).with_name("avx512_by_simde.h")
    build(target, "avx2", ["-O1", f"-I{simde_py.get_include()}", "-include", str(shim)])


def sanitized(target: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer, and overrun.cpp, which gives both something to find."""
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    build(target, "avx2", flags, (Path(__file__).with_name("overrun.cpp"),))


def build_replay(target: Path) -> Path:
    """Compiles replay.c."""
    source = Path(__file__).with_name("replay.c")
    _run([os.environ.get("CC", "gcc"), "-O2", "-fopenmp", str(source), "-o", str(target), "-ldl"])
    return target


def record_calls(target: Path) -> str:
    """Runs record.py in a process of its own; returns what it printed."""
    command = [sys.executable, "-m", "tests.kernels.native.record", str(target)]
    return _run(command, os.environ | {"METRONOME_BACKEND": "cpu", "METRONOME_ISA": "avx2"}).strip()


def _run(command: list[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


if __name__ == "__main__":  # python -m tests.kernels.native.build sanitized FILE
    {"sanitized": sanitized, "emulated": emulated}[sys.argv[1]](Path(sys.argv[2]))
