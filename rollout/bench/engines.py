"""The embedded engine beside vLLM's in process, both with our model, kernels and weights, at 1 and 32 sessions.

Of vLLM's time the part inside our own model and sampler (*ours*) is told apart: the rest is its scheduler, its model
runner and the hand-over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model.backbone.transformer import InteractionModel
from rollout.bench.crowd import Crowd, embedded, served, tiny_model
from rollout.engines.engine import Engine
from rollout.turn.grammar import context_rows
from rollout.turn.vocabulary import Vocabulary

SESSIONS = (1, 32)
WARM_TICKS = 10


@dataclass(frozen=True)
class EngineSpeed:
    """A tick's median latency, all sessions together."""

    sessions: int
    embedded_ms: float
    vllm_ms: float
    ours_ms: float  # of vllm_ms, inside our model and sampler

    @property
    def times(self) -> float:
        return self.vllm_ms / self.embedded_ms


class Stopwatch:
    """Seconds spent inside the methods it was put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: type, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def vllm_engine(model: InteractionModel, slots: int, ticks: int) -> Engine:
    """vLLM's engine in this process, with the room that `embedded` has."""
    from rollout.engines.vllm.engine import VllmEngine

    max_tokens = context_rows(ticks, words_per_chunk=1)
    return VllmEngine(model, Vocabulary.build(model.vocab), slots=slots, max_tokens=max_tokens)


def measure_engines(rounds: int, ticks: int) -> list[EngineSpeed]:
    """Rounds of ``ticks`` micro-turns alternate, so that a busy moment of the machine hits both."""
    from rollout.engines.vllm.policy import Policy
    from rollout.engines.vllm.sampling import RowSampler

    watch, model = Stopwatch(), tiny_model()
    watch.around(Policy, "embed_multimodal", "embed_input_ids", "forward", "compute_logits")
    watch.around(RowSampler, "apply")
    return [_measure(model, watch, sessions, rounds, ticks) for sessions in SESSIONS]


def _measure(model: InteractionModel, watch: Stopwatch, sessions: int, rounds: int, ticks: int) -> EngineSpeed:
    """Both engines end with this call: vLLM runs once a process."""
    length = WARM_TICKS + rounds * ticks
    crowds = [Crowd(make(model, sessions, length)) for make in (embedded, vllm_engine)]
    for crowd in crowds:
        crowd.join(sessions)
        served(crowd, WARM_TICKS)
    before = watch.seconds
    taken = [[served(crowd, ticks).p50_ms for crowd in crowds] for _ in range(rounds)]
    ours_ms = 1000 * (watch.seconds - before) / (rounds * ticks)
    for crowd in crowds:
        crowd.leave()
    embedded_ms, vllm_ms = (statistics.median(column) for column in zip(*taken, strict=True))
    found = EngineSpeed(sessions, embedded_ms, vllm_ms, ours_ms)
    print(
        f"{sessions:3d} sessions: embedded {found.embedded_ms:7.2f} ms a tick, vLLM {found.vllm_ms:7.2f} ms "
        f"({found.times:.1f} times), {found.ours_ms:7.2f} ms of that inside our model and sampler",
        flush=True,
    )
    return found
