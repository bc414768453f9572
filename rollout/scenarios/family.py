"""A family: one kind of scenario, with all its functions in one object.

Code that makes, plays, scores or displays scenarios calls their family; only a family's own modules know its scenarios,
facts and settings. The shipped families are defined in `reward.rules` (`timespeak`, `turn_taking`, `lookout`,
`repeat`), since their scorers belong to package reward, and use the users of the modules of the same names in
`rollout.scenarios`.
`tests/examples/` has a family outside these packages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from kernels.errors import MetronomeError
from rollout.scenarios.verdict import Score
from rollout.turn.action import Action
from rollout.world.base import Facts, Mistakes, Scenario, Script, User
from rollout.world.speech import SpeechBank, Split

RESERVED_NAMES = ("families", "mean", "watched", "greedy", "interval")
"""Names that a family cannot have, because recipes and tables of results use them otherwise."""


class Settings(Protocol):
    """A family's part of the recipe: a frozen dataclass in which every field has a default, and each number, list and
    text a range in its type (`model.program.ranges`). Those of a family that shows video may have a property ``frame``,
    (height, width) of its largest frame in pixels: then a recipe without room for it is refused before a run begins.
    Those of a family whose expert speaks with sound have ``aloud``, the words of the lexicon that it may say, and
    ``audible_db``, the level from which a chunk of sound is heard: only a model with a voice can learn from it, and
    from nothing else."""

    @property
    def chunks(self) -> int:
        """The most chunks that an episode has."""

    @property
    def mistakes(self) -> Mistakes:
        """The expert's deliberate mistakes in demonstrations."""


SettingsT = TypeVar("SettingsT", bound=Settings)
ScenarioT = TypeVar("ScenarioT", bound=Scenario)
FactsT = TypeVar("FactsT", bound=Facts)


@dataclass(frozen=True)
class Family(Generic[SettingsT, ScenarioT, FactsT]):
    """One kind of scenario. All its functions are pure: equal arguments give equal results on every machine. Raises
    MetronomeError for a name or axes that cannot be used."""

    name: str  # in scenario ids, metrics and the recipe: letters, digits and underscores
    axes: tuple[str, ...]  # names of its rewards' components, in the order in which they are summed
    settings: type[SettingsT]
    make: Callable[[Split, int, SpeechBank, SettingsT], ScenarioT]  # the scenario of a split and seed
    facts: Callable[[Mapping[str, Any]], FactsT]  # the inverse of `Facts.to_json`
    expert: Callable[[ScenarioT, User, np.random.Generator, SettingsT], Script]  # makes the mistakes of the settings
    score: Callable[[FactsT, Sequence[Action], SettingsT], Score]  # scores the actions [chunks]
    words: Callable[[FactsT], tuple[str, ...]]  # what a faultless model says, in order
    hacks: Mapping[str, Callable[[ScenarioT, User], Script]] = field(default_factory=dict)
    """Reward hacks to test the scorer with, by name, beside the general ones of `reward.hacks`: scripts that try to be
    rewarded without solving the task."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name in RESERVED_NAMES:
            raise MetronomeError(
                f"a scenario family is called {self.name!r}: give it a name of letters, digits and underscores, other "
                f"than {', '.join(RESERVED_NAMES)}"
            )
        if not self.axes or len(set(self.axes)) < len(self.axes) or not all(axis.isidentifier() for axis in self.axes):
            raise MetronomeError(
                f"the axes of family {self.name!r} are {list(self.axes)}: give at least one, each once, of letters, "
                "digits and underscores"
            )


AnyFamily = Family[Any, Any, Any]
