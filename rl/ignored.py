"""Settings that a recipe gives and nothing would read, since another setting turns off what they are for.

Given is what differs from the default. Not meant are settings of a phase that has no steps, which wait for its steps,
and ``model.preset`` beside a checkpoint, which replaces it as the recipe says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from kernels.errors import MetronomeError
from model.program.ranges import shown
from rl.config import TrainConfig

UNREAD: tuple[tuple[tuple[str, ...], Callable[[TrainConfig], bool], str], ...] = (
    (
        ("rollout.worker_threads", "rollout.worker_timeout_s"),
        lambda config: not config.rollout.workers,
        "rollout.workers is 0: episodes are rolled out in the learner's own process",
    ),
    (
        ("rollout.worker_threads",),
        lambda config: config.rollout.engine == "vllm",
        "rollout.engine is vllm, which divides the cores itself",
    ),
    (
        ("tracking.mode", "tracking.project"),
        lambda config: not config.tracking.trackers,
        "tracking.trackers names no tracker",
    ),
    (
        ("source.watch",),
        lambda config: not config.source.models,
        "source.models names no reward model, so no learned reward is watched",
    ),
    (
        ("eval.during",),
        lambda config: config.eval.during > config.eval.scenarios,
        "eval.scenarios is less, and evaluations during RL are made on the first of these",
    ),
)
"""(settings, whether nothing reads them, why)."""


def check_read(config: TrainConfig) -> None:
    """Raises MetronomeError for the first setting that is given and would be ignored."""
    usual = TrainConfig()
    for names, unread, why in UNREAD:
        for name in names:
            if unread(config) and _value(config, name) != _value(usual, name):
                value = shown(_value(config, name))
                raise MetronomeError(f"{name} is {value}, but would be ignored: {why}. Leave it out, or change that")


def _value(config: TrainConfig, name: str) -> Any:
    return reduce(getattr, name.split("."), config)
