"""The learner: gradients by autograd's book, a DeepSpeed step that is AdamW's, state that comes back exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.errors import MetronomeError
from model.audio import DMel
from model.checkpoint import weights_digest
from model.config import preset
from model.transformer import InteractionModel
from rl.batch import collate, score_choices
from rl.config import OptimConfig, TrainConfig, WarmstartConfig
from rl.learner import Learner, learning_rate, policy_gradient
from rl.warmstart import demonstrations
from rollout.speech import SpeechBank
from rollout.transcript import Transcript
from rollout.vocabulary import Vocabulary

OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, final_lr=1.0, clip_norm=0.5)
CONFIG = TrainConfig(warmstart=WarmstartConfig(episodes=4))

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def model() -> InteractionModel:
    model = InteractionModel(preset("tiny"))
    model.init_weights(3)
    model.pack()
    return model


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.build(256)


@pytest.fixture(scope="module")
def transcripts(vocabulary: Vocabulary) -> list[Transcript]:
    return demonstrations(CONFIG, SpeechBank.load(), DMel.build(), vocabulary, 0)


def weights(transcripts: list[Transcript]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(t.chunk), generator=generator) / 100 for t in transcripts]


def test_demonstrations_are_a_pure_function_of_the_step(transcripts: list[Transcript], vocabulary: Vocabulary) -> None:
    bank, dmel = SpeechBank.load(), DMel.build()
    again = demonstrations(CONFIG, bank, dmel, vocabulary, 0)
    assert all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.codes, b.codes)
        for a, b in zip(again, transcripts, strict=True)
    )
    other = demonstrations(CONFIG, bank, dmel, vocabulary, 1)
    assert not torch.equal(other[0].codes, transcripts[0].codes)


def test_gradient_is_that_of_the_weighted_logprobs(
    model: InteractionModel, transcripts: list[Transcript], vocabulary: Vocabulary
) -> None:
    some = transcripts[:2]
    gradient = policy_gradient(model, some, weights(some), vocabulary.classes, 1.0, 2)
    logprob, _, _ = score_choices(model, collate(some), vocabulary.classes, 1.0)
    loss = -(torch.cat(weights(some)) * logprob).sum()
    for got, wanted in zip(gradient.parameters, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.equal(got, wanted)
    halves = policy_gradient(model, some, weights(some), vocabulary.classes, 1.0, 1)
    assert torch.equal(halves.logprob, gradient.logprob) and torch.equal(halves.digest, gradient.digest)
    assert halves.owner.tolist() == gradient.owner.tolist() == [0] * len(some[0].chunk) + [1] * len(some[1].chunk)
    for a, b in zip(halves.parameters, gradient.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # another order of summation


def test_a_step_is_adamw_on_the_clipped_gradient(
    model: InteractionModel, transcripts: list[Transcript], vocabulary: Vocabulary
) -> None:
    twin = InteractionModel(preset("tiny"))
    twin.init_weights(3)
    parameters = list(twin.parameters())
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
    )
    learner = Learner(model, OPTIM, 3)
    for _ in range(3):
        gradient = policy_gradient(model, transcripts, weights(transcripts), vocabulary.classes, 1.0, 4)
        norm = learner.step(gradient)
        flat = torch.cat([g.flatten() for g in gradient.parameters])
        assert norm == float(torch.linalg.vector_norm(flat, dtype=torch.float64)) > OPTIM.clip_norm
        for p, g in zip(parameters, gradient.parameters, strict=True):
            p.grad = g * (OPTIM.clip_norm / norm)
        plain.step()
    assert weights_digest(model) == weights_digest(twin)


def test_saved_learner_goes_on_where_it_stood(
    model: InteractionModel, transcripts: list[Transcript], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    def step(of: InteractionModel, learner: Learner) -> None:
        learner.step(policy_gradient(of, transcripts, weights(transcripts), vocabulary.classes, 1.0, 4))

    learner = Learner(model, OPTIM, 4)
    step(model, learner)
    learner.save(tmp_path)
    step(model, learner)
    other = InteractionModel(preset("tiny"))
    other.init_weights(9)
    other.pack()
    resumed = Learner(other, OPTIM, 4)
    resumed.load(tmp_path)
    assert resumed.taken == 1
    step(other, resumed)
    assert weights_digest(other) == weights_digest(model)
    with pytest.raises(MetronomeError, match="holds no learner state"):
        resumed.load(tmp_path / "nowhere")


def test_learning_rate_warms_up_and_decays() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=2, final_lr=0.5)
    rates = [learning_rate(optim, step, 5) for step in range(5)]
    assert rates == pytest.approx([0.5, 0.875, 0.75, 0.625, 0.5])
