"""The reference policy: log-ratios of policy and reference, for the reference KL and its penalty.

The reference is a frozen copy of the warm-started policy, read from the run's own checkpoint of step 0, so that a
resumed run has the same one. Its log-probs are computed teacher-forced by the learner's kernels, so that before the
first update every log-ratio is exactly 0.

Reference KL is not mismatch KL (`rl.step.identity`): that one compares sampler and learner at equal weights and is
always 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.backbone.transformer import InteractionModel
from model.logprob import TokenClasses
from model.program import teams
from model.program.exhausted import needing
from model.weights import checkpoint
from rl.step.batch import collate
from rl.step.sequence import choice_logprobs
from rollout.record.episode import Episode, concatenate


class Reference:
    """Owns the frozen reference policy."""

    def __init__(self, model: InteractionModel, classes: TokenClasses, micro_batch: int) -> None:
        """``micro_batch``: episodes in one forward pass; by the row contract it does not enter the result."""
        self._model = model.requires_grad_(False)
        self._classes = classes
        self._micro_batch = micro_batch

    @staticmethod
    def load(folder: Path, classes: TokenClasses, micro_batch: int) -> Reference:
        """The policy of a checkpoint; raises CheckpointError when it is not there."""
        return Reference(checkpoint.load(folder, keep_weights=False), classes, micro_batch)

    @needing("the reference policy's forward pass", "lower rl.micro_batch (in a new run: it orders sums)")
    @torch.inference_mode()
    def log_ratio(self, episodes: Sequence[Episode]) -> list[Tensor]:
        """log p(token) - log p_reference(token) of every sampled token, in nats: fp32 [N_e] for each episode."""
        reference = []
        for first in range(0, len(episodes), self._micro_batch):
            some = episodes[first : first + self._micro_batch]
            logprob, _, _ = choice_logprobs(
                self._model, collate(some, self._model.senses), self._classes, some[0].temperature
            )
            reference.append(logprob.cpu())
        ratio = concatenate(episodes, "logprob") - torch.cat(reference)
        return list(ratio.split([len(e.text.chunk) for e in episodes]))


def metrics(log_ratio: Sequence[Tensor]) -> dict[str, float]:
    """The usual estimators of the reference KL per token (Schulman 2020) over all ranks' tokens, in nats:
    k1 = mean(r) and k3 = mean(exp(-r) - 1 + r), r = log p - log p_reference."""
    r = torch.cat(list(log_ratio)).double()
    sums = (float(r.sum()), float((torch.expm1(-r) + r).sum()), len(r))
    k1, k3, tokens = (sum(column) for column in zip(*teams.gather(sums), strict=True))
    return {"reference/kl_k1": k1 / tokens, "reference/kl_k3": k3 / tokens}
