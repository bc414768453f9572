"""Reads text, JSON, JSON lines and YAML from disk without trusting them. Every file that people or other programs may
have written is read here.

- Text is UTF-8, whatever the locale, with or without a byte-order mark; another encoding is named in the error.
- JSON is what the standard allows: no NaN, no number beyond 64 bits or fp64, no key twice, no lone surrogate. Lines of
  a JSON-lines file end with ``\\n`` and nothing else (U+2028 may stand inside a string).
- YAML has JSON's values under keys that are texts, and nothing that refers to itself. Words stay words: only ``true``
  and ``false`` are truth values, only ``null`` and ``~`` are null, and ``<<`` is a key (YAML 1.2's core schema).
- Nothing is nested deeper than `DEEPEST`.

Errors are `UnreadableError`, one line each; ``problem`` is for callers who name the file in other words. Tensors are
read by `model.weights.tensors`.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from kernels.errors import MetronomeError
from model.program.ranges import INT64, problems, shown

DEEPEST = 64
"""Most levels of nesting."""
MOST_BYTES = 1 << 30
MOST_RECIPE_BYTES = 1 << 18
"""Of a YAML text: some hundred times as many as the longest recipe that is saved with a run."""
MOST_VALUES = 100_000
"""Most values of a YAML text."""

MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
"""First bytes of other encodings, the longer ones first."""
_SURROGATE = re.compile("[\ud800-\udfff]")

Kind = TypeVar("Kind")


class UnreadableError(MetronomeError):
    """A file, or a text from one, is not what it should be."""

    def __init__(self, where: str | Path, problem: str) -> None:
        super().__init__(one_line(f"{where}: {problem}" if str(where) else problem))
        self.problem = one_line(problem)  # the end of the sentence, such as "is missing"


def one_line(text: str) -> str:
    """A text that a file may have had a part in, for a terminal: what is not printable is written as escapes: control
    and format characters (U+202E turns a line around), lone surrogates, spaces other than U+0020."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size_of(path: Path) -> int:
    """Bytes of a regular file. Raises UnreadableError when it is missing or no regular file: a pipe or a device would
    never end."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UnreadableError(path, "is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise _refused(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(path, "is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file")
    return status.st_size


def _refused(path: Path, error: OSError | ValueError) -> UnreadableError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return UnreadableError(path, f"cannot be read ({reason})")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A regular file's content. Raises UnreadableError as `size_of` does, and when it is larger than ``most`` bytes or
    may not be read."""
    if (size := size_of(path)) > most:
        raise UnreadableError(path, f"has {size:,} bytes; at most {most:,} are read")
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(path, error) from None


def decode(data: bytes, where: str | Path = "") -> str:
    """UTF-8 as text, without a byte-order mark. Raises UnreadableError for another encoding, and names it where the
    bytes tell."""
    for mark, name in MARKS:
        if data.startswith(mark):
            raise UnreadableError(where, f"is {name}; save it as UTF-8 (iconv -f {name} -t UTF-8)")
    if b"\0" in data:
        raise UnreadableError(
            where, "holds null characters (UTF-16, or damaged by a crash?); a text in UTF-8 is needed"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + 1
        line = f" in line {at}" if b"\n" in data else ""
        problem = f"is not UTF-8 (byte 0x{data[error.start]:02x}{line}; Latin-1?); save it as UTF-8"
        raise UnreadableError(where, problem) from None


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A file's text. Raises UnreadableError as `read_bytes` and `decode` do."""
    return decode(read_bytes(path, most), path)


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises UnreadableError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), path)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's value, which must be an object. Raises UnreadableError as `read_json` and `as_object` do."""
    return as_object(read_json(path), path)


def as_object(value: Any, where: str | Path = "") -> dict[str, Any]:
    """A JSON value that must be an object. Raises UnreadableError for another."""
    if not isinstance(value, dict):
        raise UnreadableError(where, f"must be a JSON object, not {shown(value)}")
    return value


def read_record(path: Path, kind: type[Kind]) -> Kind:
    """A JSON file as a value of the type ``kind`` (`as_record`)."""
    return as_record(read_text(path), kind, path)


def as_record(text: str, kind: type[Kind], where: str | Path = "", ranges: bool = True) -> Kind:
    """JSON text as a value of the type ``kind``: a dataclass, or what is made of them, lists, mappings and plain
    types. Nothing is converted but whole numbers to floats and lists to tuples. With ``ranges``, those of a dataclass
    hold (`model.program.ranges`). Keys beyond those of ``kind`` are ignored. Raises UnreadableError for the first field
    that is missing, of another type or out of its range, and as `parse_json` does."""
    parse_json(text, where)
    try:
        value = _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        problem = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise UnreadableError(where, f"{_short(at, 80) or 'its content'}: {problem}") from None
    for name, inner, problem in problems(value) if ranges and is_dataclass(value) else ():
        raise UnreadableError(where, f"{_short(name, 80)} is {shown(inner)}: {problem}")
    return value


_adapter: Callable[[Any], TypeAdapter[Any]] = lru_cache(TypeAdapter)


def lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, bytes) of each line that is not blank. Lines end with ``\\n`` and nothing else."""
    return ((number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip())


def parse_line(line: bytes, where: str | Path) -> dict[str, Any]:
    """The object in a line of JSON. Raises UnreadableError as `decode`, `parse_json` and `as_object` do."""
    return as_object(parse_json(decode(line, where), where), where)


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number of the line, object). Raises UnreadableError, naming the line, as `read_bytes` and `parse_line`
    do."""
    for number, line in lines(read_bytes(path)):
        yield number, parse_line(line, f"{path}, line {number}")


def whole_lines(data: bytes) -> bytes:
    """What a crash left of a file of lines, without a last line that it cut short."""
    return data[: data.rfind(b"\n") + 1]


def parse_json(text: str, where: str | Path = "") -> Any:
    """A JSON text's value. Raises UnreadableError for what is no JSON by the module's rules."""
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite, parse_int=_int64
        )
        _check_tree(value)
    except RecursionError:
        raise UnreadableError(where, f"is nested deeper than {DEEPEST} levels") from None
    except json.JSONDecodeError as error:
        raise UnreadableError(where, f"is not JSON ({error.msg}, line {error.lineno}, column {error.colno})") from None
    except ValueError as error:
        raise UnreadableError(where, f"is not JSON that can be used: {error}") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(_twice([name for name, _ in pairs]))
    return content


def _twice(names: Sequence[str]) -> str:
    name = next(name for name, count in Counter(names).items() if count > 1)
    return f"the key {shown(name)} comes twice"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {_short(text)} is too large")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -INT64 - 1 <= int(text) <= INT64:
        raise ValueError(f"the number {_short(text)} has more than 64 bits")
    return int(text)


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}…"


def read_yaml(path: Path) -> Any:
    """A YAML file's value. Raises UnreadableError as `read_text` and `parse_yaml` do."""
    return parse_yaml(read_text(path, MOST_RECIPE_BYTES), path)


def parse_yaml(text: str, where: str | Path = "") -> Any:
    """A YAML text's value. Raises UnreadableError for what is no YAML by the module's rules, and for a text of more
    than `MOST_RECIPE_BYTES`."""
    if (size := len(text.encode(errors="surrogatepass"))) > MOST_RECIPE_BYTES:
        raise UnreadableError(where, f"has {size:,} bytes; at most {MOST_RECIPE_BYTES:,} are read")
    try:
        value = yaml.load(text, _Loader)  # a subclass of the safe loader: nothing is executed
        _check_tree(value, MOST_VALUES)
    except RecursionError:
        raise UnreadableError(where, f"is nested deeper than {DEEPEST} levels, or refers to itself") from None
    except yaml.YAMLError as error:
        raise UnreadableError(where, f"is not YAML ({_short(' '.join(str(error).split()), 400)})") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # a tag's text that is not of its type
        problem = _short(" ".join(str(error).split()), 400)
        raise UnreadableError(where, f"is not YAML that can be used: {problem}") from None
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain words and numbers, and no key twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, an instance's by its base

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            raise yaml.constructor.ConstructorError(None, None, _twice(names), node.start_mark)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Nothing: mappings that include others, each twice, would grow without limit."""


def _plain(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


_plain("bool", r"^(true|True|TRUE|false|False|FALSE)$", "tTfF")
_plain("int", r"^[-+]?[0-9]+$", "-+0123456789")
_plain(
    "float",
    r"^([-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
    "-+.0123456789",
)
_plain("null", r"^(null|Null|NULL|~|)$", "nN~\0")
_Loader.yaml_implicit_resolvers[""] = [("tag:yaml.org,2002:null", re.compile(r"^$"))]
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(_digits(node.value)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: _yaml_float(node.value))


def _digits(text: str) -> str:
    if len(text) > 4000:
        raise ValueError(f"the number {_short(text)} is too large")
    return text


def _yaml_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _check_tree(value: Any, most: float = math.inf) -> None:
    """Raises RecursionError for nesting beyond `DEEPEST`; ValueError for what JSON does not have, lone surrogates
    included, and for more than ``most`` values, each reference counted as what it refers to."""
    left, count = [(value, 1)], 0
    while left:
        one, depth = left.pop()
        count += 1
        if depth > DEEPEST and isinstance(one, dict | list):
            raise RecursionError
        if count > most:
            raise ValueError(f"it has more than {most:,} values, those that references repeat included")
        if isinstance(one, str):
            if _SURROGATE.search(one):
                raise ValueError("a text holds half of a surrogate pair, which is no character")
        elif isinstance(one, dict):
            if strange := [key for key in one if not isinstance(key, str)]:
                raise ValueError(f"the key {shown(strange[0])} is no text; put it in quotation marks")
            left += [(key, depth + 1) for key in one] + [(inner, depth + 1) for inner in one.values()]
        elif isinstance(one, list):
            left += [(inner, depth + 1) for inner in one]
        elif one is not None and not isinstance(one, bool | int | float):
            raise ValueError(f"it has a {type(one).__name__}, which is no value of JSON")


def to_json(value: Any, indent: int | None = 2) -> str:
    """A value as JSON text with a newline at its end. Raises UnreadableError for NaN and infinities, which JSON does
    not have: a result that is not finite is no result."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False) + "\n"
    except ValueError as error:
        name = next(iter(_not_finite(value, "")), "")
        raise UnreadableError("", f"a result is not finite ({name or error}); nothing was written") from None


def _not_finite(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name.lstrip('.')} is {value}"
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _not_finite(one, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from _not_finite(one, f"{name}[{i}]")
