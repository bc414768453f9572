"""What is missing narrows an audit's statement, what contradicts itself ends it, what is no number is never equal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.weights import manifest
from rl.audit.diagnosis import diagnose
from rl.audit.replay import rescore
from rl.audit.report import audit
from tests.rl.audit.runs import first_file, flip, tamper
from tests.rl.audit.test_audit import checked, tokens
from tests.support.episodes import with_text


def test_files_of_episodes_that_cannot_be_read_are_nothing_compared(run: Path) -> None:
    for file in (run / "episodes").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    report = checked(run)
    assert (report["verdict"], report["basis"]) == ("nothing_compared", "records")
    assert report["headline"].startswith("Nothing could be re-scored: see the gaps.")
    assert "Step 0: 0 of its 4 episodes are there and can be read." in report["gaps"]


def test_episodes_of_one_process_that_are_gone_are_a_gap(run: Path) -> None:
    first_file(run).unlink()
    report = checked(run)
    assert report["verdict"] == "identical" and "(6 episodes of" in report["headline"]
    assert report["gaps"] == ["Step 0: 2 of its 4 episodes are there and can be read."]
    first_file(run).with_name("step_000000.rank_1.safetensors").unlink()
    assert checked(run)["gaps"] == ["The run saved episodes of 1 more steps, which are gone: [0]."]


@pytest.mark.parametrize(("drop", "says"), [(0, "records of 1 of its 2"), (1, "names the final weights")])
def test_a_finished_run_that_lacks_a_record_contradicts_itself(run: Path, drop: int, says: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[1 - drop])
    report = checked(run)
    assert report["verdict"] == "not_comparable" and says in report["headline"]
    (run / "summary.json").unlink()  # the control: it had not finished
    assert checked(run)["verdict"] == "identical"


def test_a_summary_of_other_counts_contradicts_the_records(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for more, verdict in ((0, "identical"), (1, "not_comparable")):
        counts = {"mismatch/num_tokens": tokens(run) + more, "mismatch/num_unequal": 0}
        (run / "summary.json").write_text(json.dumps(summary | counts))
        assert checked(run)["verdict"] == verdict


def test_a_run_that_its_watch_stopped_has_the_records_up_to_there(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0])
    shutil.rmtree(run / "checkpoints/step_000002")
    for file in (run / "episodes").glob("step_000001*"):
        file.unlink()
    digest = json.loads(lines[0])["weights_digest"]
    (run / "summary.json").write_text(json.dumps({"weights_digest": digest, "overoptimisation/step": 1}))
    assert checked(run)["verdict"] == "not_comparable", "the recipe has no watch that stops"
    recipe = (run / "config.yaml").read_text()
    assert "stop: false" in recipe
    (run / "config.yaml").write_text(recipe.replace("stop: false", "stop: true"))
    for folder in (run / "checkpoints").iterdir():
        manifest.write(folder, folder.name, (run / "config.yaml").read_text())
    assert checked(run)["verdict"] == "identical"


def test_not_a_number_on_both_sides_is_not_identical(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bits, and no log-prob."""
    scored = rescore.choice_logprobs

    def nothing(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logprob, entropy, digest = scored(*arguments)
        return torch.full_like(logprob, float("nan")), entropy, digest

    for file in (run / "episodes").iterdir():
        tamper(file, lambda e: with_text(e, logprob=torch.full_like(e.text.logprob, float("nan"))), (0, 1))
    monkeypatch.setattr(rescore, "choice_logprobs", nothing)
    audit(run)
    report = json.loads((run / "audit/report.json").read_text())
    assert (report["verdict"], report["num_unequal"], report["k3"]) == ("different", tokens(run), None)


def test_a_diagnosis_that_fails_loses_no_verdict(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("no such op")

    tamper(first_file(run), lambda e: with_text(e, logprob=flip(e.text.logprob, 5)))
    monkeypatch.setattr(diagnose, "diagnose", fails)
    report = checked(run)
    assert (report["verdict"], report["num_unequal"], report["diagnosis"]) == ("different", 1, None)
    assert report["gaps"] == ["Step 0: The difference could not be explained (RuntimeError: no such op)."]
