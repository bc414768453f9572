"""``python -m rl.study.traffic --preset inkling_small``: bytes that cross the network in one step on many machines.

Arithmetic from shapes; nothing is allocated and nothing is measured. Learner processes each hold the whole model and
sample their share of the groups (data parallel). Two placements of the engines are shown: beside the learner, where new
weights never leave the machine, and on machines of their own, which receive the weights and send episodes.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.study.traffic")

from collections.abc import Iterator
from dataclasses import fields

import torch

from kernels.errors import MetronomeError
from model import config as shapes
from model.backbone.size import empty
from model.config import MEL_CHANNELS
from model.program.arguments import Parser
from model.program.ranges import Range, number
from model.sizing import counts
from rl.config import RLConfig
from rollout.record.episode import TEXT, Stream
from rollout.turn.action import CHUNKS_PER_SECOND
from rollout.turn.grammar import AUDIO_ROWS, turn_rows

_PER_TOKEN = [field.name for field in fields(Stream) if field.name != "payload"]


def episode_tensors(seconds: int, words: int) -> dict[str, torch.Tensor]:
    """Tensors of an episode's shape on the meta device, where a chunk that speaks says one word, the most it may."""
    chunks = seconds * CHUNKS_PER_SECOND
    turns = zip(turn_rows(0, 1), turn_rows(1, 1), strict=True)
    rows, sampled = ((chunks - words) * silent + words * speaking for silent, speaking in turns)
    with torch.device("meta"):
        per_token = {f"{TEXT}.{name}": torch.empty(sampled, dtype=torch.int64) for name in _PER_TOKEN}
        return per_token | {
            "tokens": torch.empty(1 + rows, dtype=torch.int64),
            "contexts": torch.empty(1, dtype=torch.int64),
            "codes": torch.empty(chunks * AUDIO_ROWS, MEL_CHANNELS, dtype=torch.uint8),
            f"{TEXT}.logprob": torch.empty(sampled, dtype=torch.float32),
        }


def episode_bytes(seconds: int, words: int) -> int:
    """Bytes of one `Episode`'s tensors; names, facts and actions are some hundred more. A voice is not counted: each
    chunk of sound adds 6,400 bytes for each state of its chain, 57,600 with 8 steps."""
    return sum(t.nbytes for t in episode_tensors(seconds, words).values())


def traffic(parameters: int, learners: int, episodes: int, episode: int) -> Iterator[tuple[str, int]]:
    """(what, bytes) for one step; ``episode`` bytes each, weights in bf16, gradients in fp32."""
    gradient = 4 * parameters
    yield "gradients into each learner, added in rank order", 2 * (learners - 1) * gradient // learners
    yield "weights into each machine of engines, none if beside a learner", 2 * parameters
    yield "episodes from the engines' machines to the learners, all together", episodes * episode


def parser() -> Parser:
    rl, count = RLConfig(), number(int, Range(1, 10**9))
    parser = Parser("rl.study.traffic", __doc__)
    parser.add_argument("--preset", choices=shapes.PRESETS, required=True)
    parser.add_argument("--learners", type=count, default=16, help="learner processes, each with the whole model")
    parser.add_argument("--groups", type=count, default=rl.groups, help="scenarios a step")
    parser.add_argument("--rollouts", type=count, default=rl.rollouts, help="rollouts of each scenario")
    parser.add_argument("--seconds", type=count, default=60, help="length of an episode")
    parser.add_argument(
        "--words", type=number(int, Range(0, 10**9)), default=60, help="words said in an episode, one a chunk"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    most = given.seconds * CHUNKS_PER_SECOND
    if given.words > most:
        raise MetronomeError(f"--words is {given.words}; with one a chunk, {given.seconds} s hold 0 to {most}")
    shape = shapes.preset(given.preset)
    total = counts(shape, empty(shape, torch.bfloat16))["parameters"]
    episode = episode_bytes(given.seconds, given.words)
    print(f"{given.preset}: {total:,} parameters; an episode of {given.seconds} s is {episode:,} bytes")
    for what, size in traffic(total, given.learners, given.groups * given.rollouts, episode):
        print(f"{size:26,d}  {what}")
