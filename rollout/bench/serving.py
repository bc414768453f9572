"""Serving of streaming sessions: small prefills that alternate with 1 to 5 decode steps.

- `measure_shapes`: latency and throughput of 1, 8, 32 and 128 sessions with up to one word a chunk (as in the
  quickstart) and up to four.
- `measure_real_time`: how many sessions can run until the p99 latency of a chunk exceeds its 200 ms.
- `measure_turns`: latency of a micro-turn 10, 30 and 60 s into a session, compared with computing the whole prefix.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import Segments
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from model.senses.video import Patches
from rollout.bench.crowd import Crowd, Served, embedded, served, tiny_model
from rollout.bench.timing import seconds
from rollout.turn.action import CHUNK_MS, CHUNKS_PER_SECOND

SESSIONS = (1, 8, 32, 128)
WORDS = (1, 4)
SESSION_S = (10, 30, 60)
WARM_TICKS = 10
JOIN = 64  # sessions opened at a time in `measure_real_time`
MOST_SESSIONS = 640


@dataclass(frozen=True)
class Shape:
    """Result with up to ``words_per_chunk`` words in a micro-turn."""

    words_per_chunk: int
    served: Served


@dataclass(frozen=True)
class TurnSpeed:
    """Latency of one micro-turn, at ``session_s`` seconds into a session."""

    session_s: int
    session_ms: float
    resend_ms: float  # of computing the whole prefix from nothing


def measure_shapes(ticks: int) -> list[Shape]:
    """``ticks`` micro-turns for each number of sessions and of words."""
    model = tiny_model()
    shapes = []
    for words in WORDS:
        print(f"micro-turns of up to {words} words, all sessions at once:")
        for sessions in SESSIONS:
            crowd = Crowd(embedded(model, sessions, WARM_TICKS + ticks, words))
            crowd.join(sessions)
            served(crowd, WARM_TICKS)
            shapes.append(Shape(words, served(crowd, ticks)))
            print(shapes[-1].served)
    return shapes


def measure_real_time(ticks: int) -> list[Served]:
    """Opens `JOIN` more sessions every ``ticks`` micro-turns, until the p99 latency exceeds `CHUNK_MS` or there are
    `MOST_SESSIONS`; one result for each number of sessions. The oldest sessions are minutes long at the end."""
    crowd = Crowd(embedded(tiny_model(), MOST_SESSIONS, ticks * MOST_SESSIONS // JOIN))
    results: list[Served] = []
    while len(crowd.sessions) < MOST_SESSIONS and not (results and results[-1].p99_ms > CHUNK_MS):
        crowd.join(JOIN)
        results.append(served(crowd, ticks))
        print(results[-1])
    return results


def holds_real_time(results: list[Served]) -> int:
    """The largest number of sessions whose p99 latency was within a chunk's length."""
    return max((r.sessions for r in results if r.p99_ms <= CHUNK_MS), default=0)


def measure_turns(rounds: int) -> list[TurnSpeed]:
    """Medians over ``rounds`` at each length of one session; the two ways alternate."""
    model = tiny_model()
    crowd = Crowd(embedded(model, 1, SESSION_S[-1] * CHUNKS_PER_SECOND + rounds * len(SESSION_S)))
    crowd.join(1)
    session = crowd.sessions[0]
    results = []
    for length_s in SESSION_S:
        while session.chunks < length_s * CHUNKS_PER_SECOND:
            crowd.tick()
        taken = [(crowd.tick(), resend_s(model, session.tokens, session.codes.flatten(0, 1))) for _ in range(rounds)]
        results.append(TurnSpeed(length_s, *(1000 * statistics.median(column) for column in zip(*taken, strict=True))))
        last = results[-1]
        print(f"{length_s:3d} s in: micro-turn {last.session_ms:6.2f} ms, the prefix again {last.resend_ms:7.1f} ms")
    return results


@torch.inference_mode()
def resend_s(model: InteractionModel, tokens: list[int], codes: Tensor) -> float:
    """Seconds to the logits after the whole sequence, computed from nothing."""

    def whole() -> Tensor:
        segments = Segments.build([0], [0], [len(tokens)])
        dark = Patches.none(model.senses.patch)
        inputs = Inputs.of(torch.tensor(tokens), codes, dark, segments, model.senses)
        return model.logits(model(inputs)[-1:])

    return seconds(whole)
