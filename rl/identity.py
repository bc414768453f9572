"""The identity check: the learner must give every sampled token the very bits that the sampler gave it.

Two failures are told apart. *Not comparable*: the episodes come from other weights or another contract, so that no
statement is possible. *Not equal*: same weights, same contract, other bits; training stops and `locate` names the first
activation that differs. Nothing here averages before it compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from kernels.layout import Segments
from model.state import SessionState
from model.transformer import InteractionModel
from rollout.episode import Episode


class NotComparableError(MetronomeError):
    """Episodes of other weights or another contract: their log-probs say nothing about this learner's."""


class NotEqualError(MetronomeError):
    """Same weights and contract, other bits. The sampler and the learner are not the same function."""


@dataclass(frozen=True)
class Mismatch:
    """Sampler against learner over N sampled tokens; d = logprob_learner - logprob_rollout.

    num_unequal and rows_unequal count bitwise differences (log-prob of the token; digest of the whole row);
    k1 = mean(-d) and k3 = mean(exp(d) - 1 - d) are the usual estimators of the mismatch KL (Schulman 2020), in nats.
    """

    num_tokens: int
    num_unequal: int
    rows_unequal: int
    k1_sum: float
    k3_sum: float
    max_abs: float

    @staticmethod
    def total(parts: Sequence[Mismatch]) -> Mismatch:
        return Mismatch(
            sum(p.num_tokens for p in parts),
            sum(p.num_unequal for p in parts),
            sum(p.rows_unequal for p in parts),
            sum(p.k1_sum for p in parts),
            sum(p.k3_sum for p in parts),
            max((p.max_abs for p in parts), default=0.0),
        )

    def metrics(self) -> dict[str, float | int]:
        n = max(self.num_tokens, 1)
        return {
            "mismatch/num_tokens": self.num_tokens,
            "mismatch/num_unequal": self.num_unequal,
            "mismatch/rows_unequal": self.rows_unequal,
            "mismatch/k1": self.k1_sum / n,
            "mismatch/k3": self.k3_sum / n,
            "mismatch/max_abs": self.max_abs,
        }


def check_comparable(episodes: Sequence[Episode], contract_id: str, weights_digest: str) -> None:
    """Raises NotComparableError for the first episode of another contract or other weights."""
    for e in episodes:
        if e.contract_id != contract_id:
            raise NotComparableError(
                f"episode {e.name}: sampled under contract {e.contract_id}, but this learner's is {contract_id}. Bits "
                "of other backends, instruction sets or versions cannot be compared: roll the episodes out again here."
            )
        if e.weights_digest != weights_digest:
            raise NotComparableError(
                f"episode {e.name}: sampled from weights {e.weights_digest}, but the learner holds {weights_digest}. "
                "Publish the learner's weights to the sampler before rolling out."
            )


def unequal_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two fp32 tensors differ in bits (NaN equals the same NaN, 0.0 differs from -0.0); bool, same shape."""
    return a.contiguous().view(torch.int32) != b.contiguous().view(torch.int32)


def compare(
    rollout_logprob: Tensor, learner_logprob: Tensor, rollout_digest: Tensor, learner_digest: Tensor
) -> Mismatch:
    """Counts over all N tokens; logprobs fp32 [N], digests int64 [N]."""
    d = learner_logprob.double() - rollout_logprob.double()
    return Mismatch(
        num_tokens=rollout_logprob.numel(),
        num_unequal=int(unequal_bits(rollout_logprob, learner_logprob).sum()),
        rows_unequal=int((rollout_digest != learner_digest).sum()),
        k1_sum=float(-d.sum()),
        k3_sum=float((d.expm1() - d).sum()),
        max_abs=float(d.abs().max()) if d.numel() else 0.0,
    )


def failure(
    model: InteractionModel,
    episodes: Sequence[Episode],
    learner_logprob: Tensor,
    learner_digest: Tensor,
    owner: Tensor,
    step: int,
) -> NotEqualError:
    """The error to raise when `compare` found a difference: names step, episode, token, both values and the first
    activation that differs. Arrays are [N], packed as the episodes are; owner says which episode a token belongs to."""
    rollout_logprob = torch.cat([e.logprob for e in episodes])
    wrong = unequal_bits(rollout_logprob, learner_logprob) | (torch.cat([e.digest for e in episodes]) != learner_digest)
    first = int(wrong.nonzero()[0])
    episode = episodes[int(owner[first])]
    within = first - int((owner < owner[first]).sum())
    position = int(episode.sampled_at[within])
    return NotEqualError(
        f"step {step}, episode {episode.name}, token {position} (chunk {int(episode.chunk[within])}, id "
        f"{int(episode.tokens[position])}): the sampler's log-prob {rollout_logprob[first].item()!r} is not the "
        f"learner's {learner_logprob[first].item()!r}; {int(wrong.sum())} of {wrong.numel()} tokens differ. "
        f"{locate(model, episode)} The step was not taken; the last checkpoint stands."
    )


@torch.no_grad()
def locate(model: InteractionModel, episode: Episode) -> str:
    """Replays the episode as a session would and as the learner does, and says where they part."""
    length = int(episode.sampled_at[-1])
    whole: list[tuple[str, Tensor]] = []
    model(episode.tokens[:length], episode.codes, Segments.build([0], [0], [length]), None, whole)
    pieces = replay(model, episode)
    for i, (name, learner) in enumerate(whole):
        session = torch.cat([piece[i][1] for piece in pieces])
        differs = (learner != session).flatten(1).any(1)
        if differs.any():
            row = int(differs.nonzero()[0])
            gap = (learner[row].float() - session[row].float()).abs().max().item()
            return f"The first activation that differs is {name} at row {row} (largest gap {gap:.3e})."
    return (
        "Replayed alone, all activations agree: the difference comes from what ran beside the episode, or from weights "
        "that changed between sampling and learning."
    )


def replay(model: InteractionModel, episode: Episode) -> list[list[tuple[str, Tensor]]]:
    """Feeds the episode's tokens in the cuts in which its session fed them; one list of named activations a call."""
    state = SessionState(model.config, 1, len(episode.tokens), model.dtype)
    slot = state.open()
    pieces: list[list[tuple[str, Tensor]]] = []
    begin, heard = 0, 0
    for end in episode.sampled_at.tolist():
        tokens = episode.tokens[begin:end]
        audio_rows = int((tokens == model.config.audio_token_id).sum())
        captured: list[tuple[str, Tensor]] = []
        model(tokens, episode.codes[heard : heard + audio_rows], state.extend([slot], [end - begin]), state, captured)
        pieces.append(captured)
        begin, heard = end, heard + audio_rows
    return pieces
