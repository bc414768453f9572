"""The whole algorithm on one page: warm start, then sample, judge, credit, gradient, check, step.

    accelerate launch --config_file configs/accelerate/cpu.yaml -m rl.minimal --config configs/quickstart.yaml

It ends with the very weights of `rl.train` on the same recipe and number of processes, and prints their digest. Left
out: DeepSpeed (its step is AdamW's, to the bit), evaluation, checkpoints, records, audit. Refused (`check_minimal`):
what needs those, learned rewards, a reference policy, bf16 (it needs fp32 masters), workers and vLLM. Why there is no
importance ratio, no clipping of one, no second step on a batch: sampler and learner are one function, so it is 1, and
`check` sees to it.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.minimal")

import math

import torch

from kernels import ops
from kernels.adamw import AdamW
from model.backbone.transformer import InteractionModel
from model.placement import Placement
from model.program import ranks
from model.weights.checkpoint import weights_digest
from reward.source import RewardSource
from rl.config import OptimConfig, TrainConfig
from rl.consistency import check_minimal, check_recipe
from rl.learner.deepspeed import learning_rate
from rl.rollers import plays_of_a_step
from rl.run import build_model
from rl.step import tree
from rl.step.advantage import RunningScale
from rl.step.credit import token_weights
from rl.step.gradient import Gradient, gradient_of
from rl.step.identity import choices
from rl.step.loop import plays
from rl.train import parse
from rl.warmstart import demonstrations, likelihood
from rollout.engines.embedded import SessionEngine
from rollout.play import play
from rollout.record.episode import Episode
from rollout.turn.vocabulary import Vocabulary
from rollout.world.speech import SpeechBank


def main(arguments: list[str] | None = None) -> None:
    config, resume, _ = parse(arguments)
    Placement.enter(config.placement, config.model.dtype)
    with ranks.joined():
        check_recipe(config)
        check_minimal(config, resume)
        digest = train(config)
        if ranks.rank() == 0:
            print(f"weights_digest {digest}")


def train(config: TrainConfig) -> str:
    """Returns the digest of the weights at the end."""
    bank = SpeechBank.open(config.speech_dir)
    model = build_model(config)
    vocabulary, micro_batch = Vocabulary.of(model), config.rl.micro_batch

    supervised = Optimizer(model, config.warmstart.optim, config.warmstart.steps)
    for step in range(config.warmstart.steps):
        shown = demonstrations(config, bank, vocabulary, model.senses, step)  # scripted, partly wrong
        weights, heard = likelihood(config, shown)
        supervised.step(gradient_of(model, shown, weights, vocabulary.classes, 1.0, micro_batch, sound_weights=heard))
    engine = SessionEngine.of(model, config.rollout, plays_of_a_step(config))
    source = RewardSource.load(config.scenarios, config.source)
    optimizer = Optimizer(model, config.rl.optim, config.rl.steps)
    temperature, scales = config.rollout.temperature, dict[str, RunningScale]()
    for step in range(config.rl.steps):
        episodes = play(engine, plays(config, bank, step), config.seed, temperature)  # groups of rollouts a scenario
        judged = source.judge(episodes)  # a reward a chunk, on every axis
        credit = token_weights(episodes, judged.acting, [], config.rl, scales)  # leave-one-out, by chunk and axis
        scales = credit.scales
        weights, classes, heard = credit.weights, vocabulary.classes, credit.sound_weights
        gradient = gradient_of(model, episodes, weights, classes, temperature, micro_batch, sound_weights=heard)
        check(episodes, gradient)
        optimizer.step(gradient)
        engine.publish()
    return weights_digest(model)


def check(episodes: list[Episode], gradient: Gradient) -> None:
    """Raises RuntimeError unless the learner gave every sampled token the sampler's log-prob and every row of
    log-probs the sampler's digest, bit for bit."""
    for name, learned in zip(("logprob", "digest"), gradient.choices(), strict=True):
        if not torch.equal(choices(episodes, name).view(torch.uint8), learned.view(torch.uint8)):
            raise RuntimeError(f"sampler and learner are not the same function: {name} differs")


class Optimizer:
    """AdamW on the sum of all ranks' gradients, clipped by its norm, in fp32; decay of matrices only."""

    def __init__(self, model: InteractionModel, optim: OptimConfig, steps: int) -> None:
        self.model, self.optim, self.steps, self.taken = model, optim, steps, 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        matrices, vectors = ([p for p in self.parameters if (p.ndim >= 2) == two] for two in (True, False))
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = AdamW(groups, lr=optim.lr, beta1=optim.beta1, beta2=optim.beta2)

    def step(self, gradient: Gradient) -> None:
        total = tree.over_ranks(torch.cat([g.flatten() for g in gradient.parameters]))
        norm = math.sqrt(float(ops.dot(total, total)))
        if self.optim.clip_norm and norm > self.optim.clip_norm:
            total *= self.optim.clip_norm / norm
        for parameter, part in zip(self.parameters, total.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view(parameter.shape)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.optim, self.taken, self.steps)
        self.adamw.step()
        self.taken += 1
        self.model.mark_changed()  # packed copies of the weights are refused from here on, until
        self.model.repack()
