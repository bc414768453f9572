"""The embedded engine beside vLLM's in process, both with our model, kernels and weights, at 1 and 32 sessions.

The part of vLLM's time that is spent in our model and sampler is reported too (``ours_ms``); the rest is its scheduler,
its model runner and the passing of data.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from model.backbone.transformer import InteractionModel
from rollout.bench.crowd import Crowd, embedded, served, tiny_model
from rollout.bench.timing import Stopwatch
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
        """vLLM's time over the embedded engine's."""
        return self.vllm_ms / self.embedded_ms


def vllm_engine(model: InteractionModel, slots: int, ticks: int) -> Engine:
    """vLLM's engine in this process, with the sizes of `embedded`."""
    from rollout.engines.vllm.engine import VllmEngine

    max_tokens = context_rows(ticks, words_per_chunk=1)
    return VllmEngine(model, Vocabulary.of(model), slots=slots, max_tokens=max_tokens)


def measure_engines(rounds: int, ticks: int) -> list[EngineSpeed]:
    """The engines take turns of ``ticks`` micro-turns, so that other load on the machine affects both."""
    from rollout.engines.vllm.policy import Policy
    from rollout.engines.vllm.sampling import RowSampler

    watch, model = Stopwatch(), tiny_model()
    for owner, name in (
        *((Policy, name) for name in ("embed_multimodal", "embed_input_ids", "forward", "compute_logits")),
        (RowSampler, "apply"),
    ):
        setattr(owner, name, watch.around(getattr(owner, name)))
    return [_measure(model, watch, sessions, rounds, ticks) for sessions in SESSIONS]


def _measure(model: InteractionModel, watch: Stopwatch, sessions: int, rounds: int, ticks: int) -> EngineSpeed:
    """Both engines are released at the end, because one process can have only one vLLM."""
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
    result = EngineSpeed(sessions, embedded_ms, vllm_ms, ours_ms)
    print(
        f"{sessions:3d} sessions: embedded {result.embedded_ms:7.2f} ms a tick, vLLM {result.vllm_ms:7.2f} ms "
        f"({result.times:.1f} times), {result.ours_ms:7.2f} ms of that inside our model and sampler",
        flush=True,
    )
    return result
