"""Where rewards come from: who acts, who watches, and models that do not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.errors import MetronomeError
from reward.learned.model import RewardModel
from reward.score import score
from reward.source import RewardSource, SourceConfig
from rollout.engines.embedded import SessionEngine
from rollout.play import Play, play
from rollout.record.episode import Episode
from rollout.scenarios.registry import ScenarioConfig
from rollout.world.speech import SpeechBank
from tests.support.models import VOCABULARY, fresh_model, reward_model

CONFIG = ScenarioConfig()


@pytest.fixture(scope="module")
def timing() -> RewardModel:
    return reward_model(("timing",), seed=1)


@pytest.fixture(scope="module")
def content() -> RewardModel:
    return reward_model(("content",), seed=2)


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    engine = SessionEngine(fresh_model(), VOCABULARY, slots=4, max_tokens=512)
    bank = SpeechBank.open()
    return play(engine, [Play(item, r) for item in CONFIG.of_each(1, "train", bank) for r in (0, 1)], 0)


def test_rules_judge_whoever_acts(timing: RewardModel, content: RewardModel, episodes: list[Episode]) -> None:
    expected = [score(e.family, e.facts, e.actions, CONFIG) for e in episodes]
    for rewards, sources in (("rules", ["rules"]), ("learned", ["proxy"]), ("both", ["rules", "proxy"])):
        judged = RewardSource(CONFIG, rewards, [timing, content]).judge(episodes)
        assert [s.value for s in judged.scores] == [s.value for s in expected]
        for one, wanted in zip(judged.rules, expected, strict=True):
            assert list(one.axes) == list(wanted.rewards) == ["timing", "content"]
            assert all(torch.equal(one.axes[axis], torch.as_tensor(wanted.rewards[axis])) for axis in one.axes)
        assert len(judged.acting) == len(sources)
        for acting, name in zip(judged.acting, sources, strict=True):
            assert acting is getattr(judged, name)
    alone = RewardSource(CONFIG, "rules", []).judge(episodes)
    assert alone.proxy == [] and alone.acting == [alone.rules]


def test_learned_rewards_are_the_models_own_in_any_batch(
    timing: RewardModel, content: RewardModel, episodes: list[Episode]
) -> None:
    source = RewardSource(CONFIG, "learned", [content, timing])  # order does not matter: axes are found by name
    together = source.judge(episodes).proxy
    for i, one in enumerate(together):
        assert torch.equal(one.axes["timing"], timing.score([episodes[i]])[0][:, 0])
        assert torch.equal(one.axes["content"], content.score([episodes[i]])[0][:, 0])
        (again,) = source.judge([episodes[i]]).proxy
        assert torch.equal(again.axes["timing"], one.axes["timing"]) and again.total == one.total
        assert one.total == pytest.approx(float(one.axes["timing"].sum() + one.axes["content"].sum()), rel=1e-6)
    assert not torch.equal(together[0].axes["timing"], together[1].axes["timing"])  # the control
    shared = RewardSource(CONFIG, "learned", [reward_model(("content", "timing"), seed=3)]).judge(episodes).proxy
    assert not torch.equal(shared[0].axes["timing"], shared[0].axes["content"])


def test_no_episodes_are_judged_as_none(timing: RewardModel, content: RewardModel) -> None:
    assert RewardSource(CONFIG, "learned", [timing, content]).judge([]).proxy == []


@pytest.mark.parametrize(
    ("rewards", "axes", "says"),
    [
        ("learned", [], "score nothing, but"),
        ("learned", [("timing",)], "score timing, but"),
        ("both", [("timing",), ("timing", "content")], "score timing, timing, content"),
        ("rules", [("content",)], "score content, but"),
    ],
)
def test_models_that_do_not_fit_together(rewards: str, axes: list[tuple[str, ...]], says: str) -> None:
    with pytest.raises(MetronomeError, match=says):
        RewardSource(CONFIG, rewards, [reward_model(one) for one in axes])


def test_load_names_what_is_missing(tmp_path: Path, timing: RewardModel, content: RewardModel) -> None:
    with pytest.raises(MetronomeError, match="names no reward model"):
        RewardSource.load(CONFIG, SourceConfig("learned"))
    with pytest.raises(MetronomeError, match="there is no folder nowhere"):
        RewardSource.load(CONFIG, SourceConfig("learned", ("nowhere",)))
    with pytest.raises(MetronomeError, match="cannot be read as a reward model"):
        RewardSource.load(CONFIG, SourceConfig("learned", (str(tmp_path),)))
    timing.save(tmp_path / "t")
    content.save(tmp_path / "c")
    loaded = RewardSource.load(CONFIG, SourceConfig("both", (str(tmp_path / "t"), str(tmp_path / "c"))))
    assert loaded.digests == RewardSource(CONFIG, "both", [timing, content]).digests
    assert loaded.digests != RewardSource(CONFIG, "both", [content, timing]).digests
