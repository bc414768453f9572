"""Likely causes of a difference between sampler and learner, each with the fact that points to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch

from kernels import dispatch, ops
from model.backbone.transformer import InteractionModel
from model.weights.checkpoint import weights_digest
from rl.audit.diagnosis.differences import OpDifference, Traces, first_unequal
from rl.step.identity import unequal_bits
from rollout.record.episode import Episode

FEW_ROWS = 8
"""With fewer rows than this, torch's fp32 linear took another code path on the CPUs tried
(tests/model/test_identity.py)."""


def suspects(
    model: InteractionModel,
    sampling: InteractionModel | None,
    episode: Episode,
    traces: Traces,
    growth: Sequence[OpDifference],
    depends_on: Mapping[str, str],
) -> list[str]:
    """The likely causes as sentences, the likeliest first. ``model``: the learner's; ``sampling``: the sampler's, where
    that is another object. ``growth``: sampler and learner compared as they ran; ``depends_on``: from
    `Traces.depends_on`."""
    out = [] if sampling is None else unequal_weights(sampling, model)
    if (now := weights_digest(model)) != episode.weights_digest:
        out.append(f"weights that changed between sampling and learning (digest {episode.weights_digest}, now {now})")
    first = first_unequal(growth)
    if first is None:
        out.append(
            "what the sampler stored: a replay gives the learner's bits, so that the record was changed, or sampled "
            "beside other sessions than those of this batch"
        )
        return out
    if out:
        return out
    entries = {"sampler": traces.sampler.entries[first.name], "learner": traces.learner.entries[first.name]}
    for who, entry in entries.items():
        if entry.op and not entry.function.startswith("kernels."):
            out.append(f"{entry.op} ran on {entry.function} in the {who}, which is none of the project's kernels")
    if first.op == "moe_combine":
        out += _order_of_experts(first, traces)
    elif first.op == "attention" and first.first_row > 0:
        out.append(
            f"attention of {first.name.split(' ')[0]} cuts the keys differently: no row before {first.first_row} "
            f"differs, so that the first cut of sampler or learner ends at key {first.first_row} or before; the "
            f"contract's split has {dispatch.contract()['split_tokens']} keys"
        )
    return out + _dependence(first, depends_on)


def _dependence(first: OpDifference, depends_on: Mapping[str, str]) -> list[str]:
    """On the number of rows, on what runs beside the episode, on cuts and cache."""
    out = []
    sampled, learned = first.rows_in_call
    if sampled != learned:
        few = f" < {FEW_ROWS}" if min(sampled, learned) < FEW_ROWS <= max(sampled, learned) else ""
        out.append(
            f"{first.op or first.name} depends on the number of rows: {first.name} ran over {min(sampled, learned)} "
            f"rows{few} in the {'sampler' if sampled < learned else 'learner'} and over {max(sampled, learned)} in the "
            "other"
        )
    for who in ("sampler", "learner"):
        if op := depends_on[f"{who} alone, {who} as run"]:
            out.append(f"the {who}'s {op} depends on what runs beside the episode")
    if depends_on["sampler alone, learner alone"] == first.name:
        out.append(f"{first.name} depends on chunk cuts or on the cache: alone it differs too")
    return out


def _order_of_experts(first: OpDifference, traces: Traces) -> list[str]:
    """Finds the order of experts in which the contract's op gives the sampler's bits, and the learner's."""
    out = []
    names = list(traces.learner.entries)
    inputs = traces.learner.entries[names[names.index(first.name) - 1]].rows  # of the down projection, [T, J * D]
    weight = torch.cat(traces.learner.entries[first.name].weights)  # [T, J]
    choices = weight.shape[1]
    y = inputs.view(len(weight), choices, -1)
    for who, trace in (("sampler", traces.sampler), ("learner", traces.learner)):
        orders = permutations(range(choices)) if choices <= 5 else iter([])
        for order in orders:
            index = list(order)
            again = ops.moe_combine(y[:, index].reshape(-1, y.shape[2]), weight[:, index].contiguous())
            if torch.equal(again, trace.entries[first.name].rows):
                if index != sorted(index):
                    out.append(
                        f"experts of {first.name.split(' ')[0]} combined in another order: {index} of each row's list "
                        f"in the {who}, ascending by the contract"
                    )
                break
    return out


def unequal_weights(sampling: InteractionModel, learning: InteractionModel) -> list[str]:
    """A sentence for each parameter in which the two models differ."""
    out = []
    for (name, sampled), learned in zip(sampling.named_parameters(), learning.parameters(), strict=True):
        a, b = sampled.detach(), learned.detach()
        unequal = unequal_bits(a, b)
        if count := int(unequal.sum()):
            where = tuple(unequal.nonzero()[0].tolist())
            one_ulp = count == 1 and bool(torch.nextafter(a[where], b[where]) == b[where])
            size = "one ulp" if one_ulp else f"{(a - b).abs().max().item():.3e} at most"
            out.append(
                f"{'one weight differs' if count == 1 else f'{count} weights differ'}: {name}{list(where)}, by {size}"
            )
    return out
