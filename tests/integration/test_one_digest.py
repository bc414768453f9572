"""One digest everywhere: whatever instruction set, library settings and threads, a recipe ends with the same weights.

The settings make libraries choose what they would on other processors: MKL, numpy, torch and glibc each pick code by
what the processor can do. A control shows that a setting does reach its library.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import library

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/fingerprint.json"
SHORT = ROOT / "tests/golden/short_recipe.json"

NO_FMA = "glibc.cpu.hwcaps=-AVX2_Usable,-FMA_Usable,-FMA,-AVX2,-AVX512F"
SETTINGS = {
    "native avx2": {"METRONOME_ISA": "avx2"},
    "native avx512": {"METRONOME_ISA": "avx512"},
    "MKL for AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "torch for AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "numpy without AVX-512": {"NPY_DISABLE_CPU_FEATURES": "X86_V4"},
    "glibc without FMA": {"GLIBC_TUNABLES": NO_FMA},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "four threads": {"OMP_NUM_THREADS": "4"},
}
TOGETHER = {
    "as it is, two threads": {"OMP_NUM_THREADS": "2"},
    "avx2, libraries held back, one thread": SETTINGS["native avx2"]
    | SETTINGS["MKL for AVX2"]
    | SETTINGS["torch without vectors"]
    | SETTINGS["numpy without AVX-512"]
    | SETTINGS["glibc without FMA"],
    "avx512, MKL compatible, four threads": SETTINGS["native avx512"]
    | SETTINGS["MKL compatible"]
    | SETTINGS["torch for AVX2"]
    | SETTINGS["four threads"],
}


def run(arguments: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    if settings.get("METRONOME_ISA") == "avx512":
        missing = sorted(library._NEEDS["avx512"] - library._processor_flags())
        if missing:
            pytest.skip(f"this processor lacks {', '.join(missing)}")
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    environment = kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | settings
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_stage_under_every_setting(name: str) -> None:
    done = run(["-m", "rl.fingerprint", "--against", str(GOLDEN)], SETTINGS[name])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "in every stage" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_short_recipe_ends_with_one_digest(name: str, tmp_path: Path) -> None:
    """Two learners, warm start and RL."""
    golden = json.loads(SHORT.read_text())
    recipe = tmp_path / "short.json"
    recipe.write_text(json.dumps(golden["recipe"]))  # JSON is YAML
    command = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml", "-m", "rl.train"]
    done = run([*command, "--config", str(recipe), "--name", "short", "--runs", str(tmp_path)], TOGETHER[name])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "short/summary.json").read_text())
    assert summary["processes"] == golden["processes"] == 2
    assert summary["weights_digest"] == golden["weights_digest"]
    assert summary["mismatch/num_tokens"] == golden["tokens"] and summary["mismatch/num_unequal"] == 0


PROBE = """
import hashlib, numpy as np, torch
x = torch.linspace(0.001, 9, 1 << 20)
print(hashlib.sha256(np.exp(x.double().numpy()).tobytes()).hexdigest(),
      hashlib.sha256(torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_control_the_settings_reach_their_libraries() -> None:
    """torch's own normal numbers change without vectors. (numpy's exponential changes only where there is AVX-512.)"""
    plain = run(["-c", PROBE], {})
    held = run(["-c", PROBE], SETTINGS["torch without vectors"] | SETTINGS["numpy without AVX-512"])
    assert plain.returncode == held.returncode == 0, plain.stderr + held.stderr
    assert plain.stdout.split()[1] != held.stdout.split()[1]
    assert re.fullmatch(r"[0-9a-f]{64} [0-9a-f]{64}\n", plain.stdout)
