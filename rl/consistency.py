"""What a run's recipe must meet beyond the range of each field (`model.program.ranges`).

- `check_recipe`: all of it, before anything is written.
- `check_contracts`: all processes compute the same bits.
- `check_read`: each setting that is given is read.
- `check_shares`: every process, or team of processes, has its share of scenarios, none comes twice, and there is a
  policy to learn from.

Given is what differs from the default. Not meant by `check_read` are settings of a phase that has no steps, which wait
for its steps, and ``model.preset`` beside a checkpoint, which replaces it as the recipe says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.program import ranks, teams
from model.program.ranges import shown
from reward.voice.listener import UNDERSTOOD
from rl.config import TrainConfig
from rl.environment import computing, contract_in_words
from rl.rollers import check_engine, check_workers
from rl.room import check_fits
from rl.tracking.settings import check as check_tracking
from rollout.seeds import FIRST_DEMONSTRATION_SEED, SEEDS_PER_RUN

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
        ("rollout.context.first", "rollout.context.window"),
        lambda config: config.rollout.context.policy != "window",
        "rollout.context.policy is not window",
    ),
    (
        ("rollout.context.budget", "rollout.context.request", "rollout.context.summary_words"),
        lambda config: config.rollout.context.policy != "summary",
        "rollout.context.policy is not summary",
    ),
    (
        ("tracking.mode", "tracking.project"),
        lambda config: not config.tracking.trackers,
        "tracking.trackers names no tracker",
    ),
    (
        ("hub.private", "hub.every", "hub.timeout_s"),
        lambda config: config.hub.repo is None,
        "hub.repo names no repository, so nothing is sent",
    ),
    (
        ("model.voice",),
        lambda config: config.model.checkpoint is not None,
        "model.checkpoint names a model, which has a voice of its own or none",
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

NOT_IN_MINIMAL = (
    *("rollout.engine", "rollout.workers", "tracking.trackers", "hub.repo"),
    *("source.models", "rl.reference_weight", "rl.sequence_parallel", "model.dtype"),
)
"""What `rl.minimal` refuses; what else it leaves out changes no weights and asks for nothing."""


def check_recipe(config: TrainConfig, resumed: Path | None = None) -> None:
    """Raises MetronomeError, naming the field, for a recipe that cannot be run here: settings that do not fit one
    another, the number of processes, the machine or what is installed, and settings that would be ignored.
    ``resumed``: as in `rl.run.build_model`."""
    check_contracts()
    check_shares(config)
    check_workers(config)
    check_fits(config, resumed)
    check_read(config)
    check_engine(config)
    check_tracking(config.tracking)


def check_contracts() -> None:
    """Raises MetronomeError when processes of the run compute under other contracts than the first one, as on GPUs of
    two kinds: environment.json names one contract, by which the run is resumed and audited."""
    first, *others = ranks.gather(contract_in_words(computing()))
    for rank, words in enumerate(others, 1):
        if words != first:
            raise MetronomeError(
                f"process {rank} of the run computes under {words}, process 0 under {first}: other bits. Take cards of "
                "one kind (`--gpu_ids` chooses among a machine's) and equal versions of torch and Triton"
            )


def check_read(config: TrainConfig) -> None:
    """Raises MetronomeError for the first setting that is given and would be ignored."""
    usual = TrainConfig()
    for names, unread, why in UNREAD:
        for name in names:
            if unread(config) and _value(config, name) != _value(usual, name):
                value = shown(_value(config, name))
                raise MetronomeError(f"{name} is {value}, but would be ignored: {why}. Leave it out, or change that")


def check_minimal(config: TrainConfig, resume: bool) -> None:
    """Raises MetronomeError for the first setting that asks for what `rl.minimal` leaves out."""
    usual = TrainConfig()
    given = {name: _value(config, name) for name in NOT_IN_MINIMAL if _value(config, name) != _value(usual, name)}
    for name, value in (({"resume": True} if resume else {}) | given).items():
        raise MetronomeError(f"{name} is {shown(value)}, which rl.minimal leaves out; leave it out, or use rl.train")


def _value(config: TrainConfig, name: str) -> Any:
    return reduce(getattr, name.split("."), config)


def _sharers() -> str:
    """Who shares out scenarios: processes, or teams of them (`model.program.teams`)."""
    return f"{teams.count()} " + ("processes" if teams.size() == 1 else f"teams of {teams.size()} processes")


def check_shares(config: TrainConfig) -> None:
    """Raises MetronomeError for a setting that does not fit the others: a process would have nothing to do, scenarios
    would come twice, an axis is not rewarded, or the policy would not be sampled from."""
    if config.rollout.temperature == 0:
        raise MetronomeError(
            f"rollout.temperature is {config.rollout.temperature}: RL needs a number above 0. At 0 the sampler takes "
            "the most likely token, which is no sample of the policy whose log-probs are learned from"
        )
    for name, count in (("rl.groups", config.rl.groups), ("warmstart.episodes", config.warmstart.episodes)):
        if count < teams.count():
            raise MetronomeError(f"{name} is {count}, but {_sharers()} share them: give at least one each")
    for name, steps, each, seeds in (
        ("rl.steps", config.rl.steps, config.rl.groups, FIRST_DEMONSTRATION_SEED),
        ("warmstart.steps", config.warmstart.steps, config.warmstart.episodes, SEEDS_PER_RUN),
    ):
        if steps * each > seeds:
            raise MetronomeError(f"{name} is {steps}: with {each} scenarios each, give at most {seeds // each}")
    if {*config.rl.sound_axes} == {UNDERSTOOD} and not config.source.listener:
        raise MetronomeError(
            f"rl.sound_axes names {UNDERSTOOD} alone, but source.listener is false: nothing would reward sound"
        )
    axes = (*config.scenarios.axes, *((UNDERSTOOD,) if config.scenarios.aloud else ()))
    for name, named in (("axis_weights", config.rl.axis_weights), ("sound_axes", config.rl.sound_axes)):
        if wrong := sorted(set(named) - set(axes)):
            raise MetronomeError(
                f"rl.{name} names {', '.join(wrong)}: the recipe's families are rewarded on {', '.join(axes)}"
            )
