"""What a voice costs: the flow head's share of a speaking micro-turn, and how many sessions can speak in real time.

Every session speaks in every micro-turn: the mode *listen* is not allowed. The whole micro-turn is timed, from sound in
to sound out, and the head alone, from hidden states to chunks, on as many rows.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from model.backbone.transformer import InteractionModel
from model.config import Preset, preset, with_voice
from model.logprob import MODE, TokenClasses
from model.voice.chain import draw
from model.voice.config import VoiceConfig
from rollout.bench.timing import seconds
from rollout.engines.embedded import SessionEngine
from rollout.turn.grammar import OWN_ROWS, context_rows
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary

CASES: tuple[tuple[Preset, int], ...] = (("base", 1), ("tiny", 1), ("tiny", 32), ("tiny", 64), ("tiny", 96))
"""Models and numbers of sessions that speak at once."""
REAL_TIME_MS = 200.0


@dataclass(frozen=True)
class VoiceSpeed:
    """Milliseconds for one micro-turn of all sessions."""

    preset: str
    sessions: int
    turn_ms: float  # median
    p99_ms: float
    head_ms: float  # of it, the flow head with its noise and log-probs: median

    @property
    def share(self) -> float:
        return self.head_ms / self.turn_ms

    @property
    def real_time(self) -> bool:
        return self.p99_ms < REAL_TIME_MS


def measure_voice(ticks: int) -> list[VoiceSpeed]:
    """One for each of CASES; ``ticks``: micro-turns."""
    return [_measure(name, sessions, ticks) for name, sessions in CASES]


def _measure(name: Preset, count: int, ticks: int) -> VoiceSpeed:
    model = InteractionModel(with_voice(preset(name), VoiceConfig()))
    model.init_weights(0)
    model.pack()
    head = model.voice_head
    assert head is not None
    vocabulary, warm = Vocabulary.of(model), 3
    allowed = vocabulary.classes.allowed.clone()
    allowed[MODE, vocabulary.listen] = False
    speaking = replace(vocabulary, classes=TokenClasses(allowed))
    engine = SessionEngine(model, speaking, slots=count, max_tokens=context_rows(ticks + warm, 1, OWN_ROWS))
    sessions = [engine.open(key) for key in range(count)]
    heard = [Observation(torch.zeros(3200))] * count
    hidden, keys = torch.zeros(count, model.text.hidden_size), torch.arange(count)

    def alone() -> None:
        with torch.inference_mode():
            draw(head, hidden, keys)

    turns, heads = [], []
    for k in range(ticks + warm):
        turn, by_head = seconds(partial(engine.append, sessions, heard)), seconds(alone)
        if k >= warm:
            turns.append(1000 * turn)
            heads.append(1000 * by_head)
    p99 = float(np.percentile(turns, 99))
    result = VoiceSpeed(name, count, statistics.median(turns), p99, statistics.median(heads))
    print(
        f"{name}, {count} sessions that speak: {result.turn_ms:.1f} ms a micro-turn (p99 {p99:.1f}), the flow head "
        f"{result.head_ms:.1f} ms, {100 * result.share:.0f} % of it{'' if result.real_time else ': not in real time'}"
    )
    return result
