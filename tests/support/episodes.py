"""Episodes compared to the bit, and episodes that were tampered with."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from rollout.record.episode import TEXT, Episode, Stream, tensors
from rollout.turn.action import LISTEN


def unequal_fields(one: Episode, other: Episode) -> set[str]:
    """Names of all in which two episodes differ by a bit; those of `tensors` for what is a tensor."""
    a, b = tensors(one), tensors(other)
    plain = {f.name for f in fields(Episode)} - {"tokens", "codes", "contexts", "frames", "streams"}
    differs = {name for name in plain if getattr(one, name) != getattr(other, name)} | (a.keys() ^ b.keys())
    return differs | {n for n in a.keys() & b.keys() if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])}


def with_text(episode: Episode, **changes: Tensor) -> Episode:
    """The episode with other fields of its text stream."""
    return replace(episode, streams={**episode.streams, TEXT: replace(episode.text, **changes)})


def some_episode() -> Episode:
    """One chunk, in which the model listens: one sampled token."""
    return Episode(
        scenario="timespeak/train/0",
        rollout=0,
        seed=0,
        temperature=1.0,
        contract_id="c0",
        weights_digest="w0",
        facts={},
        actions=(LISTEN,),
        tokens=torch.tensor([1, 2, 2, 2, 2, 3]),
        codes=torch.zeros(4, 80, dtype=torch.uint8),
        streams={TEXT: Stream(*(torch.tensor([n]) for n in (5, 0, 0, -0.5, 7)))},
    )
