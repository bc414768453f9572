"""A run's folder on disk. Whenever a run crashes, each file in it is complete or absent.

    runs/<name>/config.yaml, environment.json, metrics.jsonl, summary.json, checkpoints/step_000010/, episodes/, audit/

Only the first process writes plain files; all processes write into a checkpoint's folder. Knows names and bytes, not
what they mean. `metrics.jsonl` is rewritten for each record: a run has hundreds of records of a few hundred bytes, and
so no reader and no crash ever meets half a line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.program.files import write_whole
from model.program.reading import UnreadableError, lines, parse_line, read_bytes, read_text
from model.weights import manifest
from rl.learner import ranks

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STEP = re.compile(r"step_(\d{6,})")


class RunFolder:
    """Owns ``path`` and the metric records written so far. Use `create` or `reopen`."""

    def __init__(self, path: Path, metrics: list[bytes], recipe: str = "") -> None:
        self.path = path
        self._recipe = recipe  # config.yaml
        self._metrics = metrics  # encoded lines, each with its newline

    @staticmethod
    def create(runs: Path, name: str, config: str) -> RunFolder:
        """Makes a folder with config.yaml, the resolved recipe ``config``. Raises MetronomeError when ``name`` cannot
        name a folder, or a folder of that name holds more than a config.yaml."""
        path = _locate(runs, name)
        taken = [p for p in (path / "metrics.jsonl", path / "summary.json", path / "checkpoints") if p.exists()]
        if taken:
            raise MetronomeError(
                f"{path} already holds results of a run ({taken[0].name}); go on with it by --resume, or choose "
                "another --name, or move the folder away"
            )
        folder = RunFolder(path, [], config)
        ranks.gather(None)  # all look before the first one writes
        folder.write_text("config.yaml", config)
        return folder

    @staticmethod
    def reopen(runs: Path, name: str, config: str) -> RunFolder:
        """The folder of an interrupted run. Raises MetronomeError when there is none or its recipe is another one."""
        path = _locate(runs, name)
        saved = path / "config.yaml"
        if not saved.is_file():
            raise MetronomeError(f"{path} holds no run to resume (no config.yaml); start without --resume")
        before = read_text(saved)
        if before != config:
            changed = [
                line for line in difflib.unified_diff(before.splitlines(), config.splitlines(), lineterm="", n=0)
                if line[:1] in "+-" and line[:3] not in ("+++", "---")
            ]  # fmt: skip
            raise MetronomeError(
                f"{saved} is the recipe of another run; resuming needs the same one. "
                f"Changed: {'; '.join(changed[:6])}. Give the saved values, or start a new run under another --name"
            )
        return RunFolder(path, _read_lines(path / "metrics.jsonl"), config)

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Writes a file, in the first process only, and returns its path."""
        path = self.path / name
        if ranks.rank() == 0:
            write_whole(path, data)
        return path

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Raises ValueError for NaN and infinities, which JSON does not have."""
        return self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def append_metrics(self, record: Mapping[str, float | int | str]) -> None:
        """Adds one record. Raises ValueError unless its ``step`` is larger than that of the record before."""
        last = _step(self._metrics[-1]) if self._metrics else -1
        if int(record["step"]) <= last:
            raise ValueError(f"metrics: step {record['step']} after step {last}")
        self._metrics.append(json.dumps(dict(record), allow_nan=False).encode() + b"\n")
        self.write_bytes("metrics.jsonl", b"".join(self._metrics))

    def metrics(self) -> list[dict[str, Any]]:
        """The records so far, one for each step."""
        return [parse_line(line, "metrics.jsonl") for line in self._metrics]

    def keep_metrics_before(self, step: int) -> None:
        """Drops records of steps that a resumed run will take again."""
        kept = [line for line in self._metrics if _step(line) < step]
        if len(kept) < len(self._metrics):
            self._metrics = kept
            self.write_bytes("metrics.jsonl", b"".join(kept))

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Gives a temporary folder for all processes to fill. When the block ends without an error in any of them, it
        becomes checkpoints/step_NNNNNN, with a manifest. ``step``: number of finished steps, at which a resumed run
        goes on."""
        final = self.checkpoint_path(step)
        partial, old = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
        if ranks.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.gather(None)
        yield partial
        ranks.gather(None)
        if ranks.rank() == 0:
            manifest.write(partial, final.name, self._recipe)
            _flush(partial)
            if final.exists():
                final.rename(old)
            partial.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        ranks.gather(None)

    def checkpoint_path(self, step: int) -> Path:
        """The path of the checkpoint after ``step`` finished steps, whether or not it exists."""
        return self.path / "checkpoints" / f"step_{step:06d}"

    def latest_checkpoint(self) -> tuple[int, Path]:
        """(finished steps, folder) of the newest finished checkpoint; raises MetronomeError when there is none."""
        parent = self.path / "checkpoints"
        finished = [(int(m[1]), p) for p in parent.glob("step_*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
        if not finished:
            raise MetronomeError(f"{parent} holds no finished checkpoint to resume from; start under another --name")
        return max(finished)

    def checkpoint_to_resume(self) -> tuple[int, Path]:
        """The same, after comparing every file with the manifest. Raises CheckpointError, which names the file and the
        checkpoint before, when one differs."""
        step, path = self.latest_checkpoint()
        manifest.check(path, recipe=self._recipe)
        return step, path


def _locate(runs: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise MetronomeError(
            f"name {name!r} cannot name a run's folder; use letters, digits, '.', '_' and '-', beginning with one of "
            "the first two"
        )
    if runs.exists() and not runs.is_dir():
        raise MetronomeError(f"runs: {runs} is a file, but must be the folder that holds the runs' folders")
    return runs / name


def _read_lines(path: Path) -> list[bytes]:
    """The lines of metrics.jsonl, each with its newline. Raises MetronomeError, naming the line, for what is no record
    of a step after the one before. A last line that another program's crash cut short is left out."""
    if not path.exists():
        return []
    data = read_bytes(path)
    kept: list[bytes] = []
    last = -1
    for number, line in lines(data):
        where = f"{path}, line {number}"
        try:
            step = parse_line(line, where).get("step")
        except UnreadableError as error:
            if number == data.count(b"\n") + 1:  # no newline ends it
                break
            raise MetronomeError(f"{error}; restore or remove the file") from None
        if type(step) is not int or step <= last:
            after = f" after step {last}" if last >= 0 else ""
            raise MetronomeError(f"{where}: not a metric record with a step{after}; restore or remove the file")
        kept.append(line + b"\n")
        last = step
    return kept


def _step(line: bytes) -> int:
    return int(parse_line(line, "metrics.jsonl")["step"])


def _flush(folder: Path) -> None:
    """Has the disk hold the files of a folder before its name says that they are complete."""
    for path in [p for p in folder.rglob("*") if p.is_file()] + [folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
