"""The recipe of the voice, made short: sound goes from the flow head through sessions, scorer, learner and audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernels.errors import MetronomeError
from rl.run import Run
from rl.study import understood
from rl.train import parse
from rollout.record.episode import load_episodes
from tests.support.settings import VOICE


def summary(runs: Path, name: str, *arguments: str) -> dict[str, Any]:
    config, resume, recipe = parse([*VOICE, "--runs", str(runs), "--name", name, *arguments])
    Run(config, recipe, resume).execute()
    found: dict[str, Any] = json.loads((runs / name / "summary.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_the_recipe_trains_and_its_bits_are_equal(tmp_path: Path) -> None:
    once = summary(tmp_path, "once")
    assert once["mismatch/num_unequal"] == once["mismatch/rows_unequal"] == 0 < once["mismatch/num_tokens"]
    report = json.loads((tmp_path / "once/audit/report.json").read_text())
    assert report["verdict"] == "identical"
    assert once.keys() >= {f"eval/{when}/{name}" for when in ("before", "after") for name in ("repeat", "interval")}
    episodes = load_episodes(tmp_path / "once/episodes/step_000000.rank_0.safetensors")
    assert len(episodes) == 4 and all(one.facts["family"] == "repeat" for one in episodes)
    spoken = [action for one in episodes for action in one.actions if action.speaks]
    assert spoken and all(action.sound is not None for action in spoken)
    assert f"and 0 of {len(spoken):,} sampled chunks of sound differ (4 episodes of step 0" in report["headline"]
    assert summary(tmp_path, "again")["weights_digest"] == once["weights_digest"]
    softer = summary(tmp_path, "softer", "--scenarios.repeat.softest_db", "-40")  # the control
    assert softer["weights_digest"] != once["weights_digest"]


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_a_listener_rewards_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pocketsphinx", reason="the extra `voice` is not installed")
    heard = summary(tmp_path, "heard", "--source.listener", "true")
    assert heard["mismatch/num_unequal"] == heard["mismatch/rows_unequal"] == 0
    records = [json.loads(line) for line in (tmp_path / "heard/metrics.jsonl").read_text().splitlines()]
    costs = [record["reward/understood"] for record in records if "reward/understood" in record]
    assert len(costs) == 2 and max(costs) <= 0
    out = tmp_path / "table.json"
    understood.main(["--run", str(tmp_path / "heard"), "--json", str(out), "--scenarios", "2", "--free", "false"])
    first, last = json.loads(out.read_text())["rows"]
    assert (first["step"], last["step"]) == (0, 2) and last["weights_digest"] == heard["weights_digest"]
    assert last["words"] >= last["whole"] == sum(times for times, _ in last["by_word"].values())
    assert "understood" in capsys.readouterr().out
    with pytest.raises(MetronomeError, match=r"steps: .* has no checkpoint of step 7"):
        understood.main(["--run", str(tmp_path / "heard"), "--json", str(out), "--steps", "[7]"])
