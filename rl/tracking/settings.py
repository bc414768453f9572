"""The recipe's settings for trackers, their check, and the records that trackers get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from kernels.errors import MetronomeError
from model.program.ranges import Distinct, Length, Text

if TYPE_CHECKING:
    from rl.tracking.samples import Sample

LOCAL = ("tensorboard", "trackio", "wandb")
"""Trackers that use no network when ``mode`` is offline."""

Metrics = Mapping[str, float | int | str]
Sampled = Callable[[], Sequence["Sample"]]
"""Makes the pictures and sound of a step's sampled episodes; called in the tracker's thread."""


@dataclass(frozen=True)
class TrackingConfig:
    """The part of a run's recipe that names trackers."""

    # wandb, tensorboard, trackio, or another one that accelerate knows.
    trackers: Annotated[tuple[Annotated[str, Text(100)], ...], Length(0, 20), Distinct()] = ()
    mode: Literal["offline", "online"] = "offline"  # offline keeps everything on this machine (`wandb sync` uploads)
    project: Annotated[str, Text(100)] = "metronome"


@dataclass(frozen=True)
class Record:
    """One step to log."""

    step: int
    metrics: Metrics
    sampled: Sampled | None = None  # None: no episodes are logged with this step


@dataclass(frozen=True)
class RunIdentity:
    """The run as a tracker identifies it."""

    name: str
    id: str  # kept in the run's folder: equal after a resume, different for another run of the same name
    folder: Path  # the run's
    recipe: Mapping[str, Any]


def check(config: TrackingConfig) -> None:
    """Raises MetronomeError for a tracker that is unknown, not installed, or would not stay offline."""
    if not config.trackers:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = {str(one) for one in get_available_trackers()}
    for name in config.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise MetronomeError(f"tracking.trackers: no tracker is called {name!r}; choose from {known}")
        if name not in installed:
            raise MetronomeError(f"tracking.trackers: {name} is not installed: `pip install {name}`, or leave it out")
        if config.mode == "offline" and name not in LOCAL:
            raise MetronomeError(
                f"tracking.trackers: {name} cannot be held to this machine from here; --tracking.mode online allows it "
                f"the network, and {', '.join(LOCAL)} work offline"
            )
