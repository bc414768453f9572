"""That no reader is missed: each module that imports a reading function of `model.program.reading` or
`model.weights.tensors` is tried in `tests.fuzz.test_readers`, and no other reads text, JSON, YAML or tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.test_readers import READERS

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "model", "rollout", "reward", "rl")

NOT_TRIED = {
    "model.program.recipe": "recipes have a fuzz test of their own; here it is tried through the audit",
    "model.program.files": "writes",
    "model.tokenizer": "reads a file of its own package",
    "rl.audit.page": "reads files of its own package",
    "rl.tracking.backends": "reads wandb's own file, in a thread that turns whatever is raised into a warning",
}

BY_ITSELF = {
    "model.program.reading": "the place",
    "model.weights.tensors": "the place for tensors",
    "kernels.gpu_report": "package kernels imports no other; it is tried here",
    "kernels.cpu.library": "/proc",
    "kernels.tools.bench_report": "/sys",
    "model.program.folders": "/proc",
    "model.program.memory": "/proc",
    "rl.environment": "/proc",
    "rollout.bench.workers": "/proc",
    "rollout.engines.workers.pool": "writes",
    "rollout.engines.vllm.worker": "what another process of this run has just written",
    "rollout.engines.vllm.policy": "what another process of this run has just written",
    "rollout.record.episode": "tensors from bytes: a file's or a worker's message",
    "rollout.scenarios.turn_taking": "what it has just dumped",
    "reward.train": "the saved recipe, compared as a whole",
}
"""Modules that read something by themselves, and why they may."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), ast.parse(path.read_text(encoding="utf-8"))


def reads_by_itself(tree: ast.AST) -> bool:
    """Whether a module calls what reads a file's text, JSON, YAML or tensors."""
    names = {"read_text", "read_bytes", "safe_load", "full_load", "load_all", "load_file", "safe_open", "genfromtxt"}
    own = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
           in ("model.program.reading", "model.weights.tensors") for alias in node.names}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in own:
                continue
            if called.split(".")[-1] in names or called in (
                "json.loads",
                "json.load",
                "yaml.load",
                "torch.load",
                "open",
            ):
                return True
            if called == "safetensors.torch.load":
                return True
    return False


def reading_functions(tree: ast.AST) -> set[str]:
    """What a module imports of the two places to read with."""
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("model.program.reading", "model.weights.tensors")
        for alias in node.names
    }
    whole = {
        "model.weights.tensors"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module == "model.weights"
        and "tensors" in [a.name for a in node.names]
    }
    return {n for n in imported if n.startswith(("read_", "parse_", "as_", "size_"))} | whole


def test_every_reader_is_tried() -> None:
    found = {name for name, tree in sources() if reading_functions(tree)}
    tried = {module for reader in READERS.values() for module in reader.modules}
    assert found - tried - NOT_TRIED.keys() == set(), "list them in READERS"
    assert tried.isdisjoint(NOT_TRIED) and "rl.run" in found


def test_nobody_reads_by_itself() -> None:
    assert {name for name, tree in sources() if reads_by_itself(tree)} - BY_ITSELF.keys() == set()


@pytest.mark.parametrize(
    "code",
    ["import json\njson.loads(x)", "path.read_text()", "yaml.safe_load(x)", "yaml.load(x, y)", "load_file(x)",
     "with open(x) as f: pass", "torch.load(x)", "from model.program.reading import read_json\np.read_bytes()"],
)  # fmt: skip
def test_control_one_that_reads_by_itself_is_seen(code: str) -> None:
    assert reads_by_itself(ast.parse(code))
    assert not reads_by_itself(ast.parse("from model.program.reading import read_text\nread_text(x)\njson.dumps(x)"))


def test_control_a_new_reader_is_seen() -> None:
    assert reading_functions(ast.parse("from model.program.reading import UnreadableError, read_record"))
    assert reading_functions(ast.parse("from model.weights import tensors"))
    assert not reading_functions(ast.parse("from model.program.reading import UnreadableError, to_json"))
