"""What is missing narrows an audit's statement, what contradicts itself ends it, what is no number is never equal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.errors import MetronomeError
from model.weights import manifest
from rl.audit.command import main
from rl.audit.compare import compare_runs
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
    scored = rescore.all_logprobs

    def nothing(*arguments: Any) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        (logprob, entropy, digest), sound = scored(*arguments)
        return (torch.full_like(logprob, float("nan")), entropy, digest), sound

    for file in (run / "episodes").iterdir():
        tamper(file, lambda e: with_text(e, logprob=torch.full_like(e.text.logprob, float("nan"))), (0, 1))
    monkeypatch.setattr(rescore, "all_logprobs", nothing)
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


def test_an_episode_counts_once(run: Path) -> None:
    """Of a process that the run does not have, or twice under one name: two of them would be too many, too."""
    whole = checked(run)
    assert whole["verdict"] == "identical" and not whole["not_comparable"]["contradictions"]
    shutil.copy(first_file(run), first_file(run).with_name("step_000000.rank_2.safetensors"))
    report = checked(run)
    assert report["verdict"] == "not_comparable"
    says = " ".join(report["not_comparable"]["contradictions"])
    assert "rank_2.safetensors is of a process that the run, of 2, does not have" in says
    assert "was saved 2 times" in says and "6 episodes were saved, and the recipe plays 4" in says
    twin = shutil.copytree(run, run.parent / "twin")  # two runs that went wrong alike
    assert compare_runs(run, twin, run / "audit/compare").verdict == "not_comparable"


def test_episodes_are_of_the_contract_that_the_run_names(run: Path) -> None:
    path = run / "environment.json"
    for change, verdict in (({}, "identical"), ({"contract_id": "0" * 16}, "not_comparable")):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        report = checked(run)
        assert report["verdict"] == verdict
    assert f"environment.json names the contract {'0' * 16}" in report["headline"]


EVIL = "x\nAudit: identical. One run, bit for bit\x1b[8m\u202e"


@pytest.mark.parametrize("where", ["contract", "weights", "key", "packs", "name of an episode", "contract of one"])
def test_a_file_cannot_write_to_the_terminal(run: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    """The lines that are printed are those of `statement`, four at most, however the texts in the files end."""
    other = Path(shutil.copytree(run, run.parent / "other"))
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    if where == "contract":
        content = json.loads((other / "environment.json").read_text())
        (other / "environment.json").write_text(json.dumps(content | {"contract_id": EVIL, "contract": {EVIL: EVIL}}))
    elif where == "weights":
        (other / "summary.json").write_text(json.dumps({"weights_digest": EVIL}))
    elif where == "name of an episode":
        tamper(first_file(other), lambda e: replace(e, scenario=EVIL))
    elif where == "contract of one":
        tamper(first_file(other), lambda e: replace(e, contract_id=EVIL))
    else:
        lines[1] |= {EVIL: 1.0} if where == "key" else {"packs_digest": EVIL}
        (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for arguments in (["--run", str(other)], ["--compare", str(run), str(other)]):
        main(arguments)
        printed = capsys.readouterr().out
        assert printed.replace("\n", "").isprintable() and printed.count("\n") <= 4
        assert sum(line.startswith("Audit:") for line in printed.split("\n")) == 1
        assert "One run" not in printed.split("\\n")[0]


def test_what_is_no_runs_folder_is_said_before_anything_is_made(tmp_path: Path, run: Path) -> None:
    (file := tmp_path / "LICENSE").write_text("text")
    (empty := tmp_path / "empty").mkdir()
    for path, says in ((file, "it is a file"), (empty, "no config.yaml"), (tmp_path / "none", "no such folder")):
        for arguments in (["--run", str(path)], ["--compare", str(path), str(run)]):
            with pytest.raises(MetronomeError, match=says):
                main(arguments)
    assert not list(empty.iterdir()) and not (tmp_path / "none").exists()
    main(["--run", str(run)])  # the control
    assert (run / "audit/report.json").is_file()
