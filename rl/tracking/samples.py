"""Sampled episodes for trackers: a picture of the timeline, and the audio that the model heard.

matplotlib is imported only where something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.senses.audio import SAMPLE_RATE_HZ as SAMPLE_RATE_HZ
from rollout.heard import user_sound
from rollout.record.episode import Episode
from rollout.record.timeline import Moment, moments
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import CHUNK_MS
from rollout.world.speech import SpeechBank

DPI = 100


@dataclass(frozen=True, eq=False)
class Sample:
    """One episode to look at and to listen to."""

    name: str  # its family
    caption: str
    picture: NDArray[np.uint8]  # [height, width, 3]
    heard: NDArray[np.float32]  # [samples] at SAMPLE_RATE_HZ, within [-1, 1]


def samples(episodes: Sequence[Episode], bank: SpeechBank, config: ScenarioConfig) -> list[Sample]:
    """The first episode of each family."""
    first = {episode.family: episode for episode in reversed(episodes)}
    return [sample(first[family], bank, config) for family in sorted(first)]


def sample(episode: Episode, bank: SpeechBank, config: ScenarioConfig) -> Sample:
    """The picture and sound of one episode."""
    said = " ".join(word for action in episode.actions for word in action.words) or "nothing"
    sound = user_sound(episode, config, bank).numpy()
    return Sample(episode.family, f"{episode.name}: {said}", picture(moments(episode), episode.name), sound)


def picture(rows: Sequence[Moment], title: str) -> NDArray[np.uint8]:
    """A picture uint8 [height, width, 3] of an episode: loudness, with chunks taken for speech in blue; the model's
    words; the log-prob of each chunk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    level, logprob = figure.subplots(2, 1, sharex=True)
    times = [row.start_ms / 1000 for row in rows]
    width = CHUNK_MS / 1000
    low = min((row.level_db for row in rows), default=0.0)
    colours = ["tab:blue" if row.speech else "lightgrey" for row in rows]
    level.bar(times, [row.level_db - low for row in rows], width, align="edge", color=colours)
    level.set(title=title, ylabel="heard, dB\n(blue: speech)")
    logprob.bar(times, [row.logprob for row in rows], width, align="edge", color="tab:orange")
    logprob.set(ylabel="log-prob\nof the chunk, nats", xlabel="s")
    for time, row in zip(times, rows, strict=True):
        if row.words:
            level.axvline(time + width, color="tab:red", alpha=0.4)
            text = " ".join(row.words)
            logprob.text(time + width / 2, 0, f" {text}", rotation=90, va="bottom", ha="center", parse_math=False)
    logprob.margins(x=0)
    bottom = min(logprob.get_ylim()[0], -1.0)
    logprob.set_yticks([tick for tick in logprob.get_yticks() if bottom <= tick <= 0])
    logprob.set_ylim(bottom, -bottom if any(row.words for row in rows) else 0.0)  # room for words
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
