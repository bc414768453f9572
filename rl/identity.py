"""The identity check: the learner must give every sampled token the very bits that the sampler gave it.

Two failures are told apart. *Not comparable*: the episodes come from other weights or another contract, so that no
statement is possible. *Not equal*: same weights, same contract, other bits; training stops and `rl.audit.diagnose`
names the first op whose results differ. Nothing here averages before it compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from rollout.episode import TEXT, Episode


class NotComparableError(MetronomeError):
    """Episodes of other weights or another contract: their log-probs say nothing about this learner's."""


class NotEqualError(MetronomeError):
    """Same weights and contract, other bits. The sampler and the learner are not the same function."""

    def __init__(self, message: str, difference: dict[str, Any] | None = None) -> None:
        """``difference``: what `rl.audit.diagnose` found, as plain values. Optional, since pickling (ranks exchange
        errors) makes the error from its message and sets the rest afterwards."""
        super().__init__(message)
        self.difference = difference


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
    """Raises NotComparableError for the first episode of another contract or other weights, or with a stream that the
    learner does not score."""
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
        if unscored := [name for name in e.streams if name != TEXT]:
            raise NotComparableError(
                f"episode {e.name}: was sampled in {', '.join(unscored)} beside text, which this learner does not score"
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
