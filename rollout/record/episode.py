"""The record of one episode: what was heard, what was sampled, and the proof of which policy sampled it.

An episode holds everything the learner needs to recompute each sampled token's distribution (tokens, dMel codes, where
the sampled tokens are and which tokens were allowed there) and everything a comparison needs (log-prob and row digest
of each sampled token, contract id, weights digest). What is sampled comes in streams. An episode knows nothing of
rewards; scores are made from `facts` and `actions`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.program.files import write_whole
from rollout.turn.action import Action, Mode

TEXT = "text"
"""The stream of mode and text tokens. A voice will be another one."""

FORMAT = "2"
"""Of a file of episodes. In 1 the sampled tokens belonged to no stream."""


@dataclass(frozen=True)
class Choices:
    """The N tokens of one stream that are the model's to choose."""

    sampled_at: Tensor  # int64 [N], position of each; its distribution is the row before
    row_class: Tensor  # int64 [N], which tokens were allowed (model.logprob)
    chunk: Tensor  # int64 [N], chunk in which each was chosen


@dataclass(frozen=True)
class Stream(Choices):
    """What was sampled in one stream, and the proof of it. The samples are the episode's tokens at ``sampled_at``."""

    logprob: Tensor  # fp32 [N], log-probability under the sampler, nats
    digest: Tensor  # int64 [N], digest of the whole log-prob row


@dataclass(frozen=True)
class Episode:
    """One rollout of one scenario. T tokens in all, A of them audio.

    Worked example: a session that hears one chunk, says nothing and ends has tokens
    ``[bos, audio, audio, audio, audio, listen]`` and one stream, text, with sampled_at ``[5]``, row_class ``[MODE]``,
    chunk ``[0]``.
    """

    scenario: str  # scenario id, "family/split/seed"
    rollout: int  # index within the scenario's group
    seed: int  # run seed that keyed the sampling
    temperature: float
    contract_id: str
    weights_digest: str
    facts: dict[str, Any]  # what the simulated user did, as its family's facts say it (JSON)
    actions: tuple[Action, ...]  # [chunks]
    tokens: Tensor  # int64 [T]
    codes: Tensor  # uint8 [A, 80], dMel bins of the rows that hold the audio token, in order
    streams: Mapping[str, Stream]  # by name

    @property
    def text(self) -> Stream:
        return self.streams[TEXT]

    @property
    def family(self) -> str:
        return self.scenario.split("/", 1)[0]

    @property
    def name(self) -> str:
        """How messages name an episode: scenario id and rollout index."""
        return f"{self.scenario}#{self.rollout}"


def tensors(episode: Episode) -> dict[str, Tensor]:
    """Everything of an episode that is a tensor, by name: ``tokens``, ``codes``, and ``text.logprob`` … of each
    stream."""
    streams = {
        f"{name}.{field.name}": getattr(stream, field.name)
        for name, stream in episode.streams.items()
        for field in fields(Stream)
    }
    return {"tokens": episode.tokens, "codes": episode.codes, **streams}


def pack_episodes(episodes: Sequence[Episode]) -> bytes:
    """Episodes in safetensors' format; `unpack_episodes` reads them back."""
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
        }
        for e in episodes
    ]
    return safetensors.torch.save(content, metadata={"format": FORMAT, "episodes": json.dumps(header)})


def unpack_episodes(data: bytes) -> list[Episode]:
    """Raises ValueError when ``data`` is cut short, of another format or not what `pack_episodes` made."""
    try:
        content: dict[str, Any] = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")  # of the JSON header that follows, with the metadata in it
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        header = json.loads(metadata["episodes"])
        if (found := metadata.get("format", "1")) != FORMAT:
            raise ValueError(
                f"it is of format {found}, this program reads {FORMAT}; only the version that wrote it can read it"
            )
        return [_unpack(item, {name: content[f"{i}.{name}"] for name in _names(item)}) for i, item in enumerate(header)]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def _names(item: Mapping[str, Any]) -> list[str]:
    """The tensors of the episode that ``item`` of the header is about, as `tensors` has them."""
    return ["tokens", "codes", *(f"{stream}.{field.name}" for stream in item["streams"] for field in fields(Stream))]


def _unpack(item: Mapping[str, Any], content: Mapping[str, Tensor]) -> Episode:
    streams = {
        name: Stream(**{field.name: content[f"{name}.{field.name}"] for field in fields(Stream)})
        for name in item["streams"]
    }
    plain = {name: value for name, value in item.items() if name not in ("actions", "streams")}
    return Episode(
        **plain,
        actions=tuple(Action(Mode(mode), tuple(words)) for mode, *words in item["actions"]),
        tokens=content["tokens"],
        codes=content["codes"],
        streams=streams,
    )


def save_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    """Writes episodes as one file, whole or not at all; `load_episodes` reads it back."""
    write_whole(path, pack_episodes(episodes))


def load_episodes(path: Path) -> list[Episode]:
    """Raises MetronomeError when the file is missing, cut short or not a file of episodes."""
    try:
        return unpack_episodes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MetronomeError(
            f"{path}: cannot be read as a file of episodes ({error}). Roll the episodes out again, or delete the file."
        ) from error


def concatenate(episodes: Sequence[Episode], name: str, stream: str = TEXT) -> Tensor:
    """One field of a stream of all episodes, one after another: the learner's packed order."""
    return torch.cat([getattr(e.streams[stream], name) for e in episodes])
