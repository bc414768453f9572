"""Takes learner steps on the same episodes by any number of processes in teams, and saves what it got; run by
`test_sequence`.

    accelerate launch … -m tests.rl.sequence_of_ranks FOLDER SEQUENCE_PARALLEL [halo | sums]

``halo`` gives convolutions the rows before a slice in another order, ``sums`` adds the members' own gradients of
weights: the mistakes that the test must see. Each case is a dtype and a context policy. Rank r writes FOLDER/<case>.r.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import kernels.rows
from kernels.rows import Rows
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.context import ContextConfig, give
from model.program import ranks, teams
from model.weights.checkpoint import weights_digest
from rl.config import OptimConfig
from rl.learner.deepspeed import Learner
from rl.step.gradient import gradient_of
from rollout.record.transcript import Transcript, from_observations
from rollout.turn.action import LISTEN, speak
from rollout.turn.grammar import Grammar
from tests.support.models import VOCABULARY, conversation
from tests.support.sessions import everything

CASES = {
    "float32": ("tiny", ContextConfig()),
    "bfloat16": ("nano", ContextConfig("window", first=64, window=64)),
}
STEPS, MICRO_BATCH = 2, 3


def episodes() -> list[Transcript]:
    """Eight, of 5 to 600 rows, two of them with video."""
    grammar = Grammar(VOCABULARY, 2, max_patches=6, max_event_words=2)
    pick = [LISTEN, speak("breathe"), LISTEN, speak("thank", "you")]
    seen = [from_observations([everything(9 * e + k) for k in range(8)], (pick * 2)[:8], grammar) for e in range(2)]
    return [conversation(0, 90), seen[0], *(conversation(n, n) for n in (1, 7, 12, 30)), seen[1], conversation(2, 3)]


def weights(of: list[Transcript]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(t.text.chunk), generator=generator) / 100 for t in of]


def steps(case: str) -> dict[str, list[Tensor] | str]:
    """What the passes and steps of this process's team gave."""
    name, context = CASES[case]
    model = InteractionModel(give(preset(name), context), getattr(torch, case))
    model.init_weights(0)
    model.pack()
    learner = Learner(model, OptimConfig(lr=1e-2, warmup_steps=0), STEPS)
    every = episodes()
    own, tensors = teams.share(len(every)), list[Tensor]()
    some, mine = every[own.start : own.stop], weights(every)[own.start : own.stop]
    for _ in range(STEPS):
        gradient = gradient_of(model, some, mine, VOCABULARY.classes, 1.0, MICRO_BATCH)
        tensors += [gradient.logprob, gradient.entropy, gradient.digest, *gradient.parameters]
        tensors.append(torch.tensor(learner.step(gradient)))
    return {"tensors": [x.clone() for x in tensors], "digest": weights_digest(model)}


def mistake(kind: str) -> None:
    if kind == "halo":
        honest = Rows.before
        Rows.before = lambda self, own, most: honest(self, own, most).roll(1, 0)  # type: ignore[method-assign]
    if kind == "sums":

        def added(rows, gradient, grad, *inputs):  # type: ignore[no-untyped-def]
            part = gradient(grad, *inputs)
            if rows is None:
                return part
            first, *rest = rows.gather(part[None].contiguous(), [1] * len(rows.counts))
            return sum(rest, first)

        for module in list(sys.modules.values()):
            if getattr(module, "over_all_rows", None) is kernels.rows.over_all_rows and module is not kernels.rows:
                module.over_all_rows = added  # type: ignore[attr-defined]


def main() -> None:
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    mistake("".join(sys.argv[3:]))
    ranks.join()
    torch.set_num_threads(1)
    teams.form(size)
    for case in CASES:
        torch.save(steps(case), folder / f"{case}.{ranks.rank()}")
    ranks.leave()


if __name__ == "__main__":
    main()
