"""What pairs and reward models were made from, by digest: so that another thing at the same path is noticed.

A data set of pairs has ``pairs.json`` (`PairsOrigin`) beside the tables, and a manifest of all its files
(`model.weights.manifest`). Its digest is that of the pairs themselves: equal pairs have equal digests, whatever recipe,
machine or library wrote them. A run of `reward.train` has ``origin.json`` (`TrainingOrigin`); its model names the
digests in reward.json. A training is resumed only where its contract id is still the same, so on the kind of device
that it began on; a finished model names no contract, and whoever loads it may score with it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from kernels.errors import MetronomeError
from model.program.files import write_json
from model.program.ranges import Range
from model.program.reading import read_record
from model.weights import manifest

PAIRS, TRAINING = "pairs.json", "origin.json"
UNKNOWN = ""
"""Stands for the digest of something that was not given."""


@dataclass(frozen=True)
class PairsOrigin:
    """A data set of pairs. Digests are 32 hexadecimal digits."""

    digest: str  # of all pairs (`pairs_digest`)
    pairs: dict[str, Annotated[int, Range(0, 10**9)]]  # split -> how many
    recipe: str = UNKNOWN  # digest of the recipe's values
    recordings: str = UNKNOWN  # digest of the recordings (`SpeechBank.digest`)
    policies: tuple[str, ...] = ()  # digest of each policy's weights, in the recipe's order
    tokenizer: str = UNKNOWN  # digest of its words and ids (`model.tokenizer.words_digest`)


@dataclass(frozen=True)
class TrainingOrigin:
    """Everything that decides the weights with which a training ends."""

    recipe: dict[str, Any]  # the recipe's fields that decide weights, by dotted name
    pairs: str  # digest of the data set
    backbone: str  # digest of the backbone's weights before the first step
    processes: Annotated[int, Range(1, 10**6)]  # that sum the gradients; another number sums them in another order
    contract_id: str  # of the kernels

    def differences(self, now: TrainingOrigin, pairs: str, backbone: str) -> Iterator[str]:
        """What ``now`` has otherwise, in words. ``pairs``, ``backbone``: what the recipe calls them."""
        yield from recipe_differences(self.recipe, now.recipe)
        for name, where in (("pairs", f"pairs {pairs}"), ("backbone", f"backbone {backbone}")):
            before, after = getattr(self, name), getattr(now, name)
            if before != after:
                yield f"{where}: other content than the run began with (digest {after}, was {before})"
        if self.processes != now.processes:
            yield f"{now.processes} processes, and it was begun by {self.processes} (--num_processes)"
        if self.contract_id != now.contract_id:
            yield f"the kernels' contract is {now.contract_id}, and was {self.contract_id}"

    @property
    def text(self) -> str:
        """All of it, for the manifests of a training's checkpoints."""
        return json.dumps(asdict(self), sort_keys=True)


def recipe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield f"{name} is {_value(now, name)}, and was {_value(before, name)}"


def _value(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "the default"


def digest_of(value: Any) -> str:
    """Digest of plain values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def pairs_digest(splits: Mapping[str, Sequence[Any]]) -> str:
    """Digest of all that is stored of each pair, in the order of the pairs, split by split in the order of names.
    Pairs are `Preference`s, whose module imports this one."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"{name} {len(splits[name])}\n".encode())
        for pair in splits[name]:
            for part in _parts(pair):
                digest.update(struct.pack("<q", len(part)))
                digest.update(part)
    return digest.hexdigest()[:32]


def _parts(pair: Any) -> Iterable[bytes]:
    texts = [pair.axis, pair.source, pair.family, pair.scenario]
    yield json.dumps([texts, pair.size_ms]).encode()
    yield struct.pack("<f", pair.margin)  # as stored
    for side in (pair.chosen, pair.rejected):
        yield struct.pack("<qq", side.first, side.end)
        yield side.tokens.to(torch.int64).contiguous().numpy().tobytes()
        yield side.codes.contiguous().numpy().tobytes()
        if len(side.frames.sizes):
            yield side.frames.sizes.contiguous().numpy().tobytes()
            yield side.frames.pixels.contiguous().numpy().tobytes()


def write_pairs_origin(folder: Path, name: str, origin: PairsOrigin) -> None:
    """Writes `PAIRS` and the manifest of all files that are in ``folder``, which will be called ``name``."""
    write_json(folder / PAIRS, asdict(origin))
    manifest.write(folder, name)


def has_pairs_origin(folder: Path) -> bool:
    """Whether `save_preferences` wrote the data set, and not another program."""
    return (folder / PAIRS).exists() or (folder / manifest.MANIFEST).exists()


def read_pairs_origin(folder: Path) -> PairsOrigin:
    """Raises MetronomeError, naming the file, when the data set in ``folder`` is not what was saved."""
    manifest.check(folder, what="preference pairs")
    return read_record(folder / PAIRS, PairsOrigin)


def read_training_origin(folder: Path) -> TrainingOrigin:
    """Of the run in ``folder``. Raises MetronomeError when it is not there or damaged."""
    path = folder / TRAINING
    if not path.is_file():
        raise MetronomeError(
            f"{folder} has no {TRAINING}, so what its training began from is not known: start anew under another --name"
        )
    return read_record(path, TrainingOrigin)
