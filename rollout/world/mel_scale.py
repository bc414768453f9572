"""The constants of the voice's mels, from the shipped recordings: ``python -m rollout.world.mel_scale`` prints
model/voice/scale.py.

Mean and standard deviation of each band's natural logarithm over all frames of all recordings (118, trimmed and
levelled by `rollout.world.speech`), to two decimals: plain numbers, so that a change of a recording shows in a diff.
"""

from __future__ import annotations

if __name__ == "__main__":
    from model.program.startup import run_command

    run_command("rollout.world.mel_scale")

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kernels import exact
from model.program.arguments import Parser
from model.voice.mel import BEFORE, HOP, log_magnitudes
from rollout.world.speech import SpeechBank

_TEXT = '''"""Mean and standard deviation of ln magnitude of each mel band in the shipped recordings.

Printed by ``python -m rollout.world.mel_scale``; do not edit. Another number is another voice: weights that were
trained with the old one speak wrongly.
"""

MEAN = (
{mean}
)
STD = (
{std}
)'''


def band_scale(bank: SpeechBank) -> tuple[list[float], list[float]]:
    """(means, standard deviations), each of 80 numbers with two decimals."""
    logs = np.concatenate([_frames(clip.samples) for clip in bank.clips]).T  # [80, frames]
    mean = exact.total(logs) / logs.shape[1]
    variance = exact.total(np.square(logs - mean[:, None])) / logs.shape[1]
    return [round(x, 2) for x in mean.tolist()], [round(x, 2) for x in np.sqrt(variance).tolist()]


def _frames(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    return log_magnitudes(np.pad(samples, (BEFORE, -len(samples) % HOP)))


def scale_text(bank: SpeechBank) -> str:
    """The text of model/voice/scale.py."""
    mean, std = band_scale(bank)
    return _TEXT.format(mean=_rows(mean), std=_rows(std)) + "\n"


def _rows(numbers: list[float]) -> str:
    return "\n".join("    *(" + ", ".join(f"{x:.2f}" for x in numbers[i : i + 16]) + ")," for i in range(0, 80, 16))


def parser() -> Parser:
    """The command's arguments: none."""
    return Parser("rollout.world.mel_scale", __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    parser().parse_args(argv)
    print(scale_text(SpeechBank.open()), end="")
