"""Token ids of the special tokens, modes and words of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.logprob import TokenClasses
from model.tokenizer import FILE, SETTINGS, disagreements, load_tokenizer, size, special_ids, words_digest
from rollout.turn.action import Mode

_made: WeakKeyDictionary[InteractionModel, Vocabulary] = WeakKeyDictionary()


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the special tokens, words by id and ids by word, and which tokens each row class allows."""

    classes: TokenClasses
    bos: int
    audio: int
    image: int
    end: int
    modes: dict[int, Mode]  # by token id
    words: tuple[str, ...]  # by token id, the tokenizer's; "" for an id without a token
    ids: dict[str, int]  # by word
    tokenizer: PreTrainedTokenizerBase

    @staticmethod
    def of(model: InteractionModel) -> Vocabulary:
        """The model's, from its tokenizer; made once for each. Raises MetronomeError for a model without."""
        if model.tokenizer is None:
            wrong = "; ".join(disagreements(load_tokenizer(), model.config))
            raise MetronomeError(
                f"the model came without a tokenizer, and the shipped one does not fit: {wrong}. Put {FILE} and "
                f"{SETTINGS} of its own into its checkpoint's folder"
            )
        made = _made.get(model)
        if made is None or made.tokenizer is not model.tokenizer:
            made = _made[model] = Vocabulary.build(model.vocab, model.tokenizer)
        return made

    def check_same(self, other: InteractionModel, name: str) -> None:
        """Raises MetronomeError for a model, called ``name``, to which the ids mean other words."""
        if words_digest(self.tokenizer) != words_digest(Vocabulary.of(other).tokenizer):
            raise MetronomeError(f"{name} has another tokenizer than the policy: to it, the same ids are other words")

    @staticmethod
    def build(vocab: int, tokenizer: PreTrainedTokenizerBase | None = None, delegate: bool = False) -> Vocabulary:
        """Of no model (`of`). ``vocab``: size V; ``tokenizer``: default the shipped one; ``delegate``: whether mode
        delegate may be sampled. Raises ValueError as `TokenClasses.build` does."""
        tokenizer = tokenizer or load_tokenizer()
        ids: dict[str, int] = tokenizer.get_vocab()
        special = special_ids(tokenizer)
        words = [""] * size(tokenizer)
        for word, i in ids.items():
            words[i] = word
        return Vocabulary(
            classes=TokenClasses.build(tokenizer, vocab, delegate),
            bos=special["bos"],
            audio=special["audio"],
            image=special["image"],
            end=special["end"],
            modes={special[mode.value]: mode for mode in Mode},
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
        return next(i for i, one in self.modes.items() if one is mode)

    def word_id(self, word: str) -> int:
        """Id of a word. Raises ValueError for a word that the tokenizer does not have."""
        if word not in self.ids:
            raise ValueError(f"the tokenizer has no word {word!r}; scenarios may only use words of its list")
        return self.ids[word]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that the model reads; a word that the tokenizer does not have becomes the unknown
        one. Control tokens are none of them, whatever the text says: it may be a stranger's."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids
