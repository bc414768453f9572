"""A stored run, opened by a command that plays its policies anew."""

from __future__ import annotations

from pathlib import Path

from kernels.errors import MetronomeError
from model.placement import Placement, PlacementConfig
from rl.config import TrainConfig
from rl.folder import RunFolder
from rl.train import parse
from rollout.scenarios.registry import shipped_only


def opened(path: str, placement: PlacementConfig, trust_families: bool) -> tuple[TrainConfig, RunFolder]:
    """The recipe and the folder of a run; from now on this process computes where ``placement`` says, as the recipe's
    dtype asks. Raises MetronomeError for a folder without a recipe, and for a recipe with families that are not shipped
    unless they are trusted."""
    run = Path(path)
    if not (run / "config.yaml").is_file():
        raise MetronomeError(f"run: {run} is not a run's folder (no config.yaml)")
    with shipped_only("--trust-families true", unless=trust_families):
        config, _, _ = parse(["--config", str(run / "config.yaml")], past=True)
    Placement.enter(placement, config.model.dtype)
    return config, RunFolder(run, [])
