"""Chains of sound: sampler and learner give the same bits; the log-prob and the process are what they should be."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import dispatch, ops
from kernels.noise import normal
from model.voice import chain
from model.voice.chain import Schedule, draw, loss, score
from model.voice.config import LEVELS, NUMBERS, VoiceConfig
from model.voice.flow import FlowHead, time_features
from tests.kernels.contract import generator, threads
from tests.model.voice.cases import HIDDEN, SHAPE, oracle, some_head

ROWS = 5
KEYS = torch.arange(ROWS) * 40 + 9


def hidden(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=generator(seed))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_learner_has_the_samplers_bits(steps: int, dtype: torch.dtype) -> None:
    """One chunk alone, among others, in another order, on other threads; the learner all steps in one call."""
    head, h = some_head(replace(SHAPE, steps=steps), dtype=dtype), hidden().to(dtype)
    with torch.inference_mode():
        drawn = draw(head, h, KEYS)
    assert drawn.x.shape == (ROWS, steps + 1, NUMBERS) and bool(drawn.x.isfinite().all())
    assert len(drawn.digest.unique()) == ROWS
    for i in range(ROWS):
        alone = draw(head, h[i : i + 1], KEYS[i : i + 1])
        assert same(alone.x[0], drawn.x[i]) and same(alone.logprob[0], drawn.logprob[i])
        assert alone.digest[0] == drawn.digest[i]
    order = torch.tensor([3, 0, 4, 1, 2])
    with threads(3):
        logprob, digest = score(head, h[order].requires_grad_(), drawn.x[order].clone())
    assert logprob.requires_grad and same(logprob.detach(), drawn.logprob[order])
    assert same(digest, drawn.digest[order])


def test_each_backend_has_packs_of_its_own() -> None:
    """One process draws and scores on one backend, then on another, then on the first. Control: a pack of the one is
    refused by the other."""
    before = dispatch.backend().NAME
    drawn = []
    try:
        for name in ("reference", "cpu", "reference"):
            dispatch.use_backend(name)
            head, h = some_head(), hidden()
            drawn.append(draw(head, h, KEYS))
            assert same(score(head, h, drawn[-1].x)[0], drawn[-1].logprob)
            assert bool(loss(head, h, drawn[-1].x[:, -1], KEYS).isfinite().all())
        with pytest.raises(ValueError, match="another backend"):
            ops.linear(torch.ones(1, NUMBERS), chain._ones("cpu", "cpu"))
    finally:
        dispatch.use_backend(before)
    assert same(drawn[0].logprob, drawn[2].logprob) and torch.allclose(drawn[0].logprob, drawn[1].logprob, rtol=1e-3)


def test_what_is_no_longer_the_same_function_is_seen() -> None:
    """Controls: a weight changed by one unit in the last place, steps in another order, a mean in place of the sum."""
    head, h = some_head(), hidden()
    drawn = draw(head, h, KEYS)
    with torch.no_grad():
        weight = head.leave.weight
        weight[7, 3] = torch.nextafter(weight[7, 3], torch.tensor(math.inf))
    head.repack()
    logprob, digest = score(head, h, drawn.x)
    assert bool((digest != drawn.digest).any())
    head = some_head()
    swapped = drawn.x.clone()
    swapped[:, [1, 2]] = swapped[:, [2, 1]]
    logprob, digest = score(head, h, swapped)
    assert bool((digest != drawn.digest).all()) and not bool((logprob == drawn.logprob).any())
    assert not torch.allclose(drawn.logprob / NUMBERS, logprob_in_fp64(head, h, drawn.x).float(), rtol=1e-3)


def logprob_in_fp64(head: FlowHead, h: Tensor, x: Tensor) -> Tensor:
    """By the formulas of the module's text and torch.distributions."""
    steps, a, total = head.config.steps, head.config.noise, torch.zeros(len(x), dtype=torch.float64)
    dt = 1 / steps
    for k, (now, after) in enumerate(pairwise(x.double().unbind(1))):
        t = k * dt
        clean = oracle(head, now, h, torch.full((len(x),), k * LEVELS // steps))
        u = (clean - now) / (1 - t)
        s = a * math.sqrt((1 - t) / t) if k else a / math.sqrt(dt)
        mean = now + (u + s * s / (2 * (1 - t)) * (t * u - now)) * dt
        total = total + torch.distributions.Normal(mean, s * math.sqrt(dt)).log_prob(after).sum(1)
    return total


@pytest.mark.parametrize("steps", [2, 8])
def test_the_log_prob_is_that_of_the_gaussians(steps: int) -> None:
    """Values and gradients against fp64."""
    head = some_head(replace(SHAPE, steps=steps))
    h = hidden().requires_grad_()
    x = draw(head, h.detach(), KEYS).x.detach()
    logprob, _ = score(head, h, x)
    wanted = logprob_in_fp64(head, h, x)
    torch.testing.assert_close(logprob.double(), wanted, rtol=1e-5, atol=0)
    weights = [h, *head.parameters()]
    got, by_torch = torch.autograd.grad(logprob.sum(), weights), torch.autograd.grad(wanted.sum(), weights)
    for one, other in zip(got, by_torch, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=4e-4 * float(other.abs().max()))


class Toy:
    """Knows that clean numbers are normal with mean ``MEAN`` and deviation ``STD``, and expects accordingly."""

    MEAN, STD = 0.5, 0.3

    def __init__(self, config: VoiceConfig) -> None:
        self.config = config

    def conditions(self, hidden: Tensor) -> Tensor:
        return hidden

    def __call__(self, x: Tensor, conditions: Tensor, level: Tensor) -> Tensor:
        t = (level / LEVELS)[:, None]
        return self.MEAN + t * self.STD**2 / ((1 - t) ** 2 + t**2 * self.STD**2) * (x - t * self.MEAN)


@pytest.mark.parametrize(("noise", "std"), [(0.7, 0.282), (0.01, 0.234)])
def test_chains_end_in_the_distribution_that_is_expected(noise: float, std: float) -> None:
    """With the exact expectation of a normal distribution of deviation 0.3, in eight steps. With hardly any noise in
    the steps it is the flow's own path, whose few steps lose more of the spread."""
    toy = Toy(VoiceConfig(steps=8, noise=noise))
    drawn = draw(toy, torch.zeros(60, 1), torch.arange(60))  # type: ignore[arg-type]
    end = drawn.x[:, -1]
    assert float(end.mean()) == pytest.approx(0.5, abs=0.005) and float(end.std()) == pytest.approx(std, abs=0.005)


def test_the_loss_is_the_mean_squared_error_of_the_velocity() -> None:
    head, h, target = some_head(), hidden().requires_grad_(), torch.randn(ROWS, NUMBERS, generator=generator(3))
    got = loss(head, h, target, KEYS)
    x0, level = normal(KEYS, NUMBERS).double(), (KEYS & (2**63 - 1)) % LEVELS
    t = (level.double() / LEVELS)[:, None]
    assert len(level.unique()) == ROWS and float(t.max()) < 0.8
    x = (1 - t) * x0 + t * target.double()
    velocity = (oracle(head, x.float(), h, level) - x) / (1 - t)
    wanted = (velocity - (target.double() - x0)).square().mean(1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=0)
    weights = [h, *head.parameters()]
    one, other = torch.autograd.grad(got.sum(), weights), torch.autograd.grad(wanted.sum(), weights)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4 * float(b.abs().max()))


def test_times_have_features_of_their_own() -> None:
    assert len(time_features().unique(dim=0)) == LEVELS


def test_a_gradient_of_a_chunk_does_not_depend_on_the_others() -> None:
    """The hidden state's: it is read once and used in every step. Control: another order of that sum."""
    head, h = some_head(replace(SHAPE, steps=8)), hidden()
    x = draw(head, h, KEYS).x.detach()

    def gradient(rows: slice) -> Tensor:
        own = h[rows].clone().requires_grad_()
        return torch.autograd.grad(score(head, own, x[rows])[0].sum(), own)[0]

    together = gradient(slice(None))
    assert all(same(gradient(slice(i, i + 1))[0], together[i]) for i in range(ROWS))
    grad = torch.randn(2 * 8, 32, generator=generator(1))
    repeated = chain._Repeated
    own = torch.zeros(2, 32, requires_grad=True)
    forward = torch.autograd.grad(repeated.apply(own, 8), own, grad)[0]
    backward = torch.autograd.grad(repeated.apply(own, 8), own, grad.view(2, 8, 32).flip(1).reshape(16, 32))[0]
    assert torch.allclose(forward, backward, atol=1e-5) and not same(forward, backward)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda x: x[:, 1:], r"float32 \[5, 4, 1600\], but this model's are float32 \[5, 5, 1600\].*4 steps"),
        (lambda x: x[..., :80], r"\[5, 5, 80\]"),
        (lambda x: x.double(), "float64"),
        (lambda x: x.index_put((torch.tensor(2), torch.tensor(1), torch.tensor(9)), torch.tensor(math.nan)), "chain 2"),
    ],
)
def test_chains_of_another_form_are_refused(spoil, says: str) -> None:  # type: ignore[no-untyped-def]
    head, h = some_head(), hidden()
    x = draw(head, h, KEYS).x.detach()
    with pytest.raises(ValueError, match=says):
        score(head, h, spoil(x))
    with pytest.raises(ValueError, match=r"targets are \[5, 1599\]"):
        loss(head, h, x[:, 0, :-1], KEYS)


def test_the_schedule_s_numbers() -> None:
    """keep + pull t' / t is how a point on the way from 0 to x1 goes on to the next time, when there is no noise."""
    schedule = Schedule.of(VoiceConfig(steps=8, noise=1e-6))
    for k, (keep, pull) in enumerate(zip(schedule.keep, schedule.pull, strict=True)):
        assert keep * k / 8 + pull == pytest.approx((k + 1) / 8, abs=1e-6)
    assert schedule.level == (0, 32, 64, 96, 128, 160, 192, 224)
