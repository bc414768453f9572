"""What a step maximises is a pure function, and the order of its sums is chosen in one place."""

from __future__ import annotations

import math

import torch

from rl.step import tree
from rl.step.objective import Tokens, policy_gradient


def tokens(count: int) -> Tokens:
    g = torch.Generator().manual_seed(0)
    logprob, weight = -torch.rand(count, generator=g), torch.randn(count, generator=g)
    return Tokens(logprob.requires_grad_(), torch.zeros(count), weight)


def test_policy_gradients_gradient_is_the_weight_to_the_bit() -> None:
    some = tokens(1001)
    value = policy_gradient(some)
    exact = math.fsum(a * b for a, b in zip(some.logprob.tolist(), some.weight.tolist(), strict=True))
    assert abs(float(value.detach()) - exact) < 1e-12 * len(some.weight)  # fp64 sums of exact products
    (gradient,) = torch.autograd.grad(-value, some.logprob)
    assert torch.equal(gradient, -some.weight)


def test_control_a_mean_has_another_gradient() -> None:
    some = tokens(1001)
    (gradient,) = torch.autograd.grad(-policy_gradient(some) / 1001, some.logprob)
    assert not torch.equal(gradient, -some.weight)


def test_micro_batches_are_added_in_their_order() -> None:
    """In fp32 (1 + 1e8) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: the order shows."""
    parts = [torch.tensor([x]) for x in (1.0, 1e8, -1e8)]

    def added(order: list[int]) -> float:
        total = None
        for i in order:
            total = tree.over_micro_batches(total, [parts[i]])
        assert total is not None
        return total[0].item()

    assert added([0, 1, 2]) == 0.0 and added([1, 2, 0]) == 1.0


def test_the_first_part_is_not_written_to() -> None:
    part = torch.ones(3)
    total = tree.over_micro_batches(None, [part])
    tree.over_micro_batches(total, [part])
    assert part.tolist() == [1, 1, 1] and total[0].tolist() == [2, 2, 2]


def test_a_mean_has_no_order() -> None:
    values = [1e16, 1.0, -1e16, 3.0]
    assert tree.mean(values) == tree.mean(values[::-1]) == 1.0
    assert tree.mean([]) == 0.0
