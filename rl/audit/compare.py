"""Compares two runs bit for bit: their records of each step, with the digest of the weights; their saved episodes:
tokens, audio, positions, masks, log-probs and row digests; the weights in their checkpoints; and the final weights by
their summaries.

- *different*: anything of that differs, or only one of two records has a field, or only one of two files an episode;
- *not comparable*: no difference was found, but the contracts differ, or a run contradicts itself (`rl.audit.claims`),
  or their recipes differ in what decides bits and nothing else does;
- *nothing compared*: the runs have no step and no episode in common, or are one folder;
- *identical*: none of these. ``whole``: both finished, and neither has what the other lacks: one run, bit for bit.
  Otherwise they are equal as far as both go.

Times are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.program.recipe import flat
from model.weights.manifest import LOCATION_FIELDS
from rl.audit import claims
from rl.audit.document import (
    ComparisonReport,
    ContractsOfBoth,
    FirstStep,
    RecipeField,
    WeightsOfBoth,
    plain,
)
from rl.audit.finding import Verdict
from rl.audit.page import render
from rl.audit.paired import PairedEpisodes, same_value, saved
from rl.audit.pictures import chart, line
from rl.audit.records import Records, read
from rl.audit.replay.rescore import check_checkpoints, without_manifest
from rl.audit.report import machines, write
from rl.environment import contract_in_words
from rl.resume import CHECKED, FREE, STEPS, covered

DECIDE_NOTHING = (
    *FREE, *CHECKED, STEPS, "placement", "eval", "source.watch", "rl.micro_batch", "rl.evaluate_every",
)  # fmt: skip
"""Fields of a recipe, and groups of them, that runs of equal bits may differ in: places, engines and processes, what is
kept, how long. `STEPS` decides bits too, by the learning rate, but not of steps that were taken before it was changed:
a run that was resumed to more steps is equal to a copy from before as far as that goes. All others decide bits."""


def compare_runs(a: Path, b: Path, out: Path) -> ComparisonReport:
    """Writes report.html and report.json into ``out`` and returns what the latter holds. Raises MetronomeError when a
    folder is not a run's."""
    first, second = read(a), read(b)
    report = comparison(first, second)
    steps = sorted({r["step"] for records in (first, second) for r in records.metrics})
    both = [{r["step"]: r for r in records.metrics} for records in (first, second)]
    curves = [
        chart(
            title,
            unit,
            [line(name, [by_step.get(s, {}) for s in steps], key) for name, by_step in zip("AB", both, strict=True)],
            note,
        )
        for title, unit, key, note in (
            ("Reward of an episode", "", "reward/mean", "Where only one curve is seen, the other lies beneath it."),
            ("Score by the rules", "%", "reward/score", ""),
            ("Entropy of the policy", "nats a token", "policy/entropy", ""),
            ("Seconds of a step", "s", "time/step_s", "Time is shown, not compared."),
        )
    ]
    data = {
        "steps": steps,
        "charts": [c for c in curves if c["lines"]],
        "scatter": None,
        "episodes": [],
        "tables": [],
        "machines": [plain(machines({"A": first.environment, "B": second.environment}))],
        "recipes": [["Recipe of A", first.recipe_text], ["Recipe of B", second.recipe_text]],
    }
    write(out, report, render(report, data))
    return report


def comparison(a: Records, b: Records) -> ComparisonReport:
    """Compares what two runs' folders hold. Adds what cannot be read to the gaps of the run's records."""
    one_folder = a.path.samefile(b.path)
    contracts = [] if one_folder else _reasons(a, b)
    apart = one_folder or bool(contracts)  # nothing is compared
    steps_a, steps_b = ({r["step"]: r for r in records.metrics} for records in (a, b))
    common = [] if apart else sorted(steps_a.keys() & steps_b.keys())
    unequal = [(step, fields) for step in common if (fields := _fields(steps_a[step], steps_b[step]))]
    episodes, own = PairedEpisodes(), list[str]()
    for step in [] if apart else sorted(a.episodes.keys() | b.episodes.keys()):
        pair = saved(a, step), saved(b, step)
        episodes.add(*pair, step)
        for label, records, one in zip("AB", (a, b), pair, strict=True):
            own += _own(label, claims.of_episodes(records, step, list(one.episodes.values())))
    weights_a, weights_b = ({}, {}) if apart else (_checkpoints(a), _checkpoints(b))
    read_twice = sorted(weights_a.keys() & weights_b.keys())
    other_weights = [step for step in read_twice if weights_a[step] != weights_b[step]]
    final = None if apart else _final_equal(a, b)
    recipe_a, recipe_b = dict(flat(a.recipe)), dict(flat(b.recipe))
    recipe = [
        RecipeField(name, _value(recipe_a, name), _value(recipe_b, name))
        for name in sorted(recipe_a.keys() | recipe_b.keys())
        if name.split(".")[0] not in LOCATION_FIELDS and _value(recipe_a, name) != _value(recipe_b, name)
    ]
    differ = len(unequal) + episodes.unequal + len(other_weights) + (final is False)
    reasons = contracts + episodes.reasons + own
    if not one_folder:
        reasons += _contradictions("A", a, weights_a) + _contradictions("B", b, weights_b)
    if not apart and not differ and (len(common) or episodes.compared):
        reasons += _recipes(recipe)
    verdict = Verdict.of(len(common) + episodes.compared, differ, len(reasons))
    only_one = _only_one(a, b, episodes) + ([] if apart else _checkpoints_alone(a, b, weights_a, weights_b))
    whole = verdict is Verdict.IDENTICAL and not only_one
    return ComparisonReport(
        verdict=verdict,
        title=f"runs {a.name} (A) and {b.name} (B)",
        headline=(
            f"Nothing compared: A and B are one folder, {a.path}. A run compared with itself shows nothing."
            if one_folder
            else _headline(verdict, len(common), unequal, episodes, reasons, other_weights, final, only_one)
            + _processes(a, b)
        ),
        scope=_scope(len(common), episodes, len(read_twice), final, only_one),
        num_tokens=episodes.tokens,
        num_unequal=episodes.tokens_unequal,
        rows_unequal=episodes.rows_unequal,
        steps_compared=len(common),
        steps_unequal=len(unequal),
        first_step=FirstStep(*unequal[0]) if unequal else None,
        episodes_compared=episodes.compared,
        episodes_unequal=episodes.unequal,
        episode_fields=episodes.fields,
        checkpoints_compared=len(read_twice),
        checkpoints_unequal=len(other_weights),
        final_weights_equal=final,
        whole=whole,
        only_one=only_one,
        recipe=recipe,
        contract=ContractsOfBoth(a.contract_id, b.contract_id),
        reasons=reasons,
        gaps=[f"{label}: {gap}" for label, records in (("A", a), ("B", b)) for gap in records.gaps],
        weights=[
            WeightsOfBoth(s, _digest(steps_a.get(s)), _digest(steps_b.get(s)))
            for s in sorted(steps_a.keys() | steps_b.keys())
        ],
    )


def _checkpoints(records: Records) -> dict[int, str]:
    """Step -> digest of the weights in its checkpoint, after a check of its files."""
    check_checkpoints(records)
    return claims.checkpoint_digests(records)


def _final_equal(a: Records, b: Records) -> bool | None:
    """Whether the two summaries name the same final weights; None unless both name some, of the same step."""
    ends, digests = [claims.claimed_steps(r) for r in (a, b)], [claims.final_weights(r) for r in (a, b)]
    if None in digests or (None not in ends and ends[0] != ends[1]):
        return None
    return digests[0] == digests[1]


def _contradictions(label: str, records: Records, weights: Mapping[int, str]) -> list[str]:
    own = [claims.other_weights(records, step, digest) for step, digest in weights.items()]
    return _own(label, [*claims.contradictions(records), *filter(None, own), *records.damaged_checkpoints])


def _own(label: str, sentences: Sequence[str]) -> list[str]:
    return [f"{label} contradicts itself. {sentence}" for sentence in sentences]


def _recipes(recipe: Sequence[RecipeField]) -> list[str]:
    """A reason where recipes differ in what decides bits, though no bit differs."""
    names = [r.field for r in recipe if not covered(r.field, DECIDE_NOTHING)]
    if not names:
        return []
    return [
        f"The recipes differ in {', '.join(names[:6])}{' …' if len(names) > 6 else ''}, which decides bits, and yet "
        "all that was compared is equal: a config.yaml is not its run's own, or what differs decided nothing."
    ]


def _only_one(a: Records, b: Records, episodes: PairedEpisodes) -> list[str]:
    """What one run has and the other lacks, and what neither can show, in sentences."""
    sentences = []
    for label, one, other in (("A", a, b), ("B", b, a)):
        steps = sorted({r["step"] for r in one.metrics} - {r["step"] for r in other.metrics})
        if steps:
            sentences.append(f"{label} has {_count(len(steps), 'step')} more, from step {steps[0]:,} on.")
        if not one.summary:
            sentences.append(f"{label} has not finished.")
        elif claims.final_weights(one) is None:
            sentences.append(f"{label}'s summary names no final weights.")
        if left_out := sum(gap.startswith("metrics.jsonl, line") for gap in one.gaps):
            sentences.append(f"{_count(left_out, 'line')} of {label}'s records could not be used.")
        if lone := episodes.alone[label]:
            sentences.append(f"{label} has {_count(lone, 'saved episode')} of steps of which the other has none.")
    if episodes.unread:
        sentences.append(f"{_count(episodes.unread, 'file')} of episodes could not be read.")
    return sentences


def _checkpoints_alone(a: Records, b: Records, weights_a: Mapping[int, str], weights_b: Mapping[int, str]) -> list[str]:
    """Which checkpoints one run has and the other lacks, and of which it cannot be seen whether they are as they were
    saved, in sentences. ``weights``: of those that can be read."""
    sentences = []
    for label, one, other, weights in (("A", a, b, weights_a), ("B", b, a, weights_b)):
        kinds = (
            (one.checkpoints.keys() - other.checkpoints.keys(), "{} has {}, which the other lacks: {}."),
            (one.checkpoints.keys() - weights.keys(), "Of {}, {} cannot be read: {}."),
            (without_manifest(one), "Of {}, {} without a manifest may be damaged: {}."),
        )
        for steps, sentence in kinds:
            if names := [one.checkpoints[step].name for step in sorted(steps)]:
                listed = ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
                sentences.append(sentence.format(label, _count(len(names), "checkpoint"), listed))
    return sentences


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _processes(a: Records, b: Records) -> str:
    """A sentence where the two were run by different numbers of processes, which sum gradients in different orders."""
    if a.processes == b.processes:
        return ""
    counts = [records.processes or "an unknown number" for records in (a, b)]
    return f" Processes: {counts[0]} ran A, {counts[1]} ran B."


def _reasons(a: Records, b: Records) -> list[str]:
    if not all(records.metrics or records.episodes or records.checkpoints for records in (a, b)):
        return []  # one left nothing that a contract could be of
    if a.contract_id is None or b.contract_id is None:
        return ["The contract of a run is unknown: its environment.json is missing or damaged."]
    if a.contract_id == b.contract_id:
        return []
    fields_a, fields_b = (dict(flat(r.environment.get("contract") or {})) for r in (a, b))
    parts = [
        f"{name} {_value(fields_a, name)} and {_value(fields_b, name)}"
        for name in sorted(fields_a.keys() | fields_b.keys())
        if _value(fields_a, name) != _value(fields_b, name)
    ]
    return [
        f"A ran under {contract_in_words(a.environment)}, B under {contract_in_words(b.environment)}: "
        f"{'; '.join(parts) or 'no field is known'}. "
        "Compare runs of one contract."
    ]


def _fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Which fields of a step's two records differ in value or type, or are in one of them only."""
    names = [name for name in {**a, **b} if not name.startswith("time/")]
    alone = {name: f"{name} (only {'A' if name in a else 'B'})" for name in names if name not in a or name not in b}
    return [alone.get(name, name) for name in names if name in alone or not same_value(a[name], b[name])]


def _value(fields: Mapping[str, Any], name: str) -> str:
    return str(fields[name]) if name in fields else "(absent)"


def _digest(record: Mapping[str, Any] | None) -> str | None:
    return None if record is None else record["weights_digest"]


def _headline(
    verdict: Verdict,
    common: int,
    unequal: Sequence[tuple[int, list[str]]],
    episodes: PairedEpisodes,
    reasons: Sequence[str],
    other_weights: Sequence[int],
    final: bool | None,
    only_one: Sequence[str],
) -> str:
    if verdict is Verdict.NOT_COMPARABLE:
        return f"Not comparable. {reasons[0]}"
    if verdict is Verdict.NOTHING_COMPARED:
        return " ".join(["Nothing compared: the runs have no step and no saved episode in common.", *only_one])
    equal = f"{_count(common, 'step')} and {_count(episodes.compared, 'saved episode')} are equal"
    if verdict is Verdict.IDENTICAL:
        whole = f"One run, bit for bit: {equal}."
        return whole if not only_one else " ".join([f"Equal as far as both go: {equal}.", *only_one])
    parts = []
    if unequal:
        step, fields = unequal[0]
        first = f"The first is step {step:,}, in {', '.join(fields[:4])}{' …' if len(fields) > 4 else ''}."
        parts.append(f"{len(unequal):,} of {common:,} steps differ. {first}")
    if episodes.unequal:
        parts.append(f"{episodes.unequal:,} of {episodes.compared:,} saved episodes differ.")
    if other_weights:
        parts.append(f"The checkpoints of step {other_weights[0]:,} hold other weights.")
    if final is False:
        parts.append("The summaries name other final weights.")
    return " ".join(["Not the same run:", *parts])


def _scope(common: int, episodes: PairedEpisodes, checkpoints: int, final: bool | None, only_one: Sequence[str]) -> str:
    end = "" if final is None else ", and the final weights by the summaries"
    left = (
        f"Not compared: {' '.join(only_one)}"
        if only_one
        else "Neither has a step, episode or checkpoint that the other lacks."
    )
    return (
        f"Compared: the records of {_count(common, 'step')} (weights' digest, rewards, mismatch, entropy; not times), "
        f"{_count(episodes.compared, 'saved episode')} with {episodes.tokens:,} sampled tokens, the weights of "
        f"{_count(checkpoints, 'checkpoint')}{end}. {left}"
    )
