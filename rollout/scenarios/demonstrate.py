"""Plays a scenario by a script in place of the model: a family's expert or a hack, if wanted with edited actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rollout.turn.action import LISTEN, Action
from rollout.turn.observation import Observation
from rollout.world.base import Facts, Scenario, Script, User

NO_EDITS: Mapping[int, Action] = {}


def enact(
    scenario: Scenario, cast: Callable[[User], Script], edits: Mapping[int, Action] = NO_EDITS
) -> tuple[list[Observation], list[Action], Facts]:
    """Plays one episode by the script that ``cast`` makes for the scenario's user. Returns (what the user gives the
    model [chunks], actions [chunks], the user's facts).

    ``edits`` maps chunks to actions that replace the script's. From the first to the last of these chunks the action is
    that of ``edits``, or LISTEN where it has none. The script is not told; after the edits LISTEN continues until the
    script itself listens, so that no utterance of it starts in the middle. The user reacts to what results."""
    user = scenario.user()
    script = _edited(cast(user), edits)
    observed: list[Observation] = []
    actions: list[Action] = []
    last_action: Action | None = None
    for k in range(scenario.chunks):
        observed.append(user.next_chunk(last_action))
        last_action = script(k)
        actions.append(last_action)
    return observed, actions, user.facts()


def _edited(script: Script, edits: Mapping[int, Action]) -> Script:
    if not edits:
        return script
    first, last = min(edits), max(edits)
    muted = False

    def edited(k: int) -> Action:
        nonlocal muted
        action = script(k)
        if first <= k <= last:
            muted = True
            return edits.get(k, LISTEN)
        muted = muted and action.speaks
        return LISTEN if muted else action

    return edited
