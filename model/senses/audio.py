"""dMel: audio to codes, 80 mel channels in 16 bins every 50 ms (Bai et al. 2024, arXiv 2407.15835, in Inkling's form).

16 kHz; hop 800, window 1600 (periodic Hann), 800 zeros before the first sample and no centring, so frame i needs
nothing after its own 800 samples; magnitude; Slaney mels 0 to 8000 Hz; the nearest of 16 centres in log10 over [-7, 2].

What is bit-equal: a session's **codes** depend on its samples alone: not on chunking, on which sessions share the call,
on the backend, the device or the processor. The arithmetic is fp64 in a written order (`kernels.dmel`), its constants
are correctly rounded (`kernels.exact`), and there is no logarithm: between two centres lies an edge, and mel values are
compared with the 15 edges. So a code is the exact rule's wherever the mel value is farther from an edge than fp64
rounds, 1e-13 of it. transformers' `InklingFeatureExtractor` and `InklingProcessor` compute in fp32, in a library's
order: their codes may differ where a mel value lies within 1e-5 of an edge, and do about once in a million codes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import dmel, exact
from kernels.layout import DMelTables
from model.config import MEL_BINS, MEL_CHANNELS

SAMPLE_RATE_HZ = 16000
HOP = 800  # samples from one frame to the next: 50 ms
WINDOW = 1600  # samples in a frame's analysis window
LOUDEST = 100.0
"""Largest sample that is taken for sound, where a microphone's full scale is 1: well above any mixture, and well below
16-bit samples that were not divided by 32768."""
LOG10_MIN, LOG10_MAX = -7, 2  # centres of the first and the last bin


@dataclass(frozen=True)
class DMel(DMelTables):
    """The audio front end; `DMel.build` makes it."""

    @staticmethod
    @functools.cache
    def build() -> DMel:
        """The front end, made once per process."""
        roots = torch.from_numpy(exact.roots_of_unity(WINDOW, WINDOW))
        hann = 0.5 - 0.5 * roots[:, 0]
        return DMel(hann, roots, *mel_filters(), bin_edges())

    def codes(self, waveform: Tensor) -> Tensor:
        """waveform fp32 [S, n * 800], from each session's first sample on -> uint8 [S, n, 80]."""
        return self.stream_codes(F.pad(waveform, (WINDOW - HOP, 0)))

    def stream_codes(self, samples: Tensor) -> Tensor:
        """Streaming: samples fp32 [S, 800 + n * 800], the first 800 being the last of the chunk before (zeros at the
        start) -> uint8 [S, n, 80]; a micro-turn has n = 4. The caller keeps each session's last 800 samples. Raises
        ValueError for another dtype or length."""
        return self.codes_and_mels(samples)[0]

    def codes_and_mels(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """As `stream_codes`, with the mel values that the codes come from: (uint8 [S, n, 80], fp64 [S, n, 80])."""
        if samples.ndim != 2:
            raise ValueError(f"dMel: got samples {list(samples.shape)}; need one session a row")
        count = samples.shape[1]
        if samples.dtype != torch.float32 or count % HOP or count <= WINDOW - HOP:
            raise ValueError(
                f"dMel: got {count - WINDOW + HOP} samples of {samples.dtype} a session; need float32 at "
                f"{SAMPLE_RATE_HZ} Hz, a multiple of {HOP}"
            )
        return dmel.codes(samples, HOP, self)


def bin_edges() -> Tensor:
    """Mel values at which the code changes, fp64 [15]; number b - 1 lies between the bins b - 1 and b, at 10 to the
    power halfway between their centres."""
    intervals = MEL_BINS - 1
    halfway = [2 * intervals * LOG10_MIN + (LOG10_MAX - LOG10_MIN) * (2 * b - 1) for b in range(1, MEL_BINS)]
    return torch.tensor([exact.power_of_ten(x, 2 * intervals) for x in halfway], dtype=torch.float64)


def mel_filters(length: int = WINDOW) -> tuple[Tensor, Tensor]:
    """Slaney's triangles of equal area, evenly spaced in mel from 0 to 8000 Hz, over the bins of a Fourier transform of
    ``length`` samples: (first bin int64 [80], weights fp64 [80, longest]), correctly rounded.

    Below 1000 Hz a mel is 200/3 Hz; above, f = 1000 e^((mel - 15) ln 6.4 / 27) (Slaney 1998, Auditory Toolbox)."""
    with localcontext(Context(prec=exact.DIGITS)):
        log_step = Decimal("6.4").ln() / 27
        top = 15 + (Decimal(SAMPLE_RATE_HZ) / 2000).ln() / log_step
        mels = [top * i / (MEL_CHANNELS + 1) for i in range(MEL_CHANNELS + 2)]
        corner_hz = [m * 200 / 3 if m < 15 else 1000 * ((m - 15) * log_step).exp() for m in mels]
        bins_hz = {k: Decimal(k * SAMPLE_RATE_HZ) / length for k in range(1, length // 2)}
        rows: list[tuple[int, list[float]]] = []
        for low, centre, high in zip(corner_hz, corner_hz[1:], corner_hz[2:], strict=False):
            inside = {k: f for k, f in bins_hz.items() if low < f < high}
            slopes = [min((f - low) / (centre - low), (high - f) / (high - centre)) for f in inside.values()]
            rows.append((min(inside), [float(2 / (high - low) * slope) for slope in slopes]))
    longest = max(len(weights) for _, weights in rows)
    padded = [weights + [0.0] * (longest - len(weights)) for _, weights in rows]
    return torch.tensor([first for first, _ in rows]), torch.tensor(padded, dtype=torch.float64)
