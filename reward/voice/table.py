"""``python -m reward.voice.table [--words one,two] [--iterations N]``: what Griffin-Lim costs in intelligibility.

For each word of the lexicon: its recording, its target's sound made as a whole, and streamed chunk by chunk. Prints how
many of each the recogniser understands with the closed grammar of all these words and in free decoding, how far the
sound's own mels are from the target (mean absolute difference of natural logarithms), and the processor's milliseconds
a chunk. It needs pocketsphinx (``pip install -e '.[voice]'``).
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("reward.voice.table")

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.program.arguments import Parser
from model.program.ranges import Range, number
from model.voice.mel import CHUNK_SAMPLES, log_mels, mel_chunks
from model.voice.sound import ITERATIONS, LATENCY_SAMPLES, Speaker, render
from reward.voice.recognise import Recogniser
from rollout.world.lexicon import WORDS_FOLDER, Lexicon
from rollout.world.speech import DEFAULT_FOLDER, SpeechBank

SPOKEN = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("breathe", "yes", "sure", "here", "is", "the", "answer", "left", "right", "up", "down"),
    *("stop", "okay", "hello", "goodbye", "no", "time", "seconds", "message", "echo", "with"),
)
"""The words of the shipped families' experts, and some more."""


@dataclass(frozen=True)
class Row:
    """How well one kind of sound is understood."""

    kind: str
    closed: int  # words understood with the closed grammar
    free: int  # words understood, alone, in free decoding
    distance: float  # mean absolute difference of ln magnitude between the sound's mels and the target's
    ms_a_chunk: float  # processor time
    confused: tuple[tuple[str, str | None], ...]  # (word, what the closed grammar heard instead)


def streamed(target: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """A target [n, 20, 80] through a `Speaker`, without its lag: fp32 [n * 3200]."""
    speaker = Speaker(iterations)
    sound = torch.cat([speaker.append(chunk) for chunk in (*target, None)])
    return sound[LATENCY_SAMPLES : LATENCY_SAMPLES + len(target) * CHUNK_SAMPLES]


def recordings() -> dict[str, Tensor]:
    """The sound behind each target of `Lexicon.open`."""
    clips = [clip for folder in (DEFAULT_FOLDER, WORDS_FOLDER) for clip in reversed(SpeechBank.open(folder).clips)]
    return {clip.words[0]: torch.tensor(clip.samples) for clip in clips if len(clip.words) == 1}


def row(kind: str, make: Callable[[str], Tensor], lexicon: Lexicon, recogniser: Recogniser) -> Row:
    """``make``: a word's sound, fp32 [samples]."""
    started = time.process_time()
    sounds = {word: make(word) for word in recogniser.words}
    seconds, chunks = time.process_time() - started, 0
    distances = []
    for word, sound in sounds.items():
        target = lexicon.target(word)
        again = mel_chunks(F.pad(sound, (0, len(target) * CHUNK_SAMPLES - len(sound))))
        distances.append(float(np.abs(log_mels(again) - log_mels(target)).mean()))
        chunks += len(target)
    heard = {word: recogniser.word(sound) for word, sound in sounds.items()}
    free = [recogniser.free(sound) == (word,) for word, sound in sounds.items()]
    return Row(
        kind,
        len([word for word in heard if heard[word] == word]),
        free.count(True),
        float(np.mean(distances)),
        1000 * seconds / chunks,
        tuple((word, said) for word, said in heard.items() if said != word),
    )


def table(words: Sequence[str], iterations: int = ITERATIONS) -> list[Row]:
    """Rows for the recording, the whole and the streamed sound. Raises LexiconError and RecogniserError."""
    lexicon, spoken = Lexicon.open(), recordings()
    for word in words:
        lexicon.target(word)  # one that it lacks is named before the recogniser begins
    recogniser = Recogniser(words)
    return [
        row("recording", spoken.__getitem__, lexicon, recogniser),
        row("whole", lambda word: render(lexicon.target(word), iterations), lexicon, recogniser),
        row("streamed", lambda word: streamed(lexicon.target(word), iterations), lexicon, recogniser),
    ]


def parser() -> Parser:
    """The command's options."""
    out = Parser("reward.voice.table", __doc__)
    out.add_argument("--words", default=",".join(SPOKEN), help="of the lexicon, with commas between them")
    count = number(int, Range(1, 1000))
    out.add_argument("--iterations", type=count, default=ITERATIONS, help="of Griffin-Lim (default %(default)s)")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    words = list(dict.fromkeys(options.words.split(",")))
    print(f"{len(words)} words      closed   free   |d ln mel|   ms a chunk   heard instead")
    for one in table(words, options.iterations):
        instead = ", ".join(f"{word}: {said or 'nothing'}" for word, said in one.confused)
        print(
            f"{one.kind:12} {one.closed:8} {one.free:6} {one.distance:12.3f} {one.ms_a_chunk:12.1f}   {instead or '-'}"
        )
