"""What a resumed run must know and may change. Equal must be what decides the bits of its weights or what its held-out
scores are of; `FREE` and `CHECKED` are the rest.

``rl.steps`` is a case of its own: it enters the learning rate of every step (`rl.learner.deepspeed.learning_rate`). A
run may go on to another number of steps; the steps already taken keep their learning rates. So it is not the run that
would have had that number from its start, which is said, and kept in its folder (`model.program.runs.RESUMED`).

A run stays under the contract under which it began, and so on its kind of device: a run of two contracts could be
audited nowhere. Its weights are free of it: a new run begins from them anywhere, with ``model.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from kernels import dispatch
from kernels.errors import MetronomeError
from model.program import ranks, teams
from model.program.files import write_json
from model.program.ranges import Range, Text, shown
from model.program.reading import UnreadableError, read_record
from model.program.recipe import Recipe, flat, read_recipe
from model.weights import checkpoint, manifest
from model.weights.card import write_card
from reward.source import RewardSource
from rl.card import facts
from rl.config import TrainConfig
from rl.environment import computing, contract_in_words
from rl.evaluate import HeldOut
from rl.folder import RunFolder
from rl.learner.deepspeed import Learner
from rl.step.credit import Scales
from rl.step.identity import Mismatch
from rollout.scenarios.registry import SHIPPED, ScenarioConfig
from rollout.world.lexicon import lexicon
from rollout.world.speech import SpeechBank

PROGRESS = "progress.json"
"""In a checkpoint folder: what a resumed run must know beside weights and optimizer state."""

FREE = (
    *("name", "runs"),  # where the run lies
    *("tracking", "hub"),  # where it is reported and sent
    *("rl.checkpoint_every", "rl.save_episodes_every"),  # what of it is kept
    "rl.sequence_parallel",  # how many processes do what one does
    *("rollout.engine", "rollout.workers", "rollout.worker_threads", "rollout.worker_timeout_s"),  # who rolls out
    "rollout.max_tokens",  # room of a session: an episode that needs more raises
)
"""Fields of a recipe, and groups of them (`covered`), that decide no bit of a run's weights or records."""

CHECKED = ("model.checkpoint", "source.models", "speech_dir")
"""Paths whose content counts: of a run with a checkpoint that is compared (`Run.resume`), or no longer read."""

STEPS = "rl.steps"

PLACEMENT = "placement"
"""A group of fields that the contract decides (`check_contract`)."""


def covered(field: str, names: Iterable[str]) -> bool:
    """Whether a field, by its dotted name, is one of ``names`` or lies in a group among them: "tracking.project" in
    "tracking", but "rl.steps_more" not in "rl.steps"."""
    return any(f"{field}.".startswith(f"{name}.") for name in names)


@dataclass(frozen=True)
class Ended:
    """What is read of a run's summary.json."""

    weights_digest: Annotated[str, Text(200)]  # of the final weights


@dataclass(frozen=True)
class Progress:
    """What a checkpoint remembers of the run so far; every number is a total since the run's start."""

    step: Annotated[int, Range(0, 10**9)]  # finished RL steps
    before: HeldOut  # after warm start
    mismatch: Mismatch
    wall_s: Annotated[float, Range(0, 10**10)]
    reward_models: tuple[str, ...]  # digest of each one's weights
    processes: Annotated[int, Range(1, 10**6)]  # that sum the gradients, a team for one: their order
    stopped: bool = False  # by the watch over learned rewards
    scales: Scales = field(default_factory=dict)  # of the advantages (`rl.step.credit`)
    recordings: str = ""  # digest of the speech; "": saved by a version that did not record it


def save(folder: RunFolder, learner: Learner, progress: Progress) -> None:
    """A checkpoint: model in transformers' format with its card, optimizer state, progress."""
    with folder.checkpoint(progress.step) as path:
        learner.save(path)
        if ranks.rank() == 0:
            checkpoint.save(learner.model, path / "model")
            digest = checkpoint.weights_digest(learner.model)
            write_card(path / "model", facts(folder, progress.step, digest, dispatch.contract_id(), progress.before))
            write_json(path / PROGRESS, asdict(progress))


def load_progress(path: Path) -> Progress:
    try:
        return read_record(path / PROGRESS, Progress)
    except UnreadableError as error:
        remedy = "Delete this checkpoint to resume from the one before."
        raise MetronomeError(f"{path / PROGRESS}: cannot be read ({error.problem}). {remedy}") from error


def read_saved(folder: RunFolder, config: TrainConfig) -> Recipe[TrainConfig]:
    """The recipe in a run's folder, as this version reads it under today's name and place. Raises MetronomeError when
    it cannot."""
    path = folder.path / "config.yaml"
    try:
        here = ["--name", config.name, f"--runs={config.runs}"]
        return read_recipe("rl.train", "", TrainConfig, ["--config", str(path), *here])
    except MetronomeError as error:
        raise MetronomeError(f"{path} is no recipe that this version of rl.train can go on with ({error})") from None


def changes(folder: RunFolder, saved: TrainConfig, now: TrainConfig, begun: bool) -> dict[str, tuple[Any, Any]]:
    """The fields in which the recipe of a run differs from today's, with both values, name and place left out.
    ``begun``: whether the run has a checkpoint. Raises MetronomeError, naming them, for fields that must be equal."""
    before, after = _meaning(saved), _meaning(now)
    differs = {
        name: (before.get(name), after.get(name))
        for name in before | after
        if name not in ("name", "runs") and before.get(name) != after.get(name)
    }
    if "scenarios.families" in differs:  # settings of a family that only one has say nothing more
        differs = {name: both for name, both in differs.items() if name in before and name in after}
    free = {*FREE, *(CHECKED if begun else ()), STEPS}
    if not saved.source.models:
        free.add("rl.evaluate_every")  # with reward models it decides what the watch over them sees
    refused = [name for name in differs if not covered(name, free)]
    if begun and any(covered(name, (PLACEMENT,)) for name in refused):
        check_contract(folder)
    if refused:
        said = "; ".join(f"{n}: {_shown(differs[n][0])} in the run, {_shown(differs[n][1])} now" for n in refused[:6])
        more = f"; and {len(refused) - 6} more" if len(refused) > 6 else ""
        raise MetronomeError(
            f"{folder.path} is a run of another recipe: {said}{more}. To go on with it give the run's values; or start "
            "a new run under another --name"
        )
    return differs


def announcement(changed: Mapping[str, tuple[Any, Any]], step: int) -> str:
    """What a change of recipe means for a run that goes on after ``step`` steps."""
    said = ", ".join(f"{name} {_shown(a)} → {_shown(b)}" for name, (a, b) in changed.items())
    text = f"The recipe changed at step {step}: {said}."
    if STEPS in changed and step:
        text += (
            f" The {step} steps already taken keep the learning rates of a run of {changed[STEPS][0]}; those to come "
            f"have those of a run of {changed[STEPS][1]}. It is not the run that would have had {changed[STEPS][1]} "
            "steps from its start."
        )
    return text


def finished(config: TrainConfig) -> str:
    """What to tell who resumes a run that is at its end, as a sentence; "" for a run that is not. Raises MetronomeError
    as `changes` does, when more steps are finished than the recipe has, and when the summary or the newest checkpoint
    of a run at its end is damaged."""
    folder = RunFolder.reopen(Path(config.runs), config.name)
    newest = folder.newest_checkpoint()
    changes(folder, read_saved(folder, config).config, config, newest is not None)
    if newest is None:
        return ""
    step, path = newest
    if step > config.rl.steps:
        manifest.check(path)  # a copied folder has finished nothing
        raise MetronomeError(
            f"rl.steps is {config.rl.steps}, but the run in {folder.path} has finished {step}: give as many at least"
        )
    summary = folder.path / "summary.json"
    if not summary.is_file() or not (step == config.rl.steps or load_progress(path).stopped):
        return ""
    try:
        digest = read_record(summary, Ended).weights_digest
    except UnreadableError as error:
        raise MetronomeError(f"{error}; move it away, and --resume writes it anew") from None
    manifest.check(path)
    folder.check_records(step)
    return (
        f"The run in {folder.path} is finished: {step} steps, weights {digest}. It stays as it is. A larger --rl.steps "
        f"goes on with it; `python -m rl.audit --run {folder.path}` audits it again."
    )


def recordings(scenarios: ScenarioConfig, bank: SpeechBank) -> str:
    """The digest of all sound that a run is made of: the users' speech and, where words are said aloud, theirs."""
    return bank.digest() + (lexicon().digest() if scenarios.aloud else "")


def check_same(
    folder: RunFolder, progress: Progress, changed: Mapping[str, Any], source: RewardSource, sound: str
) -> None:
    """Raises MetronomeError when what decides bits, beside the recipe, is not what the run began with. ``changed``:
    the fields of the recipe that are not; ``sound``: `recordings`."""
    check_contract(folder)
    if progress.reward_models != source.digests:
        raise MetronomeError(
            f"source.models: other weights than the run in {folder.path} began with; put those back, or start "
            "a new run under another --name"
        )
    if progress.processes != teams.count():
        raise MetronomeError(
            f"the run in {folder.path} was begun by {progress.processes} processes, this is {teams.count()}: "
            "another number sums gradients in another order and ends with other weights. Give the launcher "
            f"--num_processes {progress.processes * teams.size()}, or start a new run under another --name"
        )
    known = progress.recordings or "speech_dir" in changed
    if known and progress.recordings != sound:
        raise MetronomeError(
            f"speech_dir, or the words that are said aloud: other recordings than the run in {folder.path} began with; "
            "put those back, or start a new run under another --name"
        )


def check_weights(folder: RunFolder, step: int, path: Path, digest: str) -> None:
    """Raises MetronomeError unless the last record before the checkpoint in ``path``, of ``step`` finished steps, is of
    weights of ``digest``, the checkpoint's."""
    recorded = next((r.get("weights_digest") for r in folder.metrics() if r["step"] == step - 1), None)
    if step and recorded != digest:
        raise MetronomeError(
            f"{folder.path / 'metrics.jsonl'}: the record of step {step - 1} has weights_digest {shown(recorded)}, but "
            f"the weights in {path} have {digest}: one of them is not this run's. Put back what the run wrote, or "
            "start under another --name"
        )


def check_contract(folder: RunFolder) -> None:
    """Raises MetronomeError when the run so far was computed under another contract, or it is not known which."""
    path, now = folder.path / "environment.json", computing()
    before = read_record(path, dict[str, Any]) if path.is_file() else {}
    if before.get("contract_id") == now["contract_id"]:
        return
    newest = folder.newest_checkpoint()
    anywhere = "" if newest is None else f" from its weights, --model.checkpoint={newest[1] / 'model'}"
    if "contract_id" not in before:
        raise MetronomeError(
            f"{path} does not say under which contract the run was computed: put back what the run wrote, or start a "
            f"new run under another --name{anywhere}"
        )
    device = _device(before)
    raise MetronomeError(
        f"the run in {folder.path} was computed under {contract_in_words(before)}, and this program computes under "
        f"{contract_in_words(now)}: other bits. Resume where it began ({path.name} says where"
        f"{f'; --placement.device {device}' if device != _device(now) else ''}), or start a new run under another "
        f"--name{anywhere}"
    )


def _device(environment: Mapping[str, Any]) -> str:
    """What ``placement.device`` a contract is of."""
    contract = environment.get("contract")
    return "cuda" if isinstance(contract, dict) and contract.get("backend") == "triton" else "cpu"


def _meaning(config: TrainConfig) -> dict[str, Any]:
    """The recipe's fields by dotted name, what is spelled in two ways in one."""
    content = asdict(config)
    short = {address: name for name, address in SHIPPED.items()}
    content["scenarios"] = {
        "families": [short.get(family, family) for family in config.scenarios.families],
        **{name: asdict(config.scenarios.settings_of(name)) for name in config.scenarios.members},
    }
    weights = config.rl.axis_weights
    content["rl"]["axis_weights"] = {axis: weights.get(axis, 1.0) for axis in {*config.scenarios.axes, *weights}}
    return dict(flat(content))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() and len(value) < 60 else shown(value)
