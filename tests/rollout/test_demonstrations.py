"""Scripted play: the expert is faultless on every seed, its mistakes have their rates, and bad policies score low."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from reward.score import score
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.timespeak import REMINDER
from rollout.scenarios.verdict import TIMING, Outcome, Score
from rollout.turn.action import CHUNK_SAMPLES, LISTEN, Action, speak
from rollout.turn.observation import stack_audio
from rollout.world.base import Scenario
from rollout.world.speech import SpeechBank

CONFIG = ScenarioConfig()
SEEDS = 200


def demonstrated(item: Scenario, seed: int, mistake_scale: float = 1.0, config: ScenarioConfig = CONFIG) -> Score:
    _, actions, facts = enact(item, config.expert(item, np.random.default_rng(seed), mistake_scale))
    return score(item.family, facts.to_json(), actions, config)


def erring(family: str, **rates: float) -> ScenarioConfig:
    """Experts that make these mistakes of the family and no others."""
    settings = CONFIG.settings_of(family)
    return ScenarioConfig(settings={family: replace(settings, mistakes=replace(settings.mistakes.scaled(0), **rates))})


def played(item: Scenario, policy: Callable[[int], Action]) -> Score:
    user = item.user()
    actions: list[Action] = []
    for k in range(item.chunks):
        user.next_chunk(actions[-1] if actions else None)
        actions.append(policy(k))
    return score(item.family, user.facts().to_json(), actions, CONFIG)


@pytest.mark.parametrize("family", CONFIG.families)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_perfect_expert_scores_one_on_every_seed(bank: SpeechBank, family: str, split: str) -> None:
    for seed in range(SEEDS):
        item = CONFIG.scenario(family, split, seed, bank)
        got = demonstrated(item, seed, mistake_scale=0)
        assert (got.value, got.tight, got.spurious) == (1.0, 1.0, 0), item.id
        assert got.due >= 2, item.id
        # Every hit is at the best moment, so no reward is lost either.
        assert all(event.rewards.get(TIMING, 0.0) in (0.0, 1.0) for event in got.events), item.id


@pytest.mark.parametrize("family", CONFIG.families)
def test_demonstration_is_a_function_of_its_arguments(bank: SpeechBank, family: str) -> None:
    item = CONFIG.scenario(family, "train", 3, bank)
    first = enact(item, CONFIG.expert(item, np.random.default_rng(1)))
    again = enact(item, CONFIG.expert(item, np.random.default_rng(1)))
    heard, heard_again = (stack_audio(one[0]) for one in (first, again))
    assert heard.shape == (60, CHUNK_SAMPLES) and heard.dtype == torch.float32
    assert torch.equal(heard, heard_again) and first[1:] == again[1:]
    others = [enact(item, CONFIG.expert(item, np.random.default_rng(seed))) for seed in range(2, 6)]
    assert any(other[1] != first[1] for other in others)


@pytest.mark.parametrize(
    ("family", "field", "low", "high"),
    [
        ("timespeak", "wrong_number", 0.0, 0.6),
        ("timespeak", "jitter", 0.3, 0.97),
        ("timespeak", "omission", 0.0, 0.4),
        ("timespeak", "ignored_stop", 0.5, 0.9),
        ("turn_taking", "pause_reply", 0.3, 0.8),
        ("turn_taking", "wrong_delay", 0.0, 0.2),
        ("turn_taking", "ignored_interruption", 0.6, 0.95),
    ],
)
def test_each_mistake_alone_costs_score(bank: SpeechBank, family: str, field: str, low: float, high: float) -> None:
    """At rate 1 (a jitter of 30 %) each mistake lowers the mean score into a range that its meaning gives."""
    config = erring(family, **{field: 0.3 if field == "jitter" else 1.0})
    items = [CONFIG.scenario(family, "train", seed, bank) for seed in range(60)]
    mean = np.mean([demonstrated(item, item.seed, config=config).value for item in items])
    assert low <= mean <= high


def test_rates_are_kept(bank: SpeechBank) -> None:
    """Over 300 episodes: a rate of 0.12 is off by 0.07, or one of 0.6 by 0.15, with a probability below 1e-3."""
    wrong, ignored = [], []
    config = erring("timespeak", wrong_number=0.12, ignored_stop=0.6)
    for seed in range(300):
        item = CONFIG.scenario("timespeak", "train", seed, bank)
        events = demonstrated(item, seed, config=config).events
        echo = next(event for event in events if event.kind == "echo")
        wrong.append(echo.outcome is Outcome.WRONG)
        # An ignored stop shows only where a reminder would follow it, which the family sees to.
        ignored += [event.outcome is Outcome.MISSED for event in events if event.kind == "stop" and not wrong[-1]]
    assert abs(np.mean(wrong) - 0.12) < 0.07
    assert abs(np.mean(ignored) - 0.6) < 0.15


def test_default_corruption_leaves_much_to_learn(bank: SpeechBank) -> None:
    means = [
        np.mean([demonstrated(CONFIG.scenario(f, "train", seed, bank), seed).value for seed in range(100)])
        for f in CONFIG.families
    ]
    assert 0.3 < np.mean(means) < 0.7


BAD_POLICIES: dict[str, Callable[[int], Action]] = {
    "silent": lambda k: LISTEN,
    "always the reminder": lambda k: speak(REMINDER),
    "always a word of the reply": lambda k: speak("yes"),
    "every second chunk": lambda k: speak(REMINDER) if k % 2 else LISTEN,
    "every 10 chunks": lambda k: speak(REMINDER) if k % 10 == 9 else LISTEN,
    "a reply every 12 chunks": lambda k: (
        speak(("yes", "sure", "here", "is", "the", "answer")[k % 12]) if k % 12 < 6 else LISTEN
    ),
}


@pytest.mark.parametrize("family", CONFIG.families)
@pytest.mark.parametrize("policy", BAD_POLICIES)
def test_bad_policies_score_low(bank: SpeechBank, family: str, policy: str) -> None:
    scores = [played(CONFIG.scenario(family, "train", seed, bank), BAD_POLICIES[policy]) for seed in range(60)]
    assert np.mean([s.value for s in scores]) < 0.2
    assert np.mean([s.tight for s in scores]) < 0.2
    if policy == "silent":
        assert all(s.value == 0.0 for s in scores)
