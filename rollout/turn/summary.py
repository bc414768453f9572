"""The policy `summary` of long sessions: what is dropped is replaced by what the model wrote about it.

A session whose sequence could not hold another micro-turn and a summary (``budget``) is asked for one before its next
micro-turn begins:

    … request word … | sampled: word … end        the end of the old context
    bos, word …, audio x 4, …                     the new one: bos, the summary, and the micro-turn

The request is observed, like a text event; every token of the summary is sampled, from the words and the end token, so
it has a log-prob and a row digest and is learnt like anything that is said, but nobody hears it. Its tokens belong to
the chunk that follows. A context is a sequence of its own: the learner computes it from position 0 on, and so did the
session, which emptied its cache. Nothing of the old one but the summary can affect the new one, by a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.errors import MetronomeError
from model.context import ContextConfig
from rollout.turn.vocabulary import Vocabulary


@dataclass(frozen=True)
class Summary:
    """The rule, in tokens of one vocabulary."""

    budget: int  # the most tokens of a context
    request: tuple[int, ...]
    words: int  # the most that a summary may have

    @staticmethod
    def of(context: ContextConfig, vocabulary: Vocabulary) -> Summary | None:
        """The recipe's; None for another policy."""
        if context.policy != "summary":
            return None
        return Summary(context.budget, tuple(vocabulary.encode(context.request)), context.summary_words)

    @property
    def rows(self) -> int:
        """The most tokens of request and summary, a forced end included."""
        return len(self.request) + self.words + 1

    def check(self, turn_rows: int) -> None:
        """Raises MetronomeError unless a context holds its summary, a micro-turn of ``turn_rows`` and the next
        summary."""
        if (least := 1 + self.words + turn_rows + self.rows) > self.budget:
            raise MetronomeError(
                f"context.budget is {self.budget}: a context that begins with a summary of {self.words} words, has one "
                f"micro-turn and ends with the next summary takes up to {least} tokens; give more, or fewer "
                "summary_words"
            )

    def is_due(self, rows: int, turn_rows: int) -> bool:
        """Whether a context of ``rows`` tokens may be too small for another micro-turn and a summary after it."""
        return rows + turn_rows + self.rows > self.budget
