"""Recordings of human speech, selected by their words.

A folder of speech holds audio files (FLAC or WAV, 16 kHz, mono) and ``manifest.jsonl`` with one object a line:
``{"file": "four.flac", "text": "four", "seconds": 0.802}``. The folder that ships with the package
(`DEFAULT_FOLDER`) is a small set of real prompts under CC-BY-SA-3.0; its LICENSE.txt names the speaker.

Files are not resampled; another rate is an error. All recordings are read when the bank is loaded, so that a damaged
file stops a run at its start. This module knows nothing of scenarios.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from kernels import exact
from kernels.errors import MetronomeError
from model.program.ranges import shown
from model.program.reading import UnreadableError, read_json_lines
from model.senses.audio import SAMPLE_RATE_HZ

Split = Literal["train", "held_out"]

DEFAULT_FOLDER = Path(__file__).parents[1] / "data" / "speech"
MANIFEST = "manifest.jsonl"

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# Words with a meaning in a scenario, and words that sound like them. A recording with one of them is not used as
# filler.
RESERVED_WORDS = frozenset(NUMBER_WORDS) | {
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    *("eleven", "twelve", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),
    *("hundred", "thousand", "million", "billion", "oh", "for"),
    *("seconds", "minute", "minutes", "hour", "hours", "thank", "goodbye", "stop"),
}
_TEEN_OR_ORDINAL = re.compile(r".*(teen|teenth|tieth|lfth|redth|nth)")

_LENGTH_TOLERANCE_S = 0.02  # manifests round; a truncated file misses far more
_TRIM_FRAME = SAMPLE_RATE_HZ // 100  # 10 ms
_TRIM_THRESHOLD = 0.03  # of the loudest frame's RMS: -30 dB, above the hiss of telephone recordings
_LEVEL_RMS = 0.1  # every clip is brought to this level (-20 dB full scale), so that a scenario's gain means the same


class SpeechError(MetronomeError):
    """A folder of speech cannot be used; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True, eq=False)
class Clip:
    """One recording, with silence at its ends removed and normalised level."""

    file: str
    text: str
    samples: NDArray[np.float32]  # [samples] at 16 kHz, RMS 0.1

    @property
    def words(self) -> tuple[str, ...]:
        """The transcript in lower case without punctuation."""
        return normalise(self.text)

    @property
    def seconds(self) -> float:
        """Duration, without the silence removed."""
        return len(self.samples) / SAMPLE_RATE_HZ


class SpeechBank:
    """All recordings of one folder, in the manifest's order."""

    def __init__(self, folder: Path, clips: tuple[Clip, ...]) -> None:
        self.folder = folder
        self.clips = clips
        self._by_words: dict[tuple[str, ...], tuple[Clip, ...]] = {}
        for clip in clips:
            self._by_words[clip.words] = (*self._by_words.get(clip.words, ()), clip)

    @classmethod
    def open(cls, folder: str | Path | None = None) -> SpeechBank:
        """Reads the manifest and every recording of ``folder``, by default of the set that comes with the program;
        raises `SpeechError` at the first thing wrong."""
        folder = DEFAULT_FOLDER if folder is None else Path(folder)
        if not folder.is_dir():
            raise SpeechError(
                f"speech folder {folder} does not exist: give a folder with {MANIFEST} and its recordings"
            )
        manifest = folder / MANIFEST
        if not manifest.is_file():
            raise SpeechError(f"speech folder {folder} has no {MANIFEST}: write one object a line, {_EXAMPLE}")
        try:
            entries = [_parse(f"{manifest}, line {number}", entry) for number, entry in read_json_lines(manifest)]
        except UnreadableError as error:
            raise SpeechError(f"{error}: write one object a line, {_EXAMPLE}") from None
        clips = tuple(_read_clip(folder, *entry) for entry in entries)
        if not clips:
            raise SpeechError(f"{manifest} lists no recordings: write one object a line, {_EXAMPLE}")
        return cls(folder, clips)

    def saying(self, *texts: str) -> tuple[Clip, ...]:
        """The recordings whose words are exactly one of ``texts``. Raises `SpeechError` if there is none."""
        clips = tuple(clip for text in texts for clip in self._by_words.get(normalise(text), ()))
        if not clips:
            raise SpeechError(
                f"speech folder {self.folder} has no recording that says {' or '.join(map(repr, texts))}: "
                f"add one to {MANIFEST}"
            )
        return clips

    def fillers(self, split: Split, words: tuple[int, int], seconds: tuple[float, float]) -> tuple[Clip, ...]:
        """Recordings of one split without reserved words or digits, whose numbers of words and seconds are in the given
        ranges (inclusive). Raises `SpeechError` if there is none."""
        clips = tuple(
            clip
            for clip in self.clips
            if split_of(clip) == split
            and words[0] <= len(clip.words) <= words[1]
            and seconds[0] <= clip.seconds <= seconds[1]
            and _is_filler(clip.words)
        )
        if not clips:
            raise SpeechError(
                f"speech folder {self.folder} has no {split} recording of {words[0]} to {words[1]} words and "
                f"{seconds[0]} to {seconds[1]} s without numbers or command words: add some to {MANIFEST}"
            )
        return clips


def pick(rng: np.random.Generator, clips: tuple[Clip, ...]) -> Clip:
    """A random one of ``clips``."""
    return clips[int(rng.integers(len(clips)))]


def split_of(clip: Clip) -> Split:
    """The split of a recording: about one in three is held out, by a digest of its words. So two readings of one
    sentence are in the same split, and any folder is divided without a list."""
    digest = blake2b(" ".join(clip.words).encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "little") % 3 == 0 else "train"


def normalise(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation: ``"I'm sorry."`` -> ``("i'm", "sorry")``."""
    return tuple(re.findall(r"[a-z0-9']+", text.lower()))


def _is_filler(words: tuple[str, ...]) -> bool:
    """No reserved word, no digit, and more than spelled-out letters."""
    return (
        not RESERVED_WORDS.intersection(words)
        and not any(_TEEN_OR_ORDINAL.fullmatch(word) or any(c.isdigit() for c in word) for word in words)
        and any(len(word) > 2 for word in words)
    )


_EXAMPLE = '{"file": "four.flac", "text": "four", "seconds": 0.802}'


def _parse(where: str, entry: dict[str, Any]) -> tuple[str, str, float]:
    if not {"file", "text", "seconds"} <= entry.keys():
        raise SpeechError(f"{where}: needs the keys file, text and seconds: write {_EXAMPLE}")
    file, text, seconds = entry["file"], entry["text"], entry["seconds"]
    if not isinstance(file, str) or not isinstance(text, str) or not normalise(text):
        raise SpeechError(f"{where}: file and text must be strings and text must hold a word: write {_EXAMPLE}")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
        raise SpeechError(f"{where}: seconds must be a positive number, not {shown(seconds)}: write {_EXAMPLE}")
    if not file.isprintable() or Path(file).is_absolute() or ".." in Path(file).parts:
        raise SpeechError(f"{where}: file {shown(file)} lies outside the speech folder: give a path inside it")
    return file, text, float(seconds)


def _read_clip(folder: Path, file: str, text: str, seconds: float) -> Clip:
    path = folder / file
    if not path.is_file():
        raise SpeechError(f"recording {path} is missing: restore it or take its line out of {folder / MANIFEST}")
    try:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise SpeechError(f"recording {path} cannot be decoded ({error.error_string}): restore the file") from error
    if rate_hz != SAMPLE_RATE_HZ:
        raise SpeechError(
            f"recording {path} has a sample rate of {rate_hz} Hz: convert it to {SAMPLE_RATE_HZ} Hz "
            f"(for example: sox {file} -r {SAMPLE_RATE_HZ} out.flac)"
        )
    if samples.shape[1] != 1:
        raise SpeechError(f"recording {path} has {samples.shape[1]} channels: convert it to mono")
    decoded_s = len(samples) / SAMPLE_RATE_HZ
    if decoded_s < seconds - _LENGTH_TOLERANCE_S:
        raise SpeechError(
            f"recording {path} holds {decoded_s:.3f} s where {MANIFEST} says {seconds:.3f} s: the file is truncated; "
            "restore it, or correct the manifest if it is whole"
        )
    if not np.isfinite(samples).all() or not samples.any():
        raise SpeechError(f"recording {path} is silent or holds values that are no numbers: restore the file")
    return Clip(file, text, _level(_trim(samples[:, 0])))


def _trim(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cuts 10 ms frames quieter than the threshold off both ends; what remains starts and ends with audible speech."""
    padded = np.pad(samples, (0, -len(samples) % _TRIM_FRAME))
    energy = exact.total(np.square(padded.reshape(-1, _TRIM_FRAME), dtype=np.float64))
    loud = np.flatnonzero(energy >= _TRIM_THRESHOLD * _TRIM_THRESHOLD * energy.max())
    return samples[loud[0] * _TRIM_FRAME : (loud[-1] + 1) * _TRIM_FRAME]


def _level(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    # In a written order and by the square root, which IEEE 754 rounds: the same bits on every machine.
    rms = np.sqrt(exact.total(np.square(samples, dtype=np.float64)) / len(samples))
    levelled = (samples * (_LEVEL_RMS / rms)).astype(np.float32)
    levelled.setflags(write=False)
    return levelled
