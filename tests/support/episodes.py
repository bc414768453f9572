"""Episodes compared to the bit, and episodes that were tampered with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from model.senses.audio import DMel
from model.voice.config import NUMBERS
from rollout.record.episode import TEXT, VOICE, Episode, Stream, tensors
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import GO_ON, LISTEN, Action, Mode
from rollout.turn.observation import stack_audio
from rollout.world.speech import SpeechBank


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


FIRST = 5


def _stream(chunks: list[int]) -> Stream:
    at, row_class, chunk, digest = (torch.tensor(chunks) for _ in range(4))
    return Stream(at, row_class, chunk, torch.zeros(len(chunks)), digest)


def spoken(bank: SpeechBank, sound: Sequence[Tensor] | Tensor = ()) -> Episode:
    """Of turn_taking: a model that says "four" from chunk `FIRST` on, with a chunk of ``sound`` after another."""
    item = ScenarioConfig().scenario("turn_taking", "train", 0, bank)
    said = {FIRST + i: replace(GO_ON, sound=one) for i, one in enumerate(sound)}
    actions = [said.get(k, LISTEN) for k in range(item.chunks)]
    actions[FIRST] = Action(Mode.SPEAK, ("four",), actions[FIRST].sound)
    observed, _, facts = enact(item, lambda user: lambda k: actions[k])
    streams = {TEXT: _stream(list(range(item.chunks)))}
    if len(sound):
        chains = torch.stack([one.reshape(1, NUMBERS).expand(3, NUMBERS) for one in sound])
        streams[VOICE] = replace(_stream(sorted(said)), payload=chains)
    return Episode(
        scenario=item.id, rollout=0, seed=0, temperature=1.0, contract_id="c", weights_digest="d" * 32,
        facts=facts.to_json(), actions=tuple(actions), tokens=torch.zeros(99, dtype=torch.int64),
        codes=DMel.build().codes(stack_audio(observed).view(1, -1))[0], streams=streams,
    )  # fmt: skip
