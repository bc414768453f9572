"""RL on learned rewards, launched as a user launches it: two processes, interrupted, with one process, with a model
replaced under it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.test_train import launch, summary
from tests.support.models import reward_model

LEARNED = [
    "--warmstart.steps",
    "0",
    "--rl.reference_weight",
    "0.1",
    "--rl.evaluate_every",
    "1",
    "--source.rewards",
    "both",
]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_learned_rewards_resume_and_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for seed, axis in ((1, "timing"), (2, "content")):
        reward_model((axis,), seed).save(tmp_path / axis)
    models = [*LEARNED, "--source.models", f"[{tmp_path / 'timing'}, {tmp_path / 'content'}]"]

    first = launch(tmp_path, "--name", "first", *models)
    assert first.returncode == 0, first.stderr[-3000:]
    folder = tmp_path / "runs" / "first"
    found, records = summary(tmp_path, "first"), metrics(folder)
    assert found.keys() >= {"proxy/before", "proxy/after/timespeak", "overoptimisation/signal", "eval/after"}
    assert (folder / "report" / "overoptimisation.png").read_bytes().startswith(b"\x89PNG")
    assert found["mismatch/num_unequal"] == found["mismatch/rows_unequal"] == 0
    assert records[0].keys() >= {"proxy/mean", "proxy/timing", "reward/mean", "reward/score", "proxy/held_out"}
    assert records[0]["reference/kl_k1"] == records[0]["reference/kl_k3"] == 0.0
    assert records[3]["reference/kl_k3"] > 0.0

    shutil.copytree(folder, tmp_path / "runs" / "cut")
    cut = tmp_path / "runs" / "cut"
    shutil.rmtree(cut / "checkpoints" / "step_000004")  # as if the run had been killed in its fourth step
    (cut / "summary.json").unlink()
    recipe = cut / "config.yaml"
    recipe.write_text(recipe.read_text().replace("name: first", "name: cut"))
    resumed = launch(tmp_path, "--name", "cut", "--resume", "true", *models)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    after = summary(tmp_path, "cut")
    assert {k: v for k, v in after.items() if k != "wall_s"} == {k: v for k, v in found.items() if k != "wall_s"}

    alone = launch(tmp_path, "--name", "alone", *models, processes=1)
    assert alone.returncode == 0, alone.stderr[-3000:]
    one = metrics(tmp_path / "runs" / "alone")[0]
    judged = [key for key in one if key.startswith(("proxy/m", "proxy/t", "proxy/c", "reward/", "reference/"))]
    assert {key: one[key] for key in judged} == {key: records[0][key] for key in judged} and len(judged) == 9
    assert summary(tmp_path, "alone")["proxy/before"] == found["proxy/before"]

    shutil.rmtree(cut / "checkpoints" / "step_000004")
    reward_model(("timing",), 3).save(tmp_path / "timing")
    replaced = launch(tmp_path, "--name", "cut", "--resume", "true", *models)
    assert replaced.returncode != 0 and "source.models: other weights" in replaced.stderr
