"""Corrupted plays: the fault is heard, the user reacts to it, the rule sees it, and no family is known by name."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Mapping
from types import ModuleType

import numpy as np
import pytest

from reward import pairs as pairs_module
from reward.learned import corrupt as corrupt_module
from reward.learned import plays as plays_module
from reward.learned.corrupt import FAULTS, Expert, corrupt, draw
from reward.rules.timing import runs
from reward.score import score
from rollout.scenarios.demonstrate import NO_EDITS, enact
from rollout.scenarios.registry import ScenarioConfig
from rollout.seeds import generator
from rollout.turn.action import CHUNK_MS, LISTEN, Action, speak
from rollout.turn.observation import stack_audio
from rollout.world.base import Facts, Scenario
from rollout.world.speech import SpeechBank

CONFIG = ScenarioConfig()
WORDS = ("breathe", "yes", "sure", "four", "two", "answer")


def items(bank: SpeechBank, count: int) -> list[Scenario]:
    return CONFIG.of_each(count, "train", bank, first_seed=77_000)


def clean(item: Scenario, edits: Mapping[int, Action] = NO_EDITS) -> tuple[np.ndarray, list[Action], Facts]:
    observed, actions, facts = enact(item, CONFIG.expert(item, generator("expert", item.id), mistake_scale=0), edits)
    return stack_audio(observed).numpy(), actions, facts


def replayed(item: Scenario, actions: list[Action]) -> tuple[np.ndarray, object]:
    """What a fresh user says to these actions."""
    user = item.user()
    heard: Action | None = None
    audio = []
    for action in actions:
        audio.append(user.next_chunk(heard).audio)
        heard = action
    return np.stack(audio), user.facts()


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("family", CONFIG.families)
def test_user_says_what_fits_the_corrupted_actions(bank: SpeechBank, kind: str, family: str) -> None:
    found = reacted = 0
    for item in items(bank, 8):
        if item.family != family:
            continue
        audio, actions, _ = clean(item)
        expert = Expert.of(audio, actions, WORDS)
        for size in (1, 2, 4):
            fault = corrupt(expert, kind, size, generator(item.id, kind, size))
            if fault is None:
                continue
            found += 1
            heard, acted, facts = clean(item, fault.edits)
            again, facts_again = replayed(item, acted)
            assert np.array_equal(heard, again) and facts == facts_again
            first = min(fault.edits)
            assert all(acted[k] == action for k, action in fault.edits.items())
            assert acted[:first] == actions[:first] and np.array_equal(heard[: first + 1], audio[: first + 1])
            assert acted != actions
            reacted += not np.array_equal(heard, audio)
    if family == "timespeak" and kind == "truncate":
        assert found == 0  # one-word utterances cannot be cut short
    else:
        assert found >= 5
    if family == "turn_taking" and kind in ("shift", "repeat"):
        assert reacted  # the control: had the clean play's audio been kept, it would be another


def test_without_edits_the_expert_is_itself(bank: SpeechBank) -> None:
    for item in items(bank, 3):
        _, actions, facts = clean(item)
        _, again, facts_again = clean(item, {})
        assert (actions, facts) == (again, facts_again)


def test_expert_is_heard_again_from_its_next_silence_on(bank: SpeechBank) -> None:
    item = next(i for i in items(bank, 3) if i.family == "turn_taking")
    _, actions, _ = clean(item)
    run = runs(actions)[0]
    _, acted, _ = clean(item, {run.start: LISTEN, run.start + 1: LISTEN})
    assert not any(action.speaks for action in acted[run.start : run.end])  # no half sentence


ACTIONS = (LISTEN,) * 4 + (speak("yes"), speak("sure"), speak("four")) + (LISTEN,) * 5 + (speak("two"),) + (LISTEN,) * 3
PLAY = Expert(ACTIONS, np.array([True] * 4 + [False] * 12), WORDS)


def edited(kind: str, run: int, n: int, seed: int = 0) -> list[str] | None:
    edits = FAULTS[kind](PLAY, runs(ACTIONS)[run], n, np.random.default_rng(seed))
    if edits is None:
        return None
    assert sorted(edits) == list(range(min(edits), max(edits) + 1))
    return [" ".join(edits.get(k, a).words) for k, a in enumerate(ACTIONS)]


@pytest.mark.parametrize(
    ("kind", "run", "n", "said"),
    [
        ("shift", 0, 2, {6: "yes", 7: "sure", 8: "four", 12: "two"}),
        ("shift", 0, -3, {1: "yes", 2: "sure", 3: "four", 12: "two"}),
        ("truncate", 0, 1, {4: "yes", 5: "sure", 12: "two"}),
        ("omit", 0, 9, {}),
        ("omit", 1, 60, {4: "yes", 5: "sure", 6: "four"}),
        ("repeat", 1, 2, {4: "yes", 5: "sure", 6: "four", 12: "two", 13: "two", 14: "two"}),
    ],
)
def test_edits_are_what_they_are_called(kind: str, run: int, n: int, said: dict[int, str]) -> None:
    assert edited(kind, run, n) == [said.get(k, "") for k in range(len(ACTIONS))]


@pytest.mark.parametrize(
    ("kind", "run", "n"),
    [
        ("shift", 0, -5),
        ("shift", 0, 6),
        ("shift", 1, 4),
        ("truncate", 1, 1),
        ("repeat", 1, 4),
        ("swap", 1, 2),
        ("talk_over", 0, 17),
    ],
)
def test_what_does_not_fit_is_left_out(kind: str, run: int, n: int) -> None:
    assert edited(kind, run, n) is None


def test_swap_changes_words_and_nothing_else() -> None:
    said = edited("swap", 0, 2)
    assert said is not None
    before = [" ".join(a.words) for a in ACTIONS]
    changed = [k for k, (a, b) in enumerate(zip(before, said, strict=True)) if a != b]
    assert len(changed) == 2 and all(said[k] for k in changed)


def test_swap_goes_on_in_the_next_utterance() -> None:
    said = edited("swap", 0, 4)
    before = [" ".join(a.words) for a in ACTIONS]
    assert said is not None
    assert [k for k, (a, b) in enumerate(zip(before, said, strict=True)) if a != b] == [4, 5, 6, 12]
    assert (
        FAULTS["swap"](Expert(ACTIONS, PLAY.user_speaks, ("yes",)), runs(ACTIONS)[1], 1, np.random.default_rng(0))
        is None
    )


@pytest.mark.parametrize("kind", FAULTS)
def test_a_size_is_what_the_edits_changed(kind: str) -> None:
    """Whatever size is asked for, up to beyond the play's end."""
    sizes = set()
    for seed in range(300):
        asked = 1 + seed % 20
        fault = corrupt(PLAY, kind, asked, np.random.default_rng(seed))
        if fault is None:
            continue
        acted = [fault.edits.get(k, a) for k, a in enumerate(ACTIONS)]
        said = [a for a in acted if a.speaks]
        assert acted != list(ACTIONS) and len(acted) == len(ACTIONS)  # nothing beyond the end
        if kind == "shift":
            places = [[k for k, a in enumerate(play) if a.speaks] for play in (acted, ACTIONS)]
            moved = {a - b for a, b in zip(*places, strict=True)} - {0}
            assert said == [a for a in ACTIONS if a.speaks] and moved in ({asked}, {-asked})
            assert abs(fault.size_ms) == asked * CHUNK_MS
        else:
            changed = sum(a != b for a, b in zip(acted, ACTIONS, strict=True))
            assert fault.size_ms == changed * CHUNK_MS
        sizes.add((asked, abs(fault.size_ms) // CHUNK_MS))
    if kind == "omit":
        assert (20, 4) in sizes and (20, 1) in sizes  # not what was asked: the play holds four words
    else:
        assert sizes


def test_an_utterance_that_is_muted_counts() -> None:
    """Said again up to the next utterance: `enact` mutes that one, so it is a part of the fault; a shift that touches
    the next utterance is none. Control: one chunk less touches nothing."""
    repeats = {n: corrupt(PLAY, "repeat", n, first_run()) for n in (4, 5)}
    assert [fault and fault.size_ms // CHUNK_MS for fault in repeats.values()] == [4, 6]
    shifts = {n: corrupt(PLAY, "shift", n, first_run()) for n in (4, 5)}
    assert [fault and fault.size_ms // CHUNK_MS for fault in shifts.values()] == [4, None]


def first_run() -> np.random.Generator:
    """Draws the first utterance, and a shift to later."""
    return next(
        np.random.default_rng(seed)
        for seed in range(100)
        if (rng := np.random.default_rng(seed)).integers(2) == 0 and rng.random() < 0.5
    )


def test_no_size_is_in_both_splits(bank: SpeechBank) -> None:
    train, held_out = (1, 3, 5, 8, 12, 20, 60), (2, 4, 6, 10, 16, 40)
    seen: dict[str, set[int]] = defaultdict(set)
    asked: dict[str, set[int]] = defaultdict(set)  # the control: sizes without `draw`
    for i in range(200):
        item = CONFIG.in_turn(i, "train", 78_000 + i, bank)
        audio, actions, _ = clean(item)
        expert = Expert.of(audio, actions, WORDS)
        for split, sizes in (("train", train), ("held_out", held_out)):
            for kind in FAULTS:
                rng = generator(item.id, split, kind)
                if (fault := draw(expert, kind, sizes, rng)) is not None:
                    seen[split].add(abs(fault.size_ms) // CHUNK_MS)
                if (fault := corrupt(expert, kind, sizes[i % len(sizes)], rng)) is not None:
                    asked[split].add(abs(fault.size_ms) // CHUNK_MS)
    assert len(seen["train"]) >= 6 and len(seen["held_out"]) >= 5
    assert seen["train"] <= set(train) and seen["held_out"] <= set(held_out)
    assert asked["train"] & asked["held_out"]


def test_talk_over_begins_while_the_user_speaks() -> None:
    for seed in range(10):
        edits = FAULTS["talk_over"](PLAY, runs(ACTIONS)[0], 2, np.random.default_rng(seed))
        assert edits is not None and PLAY.user_speaks[min(edits)] and len(edits) == 2


@pytest.mark.parametrize(
    ("kind", "axis"), [("shift", "timing"), ("omit", "timing"), ("repeat", "timing"), ("swap", "content")]
)
def test_rule_agrees_that_it_is_worse(bank: SpeechBank, kind: str, axis: str) -> None:
    worse = total = 0
    for item in items(bank, 12):
        audio, actions, facts = clean(item)
        fault = corrupt(Expert.of(audio, actions, WORDS), kind, 3, generator(item.id))
        if fault is None:
            continue
        _, acted, heard = clean(item, fault.edits)
        best = score(item.family, facts.to_json(), actions, CONFIG).rewards[axis].sum()
        total += 1
        worse += score(item.family, heard.to_json(), acted, CONFIG).rewards[axis].sum() < best
    assert total >= 8 and worse >= 0.8 * total


@pytest.mark.parametrize("module", [corrupt_module, plays_module, pairs_module])
def test_no_family_is_known_by_name(module: ModuleType) -> None:
    """A family added later needs no change here."""
    tree = ast.parse(inspect.getsource(module))
    names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & set(CONFIG.families)
    assert not {f"rollout.scenarios.{family}" for family in CONFIG.families} & imported
