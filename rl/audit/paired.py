"""The saved episodes of two runs, paired by step and name, and compared field by field in bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.errors import MetronomeError
from rl.audit.records import Records
from rl.step.identity import unequal, unequal_bits
from rollout.record.episode import Episode, load_episodes, tensors


def same_value(a: Any, b: Any) -> bool:
    """Equal values of JSON, in type and bits: 0.0 is not -0.0, and 1 is not 1.0. NaN, which no file of a run can hold,
    is like NaN."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


@dataclass(frozen=True)
class Saved:
    """The episodes of one step of one run that can be read, from the files of however many processes."""

    episodes: dict[str, Episode]  # by name; one that comes again has "(again)" behind its name
    unread: int  # files that cannot be read


def saved(records: Records, step: int) -> Saved:
    """A damaged file becomes a gap."""
    episodes: dict[str, Episode] = {}
    unread = 0
    for file in records.episodes.get(step, ()):
        try:
            for episode in load_episodes(file):
                name = episode.name
                while name in episodes:
                    name += " (again)"
                episodes[name] = episode
        except MetronomeError as error:
            unread += 1
            records.gaps.append(f"Step {step}: {error}")
    return Saved(episodes, unread)


class PairedEpisodes:
    """Counts over the saved episodes of both runs."""

    def __init__(self) -> None:
        self.compared = self.unequal = self.tokens = self.tokens_unequal = self.rows_unequal = self.unread = 0
        self.alone = {"A": 0, "B": 0}  # episodes of steps of which the other run has none that can be read
        self.fields: dict[str, int] = {}  # in how many episodes each field differs
        self.reasons: list[str] = []

    def add(self, a: Saved, b: Saved, step: int) -> None:
        self.unread += a.unread + b.unread
        names = {**a.episodes, **b.episodes}
        unpaired = [name for name in names if name not in a.episodes or name not in b.episodes]
        if not a.episodes or not b.episodes or a.unread or b.unread:  # what is missing is not another one
            self.alone["A"] += sum(name in a.episodes for name in unpaired)
            self.alone["B"] += sum(name in b.episodes for name in unpaired)
        elif unpaired:
            self._count(["name"] * len(unpaired))
            self.compared += len(unpaired)
            self.unequal += len(unpaired)
        for name in names:
            if name not in unpaired:
                self._pair(a.episodes[name], b.episodes[name], step)

    def _count(self, fields: Sequence[str]) -> None:
        for field in fields:
            self.fields[field] = self.fields.get(field, 0) + 1

    def _pair(self, x: Episode, y: Episode, step: int) -> None:
        if x.contract_id != y.contract_id:
            self.reasons.append(
                f"Step {step}, episode {x.name}: A's is of contract {x.contract_id}, B's of {y.contract_id}."
            )
            return
        self.compared += 1
        tensors_x, tensors_y = tensors(x), tensors(y)
        differs = [
            f for f in tensors_x | tensors_y
            if f not in tensors_x or f not in tensors_y or not _same(f, tensors_x[f], tensors_y[f])
        ]  # fmt: skip
        plain = ("seed", "temperature", "weights_digest", "facts")
        differs += [f for f in plain if not same_value(getattr(x, f), getattr(y, f))]
        differs += [f for f in ("actions", "events") if getattr(x, f) != getattr(y, f)]
        self.unequal += bool(differs)
        self._count(differs)
        other_inputs = {"tokens", "codes", "contexts", "frames.pixels", "frames.sizes", "events", "voice.payload"}
        other_inputs |= {f for f in tensors_x if f.endswith((".sampled_at", ".row_class"))}
        if other_inputs & set(differs) or x.streams.keys() != y.streams.keys():
            return  # nothing to count
        for stream, one in x.streams.items():
            other = y.streams[stream]
            self.tokens += len(one.logprob)
            if len(one.logprob) == len(other.logprob) and len(one.digest) == len(other.digest):
                self.tokens_unequal += int(unequal(one.logprob, other.logprob).sum())
                self.rows_unequal += int((one.digest != other.digest).sum())


def _same(field: str, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, type and bits. Log-probs that are not finite equal nothing, as in the check of sampler and
    learner: two runs that went wrong alike are no proof of each other."""
    differ = unequal if field.endswith(".logprob") else unequal_bits
    return a.shape == b.shape and a.dtype == b.dtype and not bool(differ(a, b).any())
