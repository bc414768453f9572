"""Group-relative advantages with credit per chunk, in fp64: rollouts of equal rewards get exactly zero.

Knows arrays only. Left out on purpose: dividing by the group's standard deviation (it would weigh easy and hard
scenarios alike), value functions, importance ratios and clipping: the step is exactly on-policy.
Axes: R rollouts (G of each scenario, one after another), N chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1 / 2**20
"""Rewards are fp32 sums of a few terms, so returns of equal meaning may differ by some 2^-24 of their size: a group
whose advantages are all smaller than this part of its largest return tells nothing apart."""


def reward_to_go(reward: Tensor, gamma: float) -> Tensor:
    """R_k = sum_{j >= k} gamma^(j - k) r_j, last axis; reward [..., N] -> fp64 [..., N]."""
    reward = reward.double()
    returns = torch.empty_like(reward)
    running = torch.zeros_like(reward[..., 0])
    for k in reversed(range(reward.shape[-1])):
        running = reward[..., k] + gamma * running
        returns[..., k] = running
    return returns


def leave_one_out(returns: Tensor, group: int) -> Tensor:
    """Each rollout's return minus the mean of its group's other rollouts, chunk by chunk (RLOO, Ahmadian et al. 2024).

    returns fp64 [R, N], R a multiple of ``group`` >= 2 -> fp64 [R, N]. Computed as the sum of the differences to the
    others, each of which is exactly 0 between equal returns, whatever the group's size; the sum of the others, divided,
    would leave a rounding residue."""
    if group < 2 or returns.shape[0] % group:
        raise ValueError(f"leave_one_out: {returns.shape[0]} rollouts do not make groups of {group} (at least 2)")
    grouped = returns.unflatten(0, (-1, group))
    total = torch.zeros_like(grouped)
    for other in range(group):
        total = total + (grouped - grouped[:, other : other + 1])
    return (total / (group - 1)).flatten(0, 1)


def told_apart(advantage: Tensor, returns: Tensor, group: int) -> Tensor:
    """Whether each group's rollouts differ by more than rounding (`ROUNDING`), bool [R / group]; where they do not, the
    group is called degenerate and its advantages count as 0. advantage, returns fp64 [R, N]."""
    largest = advantage.abs().unflatten(0, (-1, group)).amax((1, 2))
    size = returns.abs().unflatten(0, (-1, group)).amax((1, 2))
    return largest > ROUNDING * size


@dataclass(frozen=True)
class RunningScale:
    """A running root mean square: what one kind of advantage is divided by, so that kinds of other units weigh alike.

    An exponential mean over steps of the mean square, each step weighing 1 - MEMORY, corrected for its start as Adam's
    moments are (Kingma & Ba 2015). Only groups whose rollouts were told apart enter, so neither a step without any nor
    rounding can make the scale small. One step's own mean square is not used: where all rollouts but one were alike it
    would be anything.

    >>> RunningScale().updated(square_sum=8.0, count=2).value
    2.0
    """

    total: float = 0.0  # of the mean squares, with their weights
    weight: float = 0.0  # of the steps so far; 0: there was none

    MEMORY = 0.9

    def updated(self, square_sum: float, count: int) -> RunningScale:
        """With one step's sum of squares over ``count`` advantages; unchanged when count is 0."""
        if not count:
            return self
        new = 1.0 - self.MEMORY
        return RunningScale(self.MEMORY * self.total + new * (square_sum / count), self.MEMORY * self.weight + new)

    @property
    def value(self) -> float:
        """1 before the first step."""
        return math.sqrt(self.total / self.weight) if self.weight else 1.0
