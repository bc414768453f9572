"""dMel: audio to codes, 80 mel channels in 16 bins every 50 ms (Bai et al. 2024, arXiv 2407.15835, in Inkling's form).

16 kHz; hop 800, window 1600 (periodic Hann), 800 zeros before the first sample and no centring, so frame i needs
nothing after its own 800 samples; magnitude; Slaney mels 0 to 8000 Hz; the nearest of 16 centres in log10 over [-7, 2].

What is bit-equal: a session's **codes** do not depend on chunking or on which sessions share the call (fixed-order mel
sum in `kernels.ops.linear`, comparisons only from there on), and they equal those of transformers'
`InklingFeatureExtractor` and `InklingProcessor` on the whole utterance for every recording tested. Log-mels are never
formed: transformers sums the mel bands in a library matmul whose order is its own, so they would differ in the last
bits; a code differs only where that difference straddles a bin's edge, about once in ten million codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from kernels import ops
from kernels.layout import PackedLinear
from model.config import MEL_BINS, MEL_CHANNELS

SAMPLE_RATE_HZ = 16000
HOP = 800
"""Samples in a frame's stride: 50 ms."""
WINDOW = 1600
LOG10_MIN, LOG10_MAX = -7.0, 2.0


@dataclass(frozen=True)
class DMel:
    """The constants of the front end; make it once with `DMel.build` (it packs weights for the active backend)."""

    window: Tensor  # fp32 [1600]
    mel: PackedLinear  # [80, 801]
    edges: Tensor  # fp32 [15]: the smallest mel value of bins 1 … 15

    @staticmethod
    def build() -> DMel:
        filters = mel_filter_bank(
            num_frequency_bins=WINDOW // 2 + 1,
            num_mel_filters=MEL_CHANNELS,
            min_frequency=0.0,
            max_frequency=SAMPLE_RATE_HZ / 2.0,
            sampling_rate=SAMPLE_RATE_HZ,
            norm="slaney",
            mel_scale="slaney",
        )
        mel = torch.from_numpy(np.ascontiguousarray(filters.T, dtype=np.float32))
        return DMel(torch.hann_window(WINDOW, periodic=True), ops.pack_linear(mel), bin_edges())

    def codes(self, waveform: Tensor) -> Tensor:
        """waveform fp32 [S, n * 800], from each session's first sample on -> uint8 [S, n, 80]."""
        return self.continued(F.pad(waveform, (WINDOW - HOP, 0)))

    def continued(self, samples: Tensor) -> Tensor:
        """Streaming: samples fp32 [S, 800 + n * 800], the first 800 being the last of the chunk before (zeros at the
        start) -> uint8 [S, n, 80]; a micro-turn has n = 4. Who owns a session keeps its last 800 samples."""
        sessions, count = samples.shape
        if samples.dtype != torch.float32 or count % HOP or count <= WINDOW - HOP:
            raise ValueError(
                f"dMel: got {count - WINDOW + HOP} samples of {samples.dtype} a session; need float32 at "
                f"{SAMPLE_RATE_HZ} Hz, a multiple of {HOP}"
            )
        frames = samples.unfold(1, WINDOW, HOP)  # [S, n, 1600]
        spectrum = torch.view_as_real(torch.fft.rfft(frames * self.window))
        re, im = spectrum.unbind(-1)
        # re^2 + im^2, floor and root in Inkling's order; each call rounds elementwise, so neighbours do not matter.
        magnitude = (re * re + im * im).clamp_min_(1e-10).sqrt_()
        mel = ops.linear(magnitude.view(-1, magnitude.shape[-1]), self.mel)
        if not bool(torch.isfinite(mel).all()):
            raise ValueError("dMel: the samples hold a NaN or infinity")
        return (
            torch.bucketize(mel, self.edges, right=True, out_int32=True)
            .to(torch.uint8)
            .view(sessions, -1, MEL_CHANNELS)
        )


def quantise(log_mel: Tensor) -> Tensor:
    """Inkling's rule: index of the nearest centre, the lower one when halfway. fp32 [...] -> int64 [...]."""
    centres = torch.linspace(LOG10_MIN, LOG10_MAX, MEL_BINS, dtype=torch.float64).float()
    return (log_mel.clamp(LOG10_MIN, LOG10_MAX).unsqueeze(-1) - centres).abs().argmin(-1)


def bin_edges() -> Tensor:
    """Per bin b >= 1 the smallest fp32 mel value that `quantise(log10(value))` puts into it, [15].

    By bisection over the fp32 numbers (as integers they are ordered like their values). Comparing with these edges
    gives Inkling's codes without a logarithm."""
    wanted = torch.arange(1, MEL_BINS)
    low = torch.full((MEL_BINS - 1,), 1e-10).view(torch.int32).long()
    high = torch.full((MEL_BINS - 1,), 1e3).view(torch.int32).long()
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        inside = quantise(torch.log10(middle.int().view(torch.float32))) >= wanted
        high, low = torch.where(inside, middle, high), torch.where(inside, low, middle)
    return high.int().view(torch.float32)
