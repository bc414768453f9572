"""An observation has one form, and what the model has no sense for is refused before anything moves."""

from __future__ import annotations

import pytest
import torch

from kernels.errors import MetronomeError
from rollout.engines.embedded import SessionEngine
from rollout.turn.observation import MissingSenseError, Observation, audio_observations, stack_audio
from rollout.turn.vocabulary import Vocabulary
from tests.support.models import fresh_model

SILENCE = torch.zeros(3200)


@pytest.mark.parametrize("audio", [torch.zeros(1600), torch.zeros(1, 3200), SILENCE.double(), SILENCE.half()])
def test_audio_of_another_form_is_refused(audio: torch.Tensor) -> None:
    Observation(SILENCE)
    with pytest.raises(ValueError, match=r"audio must be float32 \[3200\]"):
        Observation(audio)


@pytest.mark.parametrize("shape", [(3, 8, 8, 3), (8, 8, 3), (1, 8, 8, 4)])
def test_frames_of_another_form_are_refused(shape: tuple[int, ...]) -> None:
    Observation(SILENCE, torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="frames must be uint8"):
        Observation(SILENCE, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"frames must be uint8 .* not torch\.float32"):
        Observation(SILENCE, torch.zeros(1, 8, 8, 3))


def test_audio_comes_back() -> None:
    audio = torch.randn(3, 3200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stack_audio(audio_observations(audio)), audio)


def test_an_engine_without_room_for_a_sense_says_so_and_no_session_moves() -> None:
    model = fresh_model()
    engine = SessionEngine(model, Vocabulary.build(model.vocab), slots=2, max_tokens=64)
    sessions = [engine.open(0), engine.open(1)]
    picture = torch.zeros(1, 40, 40, 3, dtype=torch.uint8)
    for unknown, says in (
        (Observation(SILENCE, picture), r"cut into 9 patches, but .* no video \(max_patches is 0\)"),
        (Observation(SILENCE, events=("four", "one two")), "have 3 words, but .* room for 0"),
    ):
        with pytest.raises(MissingSenseError, match=says) as error:
            engine.append(sessions, [Observation(SILENCE), unknown])
        assert isinstance(error.value, MetronomeError)
    assert [session.chunks for session in sessions] == [0, 0]
    engine.append(sessions, [Observation(SILENCE)] * 2)  # the control: what it can hear, it hears
    assert [session.chunks for session in sessions] == [1, 1]
