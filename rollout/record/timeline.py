"""An episode chunk by chunk, for people: how loud it was, what the model did, and how likely that was to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.record.episode import Episode
from rollout.turn.action import CHUNK_FRAMES, CHUNK_MS, Mode

SPEECH_MARGIN_DB = 5.0
"""A chunk so much above the quieter quarter of the episode counts as speech: noise is steady in our scenarios."""


@dataclass(frozen=True)
class Moment:
    """One chunk. Example: ``Moment(3, 600, 13.2, True, Mode.SPEAK, ("breathe",), -1.9)``."""

    chunk: int
    start_ms: int
    level_db: float  # of what was heard: mel power, as far as dMel's 16 steps of 6 dB tell
    speech: bool  # guessed from the level alone
    mode: Mode
    words: tuple[str, ...]
    logprob: float  # of all that was sampled in the chunk, nats


def moments(episode: Episode) -> list[Moment]:
    """One for each chunk. Raises ValueError when the file's fields do not fit together."""
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
