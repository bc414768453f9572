"""The native library: found or refused with advice, its exp and log within their stated bounds."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu import library

ROOT = Path(__file__).parents[2]


def apply(name: str, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    library.bind(name, "ppi")(x.data_ptr(), out.data_ptr(), x.numel())
    return out


def ulps(got: Tensor, exact: Tensor) -> float:
    """Greatest error in units of the last place of the fp32 nearest to the exact value."""
    nearest = exact.float().abs()
    unit = torch.nextafter(nearest, torch.tensor(torch.inf)) - nearest
    return float(((got.double() - exact).abs() / unit.double()).max())


def test_exp_and_log_accuracy() -> None:
    """Every 997th positive and negative fp32 number."""
    x = torch.arange(0, 0x7F800000, 997, dtype=torch.int64).to(torch.int32).view(torch.float32)
    for sign in (1, -1):
        y = (sign * x)[x < 87.3]
        assert ulps(apply("vec_exp", y), y.double().exp()) <= 1.1
    tail = torch.linspace(-103.9, -87.4, 100_000)
    assert ulps(apply("vec_exp", tail), tail.double().exp()) <= 1
    assert ulps(apply("vec_log", x[1:]), x[1:].double().log()) <= 0.9


def test_exp_and_log_specials() -> None:
    inf, nan = torch.inf, torch.nan
    got = apply("vec_exp", torch.tensor([0.0, -0.0, inf, -inf, nan, 89.0, -104.5, 3e38, -3e38]))
    assert torch.equal(got.nan_to_num(7, inf), torch.tensor([1, 1, inf, 0, 7, inf, 0, inf, 0]))
    got = apply("vec_log", torch.tensor([1.0, 0.0, -0.0, inf, -inf, -1.0, nan]))
    assert torch.equal(got.nan_to_num(7, inf), torch.tensor([0, -inf, -inf, inf, 7, 7, 7]).nan_to_num(7, inf))


def test_bits_do_not_depend_on_the_place_in_a_vector() -> None:
    x = torch.linspace(-20, 20, 1003)
    for name, y in (("vec_exp", x), ("vec_log", x.abs())):
        assert torch.equal(apply(name, y), torch.cat([apply(name, one) for one in y.split(1)]))


@pytest.mark.parametrize("spoilt", ["vec_exp", "vec_gumbel", "vec_normal"])
def test_self_check(spoilt: str) -> None:
    """The library agrees with itself; one whose exp, or either noise, is another function is refused."""

    class Wrong:
        def __getitem__(self, name: str) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
            return library.library()["vec_log" if name == spoilt else name]

    library._compare(library.library(), library.library())
    with pytest.raises(RuntimeError, match="METRONOME_ISA=avx2"):
        library._compare(library.library(), Wrong())  # type: ignore[arg-type]


def test_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv("METRONOME_NATIVE", raising=False)
    with pytest.raises(RuntimeError, match=r"not built: .*_native_avx2\.so is missing.*pip install -e \..*g\+\+"):
        library._load("avx2")


def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    detect = library.isa.__wrapped__
    monkeypatch.setenv("METRONOME_ISA", "avx2")
    assert detect() == "avx2"
    monkeypatch.setenv("METRONOME_ISA", "sse2")
    with pytest.raises(ValueError, match=r"METRONOME_ISA='sse2' is not known; choose one of \['avx2', 'avx512'\]"):
        detect()
    monkeypatch.setattr(library, "_processor_flags", lambda: {"avx2", "fma", "bmi2"})
    monkeypatch.setenv("METRONOME_ISA", "avx512")
    with pytest.raises(RuntimeError, match=r"this processor lacks .*avx512f"):
        detect()
    monkeypatch.delenv("METRONOME_ISA")
    assert detect() == "avx2"
    monkeypatch.setattr(library, "_processor_flags", lambda: {"sse2"})
    with pytest.raises(RuntimeError, match="METRONOME_BACKEND=reference"):
        detect()


def test_no_compiler(tmp_path: Path) -> None:
    """One clear line, a non-zero exit, and the library that was there still whole."""
    built = ROOT / "kernels" / "cpu" / "_native_avx2.so"
    before = built.stat().st_mtime_ns
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "no C++ compiler: 'no-such-compiler' is not on PATH" in done.stderr
    assert built.stat().st_mtime_ns == before
