"""What the grammar writes, it reads back, and its counts are those of what it writes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rollout.record.transcript import write_transcript
from rollout.turn.action import CHUNK_FRAMES, LISTEN, Action, Mode, speak
from rollout.turn.grammar import Grammar, chunk_ends, chunk_starts, context_rows, max_rows, row_class, turn_rows
from rollout.turn.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(256)
WORDS = ("one", "two", "three", "four")


def actions(words_per_chunk: int) -> list[Action]:
    return [LISTEN, *(Action(Mode.SPEAK, WORDS[:n]) for n in range(1, words_per_chunk + 1))]


@pytest.mark.parametrize("words_per_chunk", [1, 2, 3, 4])
def test_actions_are_written_read_and_counted(words_per_chunk: int) -> None:
    grammar = Grammar(VOCABULARY, words_per_chunk)
    for action in actions(words_per_chunk):
        sampled = grammar.write(action)
        assert grammar.read(sampled) == action
        assert [grammar.is_over(sampled[: n + 1]) for n in range(len(sampled))] == [False] * (len(sampled) - 1) + [True]
        forced = grammar.forced(sampled)
        assert (forced == [VOCABULARY.end]) == (len(action.words) == words_per_chunk)
        assert (len(grammar.observed()) + len(sampled) + len(forced), len(sampled)) == turn_rows(
            len(action.words), words_per_chunk
        )
        assert all(VOCABULARY.classes.allowed[row_class(i), token] for i, token in enumerate(sampled))
    assert len(sampled) == grammar.max_sampled  # the last action says as much as fits
    assert max_rows(words_per_chunk) == grammar.max_rows == 4 + 1 + words_per_chunk + 1


def test_what_has_no_place_is_refused() -> None:
    grammar = Grammar(VOCABULARY, 2)
    with pytest.raises(ValueError, match="says 3 words, need 1 to 2"):
        grammar.write(speak("one", "two", "three"))
    with pytest.raises(ValueError, match="no word 'xylophone'"):
        grammar.write(speak("xylophone"))
    with pytest.raises(ValueError, match="words_per_chunk is 0"):
        Grammar(VOCABULARY, 0)
    with pytest.raises(ValueError, match="chunk 1: says 3 words"):
        write_transcript(
            torch.zeros(2, CHUNK_FRAMES, 80, dtype=torch.uint8), [LISTEN, speak("one", "two", "three")], grammar
        )


@pytest.mark.parametrize("words_per_chunk", [1, 3])
def test_chunks_are_found_in_a_transcript(words_per_chunk: int) -> None:
    talk = actions(words_per_chunk) * 2
    codes = torch.zeros(len(talk), CHUNK_FRAMES, 80, dtype=torch.uint8)
    tokens = write_transcript(codes, talk, Grammar(VOCABULARY, words_per_chunk)).tokens
    starts, ends = chunk_starts(tokens.tolist(), VOCABULARY.audio), chunk_ends(tokens, VOCABULARY.audio).tolist()
    assert starts[0] == 1 and [end + 1 for end in ends] == [*starts[1:], len(tokens)]
    lengths = [b - a for a, b in pairwise([*starts, len(tokens)])]
    assert lengths == [turn_rows(len(action.words), words_per_chunk)[0] for action in talk]
    full = [talk[words_per_chunk]] * 5
    longest = write_transcript(codes[:1].expand(5, -1, -1), full, Grammar(VOCABULARY, words_per_chunk)).tokens
    assert len(longest) == context_rows(5, words_per_chunk)


def test_a_count_of_another_size_differs() -> None:
    """The control: with room for another word the same turn samples its end, and is as long."""
    assert turn_rows(2, 2) != turn_rows(2, 3)
    assert turn_rows(2, 2)[0] == turn_rows(2, 3)[0]
