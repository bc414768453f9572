"""Token ids of the special tokens, modes and words of a conversation."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from model.logprob import TokenClasses
from model.tokenizer import load_tokenizer
from rollout.turn.action import Mode


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the special tokens, words by id and ids by word, and which tokens each row class allows."""

    classes: TokenClasses
    bos: int
    audio: int
    image: int
    end: int
    modes: dict[int, Mode]  # by token id
    words: tuple[str, ...]  # by token id, the tokenizer's
    ids: dict[str, int]  # by word
    tokenizer: PreTrainedTokenizerBase

    @staticmethod
    def build(vocab: int, tokenizer: PreTrainedTokenizerBase | None = None, delegate: bool = False) -> Vocabulary:
        """``vocab``: the model's vocabulary size V; ``tokenizer``: default the shipped one; ``delegate``: whether mode
        delegate may be sampled. Raises ValueError as `TokenClasses.build` does."""
        tokenizer = tokenizer or load_tokenizer()
        ids: dict[str, int] = tokenizer.get_vocab()
        words = [""] * len(tokenizer)
        for word, i in ids.items():
            words[i] = word
        return Vocabulary(
            classes=TokenClasses.build(tokenizer, vocab, delegate),
            bos=ids["<|bos|>"],
            audio=ids["<|audio|>"],
            image=ids["<|image|>"],
            end=ids["<|end|>"],
            modes={ids[f"<|{mode.value}|>"]: mode for mode in Mode},
            words=tuple(words),
            ids=ids,
            tokenizer=tokenizer,
        )

    @property
    def listen(self) -> int:
        """Id of the token of mode listen."""
        return self.mode_id(Mode.LISTEN)

    def mode_id(self, mode: Mode) -> int:
        """Id of a mode's token."""
        return self.ids[f"<|{mode.value}|>"]

    def word_id(self, word: str) -> int:
        """Id of a word. Raises ValueError for a word that the tokenizer does not have."""
        if word not in self.ids:
            raise ValueError(f"the tokenizer has no word {word!r}; scenarios may only use words of its list")
        return self.ids[word]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that the model reads; a word that the tokenizer does not have becomes the unknown
        one."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids
