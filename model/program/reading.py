"""Reads text, JSON, JSON lines and YAML from disk without trusting them. Every file that people or other programs may
have written is read here.

- Text is UTF-8, whatever the locale, with or without a byte-order mark; another encoding is named in the error.
- JSON is what the standard allows: no NaN, no number beyond 64 bits or fp64, no key twice, no lone surrogate. Lines of
  a JSON-lines file end with ``\\n`` and nothing else (U+2028 may stand inside a string).
- YAML has JSON's values and nothing that refers to itself. Words stay words: only ``true`` and ``false`` are truth
  values, and only ``null`` and ``~`` are null (YAML 1.2's core schema).
- Nothing is nested deeper than `DEEPEST`.

Errors are `UnreadableError`, one line each. Its ``problem`` is for callers who name the file in other words.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from kernels.errors import MetronomeError

DEEPEST = 64
"""Most levels of nesting."""
MOST_BYTES = 1 << 30
MOST_RECIPE_BYTES = 1 << 20
MOST_VALUES = 100_000
"""Most values of a YAML text."""
INT64 = 2**63

MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
"""First bytes of other encodings, the longer ones first."""

Kind = TypeVar("Kind")


class UnreadableError(MetronomeError):
    """A file, or a text from one, is not what it should be."""

    def __init__(self, where: str | Path, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if str(where) else problem)
        self.problem = problem  # the end of the sentence, such as "is missing"


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A regular file's content. Raises UnreadableError when it is missing, no file, larger than ``most`` bytes, or may
    not be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device would never end
            raise UnreadableError(path, "is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file")
        if status.st_size > most:
            raise UnreadableError(path, f"has {status.st_size:,} bytes; at most {most:,} are read")
        return path.read_bytes()
    except FileNotFoundError:
        raise UnreadableError(path, "is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnreadableError(path, f"cannot be read ({reason})") from None


def decode(data: bytes, where: str | Path = "") -> str:
    """UTF-8 as text, without a byte-order mark. Raises UnreadableError for another encoding, and names it where the
    bytes tell."""
    for mark, name in MARKS:
        if data.startswith(mark):
            raise UnreadableError(where, f"is {name}; save it as UTF-8 (iconv -f {name} -t UTF-8)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnreadableError(
            where, f"is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}; Latin-1?); save it as UTF-8"
        ) from None


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A file's text. Raises UnreadableError as `read_bytes` and `decode` do."""
    return decode(read_bytes(path, most), path)


def read_json(path: Path) -> Any:
    """A JSON file's value. Raises UnreadableError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), path)


def read_record(path: Path, kind: type[Kind]) -> Kind:
    """A JSON file as a value of the type ``kind`` (`as_record`)."""
    return as_record(read_text(path), kind, path)


def as_record(text: str, kind: type[Kind], where: str | Path = "") -> Kind:
    """JSON text as a value of the type ``kind``, a dataclass or what is made of them, lists, mappings and plain types;
    numbers in texts are not taken for numbers. Raises UnreadableError for the first field that is missing, unknown to a
    TypedDict, or of another type, and as `parse_json` does."""
    parse_json(text, where)
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise UnreadableError(where, f"{at or 'its content'}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, text) of each line that is not blank."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip():
            yield number, decode(line, f"{path}, line {number}").removesuffix("\r")


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (number of the line, value). Raises UnreadableError, naming the line, as `parse_json` does."""
    for number, line in read_lines(path):
        yield number, parse_json(line, f"{path}, line {number}")


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
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} comes twice")
    return content


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {_short(text)} is too large")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -INT64 <= int(text) < INT64:
        raise ValueError(f"the number {_short(text)} has more than 64 bits")
    return int(text)


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:21]}…"


def read_yaml(path: Path) -> Any:
    """A YAML file's value. Raises UnreadableError as `read_text` and `parse_yaml` do."""
    return parse_yaml(read_text(path, MOST_RECIPE_BYTES), path)


def parse_yaml(text: str, where: str | Path = "") -> Any:
    """A YAML text's value. Raises UnreadableError for what is no YAML by the module's rules."""
    try:
        value = yaml.load(text, _Loader)  # a subclass of the safe loader: nothing is executed
        _check_tree(value, MOST_VALUES)
    except RecursionError:
        raise UnreadableError(where, f"is nested deeper than {DEEPEST} levels, or refers to itself") from None
    except yaml.YAMLError as error:
        raise UnreadableError(where, f"is not YAML ({' '.join(str(error).split())})") from None
    except (ValueError, TypeError, AttributeError) as error:  # a date that does not exist, a list as a key
        raise UnreadableError(where, f"is not YAML that can be used: {' '.join(str(error).split())}") from None
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain words and numbers, and no key twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, an instance's by its base

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


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
_plain("merge", r"^<<$", "<")
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
    """Raises RecursionError for nesting beyond `DEEPEST`; ValueError for lone surrogates, and for more than ``most``
    values, each reference counted as what it refers to."""
    left, count = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        count += 1
        if depth > DEEPEST:
            raise RecursionError
        if count > most:
            raise ValueError(f"it has more than {most:,} values, those that references repeat included")
        if isinstance(one, str) and any("\ud800" <= c <= "\udfff" for c in one):
            raise ValueError("a text holds half of a surrogate pair, which is no character")
        if isinstance(one, Mapping):
            left += [(key, depth + 1) for key in one] + [(inner, depth + 1) for inner in one.values()]
        elif isinstance(one, list | tuple | set):
            left += [(inner, depth + 1) for inner in one]


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
