"""Metrics to Weights & Biases, when the recipe asks for it; a convenience that may never cost the run anything.

All of it happens in a thread of its own, fed by a queue: a slow disk or network delays nobody. Whatever goes wrong in
there becomes one warning and ends the tracking, never the run. Nothing of wandb is imported when tracking is off.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CLOSE_TIMEOUT_S = 20.0

Record = tuple[int, dict[str, float | int | str]]


@dataclass(frozen=True)
class TrackingConfig:
    wandb: bool = False
    mode: Literal["offline", "online"] = "offline"  # offline writes below the run's folder; `wandb sync` uploads later
    project: str = "metronome"


class Tracker:
    """Owns the thread and, through it, the wandb run. Without ``config.wandb`` every method does nothing."""

    def __init__(self, config: TrackingConfig, name: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        self._queue: queue.SimpleQueue[Record | Path | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if config.wandb:
            self._thread = threading.Thread(
                target=self._work, args=(config, name, folder, dict(recipe)), name="tracking", daemon=True
            )
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        if self._thread is not None:
            self._queue.put((step, dict(metrics)))

    def artifact(self, folder: Path) -> None:
        """A folder's files as an artifact of the folder's name."""
        if self._thread is not None:
            self._queue.put(folder)

    def close(self) -> None:
        """Waits a limited time for what is still queued."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                warnings.warn(f"tracking: wandb did not finish in {CLOSE_TIMEOUT_S:.0f} s; left behind", stacklevel=2)
            self._thread = None

    def _work(self, config: TrackingConfig, name: str, folder: Path, recipe: dict[str, Any]) -> None:
        try:
            import wandb

            run = wandb.init(
                project=config.project,
                name=name,
                mode=config.mode,
                dir=str(folder),
                config=recipe,
                settings=wandb.Settings(console="off", silent=True, init_timeout=60, x_disable_stats=True),
            )
            while (item := self._queue.get()) is not None:
                if isinstance(item, Path):
                    kept = wandb.Artifact(item.name, type="report")
                    kept.add_dir(str(item))
                    run.log_artifact(kept)
                else:
                    run.log(item[1], step=item[0])
            run.finish()
        # Broad on purpose, and the only such place: what a tracking library may raise is open-ended, and none of it is
        # a reason to lose a training run.
        except Exception as error:
            warnings.warn(f"tracking: wandb failed, off from here on: {type(error).__name__}: {error}", stacklevel=1)
