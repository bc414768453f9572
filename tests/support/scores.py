"""What the tests of scorers compare."""

from __future__ import annotations

import pytest

from rollout.scenarios.verdict import CONTENT, TIMING, Score


def events_of(score: Score, kind: str) -> list[tuple[int, str, float, float]]:
    """(chunk, outcome, timing reward, content reward) of each event of this kind; rewards compare approximately."""
    return [
        (e.chunk, e.outcome.value, *(pytest.approx(e.rewards.get(axis, 0.0)) for axis in (TIMING, CONTENT)))
        for e in score.events
        if e.kind == kind
    ]
