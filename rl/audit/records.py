"""Reads a run's folder without trusting it: what is missing or damaged is listed as a gap instead of raising.

(`rl.folder` refuses a folder with half a line in it, because a run must not go on from there; an audit still has to say
what the rest proves.) Compares nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.program.ranges import shown
from model.program.reading import (
    MOST_RECIPE_BYTES,
    UnreadableError,
    lines,
    parse_line,
    parse_yaml,
    read_bytes,
    read_object,
    read_text,
)
from model.program.recipe import read_recipe
from model.program.yaml_text import to_yaml
from rl.audit.document import DiagnosisSummary
from rl.config import TrainConfig
from rl.folder import Note, notes
from rl.step.identity import Mismatch
from rollout.scenarios.registry import ForeignFamilyError, ScenarioConfig

_EPISODES = re.compile(r"step_(\d{6,})\.rank_(\d+)\.safetensors")
_CHECKPOINT = re.compile(r"step_(\d{6,})")
ENVIRONMENT = {"contract": dict, "contract_id": str, "processes": int}
SUMMARY = {"weights_digest": str}
"""Types of what is read of environment.json and summary.json, texts being printable; the rest is only shown."""
MOST_STEPS, MOST_TOKENS = 10**9, 2**53
COUNTS = ("mismatch/num_tokens", "mismatch/num_unequal", "mismatch/rows_unequal")


@dataclass(frozen=True)
class RefusedStep:
    """A step that the run did not take because bits differed, as read from audit/difference.json."""

    step: int
    mismatch: Mismatch
    diagnosis: DiagnosisSummary | None  # None if the file holds none


@dataclass(frozen=True)
class Records:
    """The content of a run's folder. Steps are RL steps, counted from 0. The checkpoint of step n holds the weights
    from which step n samples."""

    path: Path
    recipe: dict[str, Any]  # config.yaml as it stands
    recipe_text: str
    earlier_recipes: tuple[str, ...]  # texts of those that the run had before it was resumed under another one
    config: TrainConfig | None  # the recipe parsed; None if this program cannot
    scenarios: ScenarioConfig | None  # the families whose rules judge; None if unknown or not to be imported
    environment: dict[str, Any]  # {} if the run left none
    metrics: list[dict[str, Any]]  # a record for each step, in ascending order
    summary: dict[str, Any]  # {} if the run did not finish
    episodes: dict[int, list[Path]]  # step -> its files of episodes, in rank order
    checkpoints: dict[int, Path]  # finished steps -> folder
    stopped: RefusedStep | None  # the run's last step, if it was not taken because bits differed
    gaps: list[str]  # what is missing or damaged, in sentences
    damaged_checkpoints: list[str]  # a sentence for each one that does not agree with its manifest

    @property
    def name(self) -> str:
        """The run's name in its recipe, or else its folder's."""
        return str(self.recipe.get("name", self.path.name))

    @property
    def contract_id(self) -> str | None:
        """As environment.json has it; None if unknown."""
        contract_id = self.environment.get("contract_id")
        return None if contract_id is None else str(contract_id)

    @property
    def processes(self) -> int | None:
        """Number of processes; the digests of the weights depend on it, because it decides the order of sums."""
        processes = self.environment.get("processes")
        return processes if type(processes) is int else None

    @property
    def planned_steps(self) -> int | None:
        """The recipe's number of RL steps; None if the recipe cannot be read."""
        return self.config.rl.steps if self.config else None

    def mismatch(self) -> Mismatch:
        """The sum of the run's own counts at each step, including a step that it refused to take."""
        refused = [self.stopped.mismatch] if self.stopped else []
        return Mismatch.total([*map(_mismatch, self.metrics), *refused])

    def weights_digest_before(self, step: int) -> str | None:
        """The recorded digest of the weights from which ``step`` sampled; None for the first step."""
        return next((str(r["weights_digest"]) for r in self.metrics if r["step"] == step - 1), None)

    def packs_digest_before(self, step: int) -> str | None:
        """The recorded digest of the packed copies of the weights that the kernels read in ``step``; None if not
        recorded."""
        digest = next((r.get("packs_digest") for r in self.metrics if r["step"] == step - 1), None)
        return None if digest is None else str(digest)


def check_run(path: Path) -> None:
    """Raises MetronomeError when ``path`` is not a run's folder."""
    if path.exists() and not path.is_dir():
        raise MetronomeError(f"{path} is not a run's folder (it is a file); name one, such as runs/quickstart")
    if not path.is_dir():
        raise MetronomeError(f"{path}: there is no such folder; name a run's folder, such as runs/quickstart")
    if not (path / "config.yaml").is_file():
        raise MetronomeError(f"{path} is not a run's folder (no config.yaml); name one, such as runs/quickstart")


def read(path: Path) -> Records:
    """Raises MetronomeError when ``path`` is not a run's folder or its recipe is not YAML."""
    check_run(path)
    try:
        text = read_text(path / "config.yaml", MOST_RECIPE_BYTES)
        recipe = parse_yaml(text)
    except UnreadableError as error:
        raise MetronomeError(f"{path / 'config.yaml'}: not a recipe ({error.problem}); restore the file") from error
    if not isinstance(recipe, dict):
        raise MetronomeError(f"{path / 'config.yaml'}: not a recipe; restore the file")
    gaps: list[str] = []
    resumed = _resumed(path, gaps)
    config, scenarios = _config(path / "config.yaml", recipe, gaps)
    records = Records(
        path=path,
        recipe=recipe,
        recipe_text=text,
        earlier_recipes=tuple(text for note in resumed for text in note.recipes),
        config=config,
        scenarios=scenarios,
        environment=_json(path / "environment.json", gaps, "environment and contract are unknown", ENVIRONMENT),
        metrics=_metrics(path / "metrics.jsonl", gaps),
        summary=_json(path / "summary.json", gaps, "the run has not finished", SUMMARY),
        episodes={},
        checkpoints={
            int(match[1]): p
            for p in (path / "checkpoints").glob("step_*")
            if (match := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()
        },
        stopped=None,
        gaps=gaps,
        damaged_checkpoints=[],
    )
    for file in sorted((path / "episodes").glob("step_*")):
        if match := _EPISODES.fullmatch(file.name):
            records.episodes.setdefault(int(match[1]), []).append(file)
    if not records.episodes:
        gaps.append("No episodes were saved, so that nothing can be re-scored.")
    _check_steps(records)
    return replace(records, stopped=_stopped(records))


def rank_of(name: str) -> int:
    """The rank in the name of a file of episodes."""
    match = _EPISODES.fullmatch(name)
    assert match is not None, name
    return int(match[2])


def _config(path: Path, recipe: dict[str, Any], gaps: list[str]) -> tuple[TrainConfig | None, ScenarioConfig | None]:
    """The recipe parsed, and its families; without them where they are not to be imported."""
    try:
        config = read_recipe("rl.audit", "", TrainConfig, ["--config", str(path)], past=True).config
        return config, config.scenarios
    except ForeignFamilyError as error:
        gaps.append(f"No episode is judged by rules: {error}.")
        rest = {name: value for name, value in recipe.items() if not str(name).startswith("scenarios")}
        try:
            return read_recipe("rl.audit", "", TrainConfig, ["--config", to_yaml(rest)], past=True).config, None
        except (MetronomeError, ValueError) as problem:
            unreadable: Exception = problem
    except (MetronomeError, ValueError) as error:
        unreadable = error
    first = str(unreadable).strip().splitlines()[0]
    gaps.append(f"This program cannot read the run's recipe ({first}): episodes cannot be re-scored or judged.")
    return None, None


def _resumed(path: Path, gaps: list[str]) -> list[Note]:
    """The notes of changed recipes that a resumed run left; what they say of its bits becomes gaps."""
    try:
        found = notes(path)
    except MetronomeError as error:
        gaps.append(f"Whether the run's recipe changed is unknown: {error}.")
        return []
    for note in found:
        said = ", ".join(f"{name} from {a} to {b}" for name, (a, b) in note.changed.items())
        if "rl.steps" in note.changed and note.step:
            gaps.append(
                f"The recipe changed at step {note.step} ({said}): steps before it have the learning rates of the "
                "recipe before."
            )
    return found


def _json(path: Path, gaps: list[str], otherwise: str, types: Mapping[str, type]) -> dict[str, Any]:
    """A file's object, without fields that are of another type than in ``types``, or not printable."""
    try:
        value = read_object(path)
    except UnreadableError as error:
        problem = error.problem if error.problem.startswith("is missing") else f"is damaged ({error.problem})"
        gaps.append(f"{path.name} {problem}: {otherwise}.")
        return {}
    for name, kind in types.items():
        one = value.get(name, kind())
        if type(one) is not kind:
            gaps.append(f"{path.name}: {name} is {shown(value.pop(name))}, no {kind.__name__}; it is left out.")
        elif isinstance(one, str) and not one.isprintable():
            gaps.append(f"{path.name}: {name} is {shown(value.pop(name))}, which is not printable; it is left out.")
    return value


def _metrics(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    try:
        data = read_bytes(path)
    except UnreadableError:
        data = b""
    if not data:
        gaps.append("metrics.jsonl is missing or empty: the run recorded no step.")
    records: list[dict[str, Any]] = []
    for number, line in lines(data):
        try:
            record = parse_line(line, "")
            counts = [record[name] for name in COUNTS]
            texts = [*record, record["weights_digest"], record.get("packs_digest", "")]
            whole = all(isinstance(text, str) and text.isprintable() for text in texts) and all(
                type(count) is int and 0 <= count <= limit
                for count, limit in ((record["step"], MOST_STEPS), *((count, MOST_TOKENS) for count in counts))
            )
        except (UnreadableError, KeyError):
            whole = False
        if not whole:
            gaps.append(f"metrics.jsonl, line {number}: not a whole record of a step; it is left out.")
        elif records and record["step"] <= records[-1]["step"]:
            gaps.append(f"metrics.jsonl, line {number}: step {record['step']} comes again; it is left out.")
        else:
            records.append(record)
    return records


def _mismatch(record: dict[str, Any]) -> Mismatch:
    """One record's counts; the sums are rebuilt from the means."""
    tokens, unequal, rows = (record[name] for name in COUNTS)
    k1, k3, largest = (_number(record.get(f"mismatch/{name}")) for name in ("k1", "k3", "max_abs"))
    return Mismatch(tokens, unequal, rows, k1 * tokens, k3 * tokens, largest)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _stopped(records: Records) -> RefusedStep | None:
    """The step that the run did not take, unless it took it later on."""
    path = records.path / "audit/difference.json"
    if not path.is_file():
        return None
    difference = _json(path, records.gaps, "why the run stopped is unknown", {})
    try:
        step, counts = difference["step"], [difference["mismatch"][name] for name in COUNTS]
        whole = all(type(value) is int and 0 <= value <= MOST_TOKENS for value in (step, *counts))
    except (KeyError, TypeError):
        whole = False
    if not whole:
        records.gaps.append("difference.json does not say at which step bits differed, and in how many tokens.")
        return None
    if records.metrics and records.metrics[-1]["step"] >= step:
        records.gaps.append(f"Step {step} was once refused, because bits differed, and taken later on.")
        return None
    first, suspects = difference.get("first"), difference.get("suspects")
    diagnosis = None
    if (
        isinstance(suspects, list)
        and all(isinstance(one, str) for one in suspects)
        and (first is None or isinstance(first, dict))
    ):
        diagnosis = DiagnosisSummary(step, first, suspects)
    elif suspects is not None or first is not None:
        records.gaps.append("difference.json holds no diagnosis that can be shown.")
    return RefusedStep(step, _mismatch(difference["mismatch"]), diagnosis)


def _check_steps(records: Records) -> None:
    steps = [r["step"] for r in records.metrics]
    planned = records.planned_steps
    missing = steps[-1] + 1 - len(steps) if steps else 0
    if missing:
        records.gaps.append(f"The records lack {missing} of the steps up to {steps[-1]}.")
    if planned is not None and steps and steps[-1] + 1 < planned and not records.summary:
        records.gaps.append(f"The recipe plans {planned:,} steps; the records end with step {steps[-1]:,}.")
