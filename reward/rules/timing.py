"""Formulas of timing: graded credit inside a window, and the benchmarks' take-over and latency.

Times are chunk indices; a chunk is 200 ms (`rollout.turn.action`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.turn.action import CHUNK_MS, Action


@dataclass(frozen=True)
class Run:
    """A stretch of chunks in which the model spoke without a break: chunks ``start`` to ``end - 1``."""

    start: int
    end: int

    @property
    def chunks(self) -> int:
        return self.end - self.start


def runs(actions: Sequence[Action]) -> list[Run]:
    """Every maximal stretch of speech, in order; ``actions`` [chunks]."""
    spoken = []
    start: int | None = None
    for k, action in enumerate(actions):
        if action.speaks and start is None:
            start = k
        elif not action.speaks and start is not None:
            spoken.append(Run(start, k))
            start = None
    if start is not None:
        spoken.append(Run(start, len(actions)))
    return spoken


def graded(error: int, half_width: int, edge: float) -> float:
    """Credit for acting ``error`` chunks from the best moment, in a window of ``half_width`` chunks on each side: 1
    at the centre, falling linearly to ``edge`` at the window's edge.

    In a window of one chunk the credit falls as in one of two chunks, so that an error of 200 ms costs little. Credit
    is not all or nothing, because policies then settle at the window's early edge."""
    return 1.0 - (1.0 - edge) * abs(error) / max(half_width, 2)


def half_width(interval: int, fraction: float) -> int:
    """Half the window around a due time, in chunks: a fraction of the interval, at least 1."""
    return max(1, round(interval * fraction))


def take_over(span_s: float, words: int) -> bool:
    """Whether an utterance takes the floor (take-over of Full-Duplex-Bench v1): unless it has no words, or is shorter
    than 1 s with at most 3 words."""
    return words > 0 and not (span_s < 1.0 and words <= 3)


def take_over_rate(takes: Sequence[bool]) -> float:
    """Full-Duplex-Bench's TOR: the share of items with a take-over. It should be low in pauses, high after the end of a
    turn or an interruption. Raises ValueError without items."""
    if not takes:
        raise ValueError("a take-over rate needs at least one item")
    return sum(takes) / len(takes)


def response_latency_s(turn_end: int, onset: int) -> float:
    """Response latency of Full-Duplex-Bench: time from the end of the user's turn to the model's first word, at least
    0. ``turn_end``: the user's last chunk; ``onset``: the model's first one; the next chunk has latency 0."""
    return max(0, onset - turn_end - 1) * CHUNK_MS / 1000


def stop_latency_s(interruption: int, run: Run) -> float:
    """Stop latency of Full-Duplex-Bench v1.5: how long the model's utterance ``run`` went on after the user began to
    interrupt it in chunk ``interruption``."""
    return max(0, run.end - interruption) * CHUNK_MS / 1000
