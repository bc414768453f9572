"""Every reader of files, with a good file to spoil: for `tests.fuzz.test_readers`.

`tests.fuzz.test_reader_list` finds a reader that is not listed here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import soundfile

from kernels import gpu_report
from model.add_tokens import add_tokens
from model.program.files import write_json
from model.program.reading import parse_yaml, to_json
from model.program.runs import RESUMED
from model.weights import checkpoint, manifest
from reward.learned import origin, resuming
from reward.learned.human import read_all_labels
from reward.learned.model import RewardModel
from rl import fingerprint
from rl.audit.compare import compare_runs
from rl.audit.report import audit
from rl.config import OptimConfig
from rl.folder import Note, RunFolder, notes
from rl.learner.deepspeed import Learner
from rl.push import final_card
from rl.resume import load_progress
from rl.tracking import tracker
from rl.train import parse
from rollout.record.episode import load_episodes, save_episodes
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.stored import stored_world
from rollout.show import as_json, look
from rollout.turn.action import CHUNK_SAMPLES
from rollout.turn.vocabulary import Vocabulary
from rollout.world.recording import read_recording
from rollout.world.speech import DEFAULT_FOLDER, SpeechBank
from tests.support.episodes import some_episode
from tests.support.models import fresh_model

ROOT = Path(__file__).parents[2]


Read = Callable[[Path], object]
Make = Callable[[Path], None]


TRIES = {"config.yaml": 5}
"""Fewer, where one takes a second."""


@dataclass(frozen=True)
class Reader:
    """One kind of file. ``read`` is given the folder that ``make`` filled, in which ``file`` is spoiled."""

    modules: tuple[str, ...]
    make: Make
    file: str
    form: str  # json, lines, safetensors or bytes
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
    sound = np.random.default_rng(0).normal(0, 0.1, (4, 3 * CHUNK_SAMPLES)).astype(np.float32)
    for name, samples in zip("abcd", sound, strict=True):
        soundfile.write(folder / f"{name}.wav", samples, 16000)
    said = [["listen"], ["speak", "four"], ["listen"]]
    one = {"id": "p", "family": "timespeak", "axis": "timing", "margin": 0.5, "annotator": "x"}
    lines = [
        one
        | {"preferred": "first", "split": split, "id": split}
        | {"first": {"audio": first, "actions": said}, "second": {"audio": second, "actions": said[::-1]}}
        for split, first, second in (("train", "a.wav", "b.wav"), ("held_out", "c.wav", "d.wav"))
    ]
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
    one = RunFolder.reopen(folder, "a")
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
    RunFolder.reopen(folder, "a").keep_before(2)


def a_finished_run(folder: Path) -> None:
    a_run(folder)
    at = folder / "a/checkpoints/step_000003"
    at.mkdir(parents=True)
    progress(at)


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
    with redirect_stdout(StringIO()):
        gpu_report.main([str(folder / "gpu.json")])


def a_pairs_origin(folder: Path) -> None:
    (folder / "pairs").mkdir()
    held = origin.PairsOrigin("0f" * 16, {"train": 2, "held_out": 1}, "0a" * 16, "0b" * 16, ("0c" * 16,))
    origin.write_pairs_origin(folder / "pairs", "pairs", held)


def pairs_origin(folder: Path) -> None:
    manifest.write(folder / "pairs", "pairs")
    origin.read_pairs_origin(folder / "pairs")


def a_training(folder: Path) -> None:
    """What a finished run of `reward.train` has but its checkpoints' tensors."""
    began = origin.TrainingOrigin({"seed": 0, "trainer.max_steps": 2}, "0f" * 16, "0a" * 16, 1, "c0")
    write_json(folder / origin.TRAINING, asdict(began))
    write_json(folder / resuming.STATE, {"global_step": 2, "max_steps": 4, "log_history": [{"loss": 0.5}]})
    resuming.Progress(1.5).write(folder)
    model = RewardModel.build(fresh_model("nano"), ("timing", "content"))
    model.save(folder / resuming.MODEL)
    digest = checkpoint.weights_digest(model)
    write_json(folder / resuming.SUMMARY, {"weights_digest": digest, "steps": 2, "loss": 0.5})


def some_notes(folder: Path) -> None:
    lines = [Note(n, {"rl.steps": (4, 5 + n)}, ("seed: 0\n",), {"steps": 4} if n else None) for n in (2, 0)]
    (folder / RESUMED).write_text("".join(to_json(asdict(one), None) for one in lines))


def a_recording(folder: Path) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, 1600).clip(-1, 1)
    soundfile.write(folder / "a.wav", sound.astype(np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "a.flac", sound, 16000)


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
    "tokenizer": Reader(
        ("model.tokenizer",), a_model, "m/tokenizer.json", "json", lambda f: checkpoint.load(f / "m"), 60
    ),
    "tokenizer's settings": Reader(
        ("model.tokenizer",), a_model, "m/tokenizer_config.json", "json", lambda f: checkpoint.load(f / "m"), 60
    ),
    "tokens to add": Reader(
        ("model.add_tokens",), a_model, "m/config.json", "json", lambda f: add_tokens(f / "m"), 40
    ),
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
    "a saved recipe": Reader(("rl.folder",), a_run, "a/config.yaml", "json", reopened, 150),
    "progress": Reader(("rl.resume",), progress, "progress.json", "json", load_progress, 60),
    "learner": Reader(("rl.learner.deepspeed",), Learners.make, "learner/state.json", "json", Learners.read),
    "optimizer": Reader(
        ("rl.learner.deepspeed",), Learners.make, "learner/optimizer.safetensors", "safetensors", Learners.read
    ),
    "episodes": Reader(
        ("rollout.record.episode", "rollout.scenarios.registry", "reward.score"), a_run,
        "a/episodes/step_000000.rank_0.safetensors", "safetensors", shown, 60,
    ),
    "families": Reader(
        ("rollout.scenarios.stored",), a_run, "a/config.yaml", "json", lambda f: stored_world(f / "a"), 5
    ),
    "fingerprint": Reader(
        ("rl.fingerprint",), a_fingerprint, "f.json", "json", lambda f: fingerprint._read(f / "f.json")
    ),
    "journal": Reader(
        ("rl.tracking.tracker",), a_journal, "j.jsonl", "lines", lambda f: tracker._earlier(f / "j.jsonl"), 60
    ),
    "gpu report": Reader(("kernels.gpu_report",), a_report, "gpu.json", "json", report, 60),
    "origin of pairs": Reader(("reward.learned.origin",), a_pairs_origin, "pairs/pairs.json", "json", pairs_origin),
    "origin of a reward training": Reader(
        ("reward.learned.origin",), a_training, origin.TRAINING, "json", origin.read_training_origin
    ),
    "state of a reward training": Reader(
        ("reward.learned.resuming",), a_training, resuming.STATE, "json", resuming.steps_at_end
    ),
    "progress of a reward training": Reader(
        ("reward.learned.resuming",), a_training, resuming.PROGRESS, "json", lambda f: resuming.Progress().read(f)
    ),
    "end of a reward training": Reader(
        ("reward.learned.resuming",), a_training, resuming.SUMMARY, "json", resuming.finished
    ),
    "a card's summary": Reader(
        ("rl.push",), a_finished_run, "a/summary.json", "json", lambda f: final_card(RunFolder.reopen(f, "a"), 3)
    ),
    "notes": Reader(("rl.folder",), some_notes, RESUMED, "lines", notes),
    "wav": Reader(
        ("rollout.world.recording",), a_recording, "a.wav", "bytes", lambda f: read_recording(f, "a.wav", 10), 100
    ),
    "flac": Reader(
        ("rollout.world.recording",), a_recording, "a.flac", "bytes", lambda f: read_recording(f, "a.flac", 10), 100
    ),
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
