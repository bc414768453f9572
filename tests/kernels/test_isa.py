"""One answer on every instruction set: the same inputs with METRONOME_ISA forced to each, digests of all ops compared.

Where the processor lacks a set, the skipped test names what is missing; then SIMDe runs the AVX-512 code on AVX2, and
`python -m tests.kernels.native.bochs` runs the compiled AVX-512 library on an emulated processor.

bf16 weights and activations are widened to fp32, which is exact, and multiplied by fp32 FMA chains; no set's bf16
dot-product instruction is used (``"bf16": "exact"`` in the contract), which is why bf16 can be compared at all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels import dispatch
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
    assert result["instruction_set"] == variables["METRONOME_ISA"] and result["contract"]["bf16"] == "exact"
    assert result["contract"] == dispatch.contract()  # equal bits, one contract
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


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Replays recorded calls of every exported function on a library, in memory that ends where a buffer ends; gives
    what replay.c said. (Recording fails if a function is not called.)"""
    folder = tmp_path_factory.mktemp("replay")
    record_calls(folder / "record")
    program = build_replay(folder / "replay")

    def run(native: Path, spoil: bool = False) -> str:
        record = bytearray((folder / "record").read_bytes())
        record[-1] ^= spoil  # the last buffer's last byte: what the last call gave
        (folder / "spoilt").write_bytes(record)
        return subprocess.run([program, native, folder / "spoilt"], capture_output=True, text=True).stdout

    return run


@pytest.mark.slow
def test_replay(replay: Callable[..., str]) -> None:
    """The recorded library gives the recorded bits and touches nothing past a buffer's end. Control: one byte of the
    record changed is found."""
    native = ROOT / "kernels" / "cpu" / "_native_avx2.so"
    assert re.search(r"^\d{4} calls replayed, 0 differ$", replay(native), re.MULTILINE)
    assert ", 1 differ" in replay(native, spoil=True)


@pytest.mark.slow
def test_avx512_code_emulated_on_avx2(replay: Callable[..., str], tmp_path: Path) -> None:
    """Its intrinsics by SIMDe, its vectors of 16 as pairs of 8: the bits of the AVX2 code, in digests and in replay."""
    pytest.importorskip("simde_py", reason="SIMDe's headers are not installed: pip install -e '.[test]'")
    native = tmp_path / "native.so"
    emulated(native)
    assert re.search(r"^\d{4} calls replayed, 0 differ$", replay(native), re.MULTILINE)
    _assert_equal(_digests_elsewhere(METRONOME_ISA="avx2", METRONOME_NATIVE=str(native)), digests())


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
    assert not any(name.startswith(("attention", "sample", "route", "swiglu", "gelu")) for name in changed)
