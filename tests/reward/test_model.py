"""A reward model's bits belong to the episode: not to its batch, its order or the threads; and it survives the disk."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights import checkpoint, manifest
from model.weights.finite import NotFiniteError
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


def head(model: RewardModel) -> torch.Tensor:
    return model.heads.weight.detach().clone()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda w: w, ""),  # the control
        (lambda w: w[:1], r"heads\.weight \[1, 128\] float32, but .* need heads\.weight \[2, 128\] float32 alone"),
        (lambda w: torch.tensor(1.0), r"heads\.weight \[\] float32, but"),
        (lambda w: w.T.contiguous(), r"\[128, 2\] float32, but"),
        (lambda w: w.double(), r"\[2, 128\] float64, but"),
        (lambda w: w.to(torch.int64), r"\[2, 128\] int64, but"),
        (lambda w: w * math.nan, "256 of 256 values of heads.weight are not finite"),
        (lambda w: w.index_fill(0, torch.tensor([1]), math.inf), "128 of 256 values of heads.weight are not finite"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    tmp_path: Path, model: RewardModel, spoil: Callable[[Tensor], Tensor], says: str
) -> None:
    model.save(tmp_path / "saved")
    save_file({"heads.weight": spoil(head(model))}, tmp_path / "saved" / "head.safetensors")
    manifest.write(tmp_path / "saved", "saved")
    if not says:
        assert torch.equal(RewardModel.load(tmp_path / "saved").heads.weight, model.heads.weight)
        return
    with pytest.raises(MetronomeError, match=says):
        RewardModel.load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["other", "heads.weight.1"])
def test_a_head_file_with_more_or_another_tensor_is_refused(tmp_path: Path, model: RewardModel, name: str) -> None:
    model.save(tmp_path / "saved")
    save_file({"heads.weight": head(model), name: torch.ones(2)}, tmp_path / "saved" / "head.safetensors")
    manifest.write(tmp_path / "saved", "saved")
    with pytest.raises(MetronomeError, match=f"{name} .*, but"):
        RewardModel.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"axes": ["timing", "content"], "temperature": {"timing": 1, "content": 2}}', ""),  # the control, as ever
        ('{"axes": ["timing", "timing"], "temperature": {"timing": 1}}', "at least one axis, and each once"),
        ('{"axes": [], "temperature": {}}', "at least one axis"),
        ('{"axes": ["timing", "a/b"], "temperature": {"timing": 1, "a/b": 1}}', "'a/b' cannot be the name of an axis"),
        ('{"axes": "timing", "temperature": {"timing": 1}}', "axes"),
        ('{"axes": ["timing", 7], "temperature": {"timing": 1}}', "axes"),
        ('{"axes": ["timing", "content"], "temperature": {"timing": 1}}', "has temperatures of timing, but axes"),
        (
            '{"axes": ["timing", "content"], "temperature": {"timing": 0, "content": 1}}',
            r"timing is 0\.0: give",
        ),
        (
            '{"axes": ["timing", "content"], "temperature": {"timing": 1, "content": -2}}',
            r"content is -2\.0: give",
        ),
        ('{"axes": ["timing", "content"], "temperature": {"timing": "1", "content": 1}}', "temperature"),
        ('{"axes": ["timing", "content"], "temperature": {"timing": NaN, "content": 1}}', "NaN is no number"),
        ('{"axes": ["timing", "content"], "temperature": {"timing": 1e999, "content": 1}}', "is too large"),
        ('{"axes": ["timing"], "temperature": {"timing": 1}}', r"need heads\.weight \[1, 128\]"),
        ("[]", "reward.json"),
        ("null", "reward.json"),
        ("", "reward.json"),
    ],
)
def test_a_description_is_checked(tmp_path: Path, model: RewardModel, text: str, says: str) -> None:
    model.save(tmp_path / "saved")
    (tmp_path / "saved" / "reward.json").write_text(text)
    manifest.write(tmp_path / "saved", "saved")
    if not says:
        assert RewardModel.load(tmp_path / "saved").temperature == {"timing": 1.0, "content": 2.0}
        return
    with pytest.raises(MetronomeError, match=says) as caught:
        RewardModel.load(tmp_path / "saved")
    assert "saved" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_scored_with(
    tmp_path: Path, talks: list[Transcript], value: float
) -> None:
    spoiled = reward_model(seed=7)
    spoiled.save(tmp_path / "saved")
    before = (tmp_path / "saved" / "manifest.json").read_bytes()
    with torch.no_grad():
        spoiled.heads.weight[1, 5] = value
    spoiled.repack()
    with pytest.raises(NotFiniteError, match=r"reward model of timing and content: 1 of 256 values of heads\.weight"):
        spoiled.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "manifest.json").read_bytes() == before, "the older model is as it was"
    with pytest.raises(NotFiniteError, match="gives rewards that are not finite"):
        spoiled.score(talks[:1])


def test_weights_too_large_to_score_with_are_named_by_folder(tmp_path: Path, talks: list[Transcript]) -> None:
    large = reward_model(seed=7)
    with torch.no_grad():
        large.heads.weight.fill_(3e38)  # finite
    large.save(tmp_path / "large")
    with pytest.raises(NotFiniteError, match=f"reward model {tmp_path / 'large'}: it gives rewards"):
        RewardModel.load(tmp_path / "large").score(talks[:1])


def test_disk_keeps_what_a_model_was_made_from(tmp_path: Path) -> None:
    made = reward_model()
    made.origin = {"pairs": "a" * 32}
    made.save(tmp_path / "saved")
    assert RewardModel.load(tmp_path / "saved").origin == {"pairs": "a" * 32}
