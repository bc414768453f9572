"""The scenarios of a run that is over: its families and recordings, from the recipe in its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kernels.errors import MetronomeError
from model.program.ranges import FilePath
from model.program.reading import read_yaml
from model.program.recipe import read_recipe
from model.program.yaml_text import to_yaml
from rollout.scenarios.registry import ScenarioConfig


@dataclass(frozen=True)
class StoredWorld:
    """The part of a run's recipe that makes its scenarios."""

    scenarios: ScenarioConfig = field(default_factory=ScenarioConfig)
    speech_dir: FilePath | None = None  # folder of recordings; None is the set shipped with the program


def stored_world(run: Path) -> StoredWorld:
    """That of the run in the folder ``run``; the defaults where there is none. Raises MetronomeError for a recipe that
    cannot be read."""
    path = run / "config.yaml"
    if not path.is_file():
        return StoredWorld()
    try:
        recipe = read_yaml(path)
        fields = {"scenarios": recipe["scenarios"], "speech_dir": recipe.get("speech_dir")}
    except (KeyError, TypeError, AttributeError) as error:
        raise MetronomeError(f"{path}: no recipe of a run with its families ({error!r})") from error
    return read_recipe("rl.train", "", StoredWorld, ["--config", to_yaml(fields)], past=True).config
