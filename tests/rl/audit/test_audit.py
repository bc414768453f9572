"""The audit of a run: it finds a single bit, tells other inputs from other bits, and claims no more than it saw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.weights import checkpoint, manifest
from rl.audit import command
from rl.audit.command import main
from rl.audit.report import audit
from rl.audit.schema import schema
from rl.study import matrix
from rollout.record.episode import Episode, load_episodes
from rollout.turn.action import Action, Mode
from tests.model.damage import flip_bit
from tests.rl.audit.runs import SPEAKING, STEPS, changed, first_file, flip, make, tamper
from tests.support.episodes import with_text

Report = dict[str, Any]


def checked(run: Path, at_most: int | None = None) -> Report:
    """The report as it lies on disk; valid by the published schema."""
    audit(run, at_most)
    report = json.loads((run / "audit/report.json").read_text())
    jsonschema.validate(report, schema())
    page = (run / "audit/report.html").read_text()
    assert page.startswith("<!doctype html>") and ("How the difference grows" in page) == bool(report["diagnosis"])
    return report


def tokens(run: Path, step: int | None = None) -> int:
    files = (run / "episodes").glob("step_*" if step is None else f"step_{step:06d}*")
    return sum(len(e.text.logprob) for file in files for e in load_episodes(file))


def test_an_untouched_run_is_identical(run: Path) -> None:
    report = checked(run)
    count = tokens(run)
    assert (report["verdict"], report["basis"]) == ("identical", "rescored")
    assert report["headline"] == (
        f"0 of {count:,} sampled tokens differ (8 episodes of steps 0, 1, re-scored now); full-vocabulary KL exactly 0 "
        "on every row."
    )
    assert (report["num_tokens"], report["num_unequal"], report["rows_unequal"]) == (count, 0, 0)
    assert (report["k1"], report["k3"], report["max_abs"], report["first_difference"]) == (0.0, 0.0, 0.0, None)
    assert report["rescored"]["episodes"] == report["rescored"]["saved_episodes"] == 4 * STEPS
    assert report["gaps"] == [] and report["not_comparable"]["episodes"] == 0
    assert [w["step"] for w in report["weights"]] == [0, 1]
    assert report["parts"][1]["checkpoint_digest"] == report["parts"][1]["recorded_digest"]


@pytest.mark.parametrize("bit", [0, 31])
def test_one_bit_of_one_log_prob_is_found(run: Path, bit: int) -> None:
    tamper(first_file(run), lambda e: with_text(e, logprob=flip(e.text.logprob, 5, bit)), which=[1])
    victim = load_episodes(first_file(run))[1]
    report = checked(run)
    assert (report["verdict"], report["num_unequal"], report["rows_unequal"]) == ("different", 1, 0)
    assert report["headline"].startswith(f"1 of {tokens(run):,} sampled tokens differs")
    first = report["first_difference"]
    assert (first["step"], first["episode"], first["position"]) == (0, victim.name, int(victim.text.sampled_at[5]))
    assert first["sampler"] == f"{victim.text.logprob[5].item():.9g}" != first["learner"] and not first["row_differs"]
    assert report["max_abs"] > 0 and report["k3"] >= 0
    assert report["diagnosis"]["first"] is None and "record was changed" in report["diagnosis"]["suspects"][0]


def test_one_row_digest_is_found(run: Path) -> None:
    tamper(first_file(run), lambda e: with_text(e, digest=changed(e.text.digest, 7, int(e.text.digest[7]) ^ 1)))
    report = checked(run)
    assert (report["verdict"], report["num_unequal"], report["rows_unequal"]) == ("different", 0, 1)
    assert report["first_difference"]["row_differs"] and "exactly 0" not in report["headline"]


def test_a_nan_is_a_difference_and_no_number(run: Path) -> None:
    tamper(first_file(run), lambda e: with_text(e, logprob=changed(e.text.logprob, 0, float("nan"))))
    report = checked(run)
    assert (report["verdict"], report["num_unequal"], report["k1"], report["max_abs"]) == ("different", 1, None, None)


def test_other_weights_under_the_recorded_digest_are_found(run: Path) -> None:
    """The re-scoring is one: a forged digest does not help weights that are not those that sampled."""
    path = run / "checkpoints/step_000000/model"
    model = checkpoint.load(path)
    with torch.no_grad():
        next(iter(model.parameters()))[:] *= 1.01
    checkpoint.save(model, path)
    manifest.write(path.parent, path.parent.name, (run / "config.yaml").read_text())
    digest = checkpoint.weights_digest(checkpoint.load(path))
    for rank in (0, 1):
        tamper(
            run / f"episodes/step_000000.rank_{rank}.safetensors", lambda e: replace(e, weights_digest=digest), (0, 1)
        )
    report = checked(run)
    assert report["verdict"] == "different"
    assert report["parts"][0]["num_unequal"] > 0 == report["parts"][1]["num_unequal"]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("contract", lambda e: replace(e, contract_id="0" * 16)),
        ("weights", lambda e: replace(e, weights_digest="0" * 32)),
        ("temperature", lambda e: replace(e, temperature=0.5)),
        ("tokens", lambda e: replace(e, tokens=changed(e.tokens, 0, int(e.tokens[0]) + 1))),
        ("tokens", lambda e: replace(e, codes=changed(e.codes, 0, 200))),
        ("tokens", lambda e: replace(e, codes=e.codes[:-1])),
        ("tokens", lambda e: replace(e, actions=(Action(Mode.SPEAK, ("<b>unheard</b>",)), *e.actions[1:]))),
        ("positions", lambda e: with_text(e, sampled_at=changed(e.text.sampled_at, 0, int(e.text.sampled_at[0]) - 1))),
        ("positions", lambda e: with_text(e, logprob=e.text.logprob[1:])),
        ("masks", lambda e: with_text(e, row_class=changed(e.text.row_class, 0, 1))),
    ],
)
def test_other_inputs_are_not_comparable(run: Path, reason: str, change: Callable[[Episode], Episode]) -> None:
    tamper(first_file(run), change)
    report = checked(run)
    assert (report["verdict"], report["num_unequal"]) == ("not_comparable", 0)
    assert report["not_comparable"]["reasons"] == {reason: 1}
    assert report["headline"].startswith("Not comparable: 1 of 8 saved episodes") and "No KL" in report["headline"]
    assert report["k1"] is report["k3"] is report["max_abs"] is None
    assert report["rescored"]["episodes"] == 7, "the others are still compared"


def test_a_run_of_another_contract_is_not_comparable(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "contract_id", lambda: "f" * 16)
    report = checked(run)
    assert (report["verdict"], report["basis"], report["rescored"]["episodes"]) == ("not_comparable", "records", 0)
    assert report["not_comparable"]["reasons"] == {"contract": 8}


def test_a_difference_outweighs_what_cannot_be_compared(run: Path) -> None:
    tamper(first_file(run), lambda e: replace(e, contract_id="other"))
    tamper(first_file(run), lambda e: with_text(e, logprob=flip(e.text.logprob, 0)), which=[1])
    report = checked(run)
    assert (report["verdict"], report["num_unequal"]) == ("different", 1)


def test_copies_that_are_not_the_checkpoints_weights(run: Path) -> None:
    """Sampler and learner had one stale copy: equal log-probs, and weights that were never multiplied with."""
    assert checked(run)["verdict"] == "identical"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics[0]["packs_digest"] = metrics[1]["packs_digest"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    report = checked(run)
    assert report["verdict"] == "not_comparable"
    (said,) = report["not_comparable"]["contradictions"]
    assert said.startswith(f"Step 1 multiplied with copies {metrics[1]['packs_digest']} of the weights")


def test_records_that_contradict_the_checkpoint(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().replace(report_digest(run, 0), "0" * 32)
    (run / "metrics.jsonl").write_text(lines)
    report = checked(run)
    assert report["verdict"] == "not_comparable"
    assert "checkpoint of step 1" in report["not_comparable"]["contradictions"][0]


@pytest.mark.parametrize("name", ["model/model.safetensors", "learner.safetensors"])
def test_a_checkpoint_that_is_not_as_it_was_saved_is_not_identical(run: Path, name: str) -> None:
    """The optimizer's state included, which enters no log-prob that is compared, but every later step of a resumed
    run; and of a step whose episodes were not saved."""
    folder = run / f"checkpoints/step_{STEPS:06d}"
    (folder / "learner.safetensors").write_bytes(bytes(100))
    manifest.write(folder, folder.name, (run / "config.yaml").read_text())
    assert checked(run)["verdict"] == "identical"  # the control
    flip_bit(folder / name)
    report = checked(run)
    assert (report["verdict"], report["num_unequal"]) == ("not_comparable", 0)
    assert f"{name} is damaged" in report["headline"] and "whole is step_000001" in report["headline"]
    assert report["rescored"]["episodes"] == 4 * STEPS, "the others are still compared"
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(run), "--fail-on", "mismatch"])


def test_checkpoints_that_changed_places_are_not_identical(run: Path) -> None:
    first, second = (run / f"checkpoints/step_{step:06d}" for step in (0, 1))
    first.rename(run / "aside")
    second.rename(first)
    (run / "aside").rename(second)
    report = checked(run)
    assert report["verdict"] == "not_comparable"
    assert ["was saved as step_00000" in one for one in report["not_comparable"]["contradictions"]] == [True, True]


def report_digest(run: Path, step: int) -> str:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[step])["weights_digest"]


def test_what_the_run_itself_counted_is_kept(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"mismatch/num_unequal": 3, "mismatch/k3": 0.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = checked(run)
    assert (report["verdict"], report["basis"], report["num_unequal"]) == ("different", "records", 3)
    assert report["headline"].startswith("By the run's own records, 3 of")
    assert report["rescored"]["num_unequal"] == 0


def test_a_run_that_stopped_because_bits_differ(run: Path) -> None:
    counts = {"mismatch/num_tokens": 280, "mismatch/num_unequal": 12, "mismatch/rows_unequal": 14}
    growth = {"title": "How the difference grows", "columns": ["op"], "rows": [["linear"]], "note": ""}
    found = {"first": {"name": "layers.0"}, "suspects": ["linear ran on torch"], "tables": [growth]}
    (run / "audit").mkdir()
    (run / "audit/difference.json").write_text(json.dumps({"step": 2, "mismatch": counts, **found}))
    (run / "summary.json").unlink()
    report = checked(run)
    assert (report["verdict"], report["num_unequal"], report["rescored"]["num_unequal"]) == ("different", 12, 0)
    assert report["headline"].startswith(
        "The run stopped at step 2: 12 of 280 sampled tokens and 14 whole rows differed."
    )
    (run / "audit/difference.json").write_text(json.dumps({"step": 1, "mismatch": counts, "tables": []}))
    report = checked(run)
    assert (report["verdict"], report["num_unequal"]) == ("identical", 0)
    assert "Step 1 was once refused, because bits differed, and taken later on." in report["gaps"]


def test_differences_of_a_run_with_sound_are_counted_as_such(tmp_path: Path) -> None:
    run = make(tmp_path, **SPEAKING)
    files = sorted((run / "episodes").iterdir())
    saved = [e for file in files for e in load_episodes(file)]
    count = sum(len(stream.chunk) for e in saved for stream in e.streams.values())

    def other_sound(e: Episode) -> Episode:
        assert e.voice is not None
        voice = replace(e.voice, logprob=flip(e.voice.logprob, 0))
        return replace(e, streams=dict(e.streams) | {"voice": voice})

    spoke = [(file, i) for file in files for i, e in enumerate(load_episodes(file)) if e.voice is not None]
    tamper(spoke[0][0], other_sound, which=[spoke[0][1]])
    report = checked(run)
    assert report["headline"].startswith(
        f"1 of {count:,} sampled tokens and chunks of sound differs, and 0 of {count:,}"
    )
    assert report["first_difference"]["token"] is None and report["diagnosis"]["first"] is None
    assert not any("could not be explained" in gap for gap in report["gaps"])


def test_without_a_checkpoint_nothing_of_its_step_is_claimed(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step_000001")
    report = checked(run)
    assert (report["verdict"], report["num_tokens"]) == ("identical", tokens(run, 0))
    assert report["gaps"] == [
        "Step 1: no checkpoint holds the weights that sampled its episodes; they were not re-scored."
    ]
    shutil.rmtree(run / "checkpoints")
    report = checked(run)
    assert (report["verdict"], report["basis"]) == ("nothing_compared", "records")
    assert report["headline"].startswith("Nothing could be re-scored: see the gaps. By the run's own records, 0 of")
    assert report["scope"].startswith("Nothing was re-scored now.")


def test_a_run_without_episodes_says_that_nothing_could_be_re_scored(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = "Identical · run small · Metronome audit", 'class="verdict identical"', "full-vocabulary</span> KL exactly 0"
    checked(run)
    assert all(part in (run / "audit/report.html").read_text() for part in full)  # the control
    shutil.rmtree(run / "episodes")
    report = checked(run)
    assert (report["verdict"], report["basis"], report["rescored"]["episodes"]) == ("nothing_compared", "records", 0)
    assert report["k1"] is report["k3"] is report["max_abs"] is None
    assert report["headline"].startswith(
        "Nothing could be re-scored: no episode was saved. By the run's own records, 0"
    )
    assert "KL" not in report["headline"] and "No episodes were saved" in report["gaps"][0]
    page = (run / "audit/report.html").read_text()
    assert not any(part in page for part in full)
    assert "Nothing compared · run small" in page and 'class="verdict nothing_compared"' in page
    main(["--run", str(run)])
    assert capsys.readouterr().out.startswith(
        "Audit: nothing compared. Nothing could be re-scored: no episode was saved. By the run's own records, 0 of"
    )
    with pytest.raises(SystemExit, match="3"):
        main(["--run", str(run), "--fail-on", "mismatch"])


def test_damaged_files_are_gaps(run: Path) -> None:
    first_file(run).write_bytes(first_file(run).read_bytes()[:1000])
    (run / "checkpoints/step_000001/model/model.safetensors").write_bytes(b"no")
    (run / "checkpoints/step_000001/manifest.json").unlink()  # a run of an older version
    (run / "summary.json").write_text("{")
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-20])
    report = checked(run)
    gaps = "\n".join(report["gaps"])
    assert "step_000000.rank_0.safetensors: cannot be read as a file of episodes" in gaps
    assert "manifest.json is missing" in gaps and "Without a manifest" in gaps and "step_000001." in gaps
    assert "summary.json is damaged" in gaps and "metrics.jsonl, line 2: not a whole record" in gaps
    assert (report["verdict"], report["rescored"]["episodes"], report["run"]["finished"]) == ("identical", 2, False)
    assert "1 of 2 steps; the run has not finished" in report["scope"]


def test_nothing_at_all_is_not_identical(run: Path) -> None:
    for name in ("episodes", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()
    report = checked(run)
    assert report["verdict"] == "not_comparable", "a summary that says that it finished, without a record"
    assert "records of 0 of its 2 steps" in report["headline"]
    (run / "summary.json").unlink()
    report = checked(run)
    assert (report["verdict"], report["basis"], report["num_tokens"]) == ("nothing_compared", "none", 0)
    assert "left no record" in report["headline"]


def test_a_recipe_of_another_version_is_a_gap(run: Path) -> None:
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "unheard_of: 1\n")
    report = checked(run)
    assert "cannot read the run's recipe" in report["gaps"][0] and report["basis"] == "records"


def test_re_scoring_may_be_bounded_and_says_so(run: Path) -> None:
    report = checked(run, at_most=4)
    assert report["rescored"]["episodes"] == 4 and [p["rescored"] for p in report["parts"]] == [2, 2]
    assert report["gaps"][0] == "Step 0: 2 of 4 saved episodes were not re-scored, to save time."
    assert "4 of 8 saved episodes" in report["scope"]
    assert checked(run, at_most=0)["verdict"] == "nothing_compared"
    with pytest.raises(ValueError, match="at_most is -1"):
        audit(run, -1)


def test_folders_that_are_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MetronomeError, match="no such folder"):
        audit(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetronomeError, match="not a run's folder"):
        audit(tmp_path / "empty")
    (run / "config.yaml").write_text("[")
    with pytest.raises(MetronomeError, match="not a recipe"):
        audit(run)


@pytest.mark.parametrize("how", ["--run", "--compare", "--matrix"])
def test_a_file_where_the_report_should_go_is_refused_before_the_work(
    run: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[str] = []
    for name in ("audit", "compare_runs"):
        monkeypatch.setattr(command, name, lambda *_, name=name: worked.append(name) or nothing)
    monkeypatch.setattr(matrix, "run", lambda *_: worked.append("matrix") or nothing)
    monkeypatch.setattr(matrix, "show", lambda *_: None)
    monkeypatch.setattr(command, "statement", lambda *_: "")
    nothing = SimpleNamespace(verdict=None, tables=None)
    given = {"--run": [], "--compare": [str(run)], "--matrix": ["--checkpoint", str(run / "checkpoints/step_000001")]}
    arguments = [how, *([] if how == "--matrix" else [str(run)]), *given[how]]
    main(arguments)
    assert len(worked) == 1, "the control"
    shutil.rmtree(run / "audit", ignore_errors=True)
    (run / "audit").write_text("kept")
    with pytest.raises(MetronomeError, match=r"audit.*; give "):
        main(arguments)
    assert len(worked) == 1 and (run / "audit").read_text() == "kept"


def test_exit_status(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--run", str(run), "--fail-on", "mismatch"])
    assert "Audit: identical. 0 of" in capsys.readouterr().out
    tamper(first_file(run), lambda e: with_text(e, logprob=flip(e.text.logprob, 0)))
    main(["--run", str(run)])
    with pytest.raises(SystemExit, match="1"):
        main(["--run", str(run), "--fail-on", "mismatch"])
    tamper(first_file(run), lambda e: replace(e, contract_id="other"))
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(run), "--fail-on", "mismatch"])


def test_tables_of_other_parts_are_shown(run: Path) -> None:
    table = {"title": "Matrix & co", "columns": ["what", "k3"], "rows": [["naive", 0.25]], "note": "here"}
    (run / "audit").mkdir()
    (run / "audit/matrix.json").write_text(json.dumps({"tables": [table]}))
    (run / "audit/difference.json").write_text(json.dumps({"tables": [{"title": "no counts"}]}))
    report = checked(run)
    assert "Matrix \\u0026 co" in (run / "audit/report.html").read_text()
    assert any("difference.json does not say at which step" in gap for gap in report["gaps"])
