"""Supervised warm start: maximum likelihood on scripted demonstrations, so that RL begins from a policy that acts.

The demonstrations contain mistakes on purpose, at stated rates (`rollout.world.base.Mistakes`): the warm-started policy
has seen what may be said and when, and RL has to teach what is right.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.backbone.transformer import InteractionModel
from model.program import teams
from rl.config import TrainConfig
from rl.learner.deepspeed import Learner
from rl.step.gradient import gradient_of
from rollout.record.transcript import Transcript, from_observations
from rollout.scenarios.demonstrate import enact
from rollout.seeds import demonstration_seed, mistakes_generator
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
    config: TrainConfig, bank: SpeechBank, vocabulary: Vocabulary, patch: int, step: int
) -> list[Transcript]:
    """This team's share of a step's demonstrations; a pure function of config and step. ``patch``: side of the model's
    video patches."""
    grammar, out = config.rollout.grammar(vocabulary, patch), []
    for i in teams.share(config.warmstart.episodes):
        observed, actions = demonstration(config, bank, step * config.warmstart.episodes + i)
        out.append(from_observations(observed, actions, grammar))
    return out


def warm_start(
    config: TrainConfig, bank: SpeechBank, model: InteractionModel, vocabulary: Vocabulary
) -> Iterator[dict[str, float]]:
    """Trains the model in place. Yields a record for each step: ``step``, ``warmstart/loss`` (mean -log p of a chosen
    token, nats), ``warmstart/grad_norm`` (before clipping). Raises MetronomeError when a log-prob is not finite."""
    learner = Learner(model, config.warmstart.optim, config.warmstart.steps)
    for step in range(config.warmstart.steps):
        transcripts = demonstrations(config, bank, vocabulary, model.senses.patch, step)
        tokens = sum(teams.gather(sum(len(t.text.chunk) for t in transcripts)))
        weights = [torch.full((len(t.text.chunk),), 1.0 / tokens) for t in transcripts]
        gradient = gradient_of(model, transcripts, weights, vocabulary.classes, 1.0, config.rl.micro_batch)
        norm = learner.step(gradient)
        loss = -sum(teams.gather(float(gradient.logprob.double().sum()))) / tokens
        yield {"step": step, "warmstart/loss": loss, "warmstart/grad_norm": norm}
