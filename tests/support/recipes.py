"""The recipe classes of all commands, found by what calls `read_recipe`, and their fields."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from model.program import ranges
from model.program.recipe import OpenConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "rollout", "reward", "rl")


def commands() -> dict[str, type[Any]]:
    """Recipe classes by the module that reads them."""
    found: dict[str, type[Any]] = {}
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "read_recipe":
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[module] = vars(import_module(module))[ast.unparse(node.args[2])]
    return found


def classes() -> list[type[Any]]:
    """The recipe classes, each once."""
    return list(dict.fromkeys(commands().values()))


def leaves(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of each field that is no dataclass itself; those of the shipped families included."""
    for field in fields(kind):
        hint = ranges.hints_of(kind)[field.name]
        inner = ranges.bare(hint)[0]
        if isinstance(inner, type) and issubclass(inner, OpenConfig):
            assert field.default_factory is not MISSING
            inner = field.default_factory().schema({})
        if is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint


def required(kind: Any) -> dict[str, str]:
    """Values for the fields of a recipe that have no default."""
    return {f.name: f"{f.name}.out" for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
