"""Group-relative advantages with credit per chunk.

Knows arrays only. Left out on purpose: dividing by the group's standard deviation (it would weigh easy and hard
scenarios alike), value functions, importance ratios and clipping: the step is exactly on-policy.
Axes: R rollouts (G of each scenario, one after another), N chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reward_to_go(reward: Tensor, gamma: float) -> Tensor:
    """R_k = sum_{j >= k} gamma^(j - k) r_j, last axis; reward fp32 [..., N] -> [..., N]."""
    returns = torch.empty_like(reward)
    running = torch.zeros_like(reward[..., 0])
    for k in reversed(range(reward.shape[-1])):
        running = reward[..., k] + gamma * running
        returns[..., k] = running
    return returns


def leave_one_out(returns: Tensor, group: int) -> Tensor:
    """Each rollout's return minus the mean of its group's other rollouts, chunk by chunk (RLOO, Ahmadian et al. 2024).

    returns fp32 [R, N], R a multiple of ``group`` >= 2 -> [R, N]."""
    if group < 2 or returns.shape[0] % group:
        raise ValueError(f"leave_one_out: {returns.shape[0]} rollouts do not make groups of {group} (at least 2)")
    grouped = returns.unflatten(0, (-1, group))
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten(0, 1)


def scaled(advantage: Tensor, square_sum: float, count: int) -> Tensor:
    """The advantage divided by its family's root mean square over all ranks (square_sum over count entries); zero stays
    zero."""
    rms = (square_sum / count) ** 0.5 if count else 0.0
    return advantage / rms if rms > 0 else advantage
