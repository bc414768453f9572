"""Recipes: typed frozen dataclasses, read from YAML and dotted overrides (``--rl.steps 20``).

YAML is read by `model.program.reading`, types are checked by pydantic without conversions, and ranges by
`model.program.ranges`; unknown fields are errors. Recipes and overrides are merged in the order in which they are
given: mappings field by field, and of anything else the last one counts. On the command line a field of type str takes
what is given as it stands; every other field reads it as YAML.

The fields of one part of a recipe may depend on its content (`OpenConfig`): those of scenarios depend on their
families.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, make_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar, cast, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from kernels.errors import MetronomeError
from model.program import ranges, shipped
from model.program.folders import RunName
from model.program.outputs import OutputFile, OutputFolder, check_apart
from model.program.reading import DEEPEST, MOST_RECIPE_BYTES, UnreadableError, parse_yaml, read_text
from model.program.yaml_text import to_yaml

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
        """The dataclass that the part is read as, its defaults taken from this instance. ``content``: what the recipe
        has in this part, not yet checked."""

    @classmethod
    @abstractmethod
    def from_schema(cls, read: Any) -> Self:
        """The part's config, made of an instance of the dataclass that `schema` returned."""


class _NoRecipeError(Exception):
    """What was given is no recipe of the class; the message says what is wrong where."""


@dataclass(frozen=True)
class _Given:
    """The value of an option, before the type of its field is known."""

    text: str

    def as_yaml(self, name: str) -> Any:
        """Raises _NoRecipeError for what is no YAML."""
        try:
            return parse_yaml(self.text)
        except UnreadableError as error:
            raise _NoRecipeError(f"{name} is {ranges.shown(self.text)}: it {error.problem}") from None

    def as_text(self, name: str) -> str:
        """Raises _NoRecipeError where the command line's bytes were no UTF-8."""
        if any("\ud800" <= c <= "\udfff" for c in self.text):
            raise _NoRecipeError(f"{name} is {ranges.shown(self.text)}: it is not UTF-8")
        return self.text


def read_recipe(
    command: str,
    description: str,
    kind: type[Config],
    arguments: Sequence[str] | None = None,
    resumes: bool = False,
    past: bool = False,
) -> Recipe[Config]:
    """Reads the recipe of class ``kind`` from ``arguments`` (default: the command line). ``command`` ("rl.train") is
    its module's name for messages; ``resumes`` adds the option ``--resume``; ``past``: the recipe is of a finished run,
    so that its output paths are not tried and its name may be any. ``--help`` prints every field. Raises
    MetronomeError, in one line, for what is no recipe of the class."""
    given = sys.argv[1:] if arguments is None else arguments
    if "--help" in given or "-h" in given:
        print(_help(command, description, kind, resumes))
        sys.exit(0)
    parts = _open_parts(kind)
    try:
        tree, resume = _tree(given, resumes)
        of: Any = kind
        closed = _closed(of, tuple((name, _schema(name, part, tree)) for name, part in parts.items()))
        whole = _defaults(closed)
        _merge(whole, _resolved(tree, closed, ""))
        read = _instance(closed, whole)
    except _NoRecipeError as error:
        raise MetronomeError(f"recipe: {error}. `python -m {command} --help` lists every field and its type") from None
    ranges.check(read, leave_out=(OutputFile, OutputFolder, RunName) if past else ())
    if not past:
        check_apart(read, [shipped.resolve(value) for name, value in _options(given, resumes) if name == "config"])
    members = {f.name: getattr(read, f.name) for f in fields(read)}
    return Recipe(
        kind(**members | {name: part.from_schema(members[name]) for name, part in parts.items()}),
        resume,
        to_yaml(asdict(read)),
    )


def names_gpu(arguments: Sequence[str]) -> bool:
    """Whether recipes and options say ``placement.device: cuda``; no, too, where they cannot be read."""
    try:
        device = dict(flat(_tree(arguments, resumes=True)[0])).get("placement.device")
    except (_NoRecipeError, MetronomeError):
        return False
    return (device.text if isinstance(device, _Given) else device) == "cuda"


def _tree(arguments: Sequence[str], resumes: bool) -> tuple[dict[str, Any], bool]:
    """All recipes and options merged, and whether ``--resume`` was given."""
    tree: dict[str, Any] = {}
    resume = False
    for name, value in _options(arguments, resumes):
        if name == "config":
            _merge(tree, _recipe_of(value))
        elif name == "resume" and resumes:
            resume = _truth(name, value)
        else:
            _set(tree, name, value)
    return tree, resume


def _options(arguments: Sequence[str], resumes: bool) -> Iterator[tuple[str, str]]:
    """(name, value) of each option, given as ``--name=value`` or as two arguments; "-" in names is taken for "_".
    ``--resume`` alone is ``--resume true``."""
    left = list(arguments)[::-1]
    while left:
        argument = left.pop()
        if not argument.startswith("--"):
            raise _NoRecipeError(f"{ranges.shown(argument)} is no option; fields are given as --name value")
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            has_value = bool(left) and not left[-1].startswith("--")
            if not has_value and not (resumes and name == "resume"):
                raise _NoRecipeError(f"{ranges.shown(f'--{name}')} has no value")
            value = left.pop() if has_value else "true"
        yield name, value


def _truth(name: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise _NoRecipeError(f"{name} is {ranges.shown(value)}: give true or false, or --{name} alone")
    return value == "true"


def _recipe_of(given: str) -> dict[str, Any]:
    """What ``--config`` names: a file, a shipped recipe, or a recipe's text, which has more than one line or begins
    with a brace."""
    if "\n" in given or given.lstrip().startswith("{"):
        where, text = "recipe", given
    else:
        where = shipped.resolve(given) if len(given) < ranges.LONGEST_TEXT else given
        text = _text_of(given, Path(where))
    content = parse_yaml(text, where)
    if not isinstance(content, dict) and content is not None:
        raise UnreadableError(where, f"is no recipe: it must have fields (name: value), not {ranges.shown(content)}")
    return content or {}


def _text_of(given: str, path: Path) -> str:
    try:
        return read_text(path, MOST_RECIPE_BYTES)
    except UnreadableError as error:
        known = f"give a YAML file, or the name of a shipped recipe ({', '.join(shipped.names())})"
        raise _NoRecipeError(f"--config {ranges.shown(given)}: it {error.problem}; {known}") from None


def _merge(tree: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Puts the fields of ``new`` into ``tree``, those of mappings within it too."""
    for name, value in new.items():
        if isinstance(value, dict):
            inner = tree.get(name)
            tree[name] = inner if isinstance(inner, dict) else {}
            _merge(tree[name], value)
        else:
            tree[name] = value


def _set(tree: dict[str, Any], name: str, text: str) -> None:
    """Merges the option ``--name text``. A mapping is taken for one whatever the field's type is."""
    try:
        value = parse_yaml(text)
    except UnreadableError:
        value = None
    new: Any = value if isinstance(value, dict) else _Given(text)
    parts = name.split(".")
    if len(parts) > DEEPEST:
        raise _NoRecipeError(f"there is no field {ranges.shown(name)}")
    for part in reversed(parts):
        new = {part: new}
    _merge(tree, new)


def _schema(name: str, part: OpenConfig, tree: Mapping[str, Any]) -> type[Any]:
    """What `OpenConfig.schema` gives for the content of the part ``name``, every option's value read as YAML."""
    content = tree.get(name)
    content = content if isinstance(content, dict) else {}
    plain = {n: v.as_yaml(f"{name}.{n}") if isinstance(v, _Given) else v for n, v in content.items()}
    try:
        return part.schema(plain)
    except MetronomeError as error:
        error.args = (f"recipe: {name}: {error}",)  # of the same class: some are told apart by it
        raise


def _open_parts(kind: type[Any]) -> dict[str, OpenConfig]:
    """The default values of those fields of a recipe that are `OpenConfig`."""
    assert is_dataclass(kind)
    made = {f.name: f.default_factory() for f in fields(kind) if f.default_factory is not MISSING}
    return {name: value for name, value in made.items() if isinstance(value, OpenConfig)}


@lru_cache
def _closed(kind: Any, schemas: tuple[tuple[str, type[Any]], ...]) -> type[Any]:
    """The recipe's dataclass, with the type of each open part replaced by its schema."""
    if not schemas:
        return kind
    hints = ranges.hints_of(kind) | dict(schemas)
    defaults = {f.name: (f.default, dict(schemas).get(f.name, f.default_factory)) for f in fields(kind)}
    members = [(name, hints[name], field(default=d, default_factory=f)) for name, (d, f) in defaults.items()]
    return make_dataclass(kind.__name__, members, frozen=True, namespace={"__module__": kind.__module__})


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """The default values of a dataclass's fields, as mappings where they are dataclasses."""
    values = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(kind)
        if f.default is not MISSING or f.default_factory is not MISSING
    }
    return {n: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for n, v in values.items()}


def _resolved(value: Any, hint: Any, name: str) -> Any:
    """A value of the tree with each option's value read as its field's type wants it. Raises _NoRecipeError for a field
    that the dataclasses in ``hint`` do not have."""
    hint, may_be_null = ranges.bare(hint)
    if isinstance(value, _Given):
        is_text = hint is str or (get_origin(hint) is Literal and all(isinstance(one, str) for one in get_args(hint)))
        value = value.as_text(name) if is_text else value.as_yaml(name)
        if is_text and may_be_null and value == "null":
            value = None
    if isinstance(value, dict):
        known = ranges.hints_of(hint)
        if known and (unknown := [key for key in value if key not in known]):
            within = f"{name} has" if name else "there is"
            raise _NoRecipeError(f"{within} no field {ranges.shown(unknown[0])}; there are {', '.join(known)}")
        of = get_args(hint)[1] if len(get_args(hint)) == 2 else Any
        return {
            key: _resolved(inner, known[key] if known else of, f"{name}.{_safe(str(key))}".lstrip("."))
            for key, inner in value.items()
        }
    if isinstance(value, list):
        of = get_args(hint)[0] if get_args(hint) else Any
        return [_resolved(inner, of, f"{name}[{i}]") for i, inner in enumerate(value)]
    if value is not None and not isinstance(value, bool | int | float | str):
        raise _NoRecipeError(f"{name} is a {type(value).__name__}: give {ranges.described(hint)}")
    return value


def _safe(key: str) -> str:
    return key if key.isprintable() and len(key) < 60 else ranges.shown(key)


def _instance(kind: Any, tree: dict[str, Any]) -> Any:
    """The dataclass made of a resolved tree. Raises _NoRecipeError for the first field of another type."""
    try:
        return _adapter(kind).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "".join(f"[{at}]" if isinstance(at, int) else f".{_safe(at)}" for at in first["loc"]).lstrip(".")
        if first["type"] == "missing":
            is_item = isinstance(first["loc"][-1], int)
            remedy = "lists of it have a fixed length" if is_item else f"give --{name}, or write it into the recipe"
            raise _NoRecipeError(f"{name} is missing; {remedy}") from None
        is_ours = first["type"] == "value_error"  # a dataclass's own check
        problem = first["msg"] if is_ours else f"give {ranges.described(_type_at(kind, first['loc']))}"
        raise _NoRecipeError(f"{name} is {ranges.shown(first['input'])}: {' '.join(problem.split())}") from None


def _type_at(hint: Any, location: Sequence[str | int]) -> Any:
    """The type of the field at a place in a recipe's class."""
    for at in location:
        kind = ranges.bare(hint)[0]
        arguments = get_args(kind)
        if known := ranges.hints_of(kind):
            hint = known.get(str(at), Any)
        elif isinstance(at, int):
            hint = arguments[at if at < len(arguments) and arguments[-1] is not ... else 0] if arguments else Any
        else:
            hint = arguments[1] if len(arguments) == 2 else Any
    return hint


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _help(command: str, description: str, kind: Any, resumes: bool) -> str:
    recipes = f"a YAML file, or a recipe that comes with the program: {', '.join(shipped.names())}"
    closed = _closed(kind, tuple((name, part.schema({})) for name, part in _open_parts(kind).items()))
    lines = [
        f"usage: python -m {command} [--config RECIPE] [--FIELD VALUE] ...",
        f"\n{description}\n",
        f"  --config RECIPE  {recipes}",
        *(["  --resume  go on from the run's newest finished checkpoint"] if resumes else []),
        "\nFields, their types and defaults:\n",
        *_fields(closed, _defaults(closed), ""),
    ]
    return "\n".join(lines)


def _fields(kind: Any, defaults: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, hint in ranges.hints_of(kind).items():
        inner = ranges.bare(hint)[0]
        if is_dataclass(inner):  # one that may be left out is shown with its own defaults
            part = _defaults(cast(type[Any], inner)) if defaults.get(name, ...) is None else defaults[name]
            yield from _fields(inner, part, f"{prefix}{name}.")
        else:
            default = f"default {json.dumps(defaults[name])}" if name in defaults else "required"
            yield f"  --{prefix}{name}  {ranges.described(hint)}; {default}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted name, value): ``{"rl": {"steps": 20}}`` as ("rl.steps", 20)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
