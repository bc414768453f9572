"""A run's folder holds whole files only, whatever moment the run dies at."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kernels.errors import MetronomeError
from rl import folder as folder_module
from rl.folder import RunFolder


def record(step: int) -> dict[str, float | int | str]:
    return {"step": step, "weights_digest": f"{step:04x}", "reward/mean": 0.5 * step}


class Crash(Exception):
    """Stands for the process dying."""


def test_metrics_are_whole_after_every_append(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "seed: 0\n")
    for step in range(4):
        run.append_metrics(record(step))
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [record(s) for s in range(step + 1)]
    assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    run = RunFolder.create(tmp_path, "a", "seed: 0\n")
    run.append_metrics(record(0))
    before = (run.path / "metrics.jsonl").read_bytes()

    def crash(*_: object) -> None:
        raise Crash

    monkeypatch.setattr(os if call == "fsync" else Path, call, crash)
    with pytest.raises(Crash):
        run.append_metrics(record(1))
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_half_a_last_line_is_left_out(tmp_path: Path) -> None:
    """What another program's crash leaves; of two lines, only one without its newline can be half a line."""
    run = RunFolder.create(tmp_path, "a", "seed: 0\n")
    run.append_metrics(record(0))
    run.append_metrics(record(1))
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut, kept in ((0, [0, 1]), (1, [0, 1]), (2, [0]), (7, [0]), (len(whole) - 1, [])):
        path.write_bytes(whole[: len(whole) - cut])
        assert [r["step"] for r in RunFolder.reopen(tmp_path, "a", "seed: 0\n").metrics()] == kept, cut
    path.write_bytes(whole[:-7])
    again = RunFolder.reopen(tmp_path, "a", "seed: 0\n")
    again.append_metrics(record(1))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"half", "line 2: is not JSON"),
        (b"[]", "line 2: must be a JSON object"),
        (b"{}", "line 2: not a metric record with a step after step 0"),
        (b'{"step": true}', "line 2: not a metric record with a step"),
        (b'{"step": 1.0}', "line 2: not a metric record with a step"),
        (b'{"step": 0}', "line 2: not a metric record with a step"),
        (b'{"step": -1}', "line 2: not a metric record with a step"),
        (b'{"step": 1, "a": NaN}', "line 2: .*NaN is no number"),
        (b'{"step": 1, "step": 1}', "line 2: .*the key 'step' comes twice"),
        (b'{"step": 1%s}' % (b"0" * 400), "line 2: .*more than 64 bits"),
        (b'{"step": 1, "a": "\xe9"}', "line 2: is not UTF-8"),
        (b"\0" * 100, "line 2: holds null characters"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    run = RunFolder.create(tmp_path, "a", "seed: 0\n")
    run.append_metrics(record(0))
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b'\n{"step": 2}\n')
    with pytest.raises(MetronomeError, match=f"metrics.jsonl, {says}.*restore or remove"):
        RunFolder.reopen(tmp_path, "a", "seed: 0\n")
    path.write_bytes(path.read_bytes().replace(line, b'{"step": 1, "a": "\xe2\x80\xa8"}\r'))
    assert [r["step"] for r in RunFolder.reopen(tmp_path, "a", "seed: 0\n").metrics()] == [0, 1, 2]


def test_steps_must_grow(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    run.append_metrics(record(3))
    with pytest.raises(ValueError, match="step 3 after step 3"):
        run.append_metrics(record(3))


def test_values_json_has_no_words_for_are_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    with pytest.raises(ValueError, match="JSON compliant"):
        run.append_metrics({"step": 0, "reward/mean": float("nan")})
    assert run.metrics() == [] and not (run.path / "metrics.jsonl").exists()


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "seed: 0\n")
    RunFolder.create(tmp_path, "a", "seed: 1\n")  # nothing but a recipe there: a run that never began
    run.append_metrics(record(0))
    with pytest.raises(MetronomeError, match=r"already holds results of a run .*--resume"):
        RunFolder.create(tmp_path, "a", "seed: 2\n")
    assert (run.path / "config.yaml").read_text() == "seed: 1\n"
    assert json.loads((run.path / "metrics.jsonl").read_text()) == record(0)


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "a b"])
def test_names_that_are_no_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(MetronomeError, match="cannot name a run's folder"):
        RunFolder.create(tmp_path, name, "")
    assert list(tmp_path.iterdir()) == []


def test_runs_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(MetronomeError, match="is a file"):
        RunFolder.create(tmp_path / "runs", "a", "")


def test_reopening_needs_the_same_recipe(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "a", "seed: 0\nsteps: 5\n").append_metrics(record(0))
    assert RunFolder.reopen(tmp_path, "a", "seed: 0\nsteps: 5\n").metrics() == [record(0)]
    with pytest.raises(MetronomeError, match=r"Changed: -seed: 0; \+seed: 1\."):
        RunFolder.reopen(tmp_path, "a", "seed: 1\nsteps: 5\n")
    with pytest.raises(MetronomeError, match="no run to resume"):
        RunFolder.reopen(tmp_path, "b", "seed: 0\n")


def test_resuming_drops_the_steps_to_be_taken_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    for step in range(5):
        run.append_metrics(record(step))
    again = RunFolder.reopen(tmp_path, "a", "")
    again.keep_metrics_before(3)
    again.append_metrics(record(3))
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_the_newest_finished_checkpoint_counts(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    with pytest.raises(MetronomeError, match="no finished checkpoint"):
        run.latest_checkpoint()
    for step in (5, 100):
        with run.checkpoint(step) as path:
            (path / "weights").write_text(str(step))
    with pytest.raises(Crash), run.checkpoint(200) as path:
        (path / "weights").write_text("half")
        raise Crash
    step, path = run.latest_checkpoint()
    assert (step, path.name, (path / "weights").read_text()) == (100, "step_000100", "100")


def test_an_unfinished_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    with pytest.raises(Crash), run.checkpoint(5) as path:
        (path / "stale").write_text("")
        raise Crash
    with run.checkpoint(5) as path:
        (path / "weights").write_text("new")
    assert sorted(p.name for p in run.latest_checkpoint()[1].iterdir()) == ["manifest.json", "weights"]


def test_a_checkpoint_taken_again_replaces_the_old_one_only_when_finished(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    for text in ("old", "new"):
        with run.checkpoint(5) as path:
            if text == "new":
                assert (run.latest_checkpoint()[1] / "weights").read_text() == "old"
            (path / "weights").write_text(text)
    assert (run.latest_checkpoint()[1] / "weights").read_text() == "new"
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step_000005"]


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module.ranks, "rank", lambda: 1)
    run = RunFolder.create(tmp_path, "a", "seed: 0\n")
    run.append_metrics(record(0))
    assert list(tmp_path.iterdir()) == [] and run.metrics() == [record(0)]
