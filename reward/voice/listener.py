"""What a listener understands of the words that a model says aloud, as a measure and as a reward.

The listener is the offline recogniser with the closed grammar of the words that the family may say
(`reward.voice.recognise`). It hears each utterance by itself, from its first chunk that is heard to its last, made into
sound as a whole. A word is *whole* if at least as many chunks are heard as of the lexicon's sound of it at the same
level; how early one may end, and after which interruption, is what a family's rules judge.

The reward is a cost, -1 for each whole word that is not understood, in the last chunk that is heard of it. It is never
positive: nothing is earned by saying more. Answering is what the rules ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.voice.level import loudness_db
from model.voice.sound import render
from reward.voice.recognise import Recogniser
from rollout.turn.action import Action
from rollout.turn.utterance import Utterance, heard
from rollout.world.lexicon import lexicon

UNDERSTOOD = "understood"
"""The axis of the reward."""
ITERATIONS = 16
"""Of Griffin-Lim: of the 30 words of family repeat at -28 dB, 29 are understood with 16 as with 8, and 30 with 32."""


@dataclass(frozen=True)
class Word:
    """A word that was said aloud. Example: ``Word("four", 6, 9, True, "four", -27.9)``."""

    word: str
    start: int  # the first chunk that is heard
    end: int  # the chunk after the last one
    whole: bool
    understood: str | None  # the word that the listener took it for; None for none of them, and where it was not asked
    level_db: float  # level of its loudest chunk, of full scale

    @property
    def right(self) -> bool:
        return self.understood == self.word


class Listener:
    """Hears the episodes of one family. Not to be shared between threads."""

    def __init__(self, words: Sequence[str], audible_db: float) -> None:
        """``words``: of the lexicon, that the family may say; ``audible_db``: the level from which a chunk is heard.
        Raises `RecogniserError` without pocketsphinx and for a word that it does not know, `LexiconError` for one that
        the lexicon lacks."""
        self.audible_db = audible_db
        self.recogniser = Recogniser(words)
        for word in words:
            lexicon().target(word)

    def words(self, actions: Sequence[Action], parts: bool = True) -> list[Word]:
        """The words of an episode of which something is heard, in order: actions [chunks] -> words. What is said
        without sound, or as another word than one of the family's, is left out. ``parts``: whether the listener is
        asked about words that are not whole."""
        return [self._word(u, sound, parts) for u, sound in sounds(actions, self.audible_db) if self._may_be(u)]

    def rewards(self, actions: Sequence[Action]) -> Tensor:
        """The reward of each chunk, fp32 [chunks]."""
        rewards = torch.zeros(len(actions))
        for word in self.words(actions, parts=False):
            if word.whole and not word.right:
                rewards[word.end - 1] -= 1.0
        return rewards

    def _may_be(self, utterance: Utterance) -> bool:
        return len(utterance.words) == 1 and utterance.words[0] in self.recogniser.words

    def _word(self, utterance: Utterance, sound: Tensor, parts: bool) -> Word:
        word, level = utterance.words[0], max(map(loudness_db, sound))
        whole = len(sound) >= self._due(word, level)
        understood = self.recogniser.word(render(sound, ITERATIONS)) if whole or parts else None
        return Word(word, utterance.start, utterance.end, whole, understood, level)

    def _due(self, word: str, level: float) -> int:
        """From the first to the last one that is heard, the chunks of the lexicon's sound of a word, the loudest of
        them at ``level`` dB."""
        due = lexicon().at(word, level)
        found = [i for i, chunk in enumerate(due) if loudness_db(chunk) >= self.audible_db] or [0]
        return found[-1] - found[0] + 1


def sounds(actions: Sequence[Action], audible_db: float) -> list[tuple[Utterance, Tensor]]:
    """The utterances of an episode that have sound, each with it: fp32 [chunks of it, 20, 80]."""
    out = []
    for utterance in heard(actions, audible_db):
        chunks = [action.sound for action in actions[utterance.start : utterance.end]]
        found = [chunk for chunk in chunks if chunk is not None]
        if len(found) == len(chunks):
            out.append((utterance, torch.stack(found)))
    return out
