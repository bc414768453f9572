"""AdamW as a torch optimizer whose update is the op `kernels.ops.adamw`.

torch's own update takes square roots from a library that rounds them differently on AVX-512, so one gradient would give
other weights on another processor. DeepSpeed uses this class like any optimizer, on flat fp32 partitions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kernels import ops
from kernels.layout import AdamWStep

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of the running means of the gradient and of its square."""


class AdamW(torch.optim.Optimizer):
    """Parameters and gradients must be fp32 and contiguous. The state of a parameter holds its `MOMENTS` and ``taken``,
    the number of its updates so far."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, beta1: float, beta2: float, eps: float = 1e-8
    ) -> None:
        """``groups`` as torch takes them, each with ``params`` and ``weight_decay``."""
        super().__init__(list(groups), {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": 0.0})

    def moments(self, parameter: Tensor) -> dict[str, Any]:
        """The state of ``parameter``, zeros before its first update."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {"taken": 0, **{name: torch.zeros_like(parameter) for name in MOMENTS}}
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "AdamW evaluates no loss"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.moments(parameter)
                numbers = AdamWStep.build(
                    lr=group["lr"],
                    beta1=group["beta1"],
                    beta2=group["beta2"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    taken=state["taken"],
                )
                ops.adamw(parameter, parameter.grad, state[MOMENTS[0]], state[MOMENTS[1]], numbers)
                state["taken"] += 1
