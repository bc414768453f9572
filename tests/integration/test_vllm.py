"""Runs whose rollouts come from vLLM, launched as a user launches them, end with the embedded engine's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_train import digests, launch, summary, without_time

pytestmark = pytest.mark.vllm


def test_runs_end_with_the_embedded_engines_weights(tmp_path: Path) -> None:
    """Two learners, each with a vLLM in its own process, then each with one in a process beside it."""
    pytest.importorskip("vllm")
    recipes = {"session": [], "vllm": ["--rollout.engine", "vllm"]}
    recipes["process"] = [*recipes["vllm"], "--rollout.workers", "1"]
    for name, arguments in recipes.items():
        done = launch(tmp_path, "--name", name, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    found = {name: without_time(summary(tmp_path, name)) for name in recipes}
    steps = {name: digests(tmp_path / "runs" / name) for name in recipes}
    assert len(set(steps["session"])) == 4  # every step moved the weights
    assert steps["vllm"] == steps["process"] == steps["session"]
    assert found["vllm"] == found["process"] == found["session"]
