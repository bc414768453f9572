"""A GPU that runs out of memory or is lost in the middle of a step, on the pretend device: one line, finished steps are
kept, and the run that goes on ends with the undisturbed run's weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

SHORT = {
    "config": "configs/quickstart.yaml",
    "placement.device": "cuda",
    "model.preset": "nano",
    "scenarios.families": "[timespeak]",
    "scenarios.timespeak.chunks": "24",
    "warmstart.steps": "1",
    "warmstart.episodes": "1",
    "rl.steps": "2",
    "rl.groups": "1",
    "rl.rollouts": "2",
    "rl.checkpoint_every": "1",
    "rl.save_episodes_every": "0",
    "eval.scenarios": "1",
    "eval.during": "1",
}

RUNS = (
    ("whole", None, ()),
    ("broken", "memory:logprob:3", ()),  # warm start and step 1 have taken one each
    ("broken", "lost:sample:9", ("--resume", "--rollout.max_tokens", "448")),
    ("broken", None, ("--resume", "--rollout.max_tokens", "448")),
)
"""Runs by name, with what their GPU fails by, and arguments."""

PROGRAM = """
import contextlib, io, json, sys
from pathlib import Path
from tests.support.pretend import faults
from tests.support.pretend.run import be_the_gpu
be_the_gpu()
from model.program import ranks
from model.program.startup import run_command

short, runs, folder = json.loads(sys.argv[1])
said = []
with ranks.joined():  # once: DeepSpeed knows its first process group only
    for name, fault, arguments in runs:
        faults.mend()
        if fault:
            faults.fail_at(fault)
        sys.argv = ["rl.train", *(f"--{k}={v}" for k, v in short.items()), "--runs", folder, "--name", name, *arguments]
        with contextlib.redirect_stderr(io.StringIO()) as text:
            try:
                run_command("rl.train")
            except SystemExit as end:
                status = end.code
        left = sorted(str(p.relative_to(Path(folder) / name)) for p in (Path(folder) / name).glob("checkpoints/*"))
        said.append([status, text.getvalue(), left])
Path(folder, "said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    given = json.dumps([SHORT, RUNS, str(folder)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


def test_each_failure_is_one_line_that_says_where_and_what_to_do(runs: Path) -> None:
    whole, memory, lost, mended = json.loads((runs / "said.json").read_text())
    for status, text, _ in (memory, lost):
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and "Traceback" not in text, text
        assert "Finished files are whole" in lines[0] and "--resume" in lines[0]
    assert "the GPU's memory ran out in the learner's forward and backward pass (1.95 GiB asked for" in memory[1]
    assert "lower rl.micro_batch (in a new run" in memory[1]
    assert "the GPU is lost or fails (uncorrectable ECC error encountered)" in lost[1]
    for status, text, _ in (whole, mended):  # the control
        assert status == 0 and "error" not in text


def test_finished_steps_are_kept_and_the_run_that_goes_on_is_the_undisturbed_one(runs: Path) -> None:
    whole, memory, lost, mended = json.loads((runs / "said.json").read_text())
    assert memory[2] == lost[2] == ["checkpoints/step_000000", "checkpoints/step_000001"]
    assert mended[2] == whole[2] == [*memory[2], "checkpoints/step_000002"]
    ends = [json.loads((runs / name / "summary.json").read_text()) for name in ("whole", "broken")]
    assert ends[0]["weights_digest"] == ends[1]["weights_digest"]
    assert ends[0]["mismatch/num_tokens"] == ends[1]["mismatch/num_tokens"] > 0
    machine = json.loads((runs / "whole" / "environment.json").read_text())
    assert machine["gpu"] == "pretend GPU"
