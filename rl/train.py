"""The main command: warm start, then RL, then the held-out score.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m rl.train --config configs/quickstart.yaml

Any field of the recipe can be given on the command line (``--rl.steps 20``); ``--resume`` goes on from the newest
finished checkpoint of the run of that name. Every process runs this same program; the first one writes and prints.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from rl.startup import run_command

    run_command("rl.train")

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jsonargparse
import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model import checkpoint
from model.config import preset
from model.transformer import InteractionModel
from rl import loop, ranks
from rl.config import TrainConfig
from rl.display import Display
from rl.environment import environment
from rl.evaluate import evaluate, named
from rl.folder import RunFolder
from rl.identity import Mismatch
from rl.learner import Learner
from rl.tracking import Tracker
from rl.warmstart import warm_start
from rollout.episode import save_episodes
from rollout.scenarios.base import Scenario
from rollout.scenarios.registry import FAMILIES, scenario
from rollout.session import SessionEngine
from rollout.speech import DEFAULT_FOLDER, SpeechBank
from rollout.vocabulary import Vocabulary

PROGRESS = "progress.json"
"""In a checkpoint folder: what a resumed run must know beside weights and optimizer state."""


def main(arguments: list[str] | None = None) -> None:
    config, resume, recipe = parse(arguments)
    ranks.join()
    try:
        run(config, resume, recipe)
    finally:
        ranks.leave()


def parse(arguments: list[str] | None = None) -> tuple[TrainConfig, bool, str]:
    """The recipe, whether to resume, and the resolved recipe as YAML.

    Raises MetronomeError for an unknown key or a wrong type; ``--help`` prints every field."""
    parser = jsonargparse.ArgumentParser(
        prog="rl.train", description="Train an interaction model by exactly on-policy RL.", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="recipe, YAML")
    resume_help = "go on from the run's newest finished checkpoint"
    parser.add_argument("--resume", type=bool, nargs="?", const=True, default=False, help=resume_help)
    parser.add_class_arguments(TrainConfig)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        parsed = parser.parse_args([with_underscores(argument) for argument in given])
    except jsonargparse.ArgumentError as error:
        raise MetronomeError(f"recipe: {error}. `python -m rl.train --help` lists every field and its type") from error
    resume = bool(parsed.pop("resume"))
    parsed.pop("config")
    recipe = parser.dump(parsed, skip_unset=False)
    return TrainConfig(**vars(parser.instantiate(parsed))), resume, recipe


def with_underscores(argument: str) -> str:
    """``--speech-dir=a-b`` -> ``--speech_dir=a-b``: fields have underscores, people type dashes."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


@dataclass(frozen=True)
class Progress:
    """What a checkpoint remembers of the run so far; every number is a total since the run's start."""

    step: int  # finished RL steps
    before: dict[str, float]  # held-out result after warm start
    mismatch: Mismatch
    wall_s: float


def run(config: TrainConfig, resume: bool, recipe: str) -> None:
    """One run of the recipe, from wherever its folder says it stands, to summary.json."""
    clock = time.perf_counter()
    bank = SpeechBank.load(DEFAULT_FOLDER if config.speech_dir is None else config.speech_dir)
    folder = (RunFolder.reopen if resume else RunFolder.create)(Path(config.runs), config.name, recipe)
    display = Display(ranks.rank() == 0)
    folder.write_json("environment.json", environment())
    tracking = replace(config.tracking, wandb=config.tracking.wandb and ranks.rank() == 0)
    tracker = Tracker(tracking, config.name, folder.path, asdict(config))
    model = build_model(config)
    vocabulary = Vocabulary.build(model.vocab)
    held_out = [
        scenario(f, "held_out", i, bank, config.scenarios) for i in range(config.eval.scenarios) for f in FAMILIES
    ]
    during = held_out[: config.eval.during * len(FAMILIES)]
    display.say(
        f"Run {config.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {ranks.world()} processes, "
        f"backend {dispatch.contract()['backend']} ({dispatch.contract()['isa']}), contract {dispatch.contract_id()}"
    )
    checkpoint_folder: Path | None = None
    if resume:
        step, checkpoint_folder = folder.latest_checkpoint()
        folder.keep_metrics_before(step)
        progress = load_progress(checkpoint_folder)
        checkpoint.load_into(model, checkpoint_folder / "model")
    else:
        with display.phase("warm start", config.warmstart.steps) as phase:
            for record in warm_start(config, bank, model, vocabulary):
                phase.advance(record)
                tracker.log(int(record["step"]), record)
        before = examine(config, model, vocabulary, held_out)
        progress = Progress(0, before, Mismatch.total([]), time.perf_counter() - clock)
    display.say(f"held-out score after warm start: {describe(progress.before)}")
    learner = Learner(model, config.rl.optim, config.rl.steps)
    if checkpoint_folder is not None:
        learner.load(checkpoint_folder)
    else:
        save(folder, learner, progress)
    engine = build_engine(config, model, vocabulary, config.rollout.temperature)
    seconds_before = progress.wall_s - (0.0 if resume else time.perf_counter() - clock)
    with display.phase("RL", config.rl.steps, progress.step) as phase:
        phase.held_out(progress.before[""])
        for result in loop.steps(config, bank, engine, learner, progress.step):
            done = int(result.metrics["step"]) + 1
            progress = replace(
                progress,
                step=done,
                mismatch=Mismatch.total([progress.mismatch, result.mismatch]),
                wall_s=seconds_before + time.perf_counter() - clock,
            )
            metrics = dict(result.metrics)
            if done % config.rl.evaluate_every == 0 and done < config.rl.steps:
                metrics |= named("eval/held_out", evaluate(engine, during, config.reward, config.seed))
                phase.held_out(float(metrics["eval/held_out"]))
            folder.append_metrics(metrics)
            tracker.log(config.warmstart.steps + done, metrics)
            phase.advance(metrics)
            if config.rl.save_episodes_every and (done - 1) % config.rl.save_episodes_every == 0:
                name = f"episodes/step_{done - 1:06d}.rank_{ranks.rank()}.safetensors"
                save_episodes(folder.path / name, result.episodes)
            if done % config.rl.checkpoint_every == 0 or done == config.rl.steps:
                save(folder, learner, progress)
    after = examine(config, model, vocabulary, held_out)
    summary: dict[str, float | int | str] = {
        **named("eval/before", progress.before),
        **named("eval/after", after),
        **progress.mismatch.metrics(),
        "weights_digest": engine.weights_digest,
        "wall_s": seconds_before + time.perf_counter() - clock,
    }
    folder.write_json("summary.json", summary)
    tracker.close()
    display.summary(summary, folder.path)


def build_model(config: TrainConfig) -> InteractionModel:
    """The recipe's model, its weights packed."""
    dtype = getattr(torch, config.model.dtype)
    if config.model.checkpoint is None:
        model = InteractionModel(preset(config.model.preset), dtype)
        model.init_weights(config.seed)
    else:
        model = checkpoint.load(Path(config.model.checkpoint), dtype)
    model.pack()
    return model


def build_engine(
    config: TrainConfig, model: InteractionModel, vocabulary: Vocabulary, temperature: float
) -> SessionEngine:
    """An engine with room for all of this rank's rollouts of a step."""
    return SessionEngine(
        model,
        vocabulary,
        slots=max(1, len(ranks.share(config.rl.groups))) * config.rl.rollouts,
        max_tokens=config.rollout.max_tokens,
        temperature=temperature,
        words_per_chunk=config.rollout.words_per_chunk,
    )


def examine(
    config: TrainConfig, model: InteractionModel, vocabulary: Vocabulary, scenarios: Sequence[Scenario]
) -> dict[str, float]:
    """The held-out result, sampled at the training temperature, and the greedy one beside it under ``greedy``: a policy
    that is right less than half of the time is silent when greedy, so that neither tells the whole."""
    sampled = build_engine(config, model, vocabulary, config.rollout.temperature)
    greedy = build_engine(config, model, vocabulary, 0.0)
    result = evaluate(sampled, scenarios, config.reward, config.seed)
    return result | {"greedy": evaluate(greedy, scenarios, config.reward, config.seed)[""]}


def save(folder: RunFolder, learner: Learner, progress: Progress) -> None:
    """A checkpoint: model in transformers' format, optimizer state, progress."""
    with folder.checkpoint(progress.step) as path:
        learner.save(path)
        if ranks.rank() == 0:
            checkpoint.save(learner.model, path / "model")
            (path / PROGRESS).write_text(json.dumps(asdict(progress)))


def load_progress(path: Path) -> Progress:
    try:
        fields: dict[str, Any] = json.loads((path / PROGRESS).read_text())
        return Progress(**{**fields, "mismatch": Mismatch(**fields["mismatch"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MetronomeError(
            f"{path / PROGRESS}: cannot be read ({error}). Delete this checkpoint to resume from the one before."
        ) from error


def describe(result: dict[str, float]) -> str:
    return ", ".join(f"{name or 'mean'} {value:.1%}" for name, value in result.items())
