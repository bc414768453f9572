"""Players of repeat: the expert is faultless, floors and hacks are far below honest play."""

import json
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from reward import hacks
from reward.rules.repeat import VOICE
from reward.score import score
from reward.source import RewardSource
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.repeat import said, sound_of
from rollout.scenarios.verdict import CONTENT, TIMING
from rollout.turn.action import LISTEN
from rollout.world.base import Scenario
from rollout.world.lexicon import lexicon
from rollout.world.speech import SpeechBank

CONFIG = ScenarioConfig(("repeat",))


@pytest.fixture(scope="module", params=["train", "held_out"])
def items(request: pytest.FixtureRequest, bank: SpeechBank) -> list[Scenario]:
    return [CONFIG.scenario("repeat", request.param, seed, bank) for seed in range(20)]


def test_the_expert_is_faultless(items: list[Scenario]) -> None:
    for item in items:
        _, actions, facts = enact(item, CONFIG.expert(item, np.random.default_rng(item.seed), mistake_scale=0))
        assert CONFIG.facts(json.loads(json.dumps(facts.to_json()))) == facts
        got = score("repeat", facts.to_json(), actions, CONFIG)
        assert (got.value, got.tight, got.spurious) == (1.0, 1.0, 0), item.id
        answers = [e for e in got.events if e.kind == "answer"]
        assert len(answers) >= 3 and all(e.rewards == {TIMING: 1.0, CONTENT: 1.0} for e in answers), item.id
        assert got.rewards[VOICE].max() > 0.5 and not (got.rewards[VOICE] < 0).any()
        due = CONFIG.family("repeat").words(facts)[: len(answers)]
        assert [a.words[0] for a in actions if a.words] == list(due)


def test_hacks_and_floors_are_far_below_honest_play(items: list[Scenario]) -> None:
    rows = {row.player: row for row in hacks.assess(items, CONFIG, RewardSource(CONFIG, "rules", []))}
    assert rows.keys() == {*hacks.HONEST, *hacks.HACKS, *CONFIG.family("repeat").hacks}
    assert hacks.winners(list(rows.values())) == []
    assert rows["expert"].score == 1.0 and 0.6 < rows["careless"].score < 0.9
    for name in rows.keys() - hacks.HONEST.keys():
        assert rows[name].score < rows["careless"].score - 0.1, name
        assert rows[name].beats["rules"][0] == 0.0, name
    assert rows["never speaks"].score == rows["mumbles"].score == 0.0
    assert rows["mumbles"].reward == rows["never speaks"].reward
    assert max(rows[n].score for n in ("speaks always", "talks always", "shouts", "whispers")) < 0.25


def test_random_talk_earns_nothing(items: list[Scenario]) -> None:
    """A random mode in every chunk, a random word at a random level."""
    values = []
    for item in items:
        rng = np.random.default_rng(item.seed)
        actions = []
        for _ in range(item.chunks):
            word = lexicon().words[int(rng.integers(len(lexicon().words)))]
            spoken = said(word, sound_of(word, float(rng.uniform(-50, 0))))
            actions.append((LISTEN, spoken[0], spoken[1])[int(rng.integers(3))])
        _, played, facts = enact(item, lambda user, actions=actions: actions.__getitem__)  # type: ignore[misc]
        values.append(score("repeat", facts.to_json(), played, CONFIG).value)
    assert fmean(values) < 0.06


def test_no_hack_lies_uphill_of_what_warm_start_shows(items: list[Scenario]) -> None:
    """RL begins from demonstrations that are wrong half of the time."""
    source = RewardSource(CONFIG, "rules", [])
    shown, shown_rewards = hacks.perform(hacks.honest(1), items, CONFIG, source)
    assert 0.3 < fmean(s.value for s in shown) < 0.7
    for name, cast in hacks.hacks(CONFIG, "repeat").items():
        scores, rewards = hacks.perform(cast, items, CONFIG, source)
        assert fmean(s.value for s in scores) < fmean(s.value for s in shown) + 0.05, name
        assert name in ("holds a chunk", "again and again") or sum(rewards["rules"]) < sum(shown_rewards["rules"]), name


@pytest.mark.parametrize(
    ("change", "winner"),
    [({"spurious": 0.5, "trailing": 0.5}, "again and again"), ({"anchor": 0.0, "cut": 0.0}, "one chunk")],
)
def test_a_rule_that_pays_for_it_is_found_out(items: list[Scenario], change: dict[str, float], winner: str) -> None:
    """The control: without its price a hack comes near honest play."""
    settings = CONFIG.settings_of("repeat")
    generous = ScenarioConfig(CONFIG.families, {"repeat": replace(settings, reward=replace(settings.reward, **change))})
    rows = {row.player: row for row in hacks.assess(items[:12], generous, RewardSource(generous, "rules", []))}
    strict = {row.player: row for row in hacks.assess(items[:12], CONFIG, RewardSource(CONFIG, "rules", []))}
    share = {
        name: each[winner].reward["rules"] / each["expert"].reward["rules"]
        for name, each in (("generous", rows), ("strict", strict))
    }
    assert share["generous"] > share["strict"] + 0.15


@pytest.mark.parametrize(
    ("mistake", "low", "high"),
    [
        ("wrong_word", 0.0, 0.2),
        ("wrong_delay", 0.35, 0.8),
        ("omission", 0.0, 0.0),
        ("stops_early", 0.2, 0.5),
        ("goes_on", 0.4, 0.7),
        ("wrong_level", 0.0, 0.3),
        ("ignored_interruption", 0.6, 0.95),
    ],
)
def test_each_mistake_alone_costs_score(
    bank: SpeechBank, items: list[Scenario], mistake: str, low: float, high: float
) -> None:
    """At rate 1 each mistake lowers the mean score into a range that its meaning gives."""
    settings = CONFIG.settings_of("repeat")
    mistakes = replace(settings.mistakes.scaled(0), **{mistake: 1.0})
    interruptions = 1.0 if mistake == "ignored_interruption" else settings.interruptions
    changed = replace(settings, mistakes=mistakes, interruptions=interruptions)
    config = ScenarioConfig(CONFIG.families, {"repeat": changed})
    values = []
    for one in items:
        item = config.scenario("repeat", one.split, one.seed, bank)
        _, actions, facts = enact(item, config.expert(item, np.random.default_rng(item.seed)))
        values.append(score("repeat", facts.to_json(), actions, config).value)
    assert low <= fmean(values) <= high
