"""When it is not zero: which op of which layer parts sampler and learner, how the difference grows, what is suspect.

Two traces of one episode are compared op by op (`rl.audit.trace`). In order of execution the first op whose results
differ had equal inputs, so it is the culprit, or its weights are. Three further comparisons say what the difference
hangs on: the company of other episodes (in the sampler, in the learner), or the cuts and the cache. The suspects are
guesses made from these facts, and each says which fact it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch, ops
from model.checkpoint import weights_digest
from model.transformer import InteractionModel
from rl.audit import trace
from rl.audit.document import to_json
from rl.audit.table import Cell, Table
from rl.audit.trace import Entry, Trace
from rl.identity import Evidence, Mismatch
from rollout.episode import Episode
from rollout.vocabulary import Vocabulary

FEW_ROWS = 8
"""Below so many rows torch's own fp32 linear takes other paths on the CPUs tried (tests/model/test_identity.py)."""


@dataclass(frozen=True)
class Gap:
    """How far one op's results of two traces are apart."""

    name: str
    op: str  # "" for an activation that is no op's own result
    rows: int
    rows_unequal: int
    first_row: int  # -1 where all are equal
    max_abs: float
    sampler: str  # what ran, and over how many rows in the call that computed the first row that differs
    learner: str
    rows_in_call: tuple[int, int]  # those numbers: sampler's, learner's


@dataclass(frozen=True)
class Diagnosis:
    """What is known of one difference, as plain values."""

    step: int
    episode: str
    position: int  # of the first token that differs, in the episode
    chunk: int
    token: int
    rollout_logprob: float
    learner_logprob: float
    mismatch: Mismatch  # over all tokens compared
    growth: tuple[Gap, ...]  # in order of execution
    depends_on: dict[str, str]  # comparison -> the first op that differs in it, "" for none
    suspects: tuple[str, ...]

    @property
    def first(self) -> Gap | None:
        return next((gap for gap in self.growth if gap.rows_unequal), None)

    def sentence(self) -> str:
        if self.first is None:
            found = "Replayed, all activations agree."
        else:
            found = (
                f"The first activation that differs is {self.first.name} at row {self.first.first_row} (largest gap "
                f"{self.first.max_abs:.3e})."
            )
        return " ".join([found, *(f"Suspect: {suspect}." for suspect in self.suspects)])

    def tables(self) -> list[Table]:
        """For a reader that knows nothing of this module."""
        growth: list[list[Cell]] = [
            [g.name, g.rows, g.rows_unequal, g.first_row, g.max_abs, g.sampler, g.learner] for g in self.growth
        ]
        return [
            Table(
                "Where sampler and learner part",
                ["compared", "first op that differs"],
                [[name, op or "none: equal bits"] for name, op in self.depends_on.items()],
                "As run: with the episodes that ran beside it. Alone: this episode by itself.",
            ),
            Table(
                "How the difference grows",
                ["op", "rows", "rows unequal", "first row", "max abs", "sampler ran", "learner ran"],
                growth,
                "In order of execution; of an op with several results each has its own line.",
            ),
            Table(
                "Suspects",
                ["suspect"],
                [[suspect] for suspect in self.suspects],
                "Guesses from the facts above, the likeliest first.",
            ),
        ]

    def to_json(self) -> dict[str, Any]:
        """audit/difference.json: plain values, null for what is not finite."""
        fields = asdict(self) | {"mismatch": self.mismatch.metrics(), "first": self.first, "tables": self.tables()}
        return {name: to_json(value) for name, value in fields.items()}


def diagnose(model: InteractionModel, evidence: Evidence, sampling: InteractionModel | None = None) -> Diagnosis:
    """Explains the first difference between what the episodes hold and what the learner ``model`` gave.

    ``sampling``: the model that the sampler ran, where that is another object than the learner's. Raises ValueError
    when nothing differs."""
    first = evidence.first()
    episode = evidence.episodes[first.owner]
    ways = _Ways(model, sampling or model, evidence.episodes, first.owner, evidence.micro_batch)
    growth = gaps(ways.sampler, ways.learner)
    depends_on = {
        "sampler as run, learner as run": _first(growth),
        "sampler alone, sampler as run": _first(gaps(ways.sampler_alone, ways.sampler)),
        "learner alone, learner as run": _first(gaps(ways.learner_alone, ways.learner)),
        "sampler alone, learner alone": _first(gaps(ways.sampler_alone, ways.learner_alone)),
    }
    return Diagnosis(
        step=evidence.step,
        episode=episode.name,
        position=first.position,
        chunk=first.chunk,
        token=first.token,
        rollout_logprob=first.rollout_logprob,
        learner_logprob=first.learner_logprob,
        mismatch=evidence.mismatch(),
        growth=tuple(growth),
        depends_on=depends_on,
        suspects=tuple(_suspects(model, sampling, episode, ways, growth, depends_on)),
    )


class _Ways:
    """The four traces of the episode."""

    def __init__(
        self,
        model: InteractionModel,
        sampling: InteractionModel,
        episodes: Sequence[Episode],
        mine: int,
        micro_batch: int,
    ) -> None:
        classes = Vocabulary.build(model.vocab).classes
        begin = mine - mine % micro_batch
        alone = [episodes[mine]]
        self.sampler = trace.sampler(sampling, episodes, mine, classes)
        self.sampler_alone = trace.sampler(sampling, alone, 0, classes)
        self.learner = trace.learner(model, episodes[begin : begin + micro_batch], mine - begin, classes)
        self.learner_alone = trace.learner(model, alone, 0, classes)


def gaps(sampler: Trace, learner: Trace) -> list[Gap]:
    """Every entry that both traces have at the same rows, in the learner's order of execution."""
    found = []
    for name, theirs in learner.entries.items():
        ours = sampler.entries.get(name)
        if ours is None:
            continue
        a, b = ours.rows, theirs.rows
        if a.shape != b.shape:
            continue
        unequal = _unequal(a, b).any(1)
        first = int(unequal.nonzero()[0]) if unequal.any() else -1
        row = max(first, 0)
        rows_in_call = ours.calls[row], theirs.calls[row]
        found.append(
            Gap(
                name=name,
                op=theirs.op,
                rows=len(a),
                rows_unequal=int(unequal.sum()),
                first_row=first,
                max_abs=0.0 if first < 0 or name == trace.DIGEST else float((a.double() - b.double()).abs().max()),
                sampler=_ran(ours, rows_in_call[0]),
                learner=_ran(theirs, rows_in_call[1]),
                rows_in_call=rows_in_call,
            )
        )
    return found


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """In bits; [rows, width] of any type."""
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.view(as_integers) != b.view(as_integers)


def _ran(entry: Entry, rows: int) -> str:
    return f"{entry.function or 'torch, between ops'} over {rows} rows"


def _first(found: Sequence[Gap]) -> str:
    return next((gap.name for gap in found if gap.rows_unequal), "")


# ---- suspects ----


def _suspects(
    model: InteractionModel,
    sampling: InteractionModel | None,
    episode: Episode,
    ways: _Ways,
    growth: Sequence[Gap],
    depends_on: dict[str, str],
) -> list[str]:
    found = [] if sampling is None else other_weights(sampling, model)
    if (now := weights_digest(model)) != episode.weights_digest:
        found.append(f"weights that changed between sampling and learning (digest {episode.weights_digest}, now {now})")
    first = next((gap for gap in growth if gap.rows_unequal), None)
    if first is None:
        found.append(
            "what the sampler stored: a replay gives the learner's bits, so that the record was changed, or sampled "
            "beside other sessions than those of this batch"
        )
        return found
    if found:
        return found
    a, b = ways.sampler.entries[first.name], ways.learner.entries[first.name]
    for who, entry in (("sampler", a), ("learner", b)):
        if entry.op and not entry.function.startswith("kernels."):
            found.append(f"{entry.op} ran on {entry.function} in the {who}, which is none of the project's kernels")
    if first.op == "moe_combine":
        found += _other_order(first, ways)
    elif first.op == "attention" and first.first_row > 0:
        found.append(
            f"attention of {first.name.split(' ')[0]} cuts the keys differently: no row before {first.first_row} "
            f"differs, so that the first cut of one side ends at key {first.first_row} or before; the contract's "
            f"split has {dispatch.contract()['split_tokens']} keys"
        )
    found += _company(first, depends_on)
    return found


def _company(first: Gap, depends_on: dict[str, str]) -> list[str]:
    what = first.op or first.name
    ours, theirs = first.rows_in_call
    few = f" < {FEW_ROWS}" if min(ours, theirs) < FEW_ROWS <= max(ours, theirs) else ""
    found = []
    if ours != theirs:
        found.append(
            f"{what} depends on the number of rows: {first.name} ran over {min(ours, theirs)} rows{few} in the "
            f"{'sampler' if ours < theirs else 'learner'} and over {max(ours, theirs)} in the other"
        )
    for who in ("sampler", "learner"):
        if op := depends_on[f"{who} alone, {who} as run"]:
            found.append(f"the {who}'s {op} depends on what runs beside the episode")
    if depends_on["sampler alone, learner alone"] == first.name:
        found.append(f"{first.name} depends on chunk cuts or on the cache: alone it differs too")
    return found


def _other_order(first: Gap, ways: _Ways) -> list[str]:
    """Finds the order of experts in which the op of the contract gives each side's bits."""
    found = []
    names = list(ways.learner.entries)
    inputs = ways.learner.entries[names[names.index(first.name) - 1]].rows  # of the down projection, [T, J * D]
    weight = torch.cat(ways.learner.entries[first.name].weights)
    choices = weight.shape[1]
    y = inputs.view(len(weight), choices, -1)
    for who, entry in (("sampler", ways.sampler.entries[first.name]), ("learner", ways.learner.entries[first.name])):
        orders = permutations(range(choices)) if choices <= 5 else iter([])
        for order in orders:
            index = list(order)
            again = ops.moe_combine(y[:, index].reshape(-1, y.shape[2]), weight[:, index].contiguous())
            if torch.equal(again, entry.rows):
                if index != sorted(index):
                    found.append(
                        f"experts of {first.name.split(' ')[0]} combined in another order: {index} of each row's list "
                        f"in the {who}, ascending by the contract"
                    )
                break
    return found


def other_weights(sampler: InteractionModel, learner: InteractionModel) -> list[str]:
    """In which parameters the two models differ."""
    found = []
    theirs = dict(learner.named_parameters())
    for name, mine in sampler.named_parameters():
        other = theirs[name]
        unequal = _unequal(mine.detach(), other.detach())
        if count := int(unequal.sum()):
            where = tuple(unequal.nonzero()[0].tolist())
            ulp = torch.nextafter(mine.detach()[where], other.detach()[where]) == other.detach()[where]
            size = "one ulp" if count == 1 and bool(ulp) else f"{(mine - other).abs().max().item():.3e} at most"
            found.append(
                f"{'one weight differs' if count == 1 else f'{count} weights differ'}: {name}{list(where)}, by {size}"
            )
    return found
