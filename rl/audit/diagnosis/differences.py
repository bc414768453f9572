"""Compares traces of one episode op by op. In order of execution, the first op whose results differ had equal inputs,
so the op or its weights are the cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.backbone.transformer import InteractionModel
from model.logprob import TokenClasses
from rl.audit.diagnosis import trace
from rl.audit.diagnosis.trace import Entry, Trace
from rl.step.identity import unequal_bits
from rollout.record.episode import Episode


@dataclass(frozen=True)
class OpDifference:
    """How much the results of one op differ between the sampler's trace and the learner's."""

    name: str  # of the entry in both traces, as "layers.1.mlp (moe_combine)"
    op: str  # name in `kernels.ops`; "" for an activation that torch computed between ops
    rows: int  # rows compared
    rows_unequal: int
    first_row: int  # first row that differs; -1 where all are equal
    max_abs: float  # largest absolute difference
    sampler: str  # the function that ran, and over how many rows in the call that computed `first_row`
    learner: str
    rows_in_call: tuple[int, int]  # these numbers of rows: (sampler's, learner's)


class Traces:
    """Four traces of one episode: of sampler and learner, each with the episodes that ran beside it and alone."""

    def __init__(
        self,
        sampling: InteractionModel,
        learning: InteractionModel,
        episodes: Sequence[Episode],
        index: int,
        micro_batch: int,
        classes: TokenClasses,
    ) -> None:
        """``sampling``, ``learning``: the sampler's and the learner's model; ``index``: which of ``episodes`` is
        traced; ``micro_batch``: episodes in one of the learner's forward passes."""
        begin = index - index % micro_batch
        alone = [episodes[index]]
        self.sampler = trace.sampler(sampling, episodes, index, classes)
        self.sampler_alone = trace.sampler(sampling, alone, 0, classes)
        self.learner = trace.learner(learning, episodes[begin : begin + micro_batch], index - begin, classes)
        self.learner_alone = trace.learner(learning, alone, 0, classes)

    def depends_on(self) -> dict[str, str]:
        """Pair of traces -> name of the first op that differs between them, "" for none. Shows whether a difference
        depends on the episodes beside this one, or on cuts and the cache."""
        pairs = {
            "sampler as run, learner as run": (self.sampler, self.learner),
            "sampler alone, sampler as run": (self.sampler_alone, self.sampler),
            "learner alone, learner as run": (self.learner_alone, self.learner),
            "sampler alone, learner alone": (self.sampler_alone, self.learner_alone),
        }
        firsts = {name: first_unequal(compare_traces(*pair)) for name, pair in pairs.items()}
        return {name: first.name if first else "" for name, first in firsts.items()}


def compare_traces(sampler: Trace, learner: Trace) -> list[OpDifference]:
    """The differences of all entries that both traces have, with equal shapes, in the learner's order of execution."""
    out = []
    for name, learned in learner.entries.items():
        sampled = sampler.entries.get(name)
        if sampled is None:
            continue
        a, b = sampled.rows, learned.rows
        if a.shape != b.shape:
            continue
        unequal = unequal_bits(a, b).any(1)
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
                max_abs=0.0 if first < 0 or name in trace.DIGESTS else float((a.double() - b.double()).abs().max()),
                sampler=_ran(sampled, rows_in_call[0]),
                learner=_ran(learned, rows_in_call[1]),
                rows_in_call=rows_in_call,
            )
        )
    return out


def first_unequal(differences: Sequence[OpDifference]) -> OpDifference | None:
    """The first entry with an unequal row; None without one."""
    return next((one for one in differences if one.rows_unequal), None)


def _ran(entry: Entry, rows: int) -> str:
    return f"{entry.function or 'torch, between ops'} over {rows} rows"
