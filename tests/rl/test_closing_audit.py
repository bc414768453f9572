"""How a run of two processes ends: a bit that differs in one of them, in a step or in the closing audit, ends both
badly once all is written; and a run that saved no episode says that nothing could be re-scored. Launched as the README
launches a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.rl.test_launch import launch

pytestmark = pytest.mark.slow

BODY = """
import sys
from dataclasses import replace

import rl.step.loop
import rl.run
from model.program import ranks
from rl.train import main as train
from tests.support.episodes import with_text
from tests.rl.audit.runs import flip

save, gradient = rl.run.save_episodes, rl.step.loop.gradient_of

def other_saved(path, episodes):
    first, *rest = episodes
    save(path, [with_text(first, logprob=flip(first.text.logprob, 0)), *rest] if "rank_1" in path.name else episodes)

def other_learned(*arguments, **more):
    honest = gradient(*arguments, **more)
    return replace(honest, logprob=flip(honest.logprob, 0)) if ranks.rank() == 1 else honest

def main():
    if {tamper!r} == "saved":
        rl.run.save_episodes = other_saved
    if {tamper!r} == "learned":
        rl.step.loop.gradient_of = other_learned
    train({arguments!r})
"""
RUN = [
    "--name", "small", "--warmstart.steps", "1", "--warmstart.episodes", "2", "--rl.steps", "1", "--rl.groups", "2",
    "--rl.rollouts", "2", "--eval.scenarios", "1", "--eval.during", "1",
]  # fmt: skip


def run(folder: Path, *arguments: str, tamper: str = "") -> CompletedProcess[str]:
    """Of two processes."""
    body = BODY.format(tamper=tamper, arguments=[*RUN, "--runs", str(folder / "runs"), *arguments])
    return launch(folder, body, METRONOME_BACKEND="cpu", OMP_NUM_THREADS="1")


def test_a_run_whose_closing_audit_says_different_ends_badly(tmp_path: Path) -> None:
    done = run(tmp_path, tamper="saved")
    assert done.returncode != 0 and "Audit: different. 1 of" in done.stdout
    folder = tmp_path / "runs/small"
    says = "error: the closing audit found bits that differ between sampler and learner, though every step's own check"
    assert ("\n" + done.stderr).count(f"\n{says}") == 1
    assert "[rank" not in done.stderr, "a traceback of ours"
    assert "ended unexpectedly" not in done.stderr and "gloo" not in done.stderr, "a process was left waiting"
    summary = json.loads((folder / "summary.json").read_text())
    report = json.loads((folder / "audit/report.json").read_text())
    assert summary["mismatch/num_unequal"] == 0 < summary["mismatch/num_tokens"]
    assert (report["verdict"], report["num_unequal"]) == ("different", 1)
    assert (folder / "audit/report.html").is_file() and (folder / "checkpoints/step_000001/manifest.json").is_file()


def test_a_step_in_which_one_process_differs_is_refused_by_both(tmp_path: Path) -> None:
    done = run(tmp_path, tamper="learned")
    assert done.returncode != 0 and "Audit: different. The run stopped at step 0: 1 of" in done.stdout
    says = r"^error: step 0, episode (\S+), token .*; 1 log-probs and 0 rows of \d+ tokens differ\. The step was not"
    (episode,) = re.findall(says, done.stderr, re.MULTILINE)
    assert "Replayed, all activations agree." in done.stderr
    assert "[rank" not in done.stderr, "a traceback of ours"
    assert "ended unexpectedly" not in done.stderr and "gloo" not in done.stderr, "a process was left waiting"
    difference = json.loads((tmp_path / "runs/small/audit/difference.json").read_text())
    assert (difference["step"], difference["episode"], difference["first"]) == (0, episode, None)
    assert not (tmp_path / "runs/small/metrics.jsonl").exists()


@pytest.mark.parametrize("every", ["1", "0"])
def test_a_run_that_saved_no_episode_says_what_it_cannot(tmp_path: Path, every: str) -> None:
    done = run(tmp_path, "--rl.save_episodes_every", every)
    assert done.returncode == 0, done.stderr[-3000:]
    full = "Audit: identical. 0 of", "full-vocabulary KL exactly 0"
    if every == "1":  # the control
        assert all(part in done.stdout for part in full)
    else:
        assert not any(part in done.stdout for part in full)
        says = (
            "Audit: nothing compared. Nothing could be re-scored: no episode was saved. By the run's own records, 0 of"
        )
        assert says in done.stdout
