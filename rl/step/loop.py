"""The RL loop: sample, judge, compare sampler and learner, learn, publish the weights to the sampler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from kernels import dispatch
from model.program import ranks, teams
from model.program.exhausted import needing
from model.weights import packs
from model.weights.checkpoint import weights_digest
from reward.source import Judged, RewardSource
from rl import reference
from rl.config import TrainConfig
from rl.learner.deepspeed import Learner
from rl.reference import Reference
from rl.rollers import SMALLER
from rl.step import tree
from rl.step.credit import Scales, token_weights
from rl.step.gradient import gradient_of
from rl.step.identity import Evidence, Mismatch, check_comparable, check_identity
from rollout.engines.roller import Roller
from rollout.play import Play
from rollout.record.episode import Episode
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank


@dataclass(frozen=True)
class StepResult:
    """The results of one step."""

    metrics: dict[str, float | int | str]  # equal on every rank
    mismatch: Mismatch  # over all ranks; no bit differs, or the step would have raised
    episodes: list[Episode]  # this team's
    scales: Scales  # of the advantages, after this step


def steps(
    config: TrainConfig,
    bank: SpeechBank,
    roller: Roller,
    learner: Learner,
    source: RewardSource,
    start: Reference | None,
    first: int,
    scales: Scales,
) -> Iterator[StepResult]:
    """Takes the recipe's steps from ``first`` on, each strictly on-policy: one rollout batch, one optimizer step.
    ``start``: the reference policy, of which the KL is measured and, with the recipe's weight, penalised. ``scales``:
    of the advantages, as the step before ``first`` left them.

    Raises NotComparableError or NotEqualError before a step that would not be on-policy, MetronomeError for a reward or
    log-prob that is not finite; the model is then as the last finished step left it."""
    classes = Vocabulary.of(learner.model).classes
    digest = weights_digest(learner.model)
    for step in range(first, config.rl.steps):
        clock = time.perf_counter()
        with needing("the rollout", SMALLER):
            mine = teams.part(plays(config, bank, step))
            episodes = teams.merged(roller.play(mine, config.seed, config.rollout.temperature) if mine else [])
        rollout_s = time.perf_counter() - clock
        judged = source.judge(episodes)
        judge_s = time.perf_counter() - clock - rollout_s
        log_ratio = start.log_ratio(episodes) if start else []
        credit = token_weights(episodes, judged.acting, log_ratio, config.rl, scales)
        scales = credit.scales
        check_comparable(episodes, dispatch.contract_id(), digest, learner.model.sound_steps)
        gradient = gradient_of(
            learner.model,
            episodes,
            credit.weights,
            classes,
            config.rollout.temperature,
            config.rl.micro_batch,
            sound_weights=credit.sound_weights,
        )
        mismatch = check_identity(Evidence(step, episodes, *gradient.choices(), config.rl.micro_batch))
        norm = learner.step(gradient)
        roller.publish()
        packs.check(learner.model)
        digest = weights_digest(learner.model)
        total_s = time.perf_counter() - clock
        yield StepResult(
            {
                "step": step,
                "weights_digest": digest,
                "packs_digest": packs.digest(learner.model),
                **rewards(judged),
                **mismatch.metrics(),
                **credit.metrics(),
                **(reference.metrics(log_ratio) if start else {}),
                "policy/entropy": tree.mean(gradient.entropy.tolist()),
                "policy/grad_norm": norm,
                "time/rollout_s": max(ranks.gather(rollout_s)),
                "time/judge_s": max(ranks.gather(judge_s)),
                "time/learner_s": total_s - rollout_s - judge_s,
                "time/step_s": total_s,
            },
            mismatch,
            episodes,
            scales,
        )


def plays(config: TrainConfig, bank: SpeechBank, step: int) -> list[Play]:
    """This team's rollouts of a step: its share of the groups. Each group is a new train scenario, families in turn."""
    out = []
    for g in teams.share(config.rl.groups):
        index = step * config.rl.groups + g
        item = config.scenarios.in_turn(index, "train", index, bank)
        out += [Play(item, r) for r in range(config.rl.rollouts)]
    return out


def rewards(judged: Judged) -> dict[str, float]:
    """Means over all ranks' episodes: ``reward/score`` by the rules, and an episode's reward, in all (``mean``) and by
    axis, under ``reward/`` by the rules and under ``proxy/`` by the reward models, whichever of them RL learns from.
    The mean of an axis is over the episodes that have it."""
    values = {"reward/score": [s.value for s in judged.scores]}
    for kind, given in (("reward", judged.rules), ("proxy", judged.proxy)):
        if given:
            values[f"{kind}/mean"] = [r.total for r in given]
            for r in given:
                for axis in r.axes:
                    values.setdefault(f"{kind}/{axis}", []).append(r.sum(axis))
    names = dict.fromkeys(name for part in ranks.gather(list(values)) for name in part)  # a rank may lack an axis
    return {name: tree.mean(values.get(name, ())) for name in names}
