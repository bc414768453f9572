"""What a pool of rollout workers and its workers say to each other: how plays become tasks, and answers are checked.

Messages to a worker are pickled by the pool; answers travel behind a checksum and are checked field by field, so that a
worker whose memory or connection is damaged is found out before an episode of it is believed. Both sides are processes
of one program, joined by a pipe of its own: no pickle is ever read from a file, so none from a run's folder.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from transformers import InklingConfig

from model.config import MEL_CHANNELS
from rollout.record.episode import TEXT, Episode, Stream, tensors
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.grammar import AUDIO_ROWS
from rollout.world.speech import Split

CHECKSUM_BYTES = hashlib.sha256().digest_size
READY = -1
"""Number of the answer to `Setup`; tasks count from 0."""


@dataclass(frozen=True)
class Setup:
    """The first message: everything that stays the same while a worker lives."""

    config: InklingConfig
    dtype: torch.dtype
    speech_dir: str
    scenarios: ScenarioConfig
    slots: int  # sessions at once
    max_tokens: int  # context of each
    words_per_chunk: int
    number: int = READY


class PlayRequest(NamedTuple):
    """One play of a task: which scenario, and the rollout's index in its group."""

    family: str
    split: Split
    seed: int
    rollout: int
    chunks: int  # that the scenario lasts

    @property
    def scenario(self) -> str:
        """The scenario's id."""
        return f"{self.family}/{self.split}/{self.seed}"


@dataclass(frozen=True)
class Task:
    """Every later message."""

    number: int
    plays: tuple[PlayRequest, ...]
    seed: int  # of the run
    temperature: float
    weights_digest: str  # what the weights in shared memory must come to


@dataclass(frozen=True)
class Reply:
    """The answer to the message with that number."""

    number: int
    contract_id: str
    episodes: bytes = b""  # packed
    error: Exception | None = None


def seal(reply: Reply) -> bytes:
    """As bytes behind their SHA-256."""
    body = pickle.dumps(reply)
    return hashlib.sha256(body).digest() + body


def unseal(data: bytes) -> Reply:
    """Raises ValueError for anything but what `seal` made; nothing else is ever unpickled."""
    body = data[CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != data[:CHECKSUM_BYTES]:
        raise ValueError(f"the checksum of {len(data)} bytes is wrong")
    reply: Reply = pickle.loads(body)
    return reply


def task_boundaries(plays: Sequence[PlayRequest], workers: int, slots: int) -> list[int]:
    """Cuts plays into tasks of about ``slots``, as many for each worker; returns [0, …, len(plays)]. A group's rollouts
    stay together unless there are fewer groups than workers."""
    starts = [i for i, wanted in enumerate(plays) if i == 0 or wanted.scenario != plays[i - 1].scenario]
    if len(starts) < workers:
        starts = list(range(len(plays)))
    tasks = min(len(starts), workers * math.ceil(len(plays) / (workers * slots)))
    return [starts[len(starts) * k // tasks] for k in range(tasks)] + [len(plays)]


def check_episode(episode: Episode, wanted: PlayRequest, task: Task, contract_id: str) -> None:
    """Raises ValueError unless the episode is of the play, weights and contract asked for and its tensors have their
    form."""
    tokens, audio = len(episode.tokens), wanted.chunks * AUDIO_ROWS
    expected = {
        "scenario": wanted.scenario,
        "rollout": wanted.rollout,
        "seed": task.seed,
        "temperature": task.temperature,
        "contract_id": contract_id,
        "weights_digest": task.weights_digest,
    }
    for name, value in expected.items():
        if getattr(episode, name) != value:
            raise ValueError(f"an episode's {name} is {getattr(episode, name)!r}, not {value!r}")
    if list(episode.streams) != [TEXT]:
        raise ValueError(f"an episode has the streams {list(episode.streams)}, not {[TEXT]}")
    forms = {"tokens": (torch.int64, (tokens,)), "codes": (torch.uint8, (audio, MEL_CHANNELS))}
    for name, stream in episode.streams.items():
        sampled = len(stream.sampled_at)
        per_token = dict.fromkeys((f"{name}.{field.name}" for field in fields(Stream)), (torch.int64, (sampled,)))
        forms |= per_token | {f"{name}.logprob": (torch.float32, (sampled,))}
    for name, tensor in tensors(episode).items():
        dtype, shape = forms[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"an episode's {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    at = episode.text.sampled_at
    if len(episode.actions) != wanted.chunks or not wanted.chunks <= len(at) < tokens:
        raise ValueError(f"an episode of {wanted.chunks} chunks has {len(episode.actions)} actions, {len(at)} samples")
    if not 0 < int(at.min()) <= int(at.max()) < tokens:
        raise ValueError(f"an episode samples outside its {tokens} tokens")
