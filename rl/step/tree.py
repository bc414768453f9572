"""The order in which sums over a step's episodes are taken. It decides bits, so it is defined in this module only.

Tensors: a rank adds its micro-batches in their order, then the ranks' sums are added in rank order. A team of ranks
(`model.program.teams`) counts as one. So the number of ranks, or of teams, and ``rl.micro_batch`` are part of a
recipe's result. Numbers (means of rewards and metrics, sums of squares) are added exactly and rounded once a rank
(`math.fsum`): for these no order exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum

import torch
from torch import Tensor

from model.program import ranks, teams


def over_micro_batches(total: list[Tensor] | None, part: Sequence[Tensor]) -> list[Tensor]:
    """Adds a micro-batch's tensors to ``total`` in place and returns it; ``total`` is None before the first. fp32."""
    if total is None:
        return [x.float().clone() for x in part]
    torch._foreach_add_(total, [x.float() for x in part])
    return total


def over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' tensors, added in rank order: [n] -> [n], the same bits on every rank. Of a
    team, whose members hold parts (`kernels.rows.Rows.made`), it is as if one rank had given their sum."""
    return ranks.sum_in_order(tensor)


def mean(values: Iterable[float]) -> float:
    """The mean of all teams' values, [n] each; 0 when there are none."""
    own = list(values)
    sums, counts = zip(*teams.gather((fsum(own), len(own))), strict=True)
    return fsum(sums) / total if (total := sum(counts)) else 0.0
