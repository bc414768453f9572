"""Reads one recording of a person from a folder that people fill: FLAC or WAV, 16 kHz, mono.

Used for the simulated users' speech (`rollout.world.speech`) and for conversations that people labelled
(`reward.learned.human`). Nothing is resampled, mixed or rescaled: what does not fit is refused, in words that say what
to do. Formats with loss, such as Ogg or MP3, are refused, because their decoders do not give the same samples on every
machine. Links are followed.
"""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile
from numpy.typing import NDArray

from kernels.errors import MetronomeError
from model.program.ranges import shown
from model.program.reading import UnreadableError, read_bytes
from model.senses.audio import SAMPLE_RATE_HZ

FORMATS = ("FLAC", "WAV", "WAVEX")
LONGEST_NAME = 200


class RecordingError(MetronomeError):
    """A recording cannot be used."""


def read_recording(folder: Path, file: str, longest_s: float) -> NDArray[np.float32]:
    """The samples, float32 [samples], each 0 or of a size from fp32's smallest normal number to 1.

    ``file``: path within ``folder``, so that the folder can be moved and shared. Raises RecordingError, naming the
    file, for another kind of file, more than ``longest_s`` seconds, no sample, or samples out of range."""
    if not file.isprintable() or not 0 < len(file) <= LONGEST_NAME:
        raise RecordingError(
            f"recording {shown(file)}: give a file's name of up to {LONGEST_NAME} characters, none of control"
        )
    if PurePosixPath(file).is_absolute():
        raise RecordingError(f"recording {shown(file)} lies outside the folder {folder}: give a path inside it")
    if ".." in PurePosixPath(file).parts:  # a link before it could lead out
        raise RecordingError(f"recording {shown(file)}: give its path in the folder {folder} without '..'")
    path, most = folder / file, round(longest_s * SAMPLE_RATE_HZ)
    try:
        with soundfile.SoundFile(io.BytesIO(read_bytes(path))) as sound:
            if sound.format not in FORMATS:
                raise RecordingError(f"recording {path} is {sound.format}: convert it to FLAC or WAV")
            if sound.samplerate != SAMPLE_RATE_HZ or sound.channels != 1:
                raise RecordingError(
                    f"recording {path} has a sample rate of {sound.samplerate} Hz and {sound.channels} channels: "
                    f"convert it to {SAMPLE_RATE_HZ} Hz, mono (sox {file} -r {SAMPLE_RATE_HZ} -c 1 out.flac)"
                )
            samples: NDArray[np.float32] = sound.read(most + 1, dtype="float32")
    except UnreadableError as error:
        raise RecordingError(f"recording {path} {error.problem}: give a FLAC or WAV file") from None
    except soundfile.LibsndfileError as error:
        raise RecordingError(f"recording {path} cannot be decoded ({error.error_string}): restore the file") from None
    if len(samples) > most:
        raise RecordingError(f"recording {path} is longer than {longest_s:g} s: cut it")
    if not len(samples):
        raise RecordingError(f"recording {path} holds no sample: restore the file")
    size = np.abs(samples)
    if not np.isfinite(samples).all():
        raise RecordingError(f"recording {path} holds values that are no numbers: restore the file")
    if size.max() > 1:
        raise RecordingError(
            f"recording {path} holds samples beyond full scale, up to {size.max():.3g}: scale them to -1 … 1"
        )
    if ((size > 0) & (size < np.finfo(np.float32).tiny)).any():
        raise RecordingError(f"recording {path} holds denormal numbers, which are no sound: save it with 16 bits")
    return samples
