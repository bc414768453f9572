"""Every kind of event of lookout, computed by hand; then players: the expert is faultless, floors and hacks far below.

The episode: a shape at the left appears in chunk 5, one below in 20, one at the right in 37, so that its window is
still open when the episode ends after chunk 39. A flicker comes in 17. Answers are best one chunk after the shape, and
count up to four after it.
"""

import json
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from model.tokenizer import load_tokenizer
from reward import hacks
from reward.score import score
from reward.source import RewardSource
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.lookout import PLACES, Appearance, Distraction, LookoutFacts
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import CONTENT, TIMING, Score
from rollout.turn.action import LISTEN, speak
from rollout.world.base import Scenario
from rollout.world.speech import SpeechBank
from tests.support.scores import events_of

CONFIG = ScenarioConfig(("lookout",))
FACTS = LookoutFacts(
    chunks=40,
    places=("left", "down", "right", "up"),
    shapes=(Appearance(5, 13, "left"), Appearance(20, 29, "down"), Appearance(37, 39, "right")),
    distractions=(Distraction(17, 17, "flicker"),),
)
PERFECT = {6: "left", 21: "down", 38: "right"}


def judge(said: dict[int, str], facts: LookoutFacts = FACTS) -> Score:
    actions = [speak(*said[k].split()) if k in said else LISTEN for k in range(facts.chunks)]
    return score("lookout", facts.to_json(), actions, CONFIG)


def test_perfect() -> None:
    got = judge(PERFECT)
    assert (got.correct, got.due, got.spurious, got.value, got.tight) == (3, 3, 0, 1.0, 1.0)
    expected = np.zeros(40, np.float32)
    expected[[6, 21, 38]] = 1.0
    assert np.array_equal(got.rewards[TIMING], expected) and np.array_equal(got.rewards[CONTENT], expected)


def test_silence() -> None:
    got = judge({})
    # The last shape is not due: its window is open until after the end.
    assert events_of(got, "answer") == [(9, "missed", -1.0, 0.0), (24, "missed", -1.0, 0.0)]
    assert (got.value, got.tight, got.correct, got.due, got.spurious) == (0.0, 0.0, 0, 2, 0)
    assert not got.rewards[CONTENT].any()


@pytest.mark.parametrize(
    ("chunk", "grade", "tight"),
    [(5, 1 - 0.8 / 3, 1), (6, 1.0, 1), (7, 1 - 0.8 / 3, 1), (8, 1 - 1.6 / 3, 0), (9, 0.2, 0)],
)
def test_an_answer_is_graded_by_its_delay(chunk: int, grade: float, tight: int) -> None:
    got = judge({**PERFECT, 6: "left", chunk: "left"} if chunk == 6 else {chunk: "left", 21: "down", 38: "right"})
    assert events_of(got, "answer")[0] == (chunk, "hit", pytest.approx(grade), pytest.approx(grade))
    assert got.value == 1.0 and (got.tight == 1.0) == bool(tight)


@pytest.mark.parametrize("chunk", [4, 10])
def test_too_early_or_too_late_is_spurious_and_missed(chunk: int) -> None:
    got = judge({chunk: "left"})
    assert events_of(got, "speech") == [(chunk, "spurious", -0.8, 0.0)]
    assert events_of(got, "answer")[0] == (9, "missed", -1.0, 0.0)
    assert got.rewards[CONTENT][chunk] == 0.0  # no credit for the right word at the wrong time


@pytest.mark.parametrize("words", ["right", "leave", "left right up down", "left left"])
def test_other_words_are_wrong_and_a_correction_is_spurious(words: str) -> None:
    got = judge({**PERFECT, 6: words, 7: "left"})
    assert events_of(got, "answer")[0] == (6, "wrong", 1.0, -1.0)
    assert events_of(got, "speech") == [(7, "spurious", -0.8, 0.0)]
    assert (got.correct, got.due, got.spurious, got.value) == (2, 3, 1, 0.5)


@pytest.mark.parametrize("chunk", [0, 7, 18, 30])
def test_speech_at_anything_else_is_spurious(chunk: int) -> None:
    """Before the first shape, to one that was named, to the flicker, to a shape that has been there for long."""
    got = judge({**PERFECT, chunk: "down"})
    assert events_of(got, "speech") == [(chunk, "spurious", -0.8, 0.0)]
    assert (got.correct, got.due, got.value) == (3, 3, 0.75)


def test_the_next_shape_ends_a_window() -> None:
    facts = replace(FACTS, shapes=(Appearance(5, 6, "left"), Appearance(8, 20, "down")))
    got = judge({9: "down"}, facts)
    assert events_of(got, "answer") == [(8, "missed", -1.0, 0.0), (9, "hit", 1.0, 1.0)]
    assert judge({8: "left"}, facts).correct == 0  # the word for the shape that is no longer there
    assert judge({7: "left", 9: "down"}, facts).value == 1.0


def test_what_the_end_cuts_off_is_due_only_if_answered() -> None:
    assert judge({6: "left", 21: "down"}).value == 1.0
    assert judge({6: "left", 21: "down", 39: "up"}).value == pytest.approx(2 / 3)
    longer = replace(FACTS, chunks=42)
    assert judge({6: "left", 21: "down"}, longer).value == pytest.approx(2 / 3)  # its window ends in the last chunk


def test_events_carry_the_whole_reward() -> None:
    got = judge({6: "right", 7: "left", 18: "up", 22: "down"})
    for axis in (TIMING, CONTENT):
        assert got.rewards[axis].sum() == pytest.approx(sum(e.rewards.get(axis, 0.0) for e in got.events))
    assert got.rewards[TIMING].dtype == np.float32


# Players


@pytest.fixture(scope="module", params=["train", "held_out"])
def items(request: pytest.FixtureRequest) -> list[Scenario]:
    bank = SpeechBank.open()
    return [CONFIG.scenario("lookout", request.param, seed, bank) for seed in range(30)]


def test_the_expert_is_faultless(items: list[Scenario]) -> None:
    for item in items:
        _, actions, facts = enact(item, CONFIG.expert(item, np.random.default_rng(item.seed), mistake_scale=0))
        assert CONFIG.facts(json.loads(json.dumps(facts.to_json()))) == facts
        got = score("lookout", facts.to_json(), actions, CONFIG)
        assert (got.value, got.tight, got.spurious) == (1.0, 1.0, 0), item.id
        assert got.due >= 3 and all(e.rewards == {TIMING: 1.0, CONTENT: 1.0} for e in got.events), item.id
        due = CONFIG.family("lookout").words(facts)[: got.due]
        assert [a.words[0] for a in actions if a.speaks] == list(due)


def test_hacks_and_floors_are_far_below_honest_play(items: list[Scenario]) -> None:
    rows = {row.player: row for row in hacks.assess(items, CONFIG, RewardSource(CONFIG, "rules", []))}
    own = {"repeats a word", "every place in turn", "guesses a place", "answers every change"}
    assert rows.keys() == {*hacks.HONEST, *hacks.HACKS, *own}
    assert hacks.winners(list(rows.values())) == []
    assert rows["expert"].score == 1.0 and 0.6 < rows["careless"].score < 0.9
    for name in rows.keys() - hacks.HONEST.keys():
        assert rows[name].score < rows["careless"].score - 0.2, name
        assert rows[name].beats["rules"][0] <= 0.05, name  # all shapes may be at the left, and nothing distract
    assert rows["never speaks"].score == 0.0
    assert max(rows[n].score for n in ("speaks always", "repeats a word", "every place in turn")) < 0.15
    assert 0.15 < rows["guesses a place"].score < 0.35  # one of four


def test_no_hack_lies_uphill_of_what_warm_start_shows(items: list[Scenario]) -> None:
    """RL begins from demonstrations that are wrong half of the time."""
    source = RewardSource(CONFIG, "rules", [])
    shown, shown_rewards = hacks.perform(hacks.honest(1), items, CONFIG, source)
    assert 0.3 < fmean(s.value for s in shown) < 0.7
    for name, cast in hacks.hacks(CONFIG, "lookout").items():
        scores, rewards = hacks.perform(cast, items, CONFIG, source)
        assert fmean(s.value for s in scores) < fmean(s.value for s in shown) - 0.1, name
        assert name == "ends early" or sum(rewards["rules"]) < sum(shown_rewards["rules"]), name


def test_a_rule_that_pays_for_talk_is_found_out(items: list[Scenario]) -> None:
    """The control: without a price on speech that nothing asked for, a hack wins."""
    settings = CONFIG.settings_of("lookout")
    generous = ScenarioConfig(
        CONFIG.families, {"lookout": replace(settings, reward=replace(settings.reward, spurious=0.5))}
    )
    rows = hacks.assess(items[:15], generous, RewardSource(generous, "rules", []))
    assert any("speaks always" in line for line in hacks.winners(rows))


@pytest.mark.parametrize(
    ("mistake", "low", "high"),
    [
        ("wrong_place", 0.0, 0.0),
        ("wrong_delay", 0.5, 0.8),
        ("omission", 0.0, 0.0),
        ("false_alarm", 0.4, 0.8),
        ("repetition", 0.45, 0.6),
    ],
)
def test_each_mistake_alone_costs_score(items: list[Scenario], mistake: str, low: float, high: float) -> None:
    """At rate 1 each mistake lowers the mean score into a range that its meaning gives."""
    settings = CONFIG.settings_of("lookout")
    mistakes = replace(settings.mistakes.scaled(0), **{mistake: 1.0})
    config = ScenarioConfig(CONFIG.families, {"lookout": replace(settings, mistakes=mistakes)})
    values = []
    for item in items:
        _, actions, facts = enact(item, config.expert(item, np.random.default_rng(item.seed)))
        values.append(score("lookout", facts.to_json(), actions, config).value)
    assert low <= fmean(values) <= high


def test_words_are_of_the_vocabulary() -> None:
    assert set(PLACES) <= set(load_tokenizer().get_vocab())
