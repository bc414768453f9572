"""A model's tokenizer: the one of its checkpoint's files, or the small word list that is shipped for the CPU presets.

A checkpoint's folder carries ``tokenizer.json`` and ``tokenizer_config.json``, as transformers writes and reads them.
The shipped one has 256 lower-case words, from ``words.txt``, one a line, in the order of ids. Any other fast tokenizer
will do that has a token for each of `NAMES`: the token that ``tokenizer_config.json`` calls ``audio_token`` (say), as
transformers' processors do, else the one with the text ``<|audio|>``. `model.add_tokens` adds those that are missing.

A config says some of these ids, too; where the two disagree the model is refused (`disagreements`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import InklingConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.program.reading import UnreadableError, read_text, size_of

PAD, BOS, AUDIO, LISTEN, SPEAK, DELEGATE, END, UNK = range(8)
SPECIALS = ("<|pad|>", "<|bos|>", "<|audio|>", "<|listen|>", "<|speak|>", "<|delegate|>", "<|end|>", "<|unk|>")
"""Texts of the shipped tokenizer's first tokens, by id."""

NAMES = ("bos", "audio", "image", "listen", "speak", "delegate", "end")
"""What a conversation needs tokens for."""

WORDS_FILE = Path(__file__).with_name("words.txt")
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""Which transformers reads too, where they are there."""
MOST_BYTES = 1 << 28
"""Most bytes of a tokenizer's file; Inkling's, of 200,000 tokens, has some 2^25."""


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
        additional_special_tokens=["<|listen|>", "<|speak|>", "<|delegate|>"],
        model_specific_special_tokens={"audio_token": "<|audio|>", "image_token": "<|image|>"},
    )
    return fast


def shipped(config: InklingConfig) -> PreTrainedTokenizerFast | None:
    """The shipped tokenizer for a model of this config, which has no other; None where the ids disagree."""
    tokenizer = load_tokenizer()
    return None if disagreements(tokenizer, config) else tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files, or what is left of them."""
    return any((folder / name).exists() for name in (FILE, SETTINGS))


def read_tokenizer(folder: Path, **settings: Any) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder. Code that a folder may hold is not run. ``settings``: those that replace the folder's.
    Raises UnreadableError, which begins with the file's name, for one that is missing, damaged or beyond
    `MOST_BYTES`."""
    for name in (FILE, SETTINGS, *(other for other in OTHER_FILES if (folder / other).exists())):
        try:
            if (size := size_of(folder / name)) > MOST_BYTES:
                raise UnreadableError("", f"has {size:,} bytes; at most {MOST_BYTES:,} are read")
        except UnreadableError as error:
            raise UnreadableError("", f"{name} {error.problem}") from None
    try:
        fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder), **settings)
        fast.get_vocab(), fast.special_tokens_map, fast.added_tokens_decoder
    # Broad on purpose: what the libraries raise for a damaged file is open-ended, and a panic of their native part is
    # no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableError("", f"{FILE} is damaged, or {SETTINGS} is ({problem})") from None
    for name in ("is_local", "local_files_only"):  # else they would be saved
        fast.init_kwargs.pop(name, None)
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the two files into a folder of `model.program.files.whole_folder`."""
    tokenizer.save_pretrained(folder)


def token_text(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Text of the token for one of `NAMES`; the tokenizer may lack it."""
    return str(tokenizer.special_tokens_map.get(f"{name}_token") or f"<|{name}|>")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids by `NAMES`. Raises ValueError for a tokenizer that lacks one."""
    known = tokenizer.get_vocab()
    texts = {name: token_text(tokenizer, name) for name in NAMES}
    if missing := [text for text in texts.values() if text not in known]:
        raise ValueError(f"the tokenizer lacks {', '.join(missing)}; add them as special tokens (model.add_tokens)")
    return {name: known[text] for name, text in texts.items()}


def size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id: the smallest vocabulary that holds them all. Some ids may have no token."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def words_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hexadecimal digits of a SHA-256 over all tokens with their ids, and over `special_ids`: equal for tokenizers
    of which one reads what the other has written."""
    content = json.dumps([tokenizer.get_vocab(), special_ids(tokenizer)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def disagreements(tokenizer: PreTrainedTokenizerBase, config: InklingConfig) -> list[str]:
    """What a tokenizer and a config say differently, one text each."""
    text, wrong = config.text_config, []
    vocab = text.unpadded_vocab_size or text.vocab_size
    if size(tokenizer) > vocab:
        wrong.append(f"its ids reach {size(tokenizer) - 1}, but the model's vocabulary has {vocab}")
    try:
        ids = special_ids(tokenizer)
    except ValueError as error:
        return [*wrong, str(error)]
    owners: dict[int, str] = {}
    for name, i in ids.items():
        if (other := owners.setdefault(i, name)) != name:
            wrong.append(f"{other} and {name} are both token {i}")
    wanted = {
        f"{name}_token_id": (getattr(config, f"{name}_token_id"), ids[name], token_text(tokenizer, name))
        for name in ("audio", "image")
    }
    for name in ("bos", "eos", "pad"):
        if named := tokenizer.special_tokens_map.get(f"{name}_token"):
            stored = getattr(text, f"{name}_token_id")
            wanted[f"text_config.{name}_token_id"] = (stored, tokenizer.convert_tokens_to_ids(named), named)
    for field, (stored, i, token) in wanted.items():
        if stored is not None and i != stored:
            wrong.append(f"{field} is {stored}, but {token} is token {i}")
    return wrong
