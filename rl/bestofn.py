"""The best-of-n curve: how far a learned reward can be optimised without any training before its picks get worse.

    python -m rl.bestofn --run runs/NAME [--step N] [--models '[FOLDER, FOLDER]'] --json FILE

Of n rollouts of a held-out scenario by one policy, the one with the highest learned reward is picked, and the rules
score it. For comparison: the score of the rollout that the rules rank first, the most that any reward could reach. A
picture is written beside the JSON file.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.bestofn")

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kernels.errors import MetronomeError
from model.placement import PlacementConfig
from model.program.files import write_json, write_whole
from model.program.outputs import OutputFile
from model.program.ranges import FilePath, FilePaths, Range, Some, Steps
from model.program.recipe import read_recipe
from model.weights import checkpoint
from reward.source import RewardSource, SourceConfig
from reward.study.bestofn import Pick, curve, mean
from rl.config import TrainConfig
from rl.display import Display
from rl.stored import opened
from rollout.engines.embedded import SessionEngine
from rollout.play import Play, play
from rollout.world.speech import SpeechBank


@dataclass(frozen=True)
class BestOfNConfig:
    """The recipe of `rl.bestofn`."""

    run: FilePath  # folder of the run whose policy samples, by that run's recipe
    json: Annotated[str, OutputFile(beside=(".png",))]  # for the results; the picture gets its name with .png
    step: Steps | None = None  # which of its checkpoints, the newest by default
    models: FilePaths = ()  # folders of reward models; the run's own by default
    scenarios: Some = 24  # held-out, of each family
    samples: Annotated[int, Range(2, 10**4)] = 64  # rollouts of each
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    trust_families: bool = False  # import families that are not shipped; importing executes their module


def sample(
    config: TrainConfig, engine: SessionEngine, source: RewardSource, scenarios: int, samples: int, display: Display
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Each family's (rule scores, learned rewards), both [scenarios, samples]."""
    bank = SpeechBank.open(config.speech_dir)
    seed, temperature = config.seed, config.rollout.temperature
    rewards = {}
    with display.phase("best of n", scenarios * len(config.scenarios.families)) as phase:
        for family in config.scenarios.members:
            rule, proxy = np.zeros((2, scenarios, samples))
            for i in range(scenarios):
                item = config.scenarios.scenario(family, "held_out", i, bank)
                judged = source.judge(play(engine, [Play(item, r) for r in range(samples)], seed, temperature))
                rule[i] = [s.value for s in judged.scores]
                proxy[i] = [p.total for p in judged.proxy]
                phase.advance({"reward/score": float(rule[i].mean()), "proxy/mean": float(proxy[i].mean())})
            rewards[family] = (rule, proxy)
    return rewards


def table(picks: Sequence[Pick]) -> Table:
    out = Table("family", "n", "score of the pick", "learned reward", "the rules' own pick", title="Best of n")
    for p in picks:
        rule = f"{p.rule:.1%} ± {'?' if p.rule_error is None else f'{p.rule_error:.1%}'}"
        out.add_row(p.family, str(p.n), rule, f"{p.proxy:+.3f}", f"{p.oracle:.1%}")
    return out


def main(arguments: list[str] | None = None) -> None:
    given = read_recipe("rl.bestofn", "The best-of-n curve of reward models.", BestOfNConfig, arguments).config
    config, folder = opened(given.run, given.placement, given.trust_families)
    source = RewardSource.load(config.scenarios, SourceConfig(models=given.models or config.source.models))
    if not source.models:
        raise MetronomeError(f"the run {given.run} has no reward models of its own: name some by --models")
    path = folder.latest_checkpoint()[1] if given.step is None else folder.checkpoint_path(given.step)
    policy = checkpoint.load(path / "model", keep_weights=False)
    source.check_policy(policy)
    engine = SessionEngine.of(policy, config.rollout, given.samples)
    rewards = sample(config, engine, source, given.scenarios, given.samples, Display(speaks=True))
    curves = [curve(family, rule, proxy) for family, (rule, proxy) in rewards.items()]
    picks = [*mean(curves), *(p for one in curves for p in one)]
    Console(highlight=False).print(table(picks))
    report = {
        "policy": str(path),
        "weights_digest": engine.weights_digest,
        "reward_models": source.digests,
        "made_from": [model.origin for model in source.models],
        "scenarios": given.scenarios,
        "samples": given.samples,
        "picks": [asdict(p) for p in picks],
    }
    write_json(Path(given.json), report)
    from reward.study.pictures import best_of_n  # takes a second to import

    picture = Path(given.json).with_suffix(".png")
    write_whole(picture, best_of_n([mean(curves), *curves]))
    print(f"written to {given.json} and {picture}")
