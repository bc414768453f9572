"""What an offline recogniser understands of a sound: pocketsphinx, with a closed grammar or free decoding.

The *closed grammar* allows exactly one of the given words, and answers which of them fits best, or nothing. *Free
decoding* has the general English language model that comes with pocketsphinx (130,000 words) and is far weaker: of the
lexicon's recordings themselves it understands about a half.

pocketsphinx is an optional package (``pip install -e '.[voice]'``), loaded when a `Recogniser` is made. It carries its
acoustic model; nothing is downloaded. Each sound is heard by itself: its front end starts anew, so that an answer does
not depend on what was heard before (tested). Its arithmetic is its own, in fp32 with libm's functions: no promise that
two machines understand the same.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kernels.errors import MetronomeError
from model.program.ranges import shown
from model.senses.audio import SAMPLE_RATE_HZ

QUIET_S = 0.3
"""Of noise alone before and after the sound: the recogniser looks for speech between silences."""
NOISE = 50
"""Largest sample, of 16 bits, of the noise that is added: -61 dB, as of a quiet room. The recogniser subtracts the mean
cepstrum of the whole utterance, which perfect silence spoils. Of the 32 recordings in ``python -m reward.voice.table``
it understands 26 with noise of 1, 29 with 10, 32 with 50, 28 with 200; it was chosen by these."""


class RecogniserError(MetronomeError):
    """The recogniser is not installed or cannot hear what is asked; the message says what to do."""


class Recogniser:
    """Holds the decoder with its acoustic model (30 MB, 0.3 s to load). Not to be shared between threads."""

    def __init__(self, words: Sequence[str]) -> None:
        """``words``: those of the closed grammar. Raises RecogniserError when pocketsphinx is missing, and for a word
        that its dictionary does not have."""
        try:
            sphinx = importlib.import_module("pocketsphinx")
        except ImportError:
            raise RecogniserError(
                "the voice's recogniser needs pocketsphinx, which is not installed: `pip install -e '.[voice]'` "
                "(or `pip install pocketsphinx`)"
            ) from None
        self.words = tuple(words)
        if not words:
            raise RecogniserError("the voice's recogniser got no word to listen for: give at least one")
        self._decoder: Any = sphinx.Decoder(samprate=SAMPLE_RATE_HZ, loglevel="FATAL")
        self._free = self._decoder.current_search()
        for word in words:
            if not re.fullmatch(r"[a-z']+", word) or self._decoder.lookup_word(word) is None:
                raise RecogniserError(
                    f"the voice's recogniser has no pronunciation of {shown(word)}: give lower-case English words"
                )
        self._decoder.add_jsgf_string("words", f"#JSGF V1.0; grammar words; public <word> = {' | '.join(words)};")

    def word(self, sound: Tensor) -> str | None:
        """The word of the grammar that a sound fp32 [samples] at 16 kHz says; None if it hears none."""
        return self._hear(sound, "words") or None

    def free(self, sound: Tensor) -> tuple[str, ...]:
        """The words that are heard when any may be said."""
        return tuple(re.sub(r"\(\d+\)", "", self._hear(sound, self._free)).split())

    def _hear(self, sound: Tensor, search: str) -> str:
        samples = sound.detach().cpu().double().numpy()
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise RecogniserError(
                f"the voice's recogniser got a sound {list(samples.shape)} with values that are no numbers or of more "
                "than one channel: give float32 [samples]"
            )
        quiet = round(QUIET_S * SAMPLE_RATE_HZ)
        samples = np.pad(np.rint(np.clip(samples, -1, 1) * 32767), (quiet, quiet))
        samples += np.random.default_rng(0).integers(-NOISE, NOISE + 1, len(samples))
        self._decoder.reinit_feat()  # the front end keeps a few samples of the last sound, which changes some answers
        self._decoder.activate_search(search)
        self._decoder.start_utt()
        self._decoder.process_raw(np.clip(samples, -32768, 32767).astype("<i2").tobytes(), full_utt=True)
        self._decoder.end_utt()
        said = self._decoder.hyp()
        return "" if said is None else str(said.hypstr)
