"""Every kind of event of timespeak, computed by hand.

The episode: "two seconds" (10 chunks, so a window of 2 on each side); the number ends in chunk 5, the request in 9.
The echo is best in 10 and may come from 5 to 12; after an echo in 10 reminders are due in 20, 30, 40, 50.
"""

import numpy as np
import pytest

from reward.score import score
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.timespeak import TimespeakFacts
from rollout.scenarios.verdict import CONTENT, TIMING, Outcome, Score
from rollout.turn.action import LISTEN, speak
from tests.support.scores import events_of

FACTS = TimespeakFacts(
    chunks=60, number="two", interval=10, request_start=2, number_end=5, request_end=9, stop_start=None, stop_end=None
)
STOPPED = TimespeakFacts(**{**FACTS.__dict__, "stop_start": 32, "stop_end": 35})


def judge(said: dict[int, str], facts: TimespeakFacts = FACTS) -> Score:
    actions = [speak(said[k]) if k in said else LISTEN for k in range(facts.chunks)]
    return score("timespeak", facts.to_json(), actions, ScenarioConfig())


ECHO = {10: "two"}
PERFECT = {**ECHO, **dict.fromkeys((20, 30, 40, 50), "breathe")}


def test_perfect() -> None:
    got = judge(PERFECT)
    assert (got.correct, got.due, got.spurious, got.value, got.tight) == (5, 5, 0, 1.0, 1.0)
    expected = np.zeros(60, np.float32)
    expected[[10, 20, 30, 40, 50]] = 1.0
    assert np.array_equal(got.rewards[TIMING], expected) and np.array_equal(got.rewards[CONTENT], expected)
    assert got.rewards[TIMING].dtype == got.rewards[CONTENT].dtype == np.float32


def test_silence() -> None:
    got = judge({})
    # The echo is missed in 12, reminders at the end of their windows; the next is due 10 after the missed one.
    assert events_of(got, "echo") == [(12, "missed", -1.0, 0.0)]
    assert events_of(got, "reminder") == [(k, "missed", -1.0, 0.0) for k in (22, 32, 42, 52)]
    assert (got.value, got.tight, got.correct, got.due, got.spurious) == (0.0, 0.0, 0, 5, 0)
    assert got.rewards[TIMING].sum() == -5.0 and not got.rewards[CONTENT].any()


@pytest.mark.parametrize(
    ("chunk", "timing"),
    [(5, 0.2), (6, 0.36), (9, 0.84), (10, 1.0), (11, 0.84), (12, 0.68)],  # the window's longer side is 5 wide
)
def test_echo_is_graded_and_starts_the_count(chunk: int, timing: float) -> None:
    got = judge({chunk: "two", chunk + 10: "breathe"})
    assert events_of(got, "echo") == [(chunk, "hit", timing, timing)]
    assert events_of(got, "reminder")[0] == (chunk + 10, "hit", 1.0, 1.0)
    (tight,) = [e for e in judge({chunk: "two"}).events if e.kind == "echo"]
    assert tight.due == 10


def test_echo_too_early_or_late_is_spurious_and_missed() -> None:
    for chunk in (4, 13):
        got = judge({**PERFECT, chunk: "two"} if chunk == 4 else {chunk: "two"})
        assert (chunk, "spurious", -0.8, 0.0) in events_of(got, "speech")
    assert events_of(judge({13: "two"}), "echo") == [(12, "missed", -1.0, 0.0)]


def test_wrong_number_fails_the_echo_and_a_correction_is_spurious() -> None:
    got = judge({**PERFECT, 10: "four"})
    assert events_of(got, "echo") == [(10, "wrong", 1.0, -1.0)]
    assert (got.correct, got.due, got.value) == (4, 5, 0.8)
    got = judge({**PERFECT, 10: "four", 11: "two"})
    assert events_of(got, "speech") == [(11, "spurious", -0.8, 0.0)]
    assert got.value == pytest.approx(4 / 6)


def test_number_said_twice_is_spurious_once() -> None:
    got = judge({**PERFECT, 12: "two"})
    assert (got.correct, got.due, got.spurious) == (5, 5, 1)


@pytest.mark.parametrize(("chunk", "timing"), [(18, 0.2), (19, 0.6), (20, 1.0), (21, 0.6), (22, 0.2)])
def test_reminder_is_graded_and_the_next_counts_from_the_hit(chunk: int, timing: float) -> None:
    got = judge({**ECHO, chunk: "breathe", chunk + 10: "breathe"})
    assert events_of(got, "reminder")[:2] == [(chunk, "hit", timing, timing), (chunk + 10, "hit", 1.0, 1.0)]


def test_reminder_outside_its_window_is_spurious_and_missed() -> None:
    got = judge({**ECHO, 17: "breathe", 23: "breathe", 30: "breathe", 40: "breathe", 50: "breathe"})
    assert events_of(got, "speech") == [(17, "spurious", -0.8, 0.0), (23, "spurious", -0.8, 0.0)]
    assert events_of(got, "reminder")[0] == (22, "missed", -1.0, 0.0)
    # After the miss the count goes on from 20, when it was due.
    assert events_of(got, "reminder")[1] == (30, "hit", 1.0, 1.0)
    assert got.value == pytest.approx(4 / (5 + 2))


def test_right_word_at_the_wrong_time_has_no_content_credit() -> None:
    got = judge({**ECHO, 15: "breathe"})
    assert got.rewards[CONTENT][15] == 0.0 and got.rewards[TIMING][15] == np.float32(-0.8)


def test_wrong_word_at_the_right_time() -> None:
    got = judge({**PERFECT, 19: "okay", 20: "breathe"})
    # The wrong word uses the reminder up; the right one a chunk later comes outside any window.
    assert events_of(got, "reminder")[0] == (19, "wrong", 0.6, -1.0)
    assert events_of(got, "speech") == [(20, "spurious", -0.8, 0.0)]
    assert got.value == pytest.approx(4 / 6)


def test_two_reminders_in_one_window_are_one_hit_and_one_spurious() -> None:
    got = judge({**PERFECT, 21: "breathe"})
    assert (got.correct, got.due, got.spurious) == (5, 5, 1)


def test_what_the_end_cuts_off_is_due_only_if_said() -> None:
    late = {10: "two", 20: "breathe", 30: "breathe", 40: "breathe", 49: "breathe"}
    assert judge(late).due == 5  # the next is due in 59, its window is still open at the end
    assert judge({**late, 58: "breathe"}).due == 6


def test_tight_score_has_windows_of_one_chunk() -> None:
    got = judge({**ECHO, 22: "breathe", 32: "breathe", 42: "breathe", 52: "breathe"})
    assert got.value == 1.0
    # Tight: 22 is outside [19, 21], so missed and spurious; then due in 30, 40, 50 and each 2 late: the same.
    assert got.tight == pytest.approx(1 / (5 + 4))
    assert judge({**PERFECT, 21: "breathe"} | {20: "breathe"}).tight == pytest.approx(5 / 6)
    assert judge({9: "two", 19: "breathe", 29: "breathe", 40: "breathe", 51: "breathe"}).tight == 1.0
    assert judge({8: "two"}).tight == 0.0 and judge({8: "two"}).value > 0.0


def test_stop_respected() -> None:
    got = judge({**ECHO, 20: "breathe", 30: "breathe"}, STOPPED)
    # The reminder of 40 is not due any more.
    assert events_of(got, "stop") == [(59, "hit", 0.0, 0.0)]
    assert (got.correct, got.due, got.value, got.tight) == (4, 4, 1.0, 1.0)
    assert got.rewards[TIMING].sum() == 3.0


def test_stop_ignored() -> None:
    got = judge({**PERFECT}, STOPPED)
    assert events_of(got, "stop") == [(40, "missed", -1.0, 0.0)]
    assert events_of(got, "speech") == [(50, "spurious", -0.8, 0.0)]
    assert (got.correct, got.due, got.spurious) == (3, 4, 1)


def test_grace_after_the_stop() -> None:
    # The stop ends in 35; speech in 35 and 36 is forgiven, in 37 not.
    said = {**ECHO, 20: "breathe", 30: "breathe"}
    assert judge({**said, 35: "breathe", 36: "breathe"}, STOPPED).value == 1.0
    assert judge({**said, 37: "breathe"}, STOPPED).value == 0.75


def test_reminder_due_while_the_user_says_stop() -> None:
    facts = TimespeakFacts(**{**FACTS.__dict__, "stop_start": 28, "stop_end": 31})
    before = {**ECHO, 20: "breathe"}
    assert judge(before, facts).due == 3  # not said: not due, since its window was open when the stop ended
    assert judge({**before, 30: "breathe"}, facts).due == 4  # said: a hit
    assert judge({**before, 30: "breathe"}, facts).value == 1.0


def test_events_carry_the_whole_reward() -> None:
    got = judge({**PERFECT, 10: "four", 15: "okay", 22: "breathe"}, STOPPED)
    assert got.rewards[TIMING].sum() == pytest.approx(sum(e.rewards.get(TIMING, 0.0) for e in got.events))
    assert got.rewards[CONTENT].sum() == pytest.approx(sum(e.rewards.get(CONTENT, 0.0) for e in got.events))
    assert not [e for e in got.events if e.outcome is Outcome.SHAPING]


def test_mismatched_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="59 actions for an episode of 60"):
        score("timespeak", FACTS.to_json(), [LISTEN] * 59, ScenarioConfig())
    with pytest.raises(ValueError, match="carries facts of timespeak"):
        score("turn_taking", FACTS.to_json(), [LISTEN] * 60, ScenarioConfig())
