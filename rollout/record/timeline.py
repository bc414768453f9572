"""An episode chunk by chunk, for display: loudness of the input, the model's action and its log-prob."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.record.episode import Episode
from rollout.turn.action import CHUNK_FRAMES, CHUNK_MS, Mode

SPEECH_MARGIN_DB = 5.0
"""A chunk this much louder than the lower quartile of the episode's chunks is displayed as speech. A heuristic: the
background noise of our scenarios is steady."""


@dataclass(frozen=True)
class Moment:
    """One chunk. Example: ``Moment(3, 600, 13.2, True, Mode.SPEAK, ("breathe",), -1.9)``."""

    chunk: int
    start_ms: int
    level_db: float  # of the input audio, from dMel codes, which are steps of 6 dB
    speech: bool  # estimated from the level alone
    mode: Mode
    words: tuple[str, ...]
    logprob: float  # sum over the chunk's sampled tokens, nats


def moments(episode: Episode) -> list[Moment]:
    """One `Moment` for each chunk. Raises ValueError when the episode's fields contradict each other."""
    chunks = len(episode.actions)
    if len(episode.codes) != chunks * CHUNK_FRAMES or len(episode.text.chunk) != len(episode.text.logprob):
        raise ValueError(f"{episode.name}: {chunks} chunks do not fit {len(episode.codes)} frames of audio")
    if len(episode.text.chunk) and not 0 <= int(episode.text.chunk.min()) <= int(episode.text.chunk.max()) < chunks:
        raise ValueError(f"{episode.name}: samples outside its {chunks} chunks")
    levels = levels_db(episode.codes)
    threshold = float(levels.quantile(0.25)) + SPEECH_MARGIN_DB if chunks else 0.0
    logprob = torch.zeros(chunks, dtype=torch.float64).index_add(0, episode.text.chunk, episode.text.logprob.double())
    rows = zip(levels.tolist(), episode.actions, logprob.tolist(), strict=True)
    return [
        Moment(k, k * CHUNK_MS, level, level > threshold, action.mode, action.words, p)
        for k, (level, action, p) in enumerate(rows)
    ]


def levels_db(codes: Tensor) -> Tensor:
    """uint8 [chunks * CHUNK_FRAMES, 80] -> fp64 [chunks], 10 log10 of the mel values' sum over channels, mean over
    frames. A code stands for the centre 10^(-7 + 9/15 code) (`model.senses.audio`)."""
    mel = 10.0 ** (codes.double() * (9 / 15) - 7)
    return 10 * mel.sum(-1).unflatten(0, (-1, CHUNK_FRAMES)).mean(-1).log10()
