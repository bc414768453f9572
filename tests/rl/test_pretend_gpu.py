"""Whole commands with their tensors on a device of their own (`tests.support.pretend`): the CPU's bits, and what breaks
them is found and named. All in one process but the CPU's side, since a process has one such device and one world."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch.utils import backend_registration

from kernels import dispatch
from kernels.errors import MetronomeError
from model.program import gpu
from rl import bestofn
from rl.audit import command
from rl.fingerprint import compared
from rl.run import Run
from rl.train import parse
from rollout.record.episode import load_episodes, pack_episodes
from tests.rl.resuming import arguments, digests, go
from tests.support.models import reward_model
from tests.support.settings import ROOT, VOICE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch cannot make a device of Python: it lacks _setup_privateuseone_for_python_backend",
    ),
]

HALF = {"model.dtype": "bfloat16", "rl.reference_weight": 0.1, "rl.steps": 1}
"""Beside the tiny recipe: masters of the weights, and a reference policy."""

CUT = """
import shutil
from pathlib import Path
from tests.rl.resuming import cut
runs = Path({runs!r})
shutil.copytree(runs / "gpu", runs / "cut")
cut(runs / "cut", 1)
"""
LEFT_BEHIND = """
from dataclasses import replace
from model.backbone.transformer import InteractionModel
place = InteractionModel.place
def all_but_tokens(self, inputs, state, *more):
    placed = place(self, inputs, state, *more)
    return replace(placed, tokens=inputs.tokens)
InteractionModel.place = all_but_tokens
"""


def pretend(commands: Mapping[str, list[str]], folder: Path) -> dict[str, tuple[int, str]]:
    """Each command's exit status and output, run one after another on the pretend device."""
    given = [word for words in commands.values() for word in ("+", *words)][1:]
    env = {name: value for name, value in os.environ.items() if not name.startswith("METRONOME_")}
    env |= {"PYTHONPATH": f"{ROOT}:{folder}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.pretend.run", *given],
        cwd=ROOT, env=env, text=True, timeout=900, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    *parts, rest = re.split(r"^exit status (\d+)\n", done.stdout, flags=re.MULTILINE)
    found = dict(zip(commands, zip(map(int, parts[1::2]), parts[::2], strict=True), strict=False))
    assert len(found) == len(commands) and not rest, done.stdout[-4000:]
    return found


@pytest.fixture(scope="module")
def thread(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """The folder of runs, and what each command said."""
    runs = tmp_path_factory.mktemp("pretend")
    (runs / "cut_in_two.py").write_text(CUT.format(runs=str(runs)))
    (runs / "out").mkdir()
    (runs / "left_behind.py").write_text(LEFT_BEHIND)

    def recipe(name: str, **changed: object) -> list[str]:
        return arguments(runs, name, placement__device="cuda", **changed)

    reward_model(seed=1).save(runs / "judge")
    one_step = {"rl.steps": 1, "rl.checkpoint_every": 1}
    audit = ["rl.audit.command", "--fail-on", "mismatch", "--run"]
    commands = {
        "train": ["rl.train", *recipe("gpu")],
        "minimal": ["rl.minimal", *recipe("minimal")],
        "half": ["rl.train", *recipe("half", **HALF)],
        "resume": ["--patch", "cut_in_two", "rl.train", *recipe("cut"), "--resume"],
        "audit": [*audit, str(runs / "gpu")],
        "stages": ["rl.fingerprint", "--device", "cuda", "--json", str(runs / "stages.json")],
        "studies": [
            "tests.support.pretend.studies",
            str(runs / "gpu/checkpoints/step_000003/model"),
            str(runs / "out"),
        ],
        "best of n": ["rl.bestofn", *best_of_n(runs, "gpu.json"), "--placement.device", "cuda"],
        "workers": ["rl.train", "--config", str(ROOT / "configs/quickstart_workers.yaml"), *recipe("workers")],
        "audit, spoilt": ["--spoil", "linear", *audit, str(runs / "cut")],
        "learner, spoilt": ["--spoil", "linear:learner", "rl.train", *recipe("learner", **one_step)],
        "sampler, spoilt": ["--spoil", "attention:sampler", "rl.train", *recipe("sampler", **one_step)],
        "both, spoilt": ["--spoil", "swiglu", "rl.train", *recipe("both", **one_step)],
        "voice": ["rl.train", *VOICE, "--runs", str(runs), "--name", "voice", "--placement.device", "cuda"],
        "left behind": ["--patch", "left_behind", "rl.train", *recipe("behind", **one_step)],
    }
    return runs, pretend(commands, runs)


Thread = tuple[Path, dict[str, tuple[int, str]]]


def best_of_n(runs: Path, json: str) -> list[str]:
    given = {"run": runs / "gpu", "models": f"[{runs / 'judge'}]", "json": runs / json, "scenarios": 1, "samples": 2}
    return [f"--{name}={value}" for name, value in given.items()]


def digest(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["weights_digest"])


def episodes(folder: Path) -> dict[str, bytes]:
    """The saved episodes without what says where they were computed."""
    files = sorted((folder / "episodes").iterdir())
    return {f.name: pack_episodes([replace(e, contract_id="") for e in load_episodes(f)]) for f in files}


def test_training_ends_with_the_cpus_weights(thread: Thread, whole: Path) -> None:
    runs, said = thread
    assert said["train"][0] == 0, said["train"][1][-3000:]
    assert digests(runs / "gpu") == digests(whole) and len(digests(whole)) == 3
    assert digest(runs / "gpu") == digest(whole)
    assert episodes(runs / "gpu") == episodes(whole) and len(episodes(whole)) == 3
    audit = json.loads((runs / "gpu/audit/report.json").read_text())
    assert audit["verdict"] == "identical" and audit["rescored"]["num_tokens"] > 100
    environment = json.loads((runs / "gpu/environment.json").read_text())
    assert environment["contract_id"] != json.loads((whole / "environment.json").read_text())["contract_id"]


def test_bf16_with_masters_and_a_reference_does_too(thread: Thread, world: None, tmp_path: Path) -> None:
    runs, said = thread
    assert said["half"][0] == 0, said["half"][1][-3000:]
    go(tmp_path, "half", resume=False, **HALF)
    assert digest(runs / "half") == digest(tmp_path / "half")
    assert episodes(runs / "half") == episodes(tmp_path / "half")


def test_a_voice_does_too(thread: Thread, world: None, tmp_path: Path) -> None:
    runs, said = thread
    assert said["voice"][0] == 0, said["voice"][1][-3000:]
    config, resume, recipe = parse([*VOICE, "--runs", str(tmp_path), "--name", "voice"])
    Run(config, recipe, resume).execute()
    assert digest(runs / "voice") == digest(tmp_path / "voice")
    assert episodes(runs / "voice") == episodes(tmp_path / "voice")
    assert "sampled chunks of sound differ" in said["voice"][1]


def test_the_page_and_a_resumed_run_do_too(thread: Thread, whole: Path) -> None:
    runs, said = thread
    assert said["minimal"][0] == 0 and f"weights_digest {digest(whole)}\n" in said["minimal"][1]
    assert said["resume"][0] == 0 and digest(runs / "cut") == digest(whole)
    assert episodes(runs / "cut") == episodes(whole)


def test_an_audit_goes_where_the_run_was(
    thread: Thread, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, said = thread
    monkeypatch.delenv("METRONOME_BACKEND", raising=False)
    monkeypatch.setattr(gpu, "check", Mock(side_effect=MetronomeError("there is no GPU")))
    assert said["audit"][0] == 0 and "Audit: identical. 0 of" in said["audit"][1]
    before = dispatch.backend()
    for given, note in ([], True), (["--device", "cpu"], False):
        with pytest.raises(SystemExit, match="2"):
            command.main(["--run", str(runs / "gpu"), "--fail-on", "mismatch", *given])
        shown = capsys.readouterr().out
        assert "Audit: not comparable: 6 of 6 saved episodes differ in contract" in shown
        assert ("under another contract: there is no GPU\n" in shown) == note
    assert dispatch.backend() is before


def test_a_learned_reward_picks_as_on_the_cpu(thread: Thread) -> None:
    runs, said = thread
    assert said["best of n"][0] == 0, said["best of n"][1][-3000:]
    bestofn.main(best_of_n(runs, "cpu.json"))
    assert json.loads((runs / "gpu.json").read_text()) == json.loads((runs / "cpu.json").read_text())


def test_workers_are_refused_before_anything_is_written(thread: Thread) -> None:
    runs, said = thread
    status, text = said["workers"]
    assert status == 2 and text.count("\n") == 1, text
    assert text.startswith("error: rollout.workers is 2: on a GPU") and "give --rollout.workers 0" in text
    assert not (runs / "workers").exists()


def test_control_an_audit_sees_another_last_bit(thread: Thread) -> None:
    status, text = thread[1]["audit, spoilt"]
    assert status == 1 and "Audit: different" in text


@pytest.mark.parametrize(
    ("who", "layer"),
    [("learner", r"layers\.0\.self_attn\.q_proj\S* \(linear\)"), ("sampler", r"layers\.0\.self_attn \(attention\)")],
)
def test_control_a_last_bit_of_one_side_stops_the_run(thread: Thread, who: str, layer: str) -> None:
    runs, said = thread
    status, text = said[f"{who}, spoilt"]
    assert status == 2 and re.search(rf"error: step 0, .* The first activation that differs is {layer}", text), text
    assert not (runs / who / "metrics.jsonl").exists()


def test_control_a_last_bit_of_both_sides_gives_other_weights(thread: Thread, world: None, tmp_path: Path) -> None:
    """Where sampler and learner are wrong alike they agree; only the CPU's weights tell."""
    runs, said = thread
    assert said["both, spoilt"][0] == 0
    go(tmp_path, "right", resume=False, **{"rl.steps": 1})
    assert digest(runs / "both") != digest(tmp_path / "right")


def test_control_a_tensor_left_on_the_cpu_raises_with_the_line(thread: Thread) -> None:
    status, text = thread[1]["left behind"]
    assert status == 1 and re.search(r"Error: .*cpu.*\(.*(model|rl)/\S+\.py:\d+ in \w+\)", text.splitlines()[-1]), text


def test_stages_and_studies_find_what_they_find_on_the_cpu(thread: Thread) -> None:
    runs, said = thread
    assert said["stages"][0] == 0, said["stages"][1][-3000:]
    golden = ROOT / "tests/golden/fingerprint.json"
    here, there = (json.loads(file.read_text()) for file in (runs / "stages.json", golden))
    assert here["stages"] == there["stages"] and len(here["stages"]) > 20
    assert compared(here, there, "the CPU's").verdict == "not_comparable"
    status, text = said["studies"]
    assert status == 0 and re.search(r"Matrix: identical: 0 of \d+ comparisons of ours differ", text), text[-3000:]
    assert re.search(r"control: [1-9]\d* of \d+ comparisons of naive torch differ", text)
    assert re.search(
        r"Baseline: 0 log-probs and rows of \d+ tokens differ in ours; in the control, .* [1-9]\d* of", text
    )
