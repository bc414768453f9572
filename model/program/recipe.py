"""Recipes: typed frozen dataclasses, read from YAML and dotted overrides. Unknown keys and values out of range
(`model.program.ranges`) are errors.

The fields of one part of a recipe may depend on its content (`OpenConfig`): those of scenarios depend on their
families.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, get_type_hints

import jsonargparse

from kernels.errors import MetronomeError
from model.program import ranges, shipped
from model.program.reading import MOST_RECIPE_BYTES, UnreadableError, parse_yaml, read_text

jsonargparse.set_loader("yaml", parse_yaml, exceptions=(UnreadableError,))

Config = TypeVar("Config")


@dataclass(frozen=True)
class Recipe(Generic[Config]):
    """A recipe as read: the config, and what is saved with the run."""

    config: Config
    resume: bool  # whether --resume was given
    text: str  # the resolved recipe as YAML


class OpenConfig(ABC):
    """A part of a recipe whose fields depend on its content. The recipe's default value of the part decides them."""

    @abstractmethod
    def schema(self, content: Mapping[str, Any]) -> type[Any]:
        """The dataclass that the part is parsed as, its defaults taken from this instance. ``content``: what the recipe
        has in this part, not yet checked; dotted overrides are entries under their dotted names."""

    @classmethod
    @abstractmethod
    def from_schema(cls, read: Any) -> Self:
        """The part's config, made of an instance of the dataclass that `schema` returned."""


def read_recipe(
    command: str, description: str, kind: type[Config], arguments: list[str] | None = None, resumes: bool = False
) -> Recipe[Config]:
    """Parses the recipe of class ``kind`` from ``arguments`` (default: the command line). ``command`` ("rl.train") is
    its module's name for messages; ``resumes`` adds the option ``--resume``. ``--help`` prints every field. Raises
    MetronomeError, in one line, for an unknown key, a wrong type or a value out of its range."""
    parser = jsonargparse.ArgumentParser(prog=command, description=description, exit_on_error=False)
    help_text = f"recipe: a YAML file, or one that comes with the program ({', '.join(shipped.names())})"
    parser.add_argument("--config", action="config", help=help_text)
    if resumes:
        resume_help = "go on from the run's newest finished checkpoint"
        parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help=resume_help)
    spelled = [with_underscores(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    given = with_shipped(spelled)
    for _, value in (option for option in _options(given) if option[0] == "config"):
        parse_yaml(_file_or_text(value), "recipe" if "\n" in value else value)
    parts = _open_parts(kind)
    closed = _closed(kind, {name: p.schema(_content(given, name)) for name, p in parts.items()})
    parser.add_class_arguments(closed)
    try:
        parsed = parser.parse_args(given)
    except jsonargparse.ArgumentError as error:
        problem = " ".join(str(error).split()).rstrip(".")
        raise MetronomeError(
            f"recipe: {problem}. `python -m {command} --help` lists every field and its type"
        ) from error
    resume = bool(parsed.pop("resume")) if resumes else False
    parsed.pop("config")
    text = parser.dump(parsed, skip_unset=False)
    read = vars(parser.instantiate(parsed))
    ranges.check(closed(**read))
    return Recipe(kind(**read | {name: p.from_schema(read[name]) for name, p in parts.items()}), resume, text)


def _open_parts(kind: type[Any]) -> dict[str, OpenConfig]:
    """The default values of those fields of a recipe that are `OpenConfig`."""
    assert is_dataclass(kind)
    made = {f.name: f.default_factory() for f in fields(kind) if f.default_factory is not MISSING}
    return {name: value for name, value in made.items() if isinstance(value, OpenConfig)}


def _closed(kind: type[Any], schemas: dict[str, type[Any]]) -> type[Any]:
    """The recipe's dataclass, with the type of each open part replaced by its schema."""
    if not schemas:
        return kind
    types = get_type_hints(kind) | schemas
    defaults = {f.name: (f.default, schemas.get(f.name, f.default_factory)) for f in fields(kind)}
    members = [(name, types[name], field(default=d, default_factory=f)) for name, (d, f) in defaults.items()]
    return make_dataclass(kind.__name__, members, frozen=True, namespace={"__module__": kind.__module__})


def _content(arguments: Sequence[str], part: str) -> dict[str, Any]:
    """What recipe files and overrides have in a part. Skips what it cannot read: the parser reports it with context."""
    content: dict[str, Any] = {}
    for name, value in _options(arguments):
        try:
            if name == "config":
                content |= parse_yaml(_file_or_text(value))[part]
            elif name.startswith(f"{part}."):
                content[name.removeprefix(f"{part}.")] = parse_yaml(value)
        except (UnreadableError, KeyError, TypeError, ValueError):
            continue
    return content


def _file_or_text(value: str) -> str:
    """What ``--config`` gives the parser: the content of a file, or a recipe's text itself."""
    is_file = len(value) < ranges.LONGEST_TEXT and "\n" not in value and Path(value).is_file()
    return read_text(Path(value), MOST_RECIPE_BYTES) if is_file else value


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each option, given as ``--name=value`` or as two arguments."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            yield name, value if equals else following


def with_underscores(argument: str) -> str:
    """``--speech-dir=a-b`` -> ``--speech_dir=a-b``: both spellings of an option are accepted."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def with_shipped(given: list[str]) -> list[str]:
    """``--config quickstart`` -> ``--config /…/configs/quickstart.yaml``, where no file has that name."""
    out = list(given)
    for i, argument in enumerate(given):
        if argument.startswith("--config="):
            out[i] = f"--config={shipped.resolve(argument.removeprefix('--config='))}"
        elif i and given[i - 1] == "--config":
            out[i] = shipped.resolve(argument)
    return out


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted name, value): ``{"rl": {"steps": 20}}`` as ("rl.steps", 20)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
