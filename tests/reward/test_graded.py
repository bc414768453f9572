"""The loss of graded labels, through TRL's own: smallest where a difference is the rater's, and TRL's where nothing is
in doubt."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl import RewardConfig

from kernels.adamw import AdamW
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.tokenizer import load_tokenizer
from model.weights import checkpoint
from model.weights.finite import NotFiniteError
from reward.learned.graded import GradedTrainer, log_sigmoid
from reward.learned.model import RewardModel
from reward.learned.preference import table
from reward.learned.settings import optimizer
from reward.learned.trainable import Collator, Trainable, doubt
from reward.train import BackboneRecipe, RewardTrainConfig, _backbone
from tests.kernels.contract import normal, threads
from tests.reward.test_trainable import AXES, pairs
from tests.support.models import VOCABULARY, reward_model

MARGINS = torch.tensor([0.0, 0.1, 1.0, 6.0])


def test_doubt_is_the_raters() -> None:
    found = doubt(MARGINS, 2.0)
    assert found.tolist() == pytest.approx([0.0, 0.450166, 0.119203, 6.144e-6], rel=1e-4)
    assert doubt(MARGINS, None).tolist() == [0.0] * 4


def test_the_collator_grades_or_subtracts() -> None:
    some = pairs()
    graded = Collator(AXES, VOCABULARY.audio, rationality=2.0).batch(some)
    certain = Collator(AXES, VOCABULARY.audio).batch(some)
    assert not graded["margin"].any() and certain["margin"].any()
    assert graded["doubt"][1:].all() and not certain["doubt"].any()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> GradedTrainer:
    folder: Path = tmp_path_factory.mktemp("graded")
    arguments = RewardConfig(
        output_dir=str(folder), report_to="none", remove_unused_columns=False, max_length=None, bf16=False,
        gradient_checkpointing=False, use_cpu=True,
    )  # fmt: skip
    model: RewardModel = reward_model(AXES)
    rows: Dataset = table(pairs())
    return GradedTrainer(
        model=Trainable(model),
        args=arguments,
        data_collator=Collator(model.axes, VOCABULARY.audio),
        train_dataset=rows,
        processing_class=load_tokenizer(),
    )


def loss_of(
    trainer: GradedTrainer, difference: torch.Tensor, margin: torch.Tensor, doubts: torch.Tensor
) -> torch.Tensor:
    """The trainer's loss for a model that scores chosen ones ``difference`` above rejected ones."""

    def model(**inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.cat((difference, torch.zeros_like(difference)))[:, None])

    inputs = {"margin": margin, "doubt": doubts, "attention_mask": torch.ones(3)}
    return trainer.compute_loss(model, inputs)


def test_the_loss_is_the_cross_entropy_of_the_raters_label(trainer: GradedTrainer) -> None:
    d, p = torch.tensor([-1.0, 0.3, 2.0, 5.0]), 1 - doubt(MARGINS, 2.0)
    wanted = -(p * logsigmoid(d) + (1 - p) * logsigmoid(-d)).mean()
    assert loss_of(trainer, d, torch.zeros(4), 1 - p) == pytest.approx(float(wanted), rel=1e-6)


def test_without_doubt_it_is_trls(trainer: GradedTrainer) -> None:
    """Up to rounding: TRL takes the logarithm from torch."""
    d = torch.tensor([-1.0, 0.3, 2.0, 5.0])
    found, wanted = loss_of(trainer, d, MARGINS, torch.zeros(4)), -logsigmoid(d - MARGINS).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_log_sigmoid_and_its_gradient() -> None:
    x = torch.linspace(-30, 30, 1001, requires_grad=True)
    (slope,) = torch.autograd.grad(log_sigmoid(x).sum(), x)
    exact = x.detach().double()
    torch.testing.assert_close(log_sigmoid(x).double(), logsigmoid(exact), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slope.double(), torch.sigmoid(-exact), rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_to_a_norm_that_threads_do_not_move(trainer: GradedTrainer) -> None:
    model = torch.nn.Linear(300, 301)
    found = []
    for count in (1, 2, 3):
        for p in model.parameters():
            p.grad = normal(1, *p.shape)
        with threads(count):
            norm = trainer._clip_grad_norm(model)
        found.append((norm, model.weight.grad))
    assert norm == pytest.approx(math.sqrt(301 * 301), rel=0.02) and trainer.args.max_grad_norm == 1.0
    assert all(n == norm and torch.equal(g, found[0][1]) for n, g in found)
    assert float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_gradient_that_is_not_finite_is_an_error(trainer: GradedTrainer, value: float, clipped: bool) -> None:
    model = torch.nn.Linear(3, 4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.bias.grad[2] = value
    norm = trainer._clip_grad_norm(model) if clipped else None
    if math.isfinite(value):  # the control
        assert float(trainer._get_grad_norm(model, norm)) == pytest.approx(4.0)
        return
    with pytest.raises(NotFiniteError, match="diverged at step 1: the gradient is not finite"):
        trainer._get_grad_norm(model, norm)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_an_error(trainer: GradedTrainer, value: float) -> None:
    good = torch.tensor([1.0, 2.0])
    assert math.isfinite(loss_of(trainer, good, torch.zeros(2), torch.zeros(2)))
    with pytest.raises(NotFiniteError, match="diverged at step 1: the scores are not finite"):
        loss_of(trainer, torch.tensor([1.0, value]), torch.zeros(2), torch.zeros(2))


def test_a_policy_in_bf16_is_trained_in_fp32(tmp_path: Path) -> None:
    policy = InteractionModel(preset("nano"), torch.bfloat16)
    policy.init_weights(0)
    checkpoint.save(policy, tmp_path / "policy")
    made = _backbone(RewardTrainConfig(backbone=BackboneRecipe(checkpoint=str(tmp_path / "policy"))))
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert torch.equal(made.lm_head.weight, policy.lm_head.weight.float())


def test_adamw_of_the_recipe_is_ours(tmp_path: Path) -> None:
    for optim, ours in (("adamw_torch_fused", True), ("adamw_torch", True), ("sgd", False)):
        arguments = RewardConfig(output_dir=str(tmp_path), report_to="none", optim=optim, use_cpu=True, bf16=False)
        chosen = optimizer(arguments)
        assert (chosen is not None and chosen[0] is AdamW) == ours


@pytest.mark.parametrize("rationality", [2.0, None])
def test_graded_labels_give_rewards_their_unit(trainer: GradedTrainer, rationality: float | None) -> None:
    """At d = rationality * margin nothing is left to learn; certain labels, the control, go on pushing apart."""
    margin = torch.tensor([0.1, 0.5, 2.0])
    d = (2.0 * margin).requires_grad_()
    loss_of(trainer, d, torch.zeros(3), doubt(margin, rationality)).backward()
    assert bool((d.grad.abs() < 1e-6).all()) == (rationality is not None)
