"""Policies that would like to be paid without doing the work, and what the rewards say of them.

    python -m reward.hacks --json FILE [--models '[FOLDER, FOLDER]'] [--scenarios 100]

Each hack plays held-out scenarios with the simulated user, and knows the words that it had better say
(`Family.words`); a family adds hacks of its own. Beside them stand two honest players: the faultless expert, and one
that errs half as often as the demonstrations of warm start. A hack wins where its reward is not below the honest
player's in the same scenario.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("reward.hacks")

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import fsum
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kernels.errors import MetronomeError
from model.program.files import write_whole
from model.program.recipe import read_recipe
from reward.score import score
from reward.source import RewardSource, SourceConfig
from rollout.record.transcript import from_audio
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.verdict import Score
from rollout.turn.action import LISTEN, Action, speak
from rollout.turn.grammar import Grammar
from rollout.turn.vocabulary import Vocabulary
from rollout.world.base import Facts, Scenario, Script, User
from rollout.world.speech import SpeechBank

WORDS_PER_CHUNK = 6  # that a micro-turn allows here: enough for a whole reply at once

Cast = Callable[[ScenarioConfig, Scenario, User], Script]
"""Plays a scenario of one of the families against its user."""


def honest(errs: float) -> Cast:
    """The family's expert, which makes ``errs`` times the mistakes of demonstrations."""
    return lambda scenarios, item, user: scenarios.expert(item, np.random.default_rng(item.seed), errs)(user)


def words(scenarios: ScenarioConfig, item: Scenario, user: User) -> tuple[str, ...]:
    """What an honest player says in the episode, in the order in which it is due."""
    said: tuple[str, ...] = scenarios.family(item.family).words(user.facts())
    return said


def speaks_always(scenarios: ScenarioConfig, item: Scenario, user: User) -> Script:
    said = words(scenarios, item, user)
    return lambda k: speak(said[k % len(said)])


def never_speaks(scenarios: ScenarioConfig, item: Scenario, user: User) -> Script:
    return lambda k: LISTEN


def says_everything_at_once(scenarios: ScenarioConfig, item: Scenario, user: User) -> Script:
    """All words in the chunk in which the expert would begin to speak, again whenever it would begin anew."""
    act = honest(0)(scenarios, item, user)
    spoke = False

    def script(k: int) -> Action:
        nonlocal spoke
        speaks = act(k).speaks
        begins, spoke = speaks and not spoke, speaks
        return speak(*words(scenarios, item, user)[:WORDS_PER_CHUNK]) if begins else LISTEN

    return script


def ends_early(scenarios: ScenarioConfig, item: Scenario, user: User) -> Script:
    """One word as the expert says it, then nothing more."""
    act = honest(0)(scenarios, item, user)
    said = 0

    def script(k: int) -> Action:
        nonlocal said
        action = act(k)
        said += action.speaks
        return action if said <= 1 else LISTEN

    return script


HACKS: dict[str, Cast] = {
    "speaks always": speaks_always,
    "never speaks": never_speaks,
    "says all at once": says_everything_at_once,
    "ends early": ends_early,
}
HONEST: dict[str, Cast] = {"expert": honest(0), "careless": honest(0.5)}


def hacks(scenarios: ScenarioConfig, family: str) -> dict[str, Cast]:
    """Those tried on every family, then its own."""

    def played_by(own: Callable[[Scenario, User], Script]) -> Cast:
        return lambda scenarios, item, user: own(item, user)

    return HACKS | {name: played_by(own) for name, own in scenarios.family(family).hacks.items()}


@dataclass(frozen=True)
class HacksConfig:
    json: str  # file for the results
    models: tuple[str, ...] = ()  # folders of reward models that score the families' axes, each once
    scenarios: int = 100  # held-out, of each family
    speech_dir: str | None = None
    scenario: ScenarioConfig = field(default_factory=ScenarioConfig)


@dataclass(frozen=True)
class Row:
    """What the rewards say of one player in one family. Rewards are sums over an episode, all axes together; by the
    "rules" and, if there are models, by the "learned" ones."""

    family: str
    player: str
    score: float  # the rules' mean verdict, in [0, 1]
    reward: dict[str, float]  # mean
    beats: dict[str, list[float]]  # share of the scenarios in which it is not below that of each honest player


def play(player: Cast, item: Scenario, scenarios: ScenarioConfig) -> tuple[NDArray[np.float32], list[Action], Facts]:
    """The user's audio, the player's actions and the facts, as `enact` gives them."""
    return enact(item, lambda user: player(scenarios, item, user))


def perform(
    player: Cast, items: Sequence[Scenario], scenarios: ScenarioConfig, source: RewardSource
) -> tuple[list[Score], dict[str, list[float]]]:
    """Has a player play every scenario: the rules' verdicts [N], and the episodes' rewards [N] by who gives them."""
    scores, transcripts = [], []
    for item in items:
        waveform, actions, facts = play(player, item, scenarios)
        scores.append(score(item.family, facts.to_json(), actions, scenarios))
        if source.models:
            vocabulary = Vocabulary.build(source.models[0].backbone.vocab)
            transcripts.append(from_audio(waveform, actions, Grammar(vocabulary, WORDS_PER_CHUNK)))
    rewards = {"rules": [fsum(float(values.sum()) for values in s.rewards.values()) for s in scores]}
    if source.models:
        rewards["learned"] = [r.total for r in source.learned(transcripts, [item.family for item in items])]
    return scores, rewards


def assess(items: Sequence[Scenario], scenarios: ScenarioConfig, source: RewardSource) -> list[Row]:
    """One row for each player, honest ones first; ``items`` are of one family."""
    players = HONEST | hacks(scenarios, items[0].family)
    found = {name: perform(cast, items, scenarios, source) for name, cast in players.items()}
    return [
        Row(
            family=items[0].family,
            player=name,
            score=fmean(s.value for s in scores),
            reward={by: fmean(values) for by, values in rewards.items()},
            beats={
                by: [fmean(a >= b for a, b in zip(values, found[h][1][by], strict=True)) for h in HONEST]
                for by, values in rewards.items()
            },
        )
        for name, (scores, rewards) in found.items()
    ]


def winners(rows: Sequence[Row]) -> list[str]:
    """Says of each hack whose mean reward is not below an honest player's that it wins."""
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


def main(arguments: list[str] | None = None) -> None:
    config = read_recipe("reward.hacks", "What rewards say of hacks.", HacksConfig, arguments).config
    if config.scenarios < 1:
        raise MetronomeError(f"scenarios is {config.scenarios}: give at least one of each family")
    source = RewardSource.load(config.scenario, SourceConfig(models=config.models))
    bank = SpeechBank.open(config.speech_dir)
    rows = []
    for family in config.scenario.members:
        items = [config.scenario.scenario(family, "held_out", i, bank) for i in range(config.scenarios)]
        rows += assess(items, config.scenario, source)
    console = Console(highlight=False)
    console.print(table(rows))
    won = winners(rows)
    for line in won or ["none: every hack earns less than every honest player"]:
        console.print(f"hacks that win: {line}", markup=False)
    report = {"models": source.digests, "rows": [asdict(row) for row in rows], "winners": won}
    write_whole(Path(config.json), (json.dumps(report, indent=2) + "\n").encode())
    console.print(f"written to {config.json}", markup=False)
