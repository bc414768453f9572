"""The learner: gradients by autograd's book, a DeepSpeed step that is AdamW's, state that comes back exactly."""

from __future__ import annotations

import gc
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from kernels import ops
from kernels.adamw import AdamW
from kernels.errors import MetronomeError, StaleWeightsError
from model.backbone.size import empty, training_bytes
from model.backbone.transformer import InteractionModel
from model.config import preset, senses
from model.weights import checkpoint, packs
from model.weights.checkpoint import weights_digest
from rl.config import OptimConfig, TrainConfig, WarmstartConfig
from rl.learner.deepspeed import Learner, learning_rate
from rl.step.batch import choice_logprobs, collate
from rl.step.gradient import Gradient, gradient_of
from rl.warmstart import demonstrations
from rollout.record.transcript import Transcript
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank
from tests.support.models import fresh_model

OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, final_lr=1.0, clip_norm=0.5)
SENSES = senses(preset("tiny"))
CONFIG = TrainConfig(warmstart=WarmstartConfig(episodes=4))

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def model() -> InteractionModel:
    return fresh_model(seed=3)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.build(256)


@pytest.fixture(scope="module")
def transcripts(vocabulary: Vocabulary) -> list[Transcript]:
    return demonstrations(CONFIG, SpeechBank.open(), vocabulary, SENSES, 0)


def weights(transcripts: list[Transcript]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(t.text.chunk), generator=generator) / 100 for t in transcripts]


def test_a_model_without_its_weights_is_refused(model: InteractionModel, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path / "a")
    with pytest.raises(MetronomeError, match=r"^training: this model was loaded for inference only"):
        Learner(checkpoint.load(tmp_path / "a", keep_weights=False), OPTIM, 1)
    Learner(checkpoint.load(tmp_path / "a"), OPTIM, 1)  # the control


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (0, torch.float32),
        (1, torch.bfloat16),
        pytest.param(1, torch.float32, marks=pytest.mark.slow),
        pytest.param(2, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_what_a_step_holds_is_what_was_foreseen(stage: Literal[0, 1, 2], dtype: torch.dtype) -> None:
    def held() -> int:
        gc.collect()
        alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not x.is_meta]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())

    start, at_step = held(), []
    model = fresh_model(dtype=dtype)
    packed = sum(buffer.nbytes for _, pack in packs.packs(model) for buffer in pack.data.values())
    learner = Learner(model, replace(OPTIM, zero_stage=stage), 3)
    gradient = Gradient(tuple(torch.full(p.shape, 1e-3) for p in model.parameters()), *[torch.zeros(1)] * 3)
    learner.step(gradient)  # the first makes the moments
    honest = learner.engine.step
    learner.engine.step = lambda: (at_step.append(held() - start), honest())
    learner.step(gradient)
    foreseen = training_bytes(empty(model.config, dtype), stage)
    moments = [x for state in learner._adamw.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    copy = foreseen.gradient // 3 if stage else 0  # DeepSpeed's own, of the values that it updates
    assert sum(x.nbytes for x in moments) + copy == foreseen.optimizer
    more = at_step[0] - (packed - foreseen.packs) - foreseen.total  # beside the padding of packs
    assert 0 <= more < 0.005 * foreseen.total, (at_step, foreseen)


def test_demonstrations_are_a_pure_function_of_the_step(transcripts: list[Transcript], vocabulary: Vocabulary) -> None:
    bank = SpeechBank.open()
    again = demonstrations(CONFIG, bank, vocabulary, SENSES, 0)
    assert all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.codes, b.codes)
        for a, b in zip(again, transcripts, strict=True)
    )
    other = demonstrations(CONFIG, bank, vocabulary, SENSES, 1)
    assert not torch.equal(other[0].codes, transcripts[0].codes)


def test_gradient_is_that_of_the_weighted_logprobs(
    model: InteractionModel, transcripts: list[Transcript], vocabulary: Vocabulary
) -> None:
    some = transcripts[:2]
    gradient = gradient_of(model, some, weights(some), vocabulary.classes, 1.0, 2)
    logprob, _, _ = choice_logprobs(model, collate(some, model.senses), vocabulary.classes, 1.0)
    loss = -(torch.cat(weights(some)) * logprob).sum()
    for got, wanted in zip(
        gradient.parameters, torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True), strict=True
    ):
        assert torch.equal(got, wanted)
    halves = gradient_of(model, some, weights(some), vocabulary.classes, 1.0, 1)
    assert torch.equal(halves.logprob, gradient.logprob) and torch.equal(halves.digest, gradient.digest)
    for a, b in zip(halves.parameters, gradient.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # another order of summation


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_adamw_on_the_clipped_gradient(
    transcripts: list[Transcript], vocabulary: Vocabulary, stage: Literal[0, 1, 2], dtype: torch.dtype
) -> None:
    """The optimizer alone, on each parameter's fp32 master, gives the weights that DeepSpeed's flat partitions do."""
    model = fresh_model("tiny", 3, dtype)
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    plain = AdamW(
        [
            {"params": [p for p in masters if p.ndim >= 2], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in masters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=OPTIM.lr,
        beta1=OPTIM.beta1,
        beta2=OPTIM.beta2,
    )
    learner = Learner(model, replace(OPTIM, zero_stage=stage), 3)
    for _ in range(3):
        gradient = gradient_of(model, transcripts, weights(transcripts), vocabulary.classes, 1.0, 4)
        norm = learner.step(gradient)
        flat = torch.cat([g.flatten() for g in gradient.parameters])
        assert norm == math.sqrt(float(ops.dot(flat, flat))) > OPTIM.clip_norm
        for p, g in zip(masters, gradient.parameters, strict=True):
            p.grad = g * (OPTIM.clip_norm / norm)
        plain.step()
    for p, master in zip(model.parameters(), masters, strict=True):
        assert torch.equal(p, master.to(p.dtype))
    assert not all(
        torch.equal(p, master) for p, master in zip(fresh_model("tiny", 3, dtype).parameters(), masters, strict=True)
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradient_that_is_not_finite_is_an_error_and_no_step(model: InteractionModel, value: float) -> None:
    learner = Learner(model, OPTIM, 3)
    before = weights_digest(model)
    gradient = [torch.zeros_like(p) for p in model.parameters()]
    gradient[5].view(-1)[7] = value
    name = [name for name, _ in model.named_parameters()][5]
    with pytest.raises(MetronomeError, match=rf"gradient of step 0 is not finite \(that of {re.escape(name)}\)"):
        learner.step(Gradient(tuple(gradient), *[torch.zeros(1)] * 3))
    assert weights_digest(model) == before and learner.taken == 0


def test_stale_copies_are_refused_at_once(
    model: InteractionModel, transcripts: list[Transcript], vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs that nobody refreshes would make sampler and learner wrong alike."""
    learner = Learner(model, OPTIM, 3)
    gradient = gradient_of(model, transcripts, weights(transcripts), vocabulary.classes, 1.0, 4)
    monkeypatch.setattr("kernels.ops.repack", lambda packed: None)
    learner.step(gradient)
    with pytest.raises(StaleWeightsError, match="changed after they were packed"):
        gradient_of(model, transcripts, weights(transcripts), vocabulary.classes, 1.0, 4)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_learner_goes_on_where_it_stood(
    transcripts: list[Transcript],
    vocabulary: Vocabulary,
    tmp_path: Path,
    stage: Literal[0, 1, 2],
    dtype: torch.dtype,
) -> None:
    def step(of: InteractionModel, learner: Learner) -> None:
        learner.step(gradient_of(of, transcripts, weights(transcripts), vocabulary.classes, 1.0, 4))

    model, optim = fresh_model("tiny", 3, dtype), replace(OPTIM, zero_stage=stage)
    learner = Learner(model, optim, 4)
    step(model, learner)
    learner.save(tmp_path)
    checkpoint.save(model, tmp_path / "model")
    step(model, learner)
    other = fresh_model("tiny", 9, dtype)
    resumed = Learner(other, optim, 4)
    with pytest.raises(MetronomeError, match="belongs to weights"):
        resumed.load(tmp_path)
    checkpoint.load_into(other, tmp_path / "model")
    resumed = Learner(other, optim, 4)
    resumed.load(tmp_path)
    assert resumed.taken == 1
    step(other, resumed)
    assert weights_digest(other) == weights_digest(model)
    forgetful = fresh_model("tiny", 9, dtype)
    checkpoint.load_into(forgetful, tmp_path / "model")
    step(forgetful, Learner(forgetful, optim, 4))
    assert weights_digest(forgetful) != weights_digest(model)  # control: without the moments it is another step
    with pytest.raises(MetronomeError, match="holds no learner state"):
        resumed.load(tmp_path / "nowhere")


def test_saved_learner_is_data_only(model: InteractionModel, tmp_path: Path) -> None:
    Learner(model, OPTIM, 4).save(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["optimizer.safetensors", "state.json"]


def test_learning_rate_warms_up_and_decays() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=2, final_lr=0.5)
    rates = [learning_rate(optim, step, 5) for step in range(5)]
    assert rates == pytest.approx([0.5, 0.875, 0.75, 0.625, 0.5])
