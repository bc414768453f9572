"""The identity check: the learner's log-prob of every sampled token must have the bits of the sampler's.

There are two failures. *Not comparable*: the episodes come from other weights or another contract, so that no statement
is possible. *Not equal*: same weights, same contract, other bits. Training stops, and from the evidence that the error
carries the caller can find the first op whose results differ (`rl.audit.diagnosis`). Tokens are compared one by one;
means are taken only afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.program import teams
from rollout.record.episode import TEXT, VOICE, Episode, Stream, check_sound


class NotComparableError(MetronomeError):
    """Episodes of other weights or another contract: their log-probs cannot be compared with this learner's."""


@dataclass(frozen=True)
class Mismatch:
    """Sampler against learner over N sampled tokens; d = logprob_learner - logprob_rollout.

    k1 = mean(-d) and k3 = mean(exp(d) - 1 - d) estimate the KL of sampler and learner (Schulman 2020, "Approximating KL
    divergence").
    """

    num_tokens: int
    num_unequal: int  # tokens whose log-prob differs in any bit, or is not finite
    rows_unequal: int  # tokens whose whole row of log-probs differs, by its digest
    k1_sum: float  # nats
    k3_sum: float  # nats
    max_abs: float  # largest |d|, nats

    @staticmethod
    def total(parts: Sequence[Mismatch]) -> Mismatch:
        """The counts and sums of all parts together."""
        return Mismatch(
            sum(p.num_tokens for p in parts),
            sum(p.num_unequal for p in parts),
            sum(p.rows_unequal for p in parts),
            sum(p.k1_sum for p in parts),
            sum(p.k3_sum for p in parts),
            max((p.max_abs for p in parts), default=0.0),
        )

    def metrics(self) -> dict[str, float | int]:
        """For metrics.jsonl, under ``mismatch/``: the counts, and the means k1 and k3 in nats a token (0 of no
        tokens)."""
        n = max(self.num_tokens, 1)
        return {
            "mismatch/num_tokens": self.num_tokens,
            "mismatch/num_unequal": self.num_unequal,
            "mismatch/rows_unequal": self.rows_unequal,
            "mismatch/k1": self.k1_sum / n,
            "mismatch/k3": self.k3_sum / n,
            "mismatch/max_abs": self.max_abs,
        }


def check_comparable(
    episodes: Sequence[Episode], contract_id: str, weights_digest: str, steps: int | None = None
) -> None:
    """Raises NotComparableError for the first episode of another contract or other weights, with a stream that the
    learner does not score, or with other sound than a model with chains of ``steps`` steps samples (None: a model
    without a voice): what is missing would be compared with nothing."""
    for e in episodes:
        if e.contract_id != contract_id:
            raise NotComparableError(
                f"episode {e.name}: sampled under contract {e.contract_id}, but this learner's is {contract_id}. Bits "
                "of other backends, kinds of GPU or versions cannot be compared: roll the episodes out again here."
            )
        if e.weights_digest != weights_digest:
            raise NotComparableError(
                f"episode {e.name}: sampled from weights {e.weights_digest}, but the learner holds {weights_digest}. "
                "Publish the learner's weights to the sampler before rolling out."
            )
        if unscored := [name for name in e.streams if name not in (TEXT, VOICE)]:
            raise NotComparableError(
                f"episode {e.name}: was sampled in {', '.join(unscored)} beside text, which this learner does not score"
            )
        try:
            check_sound(e, steps)
        except ValueError as error:
            raise NotComparableError(
                f"episode {e.name}: {error}. Roll the episodes out again with this model."
            ) from None


def unequal_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one shape and type differ in bits (a NaN equals the same NaN, 0.0 differs from -0.0): bool,
    same shape."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.contiguous().view(bits) != b.contiguous().view(bits)


def unequal(rollout: Tensor, learner: Tensor) -> Tensor:
    """Where the log-probs of sampler and learner differ in bits, or are no finite numbers, which are never right: bool
    [N]; both fp32 [N]."""
    return unequal_bits(rollout, learner) | ~rollout.isfinite() | ~learner.isfinite()


def compare(
    rollout_logprob: Tensor, learner_logprob: Tensor, rollout_digest: Tensor, learner_digest: Tensor
) -> Mismatch:
    """Compares the sampler (``rollout``) with the learner over N tokens: log-probs fp32 [N], row digests int64 [N]."""
    d = learner_logprob.double() - rollout_logprob.double()
    return Mismatch(
        num_tokens=rollout_logprob.numel(),
        num_unequal=int(unequal(rollout_logprob, learner_logprob).sum()),
        rows_unequal=int((rollout_digest != learner_digest).sum()),
        k1_sum=float(-d.sum()),
        k3_sum=float((d.expm1() - d).sum()),
        max_abs=float(d.abs().max()) if d.numel() else 0.0,
    )


def choices(episodes: Sequence[Episode], name: str) -> Tensor:
    """The field ``name`` of all sampled tokens and then of all sampled chunks of sound, as `Evidence` has them."""
    return torch.cat([getattr(stream, name) for _, _, stream in _streams(episodes)])


def _streams(episodes: Sequence[Episode]) -> Iterator[tuple[str, int, Stream]]:
    """(name, index of its episode, stream): the streams of text of all episodes, then those of sound."""
    for name in (TEXT, VOICE):
        yield from ((name, i, e.streams[name]) for i, e in enumerate(episodes) if name in e.streams)


@dataclass(frozen=True, eq=False)
class Evidence:
    """A rank's episodes of one step and what the learner's forward pass gave for their N choices: all sampled tokens
    in the episodes' order, and then all sampled chunks of sound. With the model, all that a diagnosis needs."""

    step: int
    episodes: Sequence[Episode]
    logprob: Tensor  # fp32 [N], the learner's
    digest: Tensor  # int64 [N], the learner's
    micro_batch: int  # episodes in one of the learner's forward passes

    def mismatch(self) -> Mismatch:
        """The sampler's stored values compared with the learner's."""
        return compare(choices(self.episodes, "logprob"), self.logprob, choices(self.episodes, "digest"), self.digest)

    def first(self) -> TokenDifference:
        """The first token that differs; raises ValueError when none does."""
        logprob = choices(self.episodes, "logprob")
        differs = unequal(logprob, self.logprob) | (choices(self.episodes, "digest") != self.digest)
        if not differs.any():
            raise ValueError("every log-prob and every row digest is equal: there is no first difference")
        at = within = int(differs.nonzero()[0])
        streams = iter(_streams(self.episodes))
        name, owner, stream = next(streams)
        while within >= len(stream.logprob):
            within -= len(stream.logprob)
            name, owner, stream = next(streams)
        position = int(stream.sampled_at[within])
        return TokenDifference(
            owner=owner,
            position=position,
            chunk=int(stream.chunk[within]),
            token=int(self.episodes[owner].tokens[position]) if name == TEXT else None,
            rollout_logprob=float(logprob[at]),
            learner_logprob=float(self.logprob[at]),
        )

    def describe(self) -> str:
        """The first difference and the counts, as a sentence; raises ValueError when nothing differs."""
        first, mismatch = self.first(), self.mismatch()
        name = self.episodes[first.owner].name
        where = f"token {first.position} (chunk {first.chunk}, id {first.token})"
        if first.token is None:
            where = f"the sound of chunk {first.chunk}"
        return (
            f"step {self.step}, episode {name}, {where}: the sampler's log-prob {first.rollout_logprob!r} is not the "
            f"learner's {first.learner_logprob!r}; "
            f"{mismatch.num_unequal} log-probs and {mismatch.rows_unequal} rows of {mismatch.num_tokens} tokens differ."
        )


@dataclass(frozen=True)
class TokenDifference:
    """A sampled token, or chunk of sound, whose log-prob or digest is not the learner's."""

    owner: int  # index of its episode
    position: int  # index in the episode's tokens; of sound, of the row after the micro-turn's last
    chunk: int
    token: int | None  # its id; None for sound
    rollout_logprob: float
    learner_logprob: float


class NotEqualError(MetronomeError):
    """Sampler and learner gave different bits for the same tokens, under the same weights and contract."""

    def __init__(self, message: str, evidence: Evidence | None = None) -> None:
        """``evidence``: this rank's; None where only other ranks' tokens differ. (It has a default because unpickling
        constructs an exception from its message and sets the other attributes afterwards.)"""
        super().__init__(message)
        self.evidence = evidence


def check_identity(evidence: Evidence) -> Mismatch:
    """The counts over all sampled tokens, a team's once. Raises NotEqualError on every rank when a bit differs on any
    rank: with the message of the first such rank, and with each rank's own evidence, so that evidence need not cross
    processes."""
    mismatch = evidence.mismatch()
    differs = bool(mismatch.num_unequal or mismatch.rows_unequal)
    parts = teams.gather((mismatch, evidence.describe() if differs else ""))
    message = next((text for _, text in parts if text), "")
    if message:
        raise NotEqualError(
            f"{message} The step was not taken; the last checkpoint stands.", evidence if differs else None
        )
    return Mismatch.total([part for part, _ in parts])
