"""A reward model's bits belong to the episode: not to its batch, its order or the threads; and it survives the disk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights import checkpoint, manifest
from reward.learned.model import RewardModel, episode_scores
from rollout.record.transcript import Transcript
from rollout.turn.grammar import chunk_ends
from tests.kernels.contract import uneven
from tests.support.models import VOCABULARY, conversation, reward_model


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return reward_model()


@pytest.fixture(scope="module")
def talks() -> list[Transcript]:
    return [conversation(seed, chunks) for seed, chunks in enumerate([7, 1, 12, 30, 12, 3, 20, 9, 5, 40, 2, 12] * 2)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def alone(model: RewardModel, talks: list[Transcript]) -> list[Tensor]:
    return [model.score([talk])[0] for talk in talks]


def test_a_chunk_ends_with_what_the_model_did() -> None:
    talk = conversation(3, 25)
    ends = chunk_ends(talk.tokens, VOCABULARY.audio)
    assert len(ends) == 25
    assert ends[-1] == len(talk.tokens) - 1
    assert all(int(talk.tokens[e]) in (VOCABULARY.listen, VOCABULARY.end) for e in ends)
    last_choice = [int(talk.text.sampled_at[talk.text.chunk == k][-1]) for k in range(25)]
    assert all(0 <= e - c <= 1 for e, c in zip(ends.tolist(), last_choice, strict=True))  # one more where end is forced


def test_one_reward_a_chunk_and_axis(model: RewardModel, talks: list[Transcript]) -> None:
    rewards = model.score(talks)
    assert [r.shape for r in rewards] == [(int(t.text.chunk[-1]) + 1, 2) for t in talks]
    assert all(r.dtype == torch.float32 and not r.requires_grad and torch.isfinite(r).all() for r in rewards)


def test_bits_do_not_depend_on_the_batch(model: RewardModel, talks: list[Transcript]) -> None:
    expected = alone(model, talks)
    order = random.Random(0).sample(range(len(talks)), len(talks))
    together = model.score([talks[i] for i in order])
    assert all(torch.equal(together[place], expected[i]) for place, i in enumerate(order))
    sums = episode_scores(model.score(talks))
    assert all(torch.equal(sums[i], episode_scores([expected[i]])[0]) for i in range(len(talks)))


def test_bits_do_not_depend_on_threads(model: RewardModel, talks: list[Transcript], threads: None) -> None:
    torch.set_num_threads(1)
    one = model.score(talks)
    torch.set_num_threads(4)
    assert all(torch.equal(a, b) for a, b in zip(one, model.score(talks), strict=True))


def test_a_product_by_row_count_depends_on_the_batch(
    model: RewardModel, talks: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with a linear whose bits follow the number of rows an episode's rewards follow its batch."""
    monkeypatch.setattr(dispatch.backend(), "linear", uneven(dispatch.backend().linear, few=200))
    together, separate = model.score(talks), alone(model, talks)
    short = [i for i, talk in enumerate(talks) if len(talk.tokens) < 200]
    assert short and not any(torch.equal(together[i], separate[i]) for i in short)


@pytest.mark.parametrize("name", ["heads.weight", "backbone.model.language_model.layers.0.self_attn.v_proj.weight"])
def test_one_ulp_in_one_weight_is_seen(model: RewardModel, talks: list[Transcript], name: str) -> None:
    before = model.score(talks)
    weight = dict(model.named_parameters())[name]
    with torch.no_grad():
        saved = weight.clone()
        largest = weight.view(-1)[weight.abs().argmax()]  # a view
        largest.copy_(torch.nextafter(largest, torch.tensor(torch.inf)))
        model.repack()
        after = model.score(talks)
        weight.copy_(saved)
        model.repack()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.score(talks), strict=True))


def test_a_reward_knows_nothing_of_later_chunks(model: RewardModel, talks: list[Transcript]) -> None:
    talk = talks[3]
    end = int(chunk_ends(talk.tokens, VOCABULARY.audio)[11]) + 1
    heard = int((talk.tokens[:end] == VOCABULARY.audio).sum())
    start = Transcript(talk.tokens[:end], talk.codes[:heard], talk.text)
    assert torch.equal(model.score([start])[0], model.score([talk])[0][:12])


def test_an_episodes_score_is_the_sum_in_order() -> None:
    rewards = [torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) for n in (60, 3, 17)]
    sums = episode_scores(rewards)
    for i, reward in enumerate(rewards):
        total = reward[0]
        for row in reward[1:]:
            total = total + row
        assert torch.equal(sums[i], total)


def test_a_built_model_rewards_nothing(talks: list[Transcript]) -> None:
    backbone = InteractionModel(preset("tiny"))
    backbone.init_weights(0)
    assert not RewardModel.build(backbone, ("timing",)).score(talks[:1])[0].any()


@pytest.mark.parametrize("axes", [("timing",), ("content",), ("timing", "content")])
def test_disk_keeps_every_bit(tmp_path: Path, talks: list[Transcript], axes: tuple[str, ...]) -> None:
    model = reward_model(axes, seed=5)
    model.temperature = {axis: 1.5 + i for i, axis in enumerate(axes)}
    model.save(tmp_path / "saved")
    loaded = RewardModel.load(tmp_path / "saved")
    assert (loaded.axes, loaded.temperature) == (axes, model.temperature)
    assert checkpoint.weights_digest(loaded) == checkpoint.weights_digest(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.score(talks), model.score(talks), strict=True))
    backbone = checkpoint.load(tmp_path / "saved" / "backbone")  # an ordinary checkpoint
    assert checkpoint.weights_digest(backbone) == checkpoint.weights_digest(model.backbone)


@pytest.mark.parametrize("axes", [(), ("timing", "timing")])
def test_unknown_axes_are_refused(axes: tuple[str, ...]) -> None:
    with pytest.raises(MetronomeError, match="needs at least one axis, and each once"):
        RewardModel(InteractionModel(preset("tiny")), axes)


@pytest.mark.parametrize("file", ["reward.json", "head.safetensors", "backbone/model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_folder_is_named(tmp_path: Path, model: RewardModel, file: str, damage: str) -> None:
    model.save(tmp_path / "saved")
    path = tmp_path / "saved" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(MetronomeError, match="saved"):
        RewardModel.load(tmp_path / "saved")


def test_a_head_of_another_shape_is_refused(tmp_path: Path, model: RewardModel) -> None:
    model.save(tmp_path / "saved")
    description = tmp_path / "saved" / "reward.json"
    description.write_text(description.read_text().replace('"timing",', "", 1))
    manifest.write(tmp_path / "saved", "saved")
    with pytest.raises(MetronomeError, match="cannot be read as a reward model"):
        RewardModel.load(tmp_path / "saved")
