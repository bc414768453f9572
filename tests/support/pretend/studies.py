"""``tests.support.pretend.studies CHECKPOINT OUT``: the invariance matrix of a checkpoint and the baseline, as their
commands make them, but of short episodes and one step; for `tests.support.pretend.run`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from model.placement import Placement, PlacementConfig
from rl.study import baseline, matrix
from rl.train import parse


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    Placement.enter(PlacementConfig("cuda"), "float32")
    short = ["--scenarios.families", "[timespeak]", "--scenarios.timespeak.chunks", "20"]
    matrix.__dict__["ScenarioConfig"] = lambda: parse(short)[0].scenarios
    baseline.METHODS = tuple(one for one in baseline.METHODS if not one.weights)  # naive torch is in the matrix
    result = matrix.run(
        checkpoint, out, episodes=2, completions=0, long_completions=0, rounds=0, dtypes=[torch.float32]
    )
    print(f"Matrix: {matrix.finding(result.tables)}")
    print(f"Baseline: {baseline.run(checkpoint, out, 1, evaluated=1, groups=1, rollouts=2)['headline']}")
