"""Preference pairs for reward models, as a data set on disk.

    python -m reward.pairs --config configs/reward_pairs.yaml

Three sources, all for every axis: rollouts of policies of different quality, ranked by the rule; corruptions of expert
play, controlled ones (`reward.learned.corrupt`) and the experts' own mistakes; and labels by people
(`reward.learned.human`). Beside whole conversations, stretches of them are compared, so that a model learns which
chunks deserve a reward, and not only which conversations.

The data set has two splits, without a conversation in common. ``held_out`` has scenarios of the held-out split (unseen
seeds, noise, gains and filler sentences) and sizes of corruption, as counted, that ``train`` does not have. The speaker
is the same in both, because only one speaker's recordings come with the program; ``--speech-dir`` names others. The
data set is a pure function of the recipe and of the checkpoints it names.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("reward.pairs")

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np

from kernels.errors import MetronomeError
from model.config import SMALL_PATCH
from model.placement import Placement, PlacementConfig
from model.program.folders import locked
from model.program.outputs import OutputFolder
from model.program.ranges import (
    Ascending,
    Count,
    EventWords,
    FilePath,
    FilePaths,
    Length,
    Patches,
    Seed,
    Some,
    SomeChunks,
    Temperature,
    Tokens,
    Words,
)
from model.program.reading import parse_yaml
from model.program.recipe import Recipe, read_recipe
from model.tokenizer import size, words_digest
from model.weights import checkpoint
from reward.learned.human import read_all_labels
from reward.learned.model import check_silent
from reward.learned.origin import digest_of
from reward.learned.plays import Played, Writer, fault_preferences, of_episode, segment_preferences, whole_preferences
from reward.learned.preference import Preference, save_preferences
from rollout.engines.embedded import SessionEngine
from rollout.play import Play, play
from rollout.scenarios.demonstrate import enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.seeds import generator, preference_seed
from rollout.turn.grammar import Grammar, check_context
from rollout.turn.vocabulary import Vocabulary
from rollout.world.base import Scenario
from rollout.world.speech import SpeechBank, Split

EXPERT_PLAYS_FOR_WORDS = 16
"""How many expert plays of each family are read for the words that the fault ``swap`` may put in place of others."""
SESSIONS = 48
"""How many rollouts an engine decodes at a time."""
FIRST_ROLLED_OUT_SCENARIO = 1_000_000
"""Index of the first scenario for rollouts; corruptions use the indices from 0 on."""


Sizes = Annotated[tuple[SomeChunks, ...], Length(1, 100), Ascending(strictly=True)]


@dataclass(frozen=True)
class PolicyRecipe:
    """Rollouts of one policy."""

    checkpoint: FilePath  # folder in transformers' format
    temperature: Temperature = 1.0


@dataclass(frozen=True)
class CorruptionRecipe:
    """Corruptions of expert play (`reward.learned.corrupt`). Sizes are in chunks of 200 ms."""

    train_scenarios: Count = 500  # scenarios that an expert plays, families in turn
    held_out_scenarios: Count = 250
    faults: Count = 4  # corruptions tried for each expert play and axis; a fault that does not fit the play is skipped
    mistakes: Count = 4  # further plays of each scenario by an expert with frequent mistakes (`Mistakes.gross`)
    segments: Count = 24  # pairs of stretches tried for each axis and scenario
    train_sizes: Sizes = (1, 3, 5, 8, 12, 20, 60)
    held_out_sizes: Sizes = (2, 4, 6, 10, 16, 40)


@dataclass(frozen=True)
class RolloutRecipe:
    """Rollouts of policies. Pairs are formed within a group: ``scenarios`` scenarios, ``rollouts`` of each."""

    policies: Annotated[tuple[PolicyRecipe, ...], Length(0, 100)] = ()
    train_groups: Count = 1200
    held_out_groups: Count = 80
    scenarios: Some = 2  # per group, families in turn
    rollouts: Some = 4  # per scenario; each policy gives as many as any other, at random places
    wholes: Count = 6  # pairs of whole conversations tried for each axis and group
    segments: Count = 24  # pairs of stretches tried for each axis and group
    # Pairs at the same chunks of two rollouts of a scenario, as RL compares; for each axis and scenario.
    aligned: Count = 12
    max_tokens: Tokens = 512  # context length of a rollout


@dataclass(frozen=True)
class PairsConfig:
    """The recipe of `reward.pairs`."""

    out: Annotated[str, OutputFolder()] = "runs/reward_pairs"  # folder of the data set; must not exist
    seed: Seed = 0
    speech_dir: FilePath | None = None  # recordings with a manifest; None is the set shipped with the program
    words_per_chunk: Words = 1
    max_patches: Patches = 0  # most video patches of a micro-turn
    max_event_words: EventWords = 0  # most words of its text events
    scenarios: ScenarioConfig = field(default_factory=ScenarioConfig)
    corruptions: CorruptionRecipe = field(default_factory=CorruptionRecipe)
    rollouts: RolloutRecipe = field(default_factory=RolloutRecipe)
    human: FilePaths = ()  # files of labels by people (reward.learned.human)
    placement: PlacementConfig = field(default_factory=PlacementConfig)  # of the policies


def main(arguments: list[str] | None = None) -> None:
    description = "Make preference pairs for reward models."
    recipe = read_recipe("reward.pairs", description, PairsConfig, arguments)
    config = recipe.config
    out = Path(config.out)
    if seen := set(config.corruptions.train_sizes) & set(config.corruptions.held_out_sizes):
        raise MetronomeError(f"corruptions: the sizes {sorted(seen)} are in both splits; held-out sizes must be unseen")
    for name in config.scenarios.aloud:
        raise MetronomeError(
            f"scenarios.families: {name} is played with sound of the model's own, which reward models do not hear: "
            "leave it out"
        )
    chunks, rollouts = config.scenarios.most_chunks, config.rollouts
    if rollouts.policies:
        extra = config.max_patches + config.max_event_words
        check_context("rollouts.max_tokens", rollouts.max_tokens, chunks, config.words_per_chunk, extra)
    Placement.enter(config.placement, "float32")
    with locked(out):
        if os.path.lexists(out):
            raise MetronomeError(f"{out} already exists; choose another --out, or move it away")
        make(recipe, out)


def make(recipe: Recipe[PairsConfig], out: Path) -> None:
    """Makes the data set in the folder ``out`` and says what is in it. Raises MetronomeError for a split without
    pairs."""
    start = time.perf_counter()
    maker = PairMaker(recipe.config)
    splits = {"train": maker.split("train"), "held_out": maker.split("held_out")}
    for name, preferences in splits.items():
        if not preferences:
            raise MetronomeError(f"the recipe gives no pair for the split {name!r}; ask for more scenarios or groups")
    values = {name: value for name, value in parse_yaml(recipe.text).items() if name not in ("out", "placement")}
    policies = [checkpoint.weights_digest(policy) for policy, _ in maker.policies]
    words = words_digest(maker.vocabulary.tokenizer)
    save_preferences(out, splits, digest_of(values), maker.bank.digest(), policies, words)
    for name, preferences in splits.items():
        kinds = Counter((p.axis, p.source) for p in preferences)
        print(f"{name}: {len(preferences)} pairs; " + ", ".join(f"{a} {s} {n}" for (a, s), n in sorted(kinds.items())))
    print(f"written to {out} in {time.perf_counter() - start:.0f} s")


class PairMaker:
    """Makes the preferences of a split. Owns what all sources share: recordings, policies, vocabulary."""

    def __init__(self, config: PairsConfig) -> None:
        self.config = config
        paths = [Path(path) for path in config.human]
        policies = [policy.checkpoint for policy in config.rollouts.policies]
        tokenizer = checkpoint.tokenizer_of(policies[0]) if policies else None
        words = Vocabulary.build(size(tokenizer) if tokenizer else 256, tokenizer)
        self.labels = read_all_labels(paths, words, config.words_per_chunk, config.scenarios)  # first: people err
        self.bank = SpeechBank.open(config.speech_dir)
        self.policies = [
            (checkpoint.load(p.checkpoint, keep_weights=False), p.temperature) for p in config.rollouts.policies
        ]
        self.vocabulary = Vocabulary.of(self.policies[0][0]) if policies else words
        for (policy, _), name in zip(self.policies, policies, strict=True):
            self.vocabulary.check_same(policy, f"rollouts.policies: {name}")
            check_silent(policy, f"rollouts.policies: {name}")
        sides = {model.senses.patch for model, _ in self.policies} or {SMALL_PATCH}
        if len(sides) > 1:
            raise MetronomeError(f"rollouts.policies: they cut video into patches of different sizes, {sorted(sides)}")
        sizes = (config.words_per_chunk, config.max_patches, config.max_event_words)
        self.writer = Writer(Grammar(self.vocabulary, *sizes, patch=sides.pop()), config.scenarios)
        self.expert_words, self.other_words = self._words()

    def split(self, split: Split) -> list[Preference]:
        """All preferences of a split. Preferences that share conversations (of one group) stay together, so that a
        training batch can share their forward passes; the groups are in random order."""
        groups = [*self._corrupted(split), *self._rolled_out(split)]
        groups += [[p] for p in self.labels[split]]
        order = generator("order", split, self.config.seed).permutation(len(groups))
        return [preference for i in order for preference in groups[int(i)]]

    def _scenario(self, split: Split, index: int) -> Scenario:
        return self.config.scenarios.in_turn(index, split, preference_seed(self.config.seed, index), self.bank)

    def _words(self) -> tuple[list[str], list[str]]:
        """What experts of all families say, and all other words of the tokenizer that may be said."""
        said: set[str] = set()
        for index in range(EXPERT_PLAYS_FOR_WORDS * len(self.config.scenarios.families)):
            item = self._scenario("train", index)
            expert = self.config.scenarios.expert(item, generator("expert", item.id), mistake_scale=0)
            _, actions, _ = enact(item, expert)
            said |= {word for action in actions for word in action.words}
        allowed = self.vocabulary.classes.allowed.any(0)
        others = {w for w, i in self.vocabulary.ids.items() if allowed[i] and not w.startswith("<|")}
        return sorted(said), sorted(others - said)

    def _words_for(self, item: Scenario) -> tuple[str, ...]:
        """The words that ``swap`` may put in: every expert's words, and as many others, drawn for each scenario."""
        count = min(len(self.expert_words), len(self.other_words))
        drawn = generator("words", item.id).choice(len(self.other_words), count, replace=False)
        return (*self.expert_words, *(self.other_words[int(i)] for i in drawn))

    def _corrupted(self, split: Split) -> Iterator[list[Preference]]:
        recipe = self.config.corruptions
        train = split == "train"
        sizes = recipe.train_sizes if train else recipe.held_out_sizes
        for index in range(recipe.train_scenarios if train else recipe.held_out_scenarios):
            item = self._scenario(split, index)
            rng = generator("corrupted", item.id)
            plays = self.writer.demonstrations(item, self._words_for(item), sizes, recipe.faults, recipe.mistakes)
            if len(plays) < 2:
                continue
            yield [
                preference
                for axis in plays[0].rewards
                for preference in (
                    *fault_preferences(axis, plays),
                    *segment_preferences(axis, plays, recipe.segments, rng, aligned=True),
                )
            ]

    def _rolled_out(self, split: Split) -> Iterator[list[Preference]]:
        recipe = self.config.rollouts
        groups = recipe.train_groups if split == "train" else recipe.held_out_groups
        if not self.policies or not groups:
            return
        plays = self._play_all(split, groups)
        size = recipe.scenarios * recipe.rollouts
        for g in range(groups):
            group = plays[g * size : (g + 1) * size]
            by_scenario = [group[i : i + recipe.rollouts] for i in range(0, size, recipe.rollouts)]
            rng = generator("rolled out", split, self.config.seed, g)
            yield [
                preference
                for axis in group[0].rewards
                if all(axis in play.rewards for play in group)
                for preference in (
                    *whole_preferences(axis, group, recipe.wholes, rng),
                    *segment_preferences(axis, group, recipe.segments, rng, aligned=False),
                    *(
                        p
                        for rollouts in by_scenario
                        for p in segment_preferences(axis, rollouts, recipe.aligned, rng, True)
                    ),
                )
            ]

    def _play_all(self, split: Split, groups: int) -> list[Played]:
        """Every group's rollouts, one group after another. Which policy plays which rollout is a random permutation."""
        recipe = self.config.rollouts
        wanted: list[Play] = []
        for s in range(groups * recipe.scenarios):
            item = self._scenario(split, FIRST_ROLLED_OUT_SCENARIO + s)
            wanted += [Play(item, r) for r in range(recipe.rollouts)]
        policy = np.arange(len(wanted)) % len(self.policies)
        policy = generator("policies", split, self.config.seed).permuted(policy)
        done: dict[int, Played] = {}
        for p, (model, temperature) in enumerate(self.policies):
            engine = SessionEngine(
                model, self.vocabulary, slots=SESSIONS, max_tokens=recipe.max_tokens,
                words_per_chunk=self.config.words_per_chunk, max_patches=self.config.max_patches,
                max_event_words=self.config.max_event_words,
            )  # fmt: skip
            places = [int(i) for i in np.flatnonzero(policy == p)]
            episodes = play(engine, [wanted[i] for i in places], self.config.seed, temperature)
            for i, episode in zip(places, episodes, strict=True):
                done[i] = of_episode(wanted[i].scenario, episode, self.config.scenarios)
        return [done[i] for i in range(len(wanted))]
