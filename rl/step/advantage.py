"""Group-relative advantages with credit per chunk, in fp64: rollouts of equal rewards get exactly zero.

Knows arrays only. Left out on purpose: dividing by the group's standard deviation (it would give easy and hard
scenarios equal weight), value functions, importance ratios and clipping (the step is exactly on-policy).
Axes: R rollouts (those of a scenario, its group, one after another), N chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1 / 2**20
"""Advantages below this fraction of the group's largest return are taken for rounding. (Rewards are fp32 sums of a few
terms, so returns that should be equal may differ by a few times 2^-24 of their size.)"""


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

    returns fp64 [R, N] -> fp64 [R, N]. Computed as the mean of the differences to the others, which are exactly 0
    between equal returns for any group size; subtracting the mean would leave a rounding error. Raises ValueError
    unless R is a multiple of ``group``, the number of rollouts of a scenario, and that is at least 2."""
    if group < 2 or returns.shape[0] % group:
        raise ValueError(f"leave_one_out: {returns.shape[0]} rollouts do not make groups of {group} (at least 2)")
    grouped = returns.unflatten(0, (-1, group))
    total = torch.zeros_like(grouped)
    for other in range(group):
        total = total + (grouped - grouped[:, other : other + 1])
    return (total / (group - 1)).flatten(0, 1)


def informative_groups(advantage: Tensor, returns: Tensor, group: int) -> Tensor:
    """Whether the returns of each group differ by more than rounding (`ROUNDING`): fp64 [R, N] both -> bool
    [R / group]. A group whose returns do not is called degenerate; its advantages count as 0."""
    largest = advantage.abs().unflatten(0, (-1, group)).amax((1, 2))
    size = returns.abs().unflatten(0, (-1, group)).amax((1, 2))
    return largest > ROUNDING * size


@dataclass(frozen=True)
class RunningScale:
    """A running root mean square of advantages, by which they are divided so that rewards in different units count
    equally.

    It is an exponential moving average over steps of the mean square, with decay MEMORY, corrected for its start as
    Adam's moments are (Kingma & Ba 2015). Degenerate groups do not enter, so neither they nor rounding can make the
    scale small. A single step's mean square would vary too much: it may come from one rollout that differs.

    >>> RunningScale().updated(square_sum=8.0, count=2).value
    2.0
    """

    total: float = 0.0  # weighted sum of the steps' mean squares
    weight: float = 0.0  # sum of these weights; 0 before the first step

    MEMORY = 0.9

    def updated(self, square_sum: float, count: int) -> RunningScale:
        """The scale after one more step, with ``count`` advantages whose squares sum to ``square_sum``; unchanged when
        ``count`` is 0."""
        if not count:
            return self
        new = 1.0 - self.MEMORY
        return RunningScale(self.MEMORY * self.total + new * (square_sum / count), self.MEMORY * self.weight + new)

    @property
    def value(self) -> float:
        """The root mean square to divide by; 1 before the first step."""
        return math.sqrt(self.total / self.weight) if self.weight else 1.0
