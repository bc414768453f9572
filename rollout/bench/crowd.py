"""A crowd of streaming sessions on any engine, timed: what the serving benches share.

All sessions get their next 200 ms at the same moment, the worst case for latency: one tick is a small prefill of every
session and then the decode steps of those that speak. Sound is noise, weights are random ones of the tiny preset, which
speak in about two of three chunks (a trained policy: in one of ten), so that decoding is not flattered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from model.backbone.transformer import InteractionModel
from model.config import preset
from rollout.engines.embedded import SessionEngine
from rollout.engines.engine import Engine
from rollout.engines.session import Session
from rollout.seeds import session_key
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.grammar import context_rows
from rollout.turn.observation import audio_observations
from rollout.turn.vocabulary import Vocabulary


@dataclass
class Crowd:
    """Sessions that hear noise together."""

    engine: Engine
    sessions: list[Session] = field(default_factory=list)
    noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def join(self, count: int) -> None:
        """Opens ``count`` more sessions."""
        for _ in range(count):
            self.sessions.append(self.engine.open(session_key(0, "bench", len(self.sessions))))

    def leave(self) -> None:
        while self.sessions:
            self.engine.close(self.sessions.pop())

    def tick(self) -> float:
        """One micro-turn of all; seconds from the chunks' arrival to the last action."""
        observations = audio_observations(0.05 * torch.randn(len(self.sessions), CHUNK_SAMPLES, generator=self.noise))
        begin = time.perf_counter()
        self.engine.append(self.sessions, observations)
        return time.perf_counter() - begin

    def sampled(self) -> int:
        """Tokens sampled so far by the sessions here."""
        return sum(len(session.logprob) for session in self.sessions)


@dataclass(frozen=True)
class Served:
    """How a crowd was served."""

    sessions: int
    p50_ms: float  # latency of a tick, which is that of each of its chunks
    p99_ms: float
    chunks_per_s: float
    tokens_per_s: float  # sampled ones
    tokens_per_chunk: float  # 1 where all listen

    def __str__(self) -> str:
        return (
            f"{self.sessions:4d} sessions: p50 {self.p50_ms:7.2f} ms, p99 {self.p99_ms:7.2f} ms, "
            f"{self.chunks_per_s:6.0f} chunks/s, {self.tokens_per_s:6.0f} sampled tokens/s "
            f"({self.tokens_per_chunk:.2f} a chunk)"
        )


def served(crowd: Crowd, ticks: int) -> Served:
    """Serves the crowd for ``ticks`` micro-turns."""
    before = crowd.sampled()
    taken = [crowd.tick() for _ in range(ticks)]
    total_s, chunks, tokens = sum(taken), ticks * len(crowd.sessions), crowd.sampled() - before
    p50, p99 = (1000 * float(np.percentile(taken, q)) for q in (50, 99))
    return Served(len(crowd.sessions), p50, p99, chunks / total_s, tokens / total_s, tokens / chunks)


def tiny_model() -> InteractionModel:
    model = InteractionModel(preset("tiny"))
    model.init_weights(0)
    model.pack()
    return model


def embedded(model: InteractionModel, slots: int, ticks: int, words_per_chunk: int = 1) -> SessionEngine:
    """This project's engine with room for ``ticks`` micro-turns of each session."""
    return SessionEngine(
        model,
        Vocabulary.build(model.vocab),
        slots=slots,
        max_tokens=context_rows(ticks, words_per_chunk),
        words_per_chunk=words_per_chunk,
    )
