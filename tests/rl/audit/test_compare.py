"""Two runs: one and the same, bit for bit, or where they part; or not to be compared."""

from __future__ import annotations

import json
import math
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from kernels.errors import MetronomeError
from model.senses.video import Frames
from model.weights import manifest
from rl.audit.command import main
from rl.audit.compare import _fields, compare_runs
from rl.audit.document import plain
from rl.audit.paired import PairedEpisodes, Saved
from rl.audit.schema import schema
from rollout.record.episode import load_episodes, save_episodes
from tests.rl.audit.runs import changed, first_file, flip, tamper
from tests.support.episodes import some_episode, with_text


@pytest.fixture
def other(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "other"))


def compared(a: Path, b: Path) -> dict[str, Any]:
    report = plain(compare_runs(a, b, a / "audit/compare"))
    jsonschema.validate(report, schema())
    assert json.loads((a / "audit/compare/report.json").read_text()) == report
    return dict(report)


def test_a_copy_is_the_same_run_however_many_processes_sampled(run: Path, other: Path) -> None:
    files = sorted((other / "episodes").glob("step_000000*"))
    episodes = [e for file in files for e in load_episodes(file)]
    files[1].unlink()
    save_episodes(files[0], episodes)
    metrics = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(metrics.replace('"time/step_s": 1.8', '"time/step_s": 9.9'))
    report = compared(run, other)
    assert (report["verdict"], report["steps_compared"], report["episodes_compared"]) == ("identical", 2, 8)
    assert report["num_tokens"] > 0 == report["num_unequal"] == report["rows_unequal"] == report["episodes_unequal"]
    assert report["recipe"] == [] and report["first_step"] is None
    assert report["headline"] == "One run, bit for bit: 2 steps and 8 saved episodes are equal."


def test_the_first_step_that_differs(run: Path, other: Path) -> None:
    lines = (other / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[1]) | {"weights_digest": "0" * 32, "policy/entropy": 0.2}
    (other / "metrics.jsonl").write_text(lines[0] + "\n" + json.dumps(last) + "\n")
    report = compared(run, other)
    assert (report["verdict"], report["steps_unequal"]) == ("different", 1)
    assert report["first_step"] == {"step": 1, "fields": ["weights_digest", "policy/entropy"]}


def test_one_bit_of_an_episode(run: Path, other: Path) -> None:
    tamper(first_file(other), lambda e: with_text(e, logprob=flip(e.text.logprob, 3)))
    report = compared(run, other)
    assert (report["verdict"], report["num_unequal"], report["rows_unequal"]) == ("different", 1, 0)
    assert report["episode_fields"] == {"text.logprob": 1}


def test_log_probs_that_are_not_finite_equal_nothing(run: Path, other: Path) -> None:
    """Not even the same NaN of a copy. The control, finite ones, is the test above of a copy."""
    for one in (run, other):
        tamper(first_file(one), lambda e: with_text(e, logprob=changed(e.text.logprob, 3, math.nan)))
    assert first_file(run).read_bytes() == first_file(other).read_bytes()
    report = compared(run, other)
    assert (report["verdict"], report["num_unequal"], report["rows_unequal"]) == ("different", 1, 0)
    assert report["episode_fields"] == {"text.logprob": 1}


def test_other_tokens_are_no_mismatch(run: Path, other: Path) -> None:
    tamper(first_file(other), lambda e: with_text(replace(e, tokens=changed(e.tokens, 9, 0)), logprob=-e.text.logprob))
    report = compared(run, other)
    assert (report["verdict"], report["num_unequal"]) == ("different", 0)
    assert report["episode_fields"] == {"tokens": 1, "text.logprob": 1}


def test_other_contract(run: Path, other: Path) -> None:
    environment = json.loads((other / "environment.json").read_text())
    environment["contract_id"], environment["contract"]["backend"] = "f" * 16, "other"
    (other / "environment.json").write_text(json.dumps(environment))
    report = compared(run, other)
    assert (report["verdict"], report["steps_compared"], report["num_tokens"]) == ("not_comparable", 0, 0)
    assert "other" in report["reasons"][0]
    (other / "environment.json").unlink()
    assert compared(run, other)["verdict"] == "not_comparable"


def shorten(run: Path, keep: int = 1, summary: bool = False) -> None:
    """Cuts a run's records; without its summary it has not finished."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:keep]))
    if not summary:
        (run / "summary.json").unlink()


def test_a_shorter_run_is_equal_as_far_as_both_go(
    run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten(other)
    report = compared(run, other)
    assert (report["verdict"], report["whole"], report["steps_compared"]) == ("identical", False, 1)
    assert report["only_one"] == ["A has 1 step more, from step 1 on.", "B has not finished."]
    says = "Equal as far as both go: 1 step and 8 saved episodes are equal. A has 1 step more, from step 1 on."
    assert report["headline"].startswith(says) and "One run" not in report["headline"]
    main(["--compare", str(run), str(other), "--out", str(tmp_path / "out"), "--fail-on", "mismatch"])
    assert capsys.readouterr().out.startswith("Audit: equal as far as both go: 1 step")
    page = (tmp_path / "out/report.html").read_text()
    assert "Equal as far as both go · runs" in page and 'class="verdict identical partial"' in page


def test_a_run_whose_last_record_is_gone_and_whose_summary_names_other_weights(run: Path, other: Path) -> None:
    for keep in (1, 0):  # however many are missing
        shorten(other, keep, summary=True)
        summary = json.loads((other / "summary.json").read_text())
        (other / "summary.json").write_text(json.dumps(summary | {"weights_digest": "0" * 32}))
        report = compared(run, other)
        assert (report["verdict"], report["final_weights_equal"]) == ("different", False)
        assert "The summaries name other final weights." in report["headline"]
        with pytest.raises(SystemExit, match="1"):
            main(["--compare", str(run), str(other), "--fail-on", "mismatch"])


def test_a_finished_run_that_lacks_a_record_contradicts_itself(run: Path, other: Path) -> None:
    shorten(other, summary=True)
    report = compared(run, other)
    assert (report["verdict"], report["final_weights_equal"]) == ("not_comparable", True)
    assert report["headline"].startswith("Not comparable. B contradicts itself. ")


def test_nothing_in_common_is_nothing_compared(run: Path, other: Path) -> None:
    (other / "metrics.jsonl").unlink()
    (other / "summary.json").unlink()
    for file in (other / "episodes").iterdir():
        file.write_bytes(b"no")
    for gone in (False, True):
        if gone:
            shutil.rmtree(other / "episodes")
        report = compared(run, other)
        assert report["verdict"] == "nothing_compared" and report["headline"].startswith("Nothing compared: the runs")
        with pytest.raises(SystemExit, match="3"):
            main(["--compare", str(run), str(other), "--fail-on", "mismatch"])


def test_a_run_compared_with_itself_is_nothing_compared(run: Path, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(run)
    for same, unknown in ((run, False), (tmp_path / "again", False), (run, True)):
        if unknown:
            (run / "environment.json").unlink()  # of two folders it makes the contract a reason: test_other_contract
        report = compared(run, same)
        assert (report["verdict"], report["steps_compared"], report["reasons"]) == ("nothing_compared", 0, [])
        assert "A and B are one folder" in report["headline"]


def test_what_could_not_be_used_is_no_part_of_one_run(run: Path, other: Path) -> None:
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join([lines[0], lines[0].replace("0.5", "0.7"), lines[1]]))
    (other / "summary.json").write_text('{"wall_s": 1.0}')
    report = compared(run, other)
    assert (report["verdict"], report["whole"]) == ("identical", False)
    assert report["only_one"] == ["B's summary names no final weights.", "1 line of B's records could not be used."]


def test_a_folder_with_a_recipe_alone_is_nothing_compared(run: Path, other: Path) -> None:
    for one in other.iterdir():
        if one.name != "config.yaml":
            shutil.rmtree(one) if one.is_dir() else one.unlink()
    for a, b in ((run, other), (other, run)):
        assert compared(a, b)["verdict"] == "nothing_compared"


def test_saved_episodes_that_only_one_run_has(run: Path, other: Path) -> None:
    first_file(other).unlink()  # half of a step: another set of episodes
    report = compared(run, other)
    assert (report["verdict"], report["episode_fields"]) == ("different", {"name": 2})
    shutil.rmtree(other / "episodes")  # all: nothing to say of them
    report = compared(run, other)
    assert (report["verdict"], report["whole"], report["episodes_compared"]) == ("identical", False, 0)
    assert report["only_one"] == ["A has 8 saved episodes of steps of which the other has none."]


def test_only_a_name_differs_or_an_episode_comes_twice(run: Path, other: Path) -> None:
    tamper(first_file(other), lambda e: replace(e, rollout=7))
    report = compared(run, other)
    assert (report["verdict"], report["episode_fields"]) == ("different", {"name": 2})
    one, two = load_episodes(first_file(run))
    save_episodes(first_file(other), [one, two, deepcopy(two)])
    assert compared(run, other)["episode_fields"] == {"name": 1}


@pytest.mark.parametrize(
    ("a", "b", "differs"),
    [
        (1.5, 1.5, False), (0.0, -0.0, True), (1, 1.0, True), (1, True, True), (0.5, None, True), ([1], [1], False),
        (math.nan, math.nan, False), (math.nan, 0.0, True), (1e-300, 1.1e-300, True),
    ],
)  # fmt: skip
def test_fields_of_records_are_compared_in_bits(a: Any, b: Any, differs: bool) -> None:
    assert _fields({"x": a, "time/s": 1}, {"x": b, "time/s": 2}) == (["x"] if differs else [])


def test_a_field_that_only_one_record_has_is_a_difference(run: Path, other: Path) -> None:
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    del lines[0]["packs_digest"]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for a, b, label in ((run, other, "A"), (other, run, "B")):
        report = compared(a, b)
        assert (report["verdict"], report["first_step"]["fields"]) == ("different", [f"packs_digest (only {label})"])


def test_facts_and_actions_are_compared(run: Path, other: Path) -> None:
    tamper(first_file(other), lambda e: replace(e, facts={**e.facts, "chunks": -1}))
    tamper(first_file(other), lambda e: replace(e, actions=e.actions[1:]), which=[1])
    assert compared(run, other)["episode_fields"] == {"facts": 1, "actions": 1}


def test_checkpoints_that_changed_places(run: Path, other: Path) -> None:
    report = compared(run, other)  # the control
    assert (report["verdict"], report["checkpoints_compared"]) == ("identical", 3)
    one, two = (other / f"checkpoints/step_00000{n}" for n in (0, 1))
    one.rename(other / "aside")
    two.rename(one)
    (other / "aside").rename(two)
    report = compared(run, other)
    assert report["verdict"] == "not_comparable" and report["reasons"][0].startswith("B contradicts itself. The check")
    for name in ("step_000000", "step_000001"):
        manifest.write(other / "checkpoints" / name, name, (other / "config.yaml").read_text())
    report = compared(run, other)
    assert (report["verdict"], report["checkpoints_unequal"]) == ("different", 2)
    assert "checkpoints of step 0 hold other weights" in report["headline"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("gone", "A has 3 checkpoints, which the other lacks: step_000000, step_000001, step_000002."),
        ("no manifest", "Of B, 1 checkpoint without a manifest may be damaged: step_000001."),
        ("unreadable", "Of B, 1 checkpoint cannot be read: step_000001."),
    ],
)
def test_checkpoints_that_one_run_lacks_are_named(run: Path, other: Path, damage: str, says: str) -> None:
    assert compared(run, other)["whole"], "the control"
    folder = other / "checkpoints/step_000001"
    if damage == "gone":
        shutil.rmtree(other / "checkpoints")
    else:
        (folder / "manifest.json").unlink()
        if damage == "unreadable":
            (folder / "model/model.safetensors").write_bytes(b"")
    report = compared(run, other)
    assert (report["verdict"], report["whole"]) == ("identical", False)
    assert says in report["only_one"] and says in report["headline"]
    assert report["headline"].startswith("Equal as far as both go")


def test_records_of_another_run_contradict_the_checkpoints(run: Path, other: Path) -> None:
    """The records of A lie in B, whose weights were others."""
    for gone in (run / "checkpoints", other / "episodes"):
        shutil.rmtree(gone)
    folder = other / "checkpoints/step_000001"
    shutil.rmtree(folder / "model")
    shutil.copytree(other / "checkpoints/step_000002/model", folder / "model")
    manifest.write(folder, folder.name, (other / "config.yaml").read_text())
    report = compared(run, other)
    assert report["verdict"] == "not_comparable"
    assert "B contradicts itself. The checkpoint of step 1 holds weights" in report["headline"]


@pytest.mark.parametrize(("field", "decides"), [("groups", True), ("checkpoint_every", False)])
def test_a_recipe_that_decides_bits_and_equal_records(run: Path, other: Path, field: str, decides: bool) -> None:
    shutil.rmtree(other / "checkpoints")  # whose manifests name the recipe
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(rf"(  {field}:) \d+", r"\1 3", text))
    report = compared(run, other)
    assert [one["field"] for one in report["recipe"]] == [f"rl.{field}"]
    assert report["verdict"] == ("not_comparable" if decides else "identical")
    assert (f"The recipes differ in rl.{field}, which decides bits" in report["headline"]) == decides


def test_the_command(run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--compare", str(run), str(other), "--fail-on", "mismatch"])
    assert "One run, bit for bit" in capsys.readouterr().out
    assert (run / "audit/compare_other/report.html").is_file()
    tamper(first_file(other), lambda e: with_text(e, logprob=flip(e.text.logprob, 3)))
    with pytest.raises(SystemExit, match="1"):
        main(["--compare", str(run), str(other), "--out", str(tmp_path / "out"), "--fail-on", "mismatch"])
    assert (tmp_path / "out/report.json").is_file()
    with pytest.raises(MetronomeError, match="no such folder"):
        main(["--compare", str(run), str(tmp_path / "nothing")])
    with pytest.raises(MetronomeError, match="go together"):
        main(["--checkpoint", str(run)])


def test_a_stream_that_only_one_run_has_is_a_difference_both_ways(run: Path, other: Path) -> None:
    tamper(first_file(other), lambda e: replace(e, streams={**e.streams, "other": deepcopy(e.text)}))
    for a, b in ((run, other), (other, run)):
        report = compared(a, b)
        assert (report["verdict"], report["episodes_unequal"]) == ("different", 1)
        assert report["episode_fields"].keys() >= {"other.logprob", "other.digest"}


def test_a_comparison_is_not_written_over_what_a_run_has(run: Path, other: Path, tmp_path: Path) -> None:
    report = other / "audit" / "report.json"
    report.parent.mkdir(exist_ok=True)
    report.write_text("{}")
    for place, says in (("audit", "own report is there"), ("checkpoints/x", "is a part of"), ("episodes", "is a part")):
        for to in (other / place, tmp_path / "other" / "." / place):
            with pytest.raises((MetronomeError, SystemExit), match=f"--out.*{says}"):
                main(["--compare", str(run), str(other), "--out", str(to)])
    assert report.read_text() == "{}" and not (other / "checkpoints" / "x").exists()
    for place in ("audit/compare_run", "../audit"):
        main(["--compare", str(run), str(other), "--out", str(other / place)])
        assert (other / place / "report.json").is_file()


def test_what_was_seen_and_read_is_compared_and_another_input_proves_nothing_about_bits() -> None:
    seen = replace(some_episode(), frames=Frames(torch.zeros(3, dtype=torch.uint8), torch.tensor([[0, 1, 1, 1]])))
    other_bits = with_text(seen, logprob=flip(seen.text.logprob, 0))
    brighter = replace(seen.frames, pixels=torch.tensor([0, 1, 0], dtype=torch.uint8))
    for one, fields, tokens in (
        (seen, set(), len(seen.text.logprob)),
        (other_bits, {"text.logprob"}, len(seen.text.logprob)),
        (replace(other_bits, frames=brighter), {"text.logprob", "frames.pixels"}, 0),
        (replace(other_bits, events={0: ("four",)}), {"text.logprob", "events"}, 0),
    ):
        pairs = PairedEpisodes()
        pairs.add(Saved({"a": seen}, 0), Saved({"a": one}, 0), 0)
        assert set(pairs.fields) == fields and pairs.unequal == bool(fields)
        assert (pairs.tokens, pairs.tokens_unequal) == (tokens, int(bool(tokens and fields)))
