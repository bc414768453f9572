"""What a step maximises: pure functions from the forward pass's results for a batch's tokens to one number.

The learner's gradient is the gradient of `Objective` and of nothing else. The importance ratio of sampler and learner
does not appear: by the identity check it is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import ops


@dataclass(frozen=True)
class Tokens:
    """The N chosen tokens of one forward pass, on the model's device."""

    logprob: Tensor  # fp32 [N], under autograd
    entropy: Tensor  # fp32 [N], nats, under autograd
    weight: Tensor  # fp32 [N]: an advantage, or 1 for supervised learning, divided by the number to average over


Objective = Callable[[Tokens], Tensor]
"""Tokens -> a scalar to maximise. It must be a sum over tokens, so that a batch may be cut into micro-batches."""


def policy_gradient(tokens: Tokens) -> Tensor:
    """sum_t weight_t * logprob_t, fp64 [] (REINFORCE, Williams 1992; maximum likelihood where weights are equal)."""
    return weighted_sum(tokens.logprob, tokens.weight)


def weighted_sum(logprob: Tensor, weight: Tensor) -> Tensor:
    """sum_i weight_i * logprob_i, fp64 [], of fp32 [N] each: `policy_gradient` of what has no entropy, such as chunks
    of sound."""
    total: Tensor = _WeightedSum.apply(logprob, weight)
    return total


class _WeightedSum(torch.autograd.Function):
    """sum_i values_i * weights_i by `kernels.ops.dot`; the gradient of values_i is exactly weights_i."""

    @staticmethod
    def forward(ctx, values, weights):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(weights)
        return ops.dot(values.contiguous(), weights.contiguous())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (weights,) = ctx.saved_tensors
        return grad.float() * weights, None
