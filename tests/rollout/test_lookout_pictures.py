"""What lookout shows: reproducible to the byte, reactive, and facts that agree with the pictures."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernels.errors import MetronomeError
from reward.rules.lookout import LookoutSettings
from rollout.scenarios.lookout import FLICKER, PLACES, SPOT, Appearance, LookoutFacts
from rollout.scenarios.registry import ScenarioConfig
from rollout.turn.action import LISTEN, Action, speak
from rollout.turn.observation import Observation
from rollout.world.base import Scenario
from rollout.world.picture import SHAPES, STEPS, Figure, LooksConfig, backdrop, paint, to_and_fro
from rollout.world.speech import SpeechBank

CONFIG = ScenarioConfig(("lookout",))
CLEAR = LooksConfig(grain=0, drift=0, slope=0)
"""Pictures in which nothing but shapes and distractions changes a pixel."""


def lookout(**settings: Any) -> ScenarioConfig:
    return ScenarioConfig(("lookout",), {"lookout": LookoutSettings(**settings)})


def play(item: Scenario, policy: Callable[[int, LookoutFacts], Action]) -> tuple[list[Observation], LookoutFacts]:
    user, seen, heard = item.user(), [], None
    for k in range(item.chunks):
        seen.append(user.next_chunk(heard))
        heard = policy(k, user.facts())
    return seen, user.facts()


def silent(k: int, facts: LookoutFacts) -> Action:
    return LISTEN


def frames(seen: list[Observation]) -> np.ndarray:
    """uint8 [chunks, side, side, 3]."""
    return np.concatenate([one.frames.numpy() for one in seen])


def test_same_id_same_bytes(bank: SpeechBank) -> None:
    item, again = CONFIG.scenario("lookout", "train", 7, bank), CONFIG.scenario("lookout", "train", 7, bank)
    seen, facts = play(item, silent)
    pictures = frames(seen)
    assert item.id == "lookout/train/7" and pictures.shape == (40, 31, 31, 3) and pictures.dtype == np.uint8
    np.random.seed(0)  # a global generator has no influence
    other, same = play(again, silent)
    assert np.array_equal(pictures, frames(other)) and facts == same
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(seen, other, strict=True))
    for split, seed in (("train", 8), ("held_out", 7)):  # the control
        assert not np.array_equal(pictures, frames(play(CONFIG.scenario("lookout", split, seed, bank), silent)[0]))


def test_every_machine_renders_these_bytes(bank: SpeechBank) -> None:
    digest = hashlib.sha256()
    for split in ("train", "held_out"):
        for seed in range(5):
            digest.update(frames(play(CONFIG.scenario("lookout", split, seed, bank), silent)[0]).tobytes())
    assert digest.hexdigest()[:16] == "20c4265672bcde14"


def test_rollouts_that_share_a_scenario_do_not_disturb_each_other(bank: SpeechBank) -> None:
    shared = CONFIG.scenario("lookout", "train", 1, bank)
    alone = frames(play(shared, silent)[0])
    named, quiet, heard = shared.user(), shared.user(), None
    for k in range(40):
        named.next_chunk(heard)
        assert np.array_equal(quiet.next_chunk(None if k == 0 else LISTEN).frames.numpy()[0], alone[k])
        heard = speak(facts.shapes[-1].place) if (facts := named.facts()).shapes else LISTEN
    assert len(named.facts().shapes) > len(quiet.facts().shapes)


def test_facts_survive_json(bank: SpeechBank) -> None:
    _, facts = play(CONFIG.scenario("lookout", "held_out", 3, bank), silent)
    stored = json.loads(json.dumps(facts.to_json()))
    assert CONFIG.facts(stored) == CONFIG.stored_facts(stored) == facts and facts.distractions
    with pytest.raises(MetronomeError, match="facts"):
        CONFIG.stored_facts({**stored, "shapes": [{"start": -1, "end": 3, "place": "left"}]})


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("seed", range(8))
def test_facts_agree_with_the_pictures(bank: SpeechBank, split: str, seed: int) -> None:
    """Where the picture differs from its background there is a shape, in the part that its word names, or a spot, which
    is small and faint; a flicker changes all of it alike."""
    item = lookout(looks=CLEAR).scenario("lookout", split, seed, bank)
    seen, facts = play(item, silent)
    change = frames(seen).astype(int) - item.backdrop
    what = {k: one.place for one in facts.shapes for k in range(one.start, one.end + 1)}
    what |= {k: one.kind for one in facts.distractions for k in range(one.start, one.end + 1)}
    for k, picture in enumerate(change):
        y, x = np.nonzero(picture.any(-1))
        kind = what.get(k, "nothing")
        if kind in PLACES:
            right, down = x.mean() - 15, y.mean() - 15
            name = max(PLACES, key=lambda place: right * PLACES[place][0] + down * PLACES[place][1])
            assert name == kind and 20 < len(x) < 260 and picture[y, x].min() >= 70
        elif kind == SPOT:
            assert len(x) <= 12 and picture.max(initial=0) <= 30
        elif kind == FLICKER:
            assert len(np.unique(picture)) == 1 and 50 <= picture[0, 0, 0] <= 100
        else:
            assert not len(x)
    assert len(facts.shapes) >= 2


def first_shape(bank: SpeechBank, words: tuple[str, ...], after: int = 2) -> tuple[np.ndarray, LookoutFacts]:
    """(which chunks show a shape, facts) when ``words`` are said once, ``after`` chunks after the first shape came."""
    item = lookout(looks=CLEAR, gap=(4, 4), stay=(9, 9), flickers=0.0, spots=0.0).scenario("lookout", "train", 2, bank)
    seen, facts = play(item, lambda k, facts: speak(*words) if words and k == 4 + after else LISTEN)
    return (frames(seen) != item.backdrop).any((1, 2, 3)), facts


def test_a_shape_stays_until_it_is_named(bank: SpeechBank) -> None:
    shown, facts = first_shape(bank, ())
    assert np.flatnonzero(shown).tolist() == [*range(4, 13), *range(17, 26), *range(30, 39)]
    first = facts.shapes[0]
    assert first == Appearance(4, 12, first.place)
    shown, facts = first_shape(bank, (first.place,))  # named in chunk 6
    assert np.flatnonzero(shown).tolist() == [4, 5, 6, *range(11, 20), *range(24, 33), *range(37, 40)]
    assert facts.shapes[0] == Appearance(4, 6, first.place) and facts.shapes[-1].end == 39
    assert facts.places[: len(facts.shapes)] == tuple(one.place for one in facts.shapes)


@pytest.mark.parametrize("what", ["another place", "no place", "two words"])
def test_at_any_other_word_it_stays_and_blinks(bank: SpeechBank, what: str) -> None:
    place = first_shape(bank, ())[1].shapes[0].place
    other = next(word for word in PLACES if word != place)
    words = {"another place": (other,), "no place": ("ready",), "two words": (place, other)}[what]
    shown, facts = first_shape(bank, words)
    assert np.flatnonzero(shown).tolist()[:6] == [4, 5, 6, 8, 10, 12]
    assert facts.shapes[0] == Appearance(4, 12, place)


def test_a_frame_comes_every_so_many_chunks(bank: SpeechBank) -> None:
    item = lookout(frame_every=3, looks=LooksConfig(side=40)).scenario("lookout", "train", 0, bank)
    seen, facts = play(item, silent)
    assert [tuple(one.frames.shape) for one in seen] == [(1, 40, 40, 3), (0, 0, 0, 3), (0, 0, 0, 3)] * 13 + [
        (1, 40, 40, 3)
    ]
    assert facts.shapes and all(one.start % 3 == 0 for one in facts.shapes)


def test_held_out_looks_are_others(bank: SpeechBank) -> None:
    assert not set(SHAPES["train"]) & set(SHAPES["held_out"])
    figures = {
        split: [p for seed in range(40) for p in CONFIG.scenario("lookout", split, seed, bank).plan] for split in SHAPES
    }
    for split, planned in figures.items():
        assert {one.figure.shape for one in planned} == set(SHAPES[split])
        assert {one.place for one in planned} == set(PLACES)
    assert max(max(one.speed) for one in figures["train"]) < min(min(one.speed) for one in figures["held_out"])
    mean = {split: np.mean([one.figure.radius for one in planned]) for split, planned in figures.items()}
    assert mean["held_out"] > mean["train"] + STEPS / 2


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ("disc", ["..#..", ".###.", "#####", ".###.", "..#.."]),
        ("square", [".....", ".###.", ".###.", ".###.", "....."]),
        ("triangle", ["..#..", "..#..", ".###.", ".###.", "#####"]),
        ("ring", ["..#..", ".###.", "##.##", ".###.", "..#.."]),
        ("cross", ["..#..", "..#..", "#####", "..#..", "..#.."]),
        ("diamond", ["..#..", ".###.", "#####", ".###.", "..#.."]),
    ],
)
def test_shapes(shape: str, rows: list[str]) -> None:
    picture = paint(backdrop(7, (0, 0, 0), (0, 0)), Figure(shape, 2 * STEPS, (1, 2, 3)), STEPS, 0)
    assert picture.dtype == np.int32 and set(map(tuple, picture.reshape(-1, 3))) == {(0, 0, 0), (1, 2, 3)}
    assert ["".join(".#"[int(value)] for value in row) for row in picture[1:6, 2:, 0]] == rows
    assert not picture[:, :2].any() and not picture[0].any() and not picture[6].any()


def test_movement_and_gradient() -> None:
    assert [to_and_fro(way, 2) for way in range(10)] == [0, 1, 2, 1, 0, -1, -2, -1, 0, 1]
    assert to_and_fro(5, 0) == 0
    slanted = backdrop(31, (50, 60, 70), (15, 0))
    assert slanted[0, [0, 15, 30], 0].tolist() == [35, 50, 64] and slanted[3, 15].tolist() == [50, 60, 70]
    assert (slanted == slanted[:1]).all()


def test_too_short_episodes_are_refused(bank: SpeechBank) -> None:
    with pytest.raises(MetronomeError, match=r"lookout\.chunks is 8, too few"):
        lookout(chunks=8).scenario("lookout", "train", 0, bank)
    assert lookout(chunks=9).scenario("lookout", "train", 0, bank).chunks == 9
