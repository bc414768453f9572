"""Reads a run's folder without trusting it: what is missing or damaged is listed as a gap instead of raising.

(`rl.folder` refuses a folder with half a line in it, because a run must not go on from there; an audit still has to say
what the rest proves.) Compares nothing.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kernels.errors import MetronomeError
from model.program.recipe import read_recipe
from rl.audit.document import DiagnosisSummary
from rl.config import TrainConfig
from rl.step.identity import Mismatch
from rollout.scenarios.registry import ForeignFamilyError, ScenarioConfig

_EPISODES = re.compile(r"step_(\d{6,})\.rank_(\d+)\.safetensors")
_CHECKPOINT = re.compile(r"step_(\d{6,})")
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


def read(path: Path) -> Records:
    """Raises MetronomeError when ``path`` is not a run's folder or its recipe is not YAML."""
    if not path.is_dir():
        raise MetronomeError(f"{path}: there is no such folder; name a run's folder, such as runs/quickstart")
    if not (path / "config.yaml").is_file():
        raise MetronomeError(f"{path} is not a run's folder (no config.yaml); name one, such as runs/quickstart")
    try:
        text = (path / "config.yaml").read_text()
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MetronomeError(f"{path / 'config.yaml'}: not a recipe ({error}); restore the file") from error
    if not isinstance(recipe, dict):
        raise MetronomeError(f"{path / 'config.yaml'}: not a recipe; restore the file")
    gaps: list[str] = []
    config, scenarios = _config(path / "config.yaml", recipe, gaps)
    records = Records(
        path=path,
        recipe=recipe,
        recipe_text=text,
        config=config,
        scenarios=scenarios,
        environment=_json(path / "environment.json", gaps, "the run's environment and contract are unknown"),
        metrics=_metrics(path / "metrics.jsonl", gaps),
        summary=_json(path / "summary.json", gaps, "the run has not finished"),
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


def _config(path: Path, recipe: dict[str, Any], gaps: list[str]) -> tuple[TrainConfig | None, ScenarioConfig | None]:
    """The recipe parsed, and its families; without them where they are not to be imported."""
    try:
        config = read_recipe("rl.audit", "", TrainConfig, ["--config", str(path)]).config
        return config, config.scenarios
    except ForeignFamilyError as error:
        gaps.append(f"No episode is judged by rules: {error}.")
        rest = {name: value for name, value in recipe.items() if not str(name).startswith("scenarios")}
        try:
            return read_recipe("rl.audit", "", TrainConfig, ["--config", yaml.safe_dump(rest)]).config, None
        except (MetronomeError, ValueError) as problem:
            unreadable: Exception = problem
    except (MetronomeError, ValueError) as error:
        unreadable = error
    first = str(unreadable).strip().splitlines()[0]
    gaps.append(f"This program cannot read the run's recipe ({first}): episodes cannot be re-scored or judged.")
    return None, None


def _json(path: Path, gaps: list[str], otherwise: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(), parse_constant=str)
        if isinstance(value, dict):
            return value
        problem = "holds no object"
    except FileNotFoundError:
        problem = "is missing"
    except ValueError as error:
        problem = f"is damaged ({error})"
    gaps.append(f"{path.name} {problem}: {otherwise}.")
    return {}


def _metrics(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if not lines:
        gaps.append("metrics.jsonl is missing or empty: the run recorded no step.")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line, parse_constant=str)
            counts = [record[name] for name in COUNTS]
            whole = isinstance(record["weights_digest"], str) and all(
                type(count) is int and count >= 0 for count in (record["step"], *counts)
            )
        except (ValueError, KeyError, TypeError):
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
    return float(value) if isinstance(value, int | float) else math.nan


def _stopped(records: Records) -> RefusedStep | None:
    """The step that the run did not take, unless it took it later on."""
    path = records.path / "audit/difference.json"
    if not path.is_file():
        return None
    difference = _json(path, records.gaps, "why the run stopped is unknown")
    try:
        step, counts = difference["step"], [difference["mismatch"][name] for name in COUNTS]
        whole = all(type(value) is int and value >= 0 for value in (step, *counts))
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
    if isinstance(suspects, list):
        diagnosis = DiagnosisSummary(step, first if isinstance(first, dict) else None, [str(s) for s in suspects])
    return RefusedStep(step, _mismatch(difference["mismatch"]), diagnosis)


def _check_steps(records: Records) -> None:
    steps = [r["step"] for r in records.metrics]
    planned = records.planned_steps
    missing = len(range(steps[-1] + 1)) - len(steps) if steps else 0
    if missing:
        records.gaps.append(f"The records lack {missing} of the steps up to {steps[-1]}.")
    if planned is not None and steps and steps[-1] + 1 < planned and not records.summary:
        records.gaps.append(f"The recipe plans {planned:,} steps; the records end with step {steps[-1]:,}.")
