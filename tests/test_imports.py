"""Imports form no cycle, those inside functions included; what may be imported late is listed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "model", "rollout", "reward", "rl")
ALLOWED = (
    "vllm",
    "triton",
    "transformers",
    "trl",
    "accelerate",
    "wandb",
    "tensorboard",
    "trackio",
    "matplotlib",
    "rich",
)
"""Packages of others that a function may import: optional, slow to load, or only importable once the program is set up.
Everything else is imported at a module's head."""

Graph = dict[str, set[str]]
"""Module -> the modules that it imports anywhere in its text."""


def sources() -> dict[str, str]:
    """Text of every module by its dotted name. Package markers are empty and left out."""
    paths = (p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if p.name != "__init__.py")
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in paths}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that may be modules: ``from a import b`` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(texts: dict[str, str]) -> Graph:
    return {name: {x for x in imported(ast.parse(text)) if x in texts} for name, text in texts.items()}


def cycle(imports: Graph) -> list[str]:
    """The modules of one cycle in order, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(imports[name]):
            if closed := visit(other, [*path, name]):
                return closed
        done.add(name)
        return []

    return next((closed for name in imports if (closed := visit(name, []))), [])


def late(text: str) -> set[str]:
    """Top-level packages of others, without the standard library, that functions of this module import."""
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    tops = {name.partition(".")[0] for function in functions for name in imported(function)}
    return tops - set(PACKAGES) - sys.stdlib_module_names


def test_no_cycle() -> None:
    assert cycle(graph(sources())) == []


def test_late_imports_are_listed() -> None:
    unlisted = {name: tops for name, text in sources().items() if (tops := late(text) - set(ALLOWED))}
    assert unlisted == {}


@pytest.mark.parametrize(
    "closing",
    ["import p.a", "from p import a", "from p.a import x", "def f():\n    import p.a", "if True:\n    import p.a"],
)
def test_control_a_cycle_is_seen(closing: str) -> None:
    texts = {"p.a": "import p.b", "p.b": "from p import c\nimport p.d", "p.c": closing, "p.d": ""}
    assert cycle(graph(texts)) == ["p.a", "p.b", "p.c"]
    assert cycle(graph(texts | {"p.c": "import p.d"})) == []


def test_control_a_late_import_is_seen() -> None:
    assert late("import yaml\ndef f():\n    import os\n    import torch.nn\n    from kernels import ops") == {"torch"}
