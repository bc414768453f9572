"""Recordings of human speech, selected by their words.

A folder of speech holds audio files (FLAC or WAV, 16 kHz, mono) and ``manifest.jsonl`` with one object a line:
``{"file": "four.flac", "text": "four", "seconds": 0.802}``. The folder that ships with the package
(`DEFAULT_FOLDER`) is a small set of real prompts under CC-BY-SA-3.0; its LICENSE.txt names the speaker.

All recordings are read when the bank is loaded, so that a wrong one stops a run at its start. Refused, with file and
line of the manifest:

- what `rollout.world.recording` refuses: paths that leave the folder, other rates, channels or formats, samples beyond
  full scale, or that are no numbers;
- lengths other than ``seconds`` (a truncated or another file), more than `LONGEST_S`, or text without a word or of more
  than `MOST_WORDS`;
- what is no speech, because bringing it to the common level would make a blast of it: silence, clicks (less than
  `SHORTEST_S` of it is loud, or its peak is more than `MOST_CREST` times its RMS) and a constant offset;
- the same sound twice, as one file or as two: two texts would contradict each other, and the splits of fillers, which
  are made by words, would share it.

Samples are used as they are: neither resampled nor freed of a small offset. A quiet or loud recording is brought to
the common level. This module knows nothing of scenarios.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kernels import exact
from kernels.errors import MetronomeError
from model.program.ranges import Range, shown
from model.program.reading import UnreadableError, read_json_lines
from model.senses.audio import SAMPLE_RATE_HZ
from rollout.world.recording import RecordingError, read_recording

Split = Literal["train", "held_out"]

DEFAULT_FOLDER = Path(__file__).parents[1] / "data" / "speech"
MANIFEST = "manifest.jsonl"

LONGEST_S = 30.0
SHORTEST_S = 0.05
"""Least time, in frames of 10 ms, above the trimming threshold."""
MOST_CREST = 16.0
"""Largest peak over RMS. That of the shipped recordings is at most 6.3; a single click in a second of silence has 126.
"""
MOST_OFFSET = 0.1
"""Of the power; the shipped recordings have 0.00003."""
LEAST_PEAK = 0.001
"""Of full scale; what is quieter than -60 dB is taken for silence."""
MOST_WORDS = 100

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

_LENGTH_TOLERANCE_S = 0.02  # manifests round; a truncated or another file is further off
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
        clips: list[Clip] = []
        of_length: defaultdict[int, list[tuple[int, Clip]]] = defaultdict(list)  # samples -> (line, clip)
        try:
            for number, entry in read_json_lines(manifest):
                clip = _read_clip(f"{manifest}, line {number}", folder, entry)
                like = of_length[len(clip.samples)]
                if earlier := next((line for line, other in like if _same_sound(clip, other)), None):
                    raise SpeechError(
                        f"{manifest}, line {number}: {clip.file} is the same sound as line {earlier}'s recording: take "
                        "one of the two lines out"
                    )
                like.append((number, clip))
                clips.append(clip)
        except UnreadableError as error:
            raise SpeechError(f"{error}: write one object a line, {_EXAMPLE}") from None
        if not clips:
            raise SpeechError(f"{manifest} lists no recordings: write one object a line, {_EXAMPLE}")
        return cls(folder, tuple(clips))

    def digest(self) -> str:
        """16 hexadecimal digits; equal for equal words and samples in one order, wherever they lie."""
        digest = blake2b(digest_size=8)
        for clip in self.clips:
            digest.update(f"{clip.text}\n{len(clip.samples)}\n".encode())
            digest.update(clip.samples.tobytes())
        return digest.hexdigest()

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


def _read_clip(where: str, folder: Path, entry: dict[str, Any]) -> Clip:
    """``entry``: the manifest's line that ``where`` names."""
    if not {"file", "text", "seconds"} <= entry.keys():
        raise SpeechError(f"{where}: needs the keys file, text and seconds: write {_EXAMPLE}")
    file, text, seconds = entry["file"], entry["text"], entry["seconds"]
    if not isinstance(file, str) or not isinstance(text, str) or not normalise(text):
        raise SpeechError(f"{where}: file and text must be strings and text must hold a word: write {_EXAMPLE}")
    if len(words := normalise(text)) > MOST_WORDS or len(text) > 20 * MOST_WORDS:
        raise SpeechError(
            f"{where}: text has {len(words)} words and {len(text)} characters; at most {MOST_WORDS} words make a "
            f"recording of up to {LONGEST_S:g} s"
        )
    if problem := Range(0, LONGEST_S, open_low=True).problem(seconds):
        raise SpeechError(f"{where}: seconds is {shown(seconds)}: {problem}: write {_EXAMPLE}")
    try:
        samples = read_recording(folder, file, LONGEST_S)
    except RecordingError as error:
        raise SpeechError(f"{where}: {error}") from None
    if abs((decoded_s := len(samples) / SAMPLE_RATE_HZ) - seconds) > _LENGTH_TOLERANCE_S:
        raise SpeechError(
            f"{where}: recording {folder / file} holds {decoded_s:.3f} s where {MANIFEST} says {seconds:.3f} s: "
            "restore the file, or correct the manifest if it is whole"
        )
    if problem := _no_speech(samples):
        raise SpeechError(f"{where}: recording {folder / file} {problem}: record it again")
    return Clip(file, text, _level(_trim(samples)))


def _no_speech(samples: NDArray[np.float32]) -> str | None:
    """Why samples cannot be speech, as the end of a sentence; None if they can be."""
    if (peak := float(np.abs(samples).max())) < LEAST_PEAK:
        return f"is silent (its loudest sample is {peak:.1e} of full scale)"
    loud_s = len(_loud_frames(samples)) * _TRIM_FRAME / SAMPLE_RATE_HZ
    if loud_s < SHORTEST_S:
        return f"holds a click, not speech (only {loud_s:.2f} s of it is loud)"
    heard = _trim(samples).astype(np.float64)
    power = exact.total(heard * heard) / len(heard)
    if (crest := peak / np.sqrt(power)) > MOST_CREST:
        return f"holds clicks, not speech (its peak is {crest:.0f} times its RMS; at most {MOST_CREST:.0f})"
    offset = exact.total(heard) / len(heard)
    if offset * offset > MOST_OFFSET * power:
        return f"has a constant offset of {offset:.3g}, which is no speech"
    return None


def _same_sound(a: Clip, b: Clip) -> bool:
    """Whether two clips of one length differ by less than 2 % of their level (as copies in two formats may, which are
    rounded differently) in all samples."""
    return all(bool((np.abs(a.samples[::n] - b.samples[::n]) < 0.02 * _LEVEL_RMS).all()) for n in (100, 1))


def _trim(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cuts 10 ms frames quieter than the threshold off both ends; what remains starts and ends with audible speech."""
    loud = _loud_frames(samples)
    return samples[loud[0] * _TRIM_FRAME : (loud[-1] + 1) * _TRIM_FRAME]


def _loud_frames(samples: NDArray[np.float32]) -> NDArray[np.int64]:
    """Indices of the 10 ms frames that are not quieter than the threshold; ``samples``: not all 0."""
    padded = np.pad(samples, (0, -len(samples) % _TRIM_FRAME))
    energy = exact.total(np.square(padded.reshape(-1, _TRIM_FRAME), dtype=np.float64))
    return np.flatnonzero(energy >= _TRIM_THRESHOLD * _TRIM_THRESHOLD * energy.max())


def _level(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    # In a written order and by the square root, which IEEE 754 rounds: the same bits on every machine.
    rms = np.sqrt(exact.total(np.square(samples, dtype=np.float64)) / len(samples))
    levelled = (samples * (_LEVEL_RMS / rms)).astype(np.float32)
    levelled.setflags(write=False)
    return levelled
