"""A run's folder holds whole files only, whatever moment the run dies at."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from kernels.errors import MetronomeError
from model.program.runs import RESUMED
from rl import folder as folder_module
from rl.folder import Note, RunFolder, notes


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
        assert [r["step"] for r in RunFolder.reopen(tmp_path, "a").metrics()] == kept, cut
    path.write_bytes(whole[:-7])
    again = RunFolder.reopen(tmp_path, "a")
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
    with pytest.raises(MetronomeError, match=f"metrics.jsonl, {says}.*restore the file, or cut it before this line"):
        RunFolder.reopen(tmp_path, "a")
    path.write_bytes(path.read_bytes().replace(line, b'{"step": 1, "a": "\xe2\x80\xa8"}\r'))
    assert [r["step"] for r in RunFolder.reopen(tmp_path, "a").metrics()] == [0, 1, 2]


def test_steps_must_grow(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    run.append_metrics(record(3))
    with pytest.raises(ValueError, match="step 3 after step 3"):
        run.append_metrics(record(3))


def test_values_json_has_no_words_for_are_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    with pytest.raises(MetronomeError, match="reward/mean is nan"):
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


@pytest.mark.parametrize("result", ["summary.json", "checkpoints", "tracking", "model", "resumed.jsonl"])
def test_no_run_begins_among_what_another_left(tmp_path: Path, result: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.log").write_text("")  # the control: what a user has put there does not matter
    RunFolder.create(tmp_path, "a", "")
    (tmp_path / "a" / result).write_text("")
    with pytest.raises(MetronomeError, match=f"already holds results of a run \\({result}"):
        RunFolder.create(tmp_path, "a", "")


def test_reopening_gives_the_saved_recipe(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "a", "seed: 0\n").append_metrics(record(0))
    again = RunFolder.reopen(tmp_path, "a")
    assert (again.recipe, again.metrics()) == ("seed: 0\n", [record(0)])
    with pytest.raises(MetronomeError, match="no run to resume"):
        RunFolder.reopen(tmp_path, "b")


def test_recipes_and_summaries_before_are_kept(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "steps: 4\n")
    for step in range(4):
        run.append_metrics(record(step))
    with run.checkpoint(4):
        pass
    run.write_json("summary.json", {"weights_digest": "ab"})
    for steps in (6, 8):
        again = RunFolder.reopen(tmp_path, "a")
        assert again.checkpoint_to_resume() == (4, run.checkpoint_path(4))  # of a recipe that the run had
        again.go_on(f"steps: {steps}\n", again.recipe, 4, {"steps": (steps - 2, steps)})
    assert RunFolder.reopen(tmp_path, "a").recipes() == ("steps: 8\n", "steps: 4\n", "steps: 6\n")
    assert notes(run.path) == [
        Note(4, {"steps": (4, 6)}, ("steps: 4\n",), {"weights_digest": "ab"}),
        Note(4, {"steps": (6, 8)}, ("steps: 6\n",), None),
    ]
    assert not (run.path / "summary.json").exists(), "it is not finished"
    (run.path / RESUMED).unlink()
    with pytest.raises(MetronomeError, match="saved by a run of another recipe"):
        RunFolder.reopen(tmp_path, "a").checkpoint_to_resume()


def test_going_on_with_the_same_recipe_writes_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "name: a\nsteps: 4\n")
    run.go_on("steps: 4  # as before\nname: b\n", run.recipe, 2, {})
    assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml"]
    run.go_on("steps: 5\nname: b\n", run.recipe, None, {})  # no checkpoint yet: nothing was done under another one
    assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml"]
    assert (run.path / "config.yaml").read_text() == "steps: 5\nname: b\n"


def test_records_without_a_checkpoint_do_not_begin_anew(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    assert run.checkpoint_to_resume() is None
    run.append_metrics(record(0))
    with pytest.raises(MetronomeError, match="holds records of a run, but no finished checkpoint"):
        run.checkpoint_to_resume()


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (
            [],
            "the record of step 0 is missing, and 4 steps are finished.* the checkpoints after step_000000 away",
        ),
        ([0], "the record of step 1 is missing, .*after step_000000 away"),
        ([0, 1, 3, 4], "the record of step 2 is missing, .*after step_000002 away"),
        ([1, 2, 3], "the record of step 0 is missing, "),
        ([0, 1, 2], "the record of step 3 is missing, "),
    ],
)
def test_a_checkpoint_needs_the_records_before_it(tmp_path: Path, kept: list[int], says: str) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    for step in (0, 2, 4):
        with run.checkpoint(step):
            pass
    for step in kept:
        run.append_metrics(record(step))
    with pytest.raises(MetronomeError, match=rf"metrics\.jsonl: {says}") as error:
        run.checkpoint_to_resume()
    assert "\n" not in str(error.value)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(record(step)) + "\n" for step in range(6)))
    assert RunFolder.reopen(tmp_path, "a").checkpoint_to_resume() == (4, run.checkpoint_path(4))  # the control


def test_episodes_without_a_checkpoint_do_not_begin_anew(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    (run.path / "episodes").mkdir()
    assert run.checkpoint_to_resume() is None
    (run.path / "episodes" / "step_000000.rank_0.safetensors").touch()
    with pytest.raises(MetronomeError, match="holds records of a run, but no finished checkpoint"):
        run.checkpoint_to_resume()


def test_a_folder_that_was_moved_away_is_not_made_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    run.append_metrics(record(0))
    run.path.rename(tmp_path / "b")
    for write in (lambda: run.append_metrics(record(1)), lambda: run.write_json("summary.json", {}), run.check):
        with pytest.raises(MetronomeError, match=r"a was moved or deleted while the run wrote into it") as error:
            write()
        assert "\n" not in str(error.value)
    with pytest.raises(MetronomeError, match="moved or deleted"), run.checkpoint(1):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert RunFolder.reopen(tmp_path, "b").metrics() == [record(0)]


def test_what_the_disk_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    run.append_metrics(record(0))
    with run.checkpoint(1) as path:
        (path / "weights").write_text("1")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(MetronomeError, match=r"step_000002: No space left on device.*--resume"):
        with run.checkpoint(2):
            raise full
    for error in (full, OSError(errno.EROFS, os.strerror(errno.EROFS))):
        monkeypatch.setattr(os, "fsync", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(MetronomeError, match=rf"metrics.jsonl: {error.strerror}.*--resume"):
            run.append_metrics(record(1))
    monkeypatch.undo()
    again = RunFolder.reopen(tmp_path, "a")
    assert again.metrics() == [record(0)] and again.checkpoint_to_resume() == (1, run.checkpoint_path(1))


def test_resuming_drops_the_steps_to_be_taken_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    for step in range(5):
        run.append_metrics(record(step))
    episodes = [run.path / "episodes" / f"step_{s:06d}.rank_{r}.safetensors" for s in range(5) for r in (0, 1)]
    for path in (*episodes, episodes[0].with_name("step_000004.txt")):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    again = RunFolder.reopen(tmp_path, "a")
    again.keep_before(5)
    assert len(list(episodes[0].parent.iterdir())) == 11, "the control: nothing is taken again"
    again.keep_before(3)
    assert sorted(episodes[0].parent.iterdir()) == [*episodes[:6], episodes[0].with_name("step_000004.txt")]
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
    left = run.checkpoint_path(5).with_name(".step_000005.partial")  # by a process that was killed
    left.mkdir(parents=True)
    (left / "stale").write_text("")
    with run.checkpoint(5) as path:
        assert path == left
        (path / "weights").write_text("new")
    assert sorted(p.name for p in run.latest_checkpoint()[1].iterdir()) == ["manifest.json", "weights"]


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "a", "")
    for step in range(5):
        run.append_metrics(record(step))
    with run.checkpoint(5) as path:
        (path / "weights").write_text("old")
    for step in (5, 10):
        with pytest.raises(MetronomeError) as error, run.checkpoint(step) as path:
            (path / "weights").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert str(error.value).startswith(f"{run.checkpoint_path(step)}: No space left on device")
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step_000005"]
    assert (run.checkpoint_to_resume()[1] / "weights").read_text() == "old"


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
