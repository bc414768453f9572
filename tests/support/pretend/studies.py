"""``tests.support.pretend.studies CHECKPOINT OUT``: the invariance matrix of a checkpoint in small, and two steps of
the baseline, as their commands make them; for `tests.support.pretend.run`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from model.placement import Placement, PlacementConfig
from rl.study import baseline, matrix


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:])
    Placement.enter(PlacementConfig("cuda"), "float32")
    result = matrix.run(
        checkpoint, out, episodes=2, completions=1, long_completions=0, rounds=0, dtypes=[torch.float32]
    )
    print(f"Matrix: {matrix.finding(result.tables)}")
    print(f"Baseline: {baseline.run(checkpoint, out, 1, evaluated=1, groups=1, rollouts=2)['headline']}")
