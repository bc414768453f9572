"""The main command, launched as a user launches it: two processes, warm start, RL, summary; again; interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
warmstart: {steps: 3, episodes: 4}
rl: {steps: 4, groups: 2, rollouts: 2, checkpoint_every: 2, evaluate_every: 2, save_episodes_every: 2}
eval: {scenarios: 2, during: 1}
"""
KEYS = {
    f"eval/{when}{family}"
    for when in ("before", "after")
    for family in ("", "/timespeak", "/timespeak_tight", "/turn_taking", "/turn_taking_tight")
} | {"mismatch/num_tokens", "mismatch/num_unequal", "mismatch/rows_unequal", "weights_digest", "processes", "wall_s"}


def launch(tmp_path: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    command += [
        "--num_processes",
        str(processes),
        "-m",
        "rl.train",
        "--config",
        str(recipe),
        "--runs",
        str(tmp_path / "runs"),
        *arguments,
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def summary(tmp_path: Path, name: str) -> dict[str, float | str]:
    return json.loads((tmp_path / "runs" / name / "summary.json").read_text())


def without_time(found: dict[str, float | str]) -> dict[str, float | str]:
    return {name: value for name, value in found.items() if name != "wall_s"}


def digests(folder: Path) -> list[str]:
    """Of the weights after each step."""
    return [json.loads(line)["weights_digest"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_run_again_and_resume_end_with_the_same_weights(tmp_path: Path) -> None:
    first = launch(tmp_path, "--name", "first")
    assert first.returncode == 0, first.stderr[-3000:]
    folder = tmp_path / "runs" / "first"
    assert "Run folder:" in first.stdout and str(folder) in first.stdout
    found = summary(tmp_path, "first")
    assert found.keys() >= KEYS
    assert "Audit: identical. 0 of" in first.stdout and (folder / "audit/report.html").is_file()
    audited = json.loads((folder / "audit/report.json").read_text())
    assert audited["rescored"]["episodes"] == 8 and audited["records"]["num_tokens"] == found["mismatch/num_tokens"]
    assert found["mismatch/num_tokens"] > 4 * 4 * 60
    assert found["mismatch/num_unequal"] == found["mismatch/rows_unequal"] == 0
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert len({m["weights_digest"] for m in metrics}) == 4
    assert metrics[-1]["weights_digest"] == found["weights_digest"]
    assert {"reward/mean", "reward/timing", "reward/content", "mismatch/k1", "time/rollout_s"} <= metrics[0].keys()
    assert "eval/held_out" in metrics[1]
    assert sorted(p.name for p in (folder / "episodes").iterdir()) == [
        f"step_{step:06d}.rank_{rank}.safetensors" for step in (0, 2) for rank in (0, 1)
    ]

    second = launch(tmp_path, "--name", "second")
    assert second.returncode == 0, second.stderr[-3000:]
    assert summary(tmp_path, "second")["weights_digest"] == found["weights_digest"]

    workers = launch(tmp_path, "--name", "workers", "--rollout.workers", "2")
    assert workers.returncode == 0, workers.stderr[-3000:]
    assert without_time(summary(tmp_path, "workers")) == without_time(found)
    assert digests(tmp_path / "runs" / "workers") == digests(folder)

    cut = tmp_path / "runs" / "second"
    shutil.rmtree(cut / "checkpoints" / "step_000004")  # as if the run had been killed in its fourth step
    (cut / "summary.json").unlink()
    resumed = launch(tmp_path, "--name", "second", "--resume", "true")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    after = summary(tmp_path, "second")
    assert without_time(after) == without_time(found)
    assert digests(cut) == digests(folder)

    other = launch(tmp_path, "--name", "other", "--seed", "1")  # the control: another seed, other weights
    assert other.returncode == 0, other.stderr[-3000:]
    assert summary(tmp_path, "other")["weights_digest"] != found["weights_digest"]


@pytest.mark.slow
def test_bf16_trains_on_three_processes(tmp_path: Path) -> None:
    """Weights in bf16 have fp32 masters; sampler and learner multiply with the same bf16 bits. Resumed, the masters are
    where they were."""
    three = ("--model.dtype", "bfloat16", "--rl.groups", "3", "--warmstart.episodes", "6")
    first = launch(tmp_path, "--name", "first", *three, processes=3)
    assert first.returncode == 0, first.stderr[-3000:]
    found, folder = summary(tmp_path, "first"), tmp_path / "runs" / "first"
    assert found["processes"] == 3 and "3 processes" in first.stdout
    assert found["mismatch/num_tokens"] > 500
    assert found["mismatch/num_unequal"] == found["mismatch/rows_unequal"] == 0
    assert "Audit: identical. 0 of" in first.stdout and len(set(digests(folder))) == 4
    before = digests(folder)
    shutil.rmtree(folder / "checkpoints" / "step_000004")
    (folder / "summary.json").unlink()
    fewer = launch(tmp_path, "--name", "first", "--resume", "true", *three, processes=2)
    assert fewer.returncode != 0 and "was begun by 3 processes, this is 2" in fewer.stderr
    assert digests(folder) == before
    resumed = launch(tmp_path, "--name", "first", "--resume", "true", *three, processes=3)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert digests(folder) == before and without_time(summary(tmp_path, "first")) == without_time(found)


@pytest.mark.slow
def test_greedy_sampling_is_refused_for_rl(tmp_path: Path) -> None:
    """It would score at temperature 1 what it took at 0."""
    done = launch(tmp_path, "--rollout.temperature", "0")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "rollout.temperature is 0.0: RL needs a number above 0" in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_bad_recipe_ends_with_one_line_and_a_status(tmp_path: Path) -> None:
    done = launch(tmp_path, "--rl.stpes", "3")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "stpes" in lines[0]
    assert not (tmp_path / "runs").exists()
