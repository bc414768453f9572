"""What a user can get wrong: one error that says what, where and what to do; no finished file is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights import checkpoint
from reward.source import Rewards
from rl.config import RLConfig
from rl.resume import load_progress
from rl.run import Run
from rl.step.credit import token_weights
from rl.step.gradient import gradient_of
from rl.train import parse
from rollout.record.episode import load_episodes, save_episodes
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import DEFAULT_FOLDER
from tests.support.episodes import some_episode, unequal_fields


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rl.stpes", "3"], "stpes"),
        (["--rl.steps", "many"], "steps"),
        (["--warmstart.optim.lr", "[1]"], "lr"),
        (["--model.dtype", "float8"], "dtype"),
        (["--source.rewards", "learnt"], "rewards"),
        (["--source.watch.dorp", "0.1"], "dorp"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_key_or_type_is_named(arguments: list[str], says: str) -> None:
    with pytest.raises(MetronomeError, match=says) as error:
        parse(arguments)
    assert "--help" in str(error.value)


def test_unknown_key_in_a_recipe_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rl:\n  stpes: 3\n")
    with pytest.raises(MetronomeError, match="stpes"):
        parse(["--config", str(recipe)])


def test_dashes_do_for_underscores() -> None:
    config, resume, _ = parse(["--speech-dir", "a-b", "--rl.micro-batch=3", "--resume", "true"])
    assert (config.speech_dir, config.rl.micro_batch, resume) == ("a-b", 3, True)


def start(tmp_path: Path, *arguments: str) -> None:
    config, resume, recipe = parse(["--runs", str(tmp_path / "runs"), *arguments])
    Run(config, recipe, resume).execute()


def test_missing_and_empty_speech_folder(tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match="nowhere"):
        start(tmp_path, "--speech_dir", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetronomeError, match=r"manifest\.jsonl"):
        start(tmp_path, "--speech_dir", str(tmp_path / "empty"))
    assert not (tmp_path / "runs").exists()


def speech_folder(tmp_path: Path, rate: int, keep: int | None) -> Path:
    folder = tmp_path / "speech"
    folder.mkdir()
    soundfile.write(folder / "four.flac", np.zeros(rate, np.float32), rate)
    if keep is not None:
        data = (DEFAULT_FOLDER / "digits_4.flac").read_bytes()
        (folder / "four.flac").write_bytes(data[:keep])
    (folder / "manifest.jsonl").write_text(json.dumps({"file": "four.flac", "text": "four", "seconds": 1.0}) + "\n")
    return folder


def test_wrong_sample_rate_and_truncated_file(tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match="8000"):
        start(tmp_path, "--speech_dir", str(speech_folder(tmp_path, 8000, None)))
    (tmp_path / "more").mkdir()
    with pytest.raises(MetronomeError, match=r"four\.flac"):
        start(tmp_path, "--speech_dir", str(speech_folder(tmp_path / "more", 16000, 4000)))


def test_checkpoint_of_another_config(tmp_path: Path) -> None:
    model = InteractionModel(preset("tiny"))
    model.init_weights(0)
    checkpoint.save(model, tmp_path / "c")
    config = preset("tiny")
    config.text_config.route_scale = 3.0
    with pytest.raises(MetronomeError, match="route_scale"):
        checkpoint.load_into(InteractionModel(config), tmp_path / "c")


def test_damaged_progress(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"step": 3')
    with pytest.raises(MetronomeError, match="Delete this checkpoint"):
        load_progress(tmp_path)


def test_a_second_run_of_that_name_leaves_the_first_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(MetronomeError, match="already holds"):
        start(tmp_path)
    assert (folder / "summary.json").read_text() == "{}"
    assert [p.name for p in folder.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rl.groups", "0"], "rl.groups is 0"),
        (["--rl.rollouts", "1"], "rl.rollouts is 1"),
        (["--rl.reference_weight", "-0.1"], "reference_weight is -0.1"),
        (["--rollout.workers", "-1"], "rollout.workers is -1"),
        (["--rollout.workers", "49"], "at most 48"),
        (["--rollout.workers", "2", "--rollout.engine", "vllm"], "workers is 2: vLLM"),
        (["--rollout.workers", "2", "--rollout.worker_timeout_s", "0"], r"worker_timeout_s is 0\.0"),
        (["--rollout.workers", "2", "--rollout.worker_threads", "0"], "worker_threads is 0"),
        (["--source.rewards", "learned"], "names no reward model"),
        (["--source.rewards", "both", "--source.models", "[nowhere/timing]"], "there is no folder nowhere/timing"),
    ],
)
def test_settings_that_cannot_work_stop_before_anything_is_written(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    with pytest.raises(MetronomeError, match=says):
        start(tmp_path, *arguments)
    assert not (tmp_path / "runs").exists()


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match="no run to resume"):
        start(tmp_path, "--resume", "true")


def test_truncated_episodes_file(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_episodes(path, [some_episode()])
    (back,) = load_episodes(path)
    assert unequal_fields(back, some_episode()) == set()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(MetronomeError, match=r"e\.safetensors"):
        load_episodes(path)
    with pytest.raises(MetronomeError, match="nowhere"):
        load_episodes(tmp_path / "nowhere")


def rewards(timing: float) -> Rewards:
    return Rewards({"timing": torch.tensor([timing]), "content": torch.zeros(1)})


def test_reward_that_is_not_finite_names_episode_and_chunk() -> None:
    config = RLConfig(rollouts=2)
    weights = token_weights([some_episode()] * 2, [[rewards(1.0), rewards(0.0)]], [], config, {}).weights
    assert torch.cat(weights).tolist() == [0.5, -0.5]
    with pytest.raises(MetronomeError, match=r"timespeak/train/0#0: the timing reward of chunk 0 is not finite"):
        token_weights([some_episode()] * 2, [[rewards(float("nan")), rewards(0.0)]], [], config, {})


def test_logprob_that_is_not_finite_names_the_token() -> None:
    model = InteractionModel(preset("tiny"))
    model.init_weights(0)
    classes = Vocabulary.build(model.vocab).classes
    one = dataclasses.replace(some_episode(), tokens=torch.tensor([1, 2, 2, 2, 2, 3]))
    model.pack()
    gradient_of(model, [one], [torch.ones(1)], classes, 1.0, 1)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.repack()
    with pytest.raises((MetronomeError, ValueError), match=r"NaN|not finite|diverged"):
        gradient_of(model, [one], [torch.ones(1)], classes, 1.0, 1)
