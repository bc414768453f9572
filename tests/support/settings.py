"""Settings that make libraries choose, on this processor, what they would on others; shared by the tests of equal bits.

MKL, numpy, torch and glibc pick code by what the processor can do, and so do our kernels. `reaches` shows of a setting
whether it changes what its library computes here: a setting that changes nothing proves nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import library

ROOT = Path(__file__).resolve().parents[2]

NO_FMA = "glibc.cpu.hwcaps=-FMA,-FMA4,-AVX2,-AVX512F,-AVX2_Usable,-FMA_Usable,-AVX512F_Usable"
SETTINGS: dict[str, dict[str, str]] = {
    "native avx2": {"METRONOME_ISA": "avx2"},
    "native avx512": {"METRONOME_ISA": "avx512"},
    "MKL for AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "numpy without its vector code": {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR X86_V3"},
    "glibc without FMA": {"GLIBC_TUNABLES": NO_FMA},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "four threads": {"OMP_NUM_THREADS": "4"},
}

PROBES = {
    "MKL compatible": "import torch; g = torch.Generator().manual_seed(0); a = torch.randn(64, 999, generator=g); "
    "print(hash((a @ a.T).numpy().tobytes()))",
    "torch without vectors": "import torch; g = torch.Generator().manual_seed(0); "
    "print(hash(torch.randn(65536, generator=g).numpy().tobytes()))",
    "numpy without its vector code": "import numpy as np; print(hash(np.exp(np.linspace(-9, 9, 1 << 20)).tobytes()))",
    "glibc without FMA": "import math; print(hash(tuple(math.exp(i / 7e4) for i in range(1 << 20))))",
}
"""Programs whose output a setting changes. (MKL picks its code for AVX2 on AMD processors by itself.)"""


def run(arguments: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A Python process with these settings; skips the test where the processor lacks a forced instruction set."""
    if settings.get("METRONOME_ISA") == "avx512":
        missing = sorted(library._NEEDS["avx512"] - library._processor_flags())
        if missing:
            pytest.skip(f"this processor lacks {', '.join(missing)}")
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=kept | fixed | settings, capture_output=True, text=True, timeout=600
    )


def reaches(name: str) -> bool:
    """Whether the setting changes what its probe prints."""
    outputs = []
    for settings in ({}, SETTINGS[name]):
        done = run(["-c", PROBES[name]], settings)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    return outputs[0] != outputs[1]


SHORT = "--model.preset nano --model.voice.width 32 --model.voice.blocks 1 --source.listener false --warmstart.steps 2 "
SHORT += "--warmstart.episodes 2 --rl.steps 2 --rl.groups 2 --rl.rollouts 2 --eval.scenarios 2 --eval.during 1"
VOICE = ["--config", str(ROOT / "configs/voice.yaml"), *SHORT.split()]
"""Arguments of `rl.train`: the recipe of the voice, made short."""
