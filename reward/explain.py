"""The rules' score of an episode read from a file, as plain values for `rollout.show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reward.score import score_stored
from rollout.record.episode import Episode
from rollout.scenarios.registry import ForeignFamilyError
from rollout.scenarios.stored import stored_world


def explain(episode: Episode, run: Path) -> dict[str, Any] | None:
    """``{"score", "rewards": {axis: sum}, "events": [{"chunk", "kind", "outcome", "due", "rewards"}]}``, or None where
    no rules can score the episode (`score_stored`).

    ``run``: the folder of the run that saved the episode. Its recipe may name other families and other constants than
    the defaults. Raises MetronomeError when that recipe cannot be read."""
    try:
        judged = score_stored(episode, stored_world(run).scenarios)
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
