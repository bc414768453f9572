"""Two runs: one and the same, bit for bit, or where they part; or not to be compared."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kernels.errors import MetronomeError
from rl.audit.command import main
from rl.audit.compare import compare_runs
from rl.audit.document import to_json
from rl.audit.schema import schema
from rollout.record.episode import load_episodes, save_episodes
from tests.rl.audit.runs import changed, first_file, flip, tamper
from tests.support.episodes import with_text


@pytest.fixture
def other(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "other"))


def compared(a: Path, b: Path) -> dict[str, Any]:
    report = to_json(compare_runs(a, b, a / "audit/compare"))
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


def test_a_shorter_run_is_compared_as_far_as_it_goes(run: Path, other: Path) -> None:
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text(lines[0])
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("groups: 2", "groups: 3"))
    report = compared(run, other)
    assert (report["verdict"], report["steps_compared"]) == ("identical", 1)
    assert "Not compared: 1 steps of A alone" in report["scope"]
    assert report["recipe"] == [{"field": "rl.groups", "a": "2", "b": "3"}]
    (other / "metrics.jsonl").unlink()
    shutil.rmtree(other / "episodes")
    assert compared(run, other)["verdict"] == "not_comparable"


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
    tamper(first_file(other), lambda e: replace(e, streams={**e.streams, "voice": deepcopy(e.text)}))
    for a, b in ((run, other), (other, run)):
        report = compared(a, b)
        assert (report["verdict"], report["episodes_unequal"]) == ("different", 1)
        assert report["episode_fields"].keys() >= {"voice.logprob", "voice.digest"}
