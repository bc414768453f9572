"""The conversation's words as token ids: what a micro-turn is written with and read back from."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from model.logprob import TokenClasses
from model.tokenizer import load_tokenizer
from rollout.turn.action import Mode


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the special tokens, the words by id, and which tokens may be sampled where."""

    classes: TokenClasses
    bos: int
    audio: int
    end: int
    modes: dict[int, Mode]  # by token id
    words: tuple[str, ...]  # [V], by token id
    ids: dict[str, int]  # by word

    @staticmethod
    def build(vocab: int, tokenizer: PreTrainedTokenizerBase | None = None, delegate: bool = False) -> Vocabulary:
        """``vocab`` is the model's vocabulary size; without a tokenizer the shipped one is taken."""
        tokenizer = tokenizer or load_tokenizer()
        ids: dict[str, int] = tokenizer.get_vocab()
        words = [""] * len(tokenizer)
        for word, i in ids.items():
            words[i] = word
        return Vocabulary(
            classes=TokenClasses.build(tokenizer, vocab, delegate),
            bos=ids["<|bos|>"],
            audio=ids["<|audio|>"],
            end=ids["<|end|>"],
            modes={ids[f"<|{mode.value}|>"]: mode for mode in Mode},
            words=tuple(words),
            ids=ids,
        )

    @property
    def listen(self) -> int:
        return self.mode_id(Mode.LISTEN)

    def mode_id(self, mode: Mode) -> int:
        return self.ids[f"<|{mode.value}|>"]

    def word_id(self, word: str) -> int:
        """Raises ValueError for a word that the tokenizer does not have: unknown words cannot be said."""
        if word not in self.ids:
            raise ValueError(f"the tokenizer has no word {word!r}; scenarios may only use words of its list")
        return self.ids[word]
