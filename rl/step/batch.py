"""Packs episodes for the learner: one long row of tokens, each episode a segment of its own starting at position 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import ops
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs, Senses
from model.logprob import TokenClasses
from model.voice.chain import loss, score
from rollout.record.episode import Episode, Stream
from rollout.record.transcript import Transcript
from rollout.seeds import VOICE_STREAM, token_key


@dataclass(frozen=True)
class Voice:
    """The M chunks of sound of several episodes, as they were drawn or, in demonstrations, as they should be."""

    row: Tensor  # int64 [M] input row whose hidden state gives the chunk
    chains: Tensor | None  # fp32 [M, K + 1, NUMBERS], drawn (`model.voice.chain`)
    target: Tensor | None  # fp32 [M, NUMBERS], demonstrated
    key: Tensor | None  # int64 [M], from which a demonstrated chunk's time and noise are drawn
    owner: Tensor  # int64 [M] index of the chunk's episode in the batch
    chunk: Tensor  # int64 [M] chunk of that episode


@dataclass(frozen=True)
class Batch:
    """Several episodes in one packed sequence, and the N tokens in them that the policy chose."""

    inputs: Inputs
    row: Tensor  # int64 [N] input row whose hidden state gives the chosen token's distribution
    target: Tensor  # int64 [N] the chosen token
    row_class: Tensor  # int64 [N] which set of tokens was allowed (`TokenClasses`)
    owner: Tensor  # int64 [N] index of the token's episode in the batch
    chunk: Tensor  # int64 [N] chunk of that episode
    voice: Voice | None = None  # what the policy said in sound, if it did


def collate(episodes: Sequence[Episode | Transcript], senses: Senses) -> Batch:
    """Packs episodes. Rows after an episode's last chosen token are dropped: nothing depends on them. ``senses``: the
    model's."""
    inputs = Inputs.cat(episodes, senses).cut([needed(e) for e in episodes])
    return Batch(
        inputs=inputs,
        row=torch.cat([e.text.sampled_at - 1 + s for e, s in zip(episodes, inputs.starts, strict=True)]),
        target=torch.cat([e.tokens[e.text.sampled_at] for e in episodes]),
        row_class=torch.cat([e.text.row_class for e in episodes]),
        owner=torch.cat([torch.full_like(e.text.chunk, i) for i, e in enumerate(episodes)]),
        chunk=torch.cat([e.text.chunk for e in episodes]),
        voice=_voice(episodes, inputs.starts),
    )


def needed(episode: Episode | Transcript) -> int:
    """Rows before those on which nothing depends."""
    return max(int(s.sampled_at[-1]) for s in (episode.text, episode.voice) if s is not None)


def _voice(episodes: Sequence[Episode | Transcript], starts: Sequence[int]) -> Voice | None:
    spoken = [(i, e, e.voice) for i, e in enumerate(episodes) if e.voice is not None]
    if not spoken:
        return None
    chains = [v.payload for _, _, v in spoken if isinstance(v, Stream) and v.payload is not None]
    targets = [e.sound.flatten(1) for _, e, _ in spoken if isinstance(e, Transcript)]
    keys = [
        token_key(e.key, k, at, VOICE_STREAM)
        for _, e, v in spoken
        if isinstance(e, Transcript)
        for k, at in zip(v.chunk.tolist(), v.sampled_at.tolist(), strict=True)
    ]
    return Voice(
        row=torch.cat([v.sampled_at - 1 + starts[i] for i, _, v in spoken]),
        chains=torch.cat(chains) if chains else None,
        target=torch.cat(targets) if targets else None,
        key=torch.tensor(keys) if keys else None,
        owner=torch.cat([torch.full_like(v.chunk, i) for i, _, v in spoken]),
        chunk=torch.cat([v.chunk for _, _, v in spoken]),
    )


@dataclass(frozen=True)
class Sound:
    """What a forward pass gives for the M chunks of sound of a batch."""

    logprob: Tensor  # fp32 [M], nats, under autograd; of demonstrations minus the flow-matching loss
    digest: Tensor  # int64 [M], of the chains' distributions; 0 of demonstrations


def choice_logprobs(
    model: InteractionModel, batch: Batch, classes: TokenClasses, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The learner's (log-prob fp32, entropy fp32 in nats, row digest int64) of each chosen token, [N] each, under
    autograd. ``temperature`` divides the logits."""
    return all_logprobs(model, batch, classes, temperature)[0]


def all_logprobs(
    model: InteractionModel, batch: Batch, classes: TokenClasses, temperature: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Sound | None]:
    """(`choice_logprobs`, what it gives for the batch's sound, if there is some). Raises ValueError for chains of
    another shape than the model's (`model.voice.chain.check_chains`)."""
    voice = batch.voice
    with ops.deferred():  # the host waits once, at the end of the block
        rows = () if voice is None else (voice.row,)
        placed = model.place(batch.inputs, None, batch.row, batch.target, batch.row_class, *rows)
        row, target, row_class, *spoken = placed.more
        hidden = model(placed)
        sound = None if voice is None else _sound(model, hidden[spoken[0]], voice)
        return classes.logprob(model.logits(hidden[row]), target, row_class, temperature), sound


def _sound(model: InteractionModel, hidden: Tensor, voice: Voice) -> Sound:
    head = model.voice_head
    if head is None:
        raise ValueError("the conversations have sound, but the model has no voice")
    if voice.chains is not None:
        return Sound(*score(head, hidden, voice.chains.to(hidden.device)))
    assert voice.target is not None and voice.key is not None
    flow = loss(head, hidden, voice.target.to(hidden.device), voice.key)
    return Sound(-flow, torch.zeros(len(voice.key), dtype=torch.int64))
