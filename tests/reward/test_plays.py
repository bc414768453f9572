"""Which preferences follow from plays with known rewards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.senses.video import NO_VIDEO
from reward.learned.corrupt import FAULTS, FAULTS_OF
from reward.learned.plays import Played, Writer, segment_preferences
from reward.score import score
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Outcome
from rollout.turn.action import CHUNK_MS
from rollout.turn.grammar import Grammar
from rollout.turn.vocabulary import Vocabulary
from rollout.world.base import Scenario
from rollout.world.speech import SpeechBank

CONFIG = ScenarioConfig()
WORDS = ("breathe", "yes", "sure", "four", "two", "answer")


@pytest.fixture(scope="module")
def item() -> Scenario:
    return CONFIG.in_turn(0, "train", 77_000, SpeechBank.open())


def played(item: Scenario, rewards: dict[int, float], mark: int) -> Played:
    """A play whose tokens tell which one it is."""
    line = np.zeros(item.chunks, np.float32)
    for chunk, reward in rewards.items():
        line[chunk] = reward
    return Played(
        item, torch.tensor([mark]), torch.zeros(1, 80, dtype=torch.uint8), NO_VIDEO, {"timing": line}, "rollouts"
    )


def test_aligned_stretches_hold_a_chunk_that_is_rewarded_differently(item: Scenario) -> None:
    """Both plays are rewarded in chunk 5, which says nothing; they differ in 30 only."""
    good, bad = played(item, {5: 1.0, 30: 1.0}, 1), played(item, {5: 1.0, 30: -1.0}, 2)
    result = list(segment_preferences("timing", [good, bad], 200, np.random.default_rng(0), aligned=True))
    assert len(result) > 150  # nearly none is wasted on stretches that tie
    for preference in result:
        better, worse = preference.chosen, preference.rejected
        assert (int(better.tokens), int(worse.tokens), preference.margin) == (1, 2, 2.0)
        assert (better.first, better.end) == (worse.first, worse.end) and better.first <= 30 < better.end
    assert min(p.chosen.end - p.chosen.first for p in result) == 1


def test_equal_plays_give_no_aligned_stretch(item: Scenario) -> None:
    plays = [played(item, {5: 1.0}, mark) for mark in (1, 2)]
    assert not list(segment_preferences("timing", plays, 50, np.random.default_rng(0), aligned=True))
    assert list(segment_preferences("timing", plays, 50, np.random.default_rng(0), aligned=False))


def test_each_axis_has_its_faults(item: Scenario) -> None:
    assert sorted(kind for kinds in FAULTS_OF.values() for kind in kinds) == sorted(FAULTS)
    assert set(FAULTS_OF) == set(CONFIG.axes)
    writer = Writer(Grammar(Vocabulary.build(256), 1), CONFIG)
    plays = writer.demonstrations(item, WORDS, (1, 3), faults=3, mistakes=1)
    swaps = [p for p in plays if p.source in FAULTS_OF["content"]]
    assert len(swaps) == 3 and plays[0].source == "expert" and plays[-1].source == "mistakes"
    assert len([p for p in plays if p.source in FAULTS_OF["timing"]]) >= 1
    assert all(p.total("content") < plays[0].total("content") for p in swaps)


def test_faults_have_wanted_sizes_only(bank: SpeechBank) -> None:
    writer = Writer(Grammar(Vocabulary.build(256), 1), CONFIG)
    for sizes in ((2, 4), (1, 3)):
        plays = [
            play
            for seed in range(6)
            for play in writer.demonstrations(CONFIG.in_turn(seed, "train", seed, bank), WORDS, sizes, 4, 0)[1:]
        ]
        assert len(plays) > 20 and {abs(play.size_ms) // CHUNK_MS for play in plays} == set(sizes)


def test_plays_that_err_all_along_misplace_most_reminders() -> None:
    """Those of warm start, the control, keep most of them inside the window."""
    bank = SpeechBank.open()
    share = {}
    for name, gross in (("gross", True), ("warm start", False)):
        hits = due = 0
        for seed in range(20):
            item = CONFIG.scenario("timespeak", "train", seed, bank)
            _, actions, facts = enact(item, CONFIG.expert(item, np.random.default_rng(seed), gross=gross))
            events = score(item.family, facts.to_json(), actions, CONFIG).events
            reminders = [e.outcome for e in events if e.kind == "reminder"]
            hits, due = hits + reminders.count(Outcome.HIT), due + len(reminders)
        share[name] = hits / due
    assert share["gross"] < 0.6 < share["warm start"]
