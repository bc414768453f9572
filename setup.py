"""Builds the native CPU kernels: one shared library per instruction set, from the same sources.

And puts a copy of the recipes into the wheel, where `model.program.shipped` finds them: configs/ is no package.
Needs g++ (or $CXX) only: no torch, no Python headers, since the libraries are plain C and called through cffi.
``python setup.py build_ext --inplace`` rebuilds them after an edit. Everything else about the package is in
pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CONFIGS = Path("configs")
NATIVE = Path("kernels/cpu/native")
SOURCES = sorted(str(path) for path in NATIVE.glob("*.cpp"))
HEADERS = sorted(str(path) for path in NATIVE.glob("*.h"))

INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mbmi2", "-mprefer-vector-width=512"],
}

# -ffp-contract=off and no -ffast-math: the compiler may neither fuse nor reorder, so bits are what the source says.
# -fopenmp only when compiling: at run time the symbols come from the OpenMP library that torch has loaded, since two
# OpenMP runtimes in one process fight over the cores.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += [
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-ignored-attributes",
]


class NativeBuild(build_ext):
    """Compiles each source once per instruction set and links each set into ``kernels/cpu/_native_<set>.so``."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise SystemExit(f"metronome-rl: the CPU kernels need an x86-64 processor, this is {platform.machine()}")
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler.split()[0]) is None:
            raise SystemExit(
                f"metronome-rl: no C++ compiler: {compiler!r} is not on PATH. Install g++ 9 or newer (Debian, Ubuntu: "
                "apt-get install g++) or set CXX, then run pip install -e . again"
            )
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp) / ext.name.rsplit("_", 1)[1]
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            out = objects / (Path(source).stem + ".o")
            newest = max(Path(path).stat().st_mtime for path in (source, *ext.depends, __file__))
            if self.force or not out.exists() or out.stat().st_mtime < newest:
                # Written beside and renamed: an interrupted compiler leaves no half object that looks fresh.
                fresh = out.with_suffix(f".{os.getpid()}.tmp")
                _run([*compiler.split(), *FLAGS, *ext.extra_compile_args, "-c", source, "-o", str(fresh)])
                os.replace(fresh, out)
            return str(out)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outputs = list(pool.map(compile_one, ext.sources))
        # Written beside and renamed, so that a process that has the old library mapped keeps it whole.
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        _run([*compiler.split(), "-shared", *outputs, "-o", str(fresh)])
        os.replace(fresh, target)


class WithRecipes(build_py):
    """configs/*.yaml as files of the package ``model``; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._recipes().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self._recipes()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else self._recipes().values())]

    def _recipes(self) -> dict[str, str]:
        return {str(path): str(Path(self.build_lib) / "model" / path) for path in sorted(CONFIGS.rglob("*.yaml"))}


class AnyPython(bdist_wheel):
    """The libraries are plain C: one wheel does for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _run(command: list[str]) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stderr:
        print(done.stderr, flush=True)
    if done.returncode:
        raise SystemExit(f"metronome-rl: building the CPU kernels failed: {' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":  # the tests read the flags above for builds of their own
    setup(
        ext_modules=[
            Extension(f"kernels.cpu._native_{isa}", SOURCES, depends=HEADERS, extra_compile_args=flags)
            for isa, flags in INSTRUCTION_SETS.items()
        ],
        cmdclass={"build_ext": NativeBuild, "build_py": WithRecipes, "bdist_wheel": AnyPython},
    )
