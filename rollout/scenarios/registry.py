"""Finds families by short name or ``package.module:NAME``; the part of a recipe about scenarios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, make_dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Annotated, Any, cast

import numpy as np

from kernels.errors import MetronomeError
from model.program.ranges import Length, Text
from model.program.reading import as_record, to_json
from model.program.recipe import OpenConfig
from rollout.scenarios.family import AnyFamily, Family
from rollout.world.base import Facts, Scenario, Script, User
from rollout.world.speech import SpeechBank, Split

SHIPPED = {
    "timespeak": "reward.rules.timespeak:TIMESPEAK",
    "turn_taking": "reward.rules.turn_taking:TURN_TAKING",
    "lookout": "reward.rules.lookout:LOOKOUT",
    "repeat": "reward.rules.repeat:REPEAT",
}
"""Short names of the shipped families. They are imported when used, because package reward imports this one."""
QUICKSTART = ("timespeak", "turn_taking")
"""The families of a recipe that names none."""

_guards: list[tuple[str, dict[str, str]]] = []
"""Of the blocks of `shipped_only` that run now: the option of each, and what it has refused."""


class ForeignFamilyError(MetronomeError):
    """A recipe names a family whose module is not imported, because nobody has said that it may be."""


@contextmanager
def shipped_only(option: str, unless: bool = False) -> Iterator[dict[str, str]]:
    """While the block runs, finding a family that is not shipped raises ForeignFamilyError in place of importing its
    module. For commands that read the recipe of a run which may be somebody else's: importing a module executes it.

    ``option``: what the user gives to allow it; ``unless``: whether that was given. Yields what was refused: family ->
    the error's line."""
    refused: dict[str, str] = {}
    if unless:
        yield refused
        return
    _guards.append((option, refused))
    try:
        yield refused
    finally:
        _guards.pop()


def find_family(name: str) -> AnyFamily:
    """The family called by a short name or ``package.module:NAME``. Raises MetronomeError when there is none, and
    ForeignFamilyError within `shipped_only`."""
    if _guards and ":" in name and name not in SHIPPED.values():
        option, refused = _guards[-1]
        refused[name] = (
            f"scenario family {name!r} is not one of ours: its module {name.partition(':')[0]!r} was not imported, "
            f"because importing executes it. Give {option} if you trust it"
        )
        raise ForeignFamilyError(refused[name])
    return _find_family(name)


Families = Annotated[tuple[Annotated[str, Text()], ...], Length(1, 100)]


@cache
def _find_family(name: str) -> AnyFamily:
    module, colon, attribute = SHIPPED.get(name, name).partition(":")
    forms = (
        f"Choose one of {', '.join(SHIPPED)}, or name your own as package.module:NAME, where NAME is a "
        "`rollout.scenarios.family.Family` and the module can be imported (PYTHONPATH)"
    )
    if not colon or not all(part.isidentifier() for part in module.split(".")):
        raise MetronomeError(f"no scenario family is called {name!r}. {forms}")
    try:
        members = vars(import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise MetronomeError(f"scenario family {name!r}: there is no module {error.name!r}. {forms}") from error
    if attribute not in members:
        raise MetronomeError(f"scenario family {name!r}: {module} has no {attribute}. {forms}")
    family = members[attribute]
    if not isinstance(family, Family):
        raise MetronomeError(f"scenario family {name!r}: {attribute} in {module} is {family!r}, no Family. {forms}")
    return family


@dataclass(frozen=True)
class ScenarioConfig(OpenConfig):
    """The families of a run and their settings. In a recipe each family's settings are under its name:

    scenarios: {families: [timespeak, my.module:FAMILY], timespeak: {chunks: 40}}
    """

    families: Families = QUICKSTART  # short names or package.module:NAME; scenarios alternate in this order
    settings: Mapping[str, Any] = field(default_factory=dict)  # by `Family.name`; a family left out has its defaults

    @property
    def members(self) -> dict[str, AnyFamily]:
        """The families by name, in order. Raises MetronomeError when one cannot be found, two have one name or there
        are none."""
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
        """The union of all families' axes of reward, in the families' order."""
        return tuple(dict.fromkeys(axis for family in self.members.values() for axis in family.axes))

    @property
    def aloud(self) -> dict[str, tuple[str, ...]]:
        """The families in which words are said with sound, and these words (`rollout.scenarios.family.Settings`)."""
        said = {name: getattr(self.settings_of(name), "aloud", ()) for name in self.members}
        return {name: words for name, words in said.items() if words}

    @property
    def most_chunks(self) -> int:
        """Length of the longest episode of any family."""
        return max(int(self.settings_of(name).chunks) for name in self.members)

    def family(self, name: str) -> AnyFamily:
        """The family of that name. Raises ValueError when the recipe has none."""
        members = self.members
        if name not in members:
            raise ValueError(f"no scenario family is called {name!r}: the recipe has {', '.join(members)}")
        return members[name]

    def settings_of(self, name: str) -> Any:
        """A family's settings, of the type `Family.settings`."""
        return self.settings[name] if name in self.settings else self.family(name).settings()

    def scenario(self, family: str, split: Split, seed: int, bank: SpeechBank) -> Scenario:
        """The scenario with id "family/split/seed": a pure function of the arguments and this config."""
        settings = self.settings_of(family)
        made: Scenario = self.family(family).make(split, seed, bank, settings)
        if made.chunks > settings.chunks:
            raise MetronomeError(
                f"family {family!r} made a scenario of {made.chunks} chunks: its settings say {settings.chunks} at most"
            )
        return made

    def in_turn(self, index: int, split: Split, seed: int, bank: SpeechBank) -> Scenario:
        """The scenario of a seed, its family number ``index`` modulo the number of families."""
        names = list(self.members)
        return self.scenario(names[index % len(names)], split, seed, bank)

    def of_each(self, count: int, split: Split, bank: SpeechBank, first_seed: int = 0) -> list[Scenario]:
        """``count`` scenarios of each family, [count * families]: for each seed from ``first_seed`` on, one per
        family."""
        seeds = range(first_seed, first_seed + count)
        return [self.scenario(family, split, seed, bank) for seed in seeds for family in self.members]

    def facts(self, fields: Mapping[str, Any]) -> Facts:
        """The inverse of `Facts.to_json`, for facts of any of the families."""
        read: Facts = self.family(fields["family"]).facts(fields)
        return read

    def stored_facts(self, fields: Mapping[str, Any]) -> Facts:
        """`facts` of a file, whose types and ranges are checked. Raises MetronomeError and whatever a family raises for
        fields that are not its own."""
        read = self.facts(fields)
        kind: Any = type(read)
        if is_dataclass(kind):
            as_record(to_json(dict(fields)), cast(type[Any], kind), "facts")
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

    def schema(self, content: Mapping[str, Any]) -> type[Any]:
        named = content.get("families")
        families = tuple(named) if isinstance(named, list) and all(isinstance(n, str) for n in named) else self.families
        return _schema(families, tuple(self.settings.items()))

    @classmethod
    def from_schema(cls, read: Any) -> ScenarioConfig:
        families = tuple(read.families)
        return cls(families, {name: getattr(read, name) for name in cls(families).members})


@cache
def _schema(families: tuple[str, ...], settings: tuple[tuple[str, Any], ...]) -> type[Any]:
    """The dataclass of a recipe's part with these families; ``settings``: their defaults where not the family's own."""
    config = ScenarioConfig(families, dict(settings))
    members = [
        (name, family.settings, field(default_factory=partial(config.settings_of, name)))
        for name, family in config.members.items()
    ]
    named = ("families", Families, field(default=families))
    return make_dataclass("Scenarios", [named, *members], frozen=True)
