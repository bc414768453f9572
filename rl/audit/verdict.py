"""The verdict on a run, as sentences and counts. It claims no more than what was compared.

To *re-score* an episode is to compute the learner's log-probs of its tokens again.

- *different*: a bit differs, in a token re-scored now or in the run's own records;
- *not_comparable*: no difference was found, but a saved episode has another contract, weights, temperature, tokens,
  positions or masks than what it would be compared with, or a checkpoint is not as it was saved, or the run contradicts
  itself (`rl.audit.claims`). No KL is stated;
- *nothing_compared*: none of the above, and no episode could be re-scored. What the run itself counted is said (`basis`
  is "records"), without a KL; it is the run's word, not the audit's;
- *identical*: tokens were re-scored, and none of the above holds.

What is merely missing (a deleted checkpoint, an unreadable file of episodes) narrows the statement and is listed as a
gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, Literal

from kernels import dispatch
from rl.audit import claims
from rl.audit.document import (
    Conflict,
    Conflicts,
    Contracts,
    Counts,
    DiagnosisSummary,
    FirstDifference,
    Reason,
    RecordedCounts,
    RescoredCounts,
    RunReport,
    RunState,
    StepCounts,
    WeightsOfStep,
)
from rl.audit.finding import Verdict
from rl.audit.records import Records
from rl.audit.replay.rescore import CheckedEpisode, CheckedStep
from rl.environment import computing, contract_in_words
from rl.step.identity import Mismatch

MAX_LISTED = 100
"""Most episodes that a report names when they cannot be compared; all are counted."""

LIMITS = (
    "Episodes that were not saved cannot be re-scored: for them there is only what the run counted at each step.",
    "Equal rows are shown by equal 64-bit digests of each row of log-probabilities; the rows themselves are not kept. "
    "Two different rows share a digest by chance once in 2^64.",
    "Where bits differ, k1 and k3 are estimates from sampled tokens: the exact KL would need the sampler's whole rows.",
    "The grid draws no sound of the model: its lane shows its words.",
)
"""What no report of a run can show, in sentences."""


def run_report(records: Records, steps: Sequence[CheckedStep]) -> RunReport:
    """The report of a run, from its records and its re-scored steps."""
    recorded = records.mismatch()
    episodes = [one for checked in steps for one in checked.episodes]
    rescored = Mismatch.total([checked.mismatch for checked in steps])
    conflicts = [_conflict(one) for one in episodes if one.why_not]
    contradictions = _contradictions(records, steps)
    basis: Literal["rescored", "records", "none"] = "none"
    counted = Mismatch.total([])
    if rescored.num_tokens:
        basis, counted = "rescored", rescored
    elif recorded.num_tokens:
        basis, counted = "records", recorded
    unequal = _unequal(rescored) + _unequal(recorded)
    verdict = Verdict.of(rescored.num_tokens, unequal, len(conflicts) + len(contradictions))
    if verdict is Verdict.DIFFERENT and not _unequal(counted):
        basis, counted = "records", recorded
    return RunReport(
        verdict=verdict,
        title=f"run {records.name}",
        headline=_stop(records, episodes)
        or _headline(records, verdict, basis, counted, conflicts, episodes, contradictions),
        scope=_scope(records, recorded, rescored, episodes),
        basis=basis,
        counts=_counts(counted, verdict in (Verdict.IDENTICAL, Verdict.DIFFERENT)),
        run=RunState(
            name=records.name,
            finished=bool(records.summary),
            steps_recorded=len(records.metrics),
            steps_planned=records.planned_steps,
            weights_digest=_text(records.summary.get("weights_digest")),
            processes=records.processes,
        ),
        contract=Contracts(
            run=records.contract_id,
            here=dispatch.contract_id(),
            episodes=sorted({one.episode.contract_id for one in episodes}),
        ),
        records=RecordedCounts(len(records.metrics), _counts(recorded)),
        rescored=RescoredCounts(sum(one.logprob is not None for one in episodes), len(episodes), _counts(rescored)),
        parts=[_step(records, checked) for checked in steps],
        not_comparable=Conflicts(
            episodes=len(conflicts),
            reasons=Counter(one.reason for one in conflicts),
            first=conflicts[:MAX_LISTED],
            contradictions=contradictions,
        ),
        first_difference=_first_difference(episodes),
        diagnosis=_diagnosis(records, steps),
        gaps=records.gaps,
        cannot_show=LIMITS,
        weights=[WeightsOfStep(r["step"], r["weights_digest"]) for r in records.metrics],
        environment=records.environment,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def exact(value: float) -> str:
    """An fp32 value in the fewest digits (9) that always give back its bits."""
    return f"{value:.9g}"


def _counts(mismatch: Mismatch, stated: bool = True) -> Counts:
    """With the estimates of the KL if there is one to state; what JSON has no number for is null."""
    means = mismatch.metrics()
    k1, k3, max_abs = (
        means[f"mismatch/{name}"] if stated and mismatch.num_tokens else None for name in ("k1", "k3", "max_abs")
    )
    return Counts(mismatch.num_tokens, mismatch.num_unequal, mismatch.rows_unequal, k1, k3, max_abs)


def _unequal(mismatch: Mismatch) -> int:
    return mismatch.num_unequal + mismatch.rows_unequal


def _contradictions(records: Records, steps: Sequence[CheckedStep]) -> list[str]:
    """Where a checkpoint's weights are not those whose digest the run recorded, or its files not those it saved, or the
    summary or the episodes do not agree with the records."""
    own = [claims.other_weights(records, checked.step, checked.weights_digest) for checked in steps]
    sentences = [*filter(None, own), *records.damaged_checkpoints]
    for checked in steps:
        sentences += claims.of_episodes(records, checked.step, [one.episode for one in checked.episodes])
    sentences += [
        f"Step {checked.step} multiplied with copies {copies} of the weights; the checkpoint's weights give "
        f"{checked.packs_digest}: the run computed with others than it saved."
        for checked in steps
        if records.contract_id == dispatch.contract_id()  # the copies' layout is the contract's
        and checked.packs_digest
        and (copies := records.packs_digest_before(checked.step)) not in (None, checked.packs_digest)
    ]
    return sentences + claims.contradictions(records)


def _headline(
    records: Records,
    verdict: Verdict,
    basis: str,
    counted: Mismatch,
    conflicts: Sequence[Conflict],
    episodes: Sequence[CheckedEpisode],
    contradictions: Sequence[str],
) -> str:
    origin = "By the run's own records, " if basis == "records" else ""
    if verdict is Verdict.NOT_COMPARABLE:
        if not conflicts:
            return f"Not comparable: the run contradicts itself. {contradictions[0]} No KL is stated."
        reasons = dict.fromkeys(one.reason for one in conflicts)
        return (
            f"Not comparable: {len(conflicts):,} of {len(episodes):,} saved episodes differ in "
            f"{', '.join(reasons)} from what they would be compared with. No KL is stated."
            f"{_elsewhere(records, reasons)}"
        )
    tokens, rows = counted.num_unequal, counted.rows_unequal
    if verdict is Verdict.NOTHING_COMPARED:
        why = f"Nothing could be re-scored: {'see the gaps' if records.episodes else 'no episode was saved'}."
        if basis == "none":
            return f"{why} The run left no record of its own."
        return f"{why} By the run's own records, 0 of {counted.num_tokens:,} sampled tokens and 0 rows differed."
    if verdict is Verdict.IDENTICAL:
        rescored = [one for one in episodes if one.logprob is not None]
        sounds = sum(len(voice.chunk) for one in rescored if (voice := one.episode.voice) is not None)
        also = f" and 0 of {sounds:,} sampled chunks of sound" if sounds else ""
        return (
            f"0 of {counted.num_tokens - sounds:,} sampled tokens{also} differ ({len(rescored):,} episodes of "
            f"{_steps(sorted({one.step for one in rescored}))}, re-scored now); full-vocabulary KL exactly 0 on every "
            "row."
        )
    return (
        f"{origin}{tokens:,} of {counted.num_tokens:,} {_choices(records, episodes)} "
        f"{'differs' if tokens == 1 else 'differ'}, and {rows:,} of {counted.num_tokens:,} whole rows. "
        "Sampler and learner disagree."
    )


def _choices(records: Records, episodes: Sequence[CheckedEpisode]) -> str:
    """What the counts of a run are counts of."""
    config = records.config
    heard = any(one.episode.voice is not None for one in episodes)
    heard = heard or (config is not None and config.model.voice is not None)
    return f"sampled tokens{' and chunks of sound' if heard else ''}"


def _elsewhere(records: Records, reasons: Collection[str]) -> str:
    """What to do where the contract is all that differs, and the run's own."""
    if set(reasons) != {Reason.CONTRACT} or records.contract_id in (None, dispatch.contract_id()):
        return ""
    ran, here = (contract_in_words(one) for one in (records.environment, computing()))
    return f" The run was computed under {ran}, this program computes under {here}: audit it where it ran."


def _scope(records: Records, recorded: Mismatch, rescored: Mismatch, episodes: Sequence[CheckedEpisode]) -> str:
    count = sum(one.logprob is not None for one in episodes)
    steps = sorted({one.step for one in episodes if one.logprob is not None})
    if count:
        first = (
            f"Re-scored now by the learner's forward pass: {count:,} of {len(episodes):,} saved episodes "
            f"({rescored.num_tokens:,} tokens, {_steps(steps)})."
        )
    else:
        first = "Nothing was re-scored now."
    if not recorded.num_tokens:
        return f"{first} The run left no records of its own."
    planned = records.planned_steps
    of = f"{len(records.metrics):,} steps" if records.summary else f"{len(records.metrics):,} of {planned or '?'} steps"
    return (
        f"{first} The rest is the run's own record, made at each step before it learned: {recorded.num_unequal:,} of "
        f"{recorded.num_tokens:,} tokens and {recorded.rows_unequal:,} rows differ over {of}"
        f"{'' if records.summary else '; the run has not finished'}."
    )


def _stop(records: Records, episodes: Sequence[CheckedEpisode]) -> str | None:
    """The headline of a run that refused a step."""
    if not records.stopped:
        return None
    counts = records.stopped.mismatch
    return (
        f"The run stopped at step {records.stopped.step:,}: {counts.num_unequal:,} of {counts.num_tokens:,} "
        f"{_choices(records, episodes)} and {counts.rows_unequal:,} whole rows differed. Sampler and learner disagree."
    )


def _steps(steps: Sequence[int]) -> str:
    if len(steps) > 6:
        return f"{len(steps)} steps from {steps[0]:,} to {steps[-1]:,}"
    listed = ", ".join(f"{s:,}" for s in steps)
    return f"step {listed}" if len(steps) == 1 else f"steps {listed}"


def _diagnosis(records: Records, steps: Sequence[CheckedStep]) -> DiagnosisSummary | None:
    """The first op that differs and the suspects, of the step that the run refused or of the first one re-scored."""
    if records.stopped:
        return records.stopped.diagnosis
    diagnosis = next((checked.diagnosis for checked in steps if checked.diagnosis), None)
    if diagnosis is None:
        return None
    first = None if diagnosis.first is None else asdict(diagnosis.first)
    return DiagnosisSummary(diagnosis.step, first, diagnosis.suspects)


def _step(records: Records, checked: CheckedStep) -> StepCounts:
    states = Counter(one.state for one in checked.episodes)
    return StepCounts(
        step=checked.step,
        episodes=len(checked.episodes),
        rescored=states["identical"] + states["different"],
        not_comparable=states["not_comparable"],
        counts=_counts(checked.mismatch),
        checkpoint_digest=checked.weights_digest,
        recorded_digest=records.weights_digest_before(checked.step),
    )


def _conflict(one: CheckedEpisode) -> Conflict:
    assert one.why_not is not None
    reason, text = one.why_not
    return Conflict(one.step, one.episode.name, reason, text)


def _first_difference(episodes: Sequence[CheckedEpisode]) -> FirstDifference | None:
    for one in episodes:
        if one.state != "different" or one.logprob is None:
            continue
        place = int((one.token_differs | one.row_differs).nonzero()[0])
        text, voice = one.episode.text, one.episode.voice
        words = len(text.logprob)
        stream, within = (text, place) if place < words or voice is None else (voice, place - words)
        position = int(stream.sampled_at[within])
        return FirstDifference(
            step=one.step,
            episode=one.episode.name,
            position=position,
            chunk=int(stream.chunk[within]),
            token=int(one.episode.tokens[position]) if stream is text else None,
            sampler=exact(stream.logprob[within].item()),
            learner=exact(one.logprob[place].item()),
            row_differs=bool(one.row_differs[place]),
        )
    return None
