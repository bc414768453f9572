"""Every reader is fed hostile files: it works, or refuses in one line; nothing else is raised, and nothing hangs.

`tests.fuzz.test_reader_list` finds a reader that is not listed here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings

from kernels import gpu_report
from kernels.errors import MetronomeError
from model.program.files import write_json
from model.program.reading import parse_yaml
from model.weights import checkpoint, manifest
from reward.explain import families
from reward.learned.human import read_all_labels
from reward.learned.model import RewardModel
from rl import fingerprint
from rl.audit import records
from rl.audit.compare import compare_runs
from rl.audit.report import audit
from rl.config import OptimConfig
from rl.folder import RunFolder
from rl.learner.deepspeed import Learner
from rl.run import load_progress
from rl.tracking import tracker
from rl.train import parse
from rollout.record.episode import load_episodes, save_episodes
from rollout.scenarios.registry import ScenarioConfig
from rollout.show import as_json, look
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import DEFAULT_FOLDER, SpeechBank
from tests.fuzz.hostile import contents, refusal
from tests.support.episodes import some_episode
from tests.support.models import fresh_model

ROOT = Path(__file__).parents[2]


Read = Callable[[Path], object]
Make = Callable[[Path], None]


TRIES = {"config.yaml": 5}
"""Fewer, where one takes a second."""
WRITTEN_ANEW = ("manifest", "reward model", "head", "gpu report")
"""Readers whose tries write a file themselves, or that find nothing to be a report."""
MAY_BE_MISSING = ("index", "metrics", "families", "journal")


@dataclass(frozen=True)
class Reader:
    """One kind of file. ``read`` is given the folder that ``make`` filled, in which ``file`` is spoiled."""

    modules: tuple[str, ...]
    make: Make
    file: str
    form: str  # json, lines or safetensors
    read: Read
    tries: int = 25


# ---- good files ----


def a_model(folder: Path) -> None:
    checkpoint.save(fresh_model("nano"), folder / "m")
    write_json(folder / "m" / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model.safetensors"}})


def a_manifest(folder: Path) -> None:
    (folder / "step_000004").mkdir()
    (folder / "step_000004" / "progress.json").write_text("{}")
    manifest.write(folder / "step_000004", "step_000004", "seed: 0\n")


def forged(folder: Path) -> None:
    """Checks a manifest with a digest of its own that is right."""
    path = folder / "step_000004" / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
        path.write_text(json.dumps(content | {"digest": manifest._own_digest(content)}))
    except (ValueError, TypeError, RecursionError, AttributeError):
        pass
    manifest.check(folder / "step_000004", recipe="seed: 0\n")


def a_reward_model(folder: Path) -> None:
    RewardModel.build(fresh_model("nano"), ("timing", "content")).save(folder / "rm")


def reward_model(folder: Path) -> None:
    manifest.write(folder / "rm", "rm")
    RewardModel.load(folder / "rm")


def speech(folder: Path) -> None:
    lines = (DEFAULT_FOLDER / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    for line in lines:
        shutil.copy(DEFAULT_FOLDER / json.loads(line)["file"], folder)
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")


def labels(folder: Path) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, (2, 3 * CHUNK_SAMPLES)).astype(np.float32)
    for name, samples in zip("ab", sound, strict=True):
        soundfile.write(folder / f"{name}.wav", samples, 16000)
    said = [["listen"], ["speak", "four"], ["listen"]]
    one = {"id": "p", "family": "timespeak", "axis": "timing", "margin": 0.5, "annotator": "x"}
    sides = {"first": {"audio": "a.wav", "actions": said}, "second": {"audio": "b.wav", "actions": said[::-1]}}
    lines = [one | sides | {"preferred": "first", "split": split, "id": split} for split in ("train", "held_out")]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def a_run(folder: Path) -> None:
    """All files of a run but checkpoints, as it leaves them when bits differed."""
    run, counts = folder / "a", {f"mismatch/{name}": 0 for name in ("num_tokens", "num_unequal", "rows_unequal")}
    config = json.dumps(parse_yaml(parse(["--rl.steps", "5"])[2]))
    for name in ("a", "b"):
        one = RunFolder.create(folder, name, config)
        for step in range(3):
            one.append_metrics({"step": step, "weights_digest": "0f", "mismatch/k1": 0.5, **counts, "note": "x"})
    contract = {"backend": "cpu", "sizes": [1, 2]}
    one = RunFolder.reopen(folder, "a", config)
    one.write_json("environment.json", {"contract_id": "c0", "contract": contract, "processes": 2, "gpu": None})
    one.write_json("summary.json", {"weights_digest": "0f", "eval/held_out": 0.5})
    table = {"title": "t", "columns": ["a", "b"], "rows": [["x", 1], [2.5, None]], "note": "n"}
    found = {"mismatch": counts | {"mismatch/k1": 0.0}, "first": {"op": "norm", "rows": [1]}, "suspects": ["s"]}
    one.write_json("audit/difference.json", {"step": 3, **found, "tables": [table]})
    one.write_json("audit/matrix.json", {"tables": [table]})
    facts = ScenarioConfig().scenario("timespeak", "train", 0, SpeechBank.open()).user().facts().to_json()
    save_episodes(run / "episodes/step_000000.rank_0.safetensors", [replace(some_episode(), facts=facts)])


def shown(folder: Path) -> None:
    file = folder / "a/episodes/step_000000.rank_0.safetensors"
    for episode in load_episodes(file):
        json.dumps(as_json(look(episode, file)))


def compared(folder: Path) -> None:
    compare_runs(folder / "a", folder / "b", folder / "c")


def reopened(folder: Path) -> None:
    config = (folder / "b/config.yaml").read_text(encoding="utf-8")
    RunFolder.reopen(folder, "a", config).keep_metrics_before(2)


def progress(folder: Path) -> None:
    counts = dict.fromkeys(("num_tokens", "num_unequal", "rows_unequal", "k1_sum", "k3_sum", "max_abs"), 0)
    totals = {"before": {"score": {"": 0.5}, "proxy": {}}, "mismatch": counts, "wall_s": 1.5}
    scales = {"timing": {"total": 0.5, "weight": 1.0}}
    rest = {"step": 3, "reward_models": ["0f"], "processes": 1, "stopped": False, "scales": scales}
    write_json(folder / "progress.json", totals | rest)


def a_fingerprint(folder: Path) -> None:
    shutil.copy(ROOT / "tests/golden/fingerprint.json", folder / "f.json")


def a_journal(folder: Path) -> None:
    lines = [json.dumps({"step": step, "metrics": {"a": 0.5, "b": 1, "c": "x"}}) for step in range(3)]
    (folder / "j.jsonl").write_text("\n".join(lines) + "\n")


def a_report(folder: Path) -> None:
    machine = {"gpu": "x", "contract_id": "0f", "packages": {"torch": "2"}}
    findings = [{"part": "tests", "ok": True, "text": "1"}]
    (folder / "gpu.json").write_text(json.dumps({"machine": machine, "card": "", "findings": findings}))


def report(folder: Path) -> None:
    """Status 2 and one line stand for the error: package kernels has no other way."""
    written = StringIO()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(written):
            gpu_report.main([str(folder / "gpu.json")])
    except SystemExit as end:
        assert end.code == 2
        raise MetronomeError(written.getvalue().strip()) from None


class Learners:
    """One learner for all tries, as building one takes a second."""

    made: Learner | None = None

    @classmethod
    def make(cls, folder: Path) -> None:
        cls.made = cls.made or Learner(fresh_model("nano"), OptimConfig(), 1)
        cls.made.save(folder)

    @classmethod
    def read(cls, folder: Path) -> None:
        assert cls.made is not None
        cls.made.load(folder)


CHECKPOINT = ("model.weights.checkpoint", "model.weights.tensors")
RECORDS = ("rl.audit.records", "rl.audit.pictures", "rl.audit.episodes")
READERS = {
    "config": Reader(CHECKPOINT, a_model, "m/config.json", "json", lambda f: checkpoint.load(f / "m"), 40),
    "index": Reader(CHECKPOINT, a_model, "m/model.safetensors.index.json", "json", lambda f: checkpoint.load(f / "m")),
    "weights": Reader(CHECKPOINT, a_model, "m/model.safetensors", "safetensors", lambda f: checkpoint.load(f / "m")),
    "manifest": Reader(("model.weights.manifest",), a_manifest, "step_000004/manifest.json", "json", forged),
    "reward model": Reader(("reward.learned.model",), a_reward_model, "rm/reward.json", "json", reward_model),
    "head": Reader(("reward.learned.model",), a_reward_model, "rm/head.safetensors", "safetensors", reward_model),
    "speech": Reader(("rollout.world.speech",), speech, "manifest.jsonl", "lines", SpeechBank.open, 60),
    "labels": Reader(
        ("reward.learned.human",), labels, "labels.jsonl", "lines",
        lambda f: read_all_labels([f / "labels.jsonl"], Vocabulary.build(256), 1, ScenarioConfig()), 60,
    ),
    "metrics": Reader(("rl.folder",), a_run, "a/metrics.jsonl", "lines", reopened, 60),
    "a saved recipe": Reader(("rl.folder",), a_run, "a/config.yaml", "json", reopened),
    "progress": Reader(("rl.run",), progress, "progress.json", "json", load_progress, 60),
    "learner": Reader(("rl.learner.deepspeed",), Learners.make, "learner/state.json", "json", Learners.read),
    "optimizer": Reader(
        ("rl.learner.deepspeed",), Learners.make, "learner/optimizer.safetensors", "safetensors", Learners.read
    ),
    "episodes": Reader(
        ("rollout.record.episode", "rollout.scenarios.registry", "reward.score"), a_run,
        "a/episodes/step_000000.rank_0.safetensors", "safetensors", shown, 60,
    ),
    "families": Reader(("reward.explain",), a_run, "a/config.yaml", "json", lambda f: families(f / "a"), 5),
    "fingerprint": Reader(
        ("rl.fingerprint",), a_fingerprint, "f.json", "json", lambda f: fingerprint._read(f / "f.json")
    ),
    "journal": Reader(
        ("rl.tracking.tracker",), a_journal, "j.jsonl", "lines", lambda f: tracker._earlier(f / "j.jsonl"), 60
    ),
    "gpu report": Reader((), a_report, "gpu.json", "json", report, 60),
    **{
        f"audit of {file}": Reader(RECORDS, a_run, f"a/{file}", form, lambda f: audit(f / "a", 0), TRIES.get(file, 25))
        for file, form in (
            ("config.yaml", "json"), ("environment.json", "json"), ("summary.json", "json"), ("metrics.jsonl", "lines"),
            ("audit/difference.json", "json"), ("audit/matrix.json", "json"),
            ("episodes/step_000000.rank_0.safetensors", "safetensors"),
        )
    },
    **{
        f"comparison of {file}": Reader(RECORDS, a_run, f"a/{file}", form, compared, 20)
        for file, form in (("environment.json", "json"), ("metrics.jsonl", "lines"), ("summary.json", "json"))
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Make], Path]:
    """The folder that a function fills; each is called once."""
    return cache(lambda make: _made(make, tmp_path_factory.mktemp("made")))


def _made(make: Make, folder: Path) -> Path:
    make(folder)
    return folder


@pytest.fixture
def filled(made: Callable[[Make], Path], name: str, tmp_path: Path) -> Path:
    """A copy of the folder of the reader ``name``."""
    return shutil.copytree(made(READERS[name].make), tmp_path, dirs_exist_ok=True)


@pytest.mark.usefixtures("world", "filled")
@pytest.mark.parametrize("name", READERS)
def test_it_works_or_refuses_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = READERS[name]
    if reader.modules == RECORDS and "config" not in name:  # most of an audit's time here is the recipe's parser
        config = records._config(tmp_path / "a/config.yaml", [])
        assert config is not None
        monkeypatch.setattr(records, "_config", lambda path, gaps: config)
    path = tmp_path / reader.file
    good = path.read_bytes()
    assert refusal(lambda: reader.read(tmp_path)) is None, "the control: the good file is read"
    refused = []

    @settings(
        max_examples=reader.tries, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck
    )
    @given(contents(good, reader.form))
    def spoil(content: bytes) -> None:
        path.write_bytes(content)
        refused.append(refusal(lambda: reader.read(tmp_path)) is not None)

    spoil()
    path.write_bytes(good)
    assert refusal(lambda: reader.read(tmp_path)) is None, "the tries left nothing behind"
    if not name.startswith(("audit", "comparison")):  # there, what cannot be read is a gap
        assert any(refused)


@pytest.mark.usefixtures("world", "filled")
@pytest.mark.parametrize("name", [name for name in READERS if name not in WRITTEN_ANEW])
def test_what_is_no_file(name: str, tmp_path: Path) -> None:
    """A folder, a pipe, a device and nothing in the file's place."""
    reader = READERS[name]
    path = tmp_path / reader.file
    for put in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: None):
        path.rmdir() if path.is_dir() else path.unlink()
        put()
        text = refusal(lambda: reader.read(tmp_path))
        assert text is not None or name in MAY_BE_MISSING or name.startswith(("audit", "comparison"))


def test_control_a_fault_is_seen() -> None:
    """A reader that raises something else, or says it in two lines, is not taken for one that refuses."""

    def fails(error: Exception) -> None:
        raise error

    with pytest.raises(KeyError):
        refusal(lambda: fails(KeyError("a")))
    with pytest.raises(AssertionError):
        refusal(lambda: fails(MetronomeError("a\nb")))
    assert refusal(lambda: fails(MetronomeError("a"))) == "a" and refusal(lambda: None) is None
