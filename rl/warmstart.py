"""Supervised warm start: maximum likelihood on scripted demonstrations, so that RL begins from a policy that acts.

The demonstrations contain mistakes on purpose, at stated rates (`rollout.world.base.Mistakes`): the warm-started policy
has seen what may be said and when, and RL has to teach what is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.backbone.transformer import InteractionModel
from model.inputs import Senses
from model.program import teams
from rl.config import TrainConfig
from rl.learner.deepspeed import Learner
from rl.step.gradient import gradient_of
from rollout.record.transcript import Transcript, from_observations
from rollout.scenarios.demonstrate import enact
from rollout.seeds import demonstration_seed, mistakes_generator, session_key
from rollout.turn.action import Action
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank


def demonstration(config: TrainConfig, bank: SpeechBank, index: int) -> tuple[list[Observation], list[Action]]:
    """(what the user gives, the actions), [chunks] each, of demonstration ``index`` of the run."""
    item = config.scenarios.in_turn(index, "train", demonstration_seed(config.seed, index), bank)
    rng = mistakes_generator(config.seed, index)
    observed, actions, _ = enact(item, config.scenarios.expert(item, rng))
    return observed, actions


def demonstrations(
    config: TrainConfig, bank: SpeechBank, vocabulary: Vocabulary, senses: Senses, step: int
) -> list[Transcript]:
    """This team's share of a step's demonstrations; a pure function of config and step. ``senses``: the model's."""
    grammar, out = config.rollout.grammar(vocabulary, senses), []
    for i in teams.share(config.warmstart.episodes):
        index = step * config.warmstart.episodes + i
        observed, actions = demonstration(config, bank, index)
        written = from_observations(observed, actions, grammar)
        out.append(replace(written, key=session_key(config.seed, f"demonstration/{index}", 0)))
    return out


def likelihood(config: TrainConfig, shown: Sequence[Transcript]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights of each demonstration's tokens and chunks of sound (`rl.step.gradient.gradient_of`): maximum
    likelihood, the mean over all teams' tokens, and ``warmstart.voice_weight`` times the mean over their sound."""
    spoken = [0 if one.voice is None else len(one.voice.chunk) for one in shown]
    tokens = sum(teams.gather(sum(len(one.text.chunk) for one in shown)))
    sounds = sum(teams.gather(sum(spoken)))
    share = config.warmstart.voice_weight / max(sounds, 1)
    weights = [torch.full((len(one.text.chunk),), 1.0 / tokens) for one in shown]
    return weights, [torch.full((n,), share) for n in spoken]


def warm_start(
    config: TrainConfig, bank: SpeechBank, model: InteractionModel, vocabulary: Vocabulary
) -> Iterator[dict[str, float]]:
    """Trains the model in place. Yields a record for each step: ``step``, ``warmstart/loss`` (mean -log p of a chosen
    token, nats), ``warmstart/grad_norm`` (before clipping), with a voice ``warmstart/voice_loss`` (mean
    flow-matching loss of a chunk). Raises MetronomeError when a log-prob is not finite."""
    learner = Learner(model, config.warmstart.optim, config.warmstart.steps)
    for step in range(config.warmstart.steps):
        transcripts = demonstrations(config, bank, vocabulary, model.senses, step)
        weights, sound_weights = likelihood(config, transcripts)
        gradient = gradient_of(
            model, transcripts, weights, vocabulary.classes, 1.0, config.rl.micro_batch, sound_weights=sound_weights
        )
        norm = learner.step(gradient)
        record = {"step": step, "warmstart/loss": _mean_loss(gradient.logprob), "warmstart/grad_norm": norm}
        if model.voice_head is not None:
            record["warmstart/voice_loss"] = _mean_loss(gradient.sound_logprob)
        yield record


def _mean_loss(logprob: Tensor) -> float:
    """Minus the mean over all teams' choices."""
    sums = teams.gather((float(logprob.double().sum()), len(logprob)))
    total, count = (sum(column) for column in zip(*sums, strict=True))
    return -total / max(count, 1)
