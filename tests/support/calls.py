"""What the modules of our packages call, found in their texts."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "model", "rollout", "reward", "rl")

NO_FILES = ("self", "state", "engine")
"""Last names of what has a method ``open`` that opens no file; a class is none either."""


def sources() -> Iterable[tuple[str, ast.Module]]:
    """(dotted name, syntax tree) of each module."""
    return _sources().items()


@cache
def _sources() -> dict[str, ast.Module]:
    paths = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths]
    return {n: ast.parse(p.read_text(encoding="utf-8")) for n, p in zip(names, paths, strict=True)}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(name, call) of each call. Names are those of the module that something was imported from, so that
    ``np.load`` is ``numpy.load``, and ``load_file`` is ``safetensors.torch.load_file``."""
    origin: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origin |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            origin |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            yield origin.get(first, first) + dot + rest, node


def opens(name: str, call: ast.Call) -> str:
    """The mode in which a call opens a file, "r+" where it cannot be told; "" for a call that opens none."""
    if name == "os.open":
        return "r+"
    holder, _, last = name.rpartition(".")
    if last not in ("open", "fdopen"):
        return ""
    place = 1
    if holder not in ("", "io", "os"):  # a path's method
        of = holder.rpartition(".")[2]
        if of in NO_FILES or (of.isidentifier() and of[0].isupper() and not of.isupper()):
            return ""
        place = 0
    mode = next((word.value for word in call.keywords if word.arg == "mode"), None)
    if mode is None and len(call.args) > place:
        mode = call.args[place]
    if mode is None:
        return "r"
    return mode.value if isinstance(mode, ast.Constant) and isinstance(mode.value, str) else "r+"
