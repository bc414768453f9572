"""What was heard in a stored episode: both sides as sound, on one clock.

Time 0 is the beginning of chunk 0, and a chunk lasts 200 ms. What the model samples in chunk k, after all of chunk k
has arrived, is heard from the beginning of chunk k + 1, as `model.voice.sound.Speaker` streams it: `LATENCY_SAMPLES`
(30 ms) late.

An episode keeps dMel codes of the user's side, from which sound cannot be restored. But scenario and actions determine
what the user says, so the scenario's user is played again; the codes of that must be the episode's own. Where they are
not (a recipe or recordings that have changed, actions that were), the user's side is rebuilt from the codes by
Griffin-Lim, which is rough: 50 ms and 6 dB are the codes' steps.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast, get_args

import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import exact
from kernels.errors import MetronomeError
from model.config import MEL_BINS
from model.program.reading import one_line
from model.senses.audio import LOG10_MAX, LOG10_MIN, SAMPLE_RATE_HZ, DMel
from model.voice.mel import FRAMES, HOPS_PER_CODE, LOUDER
from model.voice.scale import MEAN, STD
from model.voice.sound import LATENCY_SAMPLES, Speaker
from rollout.record.episode import Episode, check_tensors
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import CHUNK_FRAMES, CHUNK_SAMPLES
from rollout.turn.observation import stack_audio
from rollout.world.speech import SpeechBank, Split


@dataclass(frozen=True, eq=False)
class Heard:
    """Both sides of an episode of N chunks, fp32 [(N + 1) * 3200 + 480] each, at 16 kHz; within -1 to 1."""

    user: Tensor
    voice: Tensor | None  # None: the episode has no sound of the model
    rough: str | None  # why the user's side is rebuilt from the codes; None: it is what the model heard
    clipped: int  # samples of the voice that were beyond full scale

    @property
    def stereo(self) -> Tensor:
        """fp32 [samples, 2]: left the user, right the model, silent where it has no voice."""
        return torch.stack((self.user, torch.zeros_like(self.user) if self.voice is None else self.voice), 1)


Again = Callable[[Episode], Tensor]
"""Plays an episode's user again: `user_sound` with the scenarios and recordings of the episode's run."""


def both_sides(episode: Episode, again: Again) -> Heard:
    """The episode's sound. Raises ValueError for an episode whose fields contradict each other, or without a chunk;
    what ``again`` raises becomes `Heard.rough`."""
    check_tensors(episode)
    chunks = len(episode.actions)
    if not chunks or len(episode.codes) != chunks * CHUNK_FRAMES:
        raise ValueError(f"{episode.name}: {chunks} chunks do not fit {len(episode.codes)} frames of audio")
    user, rough = _user(episode, again)
    user = F.pad(user, (0, CHUNK_SAMPLES + LATENCY_SAMPLES))
    if episode.voice is None:
        return Heard(user, None, rough, 0)
    voice = F.pad(streamed(action.sound for action in episode.actions), (CHUNK_SAMPLES, 0))
    return Heard(user, voice.clamp(-1, 1), rough, int((voice.abs() > 1).count_nonzero()))


def encoded(heard: Heard, **form: Any) -> bytes:
    """Both sides as the bytes of a file of sound; ``form``: as `soundfile.write` takes it. Raises
    soundfile.SoundFileError for a form that this libsndfile cannot write."""
    out = io.BytesIO()
    soundfile.write(out, heard.stereo.numpy(), SAMPLE_RATE_HZ, **form)
    return out.getvalue()


def _user(episode: Episode, again: Again) -> tuple[Tensor, str | None]:
    """The user's side [N * 3200], and why it is rough, if it is."""
    try:
        user = again(episode)
        if torch.equal(DMel.build().codes(user[None])[0], episode.codes):
            return user, None
        why = "the scenario's user, played again, says something else"
    except (MetronomeError, ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        why = f"the scenario's user cannot be played again ({one_line(str(error)).rstrip('.')})"
    return from_codes(episode.codes), why


def user_sound(episode: Episode, scenarios: ScenarioConfig, bank: SpeechBank) -> Tensor:
    """What the scenario's user gives the model to hear, played again with the episode's actions: fp32 [N * 3200].

    Raises ValueError for an id that is none and for another number of chunks, MetronomeError for a family that is
    unknown, and whatever its user raises."""
    family, split, seed = episode.scenario.split("/")
    if split not in get_args(Split):
        raise ValueError(f"no split is called {split!r}")
    scenario = scenarios.scenario(family, cast(Split, split), int(seed), bank)
    if scenario.chunks != len(episode.actions):
        raise ValueError(f"the scenario has {scenario.chunks} chunks, the episode {len(episode.actions)}")
    observed, _, _ = enact(scenario, lambda user: lambda k: episode.actions[k])
    return stack_audio(observed).flatten().clamp(-1, 1)


def from_codes(codes: Tensor) -> Tensor:
    """Sound whose dMel codes are about ``codes`` uint8 [N * 4, 80]: fp32 [N * 3200]. The inverse of
    `model.voice.mel.self_codes`, in as far as there is one, made to sound as the voice is."""
    step = (LOG10_MAX - LOG10_MIN) / (MEL_BINS - 1)
    logs = (LOG10_MIN + step * codes.clamp(max=MEL_BINS - 1).double()) * exact.ln(10) - LOUDER
    chunks = ((logs - torch.tensor(MEAN)) / torch.tensor(STD)).float().repeat_interleave(HOPS_PER_CODE, 0)
    return streamed(chunks.unflatten(0, (-1, FRAMES)))[LATENCY_SAMPLES:].clamp(-1, 1)


def streamed(chunks: Iterable[Tensor | None]) -> Tensor:
    """N chunks, fp32 [20, 80] or None for silence, as a speaker gives them out, with the end of the last one: fp32
    [N * 3200 + 480]. Not limited to full scale."""
    speaker = Speaker()
    sound = [speaker.append(chunk) for chunk in chunks]
    return torch.cat((*sound, speaker.append(None)[:LATENCY_SAMPLES]))
