"""A family: everything that one kind of scenario brings, in one object.

Whoever makes, plays, scores or shows scenarios asks their family; nothing outside a family's own modules knows its
scenarios, facts or settings. The shipped families stand in `reward.rules.timespeak` and `reward.rules.turn_taking`,
above the modules of their users (`rollout.scenarios.timespeak`, …), because a scorer needs more than a user does.
`tests/examples/` has one that lives outside these packages.
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

RESERVED_NAMES = ("families", "mean")
"""A recipe or a table of results means something else by them."""


class Settings(Protocol):
    """A family's part of the recipe: a frozen dataclass in which every field has a default."""

    @property
    def mistakes(self) -> Mistakes:
        """How the expert errs in demonstrations."""


SettingsT = TypeVar("SettingsT", bound=Settings)
ScenarioT = TypeVar("ScenarioT", bound=Scenario)
FactsT = TypeVar("FactsT", bound=Facts)


@dataclass(frozen=True)
class Family(Generic[SettingsT, ScenarioT, FactsT]):
    """One kind of scenario. Its functions keep no state: equal arguments give equal results, on every machine."""

    name: str  # in scenario ids, metrics and the recipe: letters, digits and underscores
    axes: tuple[str, ...]  # of its rewards, in the order in which they are added up
    settings: type[SettingsT]
    make: Callable[[Split, int, SpeechBank, SettingsT], ScenarioT]  # the scenario of a split and seed
    facts: Callable[[Mapping[str, Any]], FactsT]  # reads back what `Facts.to_json` wrote
    expert: Callable[[ScenarioT, User, np.random.Generator, SettingsT], Script]  # errs by the settings' mistakes
    score: Callable[[FactsT, Sequence[Action], SettingsT], Score]  # of the actions [chunks]
    words: Callable[[FactsT], tuple[str, ...]]  # what an honest player says, in the order in which it is due
    hacks: Mapping[str, Callable[[ScenarioT, User], Script]] = field(default_factory=dict)
    """Policies worth trying that would like to be paid without doing the work, beside those of `reward.hacks`."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name in RESERVED_NAMES:
            raise MetronomeError(
                f"a scenario family is called {self.name!r}: give it a name of letters, digits and underscores, other "
                f"than {' and '.join(RESERVED_NAMES)}"
            )
        if not self.axes or len(set(self.axes)) < len(self.axes) or not all(axis.isidentifier() for axis in self.axes):
            raise MetronomeError(
                f"the axes of family {self.name!r} are {list(self.axes)}: give at least one, each once, of letters, "
                "digits and underscores"
            )


AnyFamily = Family[Any, Any, Any]
