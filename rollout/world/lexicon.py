"""What the voice is taught to say: a word to its target, mel chunks of a recording of that word alone.

Words come from two folders of recordings (`rollout.world.speech` reads and checks them): rollout/data/words, made for
this, and rollout/data/speech, the simulated users' prompts. The first recording that says a word and nothing else is
its target. 12 of the words in rollout/data/words exist in no recording at hand and were rendered once by espeak-ng (its
LICENSE.txt says which, and how); they are shipped as sound because espeak-ng gives other samples from call to call.

The shipped words cover all that the scripted experts of the shipped families say. `Lexicon.digest` names the targets:
equal digests, equal numbers, on every machine (`model.voice.mel`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from kernels.errors import MetronomeError
from model.program.ranges import shown
from model.voice.level import louder, loudness_db
from model.voice.mel import CHUNK_SAMPLES, FRAMES, HOP, mel_chunks
from rollout.world.speech import DEFAULT_FOLDER, SpeechBank, normalise

WORDS_FOLDER = Path(__file__).parents[1] / "data" / "words"
MOST_CHUNKS = 8
"""Of one word: 1.6 s. The longest shipped one has 5."""


class LexiconError(MetronomeError):
    """A word cannot be said, or a target cannot be used; the message says which, and what to do."""


class Lexicon:
    """Targets by word."""

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        """``targets``: fp32 [n, 20, 80] by word. Raises LexiconError as `check_target` does."""
        for word, target in targets.items():
            check_target(word, target)
        self._targets = MappingProxyType(dict(targets))
        self._levels: dict[str, float] = {}  # `level_db` of the words that were asked for

    @classmethod
    def open(cls, folders: Sequence[str | Path] = (WORDS_FOLDER, DEFAULT_FOLDER)) -> Lexicon:
        """All words that a recording says alone, those of the first folder first. Raises `SpeechError` for a folder or
        a recording that cannot be used, LexiconError for a word that is too long."""
        targets: dict[str, Tensor] = {}
        for folder in folders:
            for clip in SpeechBank.open(folder).clips:
                if len(clip.words) == 1 and clip.words[0] not in targets:
                    where = f"{clip.words[0]!r} ({Path(folder) / clip.file})"
                    _check_length(where, -(-len(clip.samples) // CHUNK_SAMPLES))
                    targets[clip.words[0]] = mel_chunks(torch.tensor(clip.samples))
        return cls(targets)

    @property
    def words(self) -> tuple[str, ...]:
        """All words, in alphabetical order."""
        return tuple(sorted(self._targets))

    def target(self, word: str) -> Tensor:
        """A word's chunks, fp32 [n, 20, 80], n >= 1; upper case and punctuation do not count. Not to be written to.

        Raises LexiconError for a word that no recording says."""
        plain = normalise(word)
        if len(plain) != 1 or plain[0] not in self._targets:
            raise LexiconError(
                f"voice: no recording says {shown(word)} alone: add one to {WORDS_FOLDER / 'manifest.jsonl'}, or use "
                f"one of the {len(self._targets)} words that have one ({', '.join(self.words[:6])}, …)"
            )
        return self._targets[plain[0]]

    def level_db(self, word: str) -> float:
        """Level of the loudest chunk of a word's target, of full scale. Raises as `target` does."""
        if word not in self._levels:
            self._levels[word] = max(map(loudness_db, self.target(word)))
        return self._levels[word]

    def at(self, word: str, level_db: float) -> Tensor:
        """A word's target, made so loud that its loudest chunk has that level: fp32 [n, 20, 80]. Raises as `target`
        does."""
        return louder(self.target(word), level_db - self.level_db(word))

    def digest(self) -> str:
        """16 hexadecimal digits of all words and targets."""
        digest = blake2b(digest_size=8)
        for word in self.words:
            target = self._targets[word]
            digest.update(f"{word}\n{len(target)}\n".encode())
            digest.update(target.numpy().tobytes())
        return digest.hexdigest()


@cache
def lexicon() -> Lexicon:
    """The shipped sounds of words, read once per process."""
    return Lexicon.open()


def check_target(word: str, target: Tensor) -> None:
    """Raises LexiconError for a target of another shape or type than fp32 [n, 20, 80], with more than `MOST_CHUNKS`
    chunks, with values that are no numbers, or without a sound (no value differs from its band's in another frame)."""
    if target.ndim != 3 or target.shape[1:] != (FRAMES, 80) or target.dtype != torch.float32 or not len(target):
        raise LexiconError(
            f"voice: the target of {shown(word)} is {list(target.shape)} of {target.dtype}: give float32 "
            f"[n, {FRAMES}, 80], n >= 1, frames of {HOP} samples"
        )
    _check_length(shown(word), len(target))
    if not bool(torch.isfinite(target).all()):
        raise LexiconError(f"voice: the target of {shown(word)} holds values that are no numbers: make it again")
    if bool((target == target[0, 0]).all()):
        raise LexiconError(f"voice: the target of {shown(word)} is silent or a constant hum: record the word again")


def _check_length(word: str, chunks: int) -> None:
    if chunks > MOST_CHUNKS:
        raise LexiconError(
            f"voice: the target of {word} has {chunks} chunks of 200 ms, at most {MOST_CHUNKS} are said in one word: "
            "cut the recording"
        )
