"""``python -m rollout.vllm.bench``: what going through vLLM costs, in process, apart from our own arithmetic.

Tiny preset, noise for sound, one text token a turn; 1, 8 and 32 sessions, chunk after chunk. *Ours* is the time inside
`Policy` and `RowSampler`; the rest of vLLM's chunk is its scheduler, its model runner and the hand-over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from model.config import preset
from model.transformer import InteractionModel
from rollout.chunk import CHUNK_SAMPLES
from rollout.engine import Engine
from rollout.sampler import session_key
from rollout.session import SessionEngine
from rollout.vllm.engine import VllmEngine
from rollout.vocabulary import Vocabulary

WARM, CHUNKS = 5, 40
SESSIONS = (1, 8, 32)


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


def chunk_ms(engine: Engine, count: int, watch: Stopwatch) -> tuple[float, float]:
    """Milliseconds a chunk (of all ``count`` sessions together), and those of them on the stopwatch."""
    sessions = [engine.open(session_key(0, "bench", i)) for i in range(count)]
    sound = 0.1 * torch.randn(count, CHUNK_SAMPLES, generator=torch.Generator().manual_seed(0))
    start, before = 0.0, 0.0
    for k in range(WARM + CHUNKS):
        if k == WARM:
            start, before = time.perf_counter(), watch.seconds
        engine.append(sessions, sound)
    taken, inside = time.perf_counter() - start, watch.seconds - before
    for session in sessions:
        engine.close(session)
    return 1e3 * taken / CHUNKS, 1e3 * inside / CHUNKS


def main() -> None:
    model = InteractionModel(preset("tiny"))
    model.init_weights(0)
    model.pack()
    vocabulary, sizes = Vocabulary.build(model.vocab), {"slots": max(SESSIONS), "max_tokens": 512}
    embedded, vllm = SessionEngine(model, vocabulary, **sizes), VllmEngine(model, vocabulary, **sizes)
    from rollout.vllm.policy import Policy
    from rollout.vllm.sampling import RowSampler

    watch = Stopwatch()
    watch.around(Policy, "embed_multimodal", "embed_input_ids", "forward", "compute_logits")
    watch.around(RowSampler, "apply")
    print(f"{torch.get_num_threads()} threads; ms a chunk of all sessions\nsessions embedded vllm ours vllm's own")
    for count in SESSIONS:
        alone, _ = chunk_ms(embedded, count, watch)
        through, ours = chunk_ms(vllm, count, watch)
        print(f"{count:8} {alone:8.2f} {through:4.2f} {ours:4.2f} {through - ours:10.2f}", flush=True)
    vllm.core.close()


if __name__ == "__main__":
    main()
