"""What an audit writes to report.json, as types: of a run, or of two runs compared.

The JSON schema (`schema.json`) is made from these classes by `rl.audit.schema`: the text beside a type describes its
field there, and whole numbers are counts and places, never negative. A field is never removed and never changes its
meaning within a version; metronome.audit/2 would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

SCHEMA: Literal["metronome.audit/1"] = "metronome.audit/1"
INLINE = {"inline": True}
"""Marks a field whose own fields stand in its place in the JSON."""

Verdict = Literal["identical", "different", "not_comparable"]


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
    """Sampler against learner over some sampled tokens."""

    num_tokens: Annotated[int, "Sampled tokens compared"]
    num_unequal: Annotated[int, "Whose log-prob differs in bits"]
    rows_unequal: Annotated[int, "Whose whole row of log-probs differs, by its 64-bit digest"]
    k1: Annotated[float | None, "Mean of sampler minus learner, nats; null where no KL is stated"]
    k3: Annotated[float | None, "Mean of exp(d) - 1 - d, d = learner minus sampler; null likewise"]
    max_abs: Annotated[float | None, "Largest absolute difference, nats; null likewise"]


@dataclass(frozen=True)
class Heading:
    """What both kinds of report begin with."""

    schema: Literal["metronome.audit/1"] = field(default=SCHEMA, init=False)
    kind: str = field(default="", init=False)
    verdict: Annotated[
        Verdict,
        "identical with basis records is the lesser statement: the run counted no difference, nothing was re-scored",
    ]
    title: str
    headline: Annotated[str, "The verdict in one sentence"]
    scope: Annotated[str, "What the headline rests on, and what it does not"]


# ---- one run ----


@dataclass(frozen=True)
class RunState:
    """How far the run came."""

    name: str
    finished: bool
    steps_recorded: int
    steps_planned: int | None
    processes: Annotated[int | None, "That summed the gradients"]
    weights_digest: Annotated[str | None, "Of the final weights"]


@dataclass(frozen=True)
class Contracts:
    """Contract ids: of the run, of the program that wrote this report, of the saved episodes."""

    run: str | None
    here: str
    episodes: Sequence[str]


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
    checkpoint_digest: Annotated[str | None, "Of the checkpoint's weights, taken now"]
    recorded_digest: Annotated[str | None, "Of the weights, as the run recorded it"]


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
    contradictions: Annotated[Sequence[str], "Of the run's records and its checkpoints, in sentences"]


@dataclass(frozen=True)
class FirstDifference:
    """The first sampled token whose bits differ, in the order of steps, episodes and positions."""

    step: int
    episode: str
    position: int
    chunk: int
    token: int
    sampler: Annotated[str, "Log-prob, in digits that give back its bits"]
    learner: str
    row_differs: bool


@dataclass(frozen=True)
class DiagnosisSummary:
    """Of the first difference: the first op whose results differ (null where a replay agrees), and suspects."""

    step: int
    first: dict[str, Any] | None
    suspects: Sequence[str]


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
        "Which counts num_tokens … max_abs are: episodes re-scored now, the run's own records, or nothing",
    ]
    counts: Counts = field(metadata=INLINE)
    run: RunState
    contract: Contracts
    records: RecordedCounts
    rescored: RescoredCounts
    parts: Annotated[Sequence[StepCounts], "One a step with saved episodes"]
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
    """Whether two runs are one run, bit for bit."""

    kind: Literal["comparison"] = field(default="comparison", init=False)
    num_tokens: Annotated[int, "Sampled tokens of episodes whose inputs are equal in both runs"]
    num_unequal: int
    rows_unequal: int
    steps_compared: int
    steps_unequal: int
    first_step: FirstStep | None
    episodes_compared: int
    episodes_unequal: int
    episode_fields: Annotated[Mapping[str, int], "In how many episodes each field differs"]
    recipe: Sequence[RecipeField]
    contract: ContractsOfBoth
    reasons: Annotated[Sequence[str], "Why the runs cannot be compared"]
    gaps: Annotated[Sequence[str], "What was missing or damaged, in sentences"]
    weights: Sequence[WeightsOfBoth]


Report = RunReport | ComparisonReport


def by_record(report: Report) -> bool:
    """Whether it says *identical* by the run's own records alone."""
    return isinstance(report, RunReport) and report.verdict == "identical" and report.basis == "records"


def to_json(value: Any) -> Any:
    """Records, mappings, sequences and plain values as JSON has them; what is not finite becomes null."""
    if is_dataclass(value):
        out: dict[str, Any] = {}
        for one in fields(value):
            item = to_json(getattr(value, one.name))
            out |= item if one.metadata == INLINE else {one.name: item}
        return out
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
