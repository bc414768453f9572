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
from itertools import pairwise
from typing import Annotated, Any, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

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
class Length:
    """Lists of ``low`` to ``high`` items."""

    low: int
    high: int

    def __repr__(self) -> str:
        return f"{self.low:,} to {self.high:,} items"

    def problem(self, value: Any) -> str | None:
        return None if self.low <= len(value) <= self.high else f"give {self!r}"


@dataclass(frozen=True)
class Ascending:
    """Lists in ascending order, such as a (least, most) pair; ``strictly``: no two equal."""

    strictly: bool = False

    def __repr__(self) -> str:
        return "in ascending order" + (", each once" if self.strictly else "")

    def problem(self, value: Any) -> str | None:
        ordered = all(a < b if self.strictly else a <= b for a, b in pairwise(value))
        return None if ordered else f"give numbers {self!r}"


def check(config: Any, prefix: str = "") -> None:
    """Raises MetronomeError, naming field, value and range, for the first field of a dataclass (or of one within it)
    that is outside its range. ``prefix``: dotted name of the dataclass in the recipe, with its dot."""
    for name, value, problem in problems(config, prefix):
        raise MetronomeError(f"recipe: {name} is {shown(value)}: {problem}")


def problems(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted name, value, what is wrong) of each field outside its range."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        yield from _problems(f"{prefix}{field.name}", getattr(config, field.name), hints[field.name])


def _problems(name: str, value: Any, hint: Any) -> Iterator[tuple[str, Any, str]]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        plain = list(_problems(name, value, arguments[0]))
        limits = [limit for limit in hint.__metadata__ if isinstance(limit, Limit)] if value is not None else []
        wrong = next((p for limit in limits if (p := limit.problem(value)) is not None), None)
        yield from plain if wrong is None else [(name, value, wrong)]
    elif origin in (Union, types.UnionType):
        if value is not None:
            inner = [one for one in arguments if one is not types.NoneType]
            yield from _problems(name, value, inner[0] if len(inner) == 1 else Any)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from problems(value, f"{name}.")
    elif isinstance(value, Mapping):
        of = arguments[1] if len(arguments) == 2 else Any
        for key, one in value.items():
            yield from _problems(f"{name} (a key)", key, str)
            yield from _problems(f"{name}.{key}", one, of)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        each = arguments if arguments and arguments[-1] is not ... and len(arguments) == len(value) else None
        for i, one in enumerate(value):
            yield from _problems(f"{name}[{i}]", one, each[i] if each else arguments[0] if arguments else Any)
    elif (wrong := _unlimited(value)) is not None:
        yield name, value, wrong


def _unlimited(value: Any) -> str | None:
    """What is wrong with a plain value that has no range of its own."""
    if isinstance(value, float) and not math.isfinite(value):
        return "give a finite number"
    if isinstance(value, int) and not isinstance(value, bool) and not -INT64 - 1 <= value <= INT64:
        return "give a whole number of 64 bits"
    if isinstance(value, str) and (len(value) > LONGEST_TEXT or not all(c.isprintable() for c in value)):
        return f"give at most {LONGEST_TEXT:,} characters, none of which is a control character"
    return None


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
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
