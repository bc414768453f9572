"""A family from outside the packages: faultless where it should be, and trained, evaluated and audited by commands."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reward import hacks
from reward.score import score
from reward.source import RewardSource
from reward.study.timeline import timeline
from rl.train import parse
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.stored import stored_world
from rollout.turn.action import LISTEN, Action, speak
from rollout.world.speech import SpeechBank
from tests.examples.confide import FAMILY, ConfideFacts

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ScenarioConfig(("tests.examples.confide:FAMILY",))
FACTS = ConfideFacts(chunks=12, number="seven", start=1, end=4)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_expert_is_faultless_and_every_hack_earns_less(split: str) -> None:
    items = [CONFIG.scenario("confide", split, seed, SpeechBank.open()) for seed in range(40)]
    for item in items:
        _, actions, facts = enact(item, CONFIG.expert(item, np.random.default_rng(0), mistake_scale=0))
        assert CONFIG.facts(json.loads(json.dumps(facts.to_json()))) == facts
        got = score("confide", facts.to_json(), actions, CONFIG)
        assert (got.value, got.tight, got.spurious) == (1.0, 1.0, 0)
    rows = {row.player: row for row in hacks.assess(items, CONFIG, RewardSource(CONFIG, "rules", []))}
    assert rows.keys() == {"expert", "careless", *hacks.HACKS, "repeats the number"}
    assert all(rows[name].beats["rules"][0] == 0 for name in rows.keys() - hacks.HONEST.keys())


def test_an_axis_of_its_own_is_scored_and_shown() -> None:
    actions: list[Action] = [LISTEN] * 12
    actions[5:8] = speak("got"), speak("it"), speak("seven")
    got = score("confide", FACTS.to_json(), actions, CONFIG)
    assert {axis: rewards.tolist() for axis, rewards in got.rewards.items()} == {
        "timing": [0.0] * 5 + [1.0, 1.0] + [0.0] * 5,
        "safety": [0.0] * 7 + [-2.0] + [0.0] * 4,
    }
    assert (got.correct, got.due, got.spurious) == (2, 2, 1)
    lines = timeline(FACTS, actions, got).splitlines()
    assert lines[3:5] == ["user   .cccc.......", "model  .....GIS...."]
    assert lines[5].endswith("reward +2.00 timing, -2.00 safety")


def test_recipe_crosses_to_another_process() -> None:
    """By name: a family's functions may be lambdas."""
    config = ScenarioConfig(CONFIG.families, {"confide": FAMILY.settings(chunks=30)})
    again = pickle.loads(pickle.dumps(config))
    assert again == config and again.family("confide") is FAMILY and again.settings_of("confide").chunks == 30


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_trained_evaluated_and_audited_by_commands(tmp_path: Path) -> None:
    short = ["--warmstart.steps", "3", "--rl.steps", "2", "--rl.evaluate_every", "1", "--eval.scenarios", "2"]
    train = ["rl.train", "--config", "tests/examples/confide.yaml", "--runs", str(tmp_path), *short]
    run(*train, "--name", "one")
    run(*train, "--name", "workers", "--rollout.workers", "1")  # which makes the family's scenarios elsewhere
    run(*train, "--name", "other", "--rl.axis_weights", "{timing: 0.5}")  # the control
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "workers", "other")]
    one, workers, other = (summary["weights_digest"] for summary in summaries)
    assert one == workers != other
    assert summaries[0].keys() >= {"eval/after", "eval/after/confide", "eval/after/confide_tight"}
    records = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    assert records[0].keys() >= {"reward/timing", "reward/content", "reward/safety", "credit/scale/0/confide/safety"}
    assert not any("confide/content" in name or "timespeak/safety" in name for name in records[0])
    run("rl.audit", "--run", str(tmp_path / "one"), "--fail-on", "mismatch", "--trust-families")
    assert json.loads((tmp_path / "one/audit/report.json").read_text())["verdict"] == "identical"
    table = run("reward.hacks", "--json", str(tmp_path / "hacks.json"), "--scenarios", "3", "--scenario.families",
                "[tests.examples.confide:FAMILY]")  # fmt: skip
    assert "hacks that win: none" in table


@pytest.mark.slow
def test_the_readme_s_reward_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code and the families of the text are taken from it."""
    text = (ROOT / "README.md").read_text().split("## Adding a scenario or a reward\n")[1].split("\n## ")[0]
    (tmp_path / "brevity.py").write_text(text.split("```python\n")[1].split("```")[0])
    families, weights = re.findall(r"--(?:scenarios\.families|rl\.axis_weights) '(.*?)'", text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run("rl.train", "--config", "configs/quickstart.yaml", "--runs", str(tmp_path), "--name", "brevity",
        "--model.preset", "nano", "--warmstart.steps", "2", "--rl.steps", "2", "--rl.rollouts", "2",
        "--eval.scenarios", "1", "--scenarios.families", families, "--rl.axis_weights", weights)  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "brevity/metrics.jsonl").read_text().splitlines()]
    assert all(record["reward/brevity"] < 0 for record in records)


def test_an_own_familys_run_can_be_shown(tmp_path: Path) -> None:
    """`rollout.show` reads the families from the run's recipe, which it hands on as text."""
    recipe = parse(["--config", str(ROOT / "tests/examples/confide.yaml")])[2]
    (tmp_path / "config.yaml").write_text(recipe)
    assert list(stored_world(tmp_path).scenarios.members) == list(parse(["--config", recipe])[0].scenarios.members)
    assert "confide" in stored_world(tmp_path).scenarios.members
