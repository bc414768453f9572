"""Checkpoints on a stand-in for the hub: what comes there, and that a hub that fails costs a run nothing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from kernels.errors import MetronomeError
from model.program.files import write_json
from model.weights import checkpoint
from model.weights.card import CARD
from reward.learned.model import RewardModel
from rl import push
from rl.environment import computing
from rl.evaluate import HeldOut
from rl.folder import RunFolder
from rl.hub import HubConfig, RepoName, Sender
from rl.resume import Progress, save
from rl.step.identity import Mismatch
from rl.train import parse
from tests.support.hub import TOKEN, Hub, running_hub
from tests.support.models import fresh_model

REPO = "someone/a-model"
FILES = {CARD, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints."""

    class SavedLearner:
        model = fresh_model("nano")

        def save(self, folder: Path) -> None:
            """Nothing: no optimizer is sent."""

    runs = tmp_path_factory.mktemp("runs")
    folder = RunFolder.create(runs, "run", parse(["--eval.scenarios", "10", "--runs", "/secret/place"])[2])
    folder.write_json("environment.json", computing())
    for step in (0, 2):
        before = HeldOut({"": 0.25, "timespeak": 0.25}, {})
        save(folder, SavedLearner(), Progress(step, before, Mismatch.total([]), 1.0, (), 1))  # type: ignore[arg-type]
        if step == 0:
            folder.append_metrics({"step": 0})
            folder.append_metrics({"step": 1})
    digest = checkpoint.weights_digest(SavedLearner.model)
    folder.write_json("summary.json", {"eval/after": 0.75, "eval/after/timespeak": 0.75, "weights_digest": digest})
    return folder.path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running one that this process and its children take for the hub."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a storage with a protocol of its own
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
        yield hub


def refused(run: Path, repo: str = REPO, **given: Any) -> str:
    with pytest.raises(MetronomeError) as error:
        push.push(run, repo, **given)
    line = str(error.value)
    assert "\n" not in line and TOKEN not in line
    return line


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_last_checkpoint_with_the_last_scores(saved: Path, hub: Hub, tmp_path: Path) -> None:
    before = content(saved)
    said = push.push(saved, REPO)
    assert said == f"step 2 of run is at {hub.url}/{REPO}/commit/0f"
    assert hub.private[REPO] and hub.repositories[REPO].keys() == FILES
    assert any(asked.startswith("PUT /storage/") for asked in hub.asked), "tensors go by large file storage"
    model = saved / "checkpoints/step_000002/model"
    for name in FILES - {CARD}:
        assert hub.repositories[REPO][name] == (model / name).read_bytes()
    text = hub.repositories[REPO][CARD].decode()
    assert "| held out, after RL | 0.7500 | 10 |" in text and ModelCard(text).data.library_name == "transformers"
    assert "after RL" not in (model / CARD).read_text().partition("## Scores")[2] and "secret" not in text
    assert content(saved) == before
    for name, data in hub.repositories[REPO].items():
        (tmp_path / name).write_bytes(data)
    assert checkpoint.weights_digest(checkpoint.load(tmp_path)) in text


def test_an_earlier_one_and_a_public_repository(saved: Path, hub: Hub) -> None:
    push.push(saved, REPO, step=0, private=False)
    assert not hub.private[REPO]
    sent = hub.repositories[REPO][CARD]
    assert sent == (saved / "checkpoints/step_000000/model" / CARD).read_bytes()
    push.push(saved, REPO)  # into the same
    assert hub.repositories[REPO][CARD] != sent


def test_a_reward_model(tmp_path: Path, hub: Hub) -> None:
    model = RewardModel.build(fresh_model("nano"), ("timing",))
    model.card = "---\nlibrary_name: metronome\n---\n"
    model.save(tmp_path / "rm" / "model")
    push.push(tmp_path / "rm", REPO)
    assert {CARD, "reward.json", "head.safetensors", "backbone/model.safetensors"} < hub.repositories[REPO].keys()
    assert "no --step" in refused(tmp_path / "rm", step=1)


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [("/repos/create", 401, "answers 401"), ("/repos/create", 500, "answers 500"), ("/preupload", 403, "answers 403"),
     ("/preupload", 503, "answers 503"), ("/lfs/objects", 500, "answers 500"), ("/storage", 500, "answers 500"),
     ("/commit", 500, "answers 500"), ("/commit", 404, "answers 404")],
)  # fmt: skip
def test_a_hub_that_fails(saved: Path, hub: Hub, part: str, status: int, said: str) -> None:
    before = content(saved)
    hub.fails[part] = status
    line = refused(saved)
    assert said in line and "Nothing of the run has changed; the same command tries again" in line
    assert ("hf auth login" in line) == (status in (401, 403, 404))
    assert not hub.repositories.get(REPO), "one commit: no half of a model is there"
    assert content(saved) == before
    hub.fails.clear()
    push.push(saved, REPO)  # the control


def test_no_token_a_wrong_one_and_nobody_there(saved: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refused(saved)
    assert "answers 401 (Invalid username or password.)" in line and "hf_wrong" not in line
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be used (ConnectError" in refused(saved)


def test_offline_is_said(saved: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing is sent" in refused(saved)
    assert not hub.asked


def test_what_is_no_whole_checkpoint_is_not_sent(saved: Path, hub: Hub, tmp_path: Path) -> None:
    assert "is not a run's folder" in refused(tmp_path)
    copy = shutil.copytree(saved, tmp_path / "run")
    assert "there is no such folder" in refused(copy, step=7)
    with (copy / "checkpoints/step_000002/model/config.json").open("a") as file:
        file.write(" ")
    assert "model/config.json is damaged" in refused(copy)
    write_json(copy / "summary.json", {"eval/after": "nothing"})
    shutil.rmtree(copy / "checkpoints/step_000002")
    assert "eval/after is no number" in refused(copy)
    assert not hub.asked


@pytest.mark.parametrize("name", ["model", "a/b/c", "a/..", "a b/c", "a/b--c", "", "-a/b", "a/" + "b" * 100])
def test_names_of_repositories(name: str, tmp_path: Path) -> None:
    assert RepoName().problem(name) and RepoName().problem(REPO) is None
    with pytest.raises(MetronomeError, match=r"recipe: hub\.repo is "):
        parse([f"--hub.repo={name}"])
    with pytest.raises(MetronomeError, match="--repo"):
        push.main(["--run", str(tmp_path), f"--repo={name}"])


# ---- of a run ----


def test_a_run_sends_what_the_recipe_says(saved: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    off, last = Sender(HubConfig(), saved, said.append), Sender(HubConfig(REPO), saved, said.append)
    for sender in (off, last):
        sender.saved(0)
    off.ended(2)
    assert not said and not hub.asked
    monkeypatch.setenv("RANK", "1")  # not a learner's word: else its error would be called another process's
    last.ended(2)
    assert said == [f"Hub: step 2 of run is at {hub.url}/{REPO}/commit/0f"] and hub.repositories[REPO].keys() == FILES


def test_each_checkpoint_one_at_a_time(tmp_path: Path) -> None:
    """With a program that sends nothing: it waits for a file, and fails at step 2."""
    wait = f"import pathlib, sys, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)\n"
    fail = "step = sys.argv[sys.argv.index('--step') + 1]\nsys.exit('error: no luck' if step == '2' else print(step))"
    said: list[str] = []
    sender = Sender(HubConfig(REPO, every="checkpoint"), tmp_path, said.append, ("-c", wait + fail))
    sender.saved(0)
    sender.saved(1)
    assert said == ["Hub: step 1 is not sent, because step 0 still is"]
    (tmp_path / "go").touch()
    sender.ended(2)
    assert said[1] == "Hub: 0" and len(said) == 3
    assert "step 2 was not sent, and the run is as it would be without (no luck)" in said[2]
    assert f"python -m rl.push --run {tmp_path} --step 2 --repo {REPO}" in said[2]


def test_a_silent_hub_ends_in_a_line(saved: Path, hub: Hub) -> None:
    said: list[str] = []
    hub.silent = True
    Sender(HubConfig(REPO, timeout_s=2), saved, said.append).ended(2)
    assert "took longer than 2 s" in said[0] and len(said) == 1
    assert hub.asked == ["POST /api/repos/create"]


def test_a_process_that_cannot_start_ends_in_a_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    Sender(HubConfig(REPO), saved, said.append).ended(2)
    assert "No such file" in said[0] and len(said) == 1


def test_a_long_reason_holds_no_part_of_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for before in range(380, 500):
        assert TOKEN[:8] not in push._reason(ValueError("y" * before + " " + TOKEN))


def test_a_run_survives_a_missing_folder_for_temporary_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    monkeypatch.setattr("rl.hub.tempfile.TemporaryFile", full)
    Sender(HubConfig(REPO), saved, said.append).ended(2)
    assert len(said) == 1 and "step 2 was not sent" in said[0] and "No space left" in said[0]
