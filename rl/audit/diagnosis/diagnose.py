"""Explains a difference between sampler and learner: the first op whose results differ, how the difference grows in
later ops, and likely causes.

The episode is replayed as the sampler and as the learner computed it (`rl.audit.diagnosis.trace`), and the two traces
are compared op by op (`rl.audit.diagnosis.differences`). Three further comparisons show what the difference depends on:
the episodes that ran beside it in the sampler, those in the learner, or the cuts into micro-turns and the cache.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from model.backbone.transformer import InteractionModel
from rl.audit.diagnosis.differences import OpDifference, Traces, compare_traces, first_unequal
from rl.audit.diagnosis.suspects import suspects
from rl.audit.document import plain
from rl.audit.table import Cell, Table
from rl.step.identity import Evidence, Mismatch
from rollout.turn.vocabulary import Vocabulary


@dataclass(frozen=True)
class Diagnosis:
    """The explanation of one difference."""

    step: int
    episode: str  # its name
    position: int  # index in the episode of the first token that differs
    chunk: int
    token: int | None  # its id; None for a chunk of sound
    rollout_logprob: float
    learner_logprob: float
    mismatch: Mismatch  # over all tokens compared
    growth: tuple[OpDifference, ...]  # in order of execution
    depends_on: dict[str, str]  # as `Traces.depends_on` gives it
    suspects: tuple[str, ...]  # likely causes, the likeliest first

    @property
    def first(self) -> OpDifference | None:
        """The first op whose results differ; None where the replays agree."""
        return first_unequal(self.growth)

    def sentence(self) -> str:
        """The first op that differs and the suspects, for an error message."""
        if self.first is None:
            result = "Replayed, all activations agree."
            if self.token is None:
                result += " The flow head's steps over the recorded sound and its log-prob are among them."
        else:
            result = (
                f"The first activation that differs is {self.first.name} at row {self.first.first_row} (largest gap "
                f"{self.first.max_abs:.3e})."
            )
        return " ".join([result, *(f"Suspect: {suspect}." for suspect in self.suspects)])

    def tables(self) -> list[Table]:
        """What a report shows of it."""
        growth: list[list[Cell]] = [
            [op.name, op.rows, op.rows_unequal, op.first_row, op.max_abs, op.sampler, op.learner] for op in self.growth
        ]
        return [
            Table(
                "Where sampler and learner part",
                ["compared", "first op that differs"],
                [[compared, op or "none: equal bits"] for compared, op in self.depends_on.items()],
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

    def plain(self) -> dict[str, Any]:
        """The content of audit/difference.json: plain values; numbers that are not finite become null."""
        fields = asdict(self) | {"mismatch": self.mismatch.metrics(), "first": self.first, "tables": self.tables()}
        return {name: plain(value) for name, value in fields.items()}


def explain(model: InteractionModel, evidence: Evidence) -> tuple[Diagnosis | None, str]:
    """(the diagnosis, ""), or (None, a sentence that says why there is none): whatever goes wrong in a diagnosis, the
    difference that it was to explain must still be reported."""
    try:
        return diagnose(model, evidence), ""
    except Exception as error:
        return None, f"The difference could not be explained ({type(error).__name__}: {error})."


def diagnose(model: InteractionModel, evidence: Evidence, sampling: InteractionModel | None = None) -> Diagnosis:
    """Explains the first difference between what the episodes hold and what the learner ``model`` gave.

    ``sampling``: the model that the sampler ran, where that is another object than the learner's. Raises ValueError
    when nothing differs."""
    first = evidence.first()
    episode = evidence.episodes[first.owner]
    classes = Vocabulary.of(model).classes
    traces = Traces(sampling or model, model, evidence.episodes, first.owner, evidence.micro_batch, classes)
    growth, depends_on = compare_traces(traces.sampler, traces.learner), traces.depends_on()
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
        suspects=tuple(suspects(model, sampling, episode, traces, growth, depends_on)),
    )
