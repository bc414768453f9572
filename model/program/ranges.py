"""Ranges of a recipe's fields, written into their types and checked for every command before anything is written.

    steps: Annotated[int, Range(0, 10**7)] = 120
    sizes: Annotated[tuple[Annotated[int, Range(1, 1000)], ...], Length(1, 100)] = (1, 3)

`read_recipe` calls `check`, and commands with plain options use `number` as the type of an option. A field whose type
names no range must still be finite, fit 64 bits, or be text without control characters.
"""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

from kernels.errors import MetronomeError

INT64 = 2**63 - 1
LONGEST_TEXT = 4096
"""Characters, as many as Linux allows a path."""


@runtime_checkable
class Limit(Protocol):
    """What `Annotated` may add to a field's type."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of "rl.steps is -1: …"; None if nothing is."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included unless ``open_low`` leaves ``low`` out."""

    low: float
    high: float
    open_low: bool = False

    def __repr__(self) -> str:
        return f"{'above ' if self.open_low else ''}{self.low:,} to {self.high:,}"

    def problem(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"give a number from {self!r}"
        # written so that NaN, which compares as false, is outside
        inside = self.low < value <= self.high if self.open_low else self.low <= value <= self.high
        return None if inside else f"give a number {'' if self.open_low else 'from '}{self!r}"


@dataclass(frozen=True)
class ZeroOr(Range):
    """0, which stands for something of its own, or numbers from ``low`` to ``high``."""

    def __repr__(self) -> str:
        return f"0 or {super().__repr__()}"

    def problem(self, value: Any) -> str | None:
        wrong = super().problem(value)
        is_zero = isinstance(value, int | float) and not isinstance(value, bool) and value == 0
        return None if wrong is None or is_zero else f"give {self!r}"


@dataclass(frozen=True)
class Multiples(Range):
    """Whole numbers from ``low`` to ``high`` that ``of`` divides."""

    of: int = 1

    def __repr__(self) -> str:
        return f"{super().__repr__()}, a multiple of {self.of}"

    def problem(self, value: Any) -> str | None:
        wrong = super().problem(value)
        return wrong if wrong or value % self.of == 0 else f"give a number from {self!r}"


@dataclass(frozen=True)
class Length:
    """Lists of ``low`` to ``high`` items."""

    low: int
    high: int

    def __repr__(self) -> str:
        return f"{self.low:,} to {self.high:,} items"

    def problem(self, value: Any) -> str | None:
        return None if self.low <= len(value) <= self.high else f"give {self!r}"


@dataclass(frozen=True)
class Text:
    """Texts of 1 to ``most`` characters that do not begin or end with a space."""

    most: int = LONGEST_TEXT

    def __repr__(self) -> str:
        return f"1 to {self.most:,} characters"

    def problem(self, value: Any) -> str | None:
        return None if value == value.strip() and 1 <= len(value) <= self.most else f"give {self!r}, no space around"


@dataclass(frozen=True)
class Distinct:
    """Lists in which nothing comes twice."""

    def __repr__(self) -> str:
        return "each once"

    def problem(self, value: Any) -> str | None:
        twice = next((one for i, one in enumerate(value) if one in value[:i]), None)
        return None if twice is None else f"{shown(twice)} comes twice; name each once"


@dataclass(frozen=True)
class Fields:
    """Mappings whose fields have the limits of ``limits``, by name; others may be anything."""

    limits: Mapping[str, Limit]

    def __repr__(self) -> str:
        return f"with limits for {', '.join(self.limits)}"

    def problem(self, value: Any) -> str | None:
        return None  # each field is looked at by itself, under its own name


@dataclass(frozen=True)
class Ascending:
    """Lists in ascending order, such as a (least, most) pair; ``strictly``: no two equal."""

    strictly: bool = False

    def __repr__(self) -> str:
        return "in ascending order" + (", each once" if self.strictly else "")

    def problem(self, value: Any) -> str | None:
        ordered = all(a < b if self.strictly else a <= b for a, b in pairwise(value))
        return None if ordered else f"give numbers {self!r}"


def check(config: Any, prefix: str = "", leave_out: tuple[type, ...] = ()) -> None:
    """Raises MetronomeError, naming field, value and range, for the first field of a dataclass (or of one within it)
    that is outside its range. ``prefix``: dotted name of the dataclass in the recipe, with its dot; ``leave_out``:
    fields with a limit of these types are not looked at."""
    for name, value, problem in problems(config, prefix, leave_out):
        raise MetronomeError(f"recipe: {name} is {shown(value)}: {problem}")


def problems(config: Any, prefix: str = "", leave_out: tuple[type, ...] = ()) -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted name, value, what is wrong) of each field outside its range."""
    kind: Any = type(config)
    for name, hint in hints_of(kind).items():
        yield from _problems(f"{prefix}{name}", getattr(config, name), hint, leave_out)


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, by name; nothing for another type."""
    if not is_dataclass(kind):
        return {}
    types_of = get_type_hints(kind, include_extras=True)
    return {field.name: types_of[field.name] for field in fields(kind)}


def _problems(name: str, value: Any, hint: Any, leave_out: tuple[type, ...]) -> Iterator[tuple[str, Any, str]]:
    limits = limits_of(hint)
    if value is None or any(isinstance(limit, leave_out) for limit in limits):
        return
    within = list(_within(name, value, hint, leave_out))
    if (isinstance(value, str) or not limits) and (wrong := _unlimited(value)):  # a number's range says it better
        within = [(name, value, wrong)]
    wrong = None if within else next((p for limit in limits if (p := limit.problem(value))), None)
    yield from within if wrong is None else [(name, value, wrong)]


def _within(name: str, value: Any, hint: Any, leave_out: tuple[type, ...]) -> Iterator[tuple[str, Any, str]]:
    """As `_problems`, of what a dataclass, mapping or list holds."""
    arguments = get_args(bare(hint)[0])
    if is_dataclass(value) and not isinstance(value, type):
        yield from problems(value, f"{name}.", leave_out)
    elif isinstance(value, Mapping):
        of = arguments[1] if len(arguments) == 2 else Any
        limits = next((limit.limits for limit in limits_of(hint) if isinstance(limit, Fields)), {})
        for key, one in value.items():
            yield from _problems(f"{name} (a key)", key, str, leave_out)
            yield from _problems(f"{name}.{key}", one, Annotated[of, limits.get(key)], leave_out)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        each = arguments if arguments and arguments[-1] is not ... and len(arguments) == len(value) else None
        for i, one in enumerate(value):
            of = each[i] if each else arguments[0] if arguments else Any
            yield from _problems(f"{name}[{i}]", one, of, leave_out)


def _unlimited(value: Any) -> str | None:
    """What is wrong with a plain value that has no range of its own."""
    if isinstance(value, float) and not math.isfinite(value):
        return "give a finite number"
    if isinstance(value, int) and not isinstance(value, bool) and not -INT64 - 1 <= value <= INT64:
        return "give a whole number of 64 bits"
    if isinstance(value, str) and (len(value) > LONGEST_TEXT or not all(c.isprintable() for c in value)):
        return f"give at most {LONGEST_TEXT:,} characters, none of which is a control character"
    return None


def bare(hint: Any) -> tuple[Any, bool]:
    """A field's type without `Annotated` and without None, and whether it may be None."""
    if get_origin(hint) is Annotated:
        return bare(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        inner = [one for one in get_args(hint) if one is not types.NoneType]
        may_be_null = len(inner) < len(get_args(hint))
        return (bare(inner[0])[0] if len(inner) == 1 else Union[tuple(inner)]), may_be_null  # noqa: UP007, made here
    return hint, False


def limits_of(hint: Any) -> list[Limit]:
    """What `Annotated` adds to a field's type, also to that of an optional field."""
    if get_origin(hint) is Annotated:
        return [*limits_of(get_args(hint)[0]), *(one for one in hint.__metadata__ if isinstance(one, Limit))]
    if get_origin(hint) in (Union, types.UnionType):
        return [limit for one in get_args(hint) for limit in limits_of(one)]
    return []


_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def described(hint: Any) -> str:
    """A field's type and limits in words: "a whole number, 0 to 10"."""
    kind, may_be_null = bare(hint)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        name = " or ".join(map(str, arguments))
    elif origin is tuple:
        each = arguments[:1] if arguments[-1] is ... else arguments
        name = "a list of " + " and ".join(f"({described(one)})" for one in each)
    elif len(arguments) == 2:
        name = f"a mapping to ({described(arguments[1])})"
    else:
        name = "a mapping of fields" if is_dataclass(kind) else _NAMES.get(kind, "a value")
    return ", ".join([name, *map(repr, limits_of(hint))]) + (", or null" if may_be_null else "")


def number(kind: type[int] | type[float], limit: Range) -> Callable[[str], float]:
    """For ``type=`` of an argparse option: reads a number of the kind, within the range."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or limit.problem(value):
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"{shown(text)}: give {whole} {'' if limit.open_low else 'from '}{limit!r}"
            )
        return value

    return read


def shown(value: Any) -> str:
    """A value in an error's one line: cut short, without control characters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}…"


Seed = Annotated[int, Range(0, 2**32 - 1)]
"""Of all randomness of a run; 32 bits, as NumPy's and torch's generators take."""
Steps = Annotated[int, Range(0, 10**7)]
"""Of an optimizer; 0 leaves a phase out."""
Every = Annotated[int, Range(1, 10**7)]
"""How often: of so many steps one, so never 0."""
Count = Annotated[int, Range(0, 10**6)]
"""How many of something; none is a choice."""
Some = Annotated[int, Range(1, 10**6)]
"""How many of something of which there must be one."""
Tokens = Annotated[int, Range(1, 2**20)]
Probability = Annotated[float, Range(0.0, 1.0)]
Fraction = Probability
TEMPERATURE = ZeroOr(1e-6, 1e6)
"""Temperatures that a policy may have: 0 is greedy, and fp32 divides logits by the others and stays finite."""
Temperature = Annotated[float, TEMPERATURE]
Words = Annotated[int, Range(1, 100)]
"""Of a micro-turn."""
MOST_PATCHES, MOST_EVENT_WORDS = 4096, 1000
Patches = Annotated[int, Range(0, MOST_PATCHES)]
"""Of a micro-turn's video."""
EventWords = Annotated[int, Range(0, MOST_EVENT_WORDS)]
"""Of a micro-turn's text events."""
FilePath = Annotated[str, Text()]
FilePaths = Annotated[tuple[FilePath, ...], Length(0, 100), Distinct()]
Names = Annotated[tuple[Annotated[str, Text(100)], ...], Length(1, 100), Distinct()]
Weight = Annotated[float, Range(0.0, 1e3)]
SomeChunks = Annotated[int, Range(1, 3000)]
"""Of 200 ms: ten minutes at most."""
Seconds = Annotated[float, Range(0.0, 60.0)]
Few = Annotated[int, Range(0, 100)]
"""How many of something that an episode holds a handful of, words or chunks; none is a choice."""
SecondsPair = Annotated[tuple[Seconds, Seconds], Ascending()]
FewPair = Annotated[tuple[Few, Few], Ascending()]
