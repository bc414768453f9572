"""Plays a scenario by a script: a family's expert, one of the hacks, or either with other actions put into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from rollout.turn.action import LISTEN, Action
from rollout.turn.observation import stack_audio
from rollout.world.base import Facts, Scenario, Script, User

NO_EDITS: Mapping[int, Action] = {}


def enact(
    scenario: Scenario, cast: Callable[[User], Script], edits: Mapping[int, Action] = NO_EDITS
) -> tuple[NDArray[np.float32], list[Action], Facts]:
    """Plays one episode by the script that ``cast`` has for its user: the user's audio float32 [chunks,
    CHUNK_SAMPLES], the actions [chunks], the user's facts.

    ``edits`` puts other actions into the chunks that it names (from its first to its last one: silence where it names
    none), and the user reacts to those; after them the script, which has not noticed, is heard again from its next
    silence on."""
    user = scenario.user()
    script = _edited(cast(user), edits)
    observed, actions = [], []
    heard: Action | None = None
    for k in range(scenario.chunks):
        observed.append(user.next_chunk(heard))
        heard = script(k)
        actions.append(heard)
    return stack_audio(observed).numpy(), actions, user.facts()


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
