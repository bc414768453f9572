"""The rules' score of an episode read from a file, as plain values for `rollout.show`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.program.reading import read_yaml
from model.program.recipe import read_recipe
from model.program.yaml_text import to_yaml
from reward.score import score_stored
from rollout.record.episode import Episode
from rollout.scenarios.registry import ForeignFamilyError, ScenarioConfig


@dataclass(frozen=True)
class _ScenarioRecipe:
    """The part of a run's recipe that scoring needs."""

    scenarios: ScenarioConfig = field(default_factory=ScenarioConfig)


def explain(episode: Episode, run: Path) -> dict[str, Any] | None:
    """``{"score", "rewards": {axis: sum}, "events": [{"chunk", "kind", "outcome", "due", "rewards"}]}``, or None where
    no rules can score the episode (`score_stored`).

    ``run``: the folder of the run that saved the episode. Its recipe may name other families and other constants than
    the defaults. Raises MetronomeError when that recipe cannot be read."""
    try:
        judged = score_stored(episode, families(run))
    except ForeignFamilyError:  # whoever forbade to import it says so
        return None
    if judged is None:
        return None
    return {
        "score": judged.value,
        "rewards": {axis: float(rewards.sum()) for axis, rewards in judged.rewards.items()},
        "events": [
            {
                "chunk": e.chunk,
                "kind": e.kind,
                "outcome": e.outcome.value,
                "due": e.due,
                "rewards": dict(e.rewards),
            }
            for e in judged.events
        ],
    }


def families(run: Path) -> ScenarioConfig:
    """The families, and their constants, of the run in the folder ``run``; the defaults where there is none."""
    path = run / "config.yaml"
    if not path.is_file():
        return ScenarioConfig()
    try:
        fields = read_yaml(path)["scenarios"]
    except (KeyError, TypeError) as error:
        raise MetronomeError(f"{path}: no recipe of a run with its families ({error!r})") from error
    text = to_yaml({"scenarios": fields})
    return read_recipe("rollout.show", "", _ScenarioRecipe, ["--config", text]).config.scenarios
