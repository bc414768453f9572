"""The reference: exactly 0 away before the first update, by hand after it, and a cost that pulls back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.weights import checkpoint
from reward.source import Rewards
from rl import reference
from rl.config import RLConfig
from rl.reference import Reference
from rl.step.credit import token_weights
from rollout.engines.embedded import SessionEngine
from rollout.play import Play, play
from rollout.record.episode import Episode
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank
from tests.support.episodes import some_episode, with_text
from tests.support.models import fresh_model

GROUP = 2


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.build(256)


@pytest.fixture(scope="module")
def episodes(vocabulary: Vocabulary) -> list[Episode]:
    engine = SessionEngine(fresh_model(seed=0), vocabulary, slots=4, max_tokens=512)
    bank = SpeechBank.open()
    items = [ScenarioConfig().scenario(family, "train", 0, bank) for family in ScenarioConfig().families]
    return play(engine, [Play(item, r) for item in items for r in range(GROUP)], 0, 0.8)


def test_no_bit_of_distance_from_itself(episodes: list[Episode], vocabulary: Vocabulary, tmp_path: Path) -> None:
    checkpoint.save(fresh_model(seed=0), tmp_path / "start")
    start = Reference.load(tmp_path / "start", vocabulary.classes, micro_batch=3)
    ratio = start.log_ratio(episodes)
    assert [len(r) for r in ratio] == [len(e.text.chunk) for e in episodes]
    assert all(torch.equal(r, torch.zeros_like(r)) for r in ratio)
    assert reference.metrics(ratio) == {"reference/kl_k1": 0.0, "reference/kl_k3": 0.0}


def test_one_perturbed_weight_is_seen(episodes: list[Episode], vocabulary: Vocabulary) -> None:
    other = fresh_model(seed=0)
    weight = other.model.language_model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        weight[0, 0] += 0.1
    other.repack()
    ratio = Reference(other, vocabulary.classes, micro_batch=3).log_ratio(episodes)
    assert any(r.any() for r in ratio)
    alone = Reference(other, vocabulary.classes, micro_batch=1).log_ratio(episodes)
    assert all(torch.equal(a, b) for a, b in zip(ratio, alone, strict=True))
    assert reference.metrics(ratio)["reference/kl_k3"] > 0.0


def test_k1_and_k3_by_hand() -> None:
    result = reference.metrics([torch.tensor([1.0]), torch.tensor([-0.5])])
    assert result["reference/kl_k1"] == pytest.approx(0.25)
    assert result["reference/kl_k3"] == pytest.approx(((math.exp(-1.0) - 1 + 1.0) + (math.exp(0.5) - 1 - 0.5)) / 2)


def two_chunks() -> Episode:
    """Two chunks; in the first it speaks, so that three tokens were sampled."""
    one = some_episode()
    return with_text(replace(one, actions=one.actions * 2), chunk=torch.tensor([0, 0, 1]))


def test_cost_is_credited_to_go_and_keeps_its_unit() -> None:
    config = RLConfig(rollouts=2, gamma=0.5, reference_weight=0.1)
    pair = [two_chunks(), two_chunks()]
    none = [[Rewards({"timing": torch.zeros(2)})] * 2]
    ratio = [torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3)]
    weights = token_weights(pair, none, ratio, config, {}).weights
    # The first episode's chunks cost 0.3 and 0.4, to go 0.5 and 0.4; the other's nothing. Six tokens in all.
    assert torch.allclose(weights[0], torch.tensor([-0.5, -0.5, -0.4]) / 6)
    assert torch.allclose(weights[1], torch.tensor([0.5, 0.5, 0.4]) / 6)
    twice = token_weights(pair, none, [2 * r for r in ratio], config, {}).weights
    assert torch.allclose(twice[0], 2 * weights[0])  # not divided by its own size
    off = token_weights(pair, none, ratio, replace(config, reference_weight=0.0), {}).weights
    assert not any(w.any() for w in off)


def test_sources_act_in_equal_shares_whatever_their_unit() -> None:
    config = RLConfig(rollouts=2)
    pair = [two_chunks(), two_chunks()]
    rules = [Rewards({"timing": torch.tensor([1.0, 0.0])}), Rewards({"timing": torch.zeros(2)})]
    learned = [Rewards({"timing": 100 * r.axes["timing"]}) for r in rules]
    alone = token_weights(pair, [rules], [], config, {}).weights
    assert all(
        torch.allclose(a, b) for a, b in zip(alone, token_weights(pair, [learned], [], config, {}).weights, strict=True)
    )
    assert all(
        torch.allclose(a, b)
        for a, b in zip(alone, token_weights(pair, [rules, learned], [], config, {}).weights, strict=True)
    )
    against = [Rewards({"timing": -r.axes["timing"]}) for r in learned]
    assert all(not w.abs().max() > 1e-6 for w in token_weights(pair, [rules, against], [], config, {}).weights)
