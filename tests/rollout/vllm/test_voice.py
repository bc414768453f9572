"""A model with a voice in vLLM: the bits of the embedded engine, sound and forks included."""

from __future__ import annotations

import pytest
import torch

from rollout.engines.embedded import SessionEngine
from rollout.engines.engine import Engine
from rollout.engines.session import Session
from rollout.record.episode import Episode, tensors
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary
from tests.support.models import speaking_model

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from rollout.engines.vllm.engine import VllmEngine  # noqa: E402

CHUNKS = 10
SIZES = {"slots": 6, "max_tokens": 200, "words_per_chunk": 2, "max_patches": 12}


def observation(chunk: int) -> Observation:
    """A picture in every third chunk, so that own sound stands before patches, too."""
    generator = torch.Generator().manual_seed(chunk)
    frames = torch.randint(256, (int(chunk % 3 == 1), 31, 40, 3), generator=generator, dtype=torch.uint8)
    return Observation(0.1 * torch.randn(3200, generator=generator), frames)


def play(engine: Engine) -> list[Session]:
    sessions = [engine.open(key) for key in (1, 2, 3)]
    for k in range(CHUNKS):
        if k == CHUNKS // 2:
            sessions += [engine.fork(session, 50 + i) for i, session in enumerate(sessions)]
        engine.append(sessions, [observation(k)] * len(sessions))
    for session in sessions:
        engine.close(session)
    return sessions


def episodes(sessions: list[Session]) -> list[Episode]:
    return [s.episode(scenario="some/train/0", rollout=0, seed=0, facts={}) for s in sessions]


@pytest.mark.parametrize("worker_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_has_the_embedded_engines_bits(worker_process: bool) -> None:
    """Control: with a head that is another by one weight the sound is another."""
    model = speaking_model()
    vocabulary = Vocabulary.of(model)
    wanted = episodes(play(SessionEngine(model, vocabulary, **SIZES)))
    assert all(e.voice is not None and len(e.own) for e in wanted) and any(len(e.frames.sizes) for e in wanted)
    engine = VllmEngine(model, vocabulary, worker_process=worker_process, prefill_tokens=24, **SIZES)
    try:
        for one, other in zip(wanted, episodes(play(engine)), strict=True):
            assert one.actions == other.actions
            assert all(torch.equal(x, tensors(other)[name]) for name, x in tensors(one).items())
        assert model.voice_head is not None
        with torch.no_grad():
            model.voice_head.leave.weight[0, 0] += 0.01
        model.mark_changed()
        engine.publish()
        changed = episodes(play(engine))
        assert not torch.equal(tensors(changed[0])["voice.payload"], tensors(wanted[0])["voice.payload"])
    finally:
        engine.core.close()
