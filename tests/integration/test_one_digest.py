"""One digest everywhere: whatever instruction set, library settings and threads, a recipe ends with equal weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.settings import PROBES, ROOT, SETTINGS, reaches, run

GOLDEN = ROOT / "tests/golden/fingerprint.json"
SHORT = ROOT / "tests/golden/short_recipe.json"

TOGETHER = {
    "as it is, two threads": {"OMP_NUM_THREADS": "2"},
    "avx2, libraries held back, one thread": SETTINGS["native avx2"]
    | SETTINGS["MKL for AVX2"]
    | SETTINGS["torch without vectors"]
    | SETTINGS["numpy without its vector code"]
    | SETTINGS["glibc without FMA"],
    "avx512, MKL compatible, four threads": SETTINGS["native avx512"]
    | SETTINGS["MKL compatible"]
    | {"ATEN_CPU_CAPABILITY": "avx2"}
    | SETTINGS["four threads"],
}


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


@pytest.mark.slow
def test_two_teams_end_with_that_digest(tmp_path: Path) -> None:
    """Four learners, of which two at a time share the rows of the same episodes."""
    golden = json.loads(SHORT.read_text())
    recipe = tmp_path / "short.json"
    recipe.write_text(json.dumps(golden["recipe"]))
    command = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    command += ["--num_processes", "4", "-m", "rl.train", "--config", str(recipe), "--rl.sequence_parallel", "2"]
    done = run([*command, "--name", "short", "--runs", str(tmp_path)], {})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "short/summary.json").read_text())
    assert (summary["processes"], summary["weights_digest"]) == (2, golden["weights_digest"])
    assert summary["mismatch/num_tokens"] == golden["tokens"] and summary["mismatch/num_unequal"] == 0


@pytest.mark.slow
def test_the_algorithm_on_one_page_ends_with_that_digest(tmp_path: Path) -> None:
    golden = json.loads(SHORT.read_text())
    recipe = tmp_path / "short.json"
    recipe.write_text(json.dumps(golden["recipe"]))
    command = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml", "-m", "rl.minimal"]
    done = run([*command, "--config", str(recipe)], {})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"weights_digest {golden['weights_digest']}" in done.stdout.splitlines()
    assert len((ROOT / "rl/minimal.py").read_text().splitlines()) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_control_a_setting_reaches_its_library(name: str) -> None:
    """The library gives other bits under the setting, so that equal digests above say something."""
    reached = reaches(name)
    if not reached and name in ("MKL compatible", "numpy without its vector code"):
        pytest.skip(f"{name}: this processor gets the same code either way")
    assert reached
