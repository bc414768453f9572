"""The embedded engine against the learner through random schedules: forks of forks, partial appends, failures."""

from __future__ import annotations

import pytest
import torch

from model.backbone.state import SessionState
from rl.step.batch import choice_logprobs, collate
from rollout.engines.embedded import SessionEngine
from rollout.turn.vocabulary import Vocabulary
from tests.rollout.schedules import SIZES, Planner, Schedule, failed, make_model
from tests.support.sessions import record

STEPS = 100


def planned(seed: int, dtype: torch.dtype) -> tuple[Schedule, bool]:
    """A schedule, and whether every log-prob and row digest of its sessions is the learner's."""
    model = make_model(dtype)
    vocabulary, temperature = Vocabulary.build(model.vocab), (1.0, 0.2)[seed % 2]
    engine = SessionEngine(model, vocabulary, **SIZES)
    schedule = Planner(engine, seed, temperature).plan(STEPS)
    assert (engine.free, engine.state.open_slots) == (SIZES["slots"], 0)
    whole = [s for n, s in enumerate(schedule.sessions) if s.chunks and n not in failed(schedule)]
    episodes = [record(session) for session in whole]
    with torch.no_grad():
        logprob, _, digest = choice_logprobs(model, collate(episodes, model.senses), vocabulary.classes, temperature)
    return schedule, all(
        torch.equal(learned, torch.cat(sampled))
        for learned, sampled in (
            (logprob, [e.text.logprob for e in episodes]),
            (digest, [e.text.digest for e in episodes]),
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_learner_agrees(dtype: torch.dtype) -> None:
    schedules, equal = zip(*(planned(seed, dtype) for seed in range(3)), strict=True)
    assert all(equal)
    kinds = [step.kind for schedule in schedules for step in schedule.steps]
    assert min(kinds.count(kind) for kind in ("open", "fork", "append", "fail", "close")) > 1
    assert max(len(s.tokens) for schedule in schedules for s in schedule.sessions) > 128


def test_a_fork_that_forgets_its_windows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = SessionState.fork

    def fork(state: SessionState, slot: int) -> int:
        twin = honest(state, slot)
        for past in state.conv_windows[1]:
            past[twin] = 0
        return twin

    monkeypatch.setattr(SessionState, "fork", fork)
    assert not planned(0, torch.float32)[1]
