"""That results are written whole and by one at a time: no module but `model.program.files` opens a file to write,
except those that say why, and each command that writes into a folder locks it."""

from __future__ import annotations

import ast

import pytest

from model.program.outputs import OutputFolder
from tests.support.calls import calls, opens, sources
from tests.test_commands import COMMANDS, outputs

PLACE = "model.program.files"

BY_ITSELF = {
    PLACE: "the place",
    "kernels.tools.compile_report": "in a temporary folder",
    "model.program.folders": "locks",
    "model.program.startup": "the launcher's file, of a process that is at its end",
    "model.tokenizer": "in a folder of `whole_folder`, or a temporary one",
    "model.weights.checkpoint": "in a folder of `whole_folder`",
    "reward.learned.calibrate": "a picture, in memory",
    "reward.learned.model": "in a folder of `whole_folder`",
    "reward.learned.preference": "in a folder of `whole_folder`",
    "reward.study.pictures": "a picture, in memory",
    "rollout.bench.pictures": "the same",
    "rl.learner.deepspeed": "in the folder of `RunFolder.checkpoint`",
    "rl.study.baseline": "a picture, in memory",
    "rollout.heard": "sound, in memory",
    "rollout.engines.vllm.core": "in a temporary folder",
    "rollout.engines.vllm.process": "shared memory",
    "rollout.engines.workers.pool": "shared memory",
}
"""Modules that write something by themselves, and why they may."""

WRITING = (
    *("json.dump", "pickle.dump", "torch.save", "soundfile.write", "numpy.save", "numpy.savez", "numpy.savetxt"),
    *("shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move"),
)
"""Functions that write files, in full."""
WRITING_LAST = (
    *("savefig", "imsave", "save_file", "save_model", "save_pretrained", "save_to_disk", "tofile"),
    *("to_csv", "to_parquet", "write_text", "write_bytes"),
)
"""Last names of others."""


def writes_by_itself(tree: ast.AST) -> bool:
    """Whether a module calls what writes a file."""
    for name, call in calls(tree):
        last = name.rpartition(".")[2]
        if last in ("write_text", "write_bytes") and len(call.args) + len(call.keywords) > 1 and not _encodes(call):
            continue  # a method of `rl.folder.RunFolder`
        if name in WRITING or last in WRITING_LAST or set("wax+") & set(opens(name, call)):
            return True
    return False


def _encodes(call: ast.Call) -> bool:
    return any(word.arg in ("encoding", "errors", "newline") for word in call.keywords)


def test_nobody_writes_by_itself() -> None:
    found = {name for name, tree in sources() if writes_by_itself(tree)}
    assert found == BY_ITSELF.keys(), "write through the place, or say why not; take away what no longer writes"


@pytest.mark.parametrize(
    "code",
    ["figure.savefig(x)", "from safetensors.torch import save_file\nsave_file(x, y)", "tables.save_to_disk(x)",
     "Path(x).write_text(y)", "path.write_text(y, encoding='utf-8')", "path.write_bytes(y)", "open(x, 'w')",
     "open(x, 'a')", "path.open('ab')", "path.open(mode='x')", "open(x, mode)", "os.open(x, os.O_WRONLY)",
     "import numpy as np\nnp.save(x, y)", "json.dump(x, y)", "torch.save(x, y)", "shutil.copy(x, y)"],
)  # fmt: skip
def test_control_one_that_writes_by_itself_is_seen(code: str) -> None:
    assert writes_by_itself(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["open(x)", "path.open('rb')", "write_json(path, x)", "folder.write_text(name, x)", "SpeechBank.open(x)"]
)
def test_control_others_do_not(code: str) -> None:
    assert not writes_by_itself(ast.parse(code))


# ---- one at a time ----

NO_LOCK = {"rl.minimal": "writes nothing"}
"""Commands whose recipe names a folder for results, that need no lock, and why."""


def locks(tree: ast.AST) -> bool:
    """Whether a module locks a folder: enters `locked` or `model.program.runs.sole_writer`."""
    entered = {ast.unparse(item.context_expr) for node in ast.walk(tree) if isinstance(node, ast.With)
               for item in node.items}  # fmt: skip
    names = ("model.program.folders.locked", "model.program.runs.sole_writer")
    for name, call in calls(tree):
        if name.endswith(".enter_context") and call.args:
            entered.add(ast.unparse(call.args[0]))
        if name in names and any(ast.unparse(call) in text for text in entered):
            return True
    return False


def writes_a_folder(command: str, tree: ast.AST) -> bool:
    """Whether a recipe's field or an option of a command is a folder for results."""
    option = any(name == "model.program.outputs.output_folder" for name, _ in calls(tree))
    return option or any(isinstance(kind, OutputFolder) for _, kind in outputs(command))


WRITERS = {name: tree for name, tree in sources() if name in COMMANDS and writes_a_folder(name, tree)}


def test_every_command_that_writes_a_folder_locks_it() -> None:
    assert WRITERS.keys() >= {"rl.train", "reward.train", "reward.pairs", "rl.audit.command", "rl.study.matrix"}
    assert {name for name, tree in WRITERS.items() if not locks(tree)} == NO_LOCK.keys()


def test_control_a_lock_is_seen() -> None:
    imported = "from model.program.folders import locked\n"
    assert locks(ast.parse(f"{imported}with locked(out): pass"))
    assert locks(ast.parse(f"{imported}with locked(out) if first else nullcontext(): pass"))
    assert locks(ast.parse(f"{imported}held.enter_context(locked(out))"))
    assert not locks(ast.parse(f"{imported}locked(out)")), "never entered"
    assert not locks(ast.parse("with locked(out): pass")), "another function of that name"
    assert not locks(ast.parse(f"{imported}with open(x): pass"))
