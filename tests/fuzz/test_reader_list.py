"""That no reader is missed: each module that imports a reading function of `model.program.reading` or
`model.weights.tensors` is listed in `tests.fuzz.readers`, and no other reads text, JSON, YAML or tensors."""

from __future__ import annotations

import ast

import pytest

from tests.fuzz.readers import READERS
from tests.support.calls import calls, opens, sources

NOT_TRIED = {
    "model.program.recipe": "recipes have a fuzz test of their own; here it is tried through the audit",
    "model.program.yaml_text": "reads what it is about to write",
    "model.weights.card": "reads the text of a run's recipe, which was read before",
    "rl.card": "the same",
    "model.sizing": "a config.json that `model.weights.checkpoint` has read before",
    "model.config": "the same",
    "reward.pairs": "reads the text of its own recipe, which was read before",
    "rl.audit.page": "reads files of its own package",
    "rl.tracking.backends": "reads wandb's own file, in a thread that turns whatever is raised into a warning",
}

BY_ITSELF = {
    "model.program.reading": "the place",
    "model.weights.tensors": "the place for tensors",
    "kernels.gpu_report": "the XML that pytest wrote for it; what is raised becomes one line",
    "kernels.cpu.library": "/proc",
    "kernels.tools.bench_report": "/sys",
    "model.program.files": "opens what it has written, for the disk to take it",
    "model.program.folders": "the name in a lock, which must match a pattern",
    "model.program.gpu": "/proc",
    "model.program.lifeline": "/proc",
    "model.program.outputs": "the first bytes of a manifest, which tell whose it is",
    "model.program.memory": "/proc",
    "model.tokenizer": "by the library that wrote it; what is raised becomes one line, and it is tried",
    "model.weights.manifest": "bytes of any file, for its digest",
    "model.weights.pickles": "a file's first bytes",
    "reward.learned.preference": "tables: by the library that wrote them",
    "reward.learned.resuming": "weights that a manifest was compared with before",
    "rl.environment": "/proc",
    "rollout.bench.workers": "/proc",
    "rollout.engines.workers.task": "messages between the learner and the workers that it has started",
    "rollout.engines.vllm.worker": "what another process of this run has just written",
    "rollout.engines.vllm.policy": "what another process of this run has just written",
    "rollout.record.episode": "tensors from bytes: a file's or a worker's message",
    "rollout.scenarios.turn_taking": "what it has just dumped",
    "rollout.world.recording": "sound, from bytes that the place has read; it is tried",
}
"""Modules that read something by themselves, and why they may."""


READING = (
    *("json.load", "json.loads", "yaml.load", "torch.load", "safetensors.torch.load", "pickle.load", "pickle.loads"),
    *("numpy.load", "numpy.fromfile", "numpy.loadtxt", "numpy.memmap", "csv.reader", "csv.DictReader"),
)
"""Functions that read what may be a file's content, in full."""
READING_LAST = (
    *("read_text", "read_bytes", "safe_load", "full_load", "load_all", "load_file", "safe_open", "genfromtxt"),
    *("load_from_disk", "load_dataset", "load_model", "from_pretrained"),
)
"""Last names of others."""
READING_LIBRARIES = ("xml.", "soundfile.", "tomllib.")
PLACES = ("model.program.reading", "model.weights.tensors")


def reads_by_itself(tree: ast.AST) -> bool:
    """Whether a module calls what reads a file's text, JSON, YAML, XML, sound, tables or tensors."""
    for name, call in calls(tree):
        if name.startswith(tuple(f"{place}." for place in PLACES)):
            continue
        if name in READING or name.rpartition(".")[2] in READING_LAST or {"r", "+"} & set(opens(name, call)):
            return True
        if name.startswith(READING_LIBRARIES) and name != "soundfile.write":
            return True
    return False


def reading_functions(tree: ast.AST) -> set[str]:
    """What a module imports of the two places to read with."""
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in PLACES
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
    assert found - tried == NOT_TRIED.keys(), "list a new one in READERS, and take away one that is tried or gone"
    assert "rl.resume" in found


def test_nobody_reads_by_itself() -> None:
    assert {name for name, tree in sources() if reads_by_itself(tree)} == BY_ITSELF.keys()


@pytest.mark.parametrize(
    "code",
    ["import json\njson.loads(x)", "path.read_text()", "yaml.safe_load(x)", "yaml.load(x, y)", "load_file(x)",
     "with open(x) as f: pass", "torch.load(x)", "from model.program.reading import read_json\np.read_bytes()",
     "from datasets import load_from_disk\nload_from_disk(x)", "safetensors.torch.load_model(m, x)",
     "import numpy as np\nnp.load(x)", "import soundfile as sf\nsf.read(x)", "from soundfile import SoundFile\n"
     "SoundFile(x)", "import xml.etree.ElementTree as tree\ntree.parse(x)", "os.open(x, os.O_RDONLY)", "x.open('r')",
     "path.open()", "path.open(encoding='utf-8')", "Path(x).open('rb')", "open(x, mode='r+b')", "open(x, mode)"],
)  # fmt: skip
def test_control_one_that_reads_by_itself_is_seen(code: str) -> None:
    assert reads_by_itself(ast.parse(code))


def test_control_others_do_not() -> None:
    assert not reads_by_itself(ast.parse("from model.program.reading import read_text\nread_text(x)\njson.dumps(x)"))
    assert not reads_by_itself(ast.parse("open(x, 'wb')\nx.open('a')\nSpeechBank.open(x)\nself.state.open()"))
    assert not reads_by_itself(ast.parse("import soundfile\nsoundfile.write(x, y, 16000)\nengine.open(key, 1.0)"))


def test_control_a_new_reader_is_seen() -> None:
    assert reading_functions(ast.parse("from model.program.reading import UnreadableError, read_record"))
    assert reading_functions(ast.parse("from model.weights import tensors"))
    assert not reading_functions(ast.parse("from model.program.reading import UnreadableError, to_json"))
