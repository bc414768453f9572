"""Traces of one episode compared op by op: in order of execution, the first op whose results differ had equal inputs,
so it is the cause, or its weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.backbone.transformer import InteractionModel
from model.logprob import TokenClasses
from rl.audit.diagnosis import trace
from rl.audit.diagnosis.trace import Entry, Trace
from rollout.record.episode import Episode


@dataclass(frozen=True)
class OpDifference:
    """How far the results of one op are apart in two traces."""

    name: str
    op: str  # "" for an activation that is no op's own result
    rows: int
    rows_unequal: int
    first_row: int  # -1 where all are equal
    max_abs: float
    sampler: str  # what ran, and over how many rows in the call that computed the first row that differs
    learner: str
    rows_in_call: tuple[int, int]  # those numbers: sampler's, learner's


class Traces:
    """One episode's four traces: as it ran, beside the episodes of its batch, and by itself."""

    def __init__(
        self,
        sampling: InteractionModel,
        learning: InteractionModel,
        episodes: Sequence[Episode],
        index: int,
        micro_batch: int,
        classes: TokenClasses,
    ) -> None:
        """``index``: of the episode; ``micro_batch``: episodes in one of the learner's forward passes."""
        begin = index - index % micro_batch
        alone = [episodes[index]]
        self.sampler = trace.sampler(sampling, episodes, index, classes)
        self.sampler_alone = trace.sampler(sampling, alone, 0, classes)
        self.learner = trace.learner(learning, episodes[begin : begin + micro_batch], index - begin, classes)
        self.learner_alone = trace.learner(learning, alone, 0, classes)

    def depends_on(self) -> dict[str, str]:
        """What a difference hangs on: comparison -> name of the first op that differs in it, "" for none."""
        pairs = {
            "sampler as run, learner as run": (self.sampler, self.learner),
            "sampler alone, sampler as run": (self.sampler_alone, self.sampler),
            "learner alone, learner as run": (self.learner_alone, self.learner),
            "sampler alone, learner alone": (self.sampler_alone, self.learner_alone),
        }
        firsts = {name: first_unequal(compare_traces(*pair)) for name, pair in pairs.items()}
        return {name: first.name if first else "" for name, first in firsts.items()}


def compare_traces(sampler: Trace, learner: Trace) -> list[OpDifference]:
    """Every entry that both traces have at the same rows, in the learner's order of execution."""
    out = []
    for name, learned in learner.entries.items():
        sampled = sampler.entries.get(name)
        if sampled is None:
            continue
        a, b = sampled.rows, learned.rows
        if a.shape != b.shape:
            continue
        unequal = unequal_values(a, b).any(1)
        first = int(unequal.nonzero()[0]) if unequal.any() else -1
        row = max(first, 0)
        rows_in_call = sampled.calls[row], learned.calls[row]
        out.append(
            OpDifference(
                name=name,
                op=learned.op,
                rows=len(a),
                rows_unequal=int(unequal.sum()),
                first_row=first,
                max_abs=0.0 if first < 0 or name == trace.DIGEST else float((a.double() - b.double()).abs().max()),
                sampler=_ran(sampled, rows_in_call[0]),
                learner=_ran(learned, rows_in_call[1]),
                rows_in_call=rows_in_call,
            )
        )
    return out


def first_unequal(differences: Sequence[OpDifference]) -> OpDifference | None:
    return next((one for one in differences if one.rows_unequal), None)


def unequal_values(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one type differ in bits; bool, same shape."""
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.view(as_integers) != b.view(as_integers)


def _ran(entry: Entry, rows: int) -> str:
    return f"{entry.function or 'torch, between ops'} over {rows} rows"
