"""Sampling a chunk of sound as a chain with an exact log-probability (Flow-SDE: Liu et al. 2025, Flow-GRPO, arXiv
2505.05470).

The chain x_0 ... x_K begins with normal noise. Its step k, from time t = k / K, draws

    x_{k+1} ~ N(m_k, s^2 dt I),  m_k = x_k + [u + s^2 / (2 (1 - t)) (t u - x_k)] dt,  dt = 1 / K,
    s = a sqrt((1 - t) / t), at t = 0 a / sqrt(dt),

u = (x1 - x_k) / (1 - t) the velocity and x1 the clean chunk that the flow head expects. m_k is a linear combination of
x_k and x1, whose factors `Schedule` works out once. The log-probability of a chain is the sum, over steps and numbers,
of the Gaussians' log-densities; that of x_0 is left out, as it is the same under every policy. It is the likelihood of
the chain that was drawn, in nats, not the marginal one of the sound.

Sampler and learner call the same functions, one step after another or all steps of many chains in one call: by the row
contract that changes no bit. The digest of a chain covers every x1, and so each of its distributions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from kernels import dispatch, exact, ops
from kernels.layout import PackedLinear
from kernels.noise import normal
from model.voice.config import LEVELS, NUMBERS, VoiceConfig
from model.voice.flow import FlowHead

NEAR_ONE = 0.2
"""1 - t is taken for at least this in the loss: near t = 1 the velocity of a small error has no bound, and a few
chunks' gradients there would drown the others. (With 0.05 a head was twenty times as far from its targets.)"""


@dataclass(frozen=True)
class Schedule:
    """The numbers of a chain's K steps, [K] each, rounded to fp32."""

    level: tuple[int, ...]  # time of each step's beginning, in units of 1 / LEVELS
    keep: tuple[float, ...]  # m_k = keep x_k + pull x1
    pull: tuple[float, ...]
    sigma: tuple[float, ...]  # standard deviation of the step
    inverse: tuple[float, ...]  # 1 / sigma
    constant: float  # -NUMBERS * sum_k (ln sigma_k + ln(2 pi) / 2), nats

    @staticmethod
    @functools.cache
    def of(config: VoiceConfig) -> Schedule:
        steps, a = config.steps, config.noise
        dt, columns, logs = 1.0 / steps, [], 0.0
        for k in range(steps):
            t = k * dt
            rest = 1.0 - t
            s = a * math.sqrt(rest / t) if k else a / math.sqrt(dt)
            half = s * s / (2.0 * rest)
            pull = dt * (1.0 + half * t) / rest
            sigma = s * math.sqrt(dt)
            columns.append((_fp32(1.0 - pull - dt * half), _fp32(pull), _fp32(sigma), _fp32(1.0 / sigma)))
            logs += exact.ln(_fp32(sigma)) + exact.ln(2.0 * float(exact.pi())) / 2.0
        level = tuple(k * LEVELS // steps for k in range(steps))
        return Schedule(level, *zip(*columns, strict=True), _fp32(-NUMBERS * logs))  # type: ignore[call-arg, arg-type]


def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    """A schedule's numbers as fp32 [K, 1] on the device of ``like``."""
    return torch.tensor(numbers, device=like.device)[:, None]


def _fp32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


@dataclass(frozen=True)
class Chains:
    """R chains as they were drawn, with evidence."""

    x: Tensor  # fp32 [R, K + 1, NUMBERS], from noise to the chunk that is heard
    logprob: Tensor  # fp32 [R], nats
    digest: Tensor  # int64 [R], on the host


def draw(head: FlowHead, hidden: Tensor, key: Tensor) -> Chains:
    """Draws a chunk for each of R hidden states [R, D]; ``key`` int64 [R], on the host: bits of its random key."""
    schedule, rows = Schedule.of(head.config), hidden.shape[0]
    steps = len(schedule.level)
    noise = normal(key, (steps + 1) * NUMBERS).view(rows, steps + 1, NUMBERS).to(hidden.device)
    conditions = head.conditions(hidden)
    x, expected = [noise[:, 0]], []
    for k in range(steps):
        level = torch.full((rows,), schedule.level[k], device=hidden.device)
        expected.append(head(x[k], conditions, level))
        mean = x[k] * schedule.keep[k] + expected[k] * schedule.pull[k]
        x.append(mean + noise[:, k + 1] * schedule.sigma[k])
    chain, clean = torch.stack(x, 1), torch.stack(expected, 1)
    return Chains(chain, _logprob(schedule, chain, clean), digests(clean))


def score(head: FlowHead, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(log-prob fp32 [R] under autograd, digest int64 [R]) of chains x fp32 [R, K + 1, NUMBERS] under the head, given
    hidden states [R, D]. Raises ValueError for chains of another number of steps or of numbers that are not finite."""
    schedule, rows = Schedule.of(head.config), hidden.shape[0]
    steps = len(schedule.level)
    check_chains(x, rows, steps)
    level = torch.tensor(schedule.level, device=hidden.device).repeat(rows)
    conditions: Tensor = _Repeated.apply(head.conditions(hidden), steps)
    clean = head(x[:, :-1].reshape(-1, NUMBERS), conditions, level).view(rows, steps, NUMBERS)
    return _logprob(schedule, x, clean), digests(clean)


def score_by_steps(head: FlowHead, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `score` gives, computed as `draw` does, one step of all chains after another: for an audit of the two."""
    schedule, rows = Schedule.of(head.config), hidden.shape[0]
    check_chains(x, rows, len(schedule.level))
    conditions = head.conditions(hidden)
    levels = [torch.full((rows,), level, device=hidden.device) for level in schedule.level]
    clean = torch.stack([head(x[:, k], conditions, level) for k, level in enumerate(levels)], 1)
    return _logprob(schedule, x, clean), digests(clean)


def check_chains(x: Tensor, rows: int, steps: int) -> None:
    """Raises ValueError unless x are chains as `Chains.x` has them."""
    if x.shape != (rows, steps + 1, NUMBERS) or x.dtype != torch.float32:
        raise ValueError(
            f"voice: chains are {str(x.dtype).removeprefix('torch.')} {list(x.shape)}, but this model's are float32 "
            f"{[rows, steps + 1, NUMBERS]}: {rows} chunks, {steps} steps from noise to sound"
        )
    finite = x.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(f"voice: chain {int((~finite).int().argmax())} holds a NaN or infinity")


def _logprob(schedule: Schedule, x: Tensor, clean: Tensor) -> Tensor:
    """x fp32 [R, K + 1, NUMBERS], clean fp32 [R, K, NUMBERS] -> fp32 [R]."""
    rows, steps, _ = clean.shape
    mean = x[:, :-1] * _column(schedule.keep, x) + clean * _column(schedule.pull, x)
    z = (x[:, 1:] - mean) * _column(schedule.inverse, x)
    squares = ops.linear((z * z).view(rows * steps, NUMBERS), _ones(dispatch.backend().NAME, str(x.device)))
    squares = squares.view(rows, steps)
    total = squares[:, 0]
    for k in range(1, steps):
        total = total + squares[:, k]
    return total * -0.5 + schedule.constant


@functools.cache
def _ones(backend: str, device: str) -> PackedLinear:
    """What sums a row in the order of `kernels.ops.linear`, packed by the active backend, whose name is ``backend``."""
    with torch.inference_mode(False):
        return ops.pack_linear(torch.ones(1, NUMBERS, device=device))


class _Repeated(torch.autograd.Function):
    """[R, width] -> [R * times, width], each row ``times`` times; the gradient adds them in order."""

    @staticmethod
    def forward(ctx, x, times):  # type: ignore[no-untyped-def]
        ctx.times = times
        return x.repeat_interleave(times, 0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        parts = grad.view(-1, ctx.times, grad.shape[1]).unbind(1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total, None


def digests(clean: Tensor) -> Tensor:
    """fp32 [R, K, NUMBERS] -> int64 [R], on the host: 64 bits of blake2b of each row's bytes."""
    host = clean.detach().cpu().contiguous().numpy()
    return torch.tensor(
        [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little", signed=True) for row in host],
        dtype=torch.int64,
    )


def loss(head: FlowHead, hidden: Tensor, target: Tensor, key: Tensor) -> Tensor:
    """The flow-matching loss of each of R chunks, fp32 [R] under autograd: the mean over its numbers of the squared
    error of the velocity, at one time and with one noise that are drawn from ``key`` int64 [R], on the host.

    hidden [R, D], target fp32 [R, NUMBERS]. Raises ValueError for targets of another length."""
    if target.shape != (hidden.shape[0], NUMBERS):
        raise ValueError(f"voice: targets are {list(target.shape)}, need {[hidden.shape[0], NUMBERS]}")
    noise = normal(key, NUMBERS).to(hidden.device)
    level = (key & (2**63 - 1)) % LEVELS
    t = (level.to(torch.float32) / LEVELS)[:, None]
    weight = (1.0 / (1.0 - t).clamp_min(NEAR_ONE)).to(hidden.device)
    t, level = t.to(hidden.device), level.to(hidden.device)
    x = noise * (1.0 - t) + target * t
    error = (head(x, head.conditions(hidden), level) - target) * weight
    return ops.linear(error * error, _ones(dispatch.backend().NAME, str(x.device)))[:, 0] * (1.0 / NUMBERS)
