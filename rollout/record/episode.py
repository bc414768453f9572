"""The record of one episode: the model's input, the sampled tokens, and the evidence of which policy sampled them.

An episode has everything that the learner needs to recompute the distribution of each sampled token (tokens, dMel
codes, video, events, positions and row classes of the sampled tokens) and everything to compare the result with
(log-prob and row digest of each sampled token, contract id, weights digest). Sampled tokens are grouped in streams.
There are no rewards in an episode; scorers compute them from `facts` and `actions`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.config import MEL_CHANNELS
from model.inputs import one_context
from model.program.files import write_whole
from model.program.ranges import shown
from model.program.reading import UnreadableError, as_object, as_record, decode, one_line, parse_json, read_bytes
from model.senses.video import NO_VIDEO, Frames
from model.voice.config import BANDS, FRAMES, NUMBERS
from model.voice.mel import self_codes
from rollout.turn.action import Action, Mode

TEXT = "text"
"""Name of the stream of mode and text tokens."""
VOICE = "voice"
"""Name of the stream of chunks of sound, of a model that has a voice and has spoken."""

FORMAT = 3
"""Version of the episode file format. (Version 1 had no streams, version 2 no video and one context.)"""


@dataclass(frozen=True)
class Choices:
    """Where the N tokens (or chunks of sound) of one stream that the model samples are, and from which tokens they are
    sampled."""

    sampled_at: Tensor  # int64 [N], position of each token; its distribution comes from the row before
    row_class: Tensor  # int64 [N], MODE, FIRST_TEXT or NEXT_TEXT (model.logprob); 0 for sound
    chunk: Tensor  # int64 [N], chunk in which each was sampled


@dataclass(frozen=True)
class Stream(Choices):
    """The samples of one stream, with evidence. Sampled tokens are ``episode.tokens[sampled_at]``."""

    logprob: Tensor  # fp32 [N], log-probability under the sampler, nats
    digest: Tensor  # int64 [N], digest of the whole distribution: the row of log-probs, or the steps of a chain
    payload: Tensor | None = None  # of sound: fp32 [N, K + 1, NUMBERS], the chains as drawn (`model.voice.chain`)


@dataclass(frozen=True)
class Episode:
    """One rollout of one scenario. T tokens in all, A of them audio.

    Worked example: a session of one chunk, in which the model says nothing, has tokens
    ``[bos, audio, audio, audio, audio, listen]`` and one stream, text, with sampled_at ``[5]``, row_class ``[MODE]``,
    chunk ``[0]``.
    """

    scenario: str  # scenario id, "family/split/seed"
    rollout: int  # index within the scenario's group
    seed: int  # run seed that keyed the sampling
    temperature: float
    contract_id: str
    weights_digest: str
    facts: dict[str, Any]  # what the simulated user did: `rollout.world.base.Facts` as JSON
    actions: tuple[Action, ...]  # [chunks]
    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80], dMel bins of the rows that hold the audio token, in order
    streams: Mapping[str, Stream]  # by name
    frames: Frames = NO_VIDEO  # what the rows that hold the image token are patches of, in order
    events: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # chunk -> texts that the model read in it
    contexts: Tensor = field(default_factory=one_context)  # int64 [C], where each begins (`rollout.turn.summary`)

    @property
    def text(self) -> Stream:
        """The stream of mode and text tokens."""
        return self.streams[TEXT]

    @property
    def voice(self) -> Stream | None:
        """The stream of chunks of sound, if there is one."""
        return self.streams.get(VOICE)

    @property
    def own(self) -> Tensor:
        """uint8 [B, 80], dMel codes of what the model heard of itself: of all its sound but a last chunk's."""
        if self.voice is None:
            return self.codes[:0]
        return heard_codes(sounds(self.voice), self.voice.chunk, len(self.actions))

    @property
    def family(self) -> str:
        """Name of the scenario's family."""
        return self.scenario.split("/", 1)[0]

    @property
    def name(self) -> str:
        """Scenario id and rollout index, for messages."""
        return f"{self.scenario}#{self.rollout}"


def sounds(voice: Stream) -> Tensor:
    """fp32 [N, FRAMES, BANDS], the chunks of sound at the ends of the chains."""
    assert voice.payload is not None
    return voice.payload[:, -1].unflatten(-1, (FRAMES, BANDS))


def heard_codes(sound: Tensor, chunk: Tensor, chunks: int) -> Tensor:
    """dMel codes uint8 [B, 80] of the model's own ``sound`` fp32 [N, FRAMES, BANDS], made in chunks int64 [N], as it
    hears them in ``chunks`` micro-turns: each in the next one, so those of the last not at all."""
    return self_codes(sound[chunk < chunks - 1]).flatten(0, 1)


def tensors(episode: Episode) -> dict[str, Tensor]:
    """All tensors of an episode by name: ``tokens``, ``codes``, those of the video, and for each stream
    ``text.logprob`` and so on."""
    streams = {
        f"{name}.{f.name}": x
        for name, stream in episode.streams.items()
        for f in fields(Stream)
        if (x := getattr(stream, f.name)) is not None
    }
    video = {"frames.pixels": episode.frames.pixels, "frames.sizes": episode.frames.sizes}
    return {"tokens": episode.tokens, "codes": episode.codes, "contexts": episode.contexts, **video, **streams}


def pack_episodes(episodes: Sequence[Episode]) -> bytes:
    """Episodes in safetensors' format; equal episodes give equal bytes. `unpack_episodes` reads them back."""
    content = {f"{i}.{name}": t.contiguous() for i, e in enumerate(episodes) for name, t in tensors(e).items()}
    header = [
        {
            "scenario": e.scenario,
            "rollout": e.rollout,
            "seed": e.seed,
            "temperature": e.temperature,
            "contract_id": e.contract_id,
            "weights_digest": e.weights_digest,
            "facts": e.facts,
            "actions": [[a.mode.value, *a.words] for a in e.actions],
            "streams": list(e.streams),
            "events": [[k, *texts] for k, texts in sorted(e.events.items())],
        }
        for e in episodes
    ]
    # One key of metadata: safetensors writes several in an order that changes from call to call.
    return safetensors.torch.save(content, metadata={"episodes": json.dumps({"format": FORMAT, "episodes": header})})


def unpack_episodes(data: bytes) -> list[Episode]:
    """The inverse of `pack_episodes`. Raises ValueError for data that is truncated, damaged or of another format."""
    try:
        content: dict[str, Any] = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")  # of the JSON header that follows, with the metadata in it
        text = as_object(parse_json(decode(data[8 : 8 + size])))["__metadata__"]["episodes"]
        stored = parse_json(text)
        version = 1 if isinstance(stored, list) else as_object(stored)["format"]
        if version != FORMAT:
            raise ValueError(
                f"it is of format {shown(version)}, this program reads {FORMAT}; only the version that wrote it can "
                "read it"
            )
        described = as_record(text, _Header, ranges=False).episodes  # what it says is the audit's to judge
        return [
            _unpack(item, {name: content[f"{i}.{name}"] for name in _names(item)}) for i, item in enumerate(described)
        ]
    except UnreadableError as error:
        raise ValueError(error.problem) from error
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError) as error:  # the last two: absurd shapes
        raise ValueError(one_line(str(error))) from error


@dataclass(frozen=True)
class _Described:
    """An episode in the header: all of it that is no tensor."""

    scenario: str
    rollout: int
    seed: int
    temperature: float
    contract_id: str
    weights_digest: str
    facts: dict[str, Any]
    actions: tuple[tuple[str, ...], ...]  # [chunks] of mode, words
    streams: tuple[str, ...]
    events: tuple[tuple[int | str, ...], ...]  # chunk, texts


@dataclass(frozen=True)
class _Header:
    episodes: tuple[_Described, ...]


def _names(item: _Described) -> list[str]:
    """Names of the tensors (as in `tensors`) of the episode that ``item`` describes."""
    video = ("frames.pixels", "frames.sizes")
    return [
        "tokens",
        "codes",
        "contexts",
        *video,
        *(f"{stream}.{name}" for stream in item.streams for name in _fields(stream)),
    ]


def _fields(stream: str) -> list[str]:
    """Names of the tensors of a stream."""
    return [f.name for f in fields(Stream) if f.name != "payload" or stream == VOICE]


def _unpack(item: _Described, content: Mapping[str, Tensor]) -> Episode:
    if TEXT not in item.streams:
        raise ValueError(f"an episode without the stream {TEXT}")
    streams = {s: Stream(**{name: content[f"{s}.{name}"] for name in _fields(s)}) for s in item.streams}
    plain = {f.name: getattr(item, f.name) for f in fields(item) if f.name not in ("actions", "streams", "events")}
    episode = Episode(
        **plain,
        actions=_actions(item.actions, streams.get(VOICE)),
        tokens=content["tokens"],
        codes=content["codes"],
        contexts=content["contexts"],
        frames=Frames(content["frames.pixels"], content["frames.sizes"]),
        streams=streams,
        events={int(k): tuple(map(str, texts)) for k, *texts in item.events},
    )
    if single := [name for name, tensor in tensors(episode).items() if not tensor.ndim]:
        raise ValueError(f"{single[0]} of an episode is a single number")
    return episode


def _actions(described: Sequence[Sequence[str]], voice: Stream | None) -> tuple[Action, ...]:
    """With the sound of each chunk, as far as the stream has it in its form."""
    sound: dict[int, Tensor] = {}
    if (
        voice is not None
        and voice.payload is not None
        and voice.payload.shape[2:] == (NUMBERS,)
        and voice.payload.shape[1]
    ):
        sound = dict(zip(voice.chunk.tolist(), sounds(voice), strict=False))
    return tuple(
        Action(Mode(mode), tuple(words), sound.get(k) if mode == Mode.SPEAK else None)
        for k, (mode, *words) in enumerate(described)
    )


def check_tensors(episode: Episode) -> None:
    """Raises ValueError for tensors of other types or shapes than an episode's. Files with such episodes can be read
    all the same: the audit says what is wrong with them, and that nothing can be compared
    (`rl.audit.replay.comparable`)."""
    for name, tensor in tensors(episode).items():
        if tensor.dtype != _DTYPES[name.rpartition(".")[2]] or tensor.ndim != _AXES.get(name, 1):
            raise ValueError(f"{name} of an episode is {tensor.dtype} {list(tensor.shape)}")
    episode.frames.chunks()  # raises
    voice = episode.voice
    if voice is not None and (
        voice.payload is None
        or len(voice.payload) != len(voice.chunk)
        or voice.payload.shape[2] != NUMBERS
        or not voice.payload.shape[1]
        or not voice.payload.isfinite().all()
    ):
        raise ValueError(f"the sound of an episode is no {len(voice.chunk)} chains of {NUMBERS} finite numbers")
    if episode.codes.shape[1] != MEL_CHANNELS:
        raise ValueError(f"codes of an episode is {list(episode.codes.shape)}, not of {MEL_CHANNELS} channels")


def check_sound(episode: Episode, steps: int | None) -> None:
    """Raises ValueError unless the episode has the sound that its model samples: one chain of ``steps`` steps for each
    chunk in which it speaks; None: of a model without a voice, which samples none."""
    speaking = [] if steps is None else [k for k, action in enumerate(episode.actions) if action.speaks]
    voice = episode.voice
    chunks = [] if voice is None else voice.chunk.tolist()
    if chunks != speaking or (voice is not None and not chunks):
        raise ValueError(f"it has sound of {len(chunks)} chunks, and its model samples sound in {len(speaking)}")
    states = 1 + (steps or 0)
    if voice is not None and (voice.payload is None or voice.payload.ndim != 3 or voice.payload.shape[1] != states):
        raise ValueError(f"its chains of sound are not of the model's {steps} steps")


_AXES = {"codes": 2, "frames.sizes": 2, f"{VOICE}.payload": 3}
_DTYPES = {
    "contexts": torch.int64,
    "pixels": torch.uint8,
    "sizes": torch.int64,
    "tokens": torch.int64,
    "codes": torch.uint8,
    "sampled_at": torch.int64,
    "row_class": torch.int64,
    "chunk": torch.int64,
    "logprob": torch.float32,
    "digest": torch.int64,
    "payload": torch.float32,
}


def save_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    """Writes episodes to one file, atomically; `load_episodes` reads it."""
    write_whole(path, pack_episodes(episodes))


def load_episodes(path: Path) -> list[Episode]:
    """Reads a file of `save_episodes`. Raises MetronomeError when it is missing, damaged or of another format."""
    try:
        return unpack_episodes(read_bytes(path))
    except (UnreadableError, ValueError) as error:
        problem = error.problem if isinstance(error, UnreadableError) else error
        remedy = "Roll the episodes out again, or delete the file."
        raise MetronomeError(f"{path}: cannot be read as a file of episodes ({problem}). {remedy}") from error


def concatenate(episodes: Sequence[Episode], name: str, stream: str = TEXT) -> Tensor:
    """The field ``name`` of a stream (``logprob``, say), concatenated over episodes, which is the learner's order."""
    return torch.cat([getattr(e.streams[stream], name) for e in episodes])
