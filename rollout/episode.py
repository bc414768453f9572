"""The record of one episode: what was heard, what was sampled, and the proof of which policy sampled it.

An episode holds everything the learner needs to recompute each sampled token's distribution (tokens, dMel codes, where
the sampled tokens are and which tokens were allowed there) and everything a comparison needs (log-prob and row digest
of each sampled token, contract id, weights digest). It knows nothing of rewards; scores are made
from `facts` and `actions`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.files import write_whole
from rollout.chunk import Action, Mode

TENSORS = ("tokens", "codes", "sampled_at", "row_class", "chunk", "logprob", "digest")


@dataclass(frozen=True)
class Episode:
    """One rollout of one scenario. T tokens in all, A of them audio, N sampled.

    Worked example: a session that hears one chunk, says nothing and ends has tokens
    ``[bos, audio, audio, audio, audio, listen]``, sampled_at ``[5]``, row_class ``[MODE]``, chunk ``[0]``.
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
    sampled_at: Tensor  # int64 [N], position of each sampled token; its distribution is the row before
    row_class: Tensor  # int64 [N], which tokens were allowed (model.logprob)
    chunk: Tensor  # int64 [N], chunk in which each token was sampled
    logprob: Tensor  # fp32 [N], log-probability under the sampler, nats
    digest: Tensor  # int64 [N], digest of the whole log-prob row

    @property
    def family(self) -> str:
        return self.scenario.split("/", 1)[0]

    @property
    def name(self) -> str:
        """How messages name an episode: scenario id and rollout index."""
        return f"{self.scenario}#{self.rollout}"


def pack_episodes(episodes: Sequence[Episode]) -> bytes:
    """Episodes in safetensors' format; `unpack_episodes` reads them back."""
    tensors = {f"{i}.{name}": getattr(e, name).contiguous() for i, e in enumerate(episodes) for name in TENSORS}
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
        }
        for e in episodes
    ]
    return safetensors.torch.save(tensors, metadata={"episodes": json.dumps(header)})


def unpack_episodes(data: bytes) -> list[Episode]:
    """Raises ValueError when ``data`` is cut short or not what `pack_episodes` made."""
    try:
        tensors: dict[str, Any] = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")  # of the JSON header that follows, with the metadata in it
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["episodes"])
        return [
            Episode(
                **{k: v for k, v in fields.items() if k != "actions"},
                actions=tuple(Action(Mode(mode), tuple(words)) for mode, *words in fields["actions"]),
                **{name: tensors[f"{i}.{name}"] for name in TENSORS},
            )
            for i, fields in enumerate(header)
        ]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


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


def concatenate(episodes: Sequence[Episode], name: str) -> Tensor:
    """One field of all episodes, one after another: the learner's packed order."""
    return torch.cat([getattr(e, name) for e in episodes])
