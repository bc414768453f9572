"""The small word tokenizer of the CPU presets: 256 lower-case words from ``words.txt``, one a line, in the order of
ids.

It is a `PreTrainedTokenizerFast`; the large presets take any other fast tokenizer that has the special tokens.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.program.reading import read_text

PAD, BOS, AUDIO, LISTEN, SPEAK, DELEGATE, END, UNK = range(8)
SPECIALS = ("<|pad|>", "<|bos|>", "<|audio|>", "<|listen|>", "<|speak|>", "<|delegate|>", "<|end|>", "<|unk|>")
"""Texts of the special tokens, by id."""

WORDS_FILE = Path(__file__).with_name("words.txt")


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of ``words.txt``. Text is lower-cased, anything but letters and apostrophes separates words,
    unknown words become ``<|unk|>``. Raises ValueError if the file is damaged."""
    words = read_text(WORDS_FILE).split()
    if tuple(words[: len(SPECIALS)]) != SPECIALS or len(set(words)) != len(words):
        raise ValueError(f"{WORDS_FILE}: must start with {' '.join(SPECIALS)} and name each word once")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z']+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|audio|>", "<|listen|>", "<|speak|>", "<|delegate|>", "<|image|>"],
    )
    return fast
