"""Sends metrics and sampled episodes to the experiment trackers that the recipe names, without ever delaying the run.

Each tracker (`rl.tracking.backends`, by way of ``accelerate.tracking``) works in a thread of its own, fed by a queue,
so that a slow disk or network does not slow training. Any error in the thread becomes one warning and ends that
tracker, never the run. Without trackers, neither accelerate's trackers nor any tracking library is imported.

**Each step once, however often the run is interrupted.** What is handed over is written to RUN/tracking/journal.jsonl
first, as a line a step. A resumed run repeats the steps since its checkpoint with the same bits; those in the journal
are not handed over again. A tracker may have lost what it had not written when the run was killed (wandb keeps 32 kB in
memory), so each one begins by asking its own files for the last step that they hold and takes the rest from the
journal. Pictures and sound of lost steps stay lost.
"""

from __future__ import annotations

import queue
import re
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from kernels.errors import MetronomeError
from model.program.files import append_line, write_whole
from model.program.folders import NAME
from model.program.ranges import Range
from model.program.reading import (
    as_record,
    decode,
    lines,
    read_bytes,
    read_text,
    to_json,
    whole_lines,
)
from rl.tracking.settings import Metrics, Record, RunIdentity, Sampled, TrackingConfig

CLOSE_TIMEOUT_S = 20.0
FOLDER = "tracking"
"""Subfolder of a run's folder with the journal, and id and name by which trackers recognise a resumed run, even if its
folder was moved or renamed."""
IDENTITY = re.compile(r"[0-9a-f]{8}")


class Tracker:
    """Owns the journal and a thread for each tracker. Without trackers every method does nothing."""

    def __init__(self, config: TrackingConfig, name: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        """``folder``: the run's, which holds a journal if the run is resumed."""
        self._threads: list[_Thread] = []
        self._last = -1
        if config.trackers:
            self._journal = folder / FOLDER / "journal.jsonl"
            before = self._quietly(lambda: _earlier(self._journal)) or []
            identity = self._quietly(lambda: _kept(folder / FOLDER / "id", secrets.token_hex(4), IDENTITY))
            first_name = self._quietly(lambda: _kept(folder / FOLDER / "name", name, NAME))
            self._last = max((record.step for record in before), default=-1)
            run = RunIdentity(first_name or name, identity or secrets.token_hex(4), folder, recipe)
            self._threads = [_Thread(kind, config, run, before) for kind in config.trackers]

    def log(self, step: int, metrics: Metrics, sampled: Sampled | None = None) -> None:
        """Logs a step, unless it was logged before the run was resumed."""
        if not self._threads or step <= self._last:
            return
        self._last = step
        self._quietly(lambda: _append(self._journal, to_json({"step": step, "metrics": dict(metrics)}, None)))
        for thread in self._threads:
            thread.put(Record(step, dict(metrics), sampled))

    def artifact(self, folder: Path) -> None:
        """Logs a folder's files as an artifact, named as the folder, where a tracker has artifacts. The files must not
        change afterwards."""
        for thread in self._threads:
            thread.put(folder)

    def close(self) -> None:
        """Waits at most `CLOSE_TIMEOUT_S` for what is still queued."""
        until = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.put(None)
        for thread in self._threads:
            thread.finish(until)
        self._threads = []

    def _quietly(self, act: Callable[[], Any]) -> Any:
        """What ``act`` returns; None and a warning when the disk does not let it."""
        try:
            return act()
        except (OSError, MetronomeError) as error:
            warnings.warn(f"tracking: {FOLDER}/ cannot be used: {error}", stacklevel=3)
            return None


class _Thread:
    """Owns one tracker and the thread that it works in."""

    def __init__(self, kind: str, config: TrackingConfig, run: RunIdentity, before: Sequence[Record]) -> None:
        self._kind = kind
        self._queue: queue.SimpleQueue[Record | Path | None] = queue.SimpleQueue()
        arguments = (config, run, before)
        self._thread = threading.Thread(target=self._work, args=arguments, name=f"tracking {kind}", daemon=True)
        self._thread.start()

    def put(self, item: Record | Path | None) -> None:
        self._queue.put(item)

    def finish(self, until: float) -> None:
        """``until``: the moment of `time.monotonic` at which to leave it behind."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            text = f"tracking: {self._kind} did not finish in {CLOSE_TIMEOUT_S:.0f} s; left behind"
            warnings.warn(text, stacklevel=3)

    def _work(self, config: TrackingConfig, run: RunIdentity, before: Sequence[Record]) -> None:
        try:
            from rl.tracking.backends import start

            tracker = start(self._kind, config, run)
            for record in before:
                if record.step > tracker.written:
                    tracker.log(record)
            while (item := self._queue.get()) is not None:
                if isinstance(item, Path):
                    tracker.artifact(item)
                else:
                    tracker.log(item)
            tracker.finish()
        # Broad on purpose: what a tracking library may raise is open-ended, and none of it is a reason to lose a
        # training run.
        except Exception as error:
            text = f"tracking: {self._kind} failed, off from here on: {type(error).__name__}: {error}"
            warnings.warn(text, stacklevel=1)


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(exist_ok=True)  # and not the run's folder, should that have been moved away
    append_line(path, line)


def _earlier(journal: Path) -> list[Record]:
    """The records of a journal; a last line that was cut short is cut away. Raises UnreadableError for another one that
    is no record."""
    if not journal.is_file():
        return []
    data = read_bytes(journal)
    if whole_lines(data) != data:
        write_whole(journal, whole_lines(data))
    numbered = [(f"{journal}, line {number}", line) for number, line in lines(whole_lines(data))]
    entries = [as_record(decode(line, where), _Entry, where) for where, line in numbered]
    return [Record(entry.step, entry.metrics) for entry in entries]


@dataclass(frozen=True)
class _Entry:
    """A line of the journal."""

    step: Annotated[int, Range(0, 10**9)]
    metrics: dict[str, float | int | str]


def _kept(path: Path, value: str, form: re.Pattern[str]) -> str:
    """What the file holds from the run's start; ``value``, which is written there, where it holds nothing of the
    form."""
    if path.is_file() and form.fullmatch(kept := read_text(path)):
        return kept
    path.parent.mkdir(exist_ok=True)
    write_whole(path, value.encode())
    return value
