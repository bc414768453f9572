"""One run of a recipe, phase by phase: warm start, reinforcement learning, the held-out verdict.

Owns everything that lasts as long as the run: its folder, what the user sees, the model. The algorithm itself is in
`rl.warmstart` and `rl.step.loop`; here is when to evaluate, what to keep on disk, and how an interrupted run goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels import dispatch
from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.context import give
from model.program import ranks, teams
from model.program.exhausted import needing
from model.program.folders import locked
from model.weights import checkpoint
from reward.source import RewardSource
from rl import watch
from rl.audit.diagnosis.diagnose import explain
from rl.audit.document import plain
from rl.audit.finding import Verdict
from rl.audit.report import audit, statement
from rl.config import TrainConfig
from rl.consistency import check_recipe
from rl.display import Display
from rl.environment import environment
from rl.evaluate import HeldOut, evaluate
from rl.folder import RunFolder
from rl.hub import HubConfig, Sender
from rl.learner.deepspeed import Learner
from rl.reference import Reference
from rl.resume import (
    PROGRESS,
    Progress,
    announcement,
    changes,
    check_same,
    check_weights,
    load_progress,
    read_saved,
    recordings,
    save,
)
from rl.rollers import start_roller
from rl.step import loop
from rl.step.identity import Mismatch, NotEqualError
from rl.tracking.samples import samples
from rl.tracking.tracker import Tracker
from rl.warmstart import warm_start
from rollout.record.episode import save_episodes
from rollout.turn.vocabulary import Vocabulary
from rollout.world.base import Scenario
from rollout.world.speech import SpeechBank

AUDITED = 240
"""Saved episodes that a run's end re-scores at most, a few seconds' worth; `python -m rl.audit` re-scores them all."""

AUDIT_WAIT_S = 600.0
"""For an audit of the run's folder by another process, before the closing one."""

DIFFERENCE = "audit/difference.json"
"""In a run's folder: why the run stopped, when sampler and learner were not equal (`rl.audit.diagnosis.diagnose`)."""


class DifferentError(MetronomeError):
    """A run went to its end, and its closing audit says *different*."""


class Run:
    """See the module's text. Use: ``Run(config, recipe, resume).execute()`` in every process."""

    def __init__(self, config: TrainConfig, recipe: str, resume: bool) -> None:
        """``recipe``: the resolved config as YAML, kept with the run. Raises MetronomeError for a folder, recording or
        number that will not do, before anything is written over."""
        self._start = time.perf_counter()
        self._earlier_s = 0.0  # wall seconds of the run before it was interrupted
        self.config = config
        self.display = Display(ranks.rank() == 0)
        self._newest: tuple[int, Path] | None = None  # checkpoint to go on from
        changed: dict[str, tuple[Any, Any]] = {}
        teams.form(config.rl.sequence_parallel)
        if resume:  # another recipe or a damaged checkpoint is refused before anything is written over
            self.folder = RunFolder.reopen(Path(config.runs), config.name)
            saved = read_saved(self.folder, config)
            self._newest = self.folder.checkpoint_to_resume(saved.text, recipe)
            changed = changes(self.folder, saved.config, config, self._newest is not None)
        own = self._newest and self._newest[1] / "model"  # which replaces the recipe's checkpoint
        check_recipe(config, own)
        self.source = RewardSource.load(config.scenarios, config.source)
        self.bank = SpeechBank.open(config.speech_dir)
        if self._newest:
            check_same(
                self.folder,
                load_progress(self._newest[1]),
                changed,
                self.source,
                recordings(config.scenarios, self.bank),
            )
        if not resume:
            self.folder = RunFolder.create(Path(config.runs), config.name, recipe)
        self.model = build_model(config, own)
        if self._newest:
            checkpoint.load_into(self.model, self._newest[1] / "model")
            check_weights(self.folder, *self._newest, checkpoint.weights_digest(self.model))
        self.vocabulary = Vocabulary.of(self.model)
        self.source.check_policy(self.model)
        self.held_out = config.scenarios.of_each(config.eval.scenarios, "held_out", self.bank)
        if resume:
            self.folder.go_on(recipe, saved.text, self._newest and self._newest[0], changed)
            if changed:
                self.display.say(announcement(changed, self._newest[0] if self._newest else 0))
        self.folder.write_json("environment.json", environment())
        trackers = config.tracking.trackers if ranks.rank() == 0 else ()
        tracked = replace(config.tracking, trackers=trackers)
        here = config.hub if ranks.rank() == 0 else HubConfig()
        self.sender = Sender(here, self.folder.path, self.display.say)
        self.tracker = Tracker(tracked, config.name, self.folder.path, asdict(config))

    def execute(self) -> int:
        """The number of finished steps."""
        self.display.say(
            f"Run {self.config.name}: {sum(p.numel() for p in self.model.parameters()):,} parameters, {ranks.world()} "
            f"processes, backend {dispatch.contract()['backend']} ({dispatch.instruction_set()}), contract "
            f"{dispatch.contract_id()}"
        )
        try:
            with start_roller(self.config, self.model) as self.roller:
                learner, progress = self.resume(*self._newest) if self._newest else self.begin()
                self.display.say(f"held-out score after warm start: {describe(progress.before.score)}")
                progress = self.learn(learner, progress)
                self.finish(progress)
        except NotEqualError as error:
            raise self.explained(error) from error
        return progress.step

    def explained(self, error: NotEqualError) -> NotEqualError:
        """The same on every rank with the diagnosis in its words; writes audit/difference.json and the audit's report.
        A rank diagnoses its own tokens, with the weights and packed copies that gave them; the first such rank's
        words count."""
        own, failure = explain(self.model, error.evidence) if error.evidence else (None, "")
        counts = error.evidence and (error.evidence.step, error.evidence.mismatch())
        found = ranks.gather((own, failure, counts))
        diagnosis = next((one for one, _, _ in found if one is not None), None)
        step, mismatch = next(counts for _, _, counts in found if counts)
        said = diagnosis.sentence() if diagnosis else next(text for _, text, _ in found if text)
        unexplained = {"step": step, "mismatch": mismatch.metrics(), "tables": [], "failure": said}
        self.folder.write_json(DIFFERENCE, plain(diagnosis.plain() if diagnosis else unexplained))
        try:
            self.audit()
            self.tracker.close()
        except Exception as problem:  # must not take the place of the difference
            said += f" The audit of the run failed, too ({type(problem).__name__}: {problem})."
        return NotEqualError(f"{error} {said}", error.evidence)

    def begin(self) -> tuple[Learner, Progress]:
        """Warm start, its held-out result, and the first checkpoint."""
        with self.display.phase("warm start", self.config.warmstart.steps) as phase:
            for record in warm_start(self.config, self.bank, self.model, self.vocabulary):
                self.folder.check()
                phase.advance(record)
                self.tracker.log(int(record["step"]), record)
        progress = Progress(
            step=0,
            before=self.examine(),
            mismatch=Mismatch.total([]),
            wall_s=self.wall_s(),
            reward_models=self.source.digests,
            processes=teams.count(),
            recordings=recordings(self.config.scenarios, self.bank),
        )
        learner = Learner(self.model, self.config.rl.optim, self.config.rl.steps)
        save(self.folder, learner, progress)
        return learner, progress

    def resume(self, step: int, path: Path) -> tuple[Learner, Progress]:
        """Model, optimizer and progress as the checkpoint of ``step`` finished steps in ``path`` holds them; later
        metrics and episodes are dropped. The model has its weights (`__init__`)."""
        progress = load_progress(path)
        if progress.step != step:
            raise MetronomeError(f"{path / PROGRESS}: says step {progress.step}, in the checkpoint of step {step}")
        learner = Learner(self.model, self.config.rl.optim, self.config.rl.steps)
        learner.load(path)
        self.folder.keep_before(step)
        self._earlier_s = progress.wall_s
        return learner, progress

    def learn(self, learner: Learner, progress: Progress) -> Progress:
        """RL from where ``progress`` stands to the recipe's last step, with evaluations, records and checkpoints."""
        rl = self.config.rl
        self.roller.publish()
        during = self.held_out[: self.watched]
        first = rl.steps if progress.stopped else progress.step
        with self.display.phase("RL", rl.steps, first) as phase:
            phase.held_out(progress.before.score[""])
            steps = loop.steps(
                self.config, self.bank, self.roller, learner, self.source, self.reference(), first, progress.scales
            )
            for result in steps:
                done = progress.step + 1
                mismatch = Mismatch.total([progress.mismatch, result.mismatch])
                progress = replace(
                    progress, step=done, mismatch=mismatch, wall_s=self.wall_s(), scales=dict(result.scales)
                )
                metrics, sampled = dict(result.metrics), None
                if done % rl.evaluate_every == 0 and done < rl.steps:
                    sampled = partial(samples, result.episodes, self.bank, self.config.scenarios)
                    found = self.evaluate(during)
                    metrics |= found.named("held_out")
                    phase.held_out(found.score[""])
                self.folder.append_metrics(metrics)
                self.tracker.log(self.config.warmstart.steps + done, metrics, sampled)
                phase.advance(metrics)
                if "proxy/held_out" in metrics:
                    progress = replace(progress, stopped=self.alarmed(progress))
                if rl.save_episodes_every and (done - 1) % rl.save_episodes_every == 0:
                    name = f"episodes/step_{done - 1:06d}.rank_{teams.count_before()}.safetensors"
                    if teams.member() == 0:
                        with self.folder.writing(name):
                            save_episodes(self.folder.path / name, result.episodes)
                if done % rl.checkpoint_every == 0 or done == rl.steps or progress.stopped:
                    save(self.folder, learner, progress)
                    self.sender.saved(progress.step)
                if progress.stopped:
                    break
        return progress

    def finish(self, progress: Progress) -> None:
        """The held-out result of the final weights, summary.json, the closing table and the audit's report. Raises
        DifferentError, on every rank, when the audit has found a bit that differs or records that contradict it. That
        nothing could be re-scored, because the recipe takes no step or saves no episode, is said, and no fault: each
        step's own check has passed."""
        after = self.examine()
        summary: dict[str, float | int | str] = {
            **progress.before.named("before"),
            **after.named("after"),
            **progress.mismatch.metrics(),
            "weights_digest": checkpoint.weights_digest(self.model),
            "processes": teams.count(),  # another number sums gradients in another order
            "wall_s": self.wall_s(),
        }
        if self.source.models:
            summary["reward_models"] = ", ".join(self.source.digests)
            points = watch.evaluations(self.folder, progress.before)
            if points[-1].step < progress.step:  # a run that was stopped was evaluated at its last step
                points.append(watch.point(progress.step, after))
            summary |= watch.summary(watch.watch(self.folder, points, self.config.source.watch))
        self.folder.write_json("summary.json", summary)
        self.display.summary(summary, self.folder.path)
        fault = self.audit()
        self.tracker.close()
        if fault:
            raise DifferentError(
                f"the closing audit found {fault}, though every step's own check passed; see "
                f"{self.folder.path / 'audit' / 'report.html'}"
            )

    def audit(self) -> str:
        """Writes audit/report.html and report.json, and says what they say. Returns what is wrong, "" for nothing, on
        every rank and only when all is written, since the launcher stops the others as soon as one has ended badly."""
        fault = ""
        if ranks.rank() == 0:
            folder = self.folder.path / "audit"
            with locked(folder, AUDIT_WAIT_S), self.folder.writing("audit"):
                report = audit(self.folder.path, AUDITED)
            self.display.say(statement(report, folder))
            self.tracker.artifact(folder)
            conflicts = report.not_comparable
            if report.verdict is Verdict.DIFFERENT:
                fault = "bits that differ between sampler and learner"
            elif conflicts.contradictions or conflicts.episodes:
                fault = "that what the run saved contradicts what it recorded"
        return str(ranks.gather(fault)[0])

    def alarmed(self, progress: Progress) -> bool:
        """Says so when the learned reward is over-optimised since the last evaluation; whether the run ends for it."""
        seen = watch.watch(self.folder, watch.evaluations(self.folder, progress.before), self.config.source.watch)
        if seen is not None and seen.now.step == progress.step:
            self.display.say(str(seen))
        return seen is not None and self.config.source.watch.stop

    def reference(self) -> Reference | None:
        """The warm-started policy, where its distance costs something or a learned reward may lead far away from it."""
        rl = self.config.rl
        if not rl.reference_weight and not self.source.models:
            return None
        path = self.folder.checkpoint_path(0) / "model"
        return Reference.load(path, self.vocabulary.classes, rl.micro_batch)

    def examine(self) -> HeldOut:
        """The held-out result, sampled at the training temperature, and the greedy one beside it under ``greedy``: a
        policy that is right less than half of the time is silent when greedy, so that neither tells the whole."""
        self.roller.publish()
        watched = self.watched if self.source.models else 0
        result, greedy = self.evaluate(self.held_out, watched=watched), self.evaluate(self.held_out, temperature=0.0)
        return replace(result, score=result.score | {"greedy": greedy.score[""]})

    def evaluate(self, scenarios: Sequence[Scenario], temperature: float | None = None, watched: int = 0) -> HeldOut:
        """Under the weights last published, at the training temperature if no other is given."""
        temperature = self.config.rollout.temperature if temperature is None else temperature
        return evaluate(self.roller, scenarios, self.source, self.config.seed, temperature, watched)

    @property
    def watched(self) -> int:
        """How many of the held-out scenarios, the first ones, are evaluated during RL."""
        return self.config.eval.during * len(self.config.scenarios.families)

    def wall_s(self) -> float:
        return self._earlier_s + time.perf_counter() - self._start


@needing("loading the model", "take a smaller one (model.preset, model.checkpoint)")
def build_model(config: TrainConfig, resumed: Path | None = None) -> InteractionModel:
    """The recipe's model, its weights packed. ``resumed``: model folder to read instead of the recipe's checkpoint,
    which a run needs only once."""
    dtype, context = getattr(torch, config.model.dtype), config.rollout.context
    if config.model.checkpoint is None:
        model = InteractionModel(give(config.model.fresh(), context), dtype)
        model.init_weights(config.seed)
        model.to(dispatch.device())
    else:
        model = checkpoint.load(resumed or Path(config.model.checkpoint), dtype, context=context)
    model.pack()
    return model


def describe(result: dict[str, float]) -> str:
    return ", ".join(f"{name or 'mean'} {value:.1%}" for name, value in result.items())
