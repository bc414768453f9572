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

import json
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

from model.program.files import write_whole
from model.program.ranges import Range, shown
from model.program.reading import UnreadableError, as_record, decode, lines, read_bytes, read_text, whole_lines
from rl.tracking.settings import Metrics, Record, RunIdentity, Sampled, TrackingConfig

CLOSE_TIMEOUT_S = 20.0
FOLDER = "tracking"
"""Subfolder of a run's folder with the journal, and the id by which trackers recognise a resumed run."""


class Tracker:
    """Owns the journal and a thread for each tracker. Without trackers every method does nothing."""

    def __init__(self, config: TrackingConfig, name: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        """``folder``: the run's, which holds a journal if the run is resumed."""
        self._threads: list[_Thread] = []
        self._last = -1
        if config.trackers:
            self._journal = folder / FOLDER / "journal.jsonl"
            before = self._quietly(lambda: _earlier(self._journal)) or []
            identity = self._quietly(lambda: _identity(folder / FOLDER / "id")) or secrets.token_hex(4)
            self._last = max((record.step for record in before), default=-1)
            run = RunIdentity(name, identity, folder, recipe)
            self._threads = [_Thread(kind, config, run, before) for kind in config.trackers]

    def log(self, step: int, metrics: Metrics, sampled: Sampled | None = None) -> None:
        """Logs a step, unless it was logged before the run was resumed."""
        if not self._threads or step <= self._last:
            return
        self._last = step
        line = json.dumps({"step": step, "metrics": dict(metrics)}) + "\n"
        self._quietly(lambda: _append(self._journal, line))
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
        except (OSError, UnreadableError) as error:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line)


def _earlier(journal: Path) -> list[Record]:
    """The records of a journal; a last line that was cut short is cut away."""
    if not journal.is_file():
        return []
    data = read_bytes(journal)
    whole = whole_lines(data)
    if whole != data:
        write_whole(journal, whole)
    written = [as_record(decode(line), _Line, f"{journal}, line {number}") for number, line in lines(whole)]
    return [Record(one.step, one.metrics) for one in written]


@dataclass(frozen=True)
class _Line:
    """A line of the journal."""

    step: Annotated[int, Range(0, 10**9)]
    metrics: dict[str, int | float | str]


def _identity(path: Path) -> str:
    if not path.is_file():
        write_whole(path, secrets.token_hex(4).encode())
    identity = read_text(path).strip()
    if not re.fullmatch("[A-Za-z0-9_-]{1,64}", identity):
        raise UnreadableError(path, f"holds {shown(identity)}, which identifies no run")
    return identity
