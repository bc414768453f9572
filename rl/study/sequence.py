"""What sequence parallelism saves and costs: memory kept between forward and backward pass, and time, by team size.

    accelerate launch --config_file configs/accelerate/cpu.yaml --num_processes 4 -m rl.study.sequence

One episode of ``--rows`` rows is learned from by teams of 1, 2, 4 … of the launcher's processes, while the others wait;
every team's gradient must have the bits of the first. Memory is what the process holds more of after the forward pass
than before, as the system counts it, in the member with most.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.study.sequence")

import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model import config as shapes
from model.backbone.transformer import InteractionModel
from model.placement import Placement, PlacementConfig
from model.program import ranks, teams
from model.program.arguments import Parser
from model.program.memory import resident_bytes
from model.program.ranges import Range, number
from rl.step.batch import Batch, collate
from rl.step.sequence import choice_logprobs
from rollout.record.transcript import write_transcript
from rollout.turn.action import CHUNK_FRAMES, LISTEN
from rollout.turn.grammar import Grammar, turn_rows
from rollout.turn.vocabulary import Vocabulary


@dataclass(frozen=True)
class Measured:
    """One pass by a team."""

    kept_bytes: int  # between forward and backward pass, in the member with most
    forward_s: float
    backward_s: float
    digest: str  # of log-probs, row digests and gradient


def one_pass(model: InteractionModel, batch: Batch, vocabulary: Vocabulary) -> Measured:
    """Every member of a team must call it."""
    before, clock = resident_bytes(), time.perf_counter()
    logprob, _, row_digest = choice_logprobs(model, batch, vocabulary.classes, 1.0)
    forward_s = time.perf_counter() - clock
    kept, clock = resident_bytes() - before, time.perf_counter()
    gradient = torch.autograd.grad(logprob.sum(), list(model.parameters()), materialize_grads=True)
    backward_s, digest = time.perf_counter() - clock, blake2b(digest_size=16)
    for x in (logprob.detach(), row_digest, *map(whole, gradient)):
        digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return Measured(max(teams.merged([kept])), forward_s, backward_s, digest.hexdigest())


def whole(gradient: Tensor) -> Tensor:
    """What the members' parts add up to."""
    if teams.size() == 1:
        return gradient
    first, *rest = teams.gather_rows(gradient[None].contiguous(), [1] * teams.size())
    return sum(rest, first)


def episode(model: InteractionModel, vocabulary: Vocabulary, rows: int) -> Batch:
    """One episode of about so many rows, of random sound, in which the model only listens."""
    chunks = -(-rows // turn_rows(0, 1)[0])
    codes = torch.randint(16, (chunks, CHUNK_FRAMES, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return collate([write_transcript(codes, [LISTEN] * chunks, Grammar(vocabulary, 1))], model.senses)


def measured(preset: str, rows: int, repeat: int) -> Iterator[tuple[int, int, Measured]]:
    """(size of the team, rows, the pass of several that kept least and the least times) by teams of 1, 2, 4 … members.
    Raises RuntimeError when a team's bits are not those of one process."""
    model = InteractionModel(shapes.preset(preset))
    model.init_weights(0)
    model.pack()
    vocabulary = Vocabulary.of(model)
    batch, size, first = episode(model, vocabulary, rows), 1, ""
    while ranks.world() % size == 0:
        teams.form(size)
        passes: list[Measured] = []
        if teams.count_before() == 0:  # the others wait
            passes = [one_pass(model, batch, vocabulary) for _ in range(repeat + 1)][1:]  # the first makes packs
        passes = ranks.gather(passes)[0]
        first = first or passes[0].digest
        if any(one.digest != first for one in passes):
            raise RuntimeError(f"a team of {size} gives other bits than one process")
        least = Measured(
            min(one.kept_bytes for one in passes),
            min(one.forward_s for one in passes),
            min(one.backward_s for one in passes),
            first,
        )
        yield size, len(batch.inputs.tokens), least
        size *= 2


def parser() -> Parser:
    parser = Parser("rl.study.sequence", __doc__)
    parser.add_argument("--preset", choices=shapes.PRESETS[:-1], default="tiny")
    parser.add_argument("--rows", type=number(int, Range(64, 10**6)), default=4096, help="rows of the episode")
    parser.add_argument(
        "--repeat", type=number(int, Range(1, 100)), default=2, help="passes, of which the least counts"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    Placement.enter(PlacementConfig("cpu"), "float32")
    with ranks.joined():
        torch.set_num_threads(1)
        if given.rows < ranks.world():
            raise MetronomeError(f"--rows is {given.rows}, but there are {ranks.world()} processes: give more")
        for size, rows, one in measured(given.preset, given.rows, given.repeat):
            if ranks.rank() == 0:
                print(
                    f"{given.preset}, {rows:,} rows, team of {size}: {one.kept_bytes / 2**20:.1f} MiB kept in each "
                    f"process, forward {one.forward_s:.2f} s, backward {one.backward_s:.2f} s, bits {one.digest}"
                )
