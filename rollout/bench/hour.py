"""``python -m rollout.bench.hour [--chunks N] [--json FILE] [--picture FILE]``: one session that goes on for an hour.

A session of the tiny preset whose global layers attend to the first tokens and a window (`model.context`) takes 18,000
micro-turns of noise, with a noisy picture every second, one after another, in the embedded engine. Once its windows are
full it must neither slow down nor grow: measured are the time of every micro-turn, what the process holds, and what the
session's state and record hold.

Afterwards the whole episode goes through the model at once, without a cache, as in the learner: log-probs and row
digests of all sampled tokens must equal the sampler's. Exit status 1 when that or another check fails (`problems`).

Times are of micro-turns in which the model speaks, the lower quartile of many, and of the processor (on a GPU the
clock's). What else runs on the machine still moves them by more than the tenth that is allowed, so the last tenth of
the hour alternates with micro-turns of a young session whose windows have just become full, and is compared with these.

The session's record is its episode, which somebody wants: it grows by a stated number of bytes a micro-turn, and
nothing else may. Weights are random.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rollout.bench.hour")

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from kernels.layout import SPLIT_TOKENS
from kernels.tools.device_time import wait
from model.backbone.state import state_bytes
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.context import ContextConfig, give
from model.inputs import Inputs
from model.placement import Placement, PlacementConfig, add_device
from model.program.arguments import Parser
from model.program.files import write_json, write_whole
from model.program.memory import resident_bytes
from model.program.outputs import output_file
from model.program.ranges import Multiples, Range, number
from rollout.bench.hour_result import SLOWER, Hour, Point
from rollout.engines.embedded import SessionEngine
from rollout.engines.session import Session
from rollout.record.episode import Episode
from rollout.seeds import session_key
from rollout.turn.action import CHUNK_SAMPLES, CHUNKS_PER_SECOND, Action
from rollout.turn.grammar import context_rows
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary

HOUR = 18_000  # micro-turns of 200 ms
PICTURE, PATCHES = (1, 31, 31, 3), 4  # a frame's shape, and what it is cut into
POINTS = 100  # of the picture, and at which memory is measured


class Timed:
    """One session of noise, and what its micro-turns took, in ms."""

    def __init__(self, engine: SessionEngine, number: int) -> None:
        self.engine, self.session = engine, engine.open(session_key(0, "hour", number))
        self.taken: list[float] = []
        self._noise = torch.Generator().manual_seed(number)

    def tick(self) -> None:
        observation = heard(len(self.taken), self._noise)
        begin = _now()
        self.engine.append([self.session], [observation])
        self.taken.append(1000 * (_now() - begin))

    def fill(self, rows: int) -> None:
        """Micro-turns until it has so many rows."""
        while len(self.session.tokens) < rows:
            self.tick()

    def cost(self, first: int, end: int | None = None) -> float:
        """Lower quartile over those of the micro-turns first … end - 1 in which the model spoke; NaN for none."""
        turns = zip(self.taken[first:end], self.session.actions[first:end], strict=True)
        spoken = [t for t, action in turns if action.words]
        return float(np.quantile(spoken, 0.25)) if spoken else math.nan


def measure(chunks: int, context: ContextConfig) -> Hour:
    """One session over ``chunks`` micro-turns. Raises MetronomeError when they are too few to fill the windows and
    leave a tenth after that and before the last one."""
    model = InteractionModel(give(preset("tiny"), context))
    model.init_weights(0)
    model.to(dispatch.device())
    model.requires_grad_(False)
    model.pack()
    engine = SessionEngine(
        model, Vocabulary.of(model), slots=2, max_tokens=context_rows(chunks, 1, PATCHES), max_patches=PATCHES
    )
    places, old = _addresses(engine), Timed(engine, 0)
    enough, tenth, every = context.first + context.window, chunks // 10, max(1, chunks // POINTS)
    points: list[Point] = []
    full = 0
    while len(old.taken) < chunks - tenth:
        old.tick()
        if not full and len(old.session.tokens) >= enough:
            full = len(old.taken)
        if len(old.taken) % every == 0:
            points.append(_point(old, every))
    settled = [p for p in points if full and p.chunks > full + tenth]
    if len(settled) < 2:
        after = f"after {full}" if full else f"at {enough} rows, and it had {len(old.session.tokens)}"
        raise MetronomeError(f"--chunks {chunks}: too few; the session's windows were full {after}")
    freed = engine.state.global_pages_freed
    young = Timed(engine, 1)
    young.fill(enough)
    before = len(young.taken)
    for _ in range(tenth):
        old.tick()
        young.tick()
    episode = old.session.episode(scenario="hour", rollout=0, seed=0, facts={})
    first, last = settled[0], settled[-1]
    span = last.chunks - first.chunks
    return Hour(
        "tiny", context.first, context.window, chunks, len(episode.tokens), full, old.cost(full, full + tenth),
        old.cost(chunks - tenth), young.cost(before),
        state_bytes(model.config, 1, engine.state.max_tokens, model.dtype, engine.state.max_rows),
        _addresses(engine) != places, freed,
        span, (last.record_bytes - first.record_bytes) / span, (last.process_bytes - first.process_bytes) / span,
        len(episode.text.logprob), unequal(model, engine.vocabulary, episode), tuple(points),
    )  # fmt: skip


def heard(chunk: int, noise: torch.Generator) -> Observation:
    """What micro-turn ``chunk`` brings: 200 ms of noise, and every second a picture."""
    audio = 0.05 * torch.randn(CHUNK_SAMPLES, generator=noise)
    if chunk % CHUNKS_PER_SECOND:
        return Observation(audio)
    return Observation(audio, torch.randint(0, 256, PICTURE, generator=noise, dtype=torch.uint8))


@torch.inference_mode()
def unequal(model: InteractionModel, vocabulary: Vocabulary, episode: Episode) -> int:
    """Sampled tokens of the episode with another log-prob or row digest when all rows go through the model at once."""
    row = episode.text.sampled_at - 1
    hidden = model(Inputs.cat([episode], model.senses))
    logits = model.logits(hidden[row.to(model.device)])
    target = episode.tokens[episode.text.sampled_at]
    logprob, _, digest = vocabulary.classes.logprob(logits, target, episode.text.row_class, 1.0)
    differs = logprob.cpu().view(torch.int32) != episode.text.logprob.view(torch.int32)
    return int((differs | (digest.cpu() != episode.text.digest)).sum())


def _now() -> float:
    """Seconds of the processor's time; on a GPU, of the clock, when it has done what was asked of it."""
    if dispatch.device().type == "cpu":
        return time.process_time()
    wait(dispatch.device())
    return time.perf_counter()


def _point(timed: Timed, every: int) -> Point:
    engine, session = timed.engine, timed.session
    (table,) = (
        x.kv.table for x, layer in zip(engine.state.layers, engine.model.layers, strict=True) if layer.is_global
    )
    return Point(
        session.chunks, len(session.tokens), timed.cost(session.chunks - every), resident_bytes(),
        record_bytes(session), int((table[session.slot] >= 0).sum()),
    )  # fmt: skip


def record_bytes(session: Session) -> int:
    """What the session's record holds: the bytes of codes and pixels, and of lists each object once, as Python counts
    them."""
    lists = session.tokens, session.actions, session.sampled, session.logprob, session.digest, session.shown
    seen: set[int] = set()
    left: list[object] = list(lists)
    total = session.sound.nbytes + session.pixels.nbytes
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        total += sys.getsizeof(one)
        if isinstance(one, list | tuple):
            left += one
        elif isinstance(one, Action):
            left += vars(one).values()
    return total


def _addresses(engine: SessionEngine) -> list[int]:
    layers = zip(engine.state.layers, engine.state.conv_windows, strict=True)
    return [x.data_ptr() for layer, past in layers for x in (layer.kv.key, layer.kv.value, layer.kv.table, *past)]


def parser() -> Parser:
    parser = Parser("rollout.bench.hour", __doc__)
    whole = number(int, Range(100, 10**6))
    parser.add_argument("--chunks", type=whole, default=HOUR, help=f"micro-turns of 200 ms (default: {HOUR:,})")
    for name, usual, limit in (
        ("first", 64, Multiples(0, 2**20, of=SPLIT_TOKENS)),
        ("window", 4096, Multiples(SPLIT_TOKENS, 2**20, of=SPLIT_TOKENS)),
    ):
        about = f"tokens, a multiple of {SPLIT_TOKENS} (default: {usual})"
        parser.add_argument(f"--{name}", type=number(int, limit), default=usual, help=about)
    parser.add_argument("--json", type=output_file(), metavar="FILE", help="write the result to FILE")
    parser.add_argument("--picture", type=output_file(), metavar="FILE", help="write a picture (PNG) to FILE")
    add_device(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    Placement.enter(PlacementConfig(given.device), "float32")
    result = measure(given.chunks, ContextConfig("window", given.first, given.window))
    print(
        f"tiny, first {result.first}, window {result.window}: {result.chunks} chunks, {result.rows} rows, "
        f"{result.chunks / 300:.0f} minutes; windows full after {result.full_chunks} chunks\n"
        f"  {result.begin_ms:.3f} ms a chunk then, {result.end_ms:.3f} in the last tenth, {result.young_ms:.3f} beside "
        f"it in a young session ({result.end_ms / result.young_ms - 1:+.1%})\n"
        f"  state {result.state_bytes:,} bytes, {result.pages_freed} pages of the global layer given away; the record "
        f"grows by {result.record_bytes_per_chunk:,.0f} bytes a chunk, the process by "
        f"{result.process_bytes_per_chunk:,.0f}\n"
        f"  {result.unequal} of {result.tokens} tokens unequal in one pass over all rows",
        flush=True,
    )
    if given.json is not None:
        write_json(given.json, {"contract_id": dispatch.contract_id(), "hour": asdict(result)}, indent=1)
    if given.picture is not None:
        from rollout.bench.pictures import hour_picture  # matplotlib takes a second

        write_whole(Path(given.picture), hour_picture(result, SLOWER))
    for problem in (problems := result.problems()):
        print(f"failed: {problem}")
    if problems:
        raise SystemExit(1)
