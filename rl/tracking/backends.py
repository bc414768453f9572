"""A class for each tracker, around accelerate's tracker of that name.

accelerate's tracker starts, logs metrics and the recipe, and ends; pictures, sound, artifacts and resuming are done by
each library's own calls. Trackers without a class of their own get metrics only (`MetricsOnly`). All runs in the thread
of `rl.tracking.tracker`.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import tracking as accelerate_tracking

from model.program.reading import parse_json, read_bytes
from model.program.recipe import flat
from rl.tracking.samples import SAMPLE_RATE_HZ, Sample
from rl.tracking.settings import Record, RunIdentity, TrackingConfig

# accelerate's logger and its decorator for the first process ask for accelerate's own `PartialState`, which would join
# processes, set threads and the environment. Ours have joined (`model.program.ranks`), and only the first one has
# trackers.
accelerate_tracking.logger = logging.getLogger("accelerate.tracking")


class MetricsOnly:
    """Metrics only: any tracker that accelerate knows."""

    def __init__(self, kind: str, config: TrackingConfig, run: RunIdentity) -> None:
        """Starts the tracker, and so may take long or raise whatever its library raises."""
        self.config = config
        self.run = run
        kinds = accelerate_tracking.LOGGER_TYPE_TO_CLASS[kind]
        folder = [str(run.folder)] if kinds.requires_logging_directory else []
        self.inner = kinds(self.project(), *folder, **self.options())
        self.inner.main_process_only = False
        self.inner.start()
        self.written = self.last_written()
        self.configure()

    def project(self) -> str:
        return self.config.project

    def options(self) -> dict[str, Any]:
        """Further arguments for the start of accelerate's tracker."""
        return {}

    def last_written(self) -> int:
        """The last step that the tracker kept of an interrupted run: -1 for none; where it cannot be known, a number
        above all steps, so that none is logged twice."""
        return 2**62

    def configure(self) -> None:
        """Logs the recipe."""
        self.inner.store_init_configuration(dict(_flat(self.run.recipe)))

    def log(self, record: Record) -> None:
        self.inner.log(dict(record.metrics), step=record.step)

    def artifact(self, folder: Path) -> None:
        """Logs a folder's files, if the tracker has artifacts."""

    def finish(self) -> None:
        self.inner.finish()


class Wandb(MetricsOnly):
    """In RUN/wandb, and on the server if online; pictures and sound as media."""

    def options(self) -> dict[str, Any]:
        import wandb

        settings = wandb.Settings(console="off", silent=True, init_timeout=60, x_disable_stats=True)
        return {
            "name": self.run.name,
            "id": self.run.id,
            "resume": "allow" if self.config.mode == "online" else None,
            "mode": self.config.mode,
            "dir": str(self.run.folder),
            "settings": settings,
        }

    def last_written(self) -> int:
        """Online, from the server. Offline, where wandb ignores ``resume`` and each part of the run has a folder of its
        own with the same id (`wandb sync` joins them), from the files of all parts."""
        if self.config.mode == "online":
            return int(self.inner.tracker.starting_step) - 1
        pattern = f"wandb/offline-run-*-{self.run.id}/run-{self.run.id}.wandb"
        return max((step for path in self.run.folder.glob(pattern) for step, _ in wandb_history(path)), default=-1)

    def log(self, record: Record) -> None:
        import wandb

        media: dict[str, Any] = {}
        for sample in _samples(record):
            media[f"episode/{sample.name}"] = wandb.Image(sample.picture, caption=sample.caption)
            media[f"heard/{sample.name}"] = wandb.Audio(
                sample.heard, sample_rate=SAMPLE_RATE_HZ, caption=sample.caption
            )
        self.inner.log({**record.metrics, **media}, step=record.step, commit=True)

    def artifact(self, folder: Path) -> None:
        import wandb

        kept = wandb.Artifact(folder.name, type="report")
        for file in (path for path in folder.iterdir() if path.is_file()):
            kept.add_file(str(file), policy="immutable")  # no copy outside the run's folder
        self.inner.tracker.log_artifact(kept)


class TensorBoard(MetricsOnly):
    """Writes into RUN/tensorboard, a new file each time the run is resumed."""

    def project(self) -> str:
        return "tensorboard"

    def options(self) -> dict[str, Any]:
        """The last step on disk may be incomplete: readers are told to drop it (``purge_step``), and it is written
        again."""
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        files = sorted((self.run.folder / "tensorboard").glob("events.out.tfevents.*"))
        self._last = max((event.step for file in files for event in EventFileLoader(str(file)).Load()), default=-1)
        return {"purge_step": self._last} if self._last >= 0 else {}

    def last_written(self) -> int:
        return self._last - 1 if self._last >= 0 else -1

    def configure(self) -> None:
        """As text, because accelerate's way adds a second run to TensorBoard's list."""
        recipe = "\n".join(f"{key}: {value}  " for key, value in _flat(self.run.recipe))
        if self._last < 0:
            self.inner.tracker.add_text("recipe", recipe)

    def log(self, record: Record) -> None:
        numbers = {key: value for key, value in record.metrics.items() if not isinstance(value, str)}
        writer = self.inner.tracker
        for sample in _samples(record):
            writer.add_image(f"episode/{sample.name}", sample.picture, record.step, dataformats="HWC")
            writer.add_audio(f"heard/{sample.name}", sample.heard[None], record.step, SAMPLE_RATE_HZ)
        self.inner.log(numbers, step=record.step)


class Trackio(MetricsOnly):
    """In trackio's own database; pictures and sound as media."""

    def options(self) -> dict[str, Any]:
        """Trackio identifies a run by its name, among all runs in trackio's own folder."""
        return {"name": self._name(), "resume": "allow", "auto_log_gpu": False, "auto_log_cpu": False, "embed": False}

    def last_written(self) -> int:
        from trackio.sqlite_storage import SQLiteStorage

        last = SQLiteStorage.get_max_step_for_run(self.config.project, self._name())
        return -1 if last is None else int(last)

    def configure(self) -> None:
        self.inner.tracker.config.update(dict(_flat(self.run.recipe)))

    def log(self, record: Record) -> None:
        import trackio

        media: dict[str, Any] = {}
        for sample in _samples(record):
            media[f"episode/{sample.name}"] = trackio.Image(sample.picture, caption=sample.caption)
            pcm = (sample.heard * 32767).astype("int16")
            media[f"heard/{sample.name}"] = trackio.Audio(pcm, sample_rate=SAMPLE_RATE_HZ, caption=sample.caption)
        metrics = {key: value for key, value in record.metrics.items() if key != "step"}  # a name that it reserves
        self.inner.log({**metrics, **media}, step=record.step)

    def _name(self) -> str:
        return f"{self.run.name}-{self.run.id}"


TRACKERS: dict[str, type[MetricsOnly]] = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio}


def start(kind: str, config: TrackingConfig, run: RunIdentity) -> MetricsOnly:
    """Starts the tracker ``kind``. Raises whatever its library raises."""
    return TRACKERS.get(kind, MetricsOnly)(kind, config, run)


def wandb_history(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, values) of each history record of a ``.wandb`` file, in its order; a file cut short ends early.

    The file is a LevelDB log (blocks of 32 kB; a record's pieces each behind CRC, length and kind: 1 whole, 2 first,
    3 middle, 4 last) behind a header of 7 bytes; each record is a protobuf message of wandb's."""
    from wandb.proto import wandb_internal_pb2

    data, at, pieces = read_bytes(path), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header: the block's end is padding
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        piece = data[at + 7 : at + 7 + size]
        if len(piece) < size:
            return
        pieces, at = pieces + piece, at + 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""
            if record.WhichOneof("record_type") == "history":
                values = {"/".join(i.nested_key) or i.key: parse_json(i.value_json) for i in record.history.item}
                yield int(values["_step"]), values


def _samples(record: Record) -> list[Sample]:
    return [] if record.sampled is None else list(record.sampled())


def _flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    """The recipe's fields by their names on the command line, with values that every tracker takes."""
    for name, value in flat(recipe):
        yield name, value if isinstance(value, bool | int | float | str) else str(value)
