"""The formulas of timing and content, by hand."""

import pytest

from reward.rules.content import right_places, says, word_credit
from reward.rules.timing import (
    Run,
    graded,
    half_width,
    response_latency_s,
    runs,
    stop_latency_s,
    take_over,
    take_over_rate,
)
from rollout.turn.action import LISTEN, speak


def test_runs() -> None:
    s = speak("a")
    assert runs([]) == [] == runs([LISTEN, LISTEN])
    assert runs([s, s, LISTEN, s, LISTEN, LISTEN, s]) == [Run(0, 2), Run(3, 4), Run(6, 7)]
    assert Run(3, 7).chunks == 4


def test_graded_credit_falls_linearly_to_the_edge() -> None:
    assert [graded(d, 4, 0.2) for d in range(-4, 5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2])
    assert [graded(d, 2, 0.2) for d in (0, 1, 2)] == pytest.approx([1, 0.6, 0.2])
    assert [graded(d, 1, 0.2) for d in (0, 1)] == pytest.approx([1, 0.6])  # as if two wide


def test_half_width_is_a_fifth_and_at_least_one_chunk() -> None:
    assert [half_width(interval, 0.2) for interval in (2, 5, 10, 15, 20)] == [1, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("span_s", "words", "takes"),
    [
        (0.0, 0, False),  # silence
        (0.8, 3, False),  # shorter than 1 s and at most 3 words
        (1.0, 3, True),  # not shorter than 1 s
        (0.8, 4, True),  # more than 3 words
        (1.2, 1, True),
    ],
)
def test_take_over(span_s: float, words: int, takes: bool) -> None:
    assert take_over(span_s, words) is takes


def test_take_over_rate() -> None:
    assert take_over_rate([True, False, False, True]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        take_over_rate([])


def test_latencies() -> None:
    # The user's last chunk is 16: an onset in 17 follows at once, one in 19 after 400 ms; talking over counts as 0.
    assert [response_latency_s(16, onset) for onset in (17, 19, 12)] == [0.0, 0.4, 0.0]
    # Interrupted in chunk 21, silent from 23: two chunks of overlap. A run that was over by then overlaps not at all.
    assert [stop_latency_s(21, Run(18, end)) for end in (23, 21)] == [0.4, 0.0]


def test_words() -> None:
    assert says(speak("four"), ["four"]) and not says(speak("five"), ["four"])
    assert not says(speak("four", "four"), ["four"]) and not says(LISTEN, ["four"])
    assert (word_credit(True, 1.0, -0.5), word_credit(False, 1.0, -0.5)) == (1.0, -0.5)
    assert right_places(["yes", "sure", "is", "here"], ["yes", "sure", "here", "is", "the"]) == 2
    assert right_places([], ["yes"]) == 0
