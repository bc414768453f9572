"""What the rules say of a stored episode, as plain values for whoever prints or draws it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kernels.errors import MetronomeError
from model.recipe import read_recipe
from reward.combine import score
from reward.score import RewardConfig
from rollout.episode import Episode


@dataclass(frozen=True)
class _Constants:
    """The part of a run's recipe that is read here."""

    reward: RewardConfig = field(default_factory=RewardConfig)


def told(episode: Episode, run: Path) -> dict[str, Any] | None:
    """{"score", "rewards": sum by axis, "events": [{"chunk", "kind", "outcome", "due", "rewards"}]}; None where the
    rules do not know the family or cannot read the facts. ``run``: its folder, whose recipe may hold other constants
    than the defaults. Raises MetronomeError when that recipe cannot be read."""
    try:
        judged = score(episode.family, episode.facts, episode.actions, constants(run))
    except (KeyError, ValueError, TypeError, IndexError):
        return None
    return {
        "score": judged.value,
        "rewards": {"timing": float(judged.timing.sum()), "content": float(judged.content.sum())},
        "events": [
            {
                "chunk": e.chunk,
                "kind": e.kind,
                "outcome": e.outcome.value,
                "due": e.due,
                "rewards": {"timing": e.timing, "content": e.content},
            }
            for e in judged.events
        ],
    }


def constants(run: Path) -> RewardConfig:
    """Of the run in the folder ``run``; the defaults where there is none."""
    path = run / "config.yaml"
    if not path.is_file():
        return RewardConfig()
    try:
        fields = yaml.safe_load(path.read_text())["reward"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise MetronomeError(f"{path}: no recipe of a run with its reward's constants ({error!r})") from error
    text = yaml.safe_dump({"reward": fields})
    return read_recipe("rollout.show", "", _Constants, ["--config", text]).config.reward
