"""A batch of pairs is one packed pass whose numbers are `RewardModel.score`'s, and no stale weight can enter it."""

from __future__ import annotations

import random

import pytest
import torch

from reward.learned.model import RewardModel, episode_scores
from reward.learned.preference import Preference, Stretch
from reward.learned.trainable import Collator, Trainable, _Taken, stretch_scores, turns
from tests.support.models import VOCABULARY, conversation, reward_model

AXES = ("timing", "content")
COLLATOR = Collator(AXES, VOCABULARY.audio, margin_scale=0.5)


def pairs(count: int = 6, talks: int = 4) -> list[Preference]:
    """Few conversations in many pairs."""
    pick = random.Random(0)
    made = [(conversation(seed, 5 + seed), 5 + seed) for seed in range(talks)]
    out = []
    for i in range(count):
        sides = []
        for talk, chunks in pick.sample(made, 2):
            first = pick.randrange(chunks)
            sides.append(Stretch(talk.tokens.clone(), talk.codes.clone(), first, pick.randrange(first, chunks) + 1))
        out.append(Preference(*sides, AXES[i % 2], "segments", 0, "timespeak", str(i), 0.1 * i))
    return out


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return reward_model(AXES)


def expected(model: RewardModel, stretch: Stretch, axis: str) -> torch.Tensor:
    rewards = model.score([stretch])[0][stretch.first : stretch.end]
    return episode_scores([rewards])[0, AXES.index(axis)]


def test_logits_are_the_models_scores(model: RewardModel) -> None:
    some = pairs()
    logits = Trainable(model)(**COLLATOR.batch(some)).logits
    assert logits.shape == (12, 1) and logits.requires_grad
    wanted = [expected(model, p.chosen, p.axis) for p in some] + [expected(model, p.rejected, p.axis) for p in some]
    assert torch.equal(logits[:, 0], torch.stack(wanted))
    assert not torch.equal(logits[:, 0], torch.stack(wanted[::-1]))


def test_a_shared_conversation_is_read_once() -> None:
    batch = COLLATOR.batch(pairs(count=20, talks=4))
    assert len(batch["conversations"]) == 4 and len(batch["owner"]) == 40
    assert batch["margin"].tolist() == pytest.approx([0.05 * i for i in range(20)])


def test_other_pairs_in_the_batch_change_nothing(model: RewardModel) -> None:
    some = pairs()
    whole = Trainable(model)(**COLLATOR.batch(some)).logits
    alone = torch.cat([Trainable(model)(**COLLATOR.batch([p])).logits[:1] for p in some])
    assert torch.equal(whole[:6], alone)


def test_a_stretch_is_summed_in_order() -> None:
    rewards = [torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) for n in (9, 4)]
    result = stretch_scores(
        rewards, [0, 0, 1], torch.tensor([0, 2, 3]), torch.tensor([9, 5, 4]), torch.tensor([0, 1, 1])
    )
    wanted = [rewards[0][:, 0], rewards[0][2:5, 1], rewards[1][3:4, 1]]
    assert torch.equal(result, torch.stack([episode_scores([w[:, None]])[0, 0] for w in wanted]))


def test_a_shared_conversations_gradient_is_added_in_order() -> None:
    owner = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = turns(owner)
    assert sorted(r for part in parts for r in part) == list(range(200))
    assert all(len({owner[r] for r in part}) == len(part) for part in parts)
    grads = []
    for order in (owner, owner, owner[::-1]):
        rows = torch.zeros(5, 7, 2, requires_grad=True)
        weight = torch.randn(200, 7, 2, generator=torch.Generator().manual_seed(1))
        taken = rows.index_select(0, torch.tensor(order)) if not grads else _Taken.apply(rows, order)
        (weight if order is owner else weight.flip(0)).mul(taken).sum().backward()
        grads.append(rows.grad)
    by_torch, by_us, backwards = grads
    assert torch.equal(by_us, by_torch)
    assert not torch.equal(backwards, by_torch)  # the control: the same numbers, added in another order


def test_stale_weights_cannot_enter(model: RewardModel) -> None:
    """However the weights were changed, even behind autograd's back, the next pass reads them."""
    fresh = reward_model(AXES, seed=3)
    trainable = Trainable(reward_model(AXES))
    batch = COLLATOR.batch(pairs())
    before = trainable(**batch).logits
    for name, parameter in trainable.reward.named_parameters():
        parameter.data.copy_(dict(fresh.named_parameters())[name].data)
    after = trainable(**batch).logits
    assert torch.equal(after, Trainable(fresh)(**batch).logits)
    assert not torch.equal(after, before)


def test_gradient_reaches_every_weight_that_scores(model: RewardModel) -> None:
    trainable = Trainable(reward_model(AXES))
    chosen, rejected = trainable(**COLLATOR.batch(pairs())).logits.chunk(2)
    (-torch.nn.functional.logsigmoid(chosen - rejected).mean()).backward()
    without = {n for n, p in trainable.named_parameters() if p.grad is None or not p.grad.any()}
    scoring = {name for name in without if ".vision_tower." not in name}  # these pairs show nothing
    assert scoring == {"reward.backbone.lm_head.weight"} and len(without) == 5
