"""The types of report.json: the audit of a run, or the comparison of two runs.

`rl.audit.schema` makes the JSON schema (`schema.json`) from these classes: the text of an Annotated type is its field's
description there, and an int is never negative. Within a version of the format no field is removed or changes its
meaning; such a change needs metronome.audit/3. (In metronome.audit/1 a run of which nothing could be re-scored was
*identical* by its own records, and what had nothing to compare was *not comparable*: both are *nothing compared* now.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from rl.audit.finding import Verdict

SCHEMA: Literal["metronome.audit/2"] = "metronome.audit/2"
INLINE = {"inline": True}
"""Metadata of a field whose value's own fields are written in its place in the JSON."""


class Reason(StrEnum):
    """Why an episode cannot be compared."""

    CONTRACT = "contract"
    WEIGHTS = "weights"
    TEMPERATURE = "temperature"
    TOKENS = "tokens"
    POSITIONS = "positions"
    MASKS = "masks"


@dataclass(frozen=True)
class Counts:
    """Sampler and learner compared over some sampled tokens."""

    num_tokens: Annotated[int, "Sampled tokens compared"]
    num_unequal: Annotated[int, "Sampled tokens whose log-prob differs in bits"]
    rows_unequal: Annotated[int, "Sampled tokens whose whole row of log-probs differs, by its 64-bit digest"]
    k1: Annotated[float | None, "Mean of sampler minus learner, nats; null where no KL is stated"]
    k3: Annotated[float | None, "Mean of exp(d) - 1 - d, d = learner minus sampler, nats; null where no KL is stated"]
    max_abs: Annotated[float | None, "Largest absolute difference of log-probs, nats; null where no KL is stated"]


@dataclass(frozen=True)
class Heading:
    """What both kinds of report begin with."""

    schema: Literal["metronome.audit/2"] = field(default=SCHEMA, init=False)
    kind: str = field(default="", init=False)
    verdict: Annotated[
        Verdict,
        "nothing_compared: nothing was re-scored, or two runs have nothing in common. It is no statement of equality",
    ]
    title: str
    headline: Annotated[str, "The verdict, and what it rests on"]
    scope: Annotated[str, "What was compared and what was not"]


# ---- one run ----


@dataclass(frozen=True)
class RunState:
    """Progress of the run."""

    name: str
    finished: bool
    steps_recorded: int
    steps_planned: int | None
    processes: Annotated[int | None, "Number of processes that summed the gradients"]
    weights_digest: Annotated[str | None, "Digest of the final weights"]


@dataclass(frozen=True)
class Contracts:
    """Contract ids."""

    run: Annotated[str | None, "Of the run"]
    here: Annotated[str, "Of the program that wrote this report"]
    episodes: Annotated[Sequence[str], "Of the saved episodes"]


@dataclass(frozen=True)
class RecordedCounts:
    """What the run itself counted at its steps."""

    steps: int
    counts: Counts = field(metadata=INLINE)


@dataclass(frozen=True)
class RescoredCounts:
    """What this audit counted."""

    episodes: int
    saved_episodes: int
    counts: Counts = field(metadata=INLINE)


@dataclass(frozen=True)
class StepCounts:
    """The saved episodes of one step."""

    step: int
    episodes: int
    rescored: int
    not_comparable: int
    counts: Counts = field(metadata=INLINE)
    checkpoint_digest: Annotated[str | None, "Digest of the checkpoint's weights, computed now"]
    recorded_digest: Annotated[str | None, "Digest of these weights, as the run recorded it"]


@dataclass(frozen=True)
class Conflict:
    """An episode that cannot be compared."""

    step: int
    episode: str
    reason: Reason
    text: str


@dataclass(frozen=True)
class Conflicts:
    """What cannot be compared, and where the run contradicts itself."""

    episodes: int
    reasons: Annotated[Mapping[Reason, int], "Episodes by reason"]
    first: Annotated[Sequence[Conflict], "The first hundred"]
    contradictions: Annotated[Sequence[str], "Between the run's records, summary and checkpoints, in sentences"]


@dataclass(frozen=True)
class FirstDifference:
    """The first sampled token whose bits differ, in the order of steps, episodes and positions; if no token's do, the
    first chunk of sound."""

    step: int
    episode: str
    position: int
    chunk: int
    token: Annotated[int | None, "The token's id, null for a chunk of sound"]
    sampler: Annotated[str, "The sampler's log-prob, in enough digits to restore its bits"]
    learner: Annotated[str, "The learner's log-prob, likewise"]
    row_differs: bool


@dataclass(frozen=True)
class DiagnosisSummary:
    """The explanation of the first difference."""

    step: int
    first: Annotated[dict[str, Any] | None, "The first op whose results differ, null where a replay agrees"]
    suspects: Annotated[Sequence[str], "Likely causes, the likeliest first"]


@dataclass(frozen=True)
class WeightsOfStep:
    """Digest of the weights after a step."""

    step: int
    digest: str


@dataclass(frozen=True)
class RunReport(Heading):
    """The audit of one run."""

    kind: Literal["run"] = field(default="run", init=False)
    basis: Annotated[
        Literal["rescored", "records", "none"],
        "What num_tokens … max_abs count: episodes re-scored now, the run's own records, or nothing",
    ]
    counts: Counts = field(metadata=INLINE)
    run: RunState
    contract: Contracts
    records: RecordedCounts
    rescored: RescoredCounts
    parts: Annotated[Sequence[StepCounts], "One for each step with saved episodes"]
    not_comparable: Conflicts
    first_difference: FirstDifference | None
    diagnosis: DiagnosisSummary | None
    gaps: Annotated[Sequence[str], "What was missing or damaged, in sentences"]
    cannot_show: Annotated[Sequence[str], "What no report of this kind can show"]
    weights: Sequence[WeightsOfStep]
    environment: Annotated[dict[str, Any], "The run's environment.json"]


# ---- two runs ----


@dataclass(frozen=True)
class FirstStep:
    """The first step whose records differ, and in which fields."""

    step: int
    fields: Sequence[str]


@dataclass(frozen=True)
class RecipeField:
    """A field of the recipe that differs."""

    field: str
    a: str
    b: str


@dataclass(frozen=True)
class ContractsOfBoth:
    """Contract ids of the two runs."""

    a: str | None
    b: str | None


@dataclass(frozen=True)
class WeightsOfBoth:
    """Digests of the weights after a step, null for a run that has no such step."""

    step: int
    a: str | None
    b: str | None


@dataclass(frozen=True)
class ComparisonReport(Heading):
    """The comparison of two runs, bit for bit."""

    kind: Literal["comparison"] = field(default="comparison", init=False)
    num_tokens: Annotated[int, "Sampled tokens of episodes whose inputs are equal in both runs"]
    num_unequal: int
    rows_unequal: int
    steps_compared: int
    steps_unequal: int
    first_step: FirstStep | None
    episodes_compared: int
    episodes_unequal: int
    episode_fields: Annotated[
        Mapping[str, int], "In how many episodes each field differs; name: episodes that only one run has"
    ]
    checkpoints_compared: Annotated[int, "Checkpoints of which both runs' weights were read"]
    checkpoints_unequal: int
    final_weights_equal: Annotated[bool | None, "By the summaries; null unless both name those after the same step"]
    whole: Annotated[
        bool, "Whether each run finished and has what the other has; if false, identical means: as far as both go"
    ]
    only_one: Annotated[Sequence[str], "What only one of the runs has, and which has not finished, in sentences"]
    recipe: Sequence[RecipeField]
    contract: ContractsOfBoth
    reasons: Annotated[Sequence[str], "Why the runs cannot be compared"]
    gaps: Annotated[Sequence[str], "What was missing or damaged, in sentences"]
    weights: Sequence[WeightsOfBoth]


Report = RunReport | ComparisonReport


def partial(report: Report) -> bool:
    """Whether two runs are *identical* as far as both go, but not one run as a whole."""
    return isinstance(report, ComparisonReport) and report.verdict is Verdict.IDENTICAL and not report.whole


def plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and plain values as JSON values. Numbers that are not finite become null: in
    what comes from here `write_json` finds none to refuse, so that whoever calls must not take them for a success."""
    if is_dataclass(value):
        out: dict[str, Any] = {}
        for one in fields(value):
            item = plain(getattr(value, one.name))
            out |= item if one.metadata == INLINE else {one.name: item}
        return out
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
