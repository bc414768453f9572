"""Where families are found, by short name or ``package.module:NAME``, and the part of a recipe that names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import numpy as np

from kernels.errors import MetronomeError
from model.program.recipe import OpenConfig
from rollout.scenarios.family import AnyFamily, Family
from rollout.world.base import Facts, Scenario, Script, User
from rollout.world.speech import SpeechBank, Split

SHIPPED = {"timespeak": "reward.rules.timespeak:TIMESPEAK", "turn_taking": "reward.rules.turn_taking:TURN_TAKING"}
"""Families that a recipe may name in short. Named, not imported: rewards stand above rollouts."""


@cache
def find_family(name: str) -> AnyFamily:
    """The family of a short name or of ``package.module:NAME``. Raises MetronomeError when there is none."""
    module, colon, attribute = SHIPPED.get(name, name).partition(":")
    forms = (
        f"Choose one of {', '.join(SHIPPED)}, or name your own as package.module:NAME, where NAME is a "
        "`rollout.scenarios.family.Family` and the module can be imported (PYTHONPATH)"
    )
    if not colon:
        raise MetronomeError(f"no scenario family is called {name!r}. {forms}")
    try:
        family = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise MetronomeError(f"scenario family {name!r}: there is no module {error.name!r}. {forms}") from error
    if not isinstance(family, Family):
        raise MetronomeError(f"scenario family {name!r}: {attribute} in {module} is {family!r}, no Family. {forms}")
    return family


@dataclass(frozen=True)
class ScenarioConfig(OpenConfig):
    """The families of a run, and their settings. In a recipe the settings stand under the families' names:

    scenarios: {families: [timespeak, my.module:FAMILY], timespeak: {chunks: 40}}
    """

    families: tuple[str, ...] = tuple(SHIPPED)  # short names or package.module:NAME; they take turns in this order
    settings: Mapping[str, Any] = field(default_factory=dict)  # by the family's own name; its defaults where left out

    @property
    def members(self) -> dict[str, AnyFamily]:
        """By their own names, in order. Raises MetronomeError for one that is not there, and for two of one name."""
        members: dict[str, AnyFamily] = {}
        for address in self.families:
            family = find_family(address)
            if family.name in members:
                raise MetronomeError(f"scenarios.families: two are called {family.name!r}; name each family once")
            members[family.name] = family
        if not members:
            raise MetronomeError("scenarios.families is empty: name at least one family")
        return members

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis of reward that some family has, in the families' order."""
        return tuple(dict.fromkeys(axis for family in self.members.values() for axis in family.axes))

    def family(self, name: str) -> AnyFamily:
        """Raises ValueError for a name that no family has."""
        members = self.members
        if name not in members:
            raise ValueError(f"no scenario family is called {name!r}: the recipe has {', '.join(members)}")
        return members[name]

    def settings_of(self, name: str) -> Any:
        """Of the type that the family's `Family.settings` says."""
        return self.settings[name] if name in self.settings else self.family(name).settings()

    def scenario(self, family: str, split: Split, seed: int, bank: SpeechBank) -> Scenario:
        """The scenario "family/split/seed": a pure function of its arguments."""
        made: Scenario = self.family(family).make(split, seed, bank, self.settings_of(family))
        return made

    def in_turn(self, index: int, split: Split, seed: int, bank: SpeechBank) -> Scenario:
        """The scenario of a seed, of the family whose turn it is at ``index``."""
        names = list(self.members)
        return self.scenario(names[index % len(names)], split, seed, bank)

    def of_each(self, count: int, split: Split, bank: SpeechBank, first_seed: int = 0) -> list[Scenario]:
        """``count`` scenarios of each family, [count * families], families in turn at each seed."""
        seeds = range(first_seed, first_seed + count)
        return [self.scenario(family, split, seed, bank) for seed in seeds for family in self.members]

    def facts(self, fields: Mapping[str, Any]) -> Facts:
        """Reads back what `Facts.to_json` wrote."""
        read: Facts = self.family(fields["family"]).facts(fields)
        return read

    def expert(
        self, item: Scenario, rng: np.random.Generator, mistake_scale: float = 1.0, gross: bool = False
    ) -> Callable[[User], Script]:
        """From a scenario's user to the script of the family's expert. ``mistake_scale`` multiplies the rates of
        mistakes in the settings (0: a faultless expert); ``gross`` replaces them by `Mistakes.gross` first."""
        settings = self.settings_of(item.family)
        mistakes = settings.mistakes.gross() if gross else settings.mistakes
        erring = replace(settings, mistakes=mistakes.scaled(mistake_scale))
        return lambda user: self.family(item.family).expert(item, user, rng, erring)

    def schema(self, said: Mapping[str, Any]) -> type[Any]:
        named = said.get("families")
        families = tuple(named) if isinstance(named, list) and all(isinstance(n, str) for n in named) else self.families
        settings = [
            (name, family.settings, field(default_factory=partial(self._default, name, family)))
            for name, family in ScenarioConfig(families).members.items()
        ]
        return make_dataclass(
            "Scenarios", [("families", tuple[str, ...], field(default=families)), *settings], frozen=True
        )

    def _default(self, name: str, family: AnyFamily) -> Any:
        return self.settings[name] if name in self.settings else family.settings()

    @classmethod
    def from_schema(cls, read: Any) -> ScenarioConfig:
        families = tuple(read.families)
        return cls(families, {name: getattr(read, name) for name in cls(families).members})
