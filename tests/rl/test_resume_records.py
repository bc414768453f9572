"""`--resume` in a folder that does not hold what the run wrote, or more than it goes on with, or that is moved away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kernels.errors import MetronomeError
from model.weights import manifest
from rl import run as run_module
from rl.audit import report as report_module
from rl.audit.report import audit
from tests.rl.resuming import cut, digests, go, refusal


@pytest.mark.parametrize("lines", [[], [0], [1, 2], [0, 2], [0, 1]])
def test_records_that_are_missing_are_said_at_the_start(copy: Path, lines: list[int]) -> None:
    path = copy / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[i] for i in lines)) if lines else path.unlink()
    assert "metrics.jsonl: the record of step" in refusal(copy.parent, "moved")  # of a finished run
    (copy / "summary.json").unlink()
    assert "metrics.jsonl: the record of step" in refusal(copy.parent, "moved")


@pytest.mark.parametrize("changed", ["0" * 32, "\u001b[8m", None, 7])
def test_a_last_record_of_other_weights(whole: Path, copy: Path, changed: Any) -> None:
    cut(copy, 2)
    path = copy / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | {"weights_digest": changed}), ""]))
    said = refusal(copy.parent, "moved")
    assert "metrics.jsonl: the record of step 1 has weights_digest" in said and digests(whole)[1] in said
    assert "\u001b" not in said
    path.write_text("\n".join([*lines[:2], ""]))  # the control
    go(copy.parent, "moved")
    assert digests(copy) == digests(whole)


def test_fewer_steps_than_the_killed_run_had_begun(copy: Path) -> None:
    """Nothing of the steps that it does not take again remains, and its closing audit passes."""
    cut(copy, 1)
    assert (copy / "episodes/step_000002.rank_0.safetensors").exists()
    go(copy.parent, "moved", rl__steps=2)
    assert [p.name for p in sorted((copy / "episodes").iterdir())] == [
        "step_000000.rank_0.safetensors",
        "step_000001.rank_0.safetensors",
    ]
    assert len(digests(copy)) == 2 and not audit(copy).not_comparable.contradictions


def test_a_copied_checkpoint_is_no_finished_step(copy: Path) -> None:
    shutil.copytree(copy / "checkpoints/step_000002", copy / "checkpoints/step_1000000")
    said = refusal(copy.parent, "moved")
    assert "step_1000000: it was saved as step_000002" in said and "move step_1000000 away" in said
    shutil.rmtree(copy / "checkpoints/step_1000000")
    assert "is finished: 3 steps" in go(copy.parent, "moved")


def test_a_folder_that_is_moved_away_in_mid_run(whole: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends in one line; where the folder is now, all that was finished is whole, and goes on."""
    cut(copy, 1)
    steps = run_module.loop.steps

    def moving(*given: Any) -> Any:
        for i, result in enumerate(steps(*given)):
            if i == 1:
                copy.rename(copy.with_name("away"))
            yield result

    monkeypatch.setattr(run_module.loop, "steps", moving)
    with pytest.raises(MetronomeError, match="moved was moved or deleted while the run wrote into it"):
        go(copy.parent, "moved")
    assert [p.name for p in copy.parent.iterdir()] == ["away"]
    monkeypatch.undo()
    manifest.check(copy.with_name("away") / "checkpoints/step_000002")
    go(copy.parent, "away")
    assert digests(copy.with_name("away")) == digests(whole)


@pytest.mark.parametrize("when", ["before", "while it is written", "never"])
def test_a_folder_that_is_moved_away_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """What is said of it then is true of a finished run, too, and does what it says."""
    run, away = tmp_path / "a", tmp_path / "away"
    module, name = {
        "before": (run_module, "audit"),
        "while it is written": (report_module, "write"),
        "never": (run_module, "nothing"),
    }[when]
    call = getattr(module, name, None)

    def moving(*given: Any) -> Any:
        run.rename(away)
        return call(*given)

    monkeypatch.setattr(module, name, moving, raising=False)
    if when == "never":  # the control
        go(tmp_path, "a", resume=False, rl__steps=1)
        return
    with pytest.raises(MetronomeError, match=r"a was moved or deleted .* if it holds summary\.json, .*rl\.audit --run"):
        go(tmp_path, "a", resume=False, rl__steps=1)
    monkeypatch.undo()
    assert "is finished: 1 steps" in go(tmp_path, "away", rl__steps=1)
    assert audit(away).verdict == "identical"
