"""The order in which sums over a step's episodes are taken. It decides bits, so it is chosen here and nowhere else.

Tensors: a rank adds its micro-batches in their order, then the ranks' sums are added in rank order. So the number of
ranks and ``rl.micro_batch`` are part of a recipe's result. Numbers (means of rewards and metrics, sums of squares) are
added exactly and rounded once (`math.fsum`): for these no order exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum

import torch
from torch import Tensor

from rl.learner import ranks


def over_micro_batches(total: list[Tensor] | None, part: Sequence[Tensor]) -> list[Tensor]:
    """``total`` with a further micro-batch's tensors added, in place; None before the first. Sums are fp32."""
    if total is None:
        return [x.float().clone() for x in part]
    torch._foreach_add_(total, [x.float() for x in part])
    return total


def over_ranks(mine: Tensor) -> Tensor:
    """The ranks' tensors [n] added in rank order: [n], the same bits on every rank."""
    return ranks.sum_in_order(mine)


def mean(values: Iterable[float]) -> float:
    """The mean of all ranks' values, [n] each, rounded once; 0 when there are none."""
    everyone = [value for part in ranks.gather(list(values)) for value in part]
    return fsum(everyone) / len(everyone) if everyone else 0.0
