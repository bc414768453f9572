"""Digests of every stage from a recording to the first updates, to find where two machines' bits first differ.

    python -m rl.fingerprint [--device cuda] [--json FILE] [--against FILE]

Every stage is computed from the one before it, with the quickstart's recipe, in one process: recordings, noises, the
simulated user's audio, dMel codes, demonstrations, fresh weights; three supervised steps (log-probs, gradient, norm and
clipped gradient, weights); sampled noise and tokens; episodes, rewards and advantages. Equal digests mean equal bits.
``--against`` names the first stage that differs from an earlier FILE's. Exit status 1 when one differs, 2 for a FILE of
another contract, 3 when nothing, or not everything, could be compared: a FILE without stages or with others.
On every processor the stages of one contract are the same: `tests/golden/fingerprint.json` holds them.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.fingerprint")

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import dispatch, ops
from kernels.errors import MetronomeError
from model.placement import Placement, PlacementConfig, add_device
from model.program import ranks
from model.program.arguments import Parser
from model.program.files import write_json
from model.program.outputs import output_file
from model.program.reading import UnreadableError, read_record
from model.senses.audio import DMel
from reward.source import RewardSource
from rl.audit.finding import Finding, Verdict, leave
from rl.config import TrainConfig
from rl.environment import environment
from rl.learner.deepspeed import Learner
from rl.rollers import build_engine
from rl.run import build_model
from rl.step import loop
from rl.step.credit import token_weights
from rl.step.gradient import gradient_of
from rl.warmstart import demonstration, demonstrations
from rollout.play import play
from rollout.record.episode import concatenate
from rollout.turn.observation import stack_audio
from rollout.turn.vocabulary import Vocabulary
from rollout.world.sound import NOISES, noise
from rollout.world.speech import SpeechBank

DEMONSTRATIONS = 64
STEPS = 3
"""Supervised steps."""
ROLLOUTS = 12
"""Episodes, of the first groups of the recipe's first RL step."""
ROWS, VOCABULARY = 512, 201_024
"""Rows of logits to sample from with our small vocabulary, and the size of Inkling's vocabulary."""

Array = Tensor | NDArray[Any] | str


def fingerprint() -> dict[str, Any]:
    """``stages`` (name -> digest, in order), and what identifies the machine: ``contract_id``, ``processor`` …"""
    current = environment()
    kept = {name: current[name] for name in ("contract_id", "contract", "instruction_set", "processor", "processes")}
    return kept | {"stages": {name: _digest(arrays) for name, arrays in stages()}}


def stages() -> Iterator[tuple[str, Iterable[Array]]]:
    """Yields (name, arrays) of each stage, computed from those before it."""
    config, bank, dmel = TrainConfig(), SpeechBank.open(), DMel.build()
    yield "recordings", [clip.samples for clip in bank.clips]
    for split, kinds in NOISES.items():
        yield f"noises, {split}", [noise(name, split) for name in kinds]
    played = [demonstration(config, bank, index) for index in range(DEMONSTRATIONS)]
    heard = [stack_audio(observed) for observed, _ in played]
    yield "user's audio", heard
    yield "demonstrated actions", [repr(actions) for _, actions in played]
    yield "dMel codes", [dmel.codes(audio.view(1, -1)) for audio in heard]

    model = build_model(config)
    yield "fresh weights", list(model.parameters())
    vocabulary = Vocabulary.of(model)
    learner = Learner(model, config.warmstart.optim, config.warmstart.steps)
    for step in range(STEPS):
        some = demonstrations(config, bank, vocabulary, model.senses, step)
        tokens = sum(len(t.text.chunk) for t in some)
        weights = [torch.full((len(t.text.chunk),), 1.0 / tokens) for t in some]
        gradient = gradient_of(model, some, weights, vocabulary.classes, 1.0, config.rl.micro_batch)
        yield f"step {step}: log-probs and row digests", [gradient.logprob, gradient.digest]
        yield f"step {step}: gradient", gradient.parameters
        limit, norm = config.warmstart.optim.clip_norm, learner.step(gradient)
        yield f"step {step}: norm before clipping", [repr(norm)]
        yield f"step {step}: clipped gradient", [g * min(1.0, limit / norm) for g in gradient.parameters]
        yield f"step {step}: weights", list(model.parameters())

    yield "sampled tokens, flat rows", _sampled(ROWS, len(vocabulary.classes.allowed[0]), spread=3.0)
    yield "sampled tokens, long tails", _sampled(8, VOCABULARY, spread=6.0)
    engine = build_engine(config, model)
    episodes = play(engine, loop.plays(config, bank, 0)[:ROLLOUTS], config.seed, config.rollout.temperature)
    inputs = [torch.cat([e.tokens for e in episodes]), torch.cat([e.codes for e in episodes])]
    yield "episodes", [*inputs, concatenate(episodes, "logprob"), concatenate(episodes, "digest")]
    judged = RewardSource.load(config.scenarios, config.source).judge(episodes)
    yield "rewards", [on_axis for rewards in judged.rules for on_axis in rewards.axes.values()]
    yield "advantages", token_weights(episodes, judged.acting, [], config.rl, {}).weights


def _sampled(rows: int, vocab: int, spread: float) -> list[Tensor]:
    """Tokens, log-probs and digests drawn from rows of evenly spaced logits in a scrambled order."""
    place = torch.arange(rows * vocab, dtype=torch.int64).view(rows, vocab) * 2_654_435_761 % 65_537
    logits = place.float() * (spread / 65_536)
    allowed, row_class = torch.ones(1, vocab, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    key = torch.arange(rows) * 0x9E3779B97F4A7
    logits, key, allowed, row_class = (x.to(dispatch.device()) for x in (logits, key, allowed, row_class))
    return list(ops.sample(logits, 1.0, key, allowed, row_class))


def _digest(arrays: Iterable[Array]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        if isinstance(array, str):
            digest.update(array.encode())
        else:
            digest.update(
                np.ascontiguousarray(array.detach().cpu().numpy() if isinstance(array, Tensor) else array).tobytes()
            )
    return digest.hexdigest()


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first stage of both whose digests differ; None when all are equal. ``one``, ``other``: stage -> digest."""
    return next((name for name in one if name in other and one[name] != other[name]), None)


def compared(current: Mapping[str, Any], earlier: Mapping[str, Any], file: str) -> Finding:
    """The verdict on two fingerprints; ``file``: the earlier one's name."""
    now, before = current["stages"], earlier["stages"]
    if earlier["contract_id"] != current["contract_id"]:
        return Finding(Verdict.NOT_COMPARABLE, f"not comparable: {file} is of contract {earlier['contract_id']}")
    both = now.keys() & before.keys()
    if stage := first_difference(now, before):
        return Finding(Verdict.DIFFERENT, f"different from {file}, first in: {stage}")
    if alone := [name for name in [*now, *before] if name not in both]:
        return Finding(
            Verdict.NOTHING_COMPARED,
            f"nothing compared: {file} has other stages; {len(both)} in common, all equal; {len(alone)} in one alone",
        )
    return Finding(Verdict.of(len(both), 0), f"equal to {file} in every stage, {len(both)} of {len(now)}")


def parser() -> Parser:
    parser = Parser("rl.fingerprint", __doc__)
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write the digests to FILE")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with an earlier FILE")
    add_device(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Raises SystemExit with the verdict's status unless ``--against`` is equal, MetronomeError for a file that cannot
    be read."""
    given = parser().parse_args(arguments)
    Placement.enter(PlacementConfig(given.device), "float32")
    earlier = None if given.against is None else _read(given.against)
    with ranks.joined():
        if ranks.world() != 1:
            raise MetronomeError(f"a fingerprint is of one process, not {ranks.world()}: start it without a launcher")
        current = fingerprint()
    if given.json is not None:
        write_json(given.json, current)
    print(f"contract {current['contract_id']}, {current['instruction_set']}, {current['processor']}")
    for name, digest in current["stages"].items():
        print(f"{name:38s} {digest}")
    if earlier is None:
        return
    found = compared(current, earlier, f"{given.against} ({earlier['processor']})")
    print(found.headline)
    leave(found.verdict, "mismatch")


def _read(path: Path) -> dict[str, Any]:
    try:
        return asdict(read_record(path, _Fingerprint))
    except UnreadableError as error:
        raise MetronomeError(
            f"{path}: cannot be read as a fingerprint ({error.problem}); name one that `python -m rl.fingerprint "
            "--json` wrote"
        ) from error


@dataclass(frozen=True)
class _Fingerprint:
    """What is read of a file of `fingerprint`."""

    contract_id: str
    stages: dict[str, str]
    processor: str = "another machine"
