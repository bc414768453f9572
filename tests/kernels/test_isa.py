"""One answer on every instruction set: the same inputs with METRONOME_ISA forced to each, digests of all ops compared.

Where the processor lacks a set, the skipped test names what is missing; then SIMDe runs the AVX-512 code on AVX2, and
`python -m tests.kernels.native.bochs` runs the compiled AVX-512 library on an emulated processor.

bf16 weights and activations are widened to fp32, which is exact, and multiplied by fp32 FMA chains; no set's bf16
dot-product instruction is used (``"bf16": "exact"`` in the contract), which is why bf16 can be compared at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import library
from tests.kernels.contract import threads
from tests.kernels.native.build import ROOT, build_replay, emulated, record_calls
from tests.kernels.native.cases import Digests, digests

SETS = ["avx2", "avx512"]


def _digests_elsewhere(**variables: str) -> Digests:
    env = os.environ | {"METRONOME_BACKEND": "cpu"} | variables
    command = [sys.executable, "-m", "tests.kernels.native.cases"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["contract"]["isa"] == variables["METRONOME_ISA"] and result["contract"]["bf16"] == "exact"
    found: Digests = result["digests"]
    return found


def _assert_equal(got: Digests, expected: Digests) -> None:
    assert got == expected, {name for name in expected if got[name] != expected[name]}


@pytest.mark.parametrize("isa", SETS)
def test_forced_instruction_set(isa: str) -> None:
    """The set forced in a process of its own gives the digests of this process's set."""
    missing = sorted(library._NEEDS[isa] - library._processor_flags())
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    _assert_equal(_digests_elsewhere(METRONOME_ISA=isa), digests())


@pytest.mark.slow
def test_avx512_code_emulated_on_avx2(tmp_path: Path) -> None:
    """Its intrinsics by SIMDe, its vectors of 16 as pairs of 8: the digests of the AVX2 code."""
    pytest.importorskip("simde_py", reason="SIMDe's headers are not installed: pip install -e '.[test]'")
    emulated(tmp_path / "native.so")
    here = digests()
    _assert_equal(_digests_elsewhere(METRONOME_ISA="avx2", METRONOME_NATIVE=str(tmp_path / "native.so")), here)


@pytest.mark.slow
def test_replay(tmp_path: Path) -> None:
    """Recorded calls, replayed without Python, give the recorded bytes and touch nothing past a buffer's end (recording
    fails if an exported function is not among them). Control: one byte changed in the record is found."""
    record_calls(tmp_path / "record")
    replay = build_replay(tmp_path / "replay")

    def run() -> subprocess.CompletedProcess[str]:
        native = ROOT / "kernels" / "cpu" / "_native_avx2.so"
        return subprocess.run([replay, native, tmp_path / "record"], capture_output=True, text=True)

    done = run()
    assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stdout + done.stderr
    record = bytearray((tmp_path / "record").read_bytes())
    record[-1] ^= 1  # the last buffer's last byte: what the last call gave
    (tmp_path / "record").write_bytes(record)
    done = run()
    assert done.returncode == 1 and ", 1 differ" in done.stdout, done.stdout + done.stderr


def test_digests_do_not_follow_the_thread_count() -> None:
    with threads(1):
        one = digests()
    with threads(2):
        assert digests() == one


def test_control_one_value() -> None:
    """A digest shows a change of one input in its last place."""
    before, after = digests(), digests(spoil=2.0**-22)
    changed = {name for name in before if before[name] != after[name]}
    assert any(name.startswith("linear") and name.endswith("fp32") for name in changed)
    assert not any(name.startswith(("attention", "sample", "route", "swiglu")) for name in changed)
