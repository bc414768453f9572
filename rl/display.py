"""What a run prints: progress while it works, a table and the folder's path at the end.

On a terminal each phase is one progress bar; otherwise (a file, a pipe) it prints a line from time to time. Only the
first process prints. Knows the names of metrics, not how they are computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 15.0
"""Fewest seconds between two progress lines where there is no terminal."""

SHOWN_METRICS = (
    ("warmstart/loss", "loss"),
    ("reward/mean", "reward"),
    ("proxy/mean", "learned reward"),
    ("reward/score", "score"),
)
"""(name of a metric, its label in the progress line), in the order in which they are shown."""

Metrics = Mapping[str, float | int | str]


class Display:
    """Owns the console of one process."""

    def __init__(self, speaks: bool, console: Console | None = None) -> None:
        """``speaks``: whether this process is the one that prints."""
        self.console = console or Console(highlight=False, quiet=not speaks)

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, total: int, done: int = 0) -> Iterator[Phase]:
        """A phase of ``total`` steps, ``done`` of them in an earlier, interrupted run."""
        if not self.console.is_terminal:
            yield Phase(self, name, total, done, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            yield Phase(self, name, total, done, progress)

    def summary(self, summary: Metrics, folder: Path) -> None:
        """Prints the closing table, a row for each key of summary.json, and the path of the run's folder."""
        table = Table(title="Summary", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", overflow="fold")
        for key, value in summary.items():
            table.add_row(key, _closing(key, value))
        self.console.print(table)
        self.say(f"Run folder: {folder.resolve()}")


class Phase:
    """Owns one phase's progress line, which keeps the last held-out score and the sum of mismatches."""

    def __init__(self, display: Display, name: str, total: int, done: int, progress: Progress | None) -> None:
        self._display = display
        self._name = name
        self._total = total
        self._done = self._first = done
        self._heldout: float | None = None
        self._tokens = self._unequal = 0
        self._start = self._spoke = time.perf_counter()
        self._progress = progress
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(name, total=total, completed=done, text="")

    def held_out(self, score: float) -> None:
        """Sets the held-out score to show, in [0, 1]."""
        self._heldout = score

    def advance(self, metrics: Metrics) -> None:
        """One step is done; shows what ``metrics`` holds of loss, reward, mismatch and time."""
        self._done += 1
        self._tokens += int(metrics.get("mismatch/num_tokens", 0))
        self._unequal += int(metrics.get("mismatch/num_unequal", 0))
        text = " · ".join(self._parts(metrics))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, text=text)
            return
        now = time.perf_counter()
        if self._done in (self._first + 1, self._total) or now - self._spoke >= PLAIN_EVERY_S:
            self._spoke = now
            left = (self._total - self._done) * (now - self._start) / (self._done - self._first)
            ending = f"{now - self._start:.0f} s in all" if self._done == self._total else f"{_duration(left)} left"
            self._display.say(f"{self._name} {self._done}/{self._total} · {text} · {ending}")

    def _parts(self, metrics: Metrics) -> Iterator[str]:
        for key, name in SHOWN_METRICS:
            if key in metrics:
                yield f"{name} {metrics[key]:.3f}"
        if self._heldout is not None:
            yield f"held-out {self._heldout:.1%}"
        if "mismatch/num_tokens" in metrics:
            yield f"mismatch {self._unequal}/{self._tokens}"
        yield f"{(time.perf_counter() - self._start) / (self._done - self._first):.2f} s/step"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _closing(key: str, value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if key.startswith("eval/") else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
