"""Compares two runs bit for bit: their records of each step, with the digest of the weights, and their saved episodes:
tokens, audio, positions, masks, log-probs and row digests.

Times are not compared. Runs under different contracts, and runs without a common step, are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.errors import MetronomeError
from model.program.recipe import flat
from model.weights.manifest import LOCATION_FIELDS
from rl.audit.document import (
    ComparisonReport,
    ContractsOfBoth,
    FirstStep,
    RecipeField,
    Verdict,
    WeightsOfBoth,
    to_json,
)
from rl.audit.page import render
from rl.audit.pictures import chart, line
from rl.audit.records import Records, read
from rl.audit.report import machines, write
from rl.step.identity import unequal_bits
from rollout.record.episode import Episode, load_episodes, tensors


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
        "machines": [to_json(machines({"A": first.environment, "B": second.environment}))],
        "recipes": [["Recipe of A", first.recipe_text], ["Recipe of B", second.recipe_text]],
    }
    write(out, report, render(report, data))
    return report


def comparison(a: Records, b: Records) -> ComparisonReport:
    """Compares what two runs' folders hold. Adds unreadable files of episodes to the gaps of the run's records."""
    reasons = _reasons(a, b)
    steps_a, steps_b = ({r["step"]: r for r in records.metrics} for records in (a, b))
    common = [] if reasons else sorted(steps_a.keys() & steps_b.keys())
    unequal = [(step, fields) for step in common if (fields := _fields(steps_a[step], steps_b[step]))]
    episodes = _Episodes()
    for step in [] if reasons else sorted(a.episodes.keys() & b.episodes.keys()):
        episodes.add(_by_name(a, step), _by_name(b, step), step)
    reasons += episodes.reasons
    if not reasons and not common and not episodes.compared:
        reasons.append("The runs have no step and no saved episode in common.")
    final = [records.summary.get("weights_digest") for records in (a, b)]
    ends_apart = all(final) and final[0] != final[1] and steps_a.keys() == steps_b.keys()
    verdict: Verdict = "identical"
    if reasons:
        verdict = "not_comparable"
    elif unequal or episodes.unequal or ends_apart:
        verdict = "different"
    recipe_a, recipe_b = dict(flat(a.recipe)), dict(flat(b.recipe))
    return ComparisonReport(
        verdict=verdict,
        title=f"runs {a.name} (A) and {b.name} (B)",
        headline=_headline(verdict, len(common), unequal, episodes, reasons) + _processes(a, b),
        scope=_scope(a, b, len(common), episodes),
        num_tokens=episodes.tokens,
        num_unequal=episodes.tokens_unequal,
        rows_unequal=episodes.rows_unequal,
        steps_compared=len(common),
        steps_unequal=len(unequal),
        first_step=FirstStep(*unequal[0]) if unequal else None,
        episodes_compared=episodes.compared,
        episodes_unequal=episodes.unequal,
        episode_fields=episodes.fields,
        recipe=[
            RecipeField(name, _value(recipe_a, name), _value(recipe_b, name))
            for name in sorted(recipe_a.keys() | recipe_b.keys())
            if name.split(".")[0] not in LOCATION_FIELDS and _value(recipe_a, name) != _value(recipe_b, name)
        ],
        contract=ContractsOfBoth(a.contract_id, b.contract_id),
        reasons=reasons,
        gaps=[f"{label}: {gap}" for label, records in (("A", a), ("B", b)) for gap in records.gaps],
        weights=[
            WeightsOfBoth(s, _digest(steps_a.get(s)), _digest(steps_b.get(s)))
            for s in sorted(steps_a.keys() | steps_b.keys())
        ],
    )


def _processes(a: Records, b: Records) -> str:
    """A sentence where the two were run by different numbers of processes, which sum gradients in different orders."""
    if a.processes == b.processes:
        return ""
    counts = [records.processes or "an unknown number" for records in (a, b)]
    return f" Processes: {counts[0]} ran A, {counts[1]} ran B."


def _reasons(a: Records, b: Records) -> list[str]:
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
        f"A ran under contract {a.contract_id}, B under {b.contract_id}: {'; '.join(parts) or 'no field is known'}."
    ]


def _fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Which fields of a step's two records differ, of those that both have."""
    return [name for name in a if name in b and not name.startswith("time/") and a[name] != b[name]]


def _value(fields: Mapping[str, Any], name: str) -> str:
    return str(fields[name]) if name in fields else "(absent)"


def _digest(record: Mapping[str, Any] | None) -> str | None:
    return None if record is None else record["weights_digest"]


def _by_name(records: Records, step: int) -> dict[str, Episode]:
    """A step's saved episodes, of however many processes; a damaged file becomes a gap."""
    episodes: dict[str, Episode] = {}
    for file in records.episodes[step]:
        try:
            episodes |= {e.name: e for e in load_episodes(file)}
        except MetronomeError as error:
            records.gaps.append(f"Step {step}: {error}")
    return episodes


class _Episodes:
    """Counts over the saved episodes that both runs have."""

    def __init__(self) -> None:
        self.compared = self.unequal = self.tokens = self.tokens_unequal = self.rows_unequal = 0
        self.fields: dict[str, int] = {}  # in how many episodes each field differs
        self.reasons: list[str] = []

    def add(self, a: Mapping[str, Episode], b: Mapping[str, Episode], step: int) -> None:
        for name in [name for name in a if name in b]:
            x, y = a[name], b[name]
            if x.contract_id != y.contract_id:
                self.reasons.append(
                    f"Step {step}, episode {name}: A's is of contract {x.contract_id}, B's of {y.contract_id}."
                )
                continue
            self.compared += 1
            tensors_x, tensors_y = tensors(x), tensors(y)
            differs = [
                f for f in tensors_x | tensors_y
                if f not in tensors_x or f not in tensors_y or not _same(tensors_x[f], tensors_y[f])
            ]  # fmt: skip
            differs += [f for f in ("seed", "temperature", "weights_digest") if getattr(x, f) != getattr(y, f)]
            self.unequal += bool(differs)
            for field in differs:
                self.fields[field] = self.fields.get(field, 0) + 1
            other_inputs = {"tokens", "codes"} | {f for f in tensors_x if f.endswith((".sampled_at", ".row_class"))}
            if other_inputs & set(differs) or x.streams.keys() != y.streams.keys():
                continue  # nothing to count
            for stream, one in x.streams.items():
                other = y.streams[stream]
                self.tokens += len(one.logprob)
                if len(one.logprob) == len(other.logprob) and len(one.digest) == len(other.digest):
                    self.tokens_unequal += int(unequal_bits(one.logprob, other.logprob).sum())
                    self.rows_unequal += int((one.digest != other.digest).sum())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, type and bits."""
    return a.shape == b.shape and a.dtype == b.dtype and not bool(unequal_bits(a, b).any())


def _headline(
    verdict: str, common: int, unequal: Sequence[tuple[int, list[str]]], episodes: _Episodes, reasons: Sequence[str]
) -> str:
    if verdict == "not_comparable":
        return f"Not comparable. {reasons[0]}"
    if verdict == "identical":
        return f"One run, bit for bit: {common:,} steps and {episodes.compared:,} saved episodes are equal."
    if unequal:
        step, fields = unequal[0]
        first = f"The first is step {step:,}, in {', '.join(fields[:4])}{' …' if len(fields) > 4 else ''}."
        return f"Not the same run: {len(unequal):,} of {common:,} steps differ. {first}"
    return (
        f"Not the same run: {episodes.unequal:,} of {episodes.compared:,} saved episodes differ, or the final weights."
    )


def _scope(a: Records, b: Records, common: int, episodes: _Episodes) -> str:
    only = [
        f"{len(r.metrics) - common:,} steps of {label} alone"
        for label, r in (("A", a), ("B", b))
        if len(r.metrics) > common
    ]
    return (
        f"Compared: the records of {common:,} steps that both have (weights' digest, rewards, mismatch, entropy; not "
        f"times), and {episodes.compared:,} saved episodes with {episodes.tokens:,} sampled tokens. "
        f"{'Not compared: ' + ' and '.join(only) + '.' if only else 'Neither run has a step that the other lacks.'}"
    )  # fmt: skip
