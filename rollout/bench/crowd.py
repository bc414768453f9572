"""Load for the serving benches: many streaming sessions on one engine, timed.

All sessions get their next 200 ms at the same time, the worst case for latency: one tick is a small prefill of every
session, then the decode steps of those that speak. The input is noise. The weights are random ones of the tiny preset,
which speak in about two of three chunks (a trained policy in one of ten), so decoding has more than its usual part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from kernels import dispatch
from model.backbone.transformer import InteractionModel
from model.config import preset
from rollout.bench.timing import seconds
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
    """Sessions whose input is noise, and which take their micro-turns together."""

    engine: Engine
    sessions: list[Session] = field(default_factory=list)
    noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def join(self, count: int) -> None:
        """Opens ``count`` more sessions."""
        for _ in range(count):
            self.sessions.append(self.engine.open(session_key(0, "bench", len(self.sessions))))

    def leave(self) -> None:
        """Closes all sessions."""
        while self.sessions:
            self.engine.close(self.sessions.pop())

    def tick(self) -> float:
        """Runs one micro-turn of all sessions; returns the seconds until all actions are there."""
        observations = audio_observations(0.05 * torch.randn(len(self.sessions), CHUNK_SAMPLES, generator=self.noise))
        return seconds(partial(self.engine.append, self.sessions, observations))

    def sampled(self) -> int:
        """Number of tokens that its sessions have sampled so far."""
        return sum(len(session.logprob) for session in self.sessions)


@dataclass(frozen=True)
class Served:
    """Latency and throughput."""

    sessions: int
    p50_ms: float  # latency of a tick, and so of each chunk
    p99_ms: float
    chunks_per_s: float
    tokens_per_s: float  # sampled tokens
    tokens_per_chunk: float  # sampled tokens; 1 if all listen

    def __str__(self) -> str:
        return (
            f"{self.sessions:4d} sessions: p50 {self.p50_ms:7.2f} ms, p99 {self.p99_ms:7.2f} ms, "
            f"{self.chunks_per_s:6.0f} chunks/s, {self.tokens_per_s:6.0f} sampled tokens/s "
            f"({self.tokens_per_chunk:.2f} a chunk)"
        )


def served(crowd: Crowd, ticks: int) -> Served:
    """Runs and times ``ticks`` micro-turns of all sessions."""
    before = crowd.sampled()
    taken = [crowd.tick() for _ in range(ticks)]
    total_s, chunks, tokens = sum(taken), ticks * len(crowd.sessions), crowd.sampled() - before
    p50, p99 = (1000 * float(np.percentile(taken, q)) for q in (50, 99))
    return Served(len(crowd.sessions), p50, p99, chunks / total_s, tokens / total_s, tokens / chunks)


def tiny_model() -> InteractionModel:
    """The tiny preset with random weights, packed, on the backend's device."""
    model = InteractionModel(preset("tiny"))
    model.init_weights(0)
    model.to(dispatch.device())
    model.pack()
    return model


def embedded(model: InteractionModel, slots: int, ticks: int, words_per_chunk: int = 1) -> SessionEngine:
    """The embedded engine with context for ``ticks`` micro-turns of each session."""
    return SessionEngine(
        model,
        Vocabulary.of(model),
        slots=slots,
        max_tokens=context_rows(ticks, words_per_chunk),
        words_per_chunk=words_per_chunk,
    )
