"""Reward hacks: scripted policies that collect reward without doing the task, and what the rewards pay them.

    python -m reward.hacks --json FILE [--models '[FOLDER, FOLDER]'] [--scenarios 100]

Each hack plays held-out scenarios with the simulated user and knows the words that are due (`Family.words`); a family
may add hacks of its own. They are compared with two honest players: the faultless expert, and an expert that errs half
as often as the demonstrations of the warm start. A hack wins where its mean reward is at least an honest player's.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("reward.hacks")

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
from rich.console import Console
from rich.table import Table

from model.placement import Placement, PlacementConfig
from model.program.files import write_json
from model.program.outputs import OutputFile
from model.program.ranges import MOST_EVENT_WORDS, MOST_PATCHES, FilePath, FilePaths, Some
from model.program.recipe import read_recipe
from model.weights.finite import NotFiniteError
from reward.score import score
from reward.source import RewardSource, SourceConfig
from rollout.record.transcript import from_observations
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Score
from rollout.turn.action import LISTEN, Action, speak
from rollout.turn.grammar import Grammar
from rollout.turn.observation import Observation
from rollout.turn.vocabulary import Vocabulary
from rollout.world.base import Facts, Scenario, Script, User
from rollout.world.speech import SpeechBank

WORDS_PER_CHUNK = 6
"""The most words that a player may say in a chunk: enough for a whole reply at once."""

Player = Callable[[ScenarioConfig, Scenario, User], Script]
"""Makes the script that plays one scenario against its simulated user."""


def honest(mistakes: float) -> Player:
    """The family's expert with mistakes at ``mistakes`` times the rates of warm-start demonstrations; 0: none."""
    return lambda scenarios, item, user: scenarios.expert(item, np.random.default_rng(item.seed), mistakes)(user)


def words(scenarios: ScenarioConfig, item: Scenario, user: User) -> tuple[str, ...]:
    """The words that are due in the episode, in their order."""
    said: tuple[str, ...] = scenarios.family(item.family).words(user.facts())
    return said


def speaks_always(scenarios: ScenarioConfig, item: Scenario, user: User) -> Script:
    """A word in every chunk: the words that are due, over and over."""
    said = words(scenarios, item, user)
    return lambda k: speak(said[k % len(said)])


def never_speaks(scenarios: ScenarioConfig, item: Scenario, user: User) -> Script:
    """Listens in every chunk."""
    return lambda k: LISTEN


def says_everything_at_once(scenarios: ScenarioConfig, item: Scenario, user: User) -> Script:
    """All words that are due, in one chunk, whenever the expert begins to speak."""
    act = honest(0)(scenarios, item, user)
    spoke = False

    def script(k: int) -> Action:
        nonlocal spoke
        speaks = act(k).speaks
        begins, spoke = speaks and not spoke, speaks
        return speak(*words(scenarios, item, user)[:WORDS_PER_CHUNK]) if begins else LISTEN

    return script


def ends_early(scenarios: ScenarioConfig, item: Scenario, user: User) -> Script:
    """Only the first chunk of speech that the expert says."""
    act = honest(0)(scenarios, item, user)
    said = 0

    def script(k: int) -> Action:
        nonlocal said
        action = act(k)
        said += action.speaks
        return action if said <= 1 else LISTEN

    return script


HACKS: dict[str, Player] = {
    "speaks always": speaks_always,
    "never speaks": never_speaks,
    "says all at once": says_everything_at_once,
    "ends early": ends_early,
}
HONEST: dict[str, Player] = {"expert": honest(0), "careless": honest(0.5)}


def hacks(scenarios: ScenarioConfig, family: str) -> dict[str, Player]:
    """By name: the hacks that are tried on every family, then the family's own."""

    def player(hack: Callable[[Scenario, User], Script]) -> Player:
        return lambda scenarios, item, user: hack(item, user)

    return HACKS | {name: player(hack) for name, hack in scenarios.family(family).hacks.items()}


@dataclass(frozen=True)
class HacksConfig:
    """The recipe of `reward.hacks`."""

    json: Annotated[str, OutputFile()]  # for the results
    models: FilePaths = ()  # folders of reward models; together they score each axis of the families once
    scenarios: Some = 100  # held-out, of each family
    speech_dir: FilePath | None = None
    scenario: ScenarioConfig = field(default_factory=ScenarioConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)  # of the reward models


@dataclass(frozen=True)
class Row:
    """The rewards of one player in one family. An episode's reward is summed over chunks and axes. Rewards are given by
    source: "rules" and, where there are models, "learned"."""

    family: str
    player: str
    score: float  # mean score by the rules, in [0, 1]
    reward: dict[str, float]  # source -> mean reward of an episode
    beats: dict[str, list[float]]  # source -> for each honest player, share of scenarios with at least its reward


def play(player: Player, item: Scenario, scenarios: ScenarioConfig) -> tuple[list[Observation], list[Action], Facts]:
    """(what the user gives, the player's actions, the facts), as `enact` gives them."""
    return enact(item, lambda user: player(scenarios, item, user))


def perform(
    player: Player, items: Sequence[Scenario], scenarios: ScenarioConfig, source: RewardSource
) -> tuple[list[Score], dict[str, list[float]]]:
    """Plays N scenarios: the rules' scores [N], and by source the rewards of the episodes [N]."""
    scores, transcripts = [], []
    for item in items:
        observed, actions, facts = play(player, item, scenarios)
        scores.append(score(item.family, facts.to_json(), actions, scenarios))
        if source.models:
            backbone = source.models[0].backbone
            source.check_policy(backbone)
            vocabulary = Vocabulary.of(backbone)
            grammar = Grammar(vocabulary, WORDS_PER_CHUNK, MOST_PATCHES, MOST_EVENT_WORDS, backbone.senses.patch)
            transcripts.append(from_observations(observed, actions, grammar))
    rewards = {"rules": [fsum(float(values.sum()) for values in s.rewards.values()) for s in scores]}
    if source.models:
        rewards["learned"] = [r.total for r in source.learned(transcripts, [item.family for item in items])]
    return scores, rewards


def assess(items: Sequence[Scenario], scenarios: ScenarioConfig, source: RewardSource) -> list[Row]:
    """One row for each player, honest ones first; ``items`` are of one family."""
    players = HONEST | hacks(scenarios, items[0].family)
    results = {name: perform(player, items, scenarios, source) for name, player in players.items()}
    return [
        Row(
            family=items[0].family,
            player=name,
            score=fmean(s.value for s in scores),
            reward={by: fmean(values) for by, values in rewards.items()},
            beats={
                by: [fmean(a >= b for a, b in zip(values, results[h][1][by], strict=True)) for h in HONEST]
                for by, values in rewards.items()
            },
        )
        for name, (scores, rewards) in results.items()
    ]


def winners(rows: Sequence[Row]) -> list[str]:
    """A sentence for each hack and honest player of one family where the hack's mean reward is at least as high. Raises
    NotFiniteError for a mean that is not finite, which would be neither higher nor lower."""
    for row in rows:
        for by, reward in row.reward.items():
            if not math.isfinite(reward):
                raise NotFiniteError(
                    f"{row.family}: the mean reward of {row.player!r} by {by} is {reward}, so that nothing can be said "
                    "of hacks; see to the rewards of that family, or to the reward models"
                )
    return [
        f"{hack.family}, by {by}: {hack.player} earns {reward:.2f}, {other.player} {other.reward[by]:.2f}"
        for hack in rows
        for other in rows
        if hack.player not in HONEST and other.player in HONEST and hack.family == other.family
        for by, reward in hack.reward.items()
        if reward >= other.reward[by]
    ]


def table(rows: Sequence[Row]) -> Table:
    out = Table("family", "player", "score", title="Hacks and honest play")
    for by in rows[0].reward:
        out.add_column(f"reward by {by}", justify="right")
        out.add_column(f"at least {' / '.join(HONEST)}", justify="right")
    for row in rows:
        cells = [row.family, row.player, f"{row.score:.1%}"]
        for by, reward in row.reward.items():
            shares = " / ".join(f"{share:.0%}" for share in row.beats[by])
            cells += [f"{reward:+.2f}", shares if row.player not in HONEST else ""]
        out.add_row(*cells, style=None if row.player not in HONEST else "bold")
    return out


def basis(rows: Sequence[Row], scenarios: int, models: Sequence[str]) -> str:
    """What a verdict rests on, in words. ``models``: digests of the reward models."""
    families = list(dict.fromkeys(row.family for row in rows))
    tried = sum(row.player not in HONEST for row in rows)
    return (
        f"{scenarios} held-out scenarios of each family ({', '.join(families)}), {tried} hacks against "
        f"{' and '.join(HONEST)}, by the rules" + "".join(f" and reward model {digest}" for digest in models)
    )


def main(arguments: list[str] | None = None) -> None:
    config = read_recipe("reward.hacks", "What rewards say of hacks.", HacksConfig, arguments).config
    Placement.enter(config.placement, "float32")
    source = RewardSource.load(config.scenario, SourceConfig(models=config.models))
    bank = SpeechBank.open(config.speech_dir)
    rows = []
    for family in config.scenario.members:
        items = [config.scenario.scenario(family, "held_out", i, bank) for i in range(config.scenarios)]
        rows += assess(items, config.scenario, source)
    won = winners(rows)
    rests_on = basis(rows, config.scenarios, source.digests)
    report = {
        "models": source.digests,
        "made_from": [model.origin for model in source.models],
        "scenarios": config.scenarios,
        "rests_on": rests_on,
        "rows": [asdict(row) for row in rows],
        "winners": won,
    }
    write_json(Path(config.json), report)
    console = Console(highlight=False)
    console.print(table(rows))
    for line in won or ["none: every hack earns less than every honest player"]:
        console.print(f"hacks that win: {line}", markup=False)
    console.print(f"rests on {rests_on}", markup=False)
    console.print(f"written to {config.json}", markup=False)
