"""One whole step in this process: the identity check passes on the real thing and stops a step off policy."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from reward.source import RewardSource
from rl.audit.diagnosis.diagnose import diagnose
from rl.config import RLConfig, TrainConfig
from rl.rollers import build_engine
from rl.run import build_model
from rl.step import loop
from rl.step.gradient import gradient_of
from rl.step.identity import Evidence, Mismatch, NotComparableError, NotEqualError, check_identity
from rollout.engines.embedded import SessionEngine
from rollout.engines.roller import InProcess
from rollout.play import play
from rollout.record.episode import Episode
from rollout.world.speech import SpeechBank
from tests.support.episodes import with_text

CONFIG = TrainConfig(rl=RLConfig(groups=2, rollouts=2, micro_batch=2))


@pytest.fixture
def engine() -> SessionEngine:
    model = build_model(CONFIG)
    return build_engine(CONFIG, model)


@pytest.fixture
def episodes(engine: SessionEngine, bank: SpeechBank) -> list[Episode]:
    return play(engine, loop.plays(CONFIG, bank, 0), CONFIG.seed)


def checked(engine: SessionEngine, episodes: list[Episode]) -> Mismatch:
    weights = [torch.ones(len(e.text.chunk)) for e in episodes]
    gradient = gradient_of(engine.model, episodes, weights, engine.vocabulary.classes, 1.0, 2)
    return check_identity(Evidence(7, episodes, gradient.logprob, gradient.digest, 2))


def diagnosis(engine: SessionEngine, error: NotEqualError) -> str:
    assert error.evidence is not None
    return diagnose(engine.model, error.evidence).sentence()


def test_every_sampled_token_is_equal(engine: SessionEngine, episodes: list[Episode]) -> None:
    found = checked(engine, episodes)
    assert found.num_tokens == sum(len(e.text.chunk) for e in episodes) >= 4 * 60
    assert (found.num_unequal, found.rows_unequal, found.max_abs) == (0, 0, 0.0)


def test_rollouts_of_a_group_differ_and_replay_exactly(
    engine: SessionEngine, bank: SpeechBank, episodes: list[Episode]
) -> None:
    again = play(engine, loop.plays(CONFIG, bank, 0)[1:2], CONFIG.seed)
    assert torch.equal(again[0].tokens, episodes[1].tokens)
    assert torch.equal(again[0].text.logprob, episodes[1].text.logprob)
    assert torch.equal(again[0].text.digest, episodes[1].text.digest)
    assert not torch.equal(episodes[0].tokens, episodes[1].tokens)


def test_changed_weights_stop_the_step(engine: SessionEngine, episodes: list[Episode]) -> None:
    weight = engine.model.model.language_model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    engine.model.repack()
    with pytest.raises(NotEqualError, match=r"step 7, episode \w+/train/\d#\d, token \d+ .*") as caught:
        checked(engine, episodes)
    assert "weights that changed" in diagnosis(engine, caught.value)


def test_batch_variant_op_is_caught_and_located(
    engine: SessionEngine, bank: SpeechBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An MLP whose last bit depends on the number of rows, as a library's matmul may: the sampler sees few rows, the
    learner many."""
    mlp = engine.model.model.language_model.layers[1].mlp
    honest = mlp.forward

    def variant(x: Tensor) -> Tensor:
        out = honest(x)
        return out * (1 + 2.0**-23) if x.shape[0] > 100 else out

    monkeypatch.setattr(mlp, "forward", variant)
    engine.model.repack()  # which looks the forwards up
    episodes = play(engine, loop.plays(CONFIG, bank, 0), CONFIG.seed)
    with pytest.raises(NotEqualError) as caught:
        checked(engine, episodes)
    assert "first activation that differs is layers.1.mlp at row 0" in diagnosis(engine, caught.value)


def test_one_wrong_row_digest_stops_the_step(engine: SessionEngine, episodes: list[Episode]) -> None:
    digest = episodes[2].text.digest.clone()
    digest[5] ^= 1
    forged = [*episodes[:2], with_text(episodes[2], digest=digest), episodes[3]]
    with pytest.raises(NotEqualError, match=f"episode {episodes[2].name}"):
        checked(engine, forged)


def test_loop_refuses_episodes_of_other_weights(
    engine: SessionEngine, bank: SpeechBank, monkeypatch: pytest.MonkeyPatch, episodes: list[Episode]
) -> None:
    stale = [replace(e, weights_digest="0" * 32) for e in episodes]
    monkeypatch.setattr(InProcess, "play", lambda *_: stale)
    learner, source = SimpleNamespace(model=engine.model), RewardSource(CONFIG.scenarios, "rules", [])
    with pytest.raises(NotComparableError, match="Publish the learner's weights"):
        next(loop.steps(CONFIG, bank, InProcess(engine), learner, source, None, 0, {}))
