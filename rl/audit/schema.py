"""``python -m rl.audit.schema``: prints the JSON schema of report.json, made from the types in `rl.audit.document`.

`schema.json` beside this file is what it prints; a test holds the two equal. Only what those types use is understood.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.audit.schema")

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from model.program.arguments import Parser
from rl.audit.document import INLINE, Report
from rl.audit.finding import STATUSES

KINDS: tuple[Any, ...] = get_args(Report)
Schema = dict[str, Any]
PLAIN: dict[Any, Schema] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number"},
}


def schema() -> Schema:
    """The JSON schema (draft 2020-12) of every report."""
    defined: dict[str, Schema] = {}
    kinds = [_of(kind, defined) for kind in KINDS]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of `python -m rl.audit`, version 2",
        "description": "A field is never removed and never changes its meaning within a version; metronome.audit/3 "
        "would.",
        "$comment": "num_unequal and rows_unequal of 0 with verdict identical: nothing that was compared differs in a "
        "bit. not_comparable is another statement than different, and nothing_compared another than identical. With "
        f"--fail-on mismatch: {STATUSES}.",
        "oneOf": kinds,
        "$defs": defined,
    }


def _of(kind: Any, defined: dict[str, Schema]) -> Schema:
    """The schema of a type; records are added to ``defined`` and referred to. TypeError for a type not known here."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _of(arguments[0], defined) | {"description": arguments[1]}
    if origin is UnionType:
        return _or_null(_of(arguments[0], defined)) if arguments[1:] == (NoneType,) else _unknown(kind)
    if origin is Literal:
        return {"const": arguments[0]} if len(arguments) == 1 else {"enum": list(arguments)}
    if origin is Sequence:
        return {"type": "array", "items": _of(arguments[0], defined)}
    if origin is dict and arguments == (str, Any):
        return {"type": "object"}
    if origin is Mapping:
        names = {} if arguments[0] is str else {"propertyNames": _of(arguments[0], defined)}
        return {"type": "object", **names, "additionalProperties": _of(arguments[1], defined)}
    if is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in defined:
            defined[kind.__name__] = {}  # holds the place: users before what they use
            defined[kind.__name__] = _record(kind, defined)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return {"enum": [one.value for one in kind]}
    return dict(PLAIN[kind]) if kind in PLAIN else _unknown(kind)


def _record(kind: type, defined: dict[str, Schema]) -> Schema:
    properties = _properties(kind, defined)
    return {
        "description": " ".join((kind.__doc__ or "").split()),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _properties(kind: Any, defined: dict[str, Schema]) -> dict[str, Schema]:
    hints, out = get_type_hints(kind, include_extras=True), {}
    for one in fields(kind):
        hint = hints[one.name]
        out.update(_properties(hint, defined) if one.metadata == INLINE else {one.name: _of(hint, defined)})
    return out


def _or_null(of: Schema) -> Schema:
    return {"oneOf": [{"type": "null"}, of]} if "$ref" in of else of | {"type": [of["type"], "null"]}


def _unknown(kind: Any) -> Schema:
    raise TypeError(f"rl.audit.schema: no JSON schema is known for {kind}")


def text() -> str:
    """As it stands in schema.json."""
    return json.dumps(schema(), indent=2) + "\n"


def parser() -> Parser:
    return Parser("rl.audit.schema", "Prints the JSON schema of report.json.")


def main(arguments: list[str] | None = None) -> None:
    parser().parse_args(arguments)
    print(text(), end="")
