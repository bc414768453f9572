"""What several processes in teams do for `test_sequence`:

    python -m tests.rl.sequence_of_ranks PROCESSES steps FOLDER SIZE[:MISTAKE] …
    python -m tests.rl.sequence_of_ranks PROCESSES run RUNS NAME SIZE
    python -m tests.rl.sequence_of_ranks PROCESSES measure

``steps``: learner steps by teams of each SIZE, in each of `CASES`; with a mistake (`tests.support.wrong_sharing`) only
in the first. Rank r writes FOLDER/SIZE:MISTAKE.CASE.r. ``run``: a whole run. ``measure``: prints what
`rl.study.sequence` finds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.backbone.transformer import InteractionModel
from model.config import preset
from model.context import ContextConfig, give
from model.program import ranks, teams
from model.program.startup import import_deepspeed
from model.weights.checkpoint import weights_digest
from rl.config import OptimConfig
from rl.learner.deepspeed import Learner
from rl.step import tree
from rl.step.gradient import gradient_of
from rl.study.sequence import measured
from rollout.record.transcript import Transcript, from_observations
from rollout.turn.action import LISTEN, speak
from rollout.turn.grammar import Grammar
from tests.rl.resuming import go
from tests.support.forks import forked
from tests.support.models import VOCABULARY, conversation
from tests.support.sessions import everything
from tests.support.wrong_sharing import mistaken

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


def whole(gradient: Tensor) -> Tensor:
    """What all processes' parts add up to."""
    return tree.over_ranks(gradient.flatten()).view(gradient.shape)


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
        tensors += [gradient.logprob, gradient.entropy, gradient.digest, *(whole(g) for g in gradient.parameters)]
        tensors.append(torch.tensor(learner.step(gradient)))
    return {"tensors": [x.clone() for x in tensors], "digest": weights_digest(model)}


def all_steps(folder: Path, *wanted: str) -> None:
    for one in wanted:
        size, _, mistake = one.partition(":")
        teams.form(int(size))
        for case in list(CASES)[:1] if mistake else CASES:
            with mistaken(mistake):
                torch.save(steps(case), folder / f"{one}.{case}.{ranks.rank()}")


def measure() -> None:
    for size, rows, one in measured("tiny", 4096, 1):
        if ranks.rank() == 0:
            print(f"measured {size} {rows} {one.kept_bytes}")


def main() -> None:
    processes, what, *more = sys.argv[1:]
    work: dict[str, Callable[[], object]] = {
        "steps": lambda: all_steps(Path(more[0]), *more[1:]),
        "run": lambda: go(Path(more[0]), more[1], resume=False, rl__sequence_parallel=more[2]),
        "measure": measure,
    }
    import_deepspeed()  # before there are processes that each would
    forked(int(processes), work[what])


if __name__ == "__main__":
    main()
