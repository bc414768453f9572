"""Messages between a pool of rollout workers and its workers, and the checks of replies.

Messages to a worker are pickled. Replies have a checksum, and their episodes are checked field by field, so that data
from a damaged worker is not used. Both ends are processes of one program with a pipe between them: nothing is unpickled
from a file, so nothing from a run's folder.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from transformers import InklingConfig, PreTrainedTokenizerFast

from model.config import MEL_CHANNELS
from model.context import STOP, ContextConfig
from model.voice.config import NUMBERS
from rollout.record.episode import TEXT, VOICE, Episode, Stream, check_sound, check_tensors, tensors
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.grammar import AUDIO_ROWS
from rollout.world.speech import Split

CHECKSUM_BYTES = hashlib.sha256().digest_size
READY = -1
"""`Setup.number`, and so that of its reply. Tasks are numbered from 0."""


@dataclass(frozen=True)
class Setup:
    """The first message to a worker: what stays the same as long as it lives."""

    config: InklingConfig
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerFast | None  # the model's
    speech_dir: str | None  # None is the set shipped with the program
    scenarios: ScenarioConfig
    slots: int  # sessions open at once
    max_tokens: int  # context of each, in rows
    words_per_chunk: int
    max_patches: int = 0  # these two as in `rollout.turn.grammar.Grammar`
    max_event_words: int = 0
    context: ContextConfig = STOP
    number: int = READY


class PlayRequest(NamedTuple):
    """A `rollout.play.Play` as data: ids instead of objects."""

    family: str
    split: Split
    seed: int
    rollout: int  # index within the scenario's group
    chunks: int  # length of the scenario

    @property
    def scenario(self) -> str:
        """The scenario's id."""
        return f"{self.family}/{self.split}/{self.seed}"


@dataclass(frozen=True)
class Task:
    """Every later message to a worker: plays, all to be made with the same weights."""

    number: int
    plays: tuple[PlayRequest, ...]
    seed: int  # of the run
    temperature: float
    weights_digest: str  # expected of the weights in shared memory


@dataclass(frozen=True)
class Reply:
    """The answer to the message of that number."""

    number: int
    contract_id: str
    episodes: bytes = b""  # `rollout.record.episode.pack_episodes`
    error: Exception | None = None


def seal(reply: Reply) -> bytes:
    """A reply as bytes, with their SHA-256 before them."""
    body = pickle.dumps(reply)
    return hashlib.sha256(body).digest() + body


def unseal(data: bytes) -> Reply:
    """The inverse of `seal`. Raises ValueError, without unpickling, when the checksum does not match."""
    body = data[CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != data[:CHECKSUM_BYTES]:
        raise ValueError(f"the checksum of {len(data)} bytes is wrong")
    reply: Reply = pickle.loads(body)
    return reply


def task_boundaries(plays: Sequence[PlayRequest], workers: int, slots: int) -> list[int]:
    """How to divide plays into tasks of about ``slots`` plays, equally many for each worker: task k has plays b[k] …
    b[k + 1] - 1 of the result b = [0, …, len(plays)]. A scenario's rollouts stay in one task unless there are fewer
    scenarios than workers."""
    starts = [i for i, play in enumerate(plays) if i == 0 or play.scenario != plays[i - 1].scenario]
    if len(starts) < workers:
        starts = list(range(len(plays)))
    tasks = min(len(starts), workers * math.ceil(len(plays) / (workers * slots)))
    return [starts[len(starts) * k // tasks] for k in range(tasks)] + [len(plays)]


def check_episode(episode: Episode, play: PlayRequest, task: Task, contract_id: str, steps: int | None = None) -> None:
    """Raises ValueError unless the episode is of the requested play, weights and contract, and its tensors have the
    right dtypes, shapes and ranges. ``steps``: of the model's chains of sound, None without a voice."""
    tokens, audio = len(episode.tokens), play.chunks * AUDIO_ROWS
    expected = {
        "scenario": play.scenario,
        "rollout": play.rollout,
        "seed": task.seed,
        "temperature": task.temperature,
        "contract_id": contract_id,
        "weights_digest": task.weights_digest,
    }
    for name, value in expected.items():
        if getattr(episode, name) != value:
            raise ValueError(f"an episode's {name} is {getattr(episode, name)!r}, not {value!r}")
    if list(episode.streams) not in ([TEXT], [TEXT, VOICE]):
        raise ValueError(f"an episode has the streams {list(episode.streams)}, not {[TEXT]}, or {VOICE} after it")
    forms = {
        "tokens": (torch.int64, (tokens,)),
        "codes": (torch.uint8, (audio, MEL_CHANNELS)),
        "contexts": (torch.int64, (len(episode.contexts),)),
        "frames.pixels": (torch.uint8, (episode.frames.pixels.numel(),)),
        "frames.sizes": (torch.int64, (len(episode.frames.sizes), 4)),
    }
    for name, stream in episode.streams.items():
        sampled = len(stream.sampled_at)
        per_token = dict.fromkeys((f"{name}.{field.name}" for field in fields(Stream)), (torch.int64, (sampled,)))
        forms |= per_token | {f"{name}.logprob": (torch.float32, (sampled,))}
        if stream.payload is not None:
            forms[f"{name}.payload"] = torch.float32, (sampled, 1 + (steps or 0), NUMBERS)
    for name, tensor in tensors(episode).items():
        dtype, shape = forms[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"an episode's {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    if (begins := episode.contexts.tolist())[:1] != [0] or begins != sorted({*begins}) or begins[-1] >= tokens:
        raise ValueError(f"an episode of {tokens} tokens has contexts that begin at {begins[:9]}")
    if any(k >= play.chunks for k, _ in episode.frames.chunks()):
        raise ValueError(f"an episode of {play.chunks} chunks has video beyond them")
    at = episode.text.sampled_at
    if len(episode.actions) != play.chunks or not play.chunks <= len(at) < tokens:
        raise ValueError(f"an episode of {play.chunks} chunks has {len(episode.actions)} actions, {len(at)} samples")
    if not 0 < int(at.min()) <= int(at.max()) < tokens:
        raise ValueError(f"an episode samples outside its {tokens} tokens")
    check_tensors(episode)
    check_sound(episode, steps)
    if (voice := episode.voice) is not None and any(not 0 < row <= tokens for row in voice.sampled_at.tolist()):
        raise ValueError(f"an episode's sound is sampled outside its {tokens} tokens")
