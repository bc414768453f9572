"""Every kind of event of repeat, computed by hand.

The episode: the user says "four" in chunks 3 to 5, "seven" in 16 to 19 and "four" in 36 to 38, so that its window is
still open when the episode ends after chunk 39. Answers are best one chunk after the word, and count from its last
chunk to four after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.voice.config import NUMBERS
from reward.rules.repeat import NOTHING_IN_COMMON, VOICE, RepeatReward, compare
from reward.score import score, score_stored
from rollout.record.episode import VOICE as VOICE_STREAM
from rollout.record.episode import Stream
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.repeat import Prompt, RepeatFacts, said, sound_of
from rollout.scenarios.verdict import CONTENT, TIMING, Event, Outcome, Score
from rollout.turn.action import GO_ON, LISTEN, Action, Mode, speak
from rollout.turn.utterance import Utterance, heard
from rollout.world.lexicon import lexicon
from tests.support.episodes import some_episode
from tests.support.scores import events_of

CONFIG = ScenarioConfig(("repeat",))
RULE = RepeatReward()
LEVEL, SILENCE, AUDIBLE = -20.0, -300.0, -50.0
WHOLE = RULE.level + RULE.anchor
"""What a faultless sound of a word earns."""
FACTS = RepeatFacts(
    chunks=40,
    words=("four", "seven", "four", "seven"),
    noise_db=-40.0,
    target_db=LEVEL,
    prompts=(Prompt(3, 5, "four"), Prompt(16, 19, "seven"), Prompt(36, 38, "four")),
)
FOUR, SEVEN = (len(lexicon().target(word)) for word in ("four", "seven"))
Actions = Mapping[int, Action]


def say(word: str, at: int, level: float = LEVEL, chunks: int | None = None) -> dict[int, Action]:
    """From chunk ``at`` on, with the lexicon's sound."""
    return dict(enumerate(said(word, sound_of(word, level)[:chunks]), at))


def sounding(word: str, at: int, sound: Sequence[Tensor]) -> dict[int, Action]:
    return dict(enumerate(said(word, tuple(sound)), at))


REST: Actions = say("seven", 20)
"""The second word, answered without a fault; the third is not due."""


def judge(*parts: Actions, facts: RepeatFacts = FACTS) -> Score:
    done = {k: action for part in parts for k, action in part.items()}
    return score("repeat", facts.to_json(), [done.get(k, LISTEN) for k in range(facts.chunks)], CONFIG)


def first(got: Score, kind: str = "answer") -> Event:
    return next(event for event in got.events if event.kind == kind)


def voice(got: Score, chunks: range) -> float:
    return float(got.rewards[VOICE][list(chunks)].sum())


def test_perfect() -> None:
    got = judge(say("four", 6), REST, say("four", 39))
    assert (got.correct, got.due, got.spurious, got.value, got.tight) == (3, 3, 0, 1.0, 1.0)
    expected = np.zeros(40, np.float32)
    expected[[6, 20, 39]] = 1.0
    assert np.array_equal(got.rewards[TIMING], expected) and np.array_equal(got.rewards[CONTENT], expected)
    expected[6 : 6 + FOUR], expected[20 : 20 + SEVEN], expected[39] = WHOLE / FOUR, WHOLE / SEVEN, WHOLE / FOUR
    assert got.rewards[VOICE] == pytest.approx(expected)


def test_silence() -> None:
    got = judge()
    # The last word is not due: its window is open until after the end.
    assert events_of(got, "answer") == [(9, "missed", -1.0, 0.0), (23, "missed", -1.0, 0.0)]
    assert (got.value, got.tight, got.due, got.spurious) == (0.0, 0.0, 2, 0)
    assert not got.rewards[CONTENT].any() and not got.rewards[VOICE].any()


@pytest.mark.parametrize(
    ("chunk", "grade", "tight"),
    [(5, 1 - 0.8 / 3, 1), (6, 1.0, 1), (7, 1 - 0.8 / 3, 1), (8, 1 - 1.6 / 3, 0), (9, 0.2, 0)],
)
def test_an_answer_is_graded_by_its_delay(chunk: int, grade: float, tight: int) -> None:
    got = judge(say("four", chunk), REST)
    assert events_of(got, "answer")[0] == (chunk, "hit", pytest.approx(grade), pytest.approx(grade))
    assert got.value == 1.0 and (got.tight == 1.0) == bool(tight)
    assert voice(got, range(chunk, chunk + FOUR)) == pytest.approx(WHOLE)  # a sound is not worse for being late


@pytest.mark.parametrize("chunk", [0, 4, 10, 30])
def test_speech_at_any_other_time_is_spurious(chunk: int) -> None:
    """Before the user, over them, too late, and for no reason: once, and a little for each further chunk."""
    got = judge(say("four", chunk), REST)
    spurious = [e for e in got.events if e.kind == "speech"]
    assert (spurious[0].chunk, spurious[0].outcome) == (chunk, Outcome.SPURIOUS)
    assert [e.rewards[TIMING] for e in spurious] == [RULE.spurious] + [RULE.trailing] * (FOUR - 1)
    assert first(got).outcome is Outcome.MISSED and got.spurious == 1 and got.value == pytest.approx(1 / 3)
    assert not voice(got, range(chunk, chunk + FOUR)) and got.rewards[CONTENT][chunk] == 0.0


def test_what_counts_is_what_is_heard() -> None:
    """The word is chosen in chunk 6, and its sound begins in chunk 8."""
    silent = sound_of("four", SILENCE)[:1] * 2
    got = judge(sounding("four", 6, (*silent, *sound_of("four", LEVEL))), REST)
    assert events_of(got, "answer")[0] == (8, "hit", pytest.approx(1 - 1.6 / 3), pytest.approx(1 - 1.6 / 3))
    assert voice(got, range(8, 8 + FOUR)) == pytest.approx(WHOLE) and not got.rewards[TIMING][6:8].any()
    # The control: a word that has no sound that is heard was not said, and is not held against the model either.
    mumbled, quiet = judge(say("four", 6, SILENCE), REST), judge(REST)
    assert all(np.array_equal(mumbled.rewards[axis], quiet.rewards[axis]) for axis in mumbled.rewards)


def test_damaged_episodes_have_no_score() -> None:
    """A chain that is no number, of fp64, and a word that the lexicon lacks; the control is whole."""
    one = replace(some_episode(), scenario="repeat/train/0", facts=FACTS.to_json(), actions=(LISTEN,) * 40)
    chain = torch.zeros(1, 3, NUMBERS)
    said = Stream(*(torch.zeros(1, dtype=torch.int64) for _ in range(3)), torch.zeros(1), torch.zeros(1).long(), chain)
    nan, wide = replace(said, payload=chain * float("nan")), replace(said, payload=chain.double())
    assert score_stored(one, CONFIG) is not None
    assert score_stored(replace(one, streams={**one.streams, VOICE_STREAM: said}), CONFIG) is not None
    for wrong in (nan, wide):
        assert score_stored(replace(one, streams={**one.streams, VOICE_STREAM: wrong}), CONFIG) is None
    other = replace(FACTS, words=("four", "xyzzy")).to_json()
    assert score_stored(replace(one, facts=other), CONFIG) is None


def test_utterances() -> None:
    four, seven = say("four", 0), say("seven", FOUR)
    assert heard([*four.values(), *seven.values()], AUDIBLE) == [
        Utterance(("four",), 0, FOUR),
        Utterance(("seven",), FOUR, FOUR + SEVEN),
    ]
    silent = Action(Mode.SPEAK, (), sound_of("four", SILENCE)[0])
    loud = Action(Mode.SPEAK, (), sound_of("four", LEVEL)[0])
    assert heard([silent, loud, silent, loud, silent, LISTEN, loud, LISTEN], AUDIBLE) == [
        Utterance((), 1, 4),
        Utterance((), 6, 7),
    ]
    assert heard([speak("four"), GO_ON, LISTEN, speak("four"), speak("four")], AUDIBLE) == [
        Utterance(("four",), 0, 2),
        Utterance(("four",), 3, 4),
        Utterance(("four",), 4, 5),
    ]


def test_a_wrong_word_earns_nothing_for_its_sound() -> None:
    got = judge(say("seven", 6), REST)
    assert events_of(got, "answer")[0] == (6, "wrong", 1.0, -1.0)
    assert not voice(got, range(6, 15)) and (got.correct, got.due, got.spurious) == (1, 2, 0)
    without = judge({6 + i: Action(Mode.SPEAK, (), one) for i, one in enumerate(sound_of("four", LEVEL))}, REST)
    assert events_of(without, "answer")[0] == (6, "wrong", 1.0, -1.0)  # sound that no word was chosen for
    corrected = judge(say("seven", 6, chunks=1), say("four", 7), REST)
    assert corrected.spurious == 1 and corrected.correct == 1


@pytest.mark.parametrize("error", [-16.0, -8.0, -3.0, 3.0, 8.0, 16.0, 30.0])
def test_a_sound_is_graded_by_its_level(error: float) -> None:
    got = judge(say("four", 6, LEVEL + error), REST)
    earned = RULE.level * max(-1.0, 1 - abs(error) / 8) + RULE.anchor  # the anchor does not care
    # Softer, some of the word is below what mels can hold, or what is heard.
    assert voice(got, range(6, 6 + FOUR)) == pytest.approx(earned, abs=0.1 if error > -8 else 0.8)
    assert first(got).outcome is (Outcome.HIT if abs(error) < 4 else Outcome.WRONG)
    assert first(got).rewards == {TIMING: 1.0, CONTENT: 1.0}
    assert got.tight == (0.5 if abs(error) > 2 else 1.0)


def test_a_sound_is_graded_by_its_distance() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 80)).astype(np.float32))
    due = sound_of("four", LEVEL)
    sounds = {
        "a little noise": [chunk + 0.1 * noise for chunk in due],
        "more noise": [chunk + 0.3 * noise for chunk in due],
        "another word": list(sound_of("one", LEVEL)[:FOUR]),
        "one chunk": list(due[:1] * FOUR),
    }
    got = {name: judge(sounding("four", 6, sound), REST) for name, sound in sounds.items()}
    earned = {name: voice(one, range(6, 6 + FOUR)) for name, one in got.items()}
    assert WHOLE > earned["a little noise"] > 0.8 * WHOLE
    assert earned["a little noise"] > earned["more noise"] > 0.5 * WHOLE
    assert max(earned["another word"], earned["one chunk"]) < 0.4 * WHOLE
    assert first(got["a little noise"]).outcome is first(got["more noise"]).outcome is Outcome.HIT
    assert first(got["another word"]).outcome is first(got["one chunk"]).outcome is Outcome.WRONG


def test_compare() -> None:
    due, silence = sound_of("four", LEVEL)[0], sound_of("four", SILENCE)[0]
    for chunk in (due, silence):
        error, distance = compare(chunk, chunk, AUDIBLE)
        assert error == 0.0 and distance < 1e-9
    error, distance = compare(sound_of("four", LEVEL + 5.0)[0], due, AUDIBLE)
    assert error == pytest.approx(5.0, abs=0.1) and distance < 0.02
    error, distance = compare(silence, due, AUDIBLE)
    assert 20.0 < error <= 31.0 and distance == NOTHING_IN_COMMON
    assert compare(due, silence, AUDIBLE) == (error, NOTHING_IN_COMMON)


def test_a_word_that_ends_early() -> None:
    got = judge(say("seven", 20, chunks=2), say("four", 6))
    assert got.events[-1].kind != "speech" and [e.chunk for e in got.events if e.kind == "end"] == [22]
    missing = (SEVEN - 2) / SEVEN
    assert got.rewards[TIMING][22] == pytest.approx(RULE.cut * missing)  # in the chunk that should have gone on
    assert voice(got, range(20, 40)) == pytest.approx(WHOLE * 2 / SEVEN)
    assert (got.correct, got.due, got.spurious) == (1, 2, 0)


def test_a_tail_that_nobody_hears_may_be_left_out() -> None:
    """At a low level the last chunks of some words are below what is heard."""
    least = {}
    for word in lexicon().words:
        spoken = said(word, sound_of(word, -45.0))
        start, end = heard(spoken, AUDIBLE)[0].start, heard(spoken, AUDIBLE)[0].end
        if start == 0 and 1 < end < len(spoken):
            least[word] = end
    assert len(least) >= 3
    for word, end in least.items():
        facts = replace(FACTS, target_db=-45.0, prompts=(Prompt(3, 5, word),))
        assert judge(say(word, 6, -45.0, end), facts=facts).value == 1.0
        assert judge(say(word, 6, -45.0, end - 1), facts=facts).value == 0.0


def test_a_word_that_goes_on() -> None:
    due = sound_of("four", LEVEL)
    got = judge(sounding("four", 6, (*due, *due[:2])), REST)
    assert events_of(got, "speech") == [
        (6 + FOUR, "spurious", RULE.spurious, 0.0),
        (7 + FOUR, "shaping", RULE.trailing, 0.0),
    ]
    assert voice(got, range(6, 40)) == pytest.approx(2 * WHOLE) and (got.correct, got.spurious) == (2, 1)


INTERRUPTED = replace(FACTS, prompts=(Prompt(3, 5, "seven"), Prompt(8, 10, "four")))
"""The user says "four" from the third chunk of the answer on."""


@pytest.mark.parametrize(
    ("last", "credit", "tight"), [(7, 1.0, 1), (8, 1.0, 1), (9, RULE.edge + 0.4, 0), (10, None, 0), (12, None, 0)]
)
def test_an_interruption(last: int, credit: float | None, tight: int) -> None:
    """``last``: the last chunk that is heard of the answer."""
    sound = (*sound_of("seven", LEVEL), *sound_of("seven", LEVEL))[: last - 5]
    got = judge(sounding("seven", 6, sound), say("four", max(11, last + 1)), facts=INTERRUPTED)
    stop = [e for e in got.events if e.kind == "stop"]
    assert len(stop) == 1 and got.due == 3 and got.spurious == 0
    if credit is None:
        assert (stop[0].chunk, stop[0].outcome, stop[0].rewards) == (10, Outcome.MISSED, {TIMING: RULE.miss})
        over = [(e.chunk, e.rewards[TIMING]) for e in got.events if e.kind == "speech"]
        assert over == [(k, RULE.trailing) for k in range(11, last + 1)] and got.correct == 2
    else:
        assert (stop[0].chunk, stop[0].outcome) == (last + 1, Outcome.HIT)
        assert stop[0].rewards[TIMING] == pytest.approx(credit) and got.value == 1.0
    assert (got.tight == 1.0) == bool(tight)
    assert not [e for e in got.events if e.kind == "end"]  # it need not be whole
    # Nothing is paid for sound that goes on after the interruption's first chunk.
    assert voice(got, range(9, 11)) == 0.0 and voice(got, range(6, 9)) == pytest.approx(
        WHOLE * (min(last, 8) - 5) / SEVEN
    )


def test_ending_what_should_not_have_begun_earns_nothing() -> None:
    facts = replace(FACTS, prompts=(Prompt(3, 5, "four"), Prompt(16, 18, "seven")))
    got = judge(say("four", 14), facts=facts)
    assert not [e for e in got.events if e.kind == "stop"] and got.spurious == 1 and got.due == 2
    too_long = judge(sounding("four", 14, sound_of("four", LEVEL)[:1] * 6), facts=facts)
    assert [e.outcome for e in too_long.events if e.kind == "stop"] == [Outcome.MISSED]


def test_the_end_of_the_episode_cuts_a_word() -> None:
    assert judge(say("four", 6), REST).due == 2
    answered = judge(say("four", 6), REST, say("four", 39))
    assert (answered.correct, answered.due) == (3, 3)
    assert judge(say("four", 6), REST, say("seven", 39)).correct == 2


def test_without_a_voice_the_action_is_what_is_heard() -> None:
    got = judge({6: speak("four"), 20: speak("seven"), 21: GO_ON})
    assert (got.correct, got.due, got.spurious, got.value, got.tight) == (2, 2, 0, 1.0, 1.0)
    assert got.rewards[TIMING].sum() == got.rewards[CONTENT].sum() == 2.0 and not got.rewards[VOICE].any()
    assert judge({6: speak("four", "seven")}).correct == 0
    assert judge({6: speak("four"), 7: speak("four")}).spurious == 1


def test_events_carry_the_whole_reward() -> None:
    got = judge(say("four", 7, -10.0), say("one", 12), say("seven", 20, chunks=1), say("four", 38))
    for axis in (TIMING, CONTENT, VOICE):
        assert got.rewards[axis].sum() == pytest.approx(sum(e.rewards.get(axis, 0.0) for e in got.events))
        assert got.rewards[axis].dtype == np.float32
