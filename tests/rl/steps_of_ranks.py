"""Takes a few learner steps with gradients made up for each rank, and saves the learner; run by `test_processes`.

    accelerate launch … -m tests.rl.steps_of_ranks FOLDER STAGE DTYPE [mean]

Rank r's gradient of a step is a function of r and the step. Prints, once, the weights' digest and the bytes of the
first rank's moments."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import rl.learner.deepspeed
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.program import ranks
from model.weights.checkpoint import weights_digest
from rl.config import OptimConfig
from rl.learner.deepspeed import Learner
from rl.step.gradient import Gradient

STEPS = 3


def learner(stage: int, dtype: torch.dtype) -> Learner:
    model = InteractionModel(preset("nano"), dtype)
    model.init_weights(0)
    model.pack()
    return Learner(model, OptimConfig(zero_stage=stage, warmup_steps=2), 2 * STEPS)  # type: ignore[arg-type]


def gradient(of: Learner, rank: int, step: int) -> list[Tensor]:
    """fp32, of any size between tiny and clipped."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(p.shape, generator=generator) * 0.1**step for p in of.model.parameters()]


def take(of: Learner, parameters: list[Tensor]) -> None:
    of.step(Gradient(tuple(parameters), *[torch.zeros(1)] * 3))


def take_means() -> None:
    """As DeepSpeed does by default: every rank hands over the gradient, and their mean is applied."""
    deepspeed, every = rl.learner.deepspeed.import_deepspeed(), SimpleNamespace(**vars(ranks) | {"rank": lambda: 0})
    honest = deepspeed.initialize

    def initialize(config: dict[str, object], **rest: object) -> object:
        found = honest(config=config | {"gradient_allreduce_op": "mean"}, **rest)
        found[0].gradient_average = False  # as the learner asks; the optimizer that reduces has its own
        return found

    rl.learner.deepspeed.import_deepspeed = lambda: SimpleNamespace(initialize=initialize)  # type: ignore[assignment,return-value]
    Learner.step.__globals__["ranks"] = every


def main() -> None:
    folder, stage, dtype = Path(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
    if sys.argv[4:] == ["mean"]:
        take_means()
    ranks.join()
    torch.set_num_threads(1)
    one = learner(stage, dtype)
    for step in range(STEPS):
        take(one, gradient(one, ranks.rank(), step))
    one.save(folder)
    ranks.agree("weights digest", weights_digest(one.model))
    if ranks.rank() == 0:
        print(f"digest {weights_digest(one.model)}")
        tensors = (x for state in one._adamw.state.values() for x in state.values() if isinstance(x, Tensor))
        print(f"moments {sum(x.nbytes for x in tensors)}")
    ranks.leave()


if __name__ == "__main__":
    main()
