"""Every kind of event of turn_taking, computed by hand.

The episode: the user talks in chunks 2 to 20 with a pause in 8 to 11, and again from 32 to 44. A reply may begin in 21,
22 (prompt), or 23, and in 45, 46 (prompt), or 47. In `INTERRUPTED` the second turn begins in 25, over the reply.
"""

import numpy as np
import pytest

from reward.rules.turn_taking import floor_items
from reward.score import score
from reward.study.timeline import timeline
from rollout.scenarios.registry import ScenarioConfig
from rollout.scenarios.turn_taking import REPLY, Turn, TurnTakingFacts
from rollout.scenarios.verdict import CONTENT, TIMING, Score
from rollout.turn.action import LISTEN, Action, speak
from tests.support.scores import events_of

FIRST = Turn(2, ((8, 11),), 20, False)
FACTS = TurnTakingFacts(60, (FIRST, Turn(32, (), 44, False)))
INTERRUPTED = TurnTakingFacts(60, (FIRST, Turn(25, (), 44, True)))
ALONE = TurnTakingFacts(60, (FIRST,))


def saying(*utterances: tuple[int, int]) -> list[Action]:
    """Utterances as (first chunk, chunks), each the reply from its first word, repeated if it is longer."""
    actions = [LISTEN] * 60
    for first, chunks in utterances:
        for i in range(chunks):
            actions[first + i] = speak(REPLY[i % len(REPLY)])
    return actions


def judge(actions: list[Action], facts: TurnTakingFacts = FACTS) -> Score:
    return score("turn_taking", facts.to_json(), actions, ScenarioConfig())


def test_perfect() -> None:
    got = judge(saying((22, 6), (46, 6)))
    assert (got.correct, got.due, got.spurious, got.value, got.tight) == (4, 4, 0, 1.0, 1.0)
    timing, content = np.zeros(60, np.float32), np.zeros(60, np.float32)
    timing[[22, 28, 46, 52]] = 1.0  # onset, and the first silent chunk after a whole reply
    content[[22, 46]] = 1.0
    content[[*range(23, 28), *range(47, 52)]] = np.float32(0.3)
    assert np.array_equal(got.rewards[TIMING], timing) and np.array_equal(got.rewards[CONTENT], content)


def test_silence() -> None:
    got = judge(saying())
    assert events_of(got, "onset") == [(23, "missed", -1.0, 0.0), (47, "missed", -1.0, 0.0)]
    assert (got.value, got.tight, got.due, got.spurious) == (0.0, 0.0, 2, 0)


@pytest.mark.parametrize(("chunk", "timing", "tight"), [(21, 1.0, 1.0), (22, 1.0, 1.0), (23, 0.6, 0.0)])
def test_onset_window(chunk: int, timing: float, tight: float) -> None:
    got = judge(saying((chunk, 6)), ALONE)
    assert events_of(got, "onset") == [(chunk, "hit", timing, 1.0)]
    assert (got.value, got.tight) == (1.0, tight)


@pytest.mark.parametrize("chunk", [20, 24])
def test_onset_outside_the_window_is_missed_and_spurious(chunk: int) -> None:
    got = judge(saying((chunk, 3)), ALONE)
    assert events_of(got, "onset") == [(23, "missed", -1.0, 0.0)]
    shaped = [(chunk, "spurious", -0.8, 0.0), (chunk + 1, "shaping", -0.4, 0.0), (chunk + 2, "shaping", -0.4, 0.0)]
    assert events_of(got, "speech") == shaped
    assert (got.correct, got.due, got.spurious, got.value) == (0, 1, 1, 0.0)
    assert not got.rewards[CONTENT].any()  # right words at the wrong time earn nothing


def test_speech_in_a_pause_and_over_the_user() -> None:
    got = judge(saying((5, 1), (9, 2), (22, 6), (46, 6)))
    assert events_of(got, "speech") == [
        (5, "spurious", -0.8, 0.0),
        (9, "spurious", -0.8, 0.0),
        (10, "shaping", -0.4, 0.0),
    ]
    assert got.value == pytest.approx(4 / (4 + 2))


def test_speech_that_runs_into_the_window_is_no_onset() -> None:
    got = judge(saying((18, 8)), ALONE)
    assert events_of(got, "onset") == [(23, "missed", -1.0, 0.0)] and got.value == 0.0


@pytest.mark.parametrize(
    ("chunks", "event"),
    [
        (4, (26, "missed", -1.0, 0.0)),  # too short: judged when it falls silent
        (5, (27, "hit", 0.6, 0.0)),
        (6, (28, "hit", 1.0, 0.0)),
        (7, (29, "hit", 0.6, 0.0)),
        (8, (29, "missed", -1.0, 0.0)),  # too long: judged in its eighth chunk
    ],
)
def test_reply_length(chunks: int, event: tuple) -> None:
    assert events_of(judge(saying((22, chunks)), ALONE), "reply") == [event]


def test_overrun_is_punished_in_every_chunk() -> None:
    got = judge(saying((22, 10)), ALONE)
    assert events_of(got, "reply") == [(29, "missed", -1.0, 0.0)]
    assert events_of(got, "overrun") == [(30, "shaping", -0.8, 0.0), (31, "shaping", -0.8, 0.0)]
    assert (got.correct, got.due, got.spurious) == (1, 2, 0)


def test_reply_at_the_end_of_the_episode() -> None:
    late = TurnTakingFacts(60, (Turn(2, (), 55, False),))
    assert judge(saying((57, 3)), late).due == 1  # cut off after 3 words: only the onset was due
    later = TurnTakingFacts(60, (Turn(2, (), 58, False),))
    assert judge(saying(), later).due == 0 and judge(saying(), later).value == 1.0


def test_wrong_words() -> None:
    actions = saying((22, 6))
    actions[22] = speak("four")
    got = judge(actions, ALONE)
    assert events_of(got, "onset") == [(22, "wrong", 1.0, -1.0)]
    assert events_of(got, "reply") == [(28, "hit", 1.0, 0.0)]  # five of six words are right
    actions[24] = speak("four")
    got = judge(actions, ALONE)
    assert events_of(got, "reply") == [(28, "wrong", 1.0, 0.0)]
    assert [e.rewards[CONTENT] for e in got.events if e.kind == "word"] == [0.3, -0.3, 0.3, 0.3, 0.3]
    assert (got.correct, got.due) == (0, 2)


@pytest.mark.parametrize(
    ("chunks", "event", "tight"),
    [
        (3, (25, "hit", 1.0, 0.0), 1.0),  # silent at once
        (4, (26, "hit", 1.0, 0.0), 1.0),
        (5, (27, "hit", 0.6, 0.0), 0.5),
        (6, (27, "missed", -1.0, 0.0), 0.5),
    ],
)
def test_stop_when_interrupted(chunks: int, event: tuple, tight: float) -> None:
    facts = TurnTakingFacts(60, (FIRST, Turn(25, (), 58, True)))
    got = judge(saying((22, chunks)), facts)
    assert events_of(got, "stop") == [event]
    assert events_of(got, "reply") == []  # an interrupted reply need not be whole
    assert got.value == (1.0 if event[1] == "hit" else 0.5) and got.tight == tight
    # Words after the interruption earn nothing.
    assert got.rewards[CONTENT][25:].sum() == 0.0


def test_talking_on_over_an_interruption_is_punished_in_every_chunk() -> None:
    got = judge(saying((22, 9), (46, 6)), INTERRUPTED)
    assert events_of(got, "stop") == [(27, "missed", -1.0, 0.0)]
    assert events_of(got, "overrun") == [(k, "shaping", -0.8, 0.0) for k in (28, 29, 30)]
    assert (got.correct, got.due, got.value) == (3, 4, 0.75)


def test_interrupted_late_reply_is_spurious_but_may_still_stop() -> None:
    facts = TurnTakingFacts(60, (FIRST, Turn(28, (), 58, True)))
    got = judge(saying((25, 4)), facts)  # begins in 25, two too late; interrupted in 28; silent from 29
    assert events_of(got, "onset")[0] == (23, "missed", -1.0, 0.0)
    # The chunks up to the interruption are trailing speech; from it on the stop is judged.
    assert events_of(got, "speech") == [
        (25, "spurious", -0.8, 0.0),
        (26, "shaping", -0.4, 0.0),
        (27, "shaping", -0.4, 0.0),
    ]
    assert events_of(got, "stop") == [(29, "hit", 1.0, 0.0)]
    assert (got.correct, got.due, got.spurious) == (1, 2, 1)


def test_floor_items_of_the_benchmark() -> None:
    items = floor_items(INTERRUPTED, saying((9, 6), (22, 5), (48, 2)))
    assert items.pause_takes == (True,)  # 1.2 s of speech began in the pause
    assert items.turn_takes == (True, False)  # two words after the second turn take no floor
    assert items.response_latency_s == (0.2,)
    assert items.stop_latency_s == (0.4,)
    assert floor_items(FACTS, saying((9, 3))).pause_takes == (False,)


def test_timeline_can_be_read() -> None:
    actions = saying((22, 4), (46, 6))
    lines = timeline(INTERRUPTED, actions, judge(actions, INTERRUPTED)).splitlines()
    assert lines[0] == "turn_taking: 2 turns, 1 interruptions"
    assert lines[3] == "user   ..######----#########....!!!!!!!!!!!!!!!!!!!!..............."
    assert lines[4] == "model  ......................YSHI....................YSHITA........"
    assert lines[5].startswith("score  1.00 (tight 1.00): 4 right of 4 due, 0 spurious")
    assert lines[6] == '   22  onset    hit      +1.00 timing +1.00 content, due 21 "yes"'
